"""Tables as a page shows them: a caption, readable headings, numbers to two digits.

The tables underneath keep their column names. On a narrow screen each row becomes a card, by the
rules in ``book/static/book.css``, so that no table is wider than the page.
"""

import base64
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd

from dlk_utils.errors import ParameterError
from dlk_utils.lab.display import with_intervals
from dlk_utils.lab.escaping import html_text
from dlk_utils.lab.html_view import HtmlView

HEADINGS = {
    "accuracy": "accuracy at the threshold",
    "answer_move": "the answer moves by",
    "as_told": "obeys, without dropout",
    "as_told_in_a_draw": "obeys, in a draw",
    "answers_that_flip": "answers that flip",
    "best_control": "best control",
    "big_moves": "pairs with a big move",
    "dataset": "data set",
    "estimate": "AUROC",
    "f1": "F1",
    "flips": "answers that flip between draws",
    "gain": "gain over the state alone",
    "instruction_only": "AUROC of the instruction alone",
    "label_1": "share of label 1",
    "least": "least moved row",
    "least_move": "smallest change",
    "lie_above_error": "lie rate above error",
    "lowest": "lowest mass",
    "mass": "choice mass",
    "mean_off_plain": "distance of the mean from the plain pass",
    "n": "rows",
    "n_examples": "examples",
    "n_lie": "known rows that ask for a lie",
    "n_lied": "lies",
    "n_pairs": "pairs of draws",
    "n_on_trigger": "known rows on the trigger",
    "n_other_days": "rows on other days",
    "n_smaller": "rows of the smaller class",
    "n_test": "test rows",
    "n_train": "training rows",
    "n_truth": "rows that ask for the truth",
    "over_residual": "gain over the residual stream",
    "own_answer": "AUROC of the model's own answer",
    "p1_draw0": "p(choice 1) in draw 0",
    "p1_draw1": "p(choice 1) in draw 1",
    "relative_move": "mean relative distance",
    "says_true": "says that it was true",
    "state_move": "the state moves by",
    "strict_agrees": "same answer by strict spelling",
    "strict_mass": "mass by strict spelling",
    "sure": "probability of its answer",
    "tried": "fits to choose from",
    "truth_accuracy": "right, told to tell the truth",
    "validation": "validation AUROC",
    "visible": "visible share",
    "visible_lift": "visible lead",
    "wrong_rate": "wrong answers",
    "wrong_when_told_to_lie": "wrong, told to lie",
    "y": "class",
}
"""What a column is called on a page, where its name with blanks for underscores would not do."""
MISSING = "–"
NUMBER = re.compile(r"[-+]?\d[\d.e+-]*%?(\s\[.*\])?|[-+]?inf|not scored|not\sscored|–")
"""The text of a number, perhaps with its interval, or of a missing one."""
MAX_CHARACTERS = 500
"""A longer text in a cell is cut, and ends with an ellipsis."""
LONG_WORD = 24
"""A longer word without a place to break, such as a hash, is broken anywhere."""


class ShownTable:
    """A table on a page: HTML in a notebook and in the book, plain text elsewhere.

    Attributes
    ----------
    caption
        What the table says.
    headings
        What its columns are called; empty if each row is a name with a value.
    rows
        The cells as text.
    """

    def __init__(
        self, caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]], markup: str
    ):
        self.caption = caption
        self.headings = list(headings)
        self.rows = [list(row) for row in rows]
        cells = [self.headings, *self.rows] if self.headings else self.rows
        lines = [caption, *(" | ".join(line) for line in cells)]
        self._view = HtmlView("shown-table", [markup], lines)

    def _repr_html_(self) -> str:
        return self._view._repr_html_()

    def __repr__(self) -> str:
        return repr(self._view)


