"""The table of results: every probe next to its controls, with honest intervals."""

import numpy as np
import pandas as pd
import pytest
from planted_rows import (
    DIRECTION,
    TRUTH,
    WIDTH,
    evaluate_planted,
    features_of,
    make_rows,
    planted_states,
    row_of,
)
from scipy.stats import binom

from dlk_utils.evaluation.controls import (
    ORIENTED,
    TOLD_TO_LIE_PROBE,
    TOLD_TO_LIE_WORDS,
    TRUTH_TIMES_TURN,
    TURNED,
)
from dlk_utils.evaluation.evaluate import (
    RESULT_COLUMNS,
    evaluate,
    evaluate_targets,
    skipped_tasks,
)
from dlk_utils.evaluation.selection import BY_TWINS, EARLIEST
from dlk_utils.evaluation.tasks import (
    KNOWN,
    LYING,
    POSITIVE_CONTROL,
    REGIMES,
    make_targets,
    make_task,
)
from dlk_utils.probes import MORE_STATE_PROBES, PAIR_PROBES, STACK_PROBES, STATE_PROBES

CONTROLS = {
    *("shuffled labels", "random direction", "first layer", "majority", "own answer"),
    *("instruction only", "metadata", "length", "TF-IDF", "TF-IDF, question only"),
    *(TURNED, ORIENTED),
}


@pytest.fixture(scope="module")
def planted() -> pd.DataFrame:
    """Results with all methods, where the middle one of three layers holds the class best."""
    return evaluate_planted(make_rows(), (0.0, 4.0, 1.5))


def leave_two_methods(patch: pytest.MonkeyPatch) -> None:
    """Fit only logistic regression and the mean difference, which are quick."""
    for name in ("MORE_STATE_PROBES", "STACK_PROBES"):
        patch.setattr(f"dlk_utils.evaluation.evaluate.{name}", {})
    few = {name: STATE_PROBES[name] for name in ("logistic", "mean_difference")}
    patch.setattr("dlk_utils.evaluation.evaluate.STATE_PROBES", few)


@pytest.fixture
def few_methods(monkeypatch) -> None:
    leave_two_methods(monkeypatch)


def test_the_table_has_every_probe_and_all_controls(planted):
    assert list(planted.columns) == RESULT_COLUMNS
    probes, controls = planted[planted.kind == "probe"], planted[planted.kind == "control"]
    one_layer = STATE_PROBES | MORE_STATE_PROBES
    assert set(controls.probe) == CONTROLS and len(controls) == len(CONTROLS)
    assert set(probes.probe) == set(one_layer | STACK_PROBES)
    assert len(probes) == 3 * len(one_layer) + len(STACK_PROBES)
    assert (planted.low <= planted.estimate).all() and (planted.estimate <= planted.high).all()
    assert (planted.n == 120).all() and (planted.n_train == 120).all()
    assert planted.accuracy.between(0, 1).all()


def test_one_layer_is_selected_for_each_probe_and_by_validation(planted):
    probes = planted[planted.kind == "probe"]
    for name, layers in probes.groupby("probe"):
        assert layers.validation[layers.selected].item() == layers.validation.max()
        assert (layers.compared == len(layers)).all()
        assert len(layers) == (1 if name in STACK_PROBES else 3)
    assert set(probes.layer[probes.selected]) == {1, -1}


def test_what_is_planted_is_found_and_stands_above_its_controls(planted):
    for probe in ("logistic", "mean_difference"):
        found = row_of(planted, probe, 1)
        assert found.estimate > 0.9 and found.low > 0.8 and found.accuracy > 0.8
        assert found.lift_low > 0


def test_the_lift_is_the_difference_from_the_best_control(planted):
    controls = planted[planted.kind == "control"]
    best = controls.loc[controls.estimate.idxmax()]
    selected = planted[(planted.kind == "probe") & planted.selected]
    assert (selected.best_control == best.probe).all()
    np.testing.assert_allclose(selected.lift, selected.estimate - best.estimate)
    assert (selected.lift_low <= selected.lift).all()
    assert (selected.lift <= selected.lift_high).all()
    others = planted[~planted.index.isin(selected.index)]
    assert others.lift.isna().all() and (others.best_control == "").all()


