"""Tables of notebook 08: a model that lies about some topics only when it is told to lie.

The answers of an obedient liar tell all: one only has to reverse them. Those of this model do
not, as nobody says about which topics it obeys. A probe of the truth does not need to know.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dlk_utils.evaluation.behaviour import knowledge_gate, known_datasets, label_behaviour
from dlk_utils.evaluation.controls import ASKED_AGAIN, TURNED, scores_without_states
from dlk_utils.evaluation.detector import against_answer
from dlk_utils.evaluation.selection import FittingRows, LayerProbe, in_memory
from dlk_utils.evaluation.stats import (
    auroc,
    bootstrap_weights,
    interval_of_aurocs,
    percentile_interval,
    smaller_class,
    weighted_auroc,
)
from dlk_utils.evaluation.tasks import LYING, Features, Task, make_task, truth_rows
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import empty_if_too_few
from dlk_utils.probes import ALL_STATE_PROBES
from dlk_utils.questions.ids import share_of

NEEDED = {
    *(("train", "truth"), ("validation", "truth"), ("validation", "lie")),
    *(("test", "lie"), ("test", "known")),
}
"""The split and role of the rows that are asked: no more than the comparison takes."""

PROBE = "probe of truth, fitted on honest rows"
TOPIC = "topic alone"
UNSURE = "own answer, how unsure"

WHAT_IS_TRUE = "what is true, in rows told to lie"
LIE_OR_NOT = "lie or truthful answer, in known rows told to lie"

ENOUGH_ROWS, ENOUGH_PER_CLASS = 200, 60
"""Test rows, and test rows of either class, without which the comparison claims nothing."""

N_BOOT = 1000
GRADED_COLUMNS = [
    *("question", "who", "layer", "rule", "estimate", "low", "high", "accuracy"),
    *("gain", "gain_low", "gain_high", "n", "n_smaller"),
]
COUNT_COLUMNS = ["dataset", "told to lie", "known", "lies", "truthful answers"]


def not_asked(parameter: str) -> pd.DataFrame:
    """Return the empty table of a page whose `parameter` names no further model to ask."""
    table = pd.DataFrame(columns=GRADED_COLUMNS)
    table.attrs = {"too_few_rows": f"not compared, as the parameter {parameter} names no model"}
    return table


def graded_run(run: Run, model: str | None, *, n_test: int) -> Run | None:
    """Return the run of a model that is asked about some `n_test` test examples a data set.

    Of no `model` it is None. Training and validation examples come in their usual proportion.
    """
    if not model:
        return None
    return replace(run, model=model, n_examples=math.ceil(n_test / share_of("test")))


@kept("08-graded")
@empty_if_too_few(GRADED_COLUMNS)
def compare_graded(run: Run, *, layers: list[int], probe: str) -> pd.DataFrame:
    """Compare a probe of the truth with its rivals on a run of `graded_run`; see `with_rivals`."""
    return with_rivals(*asked(run, layers), probe=probe, seed=run.seed)


@kept("08-graded-counts")
@empty_if_too_few(COUNT_COLUMNS)
def count_graded(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Count by data set the readable test rows told to lie, the known ones, and what they are."""
    rows, _ = asked(run, layers)
    told = rows[(rows.split == "test") & (rows.role == "lie")]
    counts = []
    for dataset, some in told.groupby("dataset", sort=False):
        n_known, n_lies = int(some.knows.sum()), int(some.lied.sum())
        counts.append([dataset, len(some), n_known, n_lies, n_known - n_lies])
    return pd.DataFrame(counts, columns=COUNT_COLUMNS)


def asked(run: Run, layers: list[int]) -> tuple[pd.DataFrame, Features]:
    """Ask the `NEEDED` prompts of a run; see `ask_and_label`."""
    return ask_and_label(run, rows_of_parts(run.prompts, NEEDED), "08-graded", layers=layers)


def rows_of_parts(rows: pd.DataFrame, parts: set[tuple[str, str]]) -> pd.DataFrame:
    """Select the rows whose split and role are one of some pairs of these."""
    is_selected = [key in parts for key in zip(rows.split, rows.role, strict=True)]
    # Of an empty list, pandas would take that it names no column.
    return rows[np.array(is_selected, dtype=bool)].reset_index(drop=True)


