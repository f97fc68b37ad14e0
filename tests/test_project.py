"""The project's files agree: pins, environments, notebooks, make targets, list of mistakes, API."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import dlk_utils
from dlk_utils import errors
from dlk_utils.lab.book import NOTEBOOKS as RUN_IN_ORDER

TOP = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
NUMBER_DECIDING = ["torch", "transformers", "scikit-learn", "numpy"]


def read(name: str) -> str:
    return (TOP / name).read_text(encoding="utf-8")


def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


def canonical(name: str) -> str:
    """The one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    pairs = [line.split("==") for line in read("constraints.txt").splitlines() if "==" in line]
    return {canonical(name): pinned for name, pinned in pairs}


def extras_in(text: str) -> set[str]:
    """The extras of an installation of this checkout: `.[a,b]`."""
    return set(re.search(r"\.\[([\w,]+)\]", text)[1].split(","))


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def make_targets() -> set[str]:
    """The targets that `make` prints."""
    command = ["make", "--no-print-directory"]
    output = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^make ([\w-]+)", output, flags=re.MULTILINE))


def test_every_dependency_has_an_exact_pin():
    extras = project()["optional-dependencies"].values()
    wanted = [*project()["dependencies"], *(name for extra in extras for name in extra)]
    names = {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted}
    assert names - set(pins()) == set()


@pytest.mark.parametrize("name", NUMBER_DECIDING)
def test_a_library_that_decides_numbers_has_the_pinned_version(name):
    assert version(name).split("+")[0] == pins()[name]


def test_the_conda_environment_and_the_makefile_install_every_extra():
    extras = set(project()["optional-dependencies"])
    assert extras_in(read("environment.yml")) == extras
    assert extras_in(read("Makefile")) == extras


def test_the_conda_environment_uses_the_pins_and_the_python_of_the_project():
    dependencies = yaml.safe_load(read("environment.yml"))["dependencies"]
    [pip] = [d["pip"] for d in dependencies if isinstance(d, dict)]
    assert "--constraint constraints.txt" in pip
    assert f"python{project()['requires-python']}" in dependencies


def test_the_shapes_of_every_module_that_has_some_are_checked():
    options = tomllib.loads(read("pyproject.toml"))["tool"]["pytest"]["ini_options"]["addopts"]
    checked = re.search("--jaxtyping-packages=(\\S+)", options)[1].split(",")
    for path in sorted((TOP / "dlk_utils").rglob("*.py")):
        module = ".".join(path.relative_to(TOP).with_suffix("").parts)
        if "jaxtyping" in path.read_text():
            assert any(module.startswith(f"{package}.") for package in checked), module


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs(notebook):
    assert [cell["outputs"] for cell in code_cells(notebook) if cell["outputs"]] == []


OF_PANDAS = {
    "agg",
    "assign",
    "concat",
    "crosstab",
    "fillna",
    "head",
    "set_index",
    "tail",
    "to_frame",
}
"""Functions and methods that return a table."""


def bare_table(expression: ast.expr | None) -> bool:
    """Whether an expression is plainly a table of pandas, which a page would show as it is."""
    if isinstance(expression, ast.Subscript):
        return True
    if not isinstance(expression, ast.Call):
        return False
    called = expression.func
    if isinstance(called, ast.Name):
        is_displayed = called.id == "display" and bare_table(expression.args[0])
        return is_displayed or called.id in ("DataFrame", "Series", "with_intervals")
    return isinstance(called, ast.Attribute) and called.attr in OF_PANDAS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_no_table_without_a_caption(notebook):
    for cell in code_cells(notebook):
        statements = ast.parse("".join(cell["source"])).body
        displayed = [node for node in statements if isinstance(node, ast.Expr)]
        assert not any(bare_table(node.value) for node in displayed), cell["id"]


@pytest.mark.parametrize("shown", ["t[[0]]", "t.head(4)", "display(with_intervals(t))"])
def test_a_table_without_a_caption_is_found(shown):
    assert bare_table(ast.parse(shown, mode="eval").body)


def test_the_order_the_book_and_the_readme_have_every_notebook():
    names = [path.stem for path in NOTEBOOKS]
    assert sorted(RUN_IN_ORDER) == names
    assert re.findall(r"notebooks/(\w+)", read("book/_toc.yml")) == names
    assert re.findall(r"^\| `(\d\d_\w+)` \|", read("README.md"), flags=re.MULTILINE) == names


def test_every_notebook_begins_by_saying_which_packages_its_environment_lacks():
    guards = set()
    for notebook in NOTEBOOKS:
        parameters, guard, *_ = code_cells(notebook)
        assert "parameters" in parameters["metadata"]["tags"]
        assert guard["metadata"]["tags"] == ["remove-cell"]
        guards.add("".join(guard["source"]))
    [guard] = guards
    # A Python that has none of them: no site-packages, and this checkout is not on its path.
    command = [sys.executable, "-I", "-S", "-c", guard]
    done = subprocess.run(command, capture_output=True, text=True)
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ImportError: ") and "no dlk_utils and no myst_nb" in error
    assert error.endswith(f'"{sys.executable}" -m pip install -e ".[notebooks]"')


