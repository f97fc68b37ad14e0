"""Fitting all layers at once and choosing one on validation rows."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.selection import (
    BY_TWINS,
    EARLIEST,
    FittingRows,
    choose_by_twins,
    fit_layers,
    in_memory,
    stack_layers,
)
from dlk_utils.evaluation.stats import auroc
from dlk_utils.probes import STACK_PROBES, Logistic, MeanDifference

N = 120
STRENGTHS = {4: 0.0, 8: 3.0, 12: 0.5}
"""How strongly the states at each layer hold the class."""


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"example_id": [f"e{i}" for i in range(N)], "y": rng.permutation(np.arange(N) % 2)}
    )


@pytest.fixture(scope="module")
def features(rows) -> dict:
    rng = np.random.default_rng(1)
    direction = rng.normal(size=6)
    features = {}
    for layer, strength in STRENGTHS.items():
        states = rng.normal(size=(N, 6)) + strength * np.outer(2 * rows.y - 1, direction)
        features["activation", "resid_post", layer] = lambda part, X=states: X[part.index]
    return features


def test_layers_are_stacked_in_the_order_of_the_features(rows, features):
    part = rows.iloc[[7, 3]]
    stack = stack_layers(features, part)
    assert stack.shape == (3, 2, 6)
    for X, read in zip(stack, features.values(), strict=True):
        np.testing.assert_array_equal(X, read(part))


def test_the_layer_that_holds_the_class_is_chosen_and_scores_as_the_probe_alone(rows, features):
    train, validation, test = rows[:60], rows[60:90], rows[90:]
    fit = fit_layers(Logistic, features, train, validation)
    assert fit.layer == 8 and fit.keys[fit.chosen] == ("activation", "resid_post", 8)
    alone = Logistic().fit(features["activation", "resid_post", 8](train), train.y.to_numpy())
    expected = alone.decision_function(features["activation", "resid_post", 8](test))
    np.testing.assert_allclose(fit.score(test), expected)
    np.testing.assert_array_equal(fit.score(test), fit.score_layers(test)[fit.chosen])
    y = validation.y.to_numpy()
    assert list(fit.validation_aurocs) == [auroc(s, y) for s in fit.validation_scores]


def test_rows_can_be_scored_with_features_from_elsewhere(rows, features):
    fit = fit_layers(MeanDifference, features, rows[:60], rows[60:90])
    test = rows[90:]
    negated = {key: lambda part, read=read: -read(part) for key, read in features.items()}
    assert auroc(fit.score(test), test.y.to_numpy()) > 0.9
    assert auroc(fit.score(test, negated), test.y.to_numpy()) < 0.1


def test_a_probe_can_learn_other_labels_than_the_class(rows, features):
    turned = 1 - rows.y[:60].to_numpy()
    fit = fit_layers(MeanDifference, features, rows[:60], rows[60:90], y=turned)
    assert fit.validation_aurocs.min() < 0.1


@pytest.mark.parametrize("layers", [[8], [4, 8, 12]])
def test_a_probe_of_all_layers_has_one_score_a_row_and_no_layer_number(rows, features, layers):
    some_layers = {key: read for key, read in features.items() if key[2] in layers}
    fit = fit_layers(STACK_PROBES["all_layers"], some_layers, rows[:60], rows[60:90])
    assert fit.layer == -1 and fit.validation_scores.shape == (1, 30)
    assert fit.score(rows[90:]).shape == (30,)


def test_probes_fitted_to_the_same_rows_are_what_each_is_alone(rows, features):
    train, validation, test = rows[:60], rows[60:90], rows[90:]
    fitting_rows = FittingRows.read(features, train, validation)
    for make_probe in (Logistic, MeanDifference, partial(Logistic, C=1.0)):
        together = fitting_rows.fit(make_probe)
        alone = fit_layers(make_probe, features, train, validation)
        assert together.layer == alone.layer
        np.testing.assert_array_equal(together.score_layers(test), alone.score_layers(test))


def test_states_that_were_read_into_memory_are_those_of_the_rows(rows, features):
    with_ids = rows.assign(row_id=rows.example_id)
    part = with_ids.iloc[[7, 3, 50]]
    read_once = in_memory(features, with_ids)
    assert list(read_once) == list(features)
    np.testing.assert_array_equal(stack_layers(read_once, part), stack_layers(features, part))


TRUTH_LAYER, ANSWER_LAYER = 5, 9


@pytest.fixture(scope="module")
def twins() -> pd.DataFrame:
    """Rows of 200 examples told to tell the truth and to lie; the model does as it is told."""
    rng = np.random.default_rng(0)
    examples = pd.DataFrame(
        {"example_id": [f"e{i}" for i in range(200)], "y": rng.integers(0, 2, 200)}
    )
    return pd.concat(
        [
            examples.assign(role="truth", answer=examples.y),
            examples.assign(role="lie", answer=1 - examples.y),
        ],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def fitted_on_honest_rows(twins):
    """A probe of which one layer holds the truth, and a later one, more clearly, the answer."""
    rng = np.random.default_rng(1)
    features = {}
    for layer, column, strength in ((TRUTH_LAYER, "y", 2.5), (ANSWER_LAYER, "answer", 4.0)):
        states = rng.normal(size=(len(twins), 6))
        states[:, 0] += strength * (twins[column] - 0.5)
        features["activation", "resid_post", layer] = lambda part, X=states: X[part.index]
    return fit_layers(Logistic, features, twins[:100], twins[100:200])


def test_twins_choose_the_layer_of_the_truth_where_honest_rows_choose_that_of_the_answer(
    twins, fitted_on_honest_rows
):
    assert fitted_on_honest_rows.layer == ANSWER_LAYER
    others = twins[~twins.example_id.isin(twins.example_id[:100])]
    by_twins = choose_by_twins(fitted_on_honest_rows, others, within=0.2)
    assert by_twins.layer == TRUTH_LAYER
    lying = twins[300:]
    assert auroc(by_twins.score(lying), lying.y.to_numpy()) > 0.8
    assert auroc(fitted_on_honest_rows.score(lying), lying.y.to_numpy()) < 0.2
    # A layer that is too far below the best is not chosen, however well its twins agree.
    assert choose_by_twins(fitted_on_honest_rows, others, within=0.0).layer == ANSWER_LAYER


def test_twins_choose_without_a_label_and_in_any_order(twins, fitted_on_honest_rows):
    others = twins[~twins.example_id.isin(twins.example_id[:100])]
    unlabelled = others[["example_id", "role"]].sample(frac=1, random_state=0)
    # Neither rows without their twin nor rows of other roles count.
    more = pd.concat([unlabelled.iloc[1:], twins[:5].assign(role="known")])
    assert choose_by_twins(fitted_on_honest_rows, more, within=0.2).layer == TRUTH_LAYER


@pytest.fixture(scope="module")
def answer_before_truth(twins) -> dict:
    """An early layer that holds the answer, and a late one that holds the truth as clearly."""
    rng = np.random.default_rng(2)
    features = {}
    for layer, column in ((3, "answer"), (TRUTH_LAYER, "y")):
        states = rng.normal(size=(len(twins), 6))
        states[:, 0] += 6 * (twins[column] - 0.5)
        features["activation", "resid_post", layer] = lambda part, X=states: X[part.index]
    return features


def test_probes_that_are_given_twins_are_read_where_these_agree_most(twins, answer_before_truth):
    train, validation, told_to_lie = twins[:100], twins[100:200], twins[300:]
    without = fit_layers(Logistic, answer_before_truth, train, validation)
    assert (without.layer, without.rule) == (3, EARLIEST)
    # The twins have no class at all.
    unlabelled = told_to_lie[["example_id", "role"]].sample(frac=1, random_state=0)
    by_twins = fit_layers(Logistic, answer_before_truth, train, validation, twins=unlabelled)
    assert (by_twins.layer, by_twins.rule) == (TRUTH_LAYER, BY_TWINS)
    # It is the layer that `choose_by_twins` takes afterwards.
    assert choose_by_twins(without, pd.concat([validation, unlabelled])).layer == TRUTH_LAYER


def test_with_too_few_twins_the_earlier_rule_chooses(twins, answer_before_truth):
    train, validation = twins[:100], twins[100:200]
    for n_twins, rule in ((4, BY_TWINS), (3, EARLIEST), (0, EARLIEST)):
        few = twins[300 : 300 + n_twins]
        assert fit_layers(
            MeanDifference, answer_before_truth, train, validation, twins=few
        ).rule == (rule)
    # Rows of other examples are no twins.
    others = twins[200:300]
    fitted = fit_layers(MeanDifference, answer_before_truth, train, validation, twins=others)
    assert fitted.rule == EARLIEST


def test_resamples_choose_by_the_rule_that_chose(twins, answer_before_truth):
    parts = (answer_before_truth, twins[:100], twins[100:200])
    for told_to_lie, layer in ((None, 0), (twins[300:], 1)):
        rows = FittingRows.read(*parts, told_to_lie)
        chosen = rows.choose_again(rows.fit(MeanDifference), n_boot=50, seed=0)
        assert np.mean(chosen == layer) > 0.9 and len(chosen) == 50


def test_with_hardly_any_twins_no_layer_is_chosen(twins, fitted_on_honest_rows):
    with pytest.raises(TooFewRows, match=r"at least 4 examples .* got 0"):
        choose_by_twins(fitted_on_honest_rows, twins[twins.role == "truth"])