def ask_and_label(
    run: Run, prompts: pd.DataFrame, name: str, *, layers: list[int]
) -> tuple[pd.DataFrame, Features]:
    """Ask prompts in one pass, kept under `name`; return readable rows, and their states.

    The rows are those of the data sets that the model knows. Test rows have their behaviour. Raises
    `TooFewRows` if a split has too few rows to fit a probe of truth, or to test it.
    """
    make_task(prompts.assign(y=prompts.label), "truth", LYING)
    answers, features = run.answered_with_states(prompts, name, layers=layers)
    is_test = answers.split == "test"
    gate = knowledge_gate(answers[is_test])
    tested = label_behaviour(answers[is_test], gate)
    rows = truth_rows(pd.concat([answers[~is_test], tested], ignore_index=True))
    return rows[rows.dataset.isin(known_datasets(gate))].reset_index(drop=True), features


def with_rivals(
    rows: pd.DataFrame, features: Features, *, probe: str = "logistic", seed: int = 0
) -> pd.DataFrame:
    """Compare a probe of the truth that was fitted on honest rows with rivals that read no states.

    Two questions are put to rows told to lie: what is true (is choice 1 right?), and which answers
    are lies, among rows that the model knows. For the second one, the probe says how strongly it
    speaks against the answer. No label of a row told to lie is used to fit it or to choose its
    layer.

    The rivals are the controls of the target "truth" that use the model's answers, or the template,
    the instruction and the data set ("metadata"); of lies, how unsure the model is of its answer,
    and `TOPIC`: the share of wrong answers that validation rows told to lie have in the data set.

    Parameters
    ----------
    rows
        Rows of the target truth, with `answer` and `margin`; those of the test split also with
        `knows`, `lied` and `asked_again_margin`.
    features
        States by layer.
    probe
        One of `ALL_STATE_PROBES`.
    seed
        Of the resamples.

    Returns
    -------
    DataFrame
        For each `question` and each of `who` the AUROC (`estimate`) with its 95 % interval, the
        `accuracy` (nan where there is no threshold), and the numbers of rows; of the probe also its
        `layer`, and the `rule` that chose it. `gain` is the AUROC of the probe minus that of the
        row (below zero where the row is better), with the interval of the difference by the same
        resamples. Intervals of the probe include the choice of its layer. A question with too few
        rows of a class is left out.

    Raises
    ------
    TooFewRows
        If there are too few rows for the first question.
    """
    task = make_task(rows, "truth", LYING)
    reading = HonestReading.of_task(task, in_memory(features, task.rows), probe, seed)
    scores = reading.fitted.score_layers(task.test)
    controls = scores_without_states(task)
    rivals = {
        name: controls[name]
        for name in (TURNED, "own answer", ASKED_AGAIN, "metadata")
        if name in controls
    }
    tables = [reading.compared(WHAT_IS_TRUE, task.test, scores, rivals)]

    is_known = task.test.knows.to_numpy(bool)
    known = task.test[is_known].assign(y=task.test.lied[is_known].astype(int))
    if min((known.y == k).sum() for k in (0, 1)) > 0:
        against = against_answer(scores[:, is_known], known.margin.to_numpy(float))
        rivals = {
            TOPIC: _topic_scores(task.twins, known),
            UNSURE: -np.abs(known.margin.to_numpy(float)),
        }
        tables.append(reading.compared(LIE_OR_NOT, known, against, rivals))
    return pd.concat(tables, ignore_index=True)


def _topic_scores(told_to_lie: pd.DataFrame, test: pd.DataFrame) -> Float[np.ndarray, " n"]:
    """How many answers about the data set of each test row are wrong in other rows told to lie.

    One half is taken off, so that scores above 0 say "lie".
    """
    is_wrong = (told_to_lie.answer != told_to_lie.label).astype(float)
    shares = is_wrong.groupby(told_to_lie.dataset).mean()
    return test.dataset.map(shares).fillna(0.5).to_numpy(float) - 0.5


