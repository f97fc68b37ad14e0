"""Probes: against scikit-learn and formulas written out here, on planted directions, one row at a time and with the draws swapped."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression

from dlk_utils.probes import PAIR_PROBES, STATE_PROBES, MeanDifference, PairDistance, PairRanking, logistic
from dlk_utils.probes.pair_ranking import pair_scale


@pytest.fixture(scope="module")
def states() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    return rng.normal(size=(200, 12)) * np.arange(1, 13) + 5 + np.outer(2 * y - 1, rng.normal(size=12)), y


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two draws per row, how far the second moved towards the truth, and the direction that decides it."""
    rng = np.random.default_rng(1)
    direction = rng.normal(size=10)
    direction /= np.linalg.norm(direction)
    X = rng.normal(size=(400, 1, 10)) * 20 + rng.normal(size=(400, 2, 10))
    return X, (X[:, 1] - X[:, 0]) @ direction + 0.1 * rng.normal(size=400), direction


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_mean_difference_equals_the_formula(states):
    X, y = states
    probe = MeanDifference().fit(X, y)
    one, zero = (np.array([x for x, label in zip(X, y, strict=True) if label == k]).sum(0) / (y == k).sum() for k in (1, 0))
    np.testing.assert_allclose(probe.direction_, one - zero)
    np.testing.assert_allclose(probe.decision_function(X), [np.dot(x, one - zero) - np.dot((one + zero) / 2, one - zero) for x in X], atol=1e-9)
    np.testing.assert_allclose(probe.decision_function(one[None]), -probe.decision_function(zero[None]))
    assert probe.decision_function(one[None])[0] > 0
    assert list(probe.predict(np.stack([zero, one]))) == [0, 1]


@pytest.mark.parametrize("labels", [[1, 2], [-1, 1], [0, 0], [1, 1], [0, 1, 2]])
def test_mean_difference_refuses_labels_other_than_0_and_1(labels):
    with pytest.raises(ValueError, match="expected labels 0 and 1"):
        MeanDifference().fit(np.zeros((6, 3)), np.resize(labels, 6))


def test_logistic_equals_scikit_learn_on_scaled_states(states):
    X, y = states
    scaled = (X - X.mean(0)) / X.std(0)
    expected = LogisticRegression(C=0.01, max_iter=1000).fit(scaled, y)
    np.testing.assert_allclose(logistic().fit(X, y).decision_function(X), expected.decision_function(scaled), atol=1e-3)


@pytest.mark.parametrize("name", STATE_PROBES)
def test_a_state_probe_finds_a_planted_direction_and_its_sign(name):
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 300)
    X = rng.normal(size=(300, 20))
    X[:, 3] += 4 * y
    score = STATE_PROBES[name]().fit(X[:200], y[:200]).decision_function(X[200:])
    assert np.mean((score > 0) == y[200:]) > 0.9
    turned = STATE_PROBES[name]().fit(X[:200], 1 - y[:200]).decision_function(X[200:])
    np.testing.assert_allclose(turned, -score, atol=1e-3)


@pytest.mark.parametrize("name", PAIR_PROBES)
def test_a_pair_probe_recovers_the_planted_direction(pairs, name):
    X, y, direction = pairs
    probe = PAIR_PROBES[name]().fit(X[:300], y[:300])
    assert cosine(probe.weight_, direction) > 0.95
    assert np.mean((probe.decision_function(X[300:]) > 0) == (y[300:] > 0)) > 0.85


def test_pair_distance_predicts_how_far_in_units_of_the_mean_move(pairs):
    X, y, _ = pairs
    score = PairDistance().fit(X, y).decision_function(X)
    assert np.corrcoef(score, y)[0, 1] > 0.95
    slope = np.polyfit(y / np.abs(y).mean(), score, 1)[0]
    assert 0.5 < slope < 1.05  # L2 shrinks it


@pytest.mark.parametrize("name", PAIR_PROBES)
def test_swapping_the_draws_flips_the_sign(pairs, name):
    X, y, _ = pairs
    probe = PAIR_PROBES[name]().fit(X, y)
    np.testing.assert_array_equal(probe.decision_function(X[:, ::-1]), -probe.decision_function(X))
    swapped = PAIR_PROBES[name]().fit(X[:, ::-1], -y)
    assert cosine(probe.weight_, swapped.weight_) > 0.999


@pytest.mark.parametrize("name", PAIR_PROBES)
def test_what_both_draws_share_does_not_count(pairs, name):
    X, y, _ = pairs
    probe = PAIR_PROBES[name]().fit(X, y)
    moved = X + np.random.default_rng(3).normal(size=(400, 1, 10)) * 3
    np.testing.assert_allclose(probe.decision_function(moved), probe.decision_function(X), atol=1e-9)


@pytest.mark.parametrize("name", PAIR_PROBES)
def test_pairs_that_did_not_move_teach_nothing(pairs, name):
    X, y, direction = pairs
    still = y.copy()
    still[::4] = 0
    assert cosine(PAIR_PROBES[name]().fit(X, still).weight_, direction) > 0.9


def test_a_small_move_weighs_less_than_a_large_one(pairs):
    X, y, _ = pairs
    wrong = np.abs(y) < np.median(np.abs(y))
    assert cosine(PairRanking().fit(X, np.where(wrong, -y, y)).weight_, PairRanking().fit(X, y).weight_) > 0.8


def test_the_scale_of_pairs_is_the_root_mean_square_of_their_difference(pairs):
    X = pairs[0]
    np.testing.assert_allclose(pair_scale(X), np.sqrt(np.mean((X[:, 0] - X[:, 1]) ** 2, axis=0)), rtol=1e-6)
    np.testing.assert_array_equal(pair_scale(X), pair_scale(X[:, ::-1]))


@pytest.mark.trap(34)
@pytest.mark.parametrize("name", [*STATE_PROBES, *PAIR_PROBES])
def test_rows_scored_one_at_a_time_equal_rows_scored_together(states, pairs, name):
    (X, y), make = (states, STATE_PROBES[name]) if name in STATE_PROBES else (pairs[:2], PAIR_PROBES[name])
    probe = make().fit(X[:150], y[:150])
    alone = np.concatenate([probe.decision_function(X[i : i + 1]) for i in range(150, 200)])
    np.testing.assert_allclose(alone, probe.decision_function(X[150:200]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*STATE_PROBES, *PAIR_PROBES])
def test_a_probe_can_be_cloned_and_fitted_again_with_the_same_result(states, pairs, name):
    (X, y), make = (states, STATE_PROBES[name]) if name in STATE_PROBES else (pairs[:2], PAIR_PROBES[name])
    first = make().fit(X, y)
    again = clone(first)
    assert not hasattr(again, "weight_") and not hasattr(again, "direction_")
    np.testing.assert_array_equal(again.fit(X, y).decision_function(X), first.decision_function(X))


def test_the_strength_of_regularisation_is_a_parameter_that_a_clone_keeps():
    assert clone(PairRanking(C=3.0)).C == 3.0
    assert clone(PairDistance(alpha=0.5)).alpha == 0.5
    assert clone(logistic(C=7.0))[-1].C == 7.0
