"""Errors that a user can mend: all of one base class, and no message longer than a screen."""

import ast
import pickle
from pathlib import Path

import pytest

import dlk_utils
from dlk_utils import errors
from dlk_utils.errors import MOST_CHARACTERS, DataError, DlkError, ParameterError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


ALLOWED = {
    # What Python itself asks for.
    "AttributeError",
    "NotImplementedError",
    # It ends a pass that has gone far enough, and is caught there.
    "EnoughComputed",
    # `display.refusal`: a guard of ours did not do its work.
    "AssertionError",
    # Of `models.finding`, which makes an UnknownArchitecture of it.
    "_NotFound",
    # The usage of a command.
    "SystemExit",
    # Of `lab.parameters`, which makes a ParameterError of it.
    "_Refused",
}
"""What the package may raise besides kinds of `DlkError`."""


def raised_in(path: Path) -> set[str]:
    """The names of the classes that a module raises."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    classes = [error.func if isinstance(error, ast.Call) else error for error in raised]
    names = {node.id for node in classes if isinstance(node, ast.Name)}
    # A function that makes the error, or a variable that holds it, has a small letter.
    return {name for name in names if name.lstrip("_")[0].isupper()}


@pytest.mark.slow
def test_whatever_the_package_raises_is_shown_without_frames():
    """The notebooks show the errors of the base class as their message alone."""
    package = Path(dlk_utils.__file__).parent
    raised = {path.name: raised_in(path) for path in package.rglob("*.py")}
    names = {kind.__name__ for kind in KINDS} | ALLOWED
    assert "DataError" in raised["own_files.py"]
    assert {name: found - names for name, found in raised.items() if found - names} == {}


def test_every_error_is_a_kind_of_the_base_class():
    assert all(issubclass(kind, DlkError) for kind in KINDS)


def test_a_short_message_is_shown_as_it_is():
    for kind in KINDS:
        assert str(kind("expected this, got that")) == "expected this, got that"
    assert str(DlkError()) == ""


def test_a_message_longer_than_a_screen_is_shown_without_its_middle():
    columns = ",".join(f"column {i}" for i in range(50_000))
    message = str(DataError(f"own.csv: expected columns a,b, got {columns}; rename them"))
    assert len(message) < MOST_CHARACTERS + 50 and "characters are left out" in message
    assert message.startswith("own.csv: expected columns a,b, got column 0,column 1,")
    assert message.endswith("column 49999; rename them")


def test_a_message_of_many_lines_is_shown_without_its_middle():
    message = str(DataError("\n".join(f"row {i}" for i in range(200)) + "\nmend them"))
    assert len(message.splitlines()) <= 24
    assert message.startswith("row 0\nrow 1\n") and message.endswith("row 199\nmend them")


def test_an_error_of_another_process_keeps_its_message():
    error = pickle.loads(pickle.dumps(ParameterError("x" * 9000)))
    assert str(error) == str(ParameterError("x" * 9000)) and type(error) is ParameterError