def test_a_checkout_that_is_on_the_path_but_not_installed_says_what_to_install(tmp_path):
    # Elsewhere, for an installation that can be edited leaves its mark beside the package.
    (tmp_path / "dlk_utils").symlink_to(TOP / "dlk_utils")
    command = [sys.executable, "-S", "-c", "import dlk_utils"]
    env = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert "ImportError: dlk_utils is not installed" in done.stderr
    assert 'pip install -e ".[notebooks]"' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", ["00", "01", "02", "03", "04", "06", "09", "11", "13"])
def test_a_page_opens_with_its_answer_and_shows_its_code_on_demand(number):
    [notebook] = (path for path in NOTEBOOKS if path.stem.startswith(number))
    title, parameters, _, set_up, heading, answer, *_ = json.loads(notebook.read_text())["cells"]
    assert "".join(title["source"]).startswith(f"# {number} ")
    for cell in (parameters, set_up, answer):
        assert "hide-input" in cell["metadata"]["tags"]
    assert "".join(heading["source"]) == "## The answer"
    assert "Markdown(" in "".join(answer["source"])


def test_make_alone_prints_the_targets():
    targets = {
        "setup",
        "demo",
        "book",
        "picture",
        "test",
        "lab",
        "lint",
        "bench",
        "organism",
        "clean",
    }
    assert targets <= make_targets()


def test_the_environment_is_made_with_the_model_so_that_no_notebook_waits_for_it():
    recipe = read("Makefile").split("$(VENV)/made: ")[1].split("\n\n")[0]
    assert "pip install" in recipe and "python -m dlk_utils.models.embedded_model" in recipe


def test_every_public_name_is_in_the_api_reference():
    page = read("book/api.md")
    documented = re.findall(r"auto(?:function|class):: [\w.]+\.(\w+)$", page, re.MULTILINE)
    assert "automodule:: dlk_utils.errors" in page
    assert set(dlk_utils.__all__) - set(vars(errors)) - set(documented) == set()


def test_the_entry_to_cite_and_the_foot_of_each_page_have_the_version_of_the_package():
    citation = yaml.safe_load(read("CITATION.cff"))
    page = read("book/cite.md").replace("\\_", "_")
    expected = project()["version"]
    assert citation["version"] == expected and f"version = {{{expected}}}" in page
    assert f"Version {expected}," in read("_config.yml")
    assert f"{{{citation['title']}}}" in page and citation["license"] in page


def test_every_mistake_of_the_list_is_made_in_a_test_of_its_number():
    sources = "\n".join(path.read_text() for path in (TOP / "tests").rglob("test_*.py"))
    planted = re.findall(r"^@pytest\.mark\.trap\(([\d, ]+)\)", sources, flags=re.MULTILINE)
    listed = re.findall(r"^\| (\d+) \|", read("book/mistakes.md"), flags=re.MULTILINE)
    assert {int(n) for numbers in planted for n in numbers.split(",")} == set(map(int, listed))
    assert [int(n) for n in listed] == list(range(1, len(listed) + 1))


def test_the_page_of_planted_mistakes_says_how_many_the_list_has():
    n_listed = len(re.findall(r"^\| \d+ \|", read("book/mistakes.md"), flags=re.MULTILINE))
    page = read("notebooks/07_traps.ipynb")
    assert f"**We guard against {n_listed} known mistakes. This page shows the first seven" in page
    numbers = re.findall(r"\b(\d+)\.(?=[ ,])", " ".join(re.findall(r'"## (\d[^"]*)"', page)))
    assert max(map(int, numbers)) == 17


UNIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios"}
UNIX_CALLS = {
    "os.fork",
    "os.getuid",
    "os.kill",
    # It replaces no file on Windows; `os.replace` does.
    "os.rename",
    "os.setsid",
    "os.uname",
    "signal.SIGKILL",
}
"""What is missing on Windows, or means something else there."""

GUARDED = {"rendering.py": ["resource"]}
"""What is used only where there is `/proc`, so only on Linux."""


def unix_only(path: Path) -> list[str]:
    """What a file uses that is on no Windows machine."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += UNIX_MODULES.intersection(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found += UNIX_MODULES.intersection([node.module])
        elif isinstance(node, ast.Attribute):
            found += UNIX_CALLS.intersection([ast.unparse(node)])
    return found


@pytest.mark.slow
def test_the_package_uses_nothing_that_windows_lacks():
    modules = sorted((TOP / "dlk_utils").rglob("*.py"))
    assert {path.name: unix_only(path) for path in modules if unix_only(path)} == GUARDED


def test_a_unix_call_is_found(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("import fcntl, os\nfrom resource import getrlimit\nos.rename('a', 'b')\n")
    assert unix_only(planted) == ["fcntl", "resource", "os.rename"]