def show_table(
    table: pd.DataFrame | pd.Series,
    caption: str,
    *,
    columns: Sequence[str] | None = None,
    rows: int | None = None,
    headings: Mapping[str, str] | None = None,
    whole: pd.DataFrame | None = None,
    file_name: str = "table",
) -> ShownTable:
    """Show a table with a caption, readable headings and aligned numbers.

    Each estimate and its interval become one column, as `with_intervals` makes it. The levels of an
    index that group several rows become headings of these rows. Row numbers are not shown.

    Parameters
    ----------
    table
        The table. Of a series, each entry becomes a row with a name and a value.
    caption
        What the table says, as plain text.
    columns
        The columns to show, in this order; None shows all. An estimate brings its interval.
    rows
        How many rows to show, from the top; None shows all.
    headings
        What columns are called, where `HEADINGS` would not do.
    whole
        The table to download. None offers the one that is shown, if rows or columns are left out.
    file_name
        Name of the file to download, without its ending.

    Raises
    ------
    ParameterError
        If the table has no column of such a name.
    """
    if isinstance(table, pd.Series):
        return _show_entries(table, caption, headings or {})
    if table.empty:
        reason = table.attrs.get("too_few_rows", "there are no rows to show")
        return ShownTable(caption, [], [[reason]], f"<p>{html_text(f'{caption}: {reason}')}</p>")
    with_all_columns = with_intervals(table)
    shown = with_all_columns.head(rows)
    if columns is not None:
        unknown = [name for name in columns if name not in shown]
        if unknown:
            raise ParameterError(
                f"columns to show: the table has no {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(map(repr, shown))}"
            )
        shown = shown[list(columns)]
    if whole is None and shown.shape != with_all_columns.shape:
        whole = table

    n_groups = _grouping_levels(shown.index)
    named = _names_of_rows(shown.index, n_groups)
    data = [(name, shown.iloc[:, place]) for place, name in enumerate(shown.columns)]
    names = [heading(name, headings or {}) for name, _ in named]
    names += [_column_heading(name, shown.columns.names, headings or {}) for name, _ in data]
    texts = [column_texts(values) for _, values in named + data]
    cells_of_rows = list(zip(*texts, strict=True))
    groups = _group_headings(shown.index, n_groups, headings or {})
    markup = _table_html(caption, names, cells_of_rows, groups, n_names=len(named))
    return ShownTable(caption, names, cells_of_rows, markup + _download_html(whole, file_name))


def show_row(table: pd.DataFrame, caption: str) -> ShownTable:
    """Show the first row of a table, each cell with its name; of no rows, a sentence says so."""
    return show_table(table if table.empty else table.iloc[0], caption)


def heading(name: Any, headings: Mapping[str, str]) -> str:
    """Return what a column or a level of an index is called on a page."""
    if name is None:
        return ""
    known = HEADINGS | dict(headings)
    return known.get(name, str(name).replace("_", " "))


def _column_heading(name: Any, level_names: Sequence[Any], headings: Mapping[str, str]) -> str:
    """The heading of a column, whose name may have several levels.

    A level that has a name itself holds values of the data, such as data sets: they stay as they
    are.
    """
    levels = name if isinstance(name, tuple) else (name,)
    words = [
        heading(level, headings) if level_name is None else cell_text(level)
        for level, level_name in zip(levels, level_names, strict=True)
    ]
    return ", ".join(word for word in words if word)


def column_texts(values: pd.Series) -> list[str]:
    """Write the cells of a column.

    Counts are whole numbers, also where missing cells have made them floats. Other numbers have two
    digits after the point, small ones two that count. Floats that are all 0 or 1, with no cell
    missing, are shares.
    """
    cells = [MISSING if _is_missing(value) else value for value in values]
    present = [value for value in cells if value is not MISSING]
    is_count = all(_is_number(value) and float(value).is_integer() for value in present)
    if is_count and len(present) == len(cells):
        is_count = not all(isinstance(value, float) and value in (0, 1) for value in present)
    return [cell_text(value, is_count=is_count) for value in cells]


