"""Probes on contrast pairs, against scikit-learn and on a planted truth."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from dlk_utils.evaluation.stats import auroc
from dlk_utils.probes import CCS, CONTRAST_PROBES, CRC, ContrastLogistic


@pytest.fixture(scope="module")
def contrast() -> tuple[np.ndarray, np.ndarray]:
    """States after either choice: its word is loud, and a direction says whether it is right."""
    rng = np.random.default_rng(0)
    n, d = 400, 16
    y = rng.integers(0, 2, n)
    word, truth = rng.normal(size=(2, d)) * 10, rng.normal(size=d)
    choice_is_right = np.stack([y == 0, y == 1], 1)
    signal = 2 * (2 * choice_is_right - 1)[..., None] * truth
    return word + signal + rng.normal(size=(n, 2, d)), y


def scaled_differences(X: np.ndarray) -> np.ndarray:
    scaled = (X - X.mean(0)) / X.std(0)
    return scaled[:, 1] - scaled[:, 0]


@pytest.mark.parametrize("name", CONTRAST_PROBES)
def test_a_contrast_probe_reads_the_truth_and_not_the_word(contrast, name):
    X, y = contrast
    scores = CONTRAST_PROBES[name]().fit(X[:200], y[:200]).decision_function(X[200:])
    assert auroc(scores, y[200:]) > 0.95


def test_crc_is_the_first_component_of_the_scaled_differences(contrast):
    X, y = contrast
    component = PCA(1, svd_solver="full").fit(scaled_differences(X)).components_[0]
    assert abs(CRC().fit(X, y).coef_[0].numpy() @ component) > 1 - 1e-9


def test_contrast_logistic_is_scikit_learns_on_the_scaled_differences(contrast):
    X, y = contrast
    expected = LogisticRegression(C=0.01, max_iter=5000, tol=1e-10).fit(scaled_differences(X), y)
    np.testing.assert_allclose(
        ContrastLogistic().fit(X, y).decision_function(X),
        expected.decision_function(scaled_differences(X)),
        atol=1e-4,
    )


@pytest.mark.trap(43)
def test_ccs_shows_every_start_and_keeps_the_one_with_the_lowest_loss():
    """The planted mistake: where there is nothing to find, the starts end far apart."""
    rng = np.random.default_rng(5)
    X, y = rng.normal(size=(400, 2, 16)), rng.integers(0, 2, 400)
    probe = CCS(restarts=6).fit(X[:200], y[:200])
    starts = probe.score_starts(X[200:])[0]
    aurocs = [auroc(scores, y[200:]) for scores in starts]
    assert len(aurocs) == 6 and max(aurocs) - min(aurocs) > 0.02
    kept = int(probe.losses_[0].argmin())
    np.testing.assert_allclose(probe.decision_function(X[200:]), starts[kept], atol=1e-9)
    assert 0.35 < aurocs[kept] < 0.65


@pytest.mark.trap(43)
@pytest.mark.parametrize("name", ["ccs", "crc"])
def test_ccs_and_crc_take_nothing_but_their_sign_from_the_labels(name):
    rng = np.random.default_rng(5)
    X, y = rng.normal(size=(100, 2, 16)), rng.integers(0, 2, 100)
    make_probe = CONTRAST_PROBES[name]
    scores = make_probe().fit(X, y).decision_function(X)
    turned = make_probe().fit(X, 1 - y).decision_function(X)
    with_other_labels = make_probe().fit(X, rng.permutation(y)).decision_function(X)
    np.testing.assert_allclose(turned, -scores, atol=1e-9)
    np.testing.assert_allclose(np.abs(with_other_labels), np.abs(scores), atol=1e-9)
