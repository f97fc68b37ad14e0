"""Metrics against scikit-learn and against counting, and intervals against their formulas."""

import inspect
import math

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm, rankdata, spearmanr
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dlk_utils.errors import DataError, TooFewRows
from dlk_utils.evaluation.stats import (
    agreeing_layers_in_resamples,
    auroc,
    auroc_interval,
    balanced_accuracy,
    bootstrap_weights,
    calibrated,
    calibration_error,
    earliest_good_layer,
    layers_in_resamples,
    mean_interval,
    most_agreeing_layer,
    recall_at,
    twin_agreement,
    visible_auroc,
    weighted_agreement,
    weighted_auroc,
    wilson_interval,
)

N = 240
EXAMPLES = [f"e{i // 2}" for i in range(N)]
"""Two rows of each example."""


@pytest.fixture(params=["signal", "ties", "no signal", "constant"])
def scores_and_classes(request) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, N)
    signal = 0 if request.param == "no signal" else 1
    scores = rng.normal(size=N) + signal * y
    if request.param == "ties":
        return scores.round(), y
    if request.param == "constant":
        return np.zeros(N), y
    return scores, y


def test_an_auroc_is_that_of_scikit_learn(scores_and_classes):
    scores, y = scores_and_classes
    assert auroc(scores, y) == pytest.approx(roc_auc_score(y, scores), abs=1e-12)


def test_a_weighted_auroc_is_that_of_scikit_learn_with_sample_weights(scores_and_classes):
    scores, y = scores_and_classes
    weights = bootstrap_weights(EXAMPLES, 20, 0)
    expected = [roc_auc_score(y, scores, sample_weight=w) for w in weights]
    assert weighted_auroc(scores, y, weights) == pytest.approx(expected)


@pytest.mark.trap(34)
def test_an_auroc_under_one_half_is_never_flipped():
    y = np.array([0, 0, 0, 1, 1, 1])
    assert auroc(y.astype(float), y) == 1.0
    assert auroc(-y.astype(float), y) == 0.0


def test_equal_aurocs_of_different_scores_compare_as_equal():
    y = np.array([1, 0] * 10)
    rng = np.random.default_rng(0)
    for _ in range(100):
        scores = rng.permutation(20).astype(float)
        pairs_in_order = (scores[y == 1][:, None] > scores[y == 0]).sum()
        # not `approx`: scikit-learn's differs in the last digit, which would decide between layers
        assert auroc(scores, y) == pairs_in_order / 100


def test_without_one_class_there_is_no_auroc():
    scores, y = np.array([0.1, 0.2]), np.array([0, 1])
    assert math.isnan(auroc(scores, np.zeros(2, int)))
    assert np.isnan(weighted_auroc(scores, y, np.array([[2.0, 0.0]]))).all()


def test_a_score_that_is_no_number_counts_neither_as_high_nor_as_low():
    scores, y = np.array([0.1, np.nan, 0.2, 0.3]), np.array([0, 1, 0, 1])
    assert math.isnan(auroc(scores, y))
    assert math.isnan(recall_at(scores, y, 0.5)) and math.isnan(balanced_accuracy(scores, y))


@pytest.mark.trap(35)
def test_a_metric_keeps_nothing_between_calls(scores_and_classes):
    scores, y = scores_and_classes
    rng = np.random.default_rng(5)
    others = [(rng.normal(size=50), rng.integers(0, 2, 50)) for _ in range(3)]
    for metric, options in ((auroc, ()), (recall_at, (0.05,))):
        alone = metric(scores, y, *options)
        first = [metric(*other, *options) for other in others]
        assert [metric(*other, *options) for other in others] == first
        assert metric(scores, y, *options) == alone


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 1.0])
def test_recall_is_the_best_that_the_false_positives_allow(scores_and_classes, share):
    scores, y = scores_and_classes
    thresholds = [*np.unique(scores), np.inf]
    flagged = [scores >= t for t in thresholds]
    allowed = [f for f in flagged if f[y == 0].mean() <= share]
    assert recall_at(scores, y, share) == max(f[y == 1].mean() for f in allowed)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5])
def test_a_balanced_accuracy_is_that_of_scikit_learn(scores_and_classes, threshold):
    scores, y = scores_and_classes
    expected = balanced_accuracy_score(y, scores > threshold)
    assert balanced_accuracy(scores, y, threshold) == pytest.approx(expected)


def test_calibrated_probabilities_have_no_calibration_error_and_bold_ones_have():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20_000)
    y = (rng.uniform(size=20_000) < p).astype(int)
    bold = np.where(p > 0.5, 0.99, 0.01)
    assert calibration_error(p, y) < 0.02
    assert calibration_error(bold, y) == pytest.approx(0.24, abs=0.02)
    too_sure = 3 * logit(p)
    assert calibration_error(expit(too_sure), y) > 0.1
    again = calibrated(too_sure[:10_000], y[:10_000], too_sure[10_000:])
    assert calibration_error(again, y[10_000:]) < 0.03


