"""What a probe has to beat: scores that one gets without reading the truth from the states.

Some controls use the states where they should not help: with shuffled labels, along random
directions, at the first layer. Others use what is known of a row anyway: the instruction, the words
of the prompt. The strongest ones are *rivals* that use answers of the model (`rival_scores`). If a
model that is told to lie answers wrongly almost always, its answer turned round is almost always
right, and so is what it answers when it is asked again and told to tell the truth. A probe of truth
says more than these only where it beats them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import OneHotEncoder

from dlk_utils.evaluation.selection import FittingRows, LayerProbe
from dlk_utils.evaluation.stats import auroc
from dlk_utils.evaluation.tasks import Task
from dlk_utils.probes import Logistic

TURNED = "own answer, turned round if told to lie"
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
"""Strength of the probes on words, which have many more columns than there are rows."""


def fit_shuffled_labels(
    make_probe: Callable[[], Any], rows: FittingRows, task: Task, seed: int, repeats: int = 5
) -> list[LayerProbe]:
    """Fit probes and choose their layers with shuffled labels, once for each repeat.

    `rows` are the training and validation rows of the task, with their states.
    """
    probes = []
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        goal = rng.permutation(task.goal)
        shuffled = rows.validation.assign(y=rng.permutation(rows.validation.y.to_numpy()))
        if task.of_pairs:
            goal = goal * rng.choice([-1, 1], len(goal))
        probes.append(replace(rows, validation=shuffled).fit(make_probe, goal))
    return probes


def random_direction_scores(
    read: Callable[[pd.DataFrame], np.ndarray], task: Task, seed: int, repeats: int = 20
) -> Iterator[Float[np.ndarray, " n"]]:
    """Score test rows along random directions, each oriented on the training rows.

    `read` reads the states of rows at one layer.
    """
    train, test = read(task.train), read(task.test)
    if task.of_pairs:
        # a difference of two states is not centred: swapping them must turn its sign
        train, test, mean = train[:, 1] - train[:, 0], test[:, 1] - test[:, 0], 0
    else:
        mean = train.mean(axis=0)
    deviation = train.std(axis=0) + 1e-8
    train, test = train - mean, test - mean
    y = task.train.y.to_numpy()
    for repeat in range(repeats):
        normal = np.random.default_rng([seed, 7, repeat]).standard_normal(train.shape[1])
        direction = normal / deviation
        sign = 1 if auroc(train @ direction, y) >= 0.5 else -1
        yield sign * (test @ direction)


def scores_without_states(task: Task) -> dict[str, Float[np.ndarray, " n"]]:
    """Score test rows [n] by what can be known of them without their states.

    A control of pairs guesses the truth, and looks which way the answer moved.
    """
    y = (task.train.label if task.of_pairs else task.train.y).to_numpy()

    def from_categories(columns: list[str]) -> Float[np.ndarray, " n"]:
        encoder = OneHotEncoder(handle_unknown="ignore")
        return _encoded_scores(encoder, columns, task, y, C=1.0)

    def from_words(column: str) -> Float[np.ndarray, " n"]:
        encoder = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        return _encoded_scores(encoder, column, task, y, C=WORDS_C)

    scores = {
        "majority": np.full(len(task.test), y.mean() - 0.5),
        **rival_scores(task),
        "instruction only": from_categories(["instruction"]),
        "metadata": from_categories(["instruction", "template", "dataset"]),
        "length": Logistic(C=1.0).fit(_length(task.train), y).decision_function(_length(task.test)),
        "TF-IDF": from_words("prompt"),
        "TF-IDF, question only": from_words("text"),
    }
    if task.of_pairs:
        return {name: truer_draw(score, task) for name, score in scores.items()}
    return scores


def truer_draw(truth: Float[np.ndarray, " n"], task: Task) -> Float[np.ndarray, " n"]:
    """Guess the truer draw of test pairs from a guess of the truth: the one that leans to it."""
    return np.sign(truth) * (task.test.p1_draw1 - task.test.p1_draw0).to_numpy()


def rival_scores(task: Task) -> dict[str, Float[np.ndarray, " n"]]:
    """Score test rows [n] by the model's answers.

    For the truth (of pairs too), these are:

    * the own answer, its margin;
    * the same turned round in rows told to lie (`TURNED`), as if the model always obeyed;
    * the same with the sign that is right on the training rows (`ORIENTED`);
    * the margin of the honest twin (`TWIN`), and the mean margin of further truth prompts of the
      same example (`ASKED_AGAIN`), where the rows have them (`label_behaviour` adds them).

    Which choice was given says nothing of whether it was a lie. There the own answer counts by how
    unsure it is, and the twin and the further prompts by how far they contradict it. (What counts
    as a lie is defined by those further prompts, so that `ASKED_AGAIN` finds every lie.)
    """
    margin = task.test.margin.to_numpy(float)
    asked_elsewhere = {
        name: task.test[column].fillna(0).to_numpy(float)
        for name, column in ((TWIN, "twin_margin"), (ASKED_AGAIN, "asked_again_margin"))
        if column in task.test
    }
    train_margin = task.train.margin.to_numpy(float)
    if task.target == "lie":
        sign = _sign(np.abs(train_margin), task.train.y)
        contradicted = {name: -margin * np.sign(m) for name, m in asked_elsewhere.items()}
        return {"own answer": -np.abs(margin), ORIENTED: sign * np.abs(margin)} | contradicted
    told_to_lie = (task.test.role == "lie").to_numpy()
    sign = _sign(train_margin, task.train.label if task.of_pairs else task.train.y)
    return {
        "own answer": margin,
        TURNED: np.where(told_to_lie, -margin, margin),
        ORIENTED: sign * margin,
        **asked_elsewhere,
    }


def _sign(scores: Float[np.ndarray, " n"], y: pd.Series) -> int:
    """The sign with which scores tell the class of training rows best."""
    return 1 if auroc(scores, y.to_numpy()) >= 0.5 else -1


def answers_turned_by_words(train: pd.DataFrame, task: Task) -> Float[np.ndarray, " n"]:
    """Turn round the own answers of test rows as far as the words of the prompt say "told to lie".

    `train` are training rows of both roles, told to tell the truth and to lie.
    """
    encoder = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    words = encoder.fit_transform(train.prompt).toarray()
    probe = Logistic(C=WORDS_C).fit(words, told_to_lie(train).y.to_numpy())
    return turned(probe.decision_function(encoder.transform(task.test.prompt).toarray()), task)


def told_to_lie(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows whose class `y` is whether they are told to lie."""
    return rows.assign(y=(rows.role == "lie").astype(int))


def turned(score: Float[np.ndarray, " n"], task: Task) -> Float[np.ndarray, " n"]:
    """Turn round the own answers of test rows [n] as far as `score` (log-odds) says "told to lie".

    Answers count by their margin, so that one of whose instruction nothing is known counts 0.
    """
    return -np.tanh(score / 2) * task.test.margin.to_numpy(float)


def _encoded_scores(
    encoder: Any, columns: str | Sequence[str], task: Task, y: np.ndarray, *, C: float
) -> Float[np.ndarray, " n"]:
    train = encoder.fit_transform(task.train[columns]).astype(float).toarray()
    test = encoder.transform(task.test[columns]).astype(float).toarray()
    return Logistic(C=C).fit(train, y).decision_function(test)


def _length(rows: pd.DataFrame) -> Float[np.ndarray, "n 1"]:
    return np.log(rows.prompt.str.len().to_numpy(float))[:, None]
