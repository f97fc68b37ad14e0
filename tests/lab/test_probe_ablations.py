"""Tables of notebook 05 on planted states: gains, scales, heads, starts of CCS, three classes."""

import numpy as np
import pandas as pd
import pytest
from planted_states import read_from, states_that_hold_y, twins

from dlk_utils.evaluation.tasks import KNOWN, LYING, Task, make_task
from dlk_utils.lab.findings import gradient_adds, gradient_lines
from dlk_utils.lab.tables.probe_ablations import (
    CLASSES,
    best_heads_table,
    class_report,
    class_rows,
    curve_lines,
    curve_table,
    gain_table,
    head_table,
    restart_table,
    scale_table,
    split_heads,
    turn_lines,
)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return twins()


@pytest.fixture(scope="module")
def task(rows) -> Task:
    return make_task(rows, "truth", LYING)


def test_what_a_feature_adds_is_zero_for_the_state_itself_and_for_a_copy_of_it(rows, task):
    state, noise = states_that_hold_y(rows, 0.6), states_that_hold_y(rows, 0.0, seed=1)
    features = {
        ("activation", "resid_post", 2): state,
        ("gradient", "resid_post", 2): noise,
        ("both", "resid_post", 2): lambda some: np.concatenate([state(some), state(some)], axis=1),
        ("activation", "mlp_out", 2): noise,
    }
    table = gain_table(task, features).set_index(["site", "feature"])
    of_itself = table.loc[("resid_post", "activation")]
    assert of_itself.gain == of_itself.gain_low == of_itself.gain_high == 0
    assert abs(table.gain["resid_post", "both"]) < 0.02
    assert table.gain_high["resid_post", "gradient"] < 0
    assert table.over_residual["mlp_out", "activation"] == pytest.approx(
        table.estimate["mlp_out", "activation"] - table.estimate["resid_post", "activation"]
    )
    assert (table.gain_low <= table.gain + 1e-9).all()
    assert (table.gain <= table.gain_high + 1e-9).all()


def test_features_of_a_site_are_compared_at_the_layer_of_its_activation(rows, task):
    weak, strong = states_that_hold_y(rows, 0.0), states_that_hold_y(rows, 1.0, seed=1)
    features = {
        ("gradient", "resid_post", 1): strong,
        ("gradient", "resid_post", 2): weak,
        ("activation", "resid_post", 1): weak,
        ("activation", "resid_post", 2): strong,
    }
    table = gain_table(task, features).set_index("feature")
    assert list(table.layer) == [2, 2]
    assert table.estimate["activation"] > 0.9 and table.estimate["gradient"] < 0.7


def test_features_scales_and_curves_are_read_where_the_state_agrees_most_between_twins(rows, task):
    states = {
        1: states_that_hold_y(rows.assign(y=rows.answer), 1.0, seed=1),
        2: states_that_hold_y(rows, 1.0, seed=2),
    }
    features = {
        (feature, "resid_post", layer): state
        for feature in ("activation", "gradient", "both")
        for layer, state in states.items()
    }
    gains = gain_table(task, features)
    assert (gains.layer == 2).all() and gains.estimate.min() > 0.9
    activations = {key: read for key, read in features.items() if key[0] == "activation"}
    scales = scale_table(task, activations)
    assert (scales.layer == 2).all() and scales.estimate.min() > 0.9
    lies = make_task(rows, "truth", "by example, lie rows")
    table = curve_table({"honest rows": task, "rows told to lie": lies}, features)
    chosen = table[table.chosen].groupby("fitted_on").layer.unique()
    # Fitted on lies, the earlier layer serves as well, and the earlier rule takes it.
    assert list(chosen["honest rows"]) == [2] and list(chosen["rows told to lie"]) == [1]


@pytest.fixture(scope="module")
def curves(rows, task) -> pd.DataFrame:
    """States hold the truth at layer 2; gradients hold the answer, and nothing else."""
    answers = states_that_hold_y(rows.assign(y=rows.answer), 1.5, seed=3)
    features = {}
    for layer, strength in ((1, 0.0), (2, 0.5)):
        state = states_that_hold_y(rows, strength, seed=layer)
        features["activation", "resid_post", layer] = state
        features["gradient", "resid_post", layer] = answers
        features["both", "resid_post", layer] = lambda some, state=state: np.concatenate(
            [state(some), answers(some)], axis=1
        )
    tasks = {
        "honest rows": task,
        "rows told to lie": make_task(rows, "truth", "by example, lie rows"),
    }
    return curve_table(tasks, features)


