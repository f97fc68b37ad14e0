"""Metrics against scikit-learn and against counting."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, roc_auc_score, roc_curve

from dlk_utils.evaluation import stats as metrics
from dlk_utils.evaluation.stats import earliest_good_layer
from dlk_utils.probes import MeanDifference


@pytest.fixture(params=["scores", "ties", "no signal"])
def case(request) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 240)
    scores = rng.normal(size=240) + (request.param != "no signal") * y
    return (scores.round() if request.param == "ties" else scores), y


def test_a_weighted_auroc_is_scikit_learn_s_with_sample_weights(case):
    scores, y = case
    weights = metrics.resamples([f"e{i // 2}" for i in range(240)], 20, 0)
    found = metrics.weighted_auroc(scores, y, weights)
    assert found == pytest.approx([roc_auc_score(y, scores, sample_weight=w) for w in weights])


def test_a_resample_without_one_class_has_no_auroc():
    assert np.isnan(
        metrics.weighted_auroc(np.array([0.1, 0.2]), np.array([0, 1]), np.array([[2.0, 0.0]]))
    ).all()


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_recall_is_the_best_that_the_false_positives_allow(case, share):
    scores, y = case
    fpr, tpr, _ = roc_curve(y, scores, drop_intermediate=False)
    assert metrics.recall_at(scores, y, share) == pytest.approx(tpr[fpr <= share].max())


def test_a_threshold_of_none_at_all_passes_everything():
    assert metrics.recall_at(np.zeros(6), np.array([0, 1] * 3), 1.0) == 1.0
    assert metrics.recall_at(np.zeros(6), np.array([0, 1] * 3), 0.5) == 0.0  # ties count against it


def test_balanced_accuracy_and_brier_are_scikit_learn_s(case):
    scores, y = case
    assert metrics.balanced_accuracy(scores, y) == pytest.approx(
        balanced_accuracy_score(y, scores > 0)
    )
    p = 1 / (1 + np.exp(-scores))
    assert metrics.brier(p, y) == pytest.approx(brier_score_loss(y, p))


def test_probabilities_that_are_right_have_no_calibration_error_and_bold_ones_have():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20_000)
    y = (rng.uniform(size=20_000) < p).astype(int)
    assert metrics.calibration_error(p, y) < 0.02
    assert metrics.calibration_error(np.where(p > 0.5, 0.99, 0.01), y) == pytest.approx(
        0.24, abs=0.02
    )
    scores = 3 * np.log(p / (1 - p))  # three times too sure of itself
    assert (
        metrics.calibration_error(
            metrics.calibrated(scores[:10_000], y[:10_000], scores[10_000:]), y[10_000:]
        )
        < 0.03
    )


@pytest.mark.trap(35)
def test_a_metric_keeps_nothing_between_calls(case):
    scores, y = case
    rng = np.random.default_rng(5)
    others = [(rng.normal(size=50), rng.integers(0, 2, 50)) for _ in range(3)]
    for metric in (
        metrics.auroc,
        metrics.balanced_accuracy,
        lambda s, t: metrics.recall_at(s, t, 0.05),
    ):
        alone = metric(scores, y)
        assert [metric(*o) for o in others] == [metric(*o) for o in others] and metric(
            scores, y
        ) == alone


@pytest.mark.trap(41)
def test_a_threshold_that_does_not_carry_over_is_seen_beside_the_auroc():
    """The planted mistake: all test scores are shifted, as by another instruction. The ranking is whole, the verdicts are not."""
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 400)
    shifted = rng.normal(size=400) + 3 * y + 6
    assert metrics.auroc(shifted, y) > 0.95 and metrics.balanced_accuracy(
        shifted, y
    ) == pytest.approx(0.5, abs=0.02)


@pytest.mark.trap(37)
def test_an_accuracy_is_taken_at_the_threshold_of_train_and_not_at_one_half():
    """The planted mistake: scores of a probe without a sigmoid, all above one half."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    X = rng.normal(size=(200, 4)) * 30 + 400 + 60 * y[:, None]
    score = MeanDifference().fit(X[:100], y[:100]).decision_function(X[100:])
    assert metrics.balanced_accuracy(score, y[100:]) > 0.9
    projection = X[100:] @ (X[:100][y[:100] == 1].mean(0) - X[:100][y[:100] == 0].mean(0))
    assert metrics.balanced_accuracy(projection - 0.5, y[100:]) == 0.5


@pytest.mark.trap(40)
def test_the_earliest_layer_that_is_as_good_as_the_best_is_taken():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 120)
    groups = [f"e{i}" for i in range(120)]
    noise, signal = rng.normal(size=(4, 120)), 2.0 * (2 * y - 1)
    layers = np.stack(
        [
            noise[0],
            signal * 0.3 + noise[1],
            signal + noise[2],
            signal + 0.97 * noise[2],
            signal + 0.9 * noise[2],
        ]
    )
    assert (
        earliest_good_layer(layers, y, groups) == 2
    )  # a little below the best, far above those before it
    assert (
        earliest_good_layer(layers[:2], y, groups) == 1
        and earliest_good_layer(layers[:1], y, groups) == 0
    )
    assert earliest_good_layer(layers[::-1], y, groups) == 0
