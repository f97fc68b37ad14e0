"""The ranking of draws by a product, where only a product tells which draw is the truer."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from dlk_utils.errors import DataError
from dlk_utils.probes import PairRanking
from dlk_utils.probes.bilinear import PairBilinear

D = 12


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Pairs of draws, and how far draw 1 moved to the truth: what is true times the turn."""
    rng = np.random.default_rng(3)
    topic, turn = rng.normal(size=(2, D))
    clean = rng.normal(size=(400, 1, D)) * rng.uniform(0.5, 30, D) + 5
    X = clean + 0.3 * rng.normal(size=(400, 2, D))
    what_is_true = np.sign(((X.mean(1) - 5) / clean.std(0)) @ topic)
    y = what_is_true * ((X[:, 1] - X[:, 0]) @ turn) * 0.1
    return X, y


def share_in_order(probe, X: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean((probe.decision_function(X) > 0) == (y > 0)))


def test_a_product_ranks_what_no_score_of_the_difference_ranks(pairs):
    X, y = pairs
    bilinear, linear = (probe.fit(X[:300], y[:300]) for probe in (PairBilinear(), PairRanking()))
    assert share_in_order(bilinear, X[300:], y[300:]) > 0.8
    assert abs(share_in_order(linear, X[300:], y[300:]) - 0.5) < 0.12


def test_shuffled_labels_are_not_ranked(pairs):
    X, y = pairs
    sign = np.random.default_rng(0).choice([-1, 1], 300)
    assert abs(share_in_order(PairBilinear().fit(X[:300], y[:300] * sign), X, y) - 0.5) < 0.12


def test_a_linear_signal_is_a_product_too(pairs):
    X, _ = pairs
    y = (X[:, 1] - X[:, 0]) @ np.arange(D)
    assert share_in_order(PairBilinear().fit(X[:300], y[:300]), X[300:], y[300:]) > 0.85


def test_swapping_the_draws_flips_the_sign(pairs):
    X, y = pairs
    probe = PairBilinear().fit(X, y)
    np.testing.assert_allclose(
        probe.decision_function(X[:, ::-1].copy()), -probe.decision_function(X)
    )


def test_all_pairs_are_scored_as_each_pair_alone_and_layers_as_each_layer_alone(pairs):
    X, y = pairs
    two_layers = np.stack([X, 2 * X[:, :, ::-1]])
    probe = PairBilinear().fit(two_layers, y)
    every = probe.score_all_pairs(probe._as_batch(two_layers)).numpy()
    for layer, states in enumerate(two_layers):
        alone = PairBilinear().fit(states, y)
        np.testing.assert_allclose(every[layer, :, 0, 1], alone.decision_function(states))
        assert not every[layer, :, 0, 0].any()


def test_the_score_grows_with_the_move(pairs):
    X, y = pairs
    probe = PairBilinear().fit(X[:300], y[:300])
    assert spearmanr(probe.decision_function(X[300:]), y[300:]).statistic > 0.7


def test_pairs_that_do_not_move_are_refused(pairs):
    with pytest.raises(DataError, match="expected rows whose answer moved"):
        PairBilinear().fit(pairs[0], np.zeros(400))