def test_a_gradient_that_holds_the_answer_misleads_where_the_answer_was_the_truth(curves):
    table = curves.set_index(["fitted_on", "feature", "layer"]).sort_index()
    assert len(table) == 2 * 3 * 2 and set(curves.layer[curves.chosen]) == {2}
    honest, lies = (
        table.loc[(name, "gradient", 2)] for name in ("honest rows", "rows told to lie")
    )
    assert honest.estimate < 0.1 and honest.own_answer > 0.9 and honest.gain_high < 0
    # The answer is the opposite of the truth on every row told to lie.
    assert lies.estimate > 0.9 and lies.own_answer == pytest.approx(1 - lies.estimate)
    state = table.xs("activation", level="feature")
    assert (state[["gain", "gain_low", "gain_high"]] == 0).all(axis=None)
    assert table.gain_low["rows told to lie", "both", 1] > 0
    assert (table.gain_low <= table.gain + 1e-9).all()
    assert (table.gain <= table.gain_high + 1e-9).all()


def test_what_is_said_of_the_gradient_follows_from_its_intervals(curves):
    said = gradient_adds(curves)
    [honest, _] = curves[curves.chosen & (curves.feature == "both")].itertuples()
    lost = f"{-honest.gain:.2f} [{-honest.gain_high:.2f}, {-honest.gain_low:.2f}]"
    assert (
        f"Fitted on honest rows, adding the gradient to the state lowers the AUROC by {lost}"
        in said
    )
    raised = curves.assign(gain=0.2, gain_low=0.1, gain_high=0.3)
    assert gradient_adds(raised).endswith("raises the AUROC by 0.20 [0.10, 0.30] (layer 2)")
    of_honest, of_lies = gradient_lines(curves)
    assert of_honest.startswith("Fitted on honest rows, at layer 2: state ")
    assert of_lies.startswith("Fitted on rows told to lie, at layer 2: ")
    silent = gradient_lines(curves.assign(own_answer=np.nan))
    assert all("answer about to be given" not in line for line in silent)
    assert "As a score of the answer about to be given, the gradient alone has AUROC " in of_honest
    reversed_scores = gradient_lines(curves.assign(own_answer=1 - curves.own_answer))
    assert [": it predicts the opposite." in line for line in reversed_scores] == [
        ": it predicts the opposite." not in line for line in (of_honest, of_lies)
    ]
    unclear = curves.assign(gain_low=-0.1, gain_high=0.1)
    assert "does not clearly change the AUROC (" in gradient_adds(unclear)
    assert gradient_adds(curve_table({}, {})) == "not scored"
    assert gradient_lines(curve_table({}, {})) == [] and curve_lines(curve_table({}, {})).empty


@pytest.mark.slow
@pytest.mark.parametrize("strength, least, most", [(1.0, 0.9, 1.0), (0.0, 0.3, 0.7)])
def test_every_scale_reads_what_is_planted_and_noise_stays_noise(rows, task, strength, least, most):
    features = {
        ("activation", "resid_post", 1): states_that_hold_y(rows, 0.0, seed=1),
        ("activation", "resid_post", 2): states_that_hold_y(rows, strength, seed=2),
    }
    table = scale_table(task, features)
    assert list(table.scale) == ["none", "neuron", "row", "whiten"]
    assert table.estimate.between(least, most).all()
    if strength:
        assert (table.layer == 2).all()


