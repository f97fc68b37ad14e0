"""Neighbours, networks and the dice loss, against scikit-learn and on planted signals."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

from dlk_utils.evaluation.stats import auroc
from dlk_utils.probes import ALL_STATE_PROBES, MLP, Dice, Logistic


def test_nearest_neighbours_are_scikit_learns():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    X = rng.normal(size=(200, 12)) * np.arange(1, 13) + np.outer(2 * y - 1, rng.normal(size=12))
    scaled = (X - X.mean(0)) / X.std(0)
    expected = KNeighborsClassifier(15).fit(scaled, y).predict_proba(scaled)[:, 1] - 0.5
    probe = ALL_STATE_PROBES["nearest"]().fit(X, y)
    np.testing.assert_allclose(probe.decision_function(X), expected)


def test_a_network_reads_what_no_linear_probe_does():
    rng = np.random.default_rng(3)
    X = rng.choice([-1.0, 1.0], size=(600, 6)) + 0.2 * rng.normal(size=(600, 6))
    y = (X[:, 0] * X[:, 1] > 0).astype(int)
    train, test = slice(0, 400), slice(400, None)
    network = MLP(steps=300, penalty=1e-4).fit(X[train], y[train])
    linear = Logistic().fit(X[train], y[train])
    assert auroc(network.decision_function(X[test]), y[test]) > 0.95
    assert 0.3 < auroc(linear.decision_function(X[test]), y[test]) < 0.7


@pytest.mark.slow
def test_dice_is_at_the_minimum_of_its_loss():
    rng = np.random.default_rng(6)
    y = rng.integers(0, 2, 80)
    X = rng.normal(size=(80, 4)) + 2 * np.outer(y, rng.normal(size=4))
    scaled = (X - X.mean(0)) / X.std(0)

    def loss(parameters: np.ndarray) -> float:
        weights, intercept = parameters[:4], parameters[4]
        p = expit(scaled @ weights + intercept)
        return 1 - 2 * (p * y).sum() / (p.sum() + y.sum()) + 0.01 * (weights**2).mean()

    probe = Dice(steps=1500).fit(X, y)
    reached = loss(np.r_[probe.coef_[0], probe.intercept_[0]])
    assert reached < minimize(loss, np.zeros(5), method="BFGS").fun + 1e-3


@pytest.mark.trap(36)
def test_dice_rewards_always_answering_1_where_the_states_say_nothing():
    """The planted mistake: a dice score above .82 at an AUROC of one half, as 76 % are class 1."""
    rng = np.random.default_rng(7)
    y = (rng.random(1500) < 0.76).astype(int)
    X = rng.normal(size=(1500, 8))
    scores = Dice().fit(X[:1000], y[:1000]).decision_function(X[1000:])
    answers, truth = scores > 0, y[1000:]
    # The dice score of answers is their F1 score.
    assert f1_score(truth, answers) > 0.82
    assert 0.4 < auroc(scores, truth) < 0.6
    assert balanced_accuracy_score(truth, answers) < 0.6
