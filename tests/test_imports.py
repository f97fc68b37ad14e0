"""The contract of the house: imports go down the list of layers, never up and never round."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dlk_utils
from dlk_utils.provenance import imported_modules

PACKAGE = Path(dlk_utils.__file__).parent
LAYERS = (
    "errors",
    "safe_files",
    "provenance",
    "models",
    "questions",
    "extract",
    "probes",
    "evaluation",
    "organisms",
    "lab",
)
"""From the bottom to the top: a module imports from its own layer and from those before it."""
CORE = LAYERS[: LAYERS.index("lab")]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    return LAYERS.index(module.split(".")[1])


def modules() -> dict[str, Path]:
    """Every module but the package itself, and the entry points that nothing imports."""
    paths = [p for p in PACKAGE.rglob("*.py") if p.name != "__main__.py"]
    return {module_name(p): p for p in paths if p.parent != PACKAGE or p.stem != "__init__"}


def upward_imports(imports: dict[str, list[str]]) -> list[str]:
    return [
        f"{module} imports {imported}"
        for module, found in imports.items()
        for imported in found
        if layer_of(imported) > layer_of(module)
    ]


@pytest.fixture(scope="module")
def imports() -> dict[str, list[str]]:
    return {name: imported_modules(path) for name, path in modules().items()}


def test_no_module_imports_from_a_layer_above_its_own(imports):
    assert upward_imports(imports) == []


def test_no_module_imports_itself_by_way_of_others(imports):
    # Raises CycleError, which names the modules of the circle.
    list(graphlib.TopologicalSorter(imports).static_order())


@pytest.mark.parametrize("line", ["import dlk_utils.lab.run", "from dlk_utils.lab import run"])
def test_an_upward_import_is_found_also_inside_a_function(line, tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text(f"def extract():\n    {line}\n")
    imports = {"dlk_utils.extract.planted": imported_modules(planted)}
    assert "dlk_utils.extract.planted imports dlk_utils.lab.run" in upward_imports(imports)


def test_a_circle_is_found():
    circle = {
        "dlk_utils.models.a": ["dlk_utils.models.b"],
        "dlk_utils.models.b": ["dlk_utils.models.a"],
    }
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(circle).static_order())


def test_no_module_imports_public_names_from_the_top_of_the_package():
    """These are imported lazily, so that neither the layers nor the code hash would see it."""
    for path in modules().values():
        assert "from dlk_utils import " not in path.read_text(encoding="utf-8"), path


def test_every_folder_is_a_layer():
    assert {layer_of(name) for name in modules()} == set(range(len(LAYERS)))


def test_every_public_name_can_be_imported_and_is_documented():
    for name in dlk_utils.__all__:
        assert getattr(dlk_utils, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'activation'"):
        dlk_utils.activation  # noqa: B018


HEAVY = {
    "IPython",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "matplotlib",
    "myst_nb",
    "nbformat",
    "numpy",
    "pandas",
    "peft",
    "plotly",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "sphinx",
    "torch",
    "transformers",
}
"""Libraries that take long to import."""

NEEDED_BY_A_NOTEBOOK = {
    "IPython",
    "myst_nb",
    "numpy",
    "pandas",
    "plotly",
    "pyarrow",
    "scipy",
    "sklearn",
    "torch",
    # `extract.prefixes` extends its cache.
    "transformers",
}
"""Those of `HEAVY` that the first cell of a notebook may load. The others wait for their use."""


def loaded_by(code: str) -> set[str]:
    """Run code in a new interpreter, and return which libraries of `HEAVY` it has loaded."""
    code += f"\nimport sys; print(*({HEAVY} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def imports_of(notebook: Path) -> str:
    """The import statements of a notebook."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    statements = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            statements += [
                ast.unparse(node)
                for node in ast.parse(source).body
                if isinstance(node, ast.Import | ast.ImportFrom)
            ]
    return "\n".join(statements)


def test_importing_the_package_loads_no_heavy_library():
    assert loaded_by("import dlk_utils") == set()


START = """
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.instance()
start([])
versions()
"""


@pytest.mark.slow
def test_a_notebook_that_starts_loads_no_library_before_its_use():
    notebooks = sorted((PACKAGE.parent / "notebooks").glob("*.ipynb"))
    imports = "\n".join(map(imports_of, notebooks))
    assert loaded_by(imports + START) <= NEEDED_BY_A_NOTEBOOK


@pytest.mark.slow
def test_the_core_loads_without_the_lab():
    code = (
        "import sys, dlk_utils\n"
        "for name in dlk_utils.__all__: getattr(dlk_utils, name)\n"
        "print([m for m in sys.modules if m.startswith('dlk_utils.lab')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
