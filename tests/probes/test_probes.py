"""Probes: against scikit-learn and formulas written out here, on planted directions, one row at a time and with the draws swapped."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.model_selection import PredefinedSplit, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier

from dlk_utils.evaluation.stats import auroc
from dlk_utils.probes import (
    ALL_STATE_PROBES,
    PAIR_PROBES,
    Logistic,
    MeanDifference,
    PairDirection,
    PairDistance,
    PairRanking,
    Principal,
    nearest,
)
from dlk_utils.probes.logistic import STRENGTHS
from dlk_utils.probes.scale import SCALES

DIFFERENCES = [name for name in PAIR_PROBES if name != "pair_dual"]
"""Pair probes that see the difference of two draws alone."""


@pytest.fixture(scope="module")
def states() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    return rng.normal(size=(200, 12)) * np.arange(1, 13) + 5 + np.outer(
        2 * y - 1, rng.normal(size=12)
    ), y


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two draws per row, how far the second moved towards the truth, and the direction that decides it."""
    rng = np.random.default_rng(1)
    direction = rng.normal(size=10)
    direction /= np.linalg.norm(direction)
    X = rng.normal(size=(400, 1, 10)) * 20 + rng.normal(size=(400, 2, 10))
    return X, (X[:, 1] - X[:, 0]) @ direction + 0.1 * rng.normal(size=400), direction


def weight(probe) -> np.ndarray:
    return probe.coef_[0].numpy()


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_mean_difference_equals_the_formula(states):
    X, y = states
    probe = MeanDifference().fit(X, y)
    one, zero = (
        np.array([x for x, label in zip(X, y, strict=True) if label == k]).sum(0) / (y == k).sum()
        for k in (1, 0)
    )
    np.testing.assert_allclose(probe.coef_[0], one - zero)
    np.testing.assert_allclose(
        probe.decision_function(X),
        [np.dot(x, one - zero) - np.dot((one + zero) / 2, one - zero) for x in X],
        atol=1e-9,
    )
    np.testing.assert_allclose(
        probe.decision_function(one[None]), -probe.decision_function(zero[None])
    )
    assert probe.decision_function(one[None])[0] > 0
    assert list(probe.predict(np.stack([zero, one]))) == [0, 1]


@pytest.mark.parametrize("labels", [[1, 2], [-1, 1], [0, 0], [1, 1], [0, 1, 2]])
def test_mean_difference_refuses_labels_other_than_0_and_1(labels):
    with pytest.raises(ValueError, match="expected labels 0 and 1"):
        MeanDifference().fit(np.zeros((6, 3)), np.resize(labels, 6))


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("d", [12, 400])
def test_logistic_equals_scikit_learn_on_scaled_states(C, d):
    rng = np.random.default_rng(d)
    y = rng.integers(0, 2, 150)
    X = rng.normal(size=(150, d)) * 3 + 1 + np.outer(y, rng.normal(size=d)) * (d == 12)
    scaled = (X - X.mean(0)) / X.std(0)
    expected = LogisticRegression(C=C, max_iter=10_000, tol=1e-10).fit(scaled, y)
    probe = Logistic(C).fit(X, y)
    np.testing.assert_allclose(
        probe.coef_[0], expected.coef_[0], atol=1e-3 * np.abs(expected.coef_).max()
    )
    np.testing.assert_allclose(
        probe.decision_function(X),
        expected.decision_function(scaled),
        atol=1e-3 * np.abs(expected.decision_function(scaled)).max(),
    )


def test_the_strength_is_chosen_by_the_log_loss_of_left_out_rows(states):
    X, y = states
    scaled = (X - X.mean(0)) / X.std(0)
    groups = np.arange(len(y)) // 2
    fold = np.zeros(len(y), int)
    for k, (_, rows) in enumerate(
        StratifiedGroupKFold(5, shuffle=True, random_state=0).split(y, y, groups)
    ):
        fold[rows] = k
    assert all(
        len(set(fold[groups == g])) == 1 for g in set(groups)
    )  # the rows of an example are never on two sides
    reference = LogisticRegressionCV(
        Cs=STRENGTHS,
        cv=PredefinedSplit(fold),
        scoring="neg_log_loss",
        max_iter=5000,
        tol=1e-8,
        use_legacy_attributes=False,
        l1_ratios=(0,),
    ).fit(scaled, y)
    assert float(Logistic("auto").fit(X, y, groups).C_[0]) == pytest.approx(
        float(np.ravel(reference.C_)[0])
    )


@pytest.mark.parametrize("scale", ["none", "neuron"])
@pytest.mark.parametrize("d", [12, 400])
def test_lda_is_the_mean_difference_times_the_inverse_of_ledoit_and_wolf_s_covariance(scale, d):
    rng = np.random.default_rng(d)
    y = rng.integers(0, 2, 150)
    X = rng.normal(size=(150, d)) * np.linspace(1, 4, d) + np.outer(y, rng.normal(size=d)) + 2
    Z = (X - X.mean(0)) / X.std(0) if scale == "neuron" else X
    one, zero = Z[y == 1].mean(0), Z[y == 0].mean(0)
    covariance, _ = ledoit_wolf(Z - np.where(y[:, None], one, zero), assume_centered=True)
    expected = (Z - (one + zero) / 2) @ np.linalg.solve(covariance, one - zero)
    np.testing.assert_allclose(
        MeanDifference(covariance=True, scale=scale).fit(X, y).decision_function(X),
        expected,
        rtol=1e-6,
        atol=1e-8,
    )