@pytest.mark.parametrize("k, n", [(0, 10), (3, 10), (10, 10), (57, 120), (1, 1)])
def test_wilson_equals_its_formula(k, n):
    z, p = 1.959963984540054, k / n
    scale = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = (max(0, middle - half), min(1, middle + half))
    assert wilson_interval(k, n) == pytest.approx(expected, abs=1e-9)


def test_the_bootstrap_interval_agrees_with_the_normal_one():
    x = np.random.default_rng(0).normal(2.0, 1.0, 400)
    half = 1.96 * x.std() / 20
    expected = (x.mean() - half, x.mean() + half)
    assert mean_interval(x, np.arange(400)) == pytest.approx(expected, abs=0.02)


def test_the_bootstrap_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = mean_interval(rng.normal(0.0, 1.0, 60), np.arange(60), n_boot=400)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_repeating_the_rows_of_an_example_does_not_narrow_an_interval():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=50), np.arange(50) % 2
    examples = np.array([f"e{i:02}" for i in range(50)])
    nine_times = [np.repeat(values, 9) for values in (x, y, examples)]
    x9, y9, examples9 = nine_times
    assert mean_interval(x9, examples9) == pytest.approx(mean_interval(x, examples))
    assert auroc_interval(x9, y9, examples9) == pytest.approx(auroc_interval(x, y, examples))
    low, high = mean_interval(x, examples)
    narrow_low, narrow_high = mean_interval(x9, np.arange(450))
    assert narrow_high - narrow_low < (high - low) / 2


@pytest.mark.parametrize("n", [1, 4, 5, 60])
def test_examples_that_are_all_alike_have_an_interval_as_wide_as_wilsons(n):
    groups = np.repeat(np.arange(n), 3)
    ones, zeros = np.ones(3 * n), np.zeros(3 * n)
    assert mean_interval(ones, groups) == pytest.approx(wilson_interval(n, n))
    assert mean_interval(zeros, groups) == pytest.approx(wilson_interval(0, n))
    # a difference may have been -1
    low, high = mean_interval(ones, groups, bounds=(-1.0, 1.0))
    assert high == 1 and low == pytest.approx(2 * wilson_interval(n, n)[0] - 1)
    low, high = mean_interval(zeros, groups, bounds=(-1.0, 1.0))
    assert low == -high < 0


@pytest.mark.trap(40)
def test_the_earliest_layer_that_is_as_good_as_the_best_is_chosen():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 120)
    examples = [f"e{i}" for i in range(120)]
    noise, signal = rng.normal(size=(3, 120)), 2.0 * (2 * y - 1)
    nothing, weak = noise[0], 0.3 * signal + noise[1]
    a_little_worse, better, best = (signal + share * noise[2] for share in (1, 0.97, 0.9))
    layers = np.stack([nothing, weak, a_little_worse, better, best])
    assert earliest_good_layer(layers, y, examples) == 2
    assert earliest_good_layer(layers[:2], y, examples) == 1
    assert earliest_good_layer(layers[:1], y, examples) == 0
    assert earliest_good_layer(layers[::-1], y, examples) == 0


def test_resamples_choose_a_clear_layer_always_and_one_of_two_equal_ones_in_turn():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 80)
    examples = np.arange(80)
    nothing, one, other = rng.normal(size=(3, 80))
    clear = np.stack([nothing, one + 4 * y, nothing])
    assert set(layers_in_resamples(clear, y, examples, n_boot=200)) == {1}
    equal = np.stack([nothing, one + y, other + y])
    chosen = layers_in_resamples(equal, y, examples, n_boot=200)
    assert {1, 2} <= set(chosen) and len(chosen) == 200
    # The choice of all rows is among those of the resamples, and not rare.
    assert np.mean(chosen == earliest_good_layer(equal, y, examples)) > 0.2


def test_a_resample_of_one_class_chooses_the_layer_that_all_rows_choose():
    y = np.array([0, 0, 1])
    scores = np.array([[0.3, 0.2, 0.1], [0.1, 0.2, 0.3]])
    assert set(layers_in_resamples(scores, y, list("abc"), n_boot=100)) == {1}


def test_twins_agree_by_the_order_of_their_scores_and_not_by_their_height():
    scores = np.random.default_rng(0).normal(size=50)
    first = np.stack([scores, scores, scores, np.zeros(50)])
    second = np.stack([scores**3 - 7, -scores, np.zeros(50), scores])
    np.testing.assert_allclose(twin_agreement(first, second), [1, -1, 0, 0], atol=1e-12)


def test_of_the_layers_near_the_best_the_one_that_agrees_most_is_chosen():
    aurocs = np.array([0.80, 0.97, 0.99, 1.00])
    agreement = np.array([0.9, 0.6, 0.6, -0.5])
    assert most_agreeing_layer(aurocs, agreement, within=0.03) == 1
    assert most_agreeing_layer(aurocs, agreement, within=0.005) == 3
    assert most_agreeing_layer(aurocs, agreement, within=0.5) == 0


