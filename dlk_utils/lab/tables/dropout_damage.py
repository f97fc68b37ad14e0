"""What dropout does to a model's answers: how many flip between draws, and how many go wrong.

Notebook 13 and the check of `smollm2-dropout` use it.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.special import expit

from dlk_utils.evaluation.stats import mean_interval
from dlk_utils.extract.stages import store_draws
from dlk_utils.extract.store import read_rows
from dlk_utils.lab.run import Run

HONEST_ROWS = "told to tell the truth"
LYING_ROWS = "told to lie"

CHECKED_P = 0.02
"""The share of channels that is dropped in the check, and at the end of the training."""
CHECKED_DRAWS = {"last_token": 8, "sequence": 2}
"""The draws of each prompt in the check, by where dropout acts. Those of the last token cost less,
as they share the pass over the rest of the prompt."""
REQUIRED_SCOPE = "last_token"
"""Where `smollm2-dropout` has to tolerate dropout. On whole prompts it narrowly does not, as its
card says."""
DRAWN_EXAMPLES = 100
"""Examples per data set that the check asks, each of them told to tell the truth and to lie."""
MOST_FLIPS = 0.05
"""Largest share of answers that may differ between two draws of a prompt."""
MOST_LOST = 0.02
"""The honest accuracy has to fall by less than this from no dropout to a draw."""


def checked_rows(run: Run) -> pd.DataFrame:
    """Return the twins of a run's examples, told to tell the truth and to lie."""
    return run.prompts[run.prompts.role.isin(["truth", "lie"])].reset_index(drop=True)


def drawn_logprobs(run: Run, rows: pd.DataFrame, scope: str) -> Float[np.ndarray, "n k 2"]:
    """Ask rows with the dropout of the check; return both choices' log-probabilities.

    `scope` says where dropout acts: "last_token" or "sequence", as in `extract.draws`.
    """
    n_draws = CHECKED_DRAWS[scope]
    options = {"n_draws": n_draws, "p": CHECKED_P, "scope": scope, "layers": [run.n_layers - 1]}
    folder = run.stored(store_draws, rows, "00-draws", seed=run.seed, **options)
    return np.stack([read_rows(folder, rows, f"choice_logprobs.{k}") for k in range(n_draws)], 1)


def checked_damage(run: Run) -> pd.DataFrame:
    """Ask the twins of a run with dropout and without, and tabulate it.

    Returns
    -------
    DataFrame
        A `damage_table` for each place of dropout, with its name in the column `scope`.
    """
    rows = run.answered(checked_rows(run), "02-answers")
    tables = [
        damage_table(rows, share_of_choice_1(drawn_logprobs(run, rows, scope))).assign(scope=scope)
        for scope in CHECKED_DRAWS
    ]
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
        Rows with `role`, `label`, `example_id` and the `answer` without dropout, 0 or 1.
    p1
        The probability of choice 1 in each draw.

    Returns
    -------
    DataFrame
        For rows told to tell the truth, and rows told to lie: their number `n`; how many answers
        are as they were told without dropout, `as_told`, and in a draw, `as_told_in_a_draw`; the
        difference of the two, `lost`, with its 95 % bootstrap interval over examples; and the share
        of pairs of draws with different answers, `flips`, with its interval.
    """
    answers = p1 > 0.5
    table = []
    for role, what in (("truth", HONEST_ROWS), ("lie", LYING_ROWS)):
        is_role = (rows.role == role).to_numpy()
        if not is_role.any():
            continue
        some = rows[is_role]
        wanted = some.label.to_numpy() == (role == "truth")
        as_told = some.answer.to_numpy().astype(bool) == wanted
        in_a_draw = (answers[is_role] == wanted[:, None]).mean(1)
        columns: dict[str, Any] = {"rows": what, "n": len(some)}
        columns |= {"as_told": as_told.mean(), "as_told_in_a_draw": in_a_draw.mean()}
        lost = as_told - in_a_draw
        columns |= _with_interval("lost", lost, some.example_id, bounds=(-1.0, 1.0))
        columns |= _with_interval("flips", disagreement(answers[is_role]), some.example_id)
        table.append(columns)
    return pd.DataFrame(table)


def disagreement(answers: Bool[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Return for each row the share of the pairs of its draws that give different answers."""
    k = answers.shape[1]
    n_ones = answers.sum(1)
    return n_ones * (k - n_ones) / (k * (k - 1) / 2)


def bears_dropout(table: pd.DataFrame) -> bool:
    """Whether a `damage_table` meets `MOST_FLIPS` over all rows, and `MOST_LOST` on honest ones."""
    honest = table[table.rows == HONEST_ROWS]
    return bool(all_flips(table) <= MOST_FLIPS and (honest.lost < MOST_LOST).all())


def surely_bears_dropout(table: pd.DataFrame) -> bool:
    """Whether the upper ends of 95 % intervals of a `damage_table` meet the limits.

    These are the intervals of flips, for honest and for lying rows each (`MOST_FLIPS`), and of what
    is lost of honest rows (`MOST_LOST`). `bears_dropout` takes the estimates, and all flips
    together.
    """
    honest = table[table.rows == HONEST_ROWS]
    return bool((table.flips_high <= MOST_FLIPS).all() and (honest.lost_high < MOST_LOST).all())


def all_flips(table: pd.DataFrame) -> float:
    """Return the share of pairs of draws with different answers, over all rows."""
    return float(np.average(table.flips, weights=table.n))


def _with_interval(
    name: str, values: np.ndarray, examples: pd.Series, bounds: tuple[float, float] = (0.0, 1.0)
) -> dict[str, float]:
    values = values.astype(float)
    low, high = mean_interval(values, examples.to_numpy(), bounds=bounds)
    return {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