@pytest.mark.parametrize("name", ALL_STATE_PROBES)
def test_many_feature_matrices_at_once_give_what_each_gives_alone(name):
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, 90)
    X = rng.normal(size=(3, 90, 30)) + 2 * y[None, :, None] * rng.normal(size=(3, 1, 30))
    together = ALL_STATE_PROBES[name]().fit(X, y).decision_function(X)
    for k in range(3):
        np.testing.assert_allclose(
            together[k],
            ALL_STATE_PROBES[name]().fit(X[k], y).decision_function(X[k]),
            rtol=1e-6,
            atol=1e-8,
        )


@pytest.mark.parametrize("d", [12, 300])
def test_the_principal_probe_is_scikit_learn_s_first_component_with_the_sign_of_train(d):
    rng = np.random.default_rng(d)
    y = rng.integers(0, 2, 100)
    X = rng.normal(size=(100, d)) + 3 * np.outer(y, rng.normal(size=d))
    probe = Principal().fit(X, y)
    component = PCA(1, svd_solver="full").fit(X).components_[0]
    expected = X @ component
    one, zero = expected[y == 1].mean(), expected[y == 0].mean()
    np.testing.assert_allclose(
        probe.decision_function(X), np.sign(one - zero) * (expected - (one + zero) / 2), atol=1e-8
    )


def test_the_nearest_neighbours_are_scikit_learn_s(states):
    X, y = states
    scaled = (X - X.mean(0)) / X.std(0)
    expected = KNeighborsClassifier(15).fit(scaled, y).predict_proba(scaled)[:, 1] - 0.5
    np.testing.assert_allclose(nearest().fit(X, y).decision_function(X), expected)


def test_arrays_that_must_not_be_written_to_are_taken_without_a_word(states, recwarn):
    X, y = (np.array(a) for a in states)
    X.flags.writeable = y.flags.writeable = False
    Logistic().fit(X, y).decision_function(X)
    assert not [w for w in recwarn if "writ" in str(w.message)]


def test_each_scale_is_what_it_says(states):
    X, y = states
    scaled = {
        how: Logistic(scale=how).fit(X, y).scale_(torch.tensor(X)[None])[0].numpy()
        for how in SCALES
    }
    np.testing.assert_array_equal(scaled["none"], X)
    np.testing.assert_allclose(scaled["neuron"], (X - X.mean(0)) / X.std(0))
    np.testing.assert_allclose(np.linalg.norm(scaled["row"], axis=1), 1)
    covariance = np.cov(scaled["whiten"].T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)
    with pytest.raises(ValueError, match="scale: expected one of none, neuron, row, whiten"):
        Logistic(scale="rank").fit(X, y)


@pytest.mark.parametrize("name", ALL_STATE_PROBES)
def test_a_state_probe_finds_a_planted_direction_and_its_sign(name):
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 300)
    X = rng.normal(size=(300, 20))
    X[:, 3] += 8 * y
    score = ALL_STATE_PROBES[name]().fit(X[:200], y[:200]).decision_function(X[200:])
    turned = ALL_STATE_PROBES[name]().fit(X[:200], 1 - y[:200]).decision_function(X[200:])
    assert auroc(score, y[200:]) > 0.97 and auroc(turned, y[200:]) < 0.03
    if name != "dice":  # which leans to class 1, whichever that is
        assert np.mean((score > 0) == y[200:]) > 0.9
    if name not in ("dice", "mlp"):
        np.testing.assert_allclose(turned, -score, atol=1e-3)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_pair_probe_recovers_the_planted_direction(pairs, name):
    X, y, direction = pairs
    probe = PAIR_PROBES[name]().fit(X[:300], y[:300])
    assert cosine(weight(probe), direction) > 0.95
    assert np.mean((probe.decision_function(X[300:]) > 0) == (y[300:] > 0)) > 0.85


def test_pair_distance_predicts_how_far_in_units_of_the_mean_move(pairs):
    X, y, _ = pairs
    score = PairDistance().fit(X, y).decision_function(X)
    assert np.corrcoef(score, y)[0, 1] > 0.95
    slope = np.polyfit(y / np.abs(y).mean(), score, 1)[0]
    assert 0.5 < slope < 1.05  # L2 shrinks it


@pytest.mark.parametrize("name", DIFFERENCES)
def test_swapping_the_draws_flips_the_sign(pairs, name):
    X, y, _ = pairs
    probe = PAIR_PROBES[name]().fit(X, y)
    np.testing.assert_array_equal(
        probe.decision_function(X[:, ::-1].copy()), -probe.decision_function(X)
    )
    swapped = PAIR_PROBES[name]().fit(X[:, ::-1].copy(), -y)
    assert cosine(weight(probe), weight(swapped)) > 0.999


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_both_draws_share_does_not_count(pairs, name):
    X, y, _ = pairs
    probe = PAIR_PROBES[name]().fit(X, y)
    moved = X + np.random.default_rng(3).normal(size=(400, 1, 10)) * 3
    np.testing.assert_allclose(
        probe.decision_function(moved), probe.decision_function(X), atol=1e-9
    )


