"""Rows and states in which the tests plant what they look for."""

import numpy as np
import pandas as pd

from dlk_utils.evaluation.evaluate import evaluate
from dlk_utils.evaluation.tasks import make_task

TRUTH = "by example, truth rows"
WIDTH = 40
DIRECTION = np.random.default_rng(99).normal(size=WIDTH) / np.sqrt(WIDTH)
"""Where the class shifts the planted states."""

WORDS = ["red", "blue", "green", "stone", "river"]


def make_rows(n: int = 300, seed: int = 0) -> pd.DataFrame:
    """Rows of which nothing tells the class `y`."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame({"example_id": [f"e{i:04}" for i in range(n)]})
    rows["row_id"] = rows.example_id
    rows["role"] = "truth"
    rows["dataset"] = "own"
    rows["split"] = np.resize(["train", "train", "validation", "test", "test"], n)
    rows["y"] = rows["label"] = rng.integers(0, 2, n)
    rows["margin"] = rng.normal(size=n)
    rows["instruction"] = rng.choice(["i1", "i2", "i3"], n)
    rows["template"] = rng.choice(["t1", "t2"], n)
    rows["prompt"] = [" ".join(rng.choice(WORDS, 6)) for _ in range(n)]
    rows["text"] = rows.prompt.str.split().str[:3].str.join(" ")
    return rows


def planted_states(rows: pd.DataFrame, strength: float, seed: int = 0) -> dict[str, np.ndarray]:
    """row_id -> a state that the class shifts by `strength` along `DIRECTION`."""
    rng = np.random.default_rng([seed, 5])
    states = rng.normal(size=(len(rows), WIDTH))
    states += strength * np.outer(rows.y - 0.5, DIRECTION)
    return dict(zip(rows.row_id, states, strict=True))


def features_of(*layers: dict[str, np.ndarray], feature: str = "activation") -> dict:
    """Features of states that are given for each layer by row_id."""
    return {
        (feature, "resid_post", number): lambda rows, of=of: np.stack([of[i] for i in rows.row_id])
        for number, of in enumerate(layers)
    }


def evaluate_planted(
    rows: pd.DataFrame, strengths: tuple[float, ...] = (0.0,), *, regime: str = TRUTH, **options
) -> pd.DataFrame:
    """The table of results for layers that hold the class with these strengths."""
    layers = [planted_states(rows, s, seed) for seed, s in enumerate(strengths)]
    return evaluate(make_task(rows, "truth", regime), features_of(*layers), n_boot=200, **options)


def row_of(table: pd.DataFrame, probe: str, layer: int | None = None) -> pd.Series:
    """The one row of a table of results for a probe or a control."""
    rows = table[table.probe == probe]
    if layer is not None:
        rows = rows[rows.layer == layer]
    assert len(rows) == 1
    return rows.iloc[0]
