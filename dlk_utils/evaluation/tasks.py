"""What a probe is asked to tell from states: targets, regimes, and where the states are read.

A *row* is one prompt. Its *role* says what it is for. A row of role "truth" tells the model to tell
the truth. Its *twin* of role "lie" shows the same example and tells the model to lie. Rows of role
"known" are further truth prompts, which show whether the model knows the answer. The *split*
(train, validation, test) goes by example, so that all rows of one example are in the same split.

A *target* is the class `y` that a probe is to find:

* "truth": is choice 1 right? `y` is the label.
* "lie": was this answer a lie? Among rows told to lie whose answer the model knows.
* "pair": of two passes over one prompt (two dropout draws, for example), which leans more to the
  truth? The features of a row are a *pair* of states, one of each pass.
* `POSITIVE_CONTROL`: which choice is the model about to give?

A *regime* says which role the training and validation rows have, and which the test rows have. A
target in a regime is a `Task`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import expit

from dlk_utils.errors import DataError, TooFewRows
from dlk_utils.extract.store import read_rows
from dlk_utils.models.sites import SITES
from dlk_utils.probes import (
    ALL_STATE_PROBES,
    CONTRAST_PROBES,
    PAIR_PROBES,
    STACK_PROBES,
    STATE_PROBES,
)
from dlk_utils.probes.base import LeastRows
from dlk_utils.questions.ids import require_columns

POSITIVE_CONTROL = "own answer (positive control)"
"""The target that states surely hold, the answer about to be given: a pipeline must find it."""

LYING = "truth rows -> lie rows"
"""The regime that the book is about: fit on honest rows, test on rows told to lie."""

KNOWN = "truth rows -> lie rows, known"
"""The same, tested only on rows whose answer the model knows."""

REGIMES = {
    "by example, truth rows": ("truth", "truth"),
    "by example, lie rows": ("lie", "lie"),
    LYING: ("truth", "lie"),
    KNOWN: ("truth", "lie"),
}
"""Regime -> (role of the training and validation rows, role of the test rows)."""

MIN_FOR_HEADLINE = 20
"""With fewer test rows of either class, a score is shown, but is not a headline."""

MIN_PER_CLASS = {"train": 5, "validation": 2, "test": 4}
"""How many rows of each class a split needs at least.

The five of train are the folds of `Logistic`, in each of which a class has to be seen. Two of
validation are the fewest that order the layers and calibrate scores; four of test are the fewest
whose resamples nearly all hold both classes. `least_rows` adds what the probes of a target need.
"""

HONEST_ROLES = ("truth", "known")
"""Roles of rows that tell the model to tell the truth."""

DENYING_WORDS = ("no", "false", "incorrect", "wrong", "negative")

LEAST_MOVE = 0.01
"""The least change of an answer that the difference of two states is divided by."""

Features = dict[tuple[str, str, int], Callable[[pd.DataFrame], np.ndarray]]
"""(feature, site, layer) -> a function from rows to X [n, d], or [n, 2, d] for pairs of states."""


def truth_rows(answers: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of the target "truth": those with a readable answer.

    Returns
    -------
    DataFrame
        The rows with `y`, which is the label, and with `polarity`: +1 where the affirming word is
        choice 1 and -1 where the denying word is ("no, there is no error").

    Raises
    ------
    DataError
        If `answers` are not rows of `answer_prompts`.
    """
    require_columns(answers, ["readable", "label", "choices"], "answers", "answer_prompts")
    rows = answers[answers.readable].reset_index(drop=True)
    choice_1_denies = [choices[1].lower() in DENYING_WORDS for choices in rows.choices]
    return rows.assign(y=rows.label, polarity=np.where(choice_1_denies, -1, 1))


def pair_rows(rows: pd.DataFrame, folder: Path, *, plain: bool = False) -> pd.DataFrame:
    """Select the rows of the target "pair": those whose answer differs between two passes.

    Parameters
    ----------
    rows : DataFrame
        Rows with `label`, and with `p1` if `plain`.
    folder : Path
        The store. The two passes are its first two draws.
    plain : bool
        Whether the first pass is the clean one, with the probability `p1` of the rows, and the
        second one the moved one of a store of `store_gradients`.

    Returns
    -------
    DataFrame
        The rows with `p1_draw0` and `p1_draw1` (probability of choice 1 in either pass), `move`
        (how far the second pass moved towards the truth) and `y` (1 where `move` is above 0).
    """

    def stored_p1(draw: int) -> Float[np.ndarray, " n"]:
        logprobs = read_rows(folder, rows, f"choice_logprobs.{draw}").astype(float)
        return expit(logprobs[:, 1] - logprobs[:, 0])

    first = rows.p1.to_numpy() if plain else stored_p1(0)
    second = stored_p1(1)
    towards_truth = 2 * rows.label - 1
    move = (second - first) * towards_truth
    pairs = rows.assign(p1_draw0=first, p1_draw1=second, move=move, y=(move > 0).astype(int))
    return pairs[pairs.move != 0].reset_index(drop=True)


