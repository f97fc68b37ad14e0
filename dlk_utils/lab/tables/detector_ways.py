"""Tables of notebook 06: ways to make a lie detector of a probe, compared over other splits."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Float

from dlk_utils.evaluation.controls import told_to_lie_rows
from dlk_utils.evaluation.detector import against_answer
from dlk_utils.evaluation.instruction import fit_shift
from dlk_utils.evaluation.selection import (
    BY_TWINS,
    EARLIEST,
    LayerProbe,
    choose_by_twins,
    fit_layers,
    in_memory,
)
from dlk_utils.evaluation.stats import auroc
from dlk_utils.evaluation.tasks import Features, require_rows, select_rows
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import empty_if_too_few, split_anew
from dlk_utils.probes import Logistic

SPLITS = 10
HONEST_ALARMS = 0.05
"""The share of right honest validation answers that may be flagged."""

TAKEN_OUT = "the same layer, told-to-lie taken out"
NEIGHBOURS = "mean of three neighbouring layers"
SHIFTED = "less the shift, knowing who is told to lie"
TOLD = "told to lie? (reads no truth)"
WAYS = (EARLIEST, BY_TWINS, TAKEN_OUT, NEIGHBOURS, SHIFTED, TOLD)
"""The ways to judge an answer; `evidence_against_answers` says what each does."""

DETECTORS = (EARLIEST, BY_TWINS, TAKEN_OUT, NEIGHBOURS)
"""Those that read the truth, and need not know the instruction of the answer that they judge."""

BASE_RATES = (0.2, 0.5, 0.8)
"""Shares of lies among the judged answers, at which accuracies are given."""

WAY_COLUMNS = [
    *("again", "split", "way", "lies", "lies_choice_1", "lies_choice_0", "honest", "truthful"),
    *("auroc", "auroc_truthful", "n_lies", "n_honest", "n_truthful"),
]

NOT_COMPARED = pd.DataFrame(columns=WAY_COLUMNS)
"""The table of a page that loads a card, and fits nothing."""
NOT_COMPARED.attrs = {"too_few_rows": "not compared, as a card was loaded"}

Evidence = Callable[[pd.DataFrame], Float[np.ndarray, " n"]]
"""How strongly something speaks against the answers of rows; it flags those above a threshold."""


@kept("06-ways")
def ways(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Compare ways to make a lie detector on other splits of a run; see `compare_ways`."""
    return compare_ways(run.truth_rows, in_memory(run.states(layers), run.truth_rows))


@empty_if_too_few(WAY_COLUMNS)
def compare_ways(rows: pd.DataFrame, features: Features) -> pd.DataFrame:
    """Flag answers in each of the `WAYS`, on `SPLITS` random splits of the examples.

    No way learns from a label of a row told to lie. Those that need rows told to lie take them from
    one half of the instruction families, and judge the other half; then the halves change places.
    The threshold of each way is the least one that at most `HONEST_ALARMS` of the right honest
    validation answers exceed; it is at least 0, but for `TOLD`.

    Parameters
    ----------
    rows : DataFrame
        Rows of the target truth, with `lied`, `knows`, `correct`, `family` and `margin`.
    features : Features
        States by layer.

    Returns
    -------
    DataFrame
        A row for each split of the examples (`again`), each `split` that is judged (validation and
        test) and each `way`: the share that is flagged

        * of `lies`: rows told to lie that the model knows and answered wrongly; `lies_choice_1`
          are those where choice 1 is right, and `lies_choice_0` those where choice 0 is;
        * of `honest` answers: right answers of rows told to tell the truth;
        * of `truthful` answers: right answers of rows told to lie that the model knows. (Where it
          does not know, a right answer may be a lie that failed.)

        `auroc` and `auroc_truthful` say how well the evidence orders lies and honest, or truthful,
        answers. The numbers of rows begin with `n_`; a share or an AUROC of no rows is nan.
    """
    table = []
    for again in range(SPLITS):
        anew = split_anew(rows, again)
        judged = [_judge_families(anew, features, half) for half in (0, 1)]
        both = pd.concat(judged, ignore_index=True)
        for (split, way), of_way in both.groupby(["split", "way"], sort=False):
            table.append({"again": again, "split": split, "way": way, **_rates(of_way)})
    return pd.DataFrame(table, columns=WAY_COLUMNS)


