"""Rows and states of which it is known what a probe can find in them."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

ANSWER_LAYER, TRUTH_LAYER = 1, 2


def twins(n: int = 300) -> pd.DataFrame:
    """Rows of `n` examples told to tell the truth and to lie; the model does as it is told."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        label = int(rng.integers(0, 2))
        for role in ("truth", "lie"):
            answer = label if role == "truth" else 1 - label
            rows.append(
                {
                    "row_id": f"{i}{role}",
                    "example_id": f"e{i}",
                    "subject": f"e{i}",
                    "split": ("train", "validation", "test")[i % 3],
                    "role": role,
                    "label": label,
                    "y": label,
                    "answer": answer,
                    "margin": 2.0 * answer - 1,
                    "p1": 0.7 if answer else 0.3,
                    "polarity": 1 if i % 2 else -1,
                    "instruction": role,
                    "family": f"{role} {i % 4}",
                    "template": "t",
                    "dataset": "d",
                    "text": f"text {i}",
                    "prompt": f"{role}: text {i}",
                    "knows": True,
                    "correct": role == "truth",
                    "lied": role == "lie",
                }
            )
    return pd.DataFrame(rows)


def read_from(states: Mapping[str, np.ndarray]) -> Callable[[pd.DataFrame], np.ndarray]:
    """A reader of states that are given by row id."""
    return lambda rows: np.stack([states[row_id] for row_id in rows.row_id])


def one_in_eight(rows: pd.DataFrame) -> np.ndarray:
    """A mask of about one row in eight, drawn at random."""
    return np.random.default_rng(5).random(len(rows)) < 1 / 8


def answer_before_truth(rows: pd.DataFrame) -> dict:
    """States of which an early layer holds the answer, and a late one the truth as clearly."""
    rng = np.random.default_rng(0)
    features = {}
    for layer, column in ((ANSWER_LAYER, "answer"), (TRUTH_LAYER, "label")):
        states = rng.normal(size=(len(rows), 8))
        states[:, 0] += 5 * (rows[column] - 0.5)
        reader = read_from(dict(zip(rows.row_id, states, strict=True)))
        features["activation", "resid_post", layer] = reader
    return features


def states_that_hold_y(
    rows: pd.DataFrame, strength: float, *, width: int = 24, seed: int = 0
) -> Callable[[pd.DataFrame], np.ndarray]:
    """A reader of noise in which the two classes lie `strength` apart along one direction."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width)
    sign = 2 * rows.y.to_numpy()[:, None] - 1
    states = rng.normal(size=(len(rows), width)) + strength * sign * direction
    return read_from(dict(zip(rows.row_id, states, strict=True)))


def answers_with_known(rows: pd.DataFrame) -> pd.DataFrame:
    """Return readable answers of a run: the twins `rows`, and two known rows of each honest row."""
    told = rows.assign(asks=rows.role, readable=True, mass=1.0, wanted=rows.answer)
    told = told.assign(choices=[["no", "yes"]] * len(told))
    honest = told[told.role == "truth"]
    known = [honest.assign(role="known", row_id=honest.row_id + str(k)) for k in (1, 2)]
    return pd.concat([told, *known], ignore_index=True)
