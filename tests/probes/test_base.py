"""What the probes share: labels, shapes, the register, scales and Adam."""

import numpy as np
import pandas as pd
import pytest
import torch

from dlk_utils.errors import DataError
from dlk_utils.probes import TTPD, Logistic, MeanDifference, base, fit_probe
from dlk_utils.probes.base import adam_descent, register
from dlk_utils.probes.scale import SCALES


@pytest.fixture(scope="module")
def states() -> tuple[np.ndarray, np.ndarray]:
    """States of neurons with different spreads, away from 0, and labels."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    X = rng.normal(size=(200, 12)) * np.arange(1, 13) + 5
    return X + np.outer(2 * y - 1, rng.normal(size=12)), y


@pytest.mark.parametrize("labels", [[1, 2], [-1, 1], [0, 0], [1, 1], [0, 1, 2]])
def test_labels_other_than_0_and_1_are_refused(labels):
    with pytest.raises(DataError, match="expected labels 0 and 1"):
        Logistic().fit(np.zeros((6, 3)), np.resize(labels, 6))


def test_states_with_too_many_axes_are_refused(states):
    X, y = states
    with pytest.raises(DataError, match=r"2 or 3 axes, got the shape \[1, 1, 200, 12\]"):
        Logistic().fit(X[None, None], y)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_states_that_are_not_finite_are_neither_fitted_nor_scored(states, value):
    X, y = states
    spoilt = X.copy()
    spoilt[3, 4] = value
    with pytest.raises(DataError, match="expected finite numbers, got nan or inf in 1 of 2400"):
        Logistic().fit(spoilt, y)
    with pytest.raises(DataError, match="expected finite numbers, got nan or inf in 1 of 2400"):
        Logistic().fit(X, y).predict(spoilt)


def test_a_probe_that_has_diverged_gives_no_scores(states):
    X, y = states
    probe = Logistic().fit(X, y)
    probe.coef_[0] = np.nan
    with pytest.raises(DataError, match="Logistic: expected finite scores"):
        probe.predict(X)


def test_read_only_arrays_are_taken_without_a_warning(states, recwarn):
    X, y = (values.copy() for values in states)
    X.flags.writeable = y.flags.writeable = False
    Logistic().fit(X, y).decision_function(X)
    assert not [warning for warning in recwarn if "writ" in str(warning.message)]


def test_a_registered_probe_is_listed_with_its_parameters_and_names_are_unique(monkeypatch):
    monkeypatch.setattr(base, "REGISTERED", {"state": {}, "pair": {}})
    register("state", "strong", Logistic, C=100.0)
    assert base.REGISTERED["state"]["strong"]().C == 100.0
    with pytest.raises(ValueError, match="'strong', which is taken"):
        register("pair", "strong", Logistic)


def test_a_probe_gets_the_columns_that_it_asks_for(states):
    X, y = states
    polarity = np.where(np.arange(200) % 3, 1, -1)
    rows = pd.DataFrame({"y": y, "polarity": polarity, "example_id": np.arange(200) // 2})
    np.testing.assert_array_equal(
        fit_probe(TTPD, X, rows).coef_, TTPD().fit(X, y, polarity=polarity).coef_
    )
    np.testing.assert_array_equal(
        fit_probe(TTPD, X, rows[["y"]], 1 - y).coef_, TTPD().fit(X, 1 - y).coef_
    )


def test_each_scale_does_what_its_name_says(states):
    X, y = states
    scaled = {}
    for how in SCALES:
        scale = Logistic(scale=how).fit(X, y).scale_
        scaled[how] = scale.transform(torch.tensor(X)[None])[0].numpy()
    np.testing.assert_array_equal(scaled["none"], X)
    np.testing.assert_allclose(scaled["neuron"], (X - X.mean(0)) / X.std(0))
    np.testing.assert_allclose(np.linalg.norm(scaled["row"], axis=1), 1)
    covariance = np.cov(scaled["whiten"].T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)


def test_a_scale_that_does_not_exist_is_refused(states):
    with pytest.raises(ValueError, match="scale: expected one of none, neuron, row, whiten"):
        Logistic(scale="rank").fit(*states)


@pytest.mark.parametrize("scale", ["none", "neuron", "whiten"])
def test_raw_weights_score_states_that_are_not_scaled(states, scale):
    X, y = states
    X = np.column_stack([X, np.full(200, 3.0)])  # a neuron that is constant
    probe = Logistic(scale=scale).fit(X, y)
    weight, bias = probe.raw_weights()
    np.testing.assert_allclose(
        X @ weight[0].numpy() + float(bias[0]), probe.decision_function(X), atol=1e-9
    )


def test_there_are_no_raw_weights_of_rows_scaled_to_length_1(states):
    with pytest.raises(ValueError, match="not linear"):
        Logistic(scale="row").fit(*states).raw_weights()


def descend_to(goal: torch.Tensor, n_steps: int) -> torch.Tensor:
    """Where Adam gets, from 0, when the loss is the squared distance to `goal`."""

    def loss(position: torch.Tensor) -> torch.Tensor:
        return ((position - goal) ** 2).sum(1)

    start = [torch.zeros_like(goal)]
    return adam_descent(start, loss, n_steps=n_steps, learning_rate=0.1)[0][0]


def test_adam_reaches_the_minimum_and_each_of_a_batch_gets_where_it_would_alone():
    goals = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    alone = torch.cat([descend_to(goal[None], 40) for goal in goals])
    torch.testing.assert_close(descend_to(goals, 40), alone)
    torch.testing.assert_close(descend_to(goals, 300), goals, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make_probe", [Logistic, MeanDifference])
def test_shapes_that_do_not_fit_together_are_refused_by_name(states, make_probe):
    X, y = states
    name = make_probe.__name__
    with pytest.raises(DataError, match=rf"{name}: expected y .* 200 rows.* \[5\]"):
        make_probe().fit(X, y[:5])
    with pytest.raises(DataError, match="expected numbers, got something else"):
        make_probe().fit(X, np.where(y, "a", "b"))
    with pytest.raises(DataError, match=f"{name}: expected a fitted probe"):
        make_probe().decision_function(X)
    with pytest.raises(DataError, match=rf"{name}: expected states of 12 neurons.*\[200, 3\]"):
        make_probe().fit(X, y).decision_function(X[:, :3])