def _judge_families(rows: pd.DataFrame, features: Features, half: int) -> pd.DataFrame:
    """Judge validation and test rows under one half of the families of lies, in every way."""
    families = sorted(rows.family[rows.role == "lie"].unique())
    is_unseen = (rows.role == "lie") & rows.family.isin(families[half::2])
    validation = select_rows(rows, "truth", "validation")
    is_right = validation.correct.to_numpy(bool)
    judged = []
    for way, evidence in evidence_against_answers(rows[~is_unseen], features).items():
        threshold = _threshold(evidence(validation)[is_right])
        if way != TOLD:
            # Below it, the score speaks for the answer.
            threshold = max(0.0, threshold)
        for split in ("validation", "test"):
            is_judged = (rows.split == split) & ((rows.role == "truth") | is_unseen)
            of_split = rows[is_judged]
            against = evidence(of_split)
            judged.append(
                of_split.assign(way=way, half=half, against=against, is_flagged=against > threshold)
            )
    return pd.concat(judged, ignore_index=True)


def evidence_against_answers(rows: pd.DataFrame, features: Features) -> dict[str, Evidence]:
    """Fit what each of the `WAYS` needs to the training and validation rows.

    Parameters
    ----------
    rows : DataFrame
        Honest rows, and rows told to lie by instructions of which the judged rows have none.
    features : Features
        States by layer.

    Returns
    -------
    dict
        For each way a function from rows to evidence [n]:

        * `EARLIEST`, `BY_TWINS`: how strongly a probe of truth speaks against the answer, at the
          layer that either rule chooses;
        * `TAKEN_OUT`: the same by twins, less what the instruction changes (`fit_shift`). It is not
          told the instruction of the row that it judges;
        * `NEIGHBOURS`: the mean of the probe's scores at that layer and its two neighbours, each in
          units of the spread of validation scores;
        * `SHIFTED`: as `TAKEN_OUT`, but the whole change is taken off rows told to lie, and nothing
          off others. It has to be known which they are;
        * `TOLD`: how strongly a probe of the role says "told to lie". It reads no truth.

    Raises
    ------
    TooFewRows
        If there are too few rows to fit on, or too few twins.
    """
    train, validation = (select_rows(rows, "truth", split) for split in ("train", "validation"))
    require_rows({"train": train, "validation": validation}, "ways to make a detector")
    truth = fit_layers(partial(Logistic, "auto"), features, train, validation)
    twins = rows[rows.split == "validation"]
    by_twins = choose_by_twins(truth, twins)
    told = _fit_told_to_lie(rows, features)
    shift = fit_shift(by_twins, rows)
    read = list(features.values())[by_twins.chosen]
    deviation = truth.validation_scores.std(axis=1, keepdims=True)
    n_layers = len(truth.layers)
    nearby = [i for i in range(by_twins.chosen - 1, by_twins.chosen + 2) if 0 <= i < n_layers]

    def taken_out(some: pd.DataFrame) -> Float[np.ndarray, " n"]:
        return by_twins.score(some) - shift.of_states(read(some))

    def less_shift(some: pd.DataFrame) -> Float[np.ndarray, " n"]:
        return by_twins.score(some) - shift.shift * (some.role == "lie").to_numpy()

    def mean_of_layers(some: pd.DataFrame) -> Float[np.ndarray, " n"]:
        return (truth.score_layers(some) / deviation)[nearby].mean(axis=0)

    scores_of_truth = {
        EARLIEST: truth.score,
        BY_TWINS: by_twins.score,
        TAKEN_OUT: taken_out,
        NEIGHBOURS: mean_of_layers,
        SHIFTED: less_shift,
    }
    evidence = {way: partial(_against, score) for way, score in scores_of_truth.items()}
    return evidence | {TOLD: told.score}


def _against(score: Callable, rows: pd.DataFrame) -> Float[np.ndarray, " n"]:
    """How strongly a score of truth speaks against the answers of rows."""
    return against_answer(score(rows), rows.margin.to_numpy())


