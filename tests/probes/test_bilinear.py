"""The ranking of draws by a product, where only a product tells which draw is the truer."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from dlk_utils.errors import DataError
from dlk_utils.probes import PairRanking
from dlk_utils.probes.bilinear import PairBilinear

D = 12


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of draws, how far draw 1 moved to the truth, and the label: that is what is true.

    The move is what is true times the turn.
    """
    rng = np.random.default_rng(3)
    topic, turn = rng.normal(size=(2, D))
    clean = rng.normal(size=(400, 1, D)) * rng.uniform(0.5, 30, D) + 5
    X = clean + 0.3 * rng.normal(size=(400, 2, D))
    what_is_true = np.sign(((X.mean(1) - 5) / clean.std(0)) @ topic)
    y = what_is_true * ((X[:, 1] - X[:, 0]) @ turn) * 0.1
    return X, y, (what_is_true > 0).astype(int)


def fitted(X: np.ndarray, y: np.ndarray, label: np.ndarray) -> PairBilinear:
    return PairBilinear().fit(X[:300], y[:300], label[:300])


def share_in_order(probe, X: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean((probe.decision_function(X) > 0) == (y > 0)))


def test_a_product_ranks_what_no_score_of_the_difference_ranks(pairs):
    X, y, label = pairs
    linear = PairRanking().fit(X[:300], y[:300])
    assert share_in_order(fitted(X, y, label), X[300:], y[300:]) > 0.8
    assert abs(share_in_order(linear, X[300:], y[300:]) - 0.5) < 0.15


def test_shuffled_labels_are_not_ranked(pairs):
    X, y, label = pairs
    shares = []
    for seed in range(6):
        other = np.random.default_rng(seed).permutation(label)
        shuffled = fitted(X, np.where(other == label, y, -y), other)
        shares.append(share_in_order(shuffled, X[300:], y[300:]))
    # A direction that is fitted to nothing lies along the planted one, or against it, by chance.
    assert abs(np.mean(shares) - 0.5) < 0.15


def test_swapping_the_draws_flips_the_sign(pairs):
    X, y, label = pairs
    probe = fitted(X, y, label)
    np.testing.assert_allclose(
        probe.decision_function(X[:, ::-1].copy()), -probe.decision_function(X)
    )


def test_all_pairs_are_scored_as_each_pair_alone_and_layers_as_each_layer_alone(pairs):
    X, y, label = pairs
    two_layers = np.stack([X, 2 * X[..., ::-1]])
    probe = PairBilinear().fit(two_layers, y, label)
    every = probe.score_all_pairs(probe._as_batch(two_layers)).numpy()
    for layer, states in enumerate(two_layers):
        alone = PairBilinear().fit(states, y, label)
        np.testing.assert_allclose(every[layer, :, 0, 1], alone.decision_function(states))
        assert not every[layer, :, 0, 0].any()


def test_the_score_grows_with_the_move(pairs):
    X, y, label = pairs
    scores = fitted(X, y, label).decision_function(X[300:])
    assert spearmanr(scores, y[300:]).statistic > 0.7


def test_pairs_that_do_not_move_are_refused(pairs):
    X, _, label = pairs
    with pytest.raises(DataError, match="expected rows whose answer moved"):
        PairBilinear().fit(X, np.zeros(len(X)), label)
