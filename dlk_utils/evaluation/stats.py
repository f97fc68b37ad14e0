"""Scores of scores: pure functions of arrays, nothing is kept between calls."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression


def auroc(scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"]) -> float:
    """Signed AUROC: the share of (1, 0) pairs in which the 1 scores higher, ties half. Never flipped."""
    return float(weighted_auroc(scores, y, np.ones((1, len(y))))[0])


def weighted_auroc(
    scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, " b"]:
    """The same for each of `b` weightings of the rows (resamples, say); nan where a class has no weight."""
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(
        np.r_[True, np.diff(scores[order]) != 0]
    )  # where each run of equal scores begins
    one, zero = (
        np.add.reduceat(weights[:, order] * (y[order] == k), first, axis=1) for k in (1, 0)
    )
    below = np.cumsum(zero, 1) - zero / 2
    total = one.sum(1) * zero.sum(1)
    return (one * below).sum(1) / np.where(total > 0, total, np.nan)


def bootstrap_weights(
    groups: Sequence[str] | pd.Series, n_boot: int, seed: int
) -> Float[np.ndarray, "b n"]:
    """How often each row is drawn when whole groups are resampled with replacement."""
    names, index = np.unique(groups, return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), n_boot
    )
    return counts[:, index].astype(float)


def auroc_interval(
    scores: Float[np.ndarray, " n"],
    y: Int[np.ndarray, " n"],
    groups: Sequence[str] | pd.Series,
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of the signed AUROC, resampling groups (examples) whole; resamples without one of the classes do not count."""
    low, high = np.nanpercentile(
        weighted_auroc(scores, y, bootstrap_weights(groups, n_boot, seed)), [2.5, 97.5]
    )
    return float(low), float(high)


def earliest_good_layer(
    scores: Float[np.ndarray, "b n"],
    y: Int[np.ndarray, " n"],
    groups: Sequence[str] | pd.Series,
    *,
    n_boot: int = 200,
    seed: int = 0,
) -> int:
    """Which of `b` layers, in order, to take: the earliest_good_layer whose AUROC is at most one standard error below the best one's: the error of the difference, paired by resample of whole groups.

    Where the answer that is about to be said is right, a late layer scores by holding that answer, as high as one that holds what is believed, or higher; the earliest_good_layer that is as good is the least likely to.
    Source: the one-standard-error rule, Breiman et al., *Classification and regression trees*, 1984.
    """
    found = np.array([auroc(s, y) for s in scores])
    best = int(found.argmax())
    weights = bootstrap_weights(groups, n_boot, seed)
    boots = np.array([weighted_auroc(s, y, weights) for s in scores])
    return int(np.flatnonzero(found[best] - found <= np.nanstd(boots[best] - boots, axis=1))[0])


def balanced_accuracy(scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"]) -> float:
    """Mean over the classes of the share that lies on its side of 0, the threshold that was fixed on train."""
    return float(np.mean([np.mean((scores[y == k] > 0) == k) for k in (0, 1)]))


def recall_at(
    scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], false_positives: float
) -> float:
    """The largest share of class 1 above a threshold that at most this share of class 0 passes; no interpolation, ties count against it."""
    zero = np.sort(scores[y == 0])[::-1]
    allowed = int(np.floor(false_positives * len(zero)))
    return float(np.mean(scores[y == 1] > (zero[allowed] if allowed < len(zero) else -np.inf)))


def calibrated(
    scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], new: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " m"]:
    """Probabilities of class 1 for new scores, by Platt's logistic curve fitted on rows that are not the new ones."""
    unit = np.std(scores) + 1e-12
    return (
        LogisticRegression(C=1e3)
        .fit(scores[:, None] / unit, y)
        .predict_proba(new[:, None] / unit)[:, 1]
    )


def brier(p: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"]) -> float:
    """Mean squared difference of probability and outcome."""
    return float(np.mean((p - y) ** 2))


def calibration_error(
    p: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], bins: int = 10
) -> float:
    """ECE: mean over rows of |mean outcome - mean probability| of the row's bin, bins of equal width."""
    index = np.minimum((p * bins).astype(int), bins - 1)
    return float(
        sum(
            abs(y[index == k].mean() - p[index == k].mean()) * np.mean(index == k)
            for k in np.unique(index)
        )
    )


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion."""
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return interval.low, interval.high


def mean_interval(
    x: Float[np.ndarray, " n"],
    groups: np.ndarray,
    n_boot: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling groups (examples) whole.

    Groups that are all alike show no spread, though a few of them say little: then the interval goes as far as the mean of values within `bounds` can, if as many groups were otherwise as Wilson's interval
    of "all of them" leaves room for.
    """
    _, index = np.unique(groups, return_inverse=True)
    total, size = np.bincount(index, x), np.bincount(index)
    if np.ptp(total / size) < 1e-12:
        mean, unseen = float(x.mean()), 1 - wilson_interval(len(size), len(size))[0]
        return mean - unseen * max(mean - bounds[0], 0), mean + unseen * max(bounds[1] - mean, 0)
    weights = np.random.default_rng(seed).multinomial(
        len(size), np.full(len(size), 1 / len(size)), n_boot
    )
    low, high = np.percentile((weights @ total) / (weights @ size), [2.5, 97.5])
    return float(low), float(high)