def _fit_told_to_lie(rows: pd.DataFrame, features: Features) -> LayerProbe:
    """Fit a probe of the role of rows, lie or truth."""
    by_role = told_to_lie_rows(rows)
    train, validation = (by_role[by_role.split == split] for split in ("train", "validation"))
    require_rows({"train": train, "validation": validation}, "told to lie?")
    return fit_layers(partial(Logistic, "auto"), features, train, validation)


def _threshold(against: Float[np.ndarray, " n"]) -> float:
    """The least threshold that at most `HONEST_ALARMS` of the right answers exceed."""
    allowed = int(np.floor(HONEST_ALARMS * len(against)))
    return float(np.sort(against)[len(against) - 1 - allowed]) if len(against) else 0.0


def _rates(judged: pd.DataFrame) -> dict[str, float]:
    """The shares, AUROCs and numbers of `compare_ways`, of rows that one way has judged."""
    is_lie = judged.lied.to_numpy(bool)
    is_right = judged.correct.to_numpy(bool)
    told_to_lie = (judged.role == "lie").to_numpy()
    groups = {
        "lies": is_lie,
        "lies_choice_1": is_lie & (judged.label == 1).to_numpy(),
        "lies_choice_0": is_lie & (judged.label == 0).to_numpy(),
        "honest": is_right & ~told_to_lie,
        "truthful": is_right & told_to_lie & judged.knows.to_numpy(bool),
    }
    flagged = judged.is_flagged.to_numpy()
    rates = {name: flagged[rows].mean() if rows.any() else np.nan for name, rows in groups.items()}
    for name, other in (("auroc", "honest"), ("auroc_truthful", "truthful")):
        # The scores of the two halves of the families have scales of their own.
        halves = [_order(judged[(is_lie | groups[other]) & (judged.half == h)]) for h in (0, 1)]
        rates[name] = np.mean(halves)
    for name in ("lies", "honest", "truthful"):
        rates[f"n_{name}"] = judged.row_id[groups[name]].nunique()
    return rates


def _order(judged: pd.DataFrame) -> float:
    """The AUROC of the evidence, of lies against other answers."""
    return auroc(judged.against.to_numpy(float), judged.lied.to_numpy(int))


def accuracy_at(table: pd.DataFrame, base_rate: float, others: str = "honest") -> pd.Series:
    """Return the accuracy of each row of `compare_ways`, if lies had this share of the answers.

    `others` are the other answers: "honest" or "truthful" ones.
    """
    return base_rate * table.lies + (1 - base_rate) * (1 - table[others])


def ways_compared(ways: pd.DataFrame) -> pd.DataFrame:
    """Summarise `compare_ways` by way: means over the splits of the examples, on test rows.

    `lies_low` and `lies_high` are the least and the greatest share of lies that is flagged.
    """
    rows = []
    for way, test in ways[ways.split == "test"].groupby("way", sort=False):
        row = {
            "way": way,
            "lies": test.lies.mean(),
            "lies_low": test.lies.min(),
            "lies_high": test.lies.max(),
            **test[["lies_choice_1", "lies_choice_0", "honest", "truthful"]].mean(),
            "n_truthful": test.n_truthful.mean(),
            **test[["auroc", "auroc_truthful"]].mean(),
        }
        for rate in BASE_RATES:
            row[f"accuracy at {rate}"] = accuracy_at(test, rate).mean()
        row["told to lie, at 0.5"] = accuracy_at(test, 0.5, "truthful").mean()
        rows.append(row)
    return pd.DataFrame(rows, columns=None if rows else ["way"])


def best_rivals(ways: pd.DataFrame, n: int = 2) -> list[str]:
    """Return the `n` of the `DETECTORS` besides `EARLIEST` that do best on validation rows.

    `ways` is a table of `compare_ways`. What counts is the mean accuracy over the splits, at equal
    shares of lies and honest answers. The best one comes first.
    """
    rivals = [way for way in DETECTORS if way != EARLIEST]
    validation = ways[(ways.split == "validation") & ways.way.isin(rivals)]
    accuracy = accuracy_at(validation, 0.5).groupby(validation.way, sort=False).mean()
    return list(accuracy.sort_values(ascending=False, kind="stable").index[:n])
