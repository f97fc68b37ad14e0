"""What is asked of the states: the rows and the classes of each target, and where its features are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.special

from dlk_utils.errors import TooFewRows
from dlk_utils.extract.store import read_rows
from dlk_utils.models.sites import SITES

POSITIVE_CONTROL = "own answer (positive control)"
"""A target that the states surely hold, what the model is about to say: a pipeline that misses it would miss anything."""


HONEST = ("truth", "known")
"""Roles of rows that are told the truth: the twins, and those that ask what the model knows."""


DENYING = ("no", "false", "incorrect", "wrong", "negative")


Features = dict[tuple[str, str, int], Callable[[pd.DataFrame], np.ndarray]]
"""(feature, site, layer) -> a function from rows to X [n, d], or [n, 2, d] for pairs."""


def pair_rows(rows: pd.DataFrame, folders: Sequence[Path], *, plain: bool = False) -> pd.DataFrame:
    """Rows with `p1_draw0`, `p1_draw1` (the probability of choice 1 under each of two passes) and `move`, how far the second moved towards the truth.

    The passes are the first two draws of one folder; with `plain`, the clean pass and the second pass of the last folder.
    `y` is 1 where the answer moved towards the truth; a row whose answer did not move at all is left out.
    """
    logp = [
        read_rows(folders[-1], rows, f"choice_logprobs.{k}").astype(float)
        for k in ((1,) if plain else (0, 1))
    ]
    p1 = [
        *([rows.p1.to_numpy()] if plain else []),
        *(scipy.special.expit(x[:, 1] - x[:, 0]) for x in logp),
    ]
    move = (p1[1] - p1[0]) * (2 * rows.label - 1)
    return rows.assign(p1_draw0=p1[0], p1_draw1=p1[1], move=move, y=(move > 0).astype(int))[
        lambda t: t.move != 0
    ].reset_index(drop=True)


def select_rows(rows: pd.DataFrame, role: str, split: str) -> pd.DataFrame:
    """The rows of a split told the truth (`role` "truth": twins and further ones alike), or to lie."""
    return rows[
        rows.role.isin(HONEST if role == "truth" else (role,)) & (rows.split == split)
    ].reset_index(drop=True)


def truth_rows(asked: pd.DataFrame) -> pd.DataFrame:
    """Rows with a readable answer; `y` is the label, `polarity` +1 where the affirming word says label 1 and -1 where the denying one does ("no, there is no error")."""
    rows = asked[asked.readable].reset_index(drop=True)
    return rows.assign(
        y=rows.label, polarity=[-1 if c[1].lower() in DENYING else 1 for c in rows.choices]
    )


def make_targets(asked: pd.DataFrame, drawn: pd.DataFrame, draws: Path) -> dict[str, pd.DataFrame]:
    """The rows of each target, with their class `y`; rows without a readable answer have none.

    truth: y = label. lie: y = lied, among rows told to lie whose answer is known. pair: see `pair_rows`, of the rows `drawn`.
    """
    rows = truth_rows(asked)
    told = rows[(rows.role == "lie") & rows.knows]
    return {
        "truth": rows,
        "lie": told.assign(y=told.lied.astype(int)).reset_index(drop=True),
        "pair": pair_rows(rows[rows.row_id.isin(drawn.row_id)], [draws]),
        POSITIVE_CONTROL: rows.assign(y=rows.answer),
    }


def state_features(clean: Path, layers: Sequence[int], site: str = "resid_post") -> Features:
    """Clean states at one site."""
    return {
        ("activation", site, layer): _reader(
            clean, [f"activation.{site}.{layer}.0"], np.concatenate
        )
        for layer in layers
    }


def pair_features(kind: str, folders: Sequence[Path] | Path, layers: Sequence[int]) -> Features:
    """X [n, 2, d]: two draws or two choices of one folder, or the clean pass and the second pass of two folders. "two draws / move": divided by how far the answer moved (|p1_draw1 - p1_draw0|, at least 0.01)."""
    first, last = (folders, folders) if isinstance(folders, Path) else (folders[0], folders[-1])
    stored = "after_choice" if kind == "contrast" else "activation"

    def read(rows: pd.DataFrame, layer: int) -> np.ndarray:
        X = np.stack(
            [
                read_rows(folder, rows, f"{stored}.resid_post.{layer}.{k}")
                for k, folder in enumerate((first, last))
            ],
            axis=1,
        )
        return (
            X / np.maximum(np.abs(rows.p1_draw1 - rows.p1_draw0), 0.01).to_numpy()[:, None, None]
            if kind == "two draws / move"
            else X
        )

    return {(kind, "resid_post", layer): partial(read, layer=layer) for layer in layers}


def target_features(target: str, clean: Path, draws: Path, layers: Sequence[int]) -> Features:
    """Where a target's features are read from: the clean states, gradients and contrast pairs (of `clean`), or pairs of draws."""
    if target == "pair":
        return pair_features("two draws", draws, layers)
    kinds = {"activation": ["activation"]}
    if target != POSITIVE_CONTROL:
        kinds |= {"gradient": ["gradient"], "both": ["activation", "gradient"]}
    sites = SITES if target != POSITIVE_CONTROL else ("resid_post",)
    found = {
        (name, site, layer): _reader(
            clean, [f"{kind}.{site}.{layer}.0" for kind in k], np.concatenate
        )
        for name, k in kinds.items()
        for site in sites
        for layer in layers
    }
    return found | (pair_features("contrast", clean, layers) if target == "truth" else {})


