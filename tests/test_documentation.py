"""The examples in the documentation work: Python is run, shell lines as far as that is cheap."""

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from test_project import TOP, make_targets

PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", *sorted((TOP / "book").glob("*.md"))]


def ignore(example) -> None:
    """Stand for an evaluator, where only the text of an example is wanted."""


def code_blocks(page: Path, language: str) -> list[str]:
    examples = Sybil([CodeBlockParser(language, ignore)]).parse(page).examples()
    return [str(example.parsed) for example in examples]


def pages_with_python() -> list:
    """The pages with Python examples; those that load a real model are slow."""
    cases = []
    for page in PAGES:
        code = "\n".join(code_blocks(page, "python"))
        is_slow = "load_model(" in code or "Run(" in code
        if code:
            marks = [pytest.mark.slow] if is_slow else []
            cases.append(pytest.param(page, id=page.name, marks=marks))
    return cases


def shell_commands(program: str) -> list[list[str]]:
    """The words of every shell command of the documentation, from the name of its program on."""
    commands = []
    for page in PAGES:
        for block in code_blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if program in words:
                    commands.append(words[words.index(program) :])
    return commands


@pytest.fixture
def own_registry(monkeypatch):
    """Keep the probes that an example registers out of the other tests."""
    from dlk_utils.probes.base import REGISTERED

    for kind, probes in REGISTERED.items():
        monkeypatch.setitem(REGISTERED, kind, dict(probes))


@pytest.mark.parametrize("page", pages_with_python())
def test_the_python_examples_of_a_page_run(page, own_registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in Sybil([PythonCodeBlockParser()]).parse(page).examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_shell_examples_of_a_page_are_well_formed(page):
    for block in code_blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_make_targets_of_the_documentation_exist():
    named = {words[1] for words in shell_commands("make")}
    assert {"setup", "book", "test", "lint", "organism"} <= named
    assert named - make_targets() == set()


def test_modules_that_the_documentation_runs_exist():
    modules = [words[2] for words in shell_commands("python") if words[1] == "-m"]
    assert modules
    for module in modules:
        assert importlib.util.find_spec(module), module


@pytest.mark.slow
def test_papermill_commands_of_the_documentation_name_real_notebooks_and_parameters(tmp_path):
    commands = shell_commands("papermill")
    assert commands
    for words in commands:
        notebook = TOP / "notebooks" / words[1]
        parameters = words[words.index("-p") :]
        if ">" in parameters:
            parameters = parameters[: parameters.index(">")]
        output = tmp_path / "out.ipynb"
        prepare = [sys.executable, "-m", "papermill", "--prepare-only", notebook, output]
        done = subprocess.run([*prepare, *parameters], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "unknown parameter" not in done.stderr
