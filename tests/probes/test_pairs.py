"""Probes on dropout draws, against general optimisers and on a planted direction."""

from functools import partial

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression, Ridge

from dlk_utils.probes import (
    PAIR_PROBES,
    Listwise,
    PairDirection,
    PairDistance,
    PairDual,
    PairRanking,
)

ON_DIFFERENCES = [name for name in PAIR_PROBES if name != "pair_dual"]
"""Pair probes that see nothing but the difference of the two draws."""


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two draws per row, how far draw 1 moved towards the truth, and the direction that decides."""
    rng = np.random.default_rng(1)
    direction = rng.normal(size=10)
    direction /= np.linalg.norm(direction)
    X = rng.normal(size=(400, 1, 10)) * 20 + rng.normal(size=(400, 2, 10))
    return X, (X[:, 1] - X[:, 0]) @ direction + 0.1 * rng.normal(size=400), direction


@pytest.fixture(scope="module")
def lists() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Five draws per prompt, how far each lies towards the truth, and a direction that decides."""
    rng = np.random.default_rng(8)
    direction = rng.normal(size=6)
    X = rng.normal(size=(150, 1, 6)) * 10 + rng.normal(size=(150, 5, 6))
    y = (X - X.mean(1, keepdims=True)) @ direction * 0.1 + rng.normal(size=(150, 1))
    return X, y, direction


def scaled_differences(X: np.ndarray) -> np.ndarray:
    difference = X[:, 1] - X[:, 0]
    return difference / np.sqrt((difference**2).mean(0))


def weights(probe) -> np.ndarray:
    return probe.coef_[0].numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("name", ON_DIFFERENCES)
def test_a_pair_probe_recovers_the_planted_direction(pairs, name):
    X, y, direction = pairs
    probe = PAIR_PROBES[name]().fit(X[:300], y[:300])
    assert cosine(weights(probe), direction) > 0.95
    assert np.mean((probe.decision_function(X[300:]) > 0) == (y[300:] > 0)) > 0.85


@pytest.mark.parametrize("name", ON_DIFFERENCES)
def test_rows_that_did_not_move_teach_nothing(pairs, name):
    X, y, direction = pairs
    y = np.where(np.arange(400) % 4, y, 0)
    assert cosine(weights(PAIR_PROBES[name]().fit(X, y)), direction) > 0.9


@pytest.mark.parametrize("name", ON_DIFFERENCES)
def test_swapping_the_draws_flips_the_sign(pairs, name):
    X, y, _ = pairs
    swapped = X[:, ::-1].copy()
    probe = PAIR_PROBES[name]().fit(X, y)
    np.testing.assert_array_equal(probe.decision_function(swapped), -probe.decision_function(X))
    assert cosine(weights(PAIR_PROBES[name]().fit(swapped, -y)), weights(probe)) > 0.999


@pytest.mark.parametrize("name", ON_DIFFERENCES)
def test_what_both_draws_share_does_not_count(pairs, name):
    X, y, _ = pairs
    probe = PAIR_PROBES[name]().fit(X, y)
    moved = X + np.random.default_rng(3).normal(size=(400, 1, 10)) * 3
    np.testing.assert_allclose(
        probe.decision_function(moved), probe.decision_function(X), atol=1e-9
    )


def test_a_small_move_counts_less_than_a_large_one(pairs):
    X, y, _ = pairs
    small_moves_wrong = np.where(np.abs(y) < np.median(np.abs(y)), -y, y)
    mistaken = PairRanking().fit(X, small_moves_wrong)
    assert cosine(weights(mistaken), weights(PairRanking().fit(X, y))) > 0.8


def test_pair_distance_predicts_the_move_in_units_of_the_mean_move(pairs):
    X, y, _ = pairs
    scores = PairDistance().fit(X, y).decision_function(X)
    assert np.corrcoef(scores, y)[0, 1] > 0.95
    slope = np.polyfit(y / np.abs(y).mean(), scores, 1)[0]
    # The penalty shrinks the scores.
    assert 0.5 < slope < 1.05


def ranking_loss(scores: np.ndarray, y: np.ndarray) -> float:
    short = np.maximum(0, 1 - np.sign(y) * scores)
    return (np.abs(y) / np.abs(y).mean() * short**2).sum() / 2