def make_targets(
    probe_rows: pd.DataFrame,
    dropout_rows: pd.DataFrame | None = None,
    draws: Path | None = None,
) -> dict[str, pd.DataFrame]:
    """Make the rows of each target, with their class `y`; see the head of this module.

    `probe_rows` are rows of `label_behaviour`; those without a readable answer are in no target.
    `dropout_rows` are those of them that were run with dropout, and `draws` is the store of their
    draws. Without it there is no target "pair".
    """
    truth = truth_rows(probe_rows)
    known_and_told_to_lie = truth[(truth.role == "lie") & truth.knows]
    lie = known_and_told_to_lie.assign(y=known_and_told_to_lie.lied.astype(int))
    targets = {"truth": truth, "lie": lie.reset_index(drop=True)}
    if dropout_rows is not None and draws is not None:
        targets["pair"] = pair_rows(truth[truth.row_id.isin(dropout_rows.row_id)], draws)
    targets[POSITIVE_CONTROL] = truth.assign(y=truth.answer)
    return targets


def memory_features(
    rows: pd.DataFrame,
    states: Mapping[str, np.ndarray],
    *,
    layers: Sequence[int] | None = None,
    feature: str = "activation",
) -> Features:
    """Make the features of states that are in memory.

    Parameters
    ----------
    rows : DataFrame
        The rows of the states, each with its own `row_id`.
    states : mapping
        Site -> array [layer, n, d], or [layer, n, 2, d] for pairs of states, in the order of
        `rows`: what `dlk_utils.activations` returns, for example.
    layers : sequence of int, optional
        The numbers of the layers; by default 0, 1, 2, ...
    feature : str
        The name of the feature: "activation", "gradient", "two draws", "contrast", ...

    Returns
    -------
    Features
        Functions that take any of these rows, in any order.

    Raises
    ------
    DataError
        If two rows share a `row_id`, if the states have another number of rows or layers, or (from
        the functions) for other rows.
    """
    positions = pd.Index(rows.row_id)
    if not positions.is_unique:
        raise DataError("memory_features: expected a different row_id for each row, got some twice")
    numbers = range(len(next(iter(states.values())))) if layers is None else layers
    for site, stack in states.items():
        if stack.shape[:2] != (len(numbers), len(rows)):
            raise DataError(
                f"memory_features: expected states [layer, n, ...] of {len(numbers)} layers "
                f"and {len(rows)} rows at {site}, got {list(stack.shape)}"
            )

    def read(some_rows: pd.DataFrame, X: np.ndarray) -> np.ndarray:
        where = positions.get_indexer(some_rows.row_id)
        if (where < 0).any():
            raise DataError(
                f"memory_features: expected rows whose states are in memory, got "
                f"{(where < 0).sum()} of {len(some_rows)} rows without states"
            )
        return X[where]

    return {
        (feature, site, layer): partial(read, X=X)
        for site, stack in states.items()
        for layer, X in zip(numbers, stack, strict=True)
    }


def state_features(folder: Path, layers: Sequence[int], site: str = "resid_post") -> Features:
    """Read the clean states of a store of `store_gradients` at one site."""
    return _stored_features(folder, {"activation": ["activation"]}, [site], layers)


def pair_features(kind: str, folder: Path, layers: Sequence[int]) -> Features:
    """Read pairs of states [n, 2, d] at `resid_post`.

    Parameters
    ----------
    kind : str
        "two draws": the first two draws of a store. "two draws / move": the same, divided by how
        far the answer moved between them (at least `LEAST_MOVE`). "contrast": the states after
        choice 0 and after choice 1. "counterfactual": the clean pass and the moved one.
    """
    tensor = "after_choice" if kind == "contrast" else "activation"

    def read(rows: pd.DataFrame, layer: int) -> Float[np.ndarray, "n 2 d"]:
        first = read_rows(folder, rows, f"{tensor}.resid_post.{layer}.0")
        second = read_rows(folder, rows, f"{tensor}.resid_post.{layer}.1")
        pairs = np.stack([first, second], axis=1)
        if kind == "two draws / move":
            moved = np.abs(rows.p1_draw1 - rows.p1_draw0).to_numpy()
            return pairs / np.maximum(moved, LEAST_MOVE)[:, None, None]
        return pairs

    return {(kind, "resid_post", layer): partial(read, layer=layer) for layer in layers}


