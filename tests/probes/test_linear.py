"""Linear probes against scikit-learn, and against formulas written out here."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import PredefinedSplit, StratifiedGroupKFold

from dlk_utils.evaluation.stats import auroc
from dlk_utils.probes import LDA, TTPD, AllLayers, Logistic, MeanDifference, Principal
from dlk_utils.probes.linear import STRENGTHS


def labelled_states(
    n: int, d: int, *, spread: float | np.ndarray = 1.0, mean: float = 0.0, signal: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """States whose class means differ along a random direction, and their labels."""
    rng = np.random.default_rng(d)
    y = rng.integers(0, 2, n)
    X = rng.normal(size=(n, d)) * spread + mean
    return X + signal * np.outer(y, rng.normal(size=d)), y


def standardised(X: np.ndarray) -> np.ndarray:
    return (X - X.mean(0)) / X.std(0)


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("d", [12, 400])
def test_logistic_equals_scikit_learn_on_scaled_states(C, d):
    X, y = labelled_states(150, d, spread=3.0, mean=1.0, signal=float(d == 12))
    expected = LogisticRegression(C=C, max_iter=10_000, tol=1e-10).fit(standardised(X), y)
    expected_scores = expected.decision_function(standardised(X))
    probe = Logistic(C).fit(X, y)
    np.testing.assert_allclose(
        probe.coef_[0], expected.coef_[0], atol=1e-3 * np.abs(expected.coef_).max()
    )
    np.testing.assert_allclose(
        probe.decision_function(X), expected_scores, atol=1e-3 * np.abs(expected_scores).max()
    )


def test_the_strength_is_chosen_by_the_log_loss_of_left_out_examples():
    X, y = labelled_states(200, 12, spread=np.arange(1, 13), mean=5.0)
    example_id = np.arange(len(y)) // 2
    fold = np.zeros(len(y), int)
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for k, (_, rows) in enumerate(splitter.split(y, y, example_id)):
        fold[rows] = k
    np.testing.assert_array_equal(fold[::2], fold[1::2])
    expected = LogisticRegressionCV(
        Cs=STRENGTHS,
        cv=PredefinedSplit(fold),
        scoring="neg_log_loss",
        max_iter=5000,
        tol=1e-8,
        use_legacy_attributes=False,
        l1_ratios=(0,),
    ).fit(standardised(X), y)
    chosen = Logistic("auto").fit(X, y, example_id).C_
    assert float(chosen[0]) == pytest.approx(float(np.ravel(expected.C_)[0]))


def test_mean_difference_equals_the_formula():
    X, y = labelled_states(200, 12, spread=np.arange(1, 13), mean=5.0)
    one, zero = X[y == 1].mean(0), X[y == 0].mean(0)
    probe = MeanDifference().fit(X, y)
    np.testing.assert_allclose(probe.coef_[0], one - zero)
    np.testing.assert_allclose(
        probe.decision_function(X), (X - (one + zero) / 2) @ (one - zero), atol=1e-9
    )
    assert list(probe.predict(np.stack([zero, one]))) == [0, 1]


@pytest.mark.parametrize("scale", ["none", "neuron"])
@pytest.mark.parametrize("d", [12, 400])
def test_lda_is_the_mean_difference_times_the_inverse_of_the_shrunk_covariance(scale, d):
    X, y = labelled_states(150, d, spread=np.linspace(1, 4, d), mean=2.0)
    Z = standardised(X) if scale == "neuron" else X
    one, zero = Z[y == 1].mean(0), Z[y == 0].mean(0)
    covariance, _ = ledoit_wolf(Z - np.where(y[:, None], one, zero), assume_centered=True)
    expected = (Z - (one + zero) / 2) @ np.linalg.solve(covariance, one - zero)
    scores = LDA(scale=scale).fit(X, y).decision_function(X)
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("d", [12, 300])
def test_principal_is_the_first_component_with_the_sign_of_the_training_rows(d):
    X, y = labelled_states(100, d, signal=3.0)
    projection = X @ PCA(1, svd_solver="full").fit(X).components_[0]
    one, zero = projection[y == 1].mean(), projection[y == 0].mean()
    expected = np.sign(one - zero) * (projection - (one + zero) / 2)
    np.testing.assert_allclose(Principal().fit(X, y).decision_function(X), expected, atol=1e-8)


def test_ttpd_finds_the_truth_that_holds_for_either_polarity():
    rng = np.random.default_rng(1)
    n, d = 400, 20
    y, polarity = rng.integers(0, 2, n), rng.choice([-1, 1], n)
    truth = 2 * y - 1
    general, polarity_sensitive = np.linalg.qr(rng.normal(size=(d, 2)))[0].T
    X = 5 + 2 * np.outer(truth, general) + 6 * np.outer(truth * polarity, polarity_sensitive)
    X += 3 * np.outer(polarity, rng.normal(size=d)) + rng.normal(size=(n, d))
    train, test = slice(0, 200), slice(200, None)
    probe = TTPD().fit(X[train], y[train], polarity=polarity[train])
    design = np.column_stack([np.ones(200), truth[train], (truth * polarity)[train]])
    expected, *_ = np.linalg.lstsq(design, X[train], rcond=None)
    np.testing.assert_allclose(probe.general_truth_[0], expected[1], atol=1e-8)
    np.testing.assert_allclose(probe.polarity_sensitive_truth_[0], expected[2], atol=1e-8)
    assert auroc(probe.decision_function(X[test]), y[test]) > 0.95
    # The planted mistake: with one polarity in training, a probe takes the louder direction, which
    # turns round with the polarity.
    affirmed, denied = polarity[train] == 1, polarity[test] == -1
    mistaken = Logistic().fit(X[train][affirmed], y[train][affirmed])
    assert auroc(mistaken.decision_function(X[test][denied]), y[test][denied]) < 0.5


def test_ttpd_without_two_polarities_is_the_difference_of_means():
    X, y = labelled_states(100, 8)
    weights = TTPD().fit(X, y).coef_[0].numpy()
    difference = X[y == 1].mean(0) - X[y == 0].mean(0)
    cosine = weights @ difference / np.linalg.norm(weights) / np.linalg.norm(difference)
    assert cosine > 1 - 1e-9


def test_all_layers_is_scikit_learns_logistic_regression_on_the_states_side_by_side():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 2, 120)
    X = rng.normal(size=(3, 120, 10)) + y[None, :, None]
    wide = standardised(X.transpose(1, 0, 2).reshape(120, -1))
    expected = LogisticRegression(C=0.01 / 3, max_iter=5000, tol=1e-10).fit(wide, y)
    scores = AllLayers().fit(X, y).decision_function(X)
    np.testing.assert_allclose(scores, expected.decision_function(wide), atol=1e-4)


def test_parameters_are_kept_by_a_clone():
    parameters = {"C": 7.0, "scale": "row", "folds": 5}
    assert clone(Logistic(C=7.0, scale="row")).get_params() == parameters
