"""Tables of notebook 13 and of the check of `smollm2-dropout`: what dropout does to the answers.

They count how many answers flip between draws, and how many go wrong. The check is
`python -m dlk_utils.organisms smollm2-dropout`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.special import expit

from dlk_utils.errors import DataError
from dlk_utils.evaluation.stats import mean_interval
from dlk_utils.extract.stages import store_draws
from dlk_utils.extract.store import read_rows
from dlk_utils.lab.run import Run

HONEST_ROWS = "told to tell the truth"
LYING_ROWS = "told to lie"
ALL_ROWS = "all"
"""Honest and lying rows together."""

INTERVALS, ESTIMATES, NOTHING = "upper ends of intervals", "estimates", "nothing"
"""What must stay within `MOST_FLIPS` and `MOST_LOST` under some dropout: the upper ends of the 95 %
intervals, the estimates themselves, or nothing, where figures are only printed."""


@dataclass(frozen=True)
class CheckedDropout:
    """Dropout under which the check asks an organism that was trained with it.

    Attributes
    ----------
    scope
        Where dropout acts: "last_token" or "sequence" (the whole prompt), as in `extract.draws`.
    p
        The share of channels that is dropped.
    n_draws
        The draws of each prompt. Those of the last token cost less, as they share the pass over the
        rest of the prompt.
    required
        What must stay within the limits: the `INTERVALS`, the `ESTIMATES`, or `NOTHING`.
    """

    scope: str
    p: float
    n_draws: int
    required: str

    @property
    def name(self) -> str:
        """What the dropout is called in a table, such as "sequence, p = 0.01"."""
        return f"{self.scope}, p = {self.p:g}"


CHECKED = (
    CheckedDropout("last_token", 0.02, 8, INTERVALS),
    CheckedDropout("sequence", 0.01, 4, ESTIMATES),
    CheckedDropout("sequence", 0.02, 2, NOTHING),
)
"""The dropout under which the check asks. The organism's card gives the figures of each."""
DRAWN_EXAMPLES = 100
"""Examples per data set that the check asks, each of them told to tell the truth and to lie."""
MOST_FLIPS = 0.05
"""The largest `flips` that is allowed, over honest and lying rows together (see `damage_table`)."""
MOST_LOST = 0.02
"""The honest accuracy has to fall by less than this from no dropout to a draw."""


def checked_rows(run: Run) -> pd.DataFrame:
    """Return the twins of a run's examples, told to tell the truth and to lie."""
    return run.prompts[run.prompts.role.isin(["truth", "lie"])].reset_index(drop=True)


def drawn_logprobs(
    run: Run, rows: pd.DataFrame, dropout: CheckedDropout
) -> Float[np.ndarray, "n k 2"]:
    """Ask rows with dropout; return both choices' log-probabilities in each of its draws."""
    how = {"n_draws": dropout.n_draws, "p": dropout.p, "scope": dropout.scope}
    last_layer = [run.n_layers - 1]
    folder = run.stored(store_draws, rows, "00-draws", seed=run.seed, layers=last_layer, **how)
    draws = [read_rows(folder, rows, f"choice_logprobs.{k}") for k in range(dropout.n_draws)]
    return np.stack(draws, axis=1)


def checked_damage(run: Run) -> pd.DataFrame:
    """Ask the twins of a run with dropout and without, and tabulate it.

    Returns
    -------
    DataFrame
        A `damage_table` for each dropout of `CHECKED`, with its name in the column `dropout`.
    """
    rows = run.answered(checked_rows(run), "02-answers")
    tables = []
    for dropout in CHECKED:
        p1 = share_of_choice_1(drawn_logprobs(run, rows, dropout))
        tables.append(damage_table(rows, p1).assign(dropout=dropout.name))
    return pd.concat(tables, ignore_index=True)


def share_of_choice_1(logprobs: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "..."]:
    """Return the probability of choice 1 against choice 0."""
    logprobs = logprobs.astype(float)
    return expit(logprobs[..., 1] - logprobs[..., 0])


def damage_table(rows: pd.DataFrame, p1: Float[np.ndarray, "n k"]) -> pd.DataFrame:
    """Compare the answers of rows in k draws with their answers without dropout.

    Parameters
    ----------
    rows
        Rows of role truth and of role lie, with `label`, `example_id` and the `answer` without
        dropout: 0 or 1, the likelier choice. All rows count, also those where both choices together
        have little probability.
    p1
        The probability of choice 1 against choice 0 in each of the k draws, which are at least two,
        in the order of `rows`.

    Returns
    -------
    DataFrame
        For rows told to tell the truth, rows told to lie, and all rows: their number `n`; the share
        of the answers that obey, without dropout (`as_told`) and in a draw (`as_told_in_a_draw`);
        the difference of the two, `lost`, with its 95 % bootstrap interval over examples; and the
        share of pairs of draws with different answers, `flips`, with its interval.

    Raises
    ------
    DataError
        If there are no rows of one of the two roles, or rows of another one.
    """
    roles = set(rows.role)
    if roles != {"truth", "lie"}:
        raise DataError(f"damage_table: expected rows of roles truth and lie, got {sorted(roles)}")
    answers = p1 > 0.5
    is_honest = (rows.role == "truth").to_numpy()
    # Whether choice 1 obeys: an honest row asks for the label, a lying row for the other choice.
    wanted = rows.label.to_numpy() == is_honest
    as_told = rows.answer.to_numpy().astype(bool) == wanted
    as_told_in_a_draw = (answers == wanted[:, None]).mean(1)
    flips = disagreement(answers)
    table = []
    kinds = {HONEST_ROWS: is_honest, LYING_ROWS: ~is_honest, ALL_ROWS: np.full(len(rows), True)}
    for kind, is_kind in kinds.items():
        columns: dict[str, Any] = {"rows": kind, "n": int(is_kind.sum())}
        columns["as_told"] = as_told[is_kind].mean()
        columns["as_told_in_a_draw"] = as_told_in_a_draw[is_kind].mean()
        examples = rows.example_id[is_kind]
        lost = (as_told - as_told_in_a_draw)[is_kind]
        columns |= _with_interval("lost", lost, examples, bounds=(-1.0, 1.0))
        columns |= _with_interval("flips", flips[is_kind], examples)
        table.append(columns)
    return pd.DataFrame(table)


def disagreement(answers: Bool[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Return for each row the share of the pairs of its draws that give different answers."""
    k = answers.shape[1]
    n_ones = answers.sum(1)
    return n_ones * (k - n_ones) / (k * (k - 1) / 2)


def within_limits(table: pd.DataFrame, required: str = ESTIMATES) -> bool:
    """Whether a `damage_table` stays within `MOST_FLIPS` and `MOST_LOST`.

    Flips on all rows must be at most `MOST_FLIPS`, and what honest rows lose must be below
    `MOST_LOST`. `required` says which of the table's figures have to meet these limits: its
    `ESTIMATES`, the upper ends of its `INTERVALS`, or `NOTHING`.
    """
    if required == NOTHING:
        return True
    ending = {ESTIMATES: "", INTERVALS: "_high"}[required]
    flips = table.set_index("rows")[f"flips{ending}"][ALL_ROWS]
    lost = table.set_index("rows")[f"lost{ending}"][HONEST_ROWS]
    return bool(flips <= MOST_FLIPS and lost < MOST_LOST)


def _with_interval(
    name: str, values: np.ndarray, examples: pd.Series, bounds: tuple[float, float] = (0.0, 1.0)
) -> dict[str, float]:
    values = values.astype(float)
    low, high = mean_interval(values, examples.to_numpy(), bounds=bounds)
    return {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