def target_features(target: str, clean: Path, draws: Path, layers: Sequence[int]) -> Features:
    """Choose the features that a target is looked for in.

    The target "pair" has pairs of draws (of the store `draws`), and `POSITIVE_CONTROL` the states
    at `resid_post`. "truth" and "lie" have states, gradients and both side by side at every site
    (of the store `clean`), and "truth" also contrast pairs.
    """
    if target == "pair":
        return pair_features("two draws", draws, layers)
    if target == POSITIVE_CONTROL:
        return state_features(clean, layers)
    kinds = {
        "activation": ["activation"],
        "gradient": ["gradient"],
        "both": ["activation", "gradient"],
    }
    features = _stored_features(clean, kinds, SITES, layers)
    if target == "truth":
        features |= pair_features("contrast", clean, layers)
    return features


def _stored_features(
    folder: Path,
    kinds: Mapping[str, Sequence[str]],
    sites: Sequence[str],
    layers: Sequence[int],
) -> Features:
    """Read stored tensors; `kinds`: feature -> the kinds of tensor that it sets side by side."""

    def read(rows: pd.DataFrame, names: Sequence[str]) -> Float[np.ndarray, "n d"]:
        return np.concatenate([read_rows(folder, rows, name) for name in names], axis=1)

    return {
        (feature, site, layer): partial(
            read, names=[f"{kind}.{site}.{layer}.0" for kind in tensor_kinds]
        )
        for feature, tensor_kinds in kinds.items()
        for site in sites
        for layer in layers
    }


@dataclass(frozen=True)
class Task:
    """The rows of one target in one regime; no example is in two splits. `make_task` makes it.

    The rows have `row_id`, `example_id`, `y` (0 or 1), the columns that the controls read, and for
    the target "pair" those of `pair_rows`.

    Attributes
    ----------
    target, regime : str
        What is asked, and of which rows.
    train, validation, test : DataFrame
        The rows to fit on, to choose the layer on, and to test on.
    twins : DataFrame
        Twins told to lie of validation rows, which help to choose the layer (`choosing_twins`).
        Nothing reads their class.
    """

    target: str
    regime: str
    train: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame
    twins: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def rows(self) -> pd.DataFrame:
        """All rows whose states are read: of train, validation and test, and the twins."""
        parts = [self.train, self.validation, self.test, self.twins]
        return pd.concat([part for part in parts if len(part)], ignore_index=True)

    @property
    def of_pairs(self) -> bool:
        """Whether the features of a row are a pair of states."""
        return self.target == "pair"

    @property
    def goal(self) -> np.ndarray:
        """What a probe learns from the training rows [n]: `y`, or the `move` of pairs."""
        return self.train.move.to_numpy(float) if self.of_pairs else self.train.y.to_numpy()


def regimes_of(target: str) -> list[str]:
    """List the regimes that a target is evaluated in."""
    if target == "truth":
        return list(REGIMES)
    if target == "lie":
        # only rows told to lie can be lies
        return ["by example, lie rows"]
    if target == "pair":
        # of the rows told to lie, only test rows are run with dropout
        return ["by example, truth rows", LYING]
    return [regime for regime in REGIMES if regime != KNOWN]


def select_rows(rows: pd.DataFrame, role: str, split: str) -> pd.DataFrame:
    """Select the rows of a role and a split; the role "truth" stands for all `HONEST_ROLES`."""
    roles = HONEST_ROLES if role == "truth" else (role,)
    return rows[rows.role.isin(roles) & (rows.split == split)].reset_index(drop=True)


def choosing_twins(rows: pd.DataFrame, target: str, fit_role: str) -> pd.DataFrame:
    """Select the twins told to lie of validation rows, for probes whose layer they help to choose.

    Those are the probes of truth that are fitted on honest rows. On such rows the truth and the
    answer about to be given are nearly the same, so that their scores alone do not tell which of
    the two a layer holds. What is true stays the same between twins, and the answer does not
    (`selection.choose_by_twins`). Of any other target or `fit_role`, no rows are returned.
    """
    twins = select_rows(rows, "lie", "validation")
    return twins if target == "truth" and fit_role == "truth" else twins.head(0)


def make_task(rows: pd.DataFrame, target: str, regime: str) -> Task:
    """Split the rows of a target according to a regime of `REGIMES`.

    The rows have `row_id`, `example_id`, `role`, `split` and `y`; for the regime `KNOWN` also
    `knows`.

    Raises
    ------
    TooFewRows
        If a split has too few rows of a class.
    DataError
        If an example is in two splits.
    """
    fit_role, test_role = REGIMES[regime]
    test = select_rows(rows, test_role, "test")
    if regime == KNOWN:
        test = test[test.knows].reset_index(drop=True)
    parts = {
        "train": select_rows(rows, fit_role, "train"),
        "validation": select_rows(rows, fit_role, "validation"),
        "test": test,
    }
    examples = pd.concat([part.example_id.drop_duplicates() for part in parts.values()])
    if not examples.is_unique:
        raise DataError(
            f"{target}, {regime}: expected each example in one split, got "
            f"{examples[examples.duplicated()].iloc[0]} in two"
        )
    require_rows(parts, f"{target}, {regime}", least=least_rows(target))
    return Task(target, regime, **parts, twins=choosing_twins(rows, target, fit_role))


