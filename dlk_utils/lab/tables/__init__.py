"""The tables of the notebooks; the first line of each module says which notebooks it serves.

A module holds functions of a run, whose tables `lab.cache.kept` keeps, and the pure
functions of rows and features that compute those tables. Sentences about tables are written in
`lab.findings` and pictures drawn in `lab.figures`: a change there computes nothing again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.selection import BY_TWINS, EARLIEST, MIN_TWINS, twin_rows
from dlk_utils.evaluation.stats import auroc, auroc_interval, smaller_class
from dlk_utils.evaluation.tasks import LYING, Task, make_task
from dlk_utils.lab.run import Run

TableMaker = Callable[..., pd.DataFrame]

NOT_SCORED = "not scored"
"""What stands in place of a score where a class has too few rows."""


def empty_if_too_few(columns: Sequence[str]) -> Callable[[TableMaker], TableMaker]:
    """Decorate a maker of tables: where a class has too few rows, it gives an empty table.

    The empty table has these columns, and its ``attrs["too_few_rows"]`` says what was missing.
    """

    def decorate(make: TableMaker) -> TableMaker:
        @functools.wraps(make)
        def table(*args: Any, **options: Any) -> pd.DataFrame:
            try:
                return make(*args, **options)
            except TooFewRows as error:
                empty = pd.DataFrame(columns=list(columns))
                empty.attrs = {"too_few_rows": str(error)}
                return empty

        return table

    return decorate


def lying_task(run: Run) -> Task:
    """Return the book's main task: truth, trained on honest rows, read on rows told to lie.

    Raises `TooFewRows` if a split has too few rows of a class.
    """
    return make_task(run.truth_rows, "truth", LYING)


def layer_rule(run: Run) -> str:
    """Say in one sentence which rule chooses the layer of probes of truth fitted on honest rows."""
    validation = run.truth_rows[run.truth_rows.split == "validation"]
    n_twins = len(twin_rows(validation)[0])
    if n_twins < MIN_TWINS:
        return (
            f"All probes are read at the {EARLIEST}. The {BY_TWINS} needs {MIN_TWINS} validation "
            f"examples with a readable twin told to lie, and there are {n_twins}."
        )
    return (
        f"Probes of truth that are fitted on honest rows are read at the {BY_TWINS}, as measured "
        f"on {n_twins} validation examples. All other probes are read at the {EARLIEST}."
    )


def split_anew(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return rows whose examples are split at random, in the shares that they are split in.

    Examples about one subject stay in one split. In rows without the column `subject`, each example
    is about another one.
    """
    subjects = rows.subject if "subject" in rows else rows.example_id
    is_first = ~subjects.duplicated()
    splits = np.random.default_rng(seed).permutation(rows.split[is_first])
    split_of = dict(zip(subjects[is_first], splits, strict=True))
    return rows.assign(split=subjects.map(split_of))


def estimate_with_interval(
    scores: Float[np.ndarray, " n"], rows: pd.DataFrame, *, seed: int = 0
) -> dict[str, Any]:
    """Score test rows by their class `y`: `estimate`, `low`, `high`, `n` and `n_smaller`.

    The estimate is the signed AUROC, with its 95 % bootstrap interval over examples. `n` counts the
    rows, and `n_smaller` those of the smaller class.
    """
    y = rows.y.to_numpy()
    low, high = auroc_interval(scores, y, rows.example_id, seed=seed)
    counts = {"n": len(rows), "n_smaller": smaller_class(y)}
    return {"estimate": auroc(scores, y), "low": low, "high": high, **counts}


def in_brief(row: pd.Series | pd.DataFrame | None) -> str:
    """Write the estimate of a row, or of a table's first row.

    For example "0.52 [0.48, 0.56], n = 90 (smaller class 31)". None and an empty table are
    "not scored".
    """
    if row is None or len(row) == 0:
        return NOT_SCORED
    if isinstance(row, pd.DataFrame):
        row = row.iloc[0]
    return (
        f"{row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}], "
        f"n = {row.n} (smaller class {row.n_smaller})"
    )


def least_to_most(values: pd.Series) -> str:
    """Write the range of numbers as "0.31 to 0.72"; of none, "not scored"."""
    return f"{values.min():.2f} to {values.max():.2f}" if len(values) else NOT_SCORED
