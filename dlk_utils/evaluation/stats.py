"""Scores of predictions, with intervals that resample examples: pure functions of arrays."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import binomtest, norm
from sklearn.linear_model import LogisticRegression

from dlk_utils.errors import DataError, TooFewRows

Groups = Sequence[str] | pd.Series | np.ndarray
"""The example of each row: rows of one example are drawn together."""


def auroc(
    scores: Float[np.ndarray, " n"] | Sequence[float], y: Int[np.ndarray, " n"] | Sequence[int]
) -> float:
    """Compute the signed AUROC: the share of (1, 0) pairs in which the 1 scores higher.

    Equal scores count half, and a value under one half is never flipped; it is nan if a class is
    missing, or a score is nan. This is scikit-learn's `roc_auc_score` in exact arithmetic: AUROCs
    that are equal compare as equal, so that no choice of a layer depends on rounding.

    Raises
    ------
    DataError
        If there is not one label, 0 or 1, for each score. Scikit-learn has the labels first.
    """
    scores, y = np.asarray(scores), np.asarray(y)
    if scores.ndim != 1 or scores.shape != y.shape or scores.dtype.kind not in "biuf":
        raise DataError(
            "auroc: expected scores [n] that are numbers, and labels [n], got the shapes "
            f"{list(scores.shape)} ({scores.dtype}) and {list(y.shape)}"
        )
    if y.dtype.kind in "SU" or not ((y == 0) | (y == 1)).all():
        some = ", ".join(map(str, np.unique(y.astype(str))[:4]))
        raise DataError(
            f"auroc: expected labels 0 and 1 as y, got {some} among {len(y)} values; call it as "
            "auroc(scores, y)"
        )
    if scores.dtype.kind != "f":
        scores = scores.astype(float)
    return float(weighted_auroc(scores, (y == 1).astype(int), np.ones((1, len(y))))[0])


def smaller_class(y: Int[np.ndarray, " n"]) -> int:
    """Count the rows of the class (0 or 1) that has fewer of them."""
    n_ones = int(np.sum(y == 1))
    return min(n_ones, len(y) - n_ones)


def weighted_auroc(
    scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, " b"]:
    """Compute the signed AUROC under each of `b` weightings of the rows [b], all at once.

    `weights` says how often each row counts, as `bootstrap_weights` gives it. The AUROC is nan
    where a class has no weight. See `auroc`.
    """
    if np.isnan(scores).any():
        # Sorting would take them for the highest scores.
        return np.full(len(weights), np.nan)
    ones, zeros = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    zeros = zeros[np.argsort(scores[zeros])]
    # weights by row first, so that those of a row lie side by side in memory
    by_row = np.ascontiguousarray(weights.T)
    weight_of_ones, weight_of_zeros = by_row[ones], by_row[zeros]
    # the weight of the first k zeros, from the lowest score on, for k = 0, 1, ...
    below = np.concatenate([np.zeros((1, len(weights))), np.cumsum(weight_of_zeros, axis=0)])
    n_lower = np.searchsorted(scores[zeros], scores[ones], side="left")
    n_lower_or_equal = np.searchsorted(scores[zeros], scores[ones], side="right")
    zeros_below = (below[n_lower] + below[n_lower_or_equal]) / 2
    pairs = weight_of_ones.sum(axis=0) * below[-1]
    in_order = (weight_of_ones * zeros_below).sum(axis=0)
    return in_order / np.where(pairs > 0, pairs, np.nan)


def bootstrap_weights(groups: Groups, n_boot: int, seed: int) -> Float[np.ndarray, "b n"]:
    """Count how often each row is drawn when groups are resampled with replacement.

    `groups` [n] has the group of each row: its example. The counts are [n_boot, n]; rows of a group
    have the same.
    """
    names, group_of_row = np.unique(groups, return_inverse=True)
    n_groups = len(names)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), n_boot)
    return counts[:, group_of_row].astype(float)


def percentile_interval(estimates: Float[np.ndarray, " b"]) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile of bootstrap estimates; nan does not count."""
    low, high = np.nanpercentile(estimates, [2.5, 97.5])
    return float(low), float(high)


