"""The three figures of the front page, derived from stored states by numpy and scikit-learn alone.

Nothing of the package computes here: not its probes, its choice of a layer, nor its statistics.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEAST = {"train": 5, "validation": 2, "test": 4}
"""Rows of either class without which a data set is left out."""


class Figures(NamedTuple):
    """The figures of the front page."""

    layer: int
    """Where the probe agrees most between twins."""
    earliest_layer: int
    """The earliest good one, which the detector reads that has seen honest rows alone."""
    estimate: float
    given_layer: tuple[float, float]
    with_choice: tuple[float, float]
    n: int
    across: list[float]
    """AUROCs from one data set to another."""
    lies_flagged: float
    honest_flagged: float


def stored_states(folder: Path, rows: pd.DataFrame, layers: list[int]) -> np.ndarray:
    """Read the states of rows [layer, n, d] out of the shards of a store."""
    plan = json.loads((folder / "manifest.json").read_text())["plan"]
    order = [row_id for shard in plan for batch in shard for row_id in batch]
    shards = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
    where = pd.Index(order).get_indexer(rows.row_id)
    assert (where >= 0).all()
    stacked = []
    for layer in layers:
        name = f"activation.resid_post.{layer}.0"
        of_layer = np.concatenate([shard[name].double().numpy() for shard in shards])
        stacked.append(of_layer[where])
    return np.stack(stacked)


def fitted_scores(
    train: np.ndarray, y: np.ndarray, others: list[np.ndarray], C: float
) -> list[np.ndarray]:
    """Fit a logistic regression on scaled rows, and score other rows."""
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=200)
    model.fit(scaler.transform(train), y)
    return [model.decision_function(scaler.transform(some)) for some in others]


def tuned_strength(train: np.ndarray, rows: pd.DataFrame) -> float:
    """The strength with the least log-loss in five folds of examples."""
    X, y = StandardScaler().fit_transform(train), rows.label.to_numpy()
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    losses = dict.fromkeys(STRENGTHS, 0.0)
    for seen, unseen in folds.split(X, y, rows.example_id):
        for C in STRENGTHS:
            model = LogisticRegression(C=C, solver="newton-cholesky").fit(X[seen], y[seen])
            p = model.predict_proba(X[unseen])[:, 1]
            losses[C] += log_loss(y[unseen], p, labels=[0, 1], normalize=False)
    return min(losses, key=losses.get)


def resampled(scores: np.ndarray, rows: pd.DataFrame, n_boot: int, seed: int) -> np.ndarray:
    """The AUROC in each resample of examples."""
    examples, example_of_row = np.unique(rows.example_id, return_inverse=True)
    n = len(examples)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_boot)
    weights = counts[:, example_of_row].astype(float)
    ones, zeros = rows.label.to_numpy() == 1, rows.label.to_numpy() == 0
    difference = scores[ones][:, None] - scores[zeros]
    ahead = (difference > 0) + 0.5 * (difference == 0)
    in_order = ((weights[:, ones] @ ahead) * weights[:, zeros]).sum(1)
    pairs = weights[:, ones].sum(1) * weights[:, zeros].sum(1)
    return in_order / np.where(pairs > 0, pairs, np.nan)


def earliest_good(scores: np.ndarray, rows: pd.DataFrame) -> int:
    """The earliest layer within one standard error of the best."""
    aurocs = np.array([roc_auc_score(rows.label, of_layer) for of_layer in scores]).round(12)
    draws = np.array([resampled(of_layer, rows, 200, 0) for of_layer in scores])
    best = aurocs.argmax()
    errors = np.nanstd(draws[best] - draws, axis=1)
    return int(np.flatnonzero(aurocs[best] - aurocs <= errors)[0])


def ranks(scores: np.ndarray) -> np.ndarray:
    """The ranks of scores [layer, n] at each layer; equal ones share their mean rank."""
    lower = (scores[:, None, :] < scores[:, :, None]).sum(-1)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    return lower + (equal + 1) / 2


def most_agreeing(aurocs: np.ndarray, honest: np.ndarray, lying: np.ndarray) -> int:
    """The layer near the best where the scores of twins [layer, m] go together most."""
    agreement = np.zeros(len(aurocs))
    for layer, (a, b) in enumerate(zip(ranks(honest), ranks(lying), strict=True)):
        if np.ptp(a) and np.ptp(b):
            agreement[layer] = np.corrcoef(a, b)[0, 1]
    agreement[aurocs < aurocs.max() - 0.03 - 1e-9] = -np.inf
    return int(np.flatnonzero(agreement >= agreement.max() - 1e-9)[0])


class Twins(NamedTuple):
    """Validation rows, the places of honest twins among them, and their twins told to lie."""

    rows: pd.DataFrame
    places: np.ndarray
    lying: pd.DataFrame

    @classmethod
    def of(cls, validation: pd.DataFrame, told_to_lie: pd.DataFrame) -> "Twins":
        """Find the twins of validation rows among rows told to lie."""
        honest = np.flatnonzero(validation.role == "truth")
        place_of = {validation.example_id.iloc[place]: place for place in honest}
        lying = told_to_lie[told_to_lie.example_id.isin(list(place_of))]
        return cls(validation, np.array([place_of[e] for e in lying.example_id]), lying)

    def chosen(self, scores: np.ndarray, lying: np.ndarray) -> int:
        """The layer that all validation rows choose."""
        aurocs = np.array([roc_auc_score(self.rows.label, of_layer) for of_layer in scores])
        return most_agreeing(aurocs, scores[:, self.places], lying)

    def chosen_again(self, scores: np.ndarray, lying: np.ndarray) -> np.ndarray:
        """The layers that 1,000 resamples of the examples choose, whose twins are repeated."""
        aurocs = np.array([resampled(of_layer, self.rows, 1000, 1) for of_layer in scores])
        examples, example_of_row = np.unique(self.rows.example_id, return_inverse=True)
        n = len(examples)
        counts = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), 1000)
        layers = np.full(1000, self.chosen(scores, lying))
        for b in np.flatnonzero(np.isfinite(aurocs).all(axis=0)):
            times = counts[b][example_of_row[self.places]]
            honest = np.repeat(scores[:, self.places], times, axis=1)
            layers[b] = most_agreeing(aurocs[:, b], honest, np.repeat(lying, times, axis=1))
        return layers


def interval(draws: np.ndarray, n_smaller: int) -> tuple[float, float]:
    """Percentiles of resamples; where all are 1, Wilson's interval of "all of them"."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return (n_smaller / (n_smaller + 1.959964**2), 1.0) if low == high == 1 else (low, high)