def test_the_agreement_of_twins_that_count_several_times_is_that_of_repeated_twins():
    rng = np.random.default_rng(0)
    # Scores of few values, so that there are ties.
    first, second = rng.integers(0, 6, (2, 3, 30)).astype(float)
    weights = bootstrap_weights(np.arange(30), 20, seed=0)
    weights[0] = np.eye(30)[4]
    agreement = weighted_agreement(first, second, weights)
    assert (agreement[:, 0] == 0).all()
    for b, counts in enumerate(weights[1:].astype(int), start=1):
        repeated = [np.repeat(scores, counts, axis=1) for scores in (first, second)]
        expected = [spearmanr(*of_layer).statistic for of_layer in zip(*repeated, strict=True)]
        np.testing.assert_allclose(agreement[:, b], expected, atol=1e-12)


def test_resampled_twins_choose_as_often_as_they_differ():
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    examples = np.arange(40)
    scores = np.stack([y + 0.1 * rng.normal(size=40) for _ in range(3)])
    turned = np.stack([-scores[0], scores[1] + rng.normal(size=40), -scores[2]])
    options = {"within": 0.03, "n_boot": 100}
    clear = agreeing_layers_in_resamples(scores, y, examples, (scores, turned), examples, **options)
    assert set(clear) == {1} and len(clear) == 100
    alike = np.stack([-scores[0], *(scores[1:] + rng.normal(size=(2, 40)))])
    chosen = agreeing_layers_in_resamples(scores, y, examples, (scores, alike), examples, **options)
    assert set(chosen) == {1, 2}


def test_no_layer_is_chosen_on_rows_of_one_class():
    with pytest.raises(TooFewRows, match="got 0 of class 0 and 3 of class 1"):
        earliest_good_layer(np.zeros((2, 3)), np.ones(3, dtype=int), list("abc"))


def test_an_auroc_of_one_has_the_interval_of_as_many_successes_as_the_smaller_class_has_examples():
    y = np.array([0] * 60 + [1] * 41)
    scores = y + np.linspace(0, 0.5, len(y))
    examples = np.arange(len(y))
    low, high = auroc_interval(scores, y, examples)
    assert high == 1.0 and low == pytest.approx(wilson_interval(41, 41)[0])
    assert auroc_interval(-scores, y, examples) == pytest.approx((0.0, 1 - low))
    # Two rows of an example are one success.
    pairs = auroc_interval(scores, y, examples // 2)
    assert pairs[0] == pytest.approx(wilson_interval(21, 21)[0], abs=1e-9)
    # With one exception, the resamples tell.
    scores[-1] = -1
    assert auroc_interval(scores, y, examples)[0] > low


def test_what_auroc_would_be_seen_is_that_of_simulated_tests():
    n_ones, n_zeros = 52, 52
    visible = visible_auroc(n_ones + n_zeros, n_ones)
    assert visible == pytest.approx(0.66, abs=0.005)
    rng = np.random.default_rng(0)
    y = np.repeat([1, 0], [n_ones, n_zeros])
    shift = np.sqrt(2) * norm.ppf(visible)
    scores = rng.normal(size=(1000, len(y))) + shift * y
    ranks = rankdata(scores, axis=1)[:, :n_ones].sum(axis=1)
    aurocs = (ranks - n_ones * (n_ones + 1) / 2) / (n_ones * n_zeros)
    critical = 0.5 + norm.ppf(0.975) * np.sqrt((len(y) + 1) / (12 * n_ones * n_zeros))
    assert np.mean(aurocs > critical) == pytest.approx(0.8, abs=0.06)
    assert np.isnan(visible_auroc(10, 0)) and visible_auroc(3, 1) == 1.0


def test_the_auroc_takes_lists():
    assert auroc([0.1, 0.9], [0, 1]) == 1.0
    assert np.isnan(auroc([], []))


@pytest.mark.parametrize(
    "scores, y, reason",
    [
        ([0, 1, 0, 1], [0.2, 0.3, 0.1, 2.0], "labels 0 and 1 as y, got 0.1, 0.2.*auroc.scores, y"),
        ([0.2, 0.3], [-1, 1], "labels 0 and 1 as y, got -1, 1"),
        ([0.2, 0.3], ["0", "1"], "labels 0 and 1"),
        ([0.2, 0.3], [0, 1, 1], r"shapes \[2\] \(float64\) and \[3\]"),
        (["a", "b"], [0, 1], "numbers"),
    ],
)
def test_an_auroc_of_other_labels_or_lengths_is_refused(scores, y, reason):
    with pytest.raises(DataError, match=reason):
        # Unwrapped: here beartype would answer before the package does.
        inspect.unwrap(auroc)(scores, y)