@pytest.mark.parametrize("name", DIFFERENCES)
def test_pairs_that_did_not_move_teach_nothing(pairs, name):
    X, y, direction = pairs
    still = y.copy()
    still[::4] = 0
    assert cosine(weight(PAIR_PROBES[name]().fit(X, still)), direction) > 0.9


def test_a_small_move_weighs_less_than_a_large_one(pairs):
    X, y, _ = pairs
    wrong = np.abs(y) < np.median(np.abs(y))
    assert (
        cosine(
            weight(PairRanking().fit(X, np.where(wrong, -y, y))), weight(PairRanking().fit(X, y))
        )
        > 0.8
    )


@pytest.mark.parametrize("kind", ["ranking", "direction", "smooth_l1", "mse", "margin"])
def test_a_pair_probe_is_the_minimum_of_its_loss(pairs, kind):
    """Against a general optimiser on the loss, written out again."""
    X, y, _ = pairs
    D = (X[:, 1] - X[:, 0]) / np.sqrt(((X[:, 1] - X[:, 0]) ** 2).mean(0))
    side, z, amount = np.sign(y), y / np.abs(y).mean(), np.abs(y) / np.abs(y).mean()
    hinge = lambda f: (amount * np.maximum(0, 1 - side * f) ** 2).sum() / 2
    huber = lambda f: np.where(np.abs(f - z) < 1, (f - z) ** 2 / 2, np.abs(f - z) - 0.5).sum()
    loss = {
        "ranking": hinge,
        "direction": lambda f: np.logaddexp(0, -side * f).sum(),
        "smooth_l1": huber,
        "mse": lambda f: ((f - z) ** 2).sum() / 2,
        "margin": lambda f: huber(f) + hinge(f),
    }[kind]
    expected = minimize(
        lambda w: loss(D @ w) + 10 / 0.1 / 2 * w @ w,
        np.zeros(10),
        method="BFGS",
        options={"gtol": 1e-7},
    ).x
    probe = {"ranking": PairRanking, "direction": PairDirection}.get(
        kind, lambda: PairDistance(kind=kind)
    )()
    np.testing.assert_allclose(probe.fit(X, y).decision_function(X), D @ expected, atol=2e-4)


def test_the_mean_square_distance_is_scikit_learn_s_ridge(pairs):
    X, y, _ = pairs
    D = (X[:, 1] - X[:, 0]) / np.sqrt(((X[:, 1] - X[:, 0]) ** 2).mean(0))
    expected = Ridge(alpha=10 / 0.1, fit_intercept=False).fit(D, y / np.abs(y).mean()).predict(D)
    np.testing.assert_allclose(
        PairDistance(kind="mse").fit(X, y).decision_function(X), expected, atol=1e-6
    )


def test_pairs_of_which_none_moved_and_a_loss_that_does_not_exist_are_refused(pairs):
    X, y, _ = pairs
    with pytest.raises(ValueError, match="whose answer moved"):
        PairRanking().fit(X, 0 * y)
    with pytest.raises(ValueError, match="expected one of smooth_l1, mse, margin"):
        PairDistance(kind="cubic").fit(X, y)


@pytest.mark.trap(34)
@pytest.mark.parametrize("name", [*ALL_STATE_PROBES, *PAIR_PROBES])
def test_rows_scored_one_at_a_time_equal_rows_scored_together(states, pairs, name):
    (X, y), make = (
        (states, ALL_STATE_PROBES[name])
        if name in ALL_STATE_PROBES
        else (pairs[:2], PAIR_PROBES[name])
    )
    probe = make().fit(X[:150], y[:150])
    alone = np.concatenate([probe.decision_function(X[i : i + 1]) for i in range(150, 200)])
    np.testing.assert_allclose(alone, probe.decision_function(X[150:200]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*ALL_STATE_PROBES, *PAIR_PROBES])
def test_a_probe_can_be_cloned_and_fitted_again_with_the_same_result(states, pairs, name):
    (X, y), make = (
        (states, ALL_STATE_PROBES[name])
        if name in ALL_STATE_PROBES
        else (pairs[:2], PAIR_PROBES[name])
    )
    first = make().fit(X, y)
    again = clone(first)
    assert not hasattr(again, "coef_")
    np.testing.assert_array_equal(again.fit(X, y).decision_function(X), first.decision_function(X))


def test_the_strength_of_regularisation_is_a_parameter_that_a_clone_keeps():
    assert clone(PairRanking(C=3.0)).C == 3.0
    assert clone(PairDistance(kind="mse")).kind == "mse"
    assert clone(Logistic(C=7.0, scale="row")).get_params() == {
        "C": 7.0,
        "scale": "row",
        "folds": 5,
    }