def interval_with_choice(
    test: np.ndarray, known: pd.DataFrame, chosen: np.ndarray
) -> tuple[float, float]:
    """The interval in which each resample reads the layer that it has chosen."""
    on_test = np.array([resampled(of_layer, known, 1000, 0) for of_layer in test])
    n_smaller = min((known.label == k).sum() for k in (0, 1))
    return interval(on_test[chosen, np.arange(1000)], n_smaller)


def has_enough(rows: pd.DataFrame, split: str) -> bool:
    """Whether there are rows enough of either class."""
    return min((rows.label == k).sum() for k in (0, 1)) >= LEAST[split]


def derive(rows: pd.DataFrame, states: np.ndarray, layers: list[int]) -> Figures:
    """Derive the figures of the front page.

    Parameters
    ----------
    rows
        The readable rows that a probe may be fitted to or tested on, with the model's behaviour.
    states
        Their states [layer, n, d].
    layers
        The numbers of the layers.
    """
    rows = rows.reset_index(drop=True)
    honest = rows.role.isin(["truth", "known"])
    train, validation = (rows[honest & (rows.split == s)] for s in ("train", "validation"))
    test = rows[(rows.role == "lie") & (rows.split == "test")]
    known, told_to_be_honest = (
        test[test.knows],
        rows[(rows.role == "truth") & (rows.split == "test")],
    )
    twins = Twins.of(validation, rows[(rows.role == "lie") & (rows.split == "validation")])
    parts = [validation, known, test, told_to_be_honest, twins.lying]

    of_layers = []
    for X in states:
        fitted_on = X[train.index]
        C = tuned_strength(fitted_on, train)
        others = [X[part.index] for part in parts]
        of_layers.append(fitted_scores(fitted_on, train.label.to_numpy(), others, C))
    on_validation, on_known, on_test, on_honest, on_lying = (
        np.array([scores[i] for scores in of_layers]) for i in range(len(parts))
    )
    chosen = twins.chosen(on_validation, on_lying)
    earliest = earliest_good(on_validation, validation)
    n_smaller = min((known.label == k).sum() for k in (0, 1))

    # The detector that has seen honest rows alone: the same probe at the earliest good layer, and
    # a threshold on right honest answers.
    sign = np.sign(validation.margin.to_numpy())
    against = -on_validation[earliest] * sign
    right = np.sort(against[(sign > 0) == (validation.label == 1)])[::-1]
    threshold = max(0.0, right[int(0.05 * len(right))])
    lies_flagged = (-on_test[earliest] * np.sign(test.margin))[test.lied] > threshold
    is_right = told_to_be_honest.correct.astype(bool)
    honest_flagged = (-on_honest[earliest] * np.sign(told_to_be_honest.margin))[
        is_right
    ] > threshold
    return Figures(
        layer=layers[chosen],
        earliest_layer=layers[earliest],
        estimate=roc_auc_score(known.label, on_known[chosen]),
        given_layer=interval(resampled(on_known[chosen], known, 1000, 0), n_smaller),
        with_choice=interval_with_choice(
            on_known, known, twins.chosen_again(on_validation, on_lying)
        ),
        n=len(known),
        across=across_datasets(train, validation, twins.lying, test, states),
        lies_flagged=float(np.mean(lies_flagged)),
        honest_flagged=float(np.mean(honest_flagged)),
    )


def across_datasets(
    train: pd.DataFrame,
    validation: pd.DataFrame,
    told_to_lie: pd.DataFrame,
    test: pd.DataFrame,
    states: np.ndarray,
) -> list[float]:
    """AUROCs from each data set to each other one, by logistic regressions with C of 0.01."""
    aurocs = []
    for dataset in sorted(train.dataset.unique()):
        of_train, of_validation = (p[p.dataset == dataset] for p in (train, validation))
        if not (has_enough(of_train, "train") and has_enough(of_validation, "validation")):
            continue
        y = of_train.label.to_numpy()
        twins = Twins.of(of_validation, told_to_lie[told_to_lie.dataset == dataset])
        parts = [of_validation.index, test.index, twins.lying.index]
        scores = [fitted_scores(X[of_train.index], y, [X[p] for p in parts], 0.01) for X in states]
        chosen = twins.chosen(*(np.array([s[i] for s in scores]) for i in (0, 2)))
        on_test = pd.Series(scores[chosen][1], index=test.index)
        for other in sorted(test.dataset.unique()):
            of_other = test[test.dataset == other]
            if other != dataset and has_enough(of_other, "test"):
                aurocs.append(roc_auc_score(of_other.label, on_test[of_other.index]))
    return aurocs
