"""What every notebook begins with, and how it shows prompts, intervals and refusals."""

import ast
import difflib
import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsFloat

import pandas as pd
import torch
from IPython import get_ipython

import dlk_utils
from dlk_utils.errors import DlkError, ParameterError
from dlk_utils.lab.escaping import html_text, without_folders
from dlk_utils.lab.figures import show_figures
from dlk_utils.lab.parameters import read_parameters
from dlk_utils.models.loading import device_of
from dlk_utils.provenance import library_versions


def start(cells: list[str]) -> None:
    """Check a notebook's parameters, set its figures up, and quiet the libraries.

    The notebook's variables then hold the values that `lab.parameters` makes of them. From here on
    an error that a user can fix is shown as its message, without the frames of the package.

    Parameters
    ----------
    cells
        The kernel's list of the sources that it has run, ``In``.

    Raises
    ------
    ParameterError
        If papermill was given a parameter that the notebook does not have, or a parameter has a
        value that it does not take.
    """
    shell = get_ipython()
    shell.set_custom_exc((DlkError,), _show_message)
    names = check_parameters(cells)
    shell.user_ns |= read_parameters({name: shell.user_ns[name] for name in names})
    show_figures(shell)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    pd.set_option("display.max_colwidth", 60, "display.width", 160)
    pd.set_option("display.max_columns", 30, "display.precision", 3)
    # JupyterLab would show what lies between two dollar signs in a table as a formula.
    pd.set_option("display.html.use_mathjax", False)


