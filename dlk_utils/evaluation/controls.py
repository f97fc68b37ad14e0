"""What a probe has to beat: scores that one gets without reading anything from the states.

Some controls use the states where they should not help: with shuffled labels, along random
directions, at the first layer. The others use what is known of a row anyway: the model's own
answer, the instruction, the words of the prompt.
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
    margin = task.test.margin.to_numpy()
    # which choice was given says nothing of a lie, but how unsure the answer is may
    own_answer = -np.abs(margin) if task.target == "lie" else margin

    def from_categories(columns: list[str]) -> Float[np.ndarray, " n"]:
        encoder = OneHotEncoder(handle_unknown="ignore")
        return _encoded_scores(encoder, columns, task, y, C=1.0)

    def from_words(column: str) -> Float[np.ndarray, " n"]:
        encoder = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        return _encoded_scores(encoder, column, task, y, C=WORDS_C)

    scores = {
        "majority": np.full(len(task.test), y.mean() - 0.5),
        "own answer": own_answer,
        "instruction only": from_categories(["instruction"]),
        "metadata": from_categories(["instruction", "template", "dataset"]),
        "length": Logistic(C=1.0).fit(_length(task.train), y).decision_function(_length(task.test)),
        "TF-IDF": from_words("prompt"),
        "TF-IDF, question only": from_words("text"),
    }
    if task.of_pairs:
        answer_moved = (task.test.p1_draw1 - task.test.p1_draw0).to_numpy()
        return {name: np.sign(score) * answer_moved for name, score in scores.items()}
    return scores


def _encoded_scores(
    encoder: Any, columns: str | Sequence[str], task: Task, y: np.ndarray, *, C: float
) -> Float[np.ndarray, " n"]:
    train = encoder.fit_transform(task.train[columns]).astype(float).toarray()
    test = encoder.transform(task.test[columns]).astype(float).toarray()
    return Logistic(C=C).fit(train, y).decision_function(test)


def _length(rows: pd.DataFrame) -> Float[np.ndarray, "n 1"]:
    return np.log(rows.prompt.str.len().to_numpy(float))[:, None]