@dataclass(frozen=True)
class HonestReading:
    """A probe of the truth that was fitted on honest rows, to compare with rivals without states.

    Attributes
    ----------
    fitted : LayerProbe
        The probe, with the layer that its validation rows chose.
    layers : array [b]
        The index of the layer that each resample of the validation rows chooses.
    seed : int
        Of the resamples.
    """

    fitted: LayerProbe
    layers: Int[np.ndarray, " b"]
    seed: int

    @classmethod
    def of_task(cls, task: Task, states: Features, probe: str, seed: int) -> "HonestReading":
        """Fit one of `ALL_STATE_PROBES` to the training rows of a task."""
        fitting_rows = FittingRows.of_task(states, task)
        fitted = fitting_rows.fit(ALL_STATE_PROBES[probe])
        layers = fitting_rows.choose_again(fitted, n_boot=N_BOOT, seed=seed + 1)
        return cls(fitted, layers, seed)

    def compared(
        self,
        question: str,
        test: pd.DataFrame,
        scores: Float[np.ndarray, "layer n"],
        rivals: Mapping[str, Float[np.ndarray, " n"]],
    ) -> pd.DataFrame:
        """Score the probe and its rivals by the class `y` of test rows, on the same resamples.

        `scores` are those of the probe at every layer. The table has `GRADED_COLUMNS`.
        """
        readings = {PROBE: Reading(scores, self.fitted.chosen, self.layers)}
        for who, own in rivals.items():
            readings[who] = Reading.without_states(own, len(self.layers))
        table = score_readings(test, readings, PROBE, seed=self.seed)
        # How unsure an answer is has no threshold.
        table.loc[table.who == UNSURE, "accuracy"] = np.nan
        is_probe = table.who == PROBE
        layer = np.where(is_probe, self.fitted.layer, -1)
        rule = np.where(is_probe, self.fitted.rule, "")
        return table.assign(question=question, layer=layer, rule=rule)[GRADED_COLUMNS]


@dataclass(frozen=True)
class Reading:
    """Scores of test rows by one way to tell their class, at each layer that it can be read at.

    Attributes
    ----------
    scores : array [layer, n]
        Above 0 speaks for class 1. A way that reads no states has one layer.
    chosen : int
        The index of the layer that is read.
    layers : array [b]
        The index of the layer that each resample of the validation rows chooses.
    """

    scores: Float[np.ndarray, "layer n"]
    chosen: int
    layers: Int[np.ndarray, " b"]

    @classmethod
    def without_states(cls, scores: Float[np.ndarray, " n"], n_boot: int) -> "Reading":
        """Return the reading of scores that no layer was chosen for."""
        return cls(scores[None], 0, np.zeros(n_boot, int))

    @property
    def at_layer(self) -> Float[np.ndarray, " n"]:
        """The scores at the layer that is read."""
        return self.scores[self.chosen]

    def resampled_aurocs(
        self, y: Int[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
    ) -> Float[np.ndarray, " b"]:
        """Compute the AUROC of each resample of test rows, at the layer that it chooses."""
        by_layer = np.array([weighted_auroc(scores, y, weights) for scores in self.scores])
        return by_layer[self.layers, np.arange(len(weights))]


def score_readings(
    test: pd.DataFrame, readings: Mapping[str, Reading], baseline: str, *, seed: int
) -> pd.DataFrame:
    """Score readings of the class `y` of the same test rows on the same resamples of examples.

    Returns
    -------
    DataFrame
        For each of `who` the AUROC (`estimate`) with its 95 % interval; `gain`, the AUROC of the
        `baseline` minus that of the row, with the interval of the difference; the `accuracy` at
        the threshold 0; and the numbers of rows.
    """
    y, examples = test.y.to_numpy(), test.example_id
    weights = bootstrap_weights(examples, len(readings[baseline].layers), seed)
    resampled = {who: reading.resampled_aurocs(y, weights) for who, reading in readings.items()}
    estimates = {who: auroc(reading.at_layer, y) for who, reading in readings.items()}
    table = []
    for who, reading in readings.items():
        low, high = interval_of_aurocs(resampled[who], y, examples)
        gain_low, gain_high = percentile_interval(resampled[baseline] - resampled[who])
        table.append(
            {
                "who": who,
                "estimate": estimates[who],
                "low": low,
                "high": high,
                "accuracy": float(np.mean((reading.at_layer > 0) == y)),
                "gain": estimates[baseline] - estimates[who],
                "gain_low": gain_low,
                "gain_high": gain_high,
                "n": len(y),
                "n_smaller": smaller_class(y),
            }
        )
    return pd.DataFrame(table)
