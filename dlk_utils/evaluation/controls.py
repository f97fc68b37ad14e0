"""Controls: scores that one gets without reading the truth from the states.

Some controls use the states where they should not help: with shuffled labels, along random
directions, at the first layer. Others use what is known about a row without its states: the
instruction, the words of the prompt.

The strongest controls are the *rivals*, which use answers of the model (`rival_scores`). An
obedient model that is told to lie answers almost every question wrongly. Its answer *reversed*,
that is, scored with the opposite sign, is then almost always right. So is its answer to the same
question under a truth instruction. A probe of truth adds something only where it beats these.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import OneHotEncoder

from dlk_utils.evaluation.selection import FittingRows, LayerProbe
from dlk_utils.evaluation.stats import auroc
from dlk_utils.evaluation.tasks import KNOWN, Task
from dlk_utils.probes import Logistic

TURNED = "own answer, reversed if told to lie"
ORIENTED = "own answer, oriented on training rows"
TWIN = "honest twin's answer"
ASKED_AGAIN = "asked again"
TOLD_TO_LIE_PROBE = "probe of told to lie x own answer"
TOLD_TO_LIE_WORDS = "TF-IDF of told to lie x own answer"
TRUTH_TIMES_TURN = "probe of truth x turn of the answer"
"""Of pairs: a probe reads what is true from the mean of both states, and the truer draw is the one
whose answer leans to it. No score that is linear in the difference of the states can do that."""
RIVALS = (TURNED, ORIENTED, TWIN, ASKED_AGAIN, TOLD_TO_LIE_PROBE, TOLD_TO_LIE_WORDS)
"""Controls that use the model's answers, and know or guess when to trust them."""

WORDS_C = 0.01
"""`C` of the logistic regressions on words, which have many more columns than rows."""


def fit_shuffled_labels(
    make_probe: Callable[[], Any], rows: FittingRows, task: Task, seed: int, repeats: int = 5
) -> list[LayerProbe]:
    """Fit probes and choose their layers with shuffled labels, once for each repeat.

    `rows` are the training and validation rows of the task, with their states.
    """
    probes = []
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        shuffled_goal = rng.permutation(task.goal)
        shuffled_y = rng.permutation(rows.validation.y.to_numpy())
        if task.of_pairs:
            # The goal of a pair has a sign, which says which draw is truer.
            shuffled_goal = shuffled_goal * rng.choice([-1, 1], len(shuffled_goal))
        shuffled_rows = replace(rows, validation=rows.validation.assign(y=shuffled_y))
        probes.append(shuffled_rows.fit(make_probe, shuffled_goal))
    return probes


def random_direction_scores(
    read: Callable[[pd.DataFrame], np.ndarray], task: Task, seed: int, repeats: int = 20
) -> Iterator[Float[np.ndarray, " n"]]:
    """Score test rows along random directions, each with the sign that is right on training rows.

    Parameters
    ----------
    read
        Reads the states of rows at one layer: [n, d], or [n, 2, d] for pairs.

    Yields
    ------
    array [n]
        The scores of the test rows along one direction.
    """
    train, test = read(task.train), read(task.test)
    if task.of_pairs:
        # The differences are not centred, so that a pair whose draws are swapped has minus its
        # score.
        train, test = train[:, 1] - train[:, 0], test[:, 1] - test[:, 0]
        mean = 0
    else:
        mean = train.mean(axis=0)
    deviation = train.std(axis=0) + 1e-8
    train, test = train - mean, test - mean
    y = task.train.y.to_numpy()
    for repeat in range(repeats):
        # The 7 keeps these random numbers apart from those of `fit_shuffled_labels`.
        rng = np.random.default_rng([seed, 7, repeat])
        # Divided, so that no channel counts more for its scale.
        direction = rng.standard_normal(train.shape[1]) / deviation
        yield _best_sign(train @ direction, y) * (test @ direction)


def scores_without_states(task: Task) -> dict[str, Float[np.ndarray, " n"]]:
    """Score test rows [n] by what is known about them without their states.

    For pairs, a control guesses the truth in the same way. Then it scores each pair by whether the
    answer of the second draw lies nearer to that guess than the first one's.
    """
    y = _guessed_class(task).to_numpy()

    def from_categories(columns: list[str]) -> Float[np.ndarray, " n"]:
        encoder = OneHotEncoder(handle_unknown="ignore")
        return _encoded_scores(encoder, columns, task, y, C=1.0)

    def from_words(column: str) -> Float[np.ndarray, " n"]:
        encoder = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        return _encoded_scores(encoder, column, task, y, C=WORDS_C)

    def from_length() -> Float[np.ndarray, " n"]:
        probe = Logistic(C=1.0).fit(_log_length(task.train), y)
        return probe.decision_function(_log_length(task.test))

    learned = {
        "instruction only": partial(from_categories, ["instruction"]),
        "metadata": partial(from_categories, ["instruction", "template", "dataset"]),
        "length": from_length,
        "TF-IDF": partial(from_words, "prompt"),
        "TF-IDF, question only": partial(from_words, "text"),
    }
    majority = np.full(len(task.test), y.mean() - 0.5)
    # Pairs have two classes also where their rows have one label. There is only that to learn.
    has_one_label = len(np.unique(y)) < 2
    scores = {"majority": majority, **rival_scores(task)}
    scores |= {name: majority if has_one_label else learn() for name, learn in learned.items()}
    if task.of_pairs:
        return {name: score_pairs(guesses, task) for name, guesses in scores.items()}
    return scores


