"""Tables of notebook 08: the headline over new splits, for each of two trainings of a model.

One split of the examples, and one training of the liar, may be lucky. Here both are repeated.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dlk_utils.evaluation.behaviour import knowledge_gate, label_behaviour
from dlk_utils.evaluation.controls import ASKED_AGAIN, TURNED, TWIN, rival_scores
from dlk_utils.evaluation.selection import fit_task, in_memory
from dlk_utils.evaluation.stats import auroc, smaller_class
from dlk_utils.evaluation.tasks import KNOWN, LYING, Features, make_task, truth_rows
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run, rows_for_probes
from dlk_utils.lab.tables import empty_if_too_few, split_anew
from dlk_utils.lab.tables.carry_over import SPLITS
from dlk_utils.lab.tables.graded import PROBE
from dlk_utils.probes import ALL_STATE_PROBES

KNOWN_ROWS, ALL_ROWS = "known rows told to lie", "all rows told to lie"
REGIME_OF = {KNOWN_ROWS: KNOWN, ALL_ROWS: LYING}
RIVALS_OF = {KNOWN_ROWS: (TURNED, TWIN), ALL_ROWS: (TURNED, ASKED_AGAIN)}
"""A row is known if the prompts of `ASKED_AGAIN` are answered correctly: among known rows that
rival scores 1 by definition, and says nothing. The twin has no say in what is known."""

SPLIT_COLUMNS = ["again", "where", "who", "layer", "estimate", "accuracy", "n", "n_smaller"]
TRAINING_COLUMNS = [
    *("model", "where", "who", "mean", "least", "greatest", "standard deviation", "gain"),
    *("accuracy", "n_smaller", "splits"),
]


def run_of_training(run: Run, model: str) -> Run | None:
    """Return a run that puts the questions of `run` to another training; None if `model` is ""."""
    return replace(run, model=model) if model else None


@kept("08-splits-of-training")
@empty_if_too_few(SPLIT_COLUMNS)
def headline_over_splits(run: Run, *, layers: list[int], probe: str) -> pd.DataFrame:
    """Score the headline of a run over new splits, from kept states; see `score_over_splits`."""
    return score_over_splits(run.truth_rows, run.states(layers), probe=probe)


@kept("08-splits-of-further-training")
@empty_if_too_few(SPLIT_COLUMNS)
def headline_of_further_training(run: Run, *, layers: list[int], probe: str) -> pd.DataFrame:
    """Score a run of `run_of_training` over new splits; only its answers and states are asked for.

    One pass gives both. The gradients, which a run of its own would compute too, are not needed.
    """
    answers, features = run.answered_with_states(run.prompts, "08-further-training", layers=layers)
    gate = knowledge_gate(answers)
    rows = truth_rows(rows_for_probes(label_behaviour(answers, gate), gate))
    return score_over_splits(rows, features, probe=probe)


def score_over_splits(
    rows: pd.DataFrame, features: Features, *, probe: str = "logistic"
) -> pd.DataFrame:
    """Split the examples at random in the same shares, `SPLITS` times, and score each time.

    The splits are those of `carry_over.split_again`. Each time the probe is fitted on honest rows,
    at the layer that validation rows and their twins choose, and read on rows told to lie: on those
    about what the model knows, and on all of them. Its rivals read no states. They are the own
    answer reversed, and answers under instructions to tell the truth (`RIVALS_OF`).

    Parameters
    ----------
    rows
        Rows of the target truth, with `margin`, `knows`, `twin_margin` and `asked_again_margin`.
    features
        States by layer.
    probe
        One of `ALL_STATE_PROBES`.

    Returns
    -------
    DataFrame
        For each split (`again`), each of `where` and of `who`: the AUROC (`estimate`); `accuracy`,
        the share of rows on the right side of 0 (the probe's 0 was set on honest training rows);
        and the numbers of test rows. Of the probe also its `layer` (-1 for the others).

    Raises
    ------
    TooFewRows
        If a split has too few rows of a class.
    """
    states = in_memory(features, rows)
    table = []
    for again in range(SPLITS):
        anew = split_anew(rows, again)
        tasks = {where: make_task(anew, "truth", regime) for where, regime in REGIME_OF.items()}
        # They differ in their test rows only.
        fitted = fit_task(ALL_STATE_PROBES[probe], states, tasks[ALL_ROWS])
        for where, task in tasks.items():
            rivals = rival_scores(task)
            scores = {PROBE: fitted.score(task.test)}
            scores |= {who: rivals[who] for who in RIVALS_OF[where]}
            table += [
                {
                    "again": again,
                    "where": where,
                    "who": who,
                    "layer": fitted.layer if who == PROBE else -1,
                    **_on_rows(own, task.test.y.to_numpy()),
                }
                for who, own in scores.items()
            ]
    return pd.DataFrame(table, columns=SPLIT_COLUMNS)


def _on_rows(scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"]) -> dict[str, Any]:
    return {
        "estimate": auroc(scores, y),
        "accuracy": float(np.mean((scores > 0) == y)),
        "n": len(y),
        "n_smaller": smaller_class(y),
    }


def trainings_compared(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Summarise tables of `score_over_splits`, by the name of the model.

    `gain` is the mean AUROC of the probe minus that of `who`, over the same splits, and `n_smaller`
    the least number of test rows of a class over the splits.
    """
    rows = []
    for model, table in tables.items():
        of_probe = table[table.who == PROBE].groupby("where").estimate.mean()
        for (where, who), of_who in table.groupby(["where", "who"], sort=False):
            rows.append(
                {
                    "model": model,
                    "where": where,
                    "who": who,
                    "mean": of_who.estimate.mean(),
                    "least": of_who.estimate.min(),
                    "greatest": of_who.estimate.max(),
                    "standard deviation": of_who.estimate.std(),
                    "gain": of_probe[where] - of_who.estimate.mean(),
                    "accuracy": of_who.accuracy.mean(),
                    "n_smaller": of_who.n_smaller.min(),
                    "splits": len(of_who),
                }
            )
    return pd.DataFrame(rows, columns=TRAINING_COLUMNS)
