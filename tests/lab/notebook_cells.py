"""Run the code cells of a notebook in this process, which is faster than a kernel of its own."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import Markdown
from IPython.utils.capture import capture_output

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


class Shown(NamedTuple):
    """What a notebook shows, as text."""

    cells: list[str]
    """What each cell prints, and shows as Markdown or as a table."""
    error: str
    """The message of the error that ended the notebook, with its cell; empty if it ended well."""


def run_cells(notebook: str, **parameters: Any) -> Shown:
    """Run the code cells of a notebook in order, with parameters as papermill puts them in."""
    content = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))
    shell = InteractiveShell.instance()
    shell.reset()
    shown = []
    try:
        for cell in _code_cells(content, parameters):
            with capture_output() as output:
                done = shell.run_cell(cell, store_history=True)
            shown.append(output.stdout + _markdown(done.result))
            error = done.error_before_exec or done.error_in_exec
            if error is not None:
                return Shown(shown, f"{type(error).__name__}: {error}\nin the cell\n{cell}")
        return Shown(shown, "")
    finally:
        InteractiveShell.clear_instance()


def _code_cells(content: dict, parameters: dict[str, Any]) -> list[str]:
    cells = []
    for cell in content["cells"]:
        if cell["cell_type"] != "code":
            continue
        cells.append("".join(cell["source"]))
        if "parameters" in cell["metadata"].get("tags", []):
            given = [f"{name} = {value!r}" for name, value in parameters.items()]
            cells.append("\n".join(["# Parameters", *given, ""]))
    return cells


def _markdown(result: Any) -> str:
    """The text of a last expression that is Markdown, of which a shell prints the type alone."""
    return result.data if isinstance(result, Markdown) else ""