def _guessed_class(task: Task) -> pd.Series:
    """Return the class of training rows that controls learn: `y`, or for pairs the label.

    (The `y` of a pair says which draw is truer, and nothing in the row but its draws tells that.)
    """
    return task.train.label if task.of_pairs else task.train.y


def score_pairs(guesses: Float[np.ndarray, " n"], task: Task) -> Float[np.ndarray, " n"]:
    """Score test pairs by how far the second draw moved towards the guessed truth.

    A guess is above 0 if choice 1 should be right.
    """
    move = (task.test.p1_draw1 - task.test.p1_draw0).to_numpy()
    return np.sign(guesses) * move


def rival_scores(task: Task) -> dict[str, Float[np.ndarray, " n"]]:
    """Score test rows [n] by the model's answers.

    An answer counts by its margin: the log-odds of choice 1. For the target "truth", the positive
    control, and the guesses of the truth behind pairs, the rivals are:

    * "own answer": the margin of the row itself;
    * `TURNED`: the same with the opposite sign in rows told to lie, as if the model always obeyed;
    * `ORIENTED`: the same with the one sign that is right on the training rows;
    * `TWIN`: the margin of the row's honest twin;
    * `ASKED_AGAIN`: the mean margin of further truth prompts of the same example.

    The last two are there if the rows have their columns (`label_behaviour` adds them). In the
    regime `KNOWN` there is no `ASKED_AGAIN`: rows are known if those further prompts are answered
    correctly, so that it would score 1 by definition.

    For the target "lie", the sign of an answer does not matter, because either choice can be a lie.
    "own answer" and `ORIENTED` score how unsure or how sure it is. `TWIN` and `ASKED_AGAIN` score
    how far it contradicts the answer under a truth instruction. (`ASKED_AGAIN` finds every lie, as
    those further prompts define what counts as one.)
    """
    margin = task.test.margin.to_numpy(float)
    train_margin = task.train.margin.to_numpy(float)
    columns = {TWIN: "twin_margin", ASKED_AGAIN: "asked_again_margin"}
    if task.regime == KNOWN:
        del columns[ASKED_AGAIN]
    honest_margins = {}
    for name, column in columns.items():
        if column in task.test:
            # A row without such an answer counts 0: neither choice.
            honest_margins[name] = task.test[column].fillna(0).to_numpy(float)

    if task.target == "lie":
        sure, train_sure = np.abs(margin), np.abs(train_margin)
        scores = {
            "own answer": -sure,
            ORIENTED: _best_sign(train_sure, task.train.y.to_numpy()) * sure,
        }
        for name, honest_margin in honest_margins.items():
            scores[name] = -margin * np.sign(honest_margin)
        return scores

    is_told_to_lie = (task.test.role == "lie").to_numpy()
    return {
        "own answer": margin,
        TURNED: np.where(is_told_to_lie, -margin, margin),
        ORIENTED: _best_sign(train_margin, _guessed_class(task).to_numpy()) * margin,
        **honest_margins,
    }


def _best_sign(scores: Float[np.ndarray, " n"], y: np.ndarray) -> int:
    """Return the sign, 1 or -1, with which scores of training rows have the higher AUROC."""
    return 1 if auroc(scores, y) >= 0.5 else -1


def answers_turned_by_words(train: pd.DataFrame, task: Task) -> Float[np.ndarray, " n"]:
    """Reverse the own answers of test rows as far as the words of the prompt say "told to lie".

    `train` are training rows of both roles, told to tell the truth and to lie.
    """
    encoder = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    train_words = encoder.fit_transform(train.prompt).toarray()
    test_words = encoder.transform(task.test.prompt).toarray()
    probe = Logistic(C=WORDS_C).fit(train_words, told_to_lie_rows(train).y.to_numpy())
    return turn_answers(task, probe.decision_function(test_words))


def told_to_lie_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows whose class `y` is whether they are told to lie."""
    return rows.assign(y=(rows.role == "lie").astype(int))


def turn_answers(task: Task, log_odds: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Reverse the own answers of test rows [n] as far as they seem to be told to lie.

    Parameters
    ----------
    log_odds
        Of being told to lie, for each test row.

    Returns
    -------
    array [n]
        The margin times P(told to tell the truth) - P(told to lie), which is -tanh(log odds / 2).
        It is 0 where both are equally likely.
    """
    return -np.tanh(log_odds / 2) * task.test.margin.to_numpy(float)


def _encoded_scores(
    encoder: Any, columns: str | Sequence[str], task: Task, y: np.ndarray, *, C: float
) -> Float[np.ndarray, " n"]:
    """Score test rows by a logistic regression on encoded columns of the training rows."""
    train = encoder.fit_transform(task.train[columns]).astype(float).toarray()
    test = encoder.transform(task.test[columns]).astype(float).toarray()
    return Logistic(C=C).fit(train, y).decision_function(test)


def _log_length(rows: pd.DataFrame) -> Float[np.ndarray, "n 1"]:
    n_characters = rows.prompt.str.len().to_numpy(float)
    return np.log(n_characters)[:, None]