@pytest.mark.slow
@pytest.mark.trap(33)
def test_where_nothing_is_planted_all_sit_at_one_half():
    table = evaluate_planted(make_rows(600), (0.0, 0.0))
    assert (table.estimate - 0.5).abs().max() < 0.12
    assert abs(row_of(table, "shuffled labels").estimate - 0.5) < 0.06
    # so many 95 % intervals may miss one half, on either side
    may_miss = binom.ppf(0.975, len(table), 0.025)
    assert (table.low > 0.5).sum() <= may_miss and (table.high < 0.5).sum() <= may_miss


def test_the_same_seed_gives_the_same_table(few_methods):
    rows = make_rows(120)
    first, second = (evaluate_planted(rows, (1.0,), seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.trap(34)
def test_a_probe_whose_direction_turns_on_test_scores_under_one_half(few_methods):
    rows = make_rows()
    states = planted_states(rows, 4.0)
    for row_id in rows.row_id[rows.split == "test"]:
        states[row_id] = -states[row_id]
    table = evaluate(make_task(rows, "truth", TRUTH), features_of(states), n_boot=100)
    assert row_of(table, "mean_difference").estimate < 0.2
    assert row_of(table, "mean_difference").validation > 0.8


@pytest.mark.trap(40)
def test_the_layer_that_is_best_on_test_only_is_not_selected(few_methods):
    rows = make_rows()
    steady, misleading = planted_states(rows, 2.0), planted_states(rows, 6.0, 1)
    rng = np.random.default_rng(0)
    for row_id in rows.row_id[rows.split == "validation"]:
        misleading[row_id] = rng.normal(size=WIDTH)
    task = make_task(rows, "truth", TRUTH)
    table = evaluate(task, features_of(steady, misleading), n_boot=100)
    for probe in ("logistic", "mean_difference"):
        by_layer = table[table.probe == probe].set_index("layer")
        assert by_layer.estimate[1] > by_layer.estimate[0]
        assert by_layer.selected[0] and not by_layer.selected[1]


def test_the_control_of_the_first_layer_reads_the_first_layer_and_no_other(few_methods):
    rows = make_rows()
    loud_first = evaluate_planted(rows, (4.0, 0.0))
    loud_later = evaluate_planted(rows, (0.0, 4.0))
    assert row_of(loud_first, "first layer").estimate > 0.9
    assert row_of(loud_later, "first layer").estimate < 0.7
    assert row_of(loud_later, "first layer").layer == 0


@pytest.mark.trap(41)
def test_a_threshold_that_does_not_carry_over_shows_in_the_accuracy_and_not_in_the_auroc(
    few_methods,
):
    rows = make_rows()
    states = planted_states(rows, 4.0)
    # the planted mistake: all test states lie further along, as under another instruction
    for row_id in rows.row_id[rows.split == "test"]:
        states[row_id] = states[row_id] + 30 * DIRECTION
    table = evaluate(make_task(rows, "truth", TRUTH), features_of(states), n_boot=100)
    found = row_of(table, "mean_difference")
    assert found.estimate > 0.9 and found.validation_accuracy > 0.8
    assert found.balanced_accuracy == pytest.approx(0.5, abs=0.05)


@pytest.mark.trap(37)
def test_an_accuracy_is_taken_at_the_threshold_of_train_and_not_at_one_half(few_methods):
    rows = make_rows()
    # the planted mistake: scores along the direction of the class all lie far above one half
    states = {i: 30 * x + 400 for i, x in planted_states(rows, 6.0).items()}
    table = evaluate(make_task(rows, "truth", TRUTH), features_of(states), n_boot=100)
    assert row_of(table, "mean_difference").balanced_accuracy > 0.9


@pytest.mark.trap(39)
def test_rows_of_one_example_do_not_narrow_the_interval(few_methods):
    rows = make_rows(200)
    states = planted_states(rows, 1.5)
    test = rows[rows.split == "test"]
    copies = [test.assign(row_id=test.row_id + f" copy {k}") for k in range(4)]
    for copy in copies:
        states |= {row.row_id: states[row.example_id] for row in copy.itertuples()}

    def logistic_with(more_rows: list[pd.DataFrame]) -> pd.Series:
        task = make_task(pd.concat([rows, *more_rows], ignore_index=True), "truth", TRUTH)
        return row_of(evaluate(task, features_of(states), n_boot=300), "logistic")

    one, five = logistic_with([]), logistic_with(copies)
    assert five.n == 5 * one.n
    assert (five.estimate, five.low, five.high) == pytest.approx((one.estimate, one.low, one.high))
    strangers = logistic_with([copy.assign(example_id=copy.row_id) for copy in copies])
    assert strangers.high - strangers.low < 0.7 * (one.high - one.low)


def test_pairs_have_their_own_probes_and_the_same_controls():
    rng = np.random.default_rng(0)
    rows = make_rows()
    rows["p1_draw0"], rows["p1_draw1"] = rng.uniform(size=(2, len(rows)))
    rows["move"] = (rows.p1_draw1 - rows.p1_draw0) * (2 * rows.label - 1)
    rows["y"] = (rows.move > 0).astype(int)
    direction = rng.normal(size=8)
    pairs = {}
    for row in rows.itertuples():
        first = rng.normal(size=8)
        pairs[row.row_id] = np.stack([first, first + rng.normal(size=8) + 4 * row.move * direction])
    features = features_of(pairs, feature="two draws")
    table = evaluate(make_task(rows, "pair", TRUTH), features, n_boot=100)
    assert set(table.probe[table.kind == "probe"]) == set(PAIR_PROBES)
    assert set(table.probe[table.kind == "control"]) == CONTROLS | {TRUTH_TIMES_TURN}
    assert table.estimate[table.kind == "probe"].min() > 0.9


def rows_of_all_roles() -> pd.DataFrame:
    parts = [make_rows(100).assign(role=role) for role in ("truth", "lie")]
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(row_id=rows.row_id + rows.role, knows=True)


def test_every_target_is_evaluated_in_every_regime_that_has_enough_rows(few_methods):
    rows = rows_of_all_roles()
    unknown = rows.assign(knows=False)
    features = features_of(planted_states(rows, 1.0))
    table = evaluate_targets({"truth": unknown}, lambda target: features)
    assert set(table.regime) == set(REGIMES) - {KNOWN}
    [sentence] = skipped_tasks({"truth": unknown})
    assert (
        sentence.startswith(f"truth, {KNOWN}: ")
        and "ask for more examples (n_examples)" in sentence
    )
    task = make_task(unknown, "truth", LYING)
    expected = evaluate(task, features)
    found = table[table.regime == LYING]
    # these two need training rows of the other regimes
    of_both_roles = found.probe.isin([TOLD_TO_LIE_PROBE, TOLD_TO_LIE_WORDS])
    assert of_both_roles.sum() == 2
    metrics = [column for column in RESULT_COLUMNS if not column.startswith(("best", "lift"))]
    pd.testing.assert_frame_equal(
        found.loc[~of_both_roles, metrics].reset_index(drop=True), expected[metrics]
    )


def test_without_enough_rows_the_table_is_empty_and_every_task_has_its_sentence():
    rows = rows_of_all_roles().head(20)
    table = evaluate_targets({"truth": rows, "lie": rows}, lambda target: {})
    assert table.empty and list(table.columns) == RESULT_COLUMNS
    assert len(skipped_tasks({"truth": rows, "lie": rows})) == len(REGIMES) + 1


@pytest.mark.slow
def test_an_interval_with_the_choice_is_wide_where_validation_cannot_tell_layers_apart():
    rows = make_rows(200)
    # On test rows the second layer holds the class the other way round.
    turned = rows.assign(y=np.where(rows.split == "test", 1 - rows.y, rows.y))
    features = features_of(planted_states(rows, 2.0), planted_states(turned, 2.0, seed=1))
    table = evaluate(make_task(rows, "truth", TRUTH), features, n_boot=200)
    chosen = table[(table.probe == "logistic") & table.selected].iloc[0]
    assert chosen.layer == 0 and chosen.low > 0.6
    assert chosen.choice_low < 0.4 and chosen.lift_low < chosen.low - chosen.estimate + chosen.lift
    others = table[(table.probe == "logistic") & ~table.selected]
    assert others.choice_low.isna().all()


def test_a_probe_that_reads_all_layers_has_no_choice_to_put_into_an_interval(planted):
    probes = planted[planted.probe.isin(STACK_PROBES)]
    assert (probes.choice_low == probes.low).all() and (probes.choice_high == probes.high).all()


def test_with_one_layer_there_is_no_choice_to_put_into_an_interval(few_methods):
    table = evaluate_planted(make_rows(200), (1.0,))
    probes = table[table.kind == "probe"]
    assert (probes.choice_low == probes.low).all() and (probes.choice_high == probes.high).all()
    assert table.choice_low[table.kind == "control"].isna().all()


def obedient_twins() -> pd.DataFrame:
    """Rows of 200 examples told to tell the truth and to lie; the model does as it is told."""
    examples = make_rows(200)
    roles = [examples.assign(role=role, row_id=examples.row_id + role) for role in ("truth", "lie")]
    rows = pd.concat(roles, ignore_index=True)
    answer = np.where(rows.role == "lie", 1 - rows.label, rows.label)
    return rows.assign(
        answer=answer,
        margin=2.0 * answer - 1,
        readable=True,
        knows=True,
        lied=rows.role == "lie",
        choices=[["no", "yes"]] * len(rows),
    )


def answer_before_truth(rows: pd.DataFrame) -> dict:
    """An early layer that holds the answer, and a late one that holds the label as clearly."""
    answers = planted_states(rows.assign(y=rows.answer), 8.0, seed=1)
    return features_of(answers, planted_states(rows.assign(y=rows.label), 8.0, seed=2))


@pytest.fixture(scope="module")
def by_target() -> pd.DataFrame:
    """Results of all targets, where `answer_before_truth`, by few methods."""
    rows = obedient_twins()
    features = answer_before_truth(rows)
    targets = make_targets(rows)
    del targets["lie"]  # every row of it is a lie
    with pytest.MonkeyPatch.context() as patch:
        leave_two_methods(patch)
        return evaluate_targets(targets, lambda target: features)


def test_truth_is_read_where_twins_agree_and_not_at_the_earlier_layer_of_the_answer(by_target):
    of_truth = by_target[(by_target.target == "truth") & by_target.selected]
    probes = of_truth[(of_truth.kind == "probe") & (of_truth.regime == LYING)]
    assert (probes.layer == 1).all() and (probes.rule == BY_TWINS).all()
    assert probes.estimate.min() > 0.9
    # Nearly all resamples of the examples choose this layer too.
    assert probes.choice_low.min() > 0.9
    assert (of_truth.rule[of_truth.kind == "control"] == "").all()


def test_other_targets_and_probes_fitted_on_lies_are_read_at_the_earliest_good_layer(by_target):
    probes = by_target[(by_target.kind == "probe") & by_target.selected]
    rules = probes.groupby(["target", "regime"]).rule.unique()
    for (target, regime), rule in rules.items():
        fitted_on_honest_rows = REGIMES[regime][0] == "truth"
        of_truth = target == "truth" and fitted_on_honest_rows
        assert list(rule) == [BY_TWINS if of_truth else EARLIEST], (target, regime)
    assert set(rules.index.get_level_values("target")) == {"truth", POSITIVE_CONTROL}
    own_answer = probes[(probes.target == POSITIVE_CONTROL) & (probes.regime == LYING)]
    assert (own_answer.layer == 0).all() and own_answer.estimate.min() > 0.9


@pytest.mark.trap(40)
def test_no_label_of_a_row_told_to_lie_has_a_say_in_the_layer(few_methods):
    rows = obedient_twins()
    features = answer_before_truth(rows)
    is_twin = (rows.role == "lie") & (rows.split == "validation")
    rng = np.random.default_rng(0)
    shuffled = rows.copy()
    for column in ("label", "y", "lied"):
        shuffled.loc[is_twin, column] = rng.permutation(rows[column][is_twin])
    assert (shuffled.y[is_twin] != rows.y[is_twin]).mean() > 0.3
    tables = [
        evaluate(make_task(some, "truth", LYING), features, n_boot=100) for some in (rows, shuffled)
    ]
    pd.testing.assert_frame_equal(*tables)


def test_with_too_few_twins_the_table_says_that_the_earlier_rule_chose(few_methods):
    rows = obedient_twins()
    twins = rows[(rows.role == "lie") & (rows.split == "validation")]
    few = rows.drop(twins.index[3:])
    table = evaluate(make_task(few, "truth", LYING), answer_before_truth(rows), n_boot=100)
    probes = table[(table.kind == "probe") & table.selected]
    assert (probes.rule == EARLIEST).all() and (probes.layer == 0).all()
