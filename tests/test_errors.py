"""Errors that a user can mend: all of one base class, and no message longer than a screen."""

import pickle

from dlk_utils import errors
from dlk_utils.errors import MOST_CHARACTERS, DataError, DlkError, ParameterError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


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
