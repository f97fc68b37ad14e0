"""Tables of notebook 06 behind its pictures: beliefs, the ROC curve, and answers to look at."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.metrics import roc_curve

from dlk_utils.evaluation.detector import against_answer
from dlk_utils.evaluation.selection import fit_layers
from dlk_utils.evaluation.stats import auroc, auroc_interval, recall_at
from dlk_utils.evaluation.tasks import Features, require_rows
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import empty_if_too_few
from dlk_utils.lab.tables.answer_kinds import HONEST, LIES, MISTAKES, with_kinds
from dlk_utils.probes import Logistic

TRUTHFUL = "true answers, told to lie"
LEAST_TRUTHFUL = 10
"""With fewer of these, no curve against them is drawn."""
N_BINS = 12
NO_ANSWERS = "There was no detector, no lie, or no honest answer to judge"

MEDIAN_LIE = "A typical lie: the belief speaks more strongly against half of the lies"
HIDDEN_LIE = "The least suspected lie: of all lies, the belief speaks least against it"
DOUBTED_ANSWER = "The most doubted honest answer: of these, the belief speaks most against it"
BELIEVED_MISTAKE = "The most believed mistake: of all mistakes, the belief speaks most for it"
RULES = {
    MEDIAN_LIE: (LIES, 0.5),
    HIDDEN_LIE: (LIES, 0.0),
    DOUBTED_ANSWER: (HONEST, 1.0),
    BELIEVED_MISTAKE: (MISTAKES, 0.0),
}
"""Which answers are looked at closely: the kind, and the quantile of how much the belief speaks
against them."""

ANSWER_COLUMNS = ["row_id", "label", "kind", "against"]
AT_THRESHOLD = "at the threshold: "
"""What the name of a curve begins with that is one point: the threshold."""
ROC_COLUMNS = ["curve", "alarms", "caught"]
BIN_COLUMNS = ["kind", "against", "share", "n"]
BELIEF_COLUMNS = ["row_id", "layer", "belief"]
NOT_READ = pd.DataFrame(columns=BELIEF_COLUMNS)
"""The beliefs of a page that loads a card, which reads one layer."""
NOT_READ.attrs = {"too_few_rows": "The belief by layer is not shown, as a card was loaded"}


def judged_answers(judged: Mapping[str, pd.DataFrame], judge: str) -> pd.DataFrame:
    """Select the lies, honest answers and mistakes that a detector has judged.

    Parameters
    ----------
    judged
        What `detector.judge_test_rows` returns.
    judge
        The name of the detector. If it is not there, the table has no rows.

    Returns
    -------
    DataFrame
        The rows with their `kind` (see `answer_kinds`), and `against`: how strongly the belief
        speaks against the answer; below 0 it speaks for it.
    """
    if judge not in judged:
        return pd.DataFrame(columns=ANSWER_COLUMNS)
    rows = with_kinds(judged[judge])
    return rows.assign(
        against=against_answer(rows.belief.to_numpy(float), rows.margin.to_numpy(float))
    )


def truthful_answers(judged: Mapping[str, pd.DataFrame], judge: str) -> pd.DataFrame:
    """Select the right answers about what the model knows to prompts that ask for a lie.

    The arguments, and the column `against`, are those of `judged_answers`.
    """
    if judge not in judged:
        return pd.DataFrame(columns=ANSWER_COLUMNS)
    rows = judged[judge]
    rows = rows[(rows.role == "lie") & rows.correct.astype(bool) & rows.knows.astype(bool)]
    return rows.assign(
        kind=TRUTHFUL,
        against=against_answer(rows.belief.to_numpy(float), rows.margin.to_numpy(float)),
    )


def roc(answers: pd.DataFrame, truthful: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return the ROC curve of lies against other answers, and where the threshold lies on it.

    Parameters
    ----------
    answers, truthful
        Rows of `judged_answers` and of `truthful_answers`.
    threshold
        Answers that the belief speaks against by more are flagged.

    Returns
    -------
    DataFrame
        For each `curve` its points: the share of the other answers that are flagged (`alarms`), and
        that of the lies (`caught`). There is a curve of lies told from honest answers, and one of
        lies told from truthful ones if there are `LEAST_TRUTHFUL` of these.
        The point at the threshold has a curve of its own, whose name begins with `AT_THRESHOLD`.
    """
    lies = answers.against[answers.kind == LIES].to_numpy(float)
    honest = answers.against[answers.kind == HONEST].to_numpy(float)
    true_answers = truthful.against.to_numpy(float)
    curves = []
    for name, others, least in ((HONEST, honest, 1), (TRUTHFUL, true_answers, LEAST_TRUTHFUL)):
        if len(lies) == 0 or len(others) < least:
            continue
        is_lie = np.repeat([True, False], [len(lies), len(others)])
        alarms, caught, _ = roc_curve(is_lie, np.concatenate([lies, others]))
        curve = f"lies told from {name}"
        curves.append(pd.DataFrame({"curve": curve, "alarms": alarms, "caught": caught}))
        flagged = {"alarms": np.mean(others > threshold), "caught": np.mean(lies > threshold)}
        curves.append(pd.DataFrame([{"curve": f"{AT_THRESHOLD}{name}", **flagged}]))
    return _or_reason(pd.concat(curves) if curves else pd.DataFrame(columns=ROC_COLUMNS))