def least_rows(target: str) -> dict[str, LeastRows]:
    """Tell how many rows each split of a target needs, so that every probe of it can be fitted."""
    if target == "pair":
        probes = PAIR_PROBES
    elif target == POSITIVE_CONTROL:
        probes = STATE_PROBES
    else:
        probes = {**ALL_STATE_PROBES, **STACK_PROBES, **CONTRAST_PROBES}
    needs = [make_probe().least_rows for make_probe in probes.values()]
    least = {split: LeastRows(n, 2 * n) for split, n in MIN_PER_CLASS.items()}
    least["train"] = LeastRows(
        per_class=max(least["train"].per_class, *(need.per_class for need in needs)),
        in_all=max(least["train"].in_all, *(need.in_all for need in needs)),
    )
    return least


@dataclass(frozen=True)
class Shortage:
    """A split with too few rows: what it has, and what it needs.

    Attributes
    ----------
    split : str
        Its name.
    counts : dict
        Class -> number of rows.
    least : LeastRows
        What it needs.
    """

    split: str
    counts: dict[Any, int]
    least: LeastRows

    @property
    def per_class(self) -> dict[Any, int]:
        """Class -> how many rows of it are missing."""
        missing = {k: max(0, self.least.per_class - n) for k, n in self.counts.items()}
        n_rows = sum(self.counts.values()) + sum(missing.values())
        for _ in range(self.least.in_all - n_rows):
            # A row that may be of any class is asked of the one that has the fewest.
            fewest = min(self.counts, key=lambda k: self.counts[k] + missing[k])
            missing[fewest] += 1
        return missing

    @property
    def in_words(self) -> str:
        """Say what is missing, such as "train: 2 more rows of class 0 (it has 3 and 9 ...)"."""
        missing = [f"{n} more of class {k}" for k, n in self.per_class.items() if n]
        has = " and ".join(map(str, self.counts.values()))
        classes = " and ".join(map(str, self.counts))
        return f"{self.split}: {', '.join(missing)} (it has {has} rows of class {classes})"


def shortages(
    parts: Mapping[str, pd.DataFrame],
    *,
    least: Mapping[str, LeastRows | int] = MIN_PER_CLASS,
    column: str = "y",
    classes: Sequence[Any] = (0, 1),
) -> list[Shortage]:
    """List the splits that have too few rows; the arguments are those of `require_rows`."""
    found = []
    for split, rows in parts.items():
        need = least[split]
        need = need if isinstance(need, LeastRows) else LeastRows(need, need * len(classes))
        counts = {k: int((rows[column] == k).sum()) for k in classes}
        if min(counts.values()) < need.per_class or sum(counts.values()) < need.in_all:
            found.append(Shortage(split, counts, need))
    return found


def require_rows(
    parts: Mapping[str, pd.DataFrame],
    what: str,
    *,
    least: Mapping[str, LeastRows | int] = MIN_PER_CLASS,
    column: str = "y",
    classes: Sequence[Any] = (0, 1),
) -> None:
    """Raise `TooFewRows` if a split has too few rows of a class to fit or score a probe on.

    `parts` has the rows of each split, with their class in `column`; `least` says how many rows a
    split needs, a number being that of each of the `classes`. The message is one sentence and
    begins with `what`.
    """
    if not shortages(parts, least=least, column=column, classes=classes):
        return
    needs = {split: least[split] for split in parts}
    per_class = {s: n.per_class if isinstance(n, LeastRows) else n for s, n in needs.items()}
    needed = ", ".join(f"{n} in {split}" for split, n in per_class.items())
    found = []
    for split, rows in parts.items():
        counts = [str(int((rows[column] == k).sum())) for k in classes]
        found.append(f"{' and '.join(counts)} in {split}")
    in_all = [
        f", and {n.in_all} rows in all in {split}"
        for split, n in needs.items()
        if isinstance(n, LeastRows) and n.in_all > n.per_class * len(classes)
    ]
    absent = [k for k in classes if not any((rows[column] == k).any() for rows in parts.values())]
    advice = "ask for more examples (n_examples), or add rows to your own file."
    if absent:
        # The answers or the labels of the data are the reason, not how many rows there are.
        advice = f"no split has a row of class {' or '.join(map(str, absent))}."
    raise TooFewRows(
        f"{what}: expected rows of each class, at least {needed}{''.join(in_all)}, got "
        f"{', '.join(found)} (of class {' and '.join(map(str, classes))}); {advice}"
    )