def _reader(folder: Path, names: list[str], join: Callable) -> Callable[[pd.DataFrame], np.ndarray]:
    return lambda rows: join([read_rows(folder, rows, name) for name in names], axis=1)


LYING, KNOWN = "truth rows -> lie rows", "truth rows -> lie rows, known"


REGIMES = {
    "by example, truth rows": ("truth", "truth"),
    "by example, lie rows": ("lie", "lie"),
    LYING: ("truth", "lie"),
    KNOWN: ("truth", "lie"),
}
"""name -> (role of the rows trained on and selected on, role of the rows tested on); the examples never overlap. `KNOWN` tests only rows whose answer the model knows."""


MIN_PER_CLASS = {"train": 5, "validation": 2, "test": 4}


@dataclass(frozen=True)
class Task:
    """Rows of one target in one regime, split by example."""

    target: str
    regime: str
    train: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame
    """Rows with `row_id`, `example_id`, `y` (0 or 1), and the columns that the controls read."""


def make_task(rows: pd.DataFrame, target: str, regime: str) -> Task:
    """The rows of a target (`rows` has a column `y`) in a regime. Raises `TooFewRows`; asserts that no example is on two sides."""
    fit_role, test_role = REGIMES[regime]
    parts = {
        "train": select_rows(rows, fit_role, "train"),
        "validation": select_rows(rows, fit_role, "validation"),
        "test": select_rows(rows[rows.knows] if regime == KNOWN else rows, test_role, "test"),
    }
    ids = [set(p.example_id) for p in parts.values()]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2]), (
        "an example straddles the split"
    )
    counts = {k: (int((p.y == 0).sum()), int((p.y == 1).sum())) for k, p in parts.items()}
    if any(min(counts[k]) < MIN_PER_CLASS[k] for k in parts):
        raise TooFewRows(
            f"{target}, {regime}: rows of class (0, 1) are {counts}; each class needs at least {MIN_PER_CLASS}"
        )
    return Task(target, regime, **parts)


def too_few(rows: pd.DataFrame, split: str) -> bool:
    """Whether a class has fewer rows than `MIN_PER_CLASS` says for the split."""
    return rows.y.nunique() < 2 or bool(rows.y.value_counts().min() < MIN_PER_CLASS[split])