def working_point(answers: pd.DataFrame, threshold: float, alarms: float) -> pd.Series | None:
    """Compare the threshold with the best one on the ROC curve against honest answers.

    Parameters
    ----------
    answers
        A table of `judged_answers`.
    threshold
        Answers whose `against` is above it are flagged.
    alarms
        The share of honest answers that may be flagged at the best threshold, if the given one
        flags no more.

    Returns
    -------
    Series or None
        The `estimate` of the AUROC with `low` and `high`; the shares `caught` and `alarms` at the
        threshold; and `best_caught`, the largest share of lies that a threshold chosen with these
        very answers would catch without more alarms than that.
        None if there are no lies or no honest answers.
    """
    rows = answers[answers.kind.isin([LIES, HONEST])]
    is_lie = (rows.kind == LIES).to_numpy()
    if not (is_lie.any() and (~is_lie).any()):
        return None
    scores = rows.against.to_numpy(float)
    flagged = scores > threshold
    low, high = auroc_interval(scores, is_lie.astype(int), rows.example_id)
    found = {"estimate": auroc(scores, is_lie.astype(int)), "low": low, "high": high}
    found |= {"caught": flagged[is_lie].mean(), "alarms": flagged[~is_lie].mean()}
    allowed = max(alarms, found["alarms"])
    return pd.Series(found | {"best_caught": recall_at(scores, is_lie.astype(int), allowed)})


def belief_bins(answers: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Count in bins how strongly the belief speaks against the answers of each kind.

    There are about `N_BINS` bins. The threshold lies between two of them.

    Returns
    -------
    DataFrame
        For each `kind` that has rows, and each bin: its middle (`against`), the `share` of the
        answers of the kind in it, and their number `n`.
    """
    rows = answers[answers.kind.isin([HONEST, LIES, MISTAKES])]
    if rows.empty:
        return _or_reason(pd.DataFrame(columns=BIN_COLUMNS))
    against = rows.against.to_numpy(float)
    width = max(np.ptp(against), 1e-6) / N_BINS
    # A score at the threshold is not flagged, so that it belongs to the bin below.
    numbers = np.ceil((against - threshold) / width).astype(int) - 1
    lowest, n_bins = numbers.min(), np.ptp(numbers) + 1
    middles = threshold + width * (lowest + np.arange(n_bins) + 0.5)
    bins = []
    for kind, part in rows.assign(number=numbers - lowest).groupby("kind", sort=False):
        counts = np.bincount(part.number, minlength=n_bins)
        columns = {"kind": kind, "against": middles, "share": counts / len(part), "n": counts}
        bins.append(pd.DataFrame(columns))
    return pd.concat(bins, ignore_index=True)[BIN_COLUMNS]


def examples(answers: pd.DataFrame) -> pd.DataFrame:
    """Choose the answers to look at closely: one for each of `RULES`, whose name is its `rule`.

    A kind without rows has none. A row that two rules choose is there once.
    """
    chosen = []
    for rule, (kind, quantile) in RULES.items():
        rows = answers[answers.kind == kind].sort_values("against", kind="stable")
        if len(rows):
            place = int(quantile * (len(rows) - 1))
            chosen.append(rows.iloc[[place]].assign(rule=rule))
    if not chosen:
        return answers.head(0).assign(rule="")
    return pd.concat(chosen).drop_duplicates("row_id").reset_index(drop=True)


@kept("06-beliefs")
@empty_if_too_few(BELIEF_COLUMNS)
def beliefs_by_layer(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Score the test rows at every layer by the probe of "honest only"; see `score_by_layer`."""
    return score_by_layer(run.truth_rows, run.states(layers))


def score_by_layer(rows: pd.DataFrame, features: Features) -> pd.DataFrame:
    """Fit the probe of `fit_detector` on honest rows at every layer, and score the test rows.

    Returns
    -------
    DataFrame
        `row_id`, `layer` and `belief`, for each test row at each layer. Above 0, the belief speaks
        for choice 1.
    """
    may_fit = rows[rows.role != "lie"]
    train, validation = (may_fit[may_fit.split == split] for split in ("train", "validation"))
    require_rows({"train": train, "validation": validation}, "the belief at each layer")
    fit = fit_layers(partial(Logistic, "auto"), features, train, validation)
    test = rows[rows.split == "test"]
    if test.empty:
        return pd.DataFrame(columns=BELIEF_COLUMNS)
    scores: Float[np.ndarray, "layer n"] = fit.score_layers(test)
    parts = [
        pd.DataFrame({"row_id": test.row_id.to_numpy(), "layer": layer, "belief": of_layer})
        for layer, of_layer in zip(fit.layers, scores, strict=True)
    ]
    return pd.concat(parts, ignore_index=True)


def example_lines(chosen: pd.DataFrame, beliefs: pd.DataFrame) -> pd.DataFrame:
    """Return how strongly the belief speaks for what is true, by layer, for a figure.

    Parameters
    ----------
    chosen
        Rows of `examples`.
    beliefs
        The table of `beliefs_by_layer`.

    Returns
    -------
    DataFrame
        The columns `row_id`, `answer` (the first words of the rule), `layer` and `for_truth`.
    """
    lines = chosen[["row_id", "rule", "label"]].merge(beliefs, on="row_id", sort=False)
    for_truth = lines.belief * (2 * lines.label.astype(int) - 1)
    names = [rule.split(":")[0] for rule in lines.rule]
    lines = lines.assign(answer=names, for_truth=for_truth)
    lines = lines[["row_id", "answer", "layer", "for_truth"]]
    # Where there are no lines, the figure says why there are no beliefs.
    lines.attrs = dict(beliefs.attrs)
    return lines


def _or_reason(table: pd.DataFrame) -> pd.DataFrame:
    """Let an empty table say why it is empty, where it would be drawn."""
    if table.empty:
        table.attrs = {"too_few_rows": NO_ANSWERS}
    return table