def cell_text(value: Any, *, is_count: bool = False) -> str:
    """Write one cell; `is_count` writes a float as a whole number."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bool | np.bool_):
        text = "yes" if value else "no"
    elif isinstance(value, Integral) or (is_count and isinstance(value, Real)):
        text = str(int(value))
    elif isinstance(value, Real):
        text = _decimal_text(float(value))
    elif isinstance(value, list | tuple | set | frozenset | np.ndarray):
        text = ", ".join(cell_text(item) for item in value)
    else:
        text = str(value)
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"


def _decimal_text(value: float) -> str:
    if math.isinf(value):
        return str(value)
    if value == 0 or abs(value) >= 0.005:
        return f"{abs(value) if value == 0 else value:.2f}"
    if abs(value) < 1e-6:
        return f"{value:.1e}"
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


def _is_missing(value: Any) -> bool:
    return pd.api.types.is_scalar(value) and pd.isna(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _show_entries(series: pd.Series, caption: str, headings: Mapping[str, str]) -> ShownTable:
    """Show the entries of a series: each has a row, with its name and its value."""
    names = [heading(name, headings) for name in series.index]
    values = [MISSING if _is_missing(value) else cell_text(value) for value in series]
    rows = list(zip(names, values, strict=True))
    markup = _table_html(caption, [], rows, [None] * len(rows), n_names=1)
    return ShownTable(caption, [], rows, markup)


def _grouping_levels(index: pd.Index) -> int:
    """How many outer levels of an index have at least two rows to a group, on average."""
    n_levels = 0
    for number in range(1, index.nlevels):
        levels = list(range(number, index.nlevels))
        if 2 * index.droplevel(levels).nunique() <= len(index):
            n_levels = number
    return n_levels


def _group_headings(
    index: pd.Index, n_levels: int, headings: Mapping[str, str]
) -> list[str | None]:
    """The heading above each row; None where a row is of the same group as the one before it."""
    if not n_levels:
        return [None] * len(index)
    found, last = [], None
    for key in index:
        levels = [
            f"{heading(name, headings)}: {cell_text(value)}" if name else cell_text(value)
            for name, value in zip(index.names[:n_levels], key[:n_levels], strict=True)
        ]
        text = "; ".join(levels)
        found.append(None if text == last else text)
        last = text
    return found


def _names_of_rows(index: pd.Index, n_groups: int) -> list[tuple[Any, pd.Series]]:
    """The levels of an index that name single rows.

    An index of numbers without a name only counts rows, and is left out.
    """
    if index.nlevels == 1 and index.name is None and index.dtype.kind in "iu":
        return []
    levels = range(n_groups, index.nlevels)
    return [(index.names[n], pd.Series(index.get_level_values(n))) for n in levels]


def _table_html(
    caption: str,
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    groups: Sequence[str | None],
    *,
    n_names: int,
) -> str:
    """Write a table whose first `n_names` columns name its rows.

    The roles say what each part is, also where it is shown as a block. The alignment stands in each
    cell because JupyterLab does not have the style sheet of the book.
    """
    columns = list(zip(*rows, strict=True))
    sides = ["right" if names and _is_numeric(cells) else "left" for cells in columns]
    lines = ['<table class="dataframe shown" role="table">']
    lines.append(f"<caption>{html_text(caption)}</caption>")
    if names:
        cells = [_heading_html(name, side) for name, side in zip(names, sides, strict=True)]
        lines.append(f'<thead role="rowgroup"><tr role="row">{"".join(cells)}</tr></thead>')
    lines.append('<tbody role="rowgroup">')
    labels = names or [""] * len(columns)
    for row, group in zip(rows, groups, strict=True):
        if group is not None:
            lines.append(_group_html(group, len(columns)))
        cells = [
            _cell_html(text, label, side, is_name=place < n_names)
            for place, (text, label, side) in enumerate(zip(row, labels, sides, strict=True))
        ]
        lines.append(f'<tr role="row">{"".join(cells)}</tr>')
    lines.append("</tbody></table>")
    return "\n".join(lines)


def _is_numeric(texts: Sequence[str]) -> bool:
    """Whether a column holds numbers, perhaps with their intervals."""
    return all(NUMBER.fullmatch(text) for text in texts)


def _heading_html(name: str, side: str) -> str:
    if not name:
        # A heading has to say something.
        return '<td role="cell"></td>'
    style = f"text-align:{side}"
    return f'<th role="columnheader" scope="col" style="{style}">{_breakable(name)}</th>'


def _group_html(group: str, n_columns: int) -> str:
    return (
        f'<tr class="group" role="row"><th role="rowheader" scope="rowgroup" '
        f'colspan="{n_columns}" style="text-align:left">{_breakable(group)}</th></tr>'
    )


def _cell_html(text: str, label: str, side: str, *, is_name: bool) -> str:
    """Write a cell, with the heading that a narrow screen shows next to it."""
    tag, role = ("th", 'role="rowheader" scope="row"') if is_name else ("td", 'role="cell"')
    data = f' data-label="{html_text(label)}"' if label else ""
    return f'<{tag} {role} style="text-align:{side}"{data}>{_breakable(text)}</{tag}>'


def _breakable(text: str) -> str:
    """Escape text, and let its lines break after underscores and slashes, and in long words."""
    escaped = html_text(text).replace("\n", "<br>")
    escaped = re.sub(r"(?<=\w[_/])(?=\w)", "<wbr>", escaped)
    longest = max(map(len, re.split(r"[\s_/-]+", text)))
    return f'<span class="long">{escaped}</span>' if longest > LONG_WORD else escaped


def _download_html(table: pd.DataFrame | None, file_name: str) -> str:
    """A link to the table as CSV, which the page itself holds."""
    if table is None:
        return ""
    has_names = table.index.nlevels > 1 or table.index.name is not None
    n_columns = len(table.columns) + (table.index.nlevels if has_names else 0)
    text = table.to_csv(index=has_names, float_format="%.6g")
    content = base64.b64encode(text.encode()).decode()
    name = html_text(f"{file_name}.csv")
    return (
        f'<p><a download="{name}" href="data:text/csv;charset=utf-8;base64,{content}">Download the '
        f"whole table as CSV</a> ({len(table)} rows, {n_columns} columns)</p>"
    )
