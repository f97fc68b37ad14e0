"""Each probe of every kind on signals that are known: at its strength, turned round, absent, doubled, of one class, and with fewer rows than neurons."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from dlk_utils.evaluation.stats import auroc, auroc_interval
from dlk_utils.probes import ALL_STATE_PROBES, CONTRAST_PROBES, PAIR_PROBES, STACK_PROBES, fitted

D, N = 16, 800
KINDS = {
    "state": ALL_STATE_PROBES,
    "stack": STACK_PROBES,
    "contrast": CONTRAST_PROBES,
    "pair": PAIR_PROBES,
}
EVERY = [(kind, name) for kind, probes in KINDS.items() for name in probes]
UNSUPERVISED = ("principal", "ccs", "crc")
"""They find the loudest direction: of a signal no louder than the noise, or of nothing, they say nothing."""


LEFT = {
    "nearest": 0.05,
    "mlp": 0.04,
    "dice": 0.04,
    "all_layers": 0.04,
    "convolution": 0.1,
    "pair_dual": 0.25,
}
"""AUROC that a method leaves on the table for want of a direction (neighbours), among more neurons (all layers), or for want of knowing that the order of two draws does not matter (dual)."""


def planted(
    kind: str,
    strength: float,
    *,
    n: int = N,
    d: int = D,
    seed: int = 0,
    turn: bool = False,
    twice: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """X and y of a kind: along one neuron the classes lie `strength` standard deviations apart (of the difference, for pairs); the second half turned round if `turn`."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    sign = (2 * y - 1) * np.where(turn & (np.arange(n) >= n // 2), -1, 1)
    X = rng.normal(size=(n, d))
    X[:, 3] += strength / 2 * sign
    if twice:
        X = np.concatenate([X, X], 1)
    if kind == "stack":
        return np.stack([rng.normal(size=X.shape), X, rng.normal(size=X.shape)]), y
    if kind in ("contrast", "pair"):  # half of it in either of the two, with opposite signs
        other = rng.normal(size=X.shape) * 3
        return np.stack([other - X / 2, other + X / 2], 1), y
    return X, y


def score(kind: str, name: str, X: np.ndarray, y: np.ndarray, X_test: np.ndarray) -> np.ndarray:
    return fitted(
        KINDS[kind][name], X, pd.DataFrame({"y": y}), (2 * y - 1) * 0.1 if kind == "pair" else None
    ).decision_function(X_test)


def halves(kind: str, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (X[:, : N // 2], X[:, N // 2 :]) if kind == "stack" else (X[: N // 2], X[N // 2 :])


@pytest.mark.parametrize("kind, name", EVERY)
def test_a_planted_signal_is_found_at_its_strength(kind, name):
    strength = 8.0 if name in UNSUPERVISED else 3.0
    X, y = planted(kind, strength)
    train, test = halves(kind, X)
    found = score(kind, name, train, y[: N // 2], test)
    low, high = auroc_interval(found, y[N // 2 :], [str(i) for i in range(N // 2)])
    known = norm.cdf(strength / np.sqrt(2))
    loss = LEFT.get(name, 0.02)
    assert low - loss <= known <= high + loss


@pytest.mark.parametrize("kind, name", EVERY)
def test_a_signal_that_is_turned_round_scores_below_one_half(kind, name):
    X, y = planted(kind, 8.0 if name in UNSUPERVISED else 3.0, turn=True)
    train, test = halves(kind, X)
    assert auroc(score(kind, name, train, y[: N // 2], test), y[N // 2 :]) < 0.4


@pytest.mark.parametrize("kind, name", EVERY)
def test_where_there_is_no_signal_there_is_none(kind, name):
    X, y = planted(kind, 0.0)
    train, test = halves(kind, X)
    assert (
        abs(auroc(score(kind, name, train, y[: N // 2], test), y[N // 2 :]) - 0.5) < 0.09
    )  # three standard errors


@pytest.mark.parametrize("kind, name", EVERY)
def test_every_neuron_twice_changes_little(kind, name):
    strength = 8.0 if name in UNSUPERVISED else 2.0
    (X, y), (double, _) = planted(kind, strength), planted(kind, strength, twice=True)
    once, twice = (
        auroc(score(kind, name, train, y[: N // 2], test), y[N // 2 :])
        for train, test in (halves(kind, X), halves(kind, double))
    )
    assert np.isfinite(twice) and abs(once - twice) < (0.06 if name != "pair_dual" else 0.2)


@pytest.mark.parametrize("kind, name", [(k, n) for k, n in EVERY if k != "pair"])
def test_one_class_is_an_error_that_says_what_was_expected(kind, name):
    X, y = planted(kind, 1.0)
    with pytest.raises(ValueError, match="expected labels 0 and 1"):
        score(kind, name, X, np.ones_like(y), X)


@pytest.mark.parametrize("kind, name", [(k, n) for k, n in EVERY if n not in UNSUPERVISED])
def test_fewer_rows_than_neurons_are_no_trouble(kind, name):
    X, y = planted(kind, 6.0, n=N, d=200)
    train, test = halves(kind, X)
    few = train[:, :60] if kind == "stack" else train[:60]
    found = score(kind, name, few, y[:60], test)
    assert np.isfinite(found).all() and auroc(found, y[N // 2 :]) > (
        0.6 if name not in ("nearest", "pair_dual", "convolution", "dice") else 0.5
    )
