"""What every notebook starts with: parameter names checked, versions shown, figures set up."""

import ast
import difflib
import html
import logging
import platform
import warnings
from collections.abc import Callable

import pandas as pd

from dlk_utils.errors import ParameterError


def check_parameters(cells: list[str]) -> None:
    """Refuse a papermill parameter that is not in the `parameters` cell: papermill itself only warns, and runs the default.

    `cells` is the kernel's list of executed sources, `In`. The notebook's own cell begins with "# parameters", papermill's with "# Parameters".
    """
    own = {n for c in cells if c.startswith("# parameters") for n in _assigned(c)}
    given = {n for c in cells if c.startswith("# Parameters\n") for n in _assigned(c)}
    for name in sorted(given - own):
        near = difflib.get_close_matches(name, own, 1)
        raise ParameterError(
            f"unknown parameter {name!r}{f', did you mean {near[0]!r}?' if near else ''}; this notebook has {', '.join(sorted(own))}"
        )


def start(cells: list[str]) -> None:
    """Check the parameters, set up figures and quiet the libraries; the next cell can print `versions()`."""
    from IPython import get_ipython

    from dlk_utils.errors import (
        ChoiceError,
        DataError,
        DeadDropout,
        ModelError,
        StoreError,
        TemplateError,
        UnknownArchitecture,
    )
    from dlk_utils.lab.figures import use_book_renderer

    # what a user can put right is said in a few lines, without the frames of the package
    get_ipython().set_custom_exc(
        (
            ChoiceError,
            DataError,
            DeadDropout,
            ModelError,
            ParameterError,
            StoreError,
            TemplateError,
            UnknownArchitecture,
        ),
        _show_message,
    )
    check_parameters(cells)
    use_book_renderer()
    warnings.filterwarnings("ignore", message="IProgress not found")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    pd.set_option(
        "display.max_colwidth",
        60,
        "display.width",
        160,
        "display.max_columns",
        30,
        "display.precision",
        3,
    )


def versions() -> str:
    """One line on what computes here."""
    import sklearn
    import torch
    import transformers

    import dlk_utils

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"dlk_utils {dlk_utils.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, scikit-learn {sklearn.__version__}, Python {platform.python_version()}, {device}"


def show_prompt(row: pd.Series, tokens: list[str]) -> str:
    """A whole prompt as HTML, token by token; everything that came from data is escaped."""
    colours = ("#e8eef7", "#f7efe3")
    spans = "".join(
        f'<span style="background:{colours[i % 2]};color:#222">{html.escape(t).replace(chr(10), "&#9166;<br>")}</span>'
        for i, t in enumerate(tokens)
    )
    head = f"role {row.role}, instruction {row.instruction}, template {row.template}, choices {list(row.choices)}, label {row.label}, {len(tokens)} tokens"
    return f'<p><b>{html.escape(head)}</b></p><pre style="white-space:pre-wrap">{spans}</pre>'


def refusal(call: Callable) -> None:
    """Show what a guard says: call something that must be refused, and print the error. Not being refused is an error."""
    try:
        call()
    except ValueError as error:
        print(f"{type(error).__name__}: {error}")
    else:
        raise AssertionError("expected a refusal, but nothing was refused")


def with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """For display: each `x` that has `x_low` and `x_high` (or `estimate` with `low` and `high`) becomes one column, "0.52 [0.48, 0.56]", with spaces that do not break."""
    out = (
        table.rename(columns={"low": "estimate_low", "high": "estimate_high"})
        if "estimate" in table
        else table.copy()
    )
    for x in [c for c in out.columns if {f"{c}_low", f"{c}_high"} <= set(out.columns)]:
        out[x] = [
            f"{v:.2f}\u00a0[{low:.2f},\u00a0{high:.2f}]"
            for v, low, high in zip(out[x], out.pop(f"{x}_low"), out.pop(f"{x}_high"), strict=True)
        ]
    return out


def _show_message(shell, kind, error, frames, tb_offset=None) -> list[str]:
    lines = [f"{kind.__name__}: {error}"]
    shell._showtraceback(kind, error, lines)
    return lines


def _assigned(cell: str) -> list[str]:
    return [
        t.id
        for node in ast.parse(cell).body
        if isinstance(node, ast.Assign)
        for t in node.targets
        if isinstance(t, ast.Name)
    ]