def check_parameters(cells: list[str]) -> list[str]:
    """Return the names in the notebook's cell of parameters; refuse one that is not there.

    Papermill itself only warns, and runs the default. The notebook's own cell begins with
    ``# parameters``, the one that papermill puts in with ``# Parameters``.
    """
    own = {name for cell in cells if cell.startswith("# parameters") for name in _assigned(cell)}
    given = {
        name for cell in cells if cell.startswith("# Parameters\n") for name in _assigned(cell)
    }
    for name in sorted(given - own):
        nearest = difflib.get_close_matches(name, own, 1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        raise ParameterError(
            f"unknown parameter {name!r}{hint}; this notebook has {', '.join(sorted(own))}"
        )
    return sorted(own)


def versions(device: str = "auto") -> str:
    """Say in one line which versions compute here, and on what; `device` is as in `load_model`."""
    installed = library_versions()
    libraries = [f"{name} {installed[name]}" for name in ("torch", "transformers", "scikit-learn")]
    device = device_of(device)
    name = torch.cuda.get_device_name(device) if "cuda" in device else device.upper()
    return (
        f"dlk_utils {dlk_utils.__version__}, {', '.join(libraries)}, "
        f"Python {platform.python_version()}, {name}"
    )


def describe_run(run: Any) -> str:
    """Say in one line which model a `Run` asks."""
    spec = run.spec
    return (
        f"model {run.model_name}, {spec.dtype}, quantization {spec.quantization}, "
        f"revision {spec.revision[:12]}"
    )


def show_prompt(row: pd.Series, tokens: list[str]) -> str:
    """Return a complete prompt as HTML, token by token.

    Everything that came from data is escaped.

    Parameters
    ----------
    row
        A row of the prompts table.
    tokens
        The text of each of its tokens.
    """
    spans = ""
    for number, token in enumerate(tokens):
        color = ("#e8eef7", "#f7efe3")[number % 2]
        text = html_text(token).replace("\n", "&#9166;<br>")
        spans += f'<span style="background:{color};color:#222">{text}</span>'
    head = (
        f"role {row.role}, instruction {row.instruction}, template {row.template}, "
        f"choices {list(row.choices)}, label {row.label}, {len(tokens)} tokens"
    )
    return f'<p><b>{html_text(head)}</b></p><pre style="white-space:pre-wrap">{spans}</pre>'


def refusal(call: Callable[[], Any]) -> None:
    """Call something that a guard must refuse, and print the guard's error.

    Raises
    ------
    AssertionError
        If nothing is refused.
    """
    try:
        call()
    except DlkError as error:
        print(f"{type(error).__name__}: {without_folders(str(error))}")
    else:
        raise AssertionError("expected a refusal, but nothing was refused")


def interval_text(row: Any, name: str = "estimate", *, signed: bool = False) -> str:
    """Write an estimate with its interval, such as "0.52 [0.48, 0.56]".

    Parameters
    ----------
    row
        A row of a table, as a Series or a named tuple. The ends of the interval are
        ``{name}_low`` and ``{name}_high``, or ``low`` and ``high``.
    name
        Column of the estimate.
    signed
        Whether to write a plus before positive numbers. What rounds to zero has no sign.

    Returns
    -------
    str
        The text; "not scored" if the estimate is NaN. An end of an interval of differences (signed
        or in part negative) that rounds to zero has a third decimal, which says on which side of
        zero it is.
    """
    values = row._asdict() if isinstance(row, tuple) else row
    if pd.isna(values[name]):
        return "not scored"
    prefix = f"{name}_" if f"{name}_low" in values else ""
    numbers = [values[column] for column in (name, f"{prefix}low", f"{prefix}high")]
    value, low, high = (_two_decimals(number, signed=signed) for number in numbers)
    if signed or numbers[1] < 0:
        low, high = (
            _side_of_zero(number, signed=signed) if text == "0.00" else text
            for text, number in zip((low, high), numbers[1:], strict=True)
        )
    return f"{value} [{low}, {high}]"


def _two_decimals(number: float, *, signed: bool) -> str:
    text = f"{number:{'+' if signed else ''}.2f}"
    return "0.00" if text in ("-0.00", "+0.00") else text


def _side_of_zero(number: float, *, signed: bool) -> str:
    """Write a number that rounds to 0.00 with a third decimal, unless that is 0 too."""
    text = f"{number:{'+' if signed else ''}.3f}"
    return "0.00" if text in ("-0.000", "+0.000", "0.000") else text


def percent(share: SupportsFloat) -> str:
    """Write a share, a number of Python or of numpy, as a whole percentage, such as "58 %"."""
    return f"{100 * float(share):.0f} %"


def listed(names: Iterable[str], conjunction: str = "and") -> str:
    """Write names in a row, such as "a, b and c"."""
    *before, last = names
    return f"{', '.join(before)} {conjunction} {last}" if before else last


def stack_shares(table: pd.DataFrame, names: Mapping[str, str], by: str) -> pd.DataFrame:
    """Put several columns of shares below each other, for a figure.

    Parameters
    ----------
    table
        Has the ends of each share in ``{column}_low`` and ``{column}_high``.
    names
        The columns, and what each of them is called.
    by
        A column to keep.

    Returns
    -------
    DataFrame
        The column `by`, `what` for the name of the share, `estimate`, `low` and `high`, without
        missing shares.
    """
    parts = []
    for column, name in names.items():
        part = table[[by, column, f"{column}_low", f"{column}_high"]].dropna(subset=column)
        part = part.set_axis([by, "estimate", "low", "high"], axis=1)
        parts.append(part.assign(what=name))
    return pd.concat(parts, ignore_index=True)


def with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table to show, in which each estimate and its interval are one column.

    Each column `x` with `x_low` and `x_high` (or `estimate` with `low` and `high`) becomes text
    like "0.52 [0.48, 0.56]", with spaces that do not break.
    """
    if "estimate" in table:
        table = table.rename(columns={"low": "estimate_low", "high": "estimate_high"})
    shown = table.copy()
    for name in table.columns:
        ends = [f"{name}_low", f"{name}_high"]
        if set(ends) <= set(table.columns):
            texts = [interval_text(row, name) for _, row in table[[name, *ends]].iterrows()]
            shown[name] = [text.replace(" ", "\u00a0") for text in texts]
            shown = shown.drop(columns=ends)
    return shown


def draw(figure: Callable[..., Any], table: pd.DataFrame, **options: Any) -> Any:
    """Draw a figure of a table; if the table is empty, print why and return None.

    A table that is empty for want of rows says so in ``attrs["too_few_rows"]``.
    """
    if len(table):
        return figure(table, **options)
    print(table.attrs.get("too_few_rows", "nothing was scored"))
    return None


def _show_message(shell, kind, error, frames, tb_offset=None) -> list[str]:
    # The page that shows it may be published.
    message = without_folders(str(error))
    lines = [f"{kind.__name__}: {message}"]
    shell._showtraceback(kind, message, lines)
    return lines


def _assigned(cell: str) -> list[str]:
    """The names that the statements of a cell assign to."""
    assignments = [node for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
    targets = [target for node in assignments for target in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]
