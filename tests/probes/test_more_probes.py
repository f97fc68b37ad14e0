"""The probes beyond the linear ones: each against an independent implementation on the same arrays, and on planted signals."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from dlk_utils.evaluation.stats import auroc
from dlk_utils.probes import (
    CCS,
    CRC,
    MLP,
    TTPD,
    AllLayers,
    ContrastLogistic,
    DepthConvolution,
    Dice,
    Listwise,
    Logistic,
    PairDual,
)
from dlk_utils.probes.descent import descend


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def contrast() -> tuple[np.ndarray, np.ndarray]:
    """States after either choice: the word of the choice is loud, and a direction says whether it was the right one."""
    rng = np.random.default_rng(0)
    y, d = rng.integers(0, 2, 400), 16
    word, truth = rng.normal(size=(2, d)) * 10, rng.normal(size=d)
    right = np.stack([y == 0, y == 1], 1)
    return word + 2 * (2 * right - 1)[..., None] * truth + rng.normal(size=(400, 2, d)), y


def test_each_of_a_batch_descends_as_it_would_alone():
    aim = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    run = lambda some: descend(
        [torch.zeros(len(some), 3).double()], lambda w: ((w - some) ** 2).sum(1), steps=40, rate=0.1
    )[0]
    torch.testing.assert_close(run(aim), torch.cat([run(a[None]) for a in aim]))
    torch.testing.assert_close(
        descend(
            [torch.zeros(4, 3).double()], lambda w: ((w - aim) ** 2).sum(1), steps=600, rate=0.05
        )[0],
        aim,
        rtol=1e-3,
        atol=1e-3,
    )


def test_ttpd_finds_the_truth_that_holds_for_either_polarity():
    rng = np.random.default_rng(1)
    y, s, d = rng.integers(0, 2, 400), rng.choice([-1, 1], 400), 20
    t, truth, turning = 2 * y - 1, *np.linalg.qr(rng.normal(size=(d, 2)))[0].T
    X = (
        5
        + 2 * np.outer(t, truth)
        + 6 * np.outer(t * s, turning)
        + 3 * np.outer(s, rng.normal(size=d))
        + rng.normal(size=(400, d))
    )
    probe = TTPD().fit(X[:200], y[:200], polarity=s[:200])
    expected, *_ = np.linalg.lstsq(
        np.column_stack([np.ones(200), t[:200], (t * s)[:200]]), X[:200], rcond=None
    )
    np.testing.assert_allclose(probe.truth_[0], expected[1], atol=1e-8)
    np.testing.assert_allclose(probe.turning_[0], expected[2], atol=1e-8)
    assert auroc(probe.decision_function(X[200:]), y[200:]) > 0.95
    only = (
        s[:200] == 1
    )  # the planted mistake: one polarity in training, and the louder direction is the one that turns
    wrong = Logistic().fit(X[:200][only], y[:200][only])
    assert auroc(wrong.decision_function(X[200:][s[200:] == -1]), y[200:][s[200:] == -1]) < 0.5


def test_ttpd_without_two_polarities_is_the_difference_of_means():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 100)
    X = rng.normal(size=(100, 8)) + np.outer(y, rng.normal(size=8))
    assert (
        cosine(TTPD().fit(X, y).coef_[0].numpy(), X[y == 1].mean(0) - X[y == 0].mean(0)) > 1 - 1e-9
    )


@pytest.mark.parametrize("probe", [CCS, CRC, ContrastLogistic])
def test_a_contrast_probe_reads_the_truth_and_not_the_word(contrast, probe):
    X, y = contrast
    made = probe().fit(X[:200], y[:200])
    assert auroc(made.decision_function(X[200:]), y[200:]) > 0.95
    turned = probe().fit(X[:200], 1 - y[:200]).decision_function(X[200:])
    np.testing.assert_allclose(
        turned, -made.decision_function(X[200:]), atol=1e-4
    )  # labels give the sign, and of CCS and CRC nothing else
    together = (
        probe()
        .fit(np.stack([X[:200], X[:200] * 2 + 1]), y[:200])
        .decision_function(np.stack([X[200:], X[200:] * 2 + 1]))
    )
    np.testing.assert_allclose(together, [made.decision_function(X[200:])] * 2, atol=1e-5)


def test_crc_is_the_first_component_of_the_scaled_differences(contrast):
    X, y = contrast
    scaled = (X - X.mean(0)) / X.std(0)
    component = PCA(1, svd_solver="full").fit(scaled[:, 1] - scaled[:, 0]).components_[0]
    assert abs(cosine(CRC().fit(X, y).coef_[0].numpy(), component)) > 1 - 1e-9


def test_contrast_logistic_is_scikit_learn_s_on_the_scaled_differences(contrast):
    X, y = contrast
    scaled = (X - X.mean(0)) / X.std(0)
    difference = scaled[:, 1] - scaled[:, 0]
    expected = (
        LogisticRegression(C=0.01, max_iter=5000, tol=1e-10)
        .fit(difference, y)
        .decision_function(difference)
    )
    np.testing.assert_allclose(
        ContrastLogistic().fit(X, y).decision_function(X), expected, atol=1e-4
    )


@pytest.mark.trap(43)
def test_ccs_shows_every_start_and_keeps_the_one_with_the_lowest_loss_which_labels_do_not_choose(
    contrast,
):
    X, y = contrast
    noise = np.random.default_rng(5).normal(size=X.shape)
    probe = CCS(restarts=6).fit(
        noise[:200], y[:200]
    )  # the planted mistake: nothing to find, so that starts end apart
    scores = probe.each_start(noise[200:])[0]
    spread = [auroc(s, y[200:]) for s in scores]
    assert max(spread) - min(spread) > 0.02 and len(spread) == 6
    kept = int(probe.losses_[0].argmin())
    np.testing.assert_allclose(probe.decision_function(noise[200:]), scores[kept], atol=1e-9)
    assert 0.35 < auroc(probe.decision_function(noise[200:]), y[200:]) < 0.65
    other = CCS(restarts=6).fit(noise[:200], np.random.default_rng(6).permutation(y[:200]))
    np.testing.assert_allclose(
        np.abs(other.decision_function(noise[200:])),
        np.abs(probe.decision_function(noise[200:])),
        atol=1e-9,
    )


def test_a_network_reads_what_no_line_does():
    rng = np.random.default_rng(3)
    X = rng.choice([-1.0, 1.0], size=(600, 6)) + 0.2 * rng.normal(size=(600, 6))
    y = (X[:, 0] * X[:, 1] > 0).astype(int)
    assert (
        auroc(
            MLP(steps=300, penalty=1e-4).fit(X[:400], y[:400]).decision_function(X[400:]), y[400:]
        )
        > 0.95
    )
    assert 0.3 < auroc(Logistic().fit(X[:400], y[:400]).decision_function(X[400:]), y[400:]) < 0.7


@pytest.mark.parametrize("probe", [DepthConvolution, AllLayers])
def test_a_probe_of_all_layers_finds_what_is_in_one_and_gives_one_score_a_row(probe):
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, 300)
    X = rng.normal(size=(5, 300, 12))
    X[3] += 3 * np.outer(y, rng.normal(size=12))
    made = probe().fit(X[:, :200], y[:200])
    scores = made.decision_function(X[:, 200:])
    assert scores.shape == (100,) and auroc(scores, y[200:]) > 0.95
    np.testing.assert_allclose(
        [made.decision_function(X[:, i : i + 1])[0] for i in range(200, 210)],
        scores[:10],
        rtol=1e-4,
        atol=1e-5,
    )
    assert auroc(probe().fit(X[:, :200], 1 - y[:200]).decision_function(X[:, 200:]), y[200:]) < 0.05


def test_all_layers_is_scikit_learn_s_logistic_regression_on_the_states_side_by_side():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 2, 120)
    X = rng.normal(size=(3, 120, 10)) + y[None, :, None]
    wide = X.transpose(1, 0, 2).reshape(120, -1)
    wide = (wide - wide.mean(0)) / wide.std(0)
    expected = (
        LogisticRegression(C=0.01 / 3, max_iter=5000, tol=1e-10)
        .fit(wide, y)
        .decision_function(wide)
    )
    np.testing.assert_allclose(AllLayers().fit(X, y).decision_function(X), expected, atol=1e-4)


def test_the_dice_probe_is_at_the_minimum_of_its_loss():
    rng = np.random.default_rng(6)
    y = rng.integers(0, 2, 80).astype(float)
    X = rng.normal(size=(80, 4)) + 2 * np.outer(y, rng.normal(size=4))
    Z = (X - X.mean(0)) / X.std(0)

    def loss(v):
        p = expit(Z @ v[:4] + v[4])
        return 1 - 2 * (p * y).sum() / (p.sum() + y.sum()) + 0.01 * (v[:4] ** 2).mean()

    probe = Dice(steps=5000).fit(X, y)
    assert (
        loss(np.r_[probe.coef_[0], probe.intercept_[0]])
        < minimize(loss, np.zeros(5), method="BFGS").fun + 1e-3
    )


@pytest.mark.trap(36)
def test_dice_rewards_always_true_where_the_states_say_nothing():
    """The planted mistake: dice of .86 at an AUROC of one half, from a class that has 76 % of the rows."""
    rng = np.random.default_rng(7)
    y, X = (rng.random(1500) < 0.76).astype(int), rng.normal(size=(1500, 8))
    score = Dice().fit(X[:1000], y[:1000]).decision_function(X[1000:])
    said, truth = score > 0, y[1000:]
    dice = 2 * (said & (truth == 1)).sum() / (said.sum() + truth.sum())
    assert dice > 0.82 and 0.4 < auroc(score, truth) < 0.6
    assert (
        np.mean([(said == truth)[truth == k].mean() for k in (0, 1)]) < 0.6
    )  # what balanced accuracy says of it


@pytest.fixture(scope="module")
def lists() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(8)
    direction = rng.normal(size=6)
    X = rng.normal(size=(150, 1, 6)) * 10 + rng.normal(size=(150, 5, 6))
    return (
        X,
        (X - X.mean(1, keepdims=True)) @ direction * 0.1 + rng.normal(size=(150, 1)),
        direction,
    )


def test_listwise_ranking_finds_the_direction_and_sees_only_differences_within_a_prompt(lists):
    X, y, direction = lists
    probe = Listwise().fit(X, y)
    assert cosine(probe.coef_[0].numpy(), direction) > 0.95
    other = Listwise().fit(
        X + np.random.default_rng(0).normal(size=(150, 1, 6)) * 100, y + np.arange(150)[:, None]
    )
    np.testing.assert_allclose(other.coef_, probe.coef_, rtol=1e-3, atol=1e-6)


def test_listwise_ranking_is_at_the_minimum_of_listnet_s_cross_entropy(lists):
    X, y, _ = lists
    probe = Listwise(steps=2000).fit(X, y)
    inner = X - X.mean(1, keepdims=True)
    inner = inner / np.sqrt((inner**2).mean((0, 1)))
    goal = y - y.mean(1, keepdims=True)
    wanted = softmax(goal / goal.std(ddof=1), axis=1)
    loss = lambda w: (
        -(wanted * np.log(softmax(inner @ w, axis=1))).sum(1).mean() + 0.1 * (w**2).sum()
    )
    scale = np.sqrt(((X - X.mean(1, keepdims=True)) ** 2).mean((0, 1)))
    assert (
        loss(probe.coef_[0].numpy() * scale) < minimize(loss, np.zeros(6), method="BFGS").fun + 1e-4
    )


def test_listwise_ranking_refuses_draws_that_do_not_differ(lists):
    with pytest.raises(ValueError, match="draws differ"):
        Listwise().fit(lists[0], np.zeros((150, 5)))


def test_dual_input_is_scikit_learn_s_logistic_regression_on_both_draws_side_by_side():
    rng = np.random.default_rng(9)
    X = rng.normal(size=(200, 2, 5))
    move = X[:, 1, 0] - X[:, 0, 0]
    wide = X.reshape(200, -1)
    scaled = (wide - wide.mean(0)) / wide.std(0)
    expected = (
        LogisticRegression(C=0.01, max_iter=5000, tol=1e-10)
        .fit(scaled, move > 0)
        .decision_function(scaled)
    )
    probe = PairDual().fit(X, move)
    np.testing.assert_allclose(probe.decision_function(X), expected, atol=1e-4)
    assert auroc(probe.decision_function(X), (move > 0).astype(int)) > 0.95