def test_the_head_that_holds_the_class_ranks_first_and_is_read_with_the_best(rows, task):
    loud = states_that_hold_y(rows, 2.0, width=6)
    quiet = states_that_hold_y(rows, 0.0, width=18, seed=1)
    side_by_side = {
        ("activation", "head_out", 0): lambda some: np.hstack([0 * loud(some), quiet(some)]),
        ("activation", "head_out", 1): lambda some: np.hstack([quiet(some), loud(some)]),
    }
    heads = split_heads(side_by_side, 4)
    ranked = head_table(task, heads)
    first = ranked.iloc[0]
    assert (first.layer, first["head"]) == (1, 3) and first.estimate > 0.9
    assert len(ranked) == 8 and ranked.validation.is_monotonic_decreasing
    assert ranked.estimate[1:].max() < 0.7

    together = best_heads_table(task, heads, ranked)
    assert list(together.heads) == [1, 4] and together.selected.sum() == 1
    assert (together.estimate > 0.85).all()
    assert (together.low <= together.estimate).all() and (together.estimate <= together.high).all()


def test_every_start_of_ccs_is_listed_and_the_one_with_the_lowest_loss_is_kept(rows, task):
    rng = np.random.default_rng(3)
    direction = rng.normal(size=24)
    states = {}
    for row in rows.itertuples():
        is_right = np.array([[row.y == 0], [row.y == 1]])
        states[row.row_id] = np.where(is_right, 2, -2) * direction + rng.normal(size=(2, 24))
    table = restart_table(task, {("contrast", "resid_post", 5): read_from(states)})
    [kept] = table[table.kept].itertuples()
    assert len(table) == 10 and kept.loss == table.loss.min() and kept.estimate > 0.9


def three_class_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of which some are unknown, and some confused, which belong to no class."""
    rng = np.random.default_rng(1)
    by_role = np.where(rows.role == "lie", "lie", "correct")
    kind = np.where(rng.random(len(rows)) < 0.3, "unknown", by_role)
    return rows.assign(three_class=np.where(rng.random(len(rows)) < 0.05, "confused", kind))


def test_confused_rows_belong_to_no_class(rows):
    scored = three_class_rows(rows)
    classes = class_rows(scored)
    assert set(classes.y) == set(CLASSES)
    assert len(classes) == (scored.three_class != "confused").sum()


def test_three_classes_are_told_apart_where_they_are_planted_beyond_majority_and_instruction(rows):
    rng = np.random.default_rng(1)
    classes = class_rows(three_class_rows(rows))
    planted = 3 * np.eye(3)[classes.y.map(list(CLASSES).index)] + rng.normal(size=(len(classes), 3))
    features = {
        ("activation", "resid_post", 0): lambda some: rng.normal(size=(len(some), 3)),
        ("activation", "resid_post", 1): read_from(dict(zip(classes.row_id, planted, strict=True))),
    }
    report = class_report(classes, features).set_index(["method", "class"])
    assert report.f1["softmax regression", "macro avg"] > 0.85
    assert report.layer["softmax regression", "truth"] == 1
    assert report.f1["majority", "macro avg"] < 0.3
    assert report.f1["instruction only", "unknown"] < 0.6
    counts = classes[classes.split == "test"].y.value_counts()
    assert report.rows["majority"][list(CLASSES)].to_dict() == counts.to_dict()


def test_with_a_class_missing_the_report_is_empty_and_says_why(rows):
    classes = class_rows(three_class_rows(rows))
    report = class_report(classes[classes.y != "unknown"], {})
    assert report.empty and "f1" in report
    assert report.attrs["too_few_rows"].startswith(
        "three classes: expected rows of each class, at least"
    )


def test_without_a_validation_row_three_classes_are_not_scored(rows):
    classes = class_rows(three_class_rows(rows))
    report = class_report(classes[classes.split != "validation"], {})
    assert report.empty and "1 rows in all in validation" in report.attrs["too_few_rows"]


def test_controls_of_the_turn_are_flat_lines_without_an_interval():
    results = pd.DataFrame(
        {
            "target": "truth",
            "regime": KNOWN,
            "probe": ["logistic", "logistic", "own answer", "mlp"],
            "feature": ["activation", "activation", "", "activation"],
            "site": ["resid_post", "resid_post", "", "resid_post"],
            "layer": [0, 9, -1, 9],
            "estimate": [0.7, 0.9, 0.1, 0.8],
            "low": 0.0,
            "high": 1.0,
        }
    )
    lines = turn_lines(results).groupby("line")
    assert lines.layer.apply(list).to_dict() == {
        "residual stream": [0, 9],
        "the model's answer": [0, 9],
    }
    assert lines.get_group("the model's answer")[["low", "high"]].isna().all(axis=None)