def auroc_interval(
    scores: Float[np.ndarray, " n"],
    y: Int[np.ndarray, " n"],
    groups: Groups,
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval (low, high) of the signed AUROC, resampling groups.

    Resamples without one of the classes do not count. See `auroc`, `bootstrap_weights` and
    `interval_of_aurocs`.
    """
    resampled = weighted_auroc(scores, y, bootstrap_weights(groups, n_boot, seed))
    return interval_of_aurocs(resampled, y, groups)


def interval_of_aurocs(
    resampled: Float[np.ndarray, " b"], y: Int[np.ndarray, " n"], groups: Groups
) -> tuple[float, float]:
    """Compute the 95 % interval (low, high) of an AUROC from its resamples [b].

    Where the scores separate the classes without exception, every resample is 1 (or 0), however few
    rows there are. The interval then ends where Wilson's interval of "all of them" does, for as
    many trials as the smaller class has groups: 0.92 for 41 of 41.
    """
    low, high = percentile_interval(resampled)
    if low == high and low in (0.0, 1.0):
        groups = np.asarray(groups)
        n_groups = min(len(np.unique(groups[y == k])) for k in (0, 1))
        unseen = 1 - wilson_interval(n_groups, n_groups)[0]
        return (1 - unseen, 1.0) if low == 1 else (0.0, unseen)
    return low, high


def visible_auroc(n: int, n_smaller: int) -> float:
    """Return the AUROC that a test of so many rows finds to be above chance four times out of five.

    Parameters
    ----------
    n, n_smaller : int
        Number of test rows, and of those of the smaller class.

    Returns
    -------
    float
        Chance plus 2.8 standard errors (1.96 for the two-sided 95 % level, 0.84 for the power) of
        an AUROC of one half; at most 1, and nan if a class is missing.

    References
    ----------
    The standard error is that of Mann and Whitney's U without ties, *Annals of Mathematical
    Statistics* 18, 1947.
    """
    n_pairs = n_smaller * (n - n_smaller)
    if n_pairs == 0:
        return float("nan")
    standard_error = np.sqrt((n + 1) / (12 * n_pairs))
    z = norm.ppf(0.975) + norm.ppf(0.8)
    return float(min(1.0, 0.5 + z * standard_error))


def mean_interval(
    x: Float[np.ndarray, " n"],
    groups: Groups,
    n_boot: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval (low, high) of the mean of x [n], resampling groups.

    Where all groups have the same mean, resampling would show no spread, however few they are. The
    interval is then as wide as Wilson's interval of "all of them": it goes as far as the mean would
    if the groups that this interval leaves room for lay at the `bounds` of possible values.
    """
    group_means = pd.Series(x).groupby(np.asarray(groups)).mean()
    if group_means.max() - group_means.min() < 1e-12:
        mean, n_groups = float(np.mean(x)), len(group_means)
        unseen = 1 - wilson_interval(n_groups, n_groups)[0]
        least, greatest = bounds
        low = mean - unseen * max(mean - least, 0)
        high = mean + unseen * max(greatest - mean, 0)
        return low, high
    weights = bootstrap_weights(groups, n_boot, seed)
    return percentile_interval((weights @ x) / weights.sum(axis=1))


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """Compute the 95 % Wilson interval of a proportion, `k` of `n`."""
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return interval.low, interval.high


def earliest_good_layer(
    scores: Float[np.ndarray, "layer n"],
    y: Int[np.ndarray, " n"],
    groups: Groups,
    *,
    n_boot: int = 200,
    seed: int = 0,
) -> int:
    """Choose the earliest layer whose AUROC is within one standard error of the best one's.

    The standard error is that of the difference from the best layer, paired by resample of groups.
    On honest rows a late layer can score high because it holds the answer that the model is about
    to give. Among layers that are equally good, the earliest is the least likely to read that
    answer.

    Parameters
    ----------
    scores : array [layer, n]
        Scores of the validation rows at each layer, in order of depth.
    y, groups : array [n]
        Class and example of each row.

    Returns
    -------
    int
        The index of the layer in `scores`.

    Raises
    ------
    TooFewRows
        If the rows are of one class only.

    References
    ----------
    The one-standard-error rule: Breiman et al., *Classification and Regression Trees*, 1984.
    """
    weights = bootstrap_weights(groups, n_boot, seed)
    estimates = np.array([auroc(s, y) for s in scores])
    require_finite_aurocs(estimates, y)
    resampled = np.array([weighted_auroc(s, y, weights) for s in scores])
    best = int(estimates.argmax())
    shortfall = estimates[best] - estimates
    standard_error = np.nanstd(resampled[best] - resampled, axis=1)
    return int(np.flatnonzero(shortfall <= standard_error)[0])


def require_finite_aurocs(estimates: Float[np.ndarray, " layer"], y: Int[np.ndarray, " n"]) -> None:
    """Raise `TooFewRows` if the layers have no AUROCs to choose by, as `y` lacks a class."""
    if not np.isfinite(estimates).all():
        n_ones = int(np.sum(y == 1))
        raise TooFewRows(
            "choice of a layer: expected validation rows of both classes, got "
            f"{len(y) - n_ones} of class 0 and {n_ones} of class 1; ask for more examples "
            "(n_examples), or add rows to your own file."
        )


def layers_in_resamples(
    scores: Float[np.ndarray, "layer n"],
    y: Int[np.ndarray, " n"],
    groups: Groups,
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> Int[np.ndarray, " b"]:
    """Choose a layer as `earliest_good_layer` does, anew in each of `n_boot` resamples of groups.

    It shows how much the choice hangs on the rows that happened to be in validation. The standard
    errors are those of all rows. A resample without one of the classes chooses the layer that all
    rows choose.

    Returns
    -------
    array [b]
        Indices of layers in `scores`.

    Raises
    ------
    TooFewRows
        If the rows are of one class only.

    References
    ----------
    Efron, Estimation and accuracy after model selection, *Journal of the American Statistical
    Association* 109, 2014.
    """
    layer_of_all_rows = earliest_good_layer(scores, y, groups)
    weights = bootstrap_weights(groups, n_boot, seed)
    resampled = np.array([weighted_auroc(s, y, weights) for s in scores])
    has_both = np.isfinite(resampled).all(axis=0)
    complete = resampled[:, has_both]
    standard_errors = np.std(complete[:, None] - complete[None], axis=2)
    best = complete.argmax(axis=0)
    shortfall = complete.max(axis=0) - complete
    is_good = shortfall <= standard_errors[best].T
    layers = np.full(n_boot, layer_of_all_rows)
    layers[has_both] = is_good.argmax(axis=0)
    return layers


def twin_agreement(
    first: Float[np.ndarray, "layer n"], second: Float[np.ndarray, "layer n"]
) -> Float[np.ndarray, " layer"]:
    """Correlate the scores of twins at each layer, by Spearman's rank correlation [layer].

    Parameters
    ----------
    first, second : array [layer, n]
        The scores of n prompts, and those of their twins in the same order.

    Returns
    -------
    array [layer]
        From -1 (the order of the scores turns round between twins) to 1 (it stays). 0 where all
        scores are equal.
    """
    return weighted_agreement(first, second, np.ones((1, first.shape[1])))[:, 0]


def weighted_agreement(
    first: Float[np.ndarray, "layer n"],
    second: Float[np.ndarray, "layer n"],
    weights: Float[np.ndarray, "b n"],
) -> Float[np.ndarray, "layer b"]:
    """Compute `twin_agreement` under each of `b` weightings of the twins, all at once.

    `weights` says how often each pair of twins counts, as `bootstrap_weights` gives it.
    """
    n_twins = weights.sum(axis=1, keepdims=True)
    agreement = np.zeros((len(first), len(weights)))
    for layer, scores in enumerate(zip(first, second, strict=True)):
        # The mean rank of n rows is (n + 1) / 2, however often each of them counts.
        a, b = (_weighted_ranks(some, weights) - (n_twins + 1) / 2 for some in scores)
        covariance = (weights * a * b).sum(axis=1)
        variances = (weights * a**2).sum(axis=1) * (weights * b**2).sum(axis=1)
        # Variances are multiples of 1/4 unless they are 0.
        varies = variances > 1e-6
        agreement[layer, varies] = covariance[varies] / np.sqrt(variances[varies])
    return agreement


def _weighted_ranks(
    scores: Float[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, "b n"]:
    """The ranks of rows that count several times; equal scores share their mean rank."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    first_of_value = np.cumsum(counts) - counts
    of_value = np.add.reduceat(weights[:, np.argsort(scores)], first_of_value, axis=1)
    up_to = np.cumsum(of_value, axis=1)
    return (up_to - (of_value - 1) / 2)[:, place]


def most_agreeing_layer(
    aurocs: Float[np.ndarray, " layer"], agreement: Float[np.ndarray, " layer"], *, within: float
) -> int:
    """Choose, among layers whose AUROC is `within` so much of the best, the one that agrees most.

    Of layers that agree equally, the earliest is chosen. Returns its index.
    """
    return int(_most_agreeing_layers(aurocs[:, None], agreement[:, None], within)[0])


def _most_agreeing_layers(
    aurocs: Float[np.ndarray, "layer b"], agreement: Float[np.ndarray, "layer b"], within: float
) -> Int[np.ndarray, " b"]:
    # A little is added for rounding: 0.97 is within 0.03 of 1.
    is_good = aurocs >= aurocs.max(axis=0) - within - 1e-9
    of_good = np.where(is_good, agreement, -np.inf)
    return (of_good >= of_good.max(axis=0) - 1e-9).argmax(axis=0)


def agreeing_layers_in_resamples(
    scores: Float[np.ndarray, "layer n"],
    y: Int[np.ndarray, " n"],
    groups: Groups,
    twins: tuple[Float[np.ndarray, "layer m"], Float[np.ndarray, "layer m"]],
    twin_groups: Groups,
    *,
    within: float,
    n_boot: int = 1000,
    seed: int = 0,
) -> Int[np.ndarray, " b"]:
    """Choose a layer by the agreement of twins, anew in each of `n_boot` resamples of groups.

    A group that is drawn brings its validation rows and its twins with it. A resample without one
    of the classes chooses the layer that all rows choose. See `layers_in_resamples`.

    Parameters
    ----------
    scores, y, groups : array [layer, n], [n], [n]
        Scores, class and example of the validation rows.
    twins : tuple of array [layer, m]
        Scores of the honest twins, and of their twins told to lie in the same order.
    twin_groups : array [m]
        Their examples.
    within : float
        How far below the best AUROC a layer may lie (`most_agreeing_layer`).

    Returns
    -------
    array [b]
        Indices of layers in `scores`.
    """
    all_groups = np.concatenate([np.asarray(groups), np.asarray(twin_groups)])
    weights = bootstrap_weights(all_groups, n_boot, seed)
    of_rows, of_twins = np.split(weights, [len(y)], axis=1)
    aurocs = np.array([weighted_auroc(s, y, of_rows) for s in scores])
    agreement = weighted_agreement(*twins, of_twins)
    has_both = np.isfinite(aurocs).all(axis=0)
    of_all_rows = np.array([auroc(s, y) for s in scores])
    layers = np.full(
        n_boot, most_agreeing_layer(of_all_rows, twin_agreement(*twins), within=within)
    )
    layers[has_both] = _most_agreeing_layers(aurocs[:, has_both], agreement[:, has_both], within)
    return layers


def recall_at(
    scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], false_positives: float
) -> float:
    """Compute the largest recall of class 1 when at most this share of class 0 is flagged too.

    It is nan if a score is.
    """
    if np.isnan(scores).any():
        return float("nan")
    zeros = np.sort(scores[y == 0])[::-1]
    n_allowed = np.sum(np.arange(1, len(zeros) + 1) / len(zeros) <= false_positives)
    # the lowest score that would flag one zero too many
    limit = zeros[n_allowed] if n_allowed < len(zeros) else -np.inf
    return float(np.mean(scores[y == 1] > limit))


def balanced_accuracy(
    scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], threshold: float = 0.0
) -> float:
    """Compute the mean over both classes of the share of rows on the right side of `threshold`.

    It is nan if a score is.
    """
    if np.isnan(scores).any():
        return float("nan")
    above = scores > threshold
    return float((above[y == 1].mean() + (~above[y == 0]).mean()) / 2)


def calibrated(
    scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], new: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " m"]:
    """Turn `new` scores [m] into probabilities of class 1.

    A logistic curve (Platt, *Probabilistic outputs for support vector machines*, 1999) is fitted to
    the `scores` and classes `y` of other rows [n].
    """
    unit = np.std(scores) + 1e-12
    curve = LogisticRegression(C=1e3).fit(scores[:, None] / unit, y)
    return curve.predict_proba(new[:, None] / unit)[:, 1]


def calibration_error(
    p: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], bins: int = 10
) -> float:
    """Compute the expected calibration error of probabilities of class 1.

    That is the gap between mean outcome and mean probability of a bin, averaged over rows; the bins
    have equal width.
    """
    bin_of_row = np.minimum((p * bins).astype(int), bins - 1)
    # the gap of a bin's means times its rows
    gaps = np.bincount(bin_of_row, weights=y - p)
    return float(np.abs(gaps).sum() / len(p))