def direction_loss(scores: np.ndarray, y: np.ndarray) -> float:
    return np.logaddexp(0, -np.sign(y) * scores).sum()


def huber_loss(scores: np.ndarray, y: np.ndarray) -> float:
    error = np.abs(scores - y / np.abs(y).mean())
    return np.where(error < 1, error**2 / 2, error - 0.5).sum()


def huber_and_ranking_loss(scores: np.ndarray, y: np.ndarray) -> float:
    return huber_loss(scores, y) + ranking_loss(scores, y)


@pytest.mark.parametrize(
    "make_probe, loss",
    [
        (PairRanking, ranking_loss),
        (PairDirection, direction_loss),
        (PairDistance, huber_loss),
        (partial(PairDistance, kind="margin"), huber_and_ranking_loss),
    ],
)
def test_a_pair_probe_is_at_the_minimum_of_its_loss(pairs, make_probe, loss):
    X, y, _ = pairs
    differences = scaled_differences(X)
    penalty = X.shape[-1] / 0.1

    def cost(w: np.ndarray) -> float:
        return loss(differences @ w, y) + penalty / 2 * w @ w

    best = minimize(cost, np.zeros(10), method="BFGS", options={"gtol": 1e-7}).x
    scores = make_probe().fit(X, y).decision_function(X)
    np.testing.assert_allclose(scores, differences @ best, atol=2e-4)


def test_the_squared_error_is_scikit_learns_ridge(pairs):
    X, y, _ = pairs
    differences = scaled_differences(X)
    ridge = Ridge(alpha=10 / 0.1, fit_intercept=False).fit(differences, y / np.abs(y).mean())
    scores = PairDistance(kind="mse").fit(X, y).decision_function(X)
    np.testing.assert_allclose(scores, ridge.predict(differences), atol=1e-6)


def test_pair_dual_is_scikit_learns_logistic_regression_on_both_draws_side_by_side():
    X = np.random.default_rng(9).normal(size=(200, 2, 5))
    move = X[:, 1, 0] - X[:, 0, 0]
    wide = X.reshape(200, -1)
    wide = (wide - wide.mean(0)) / wide.std(0)
    expected = LogisticRegression(C=0.01, max_iter=5000, tol=1e-10).fit(wide, move > 0)
    scores = PairDual().fit(X, move).decision_function(X)
    np.testing.assert_allclose(scores, expected.decision_function(wide), atol=1e-4)


def test_pairs_of_which_none_moved_are_refused(pairs):
    X, y, _ = pairs
    with pytest.raises(ValueError, match="whose answer moved"):
        PairRanking().fit(X, 0 * y)


def test_a_loss_that_does_not_exist_is_refused(pairs):
    X, y, _ = pairs
    with pytest.raises(ValueError, match="expected one of smooth_l1, mse, margin"):
        PairDistance(kind="cubic").fit(X, y)


def test_listwise_finds_the_direction(lists):
    X, y, direction = lists
    assert cosine(weights(Listwise().fit(X, y)), direction) > 0.95


def test_listwise_sees_only_differences_within_a_prompt(lists):
    X, y, _ = lists
    moved = X + np.random.default_rng(0).normal(size=(150, 1, 6)) * 100
    other = Listwise().fit(moved, y + np.arange(150)[:, None])
    np.testing.assert_allclose(other.coef_, Listwise().fit(X, y).coef_, rtol=1e-3, atol=1e-6)


def test_listwise_is_at_the_minimum_of_listnets_cross_entropy(lists):
    X, y, _ = lists
    centred = X - X.mean(1, keepdims=True)
    size = np.sqrt((centred**2).mean((0, 1)))
    goal = y - y.mean(1, keepdims=True)
    wanted = softmax(goal / goal.std(ddof=1), axis=1)

    def loss(w: np.ndarray) -> float:
        cross_entropy = -(wanted * log_softmax(centred / size @ w, axis=1)).sum(1).mean()
        return cross_entropy + 0.1 * (w**2).sum()

    reached = loss(weights(Listwise(steps=1000).fit(X, y)) * size)
    assert reached < minimize(loss, np.zeros(6), method="BFGS").fun + 1e-4


def test_listwise_refuses_draws_that_do_not_differ(lists):
    X, y, _ = lists
    with pytest.raises(ValueError, match="draws differ"):
        Listwise().fit(X, 0 * y)
