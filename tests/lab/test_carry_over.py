"""Tables of notebook 08 on states of which it is known whether a probe carries over."""

import numpy as np
import pandas as pd
import pytest
from planted_states import read_from, states_that_hold_y, twins

from dlk_utils.lab.findings import rules_verdict, split_spread, with_few_twins
from dlk_utils.lab.tables import split_anew
from dlk_utils.lab.tables.carry_over import (
    BY_TWINS,
    EARLIEST,
    OTHER_FAMILIES,
    SAME,
    between_groups,
    count_cases,
    example_curve,
    left_out,
    rules_compared,
    score_styles,
    split_again,
    transfer_matrix,
)

pytestmark = pytest.mark.slow

WIDTH = 30


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Twins of three data sets of 180 examples."""
    rng = np.random.default_rng(0)
    examples = pd.DataFrame(
        [
            {
                "example_id": f"{dataset}{i}",
                "subject": f"{dataset}{i}",
                "dataset": dataset,
                "y": int(rng.integers(2)),
                "split": ("train", "validation", "test")[i % 3],
            }
            for dataset in "abc"
            for i in range(180)
        ]
    )
    roles = [
        examples.assign(role=role, row_id=examples.example_id + role) for role in ("truth", "lie")
    ]
    return pd.concat(roles, ignore_index=True)


@pytest.fixture(scope="module")
def features(rows) -> dict:
    """Noise at layer 3. At layer 7 `a` and `b` hold the class in one direction, `c` inverted."""
    rng = np.random.default_rng(1)
    sign = rows.dataset.map({"a": 1, "b": 1, "c": -1}).to_numpy()
    held = rng.normal(size=(len(rows), WIDTH))
    held[:, 4] += 6 * (rows.y.to_numpy() - 0.5) * sign
    noise = rng.normal(size=(len(rows), WIDTH))
    return {
        ("activation", "resid_post", layer): read_from(dict(zip(rows.row_id, states, strict=True)))
        for layer, states in ((3, noise), (7, held))
    }


@pytest.fixture(scope="module")
def by_dataset(rows, features) -> pd.DataFrame:
    return transfer_matrix(rows, "dataset", features)


def test_the_matrix_shows_what_carries_over_what_is_inverted_and_which_layer_holds_it(by_dataset):
    cell = by_dataset.set_index(["trained_on", "tested_on"])
    assert len(by_dataset) == 9 + 3
    # Of data sets that hold opposite directions together, no layer can be chosen.
    assert (by_dataset.layer.head(9) == 7).all()
    assert all(cell.low[way] > 0.85 for way in [("a", "a"), ("a", "b"), ("b", "a"), ("c", "c")])
    assert all(cell.high[way] < 0.15 for way in [("a", "c"), ("c", "b"), ("all others", "c")])
    assert (by_dataset.n == 60).all()
    assert cell.n_train["a", "b"] == 60 and cell.n_train["all others", "a"] == 120


def test_ways_between_groups_are_counted_apart_from_those_within_one(by_dataset):
    assert len(between_groups(by_dataset)) == 6
    counts = count_cases({"logistic": by_dataset}).loc["logistic"]
    # The ways between a and b lead above chance; those from and to c, also of all others, below.
    assert counts["cases"] == 9 and counts["above chance"] == 2 and counts["below chance"] >= 5
    assert list(left_out(by_dataset, "set").index) == ["a", "b", "c"]


def test_a_group_with_too_few_rows_of_a_class_is_left_out(rows, features):
    table = transfer_matrix(rows[(rows.dataset != "b") | (rows.y == 1)], "dataset", features)
    assert set(table.trained_on) == {"a", "c", "all others"} and set(table.tested_on) == {"a", "c"}


def test_no_example_of_the_test_rows_was_trained_on(rows, features):
    read_together = []

    def watched(read):
        def watching(some):
            read_together.append(some.example_id.unique())
            return read(some)

        return watching

    transfer_matrix(rows, "dataset", {key: watched(read) for key, read in features.items()})
    split_of = rows.drop_duplicates("example_id").set_index("example_id").split
    assert all(split_of[examples].nunique() == 1 for examples in read_together)


def test_more_examples_help_and_all_of_them_are_the_last_point(rows, features):
    curve = example_curve(rows[rows.dataset != "c"], features)
    assert list(curve.n_train) == [8, 16, 32, 64, 120] * 3
    for _, of_probe in curve.groupby("probe"):
        assert of_probe.estimate.iloc[-1] > 0.95
        assert of_probe.estimate.iloc[0] < of_probe.estimate.iloc[-1]
        assert (of_probe.least <= of_probe.estimate).all()
        assert (of_probe.estimate <= of_probe.most).all()
        assert list(of_probe.draws) == [5, 5, 5, 5, 1]


def test_claims_about_one_subject_stay_in_one_split_where_examples_are_split_anew():
    rows = pd.DataFrame({"example_id": [f"e{i}" for i in range(40)]})
    rows["subject"] = [f"city {i // 2}" for i in range(40)]
    rows["split"] = ["train", "train", "test", "test"] * 10
    anew = [split_anew(rows, seed) for seed in range(4)]
    assert all((table.groupby("subject").split.nunique() == 1).all() for table in anew)
    assert all(table.split.value_counts().to_dict() == {"train": 20, "test": 20} for table in anew)
    assert len({tuple(table.split) for table in anew}) == 4


@pytest.mark.slow
def test_other_splits_have_the_same_sizes_and_other_scores():
    rows = twins()
    table = split_again(rows, {("activation", "resid_post", 1): states_that_hold_y(rows, 0.15)})
    same = table[table.tested_on == SAME]
    assert len(same) == 2 * 10 and (same.n == 100).all() and (same.n_known == 100).all()
    assert same.estimate.nunique() > 1 and same.estimate.between(0.5, 1).all()
    # Of one layer there is nothing to choose, and of one data set none can be left out.
    assert (same.groupby("again").estimate.nunique() == 1).all()
    assert set(table.tested_on) == {SAME, OTHER_FAMILIES}
    compared = rules_compared(table).set_index(["tested on", "rule"])
    assert compared["mean"][SAME, EARLIEST] == pytest.approx(same.known.mean())
    assert (compared.better == 0).all() and (compared.splits == 10).all()


@pytest.mark.slow
def test_twins_choose_the_better_layer_on_data_left_out_where_an_early_one_holds_the_answer(
    two_sets,
):
    table = split_again(*two_sets)
    tests = {SAME, OTHER_FAMILIES, "a left out", "b left out"}
    assert set(table.tested_on) == tests
    layers = table.groupby("rule").layer.agg(lambda layers: layers.mode().iloc[0])
    assert layers[EARLIEST] == 3 and layers[BY_TWINS] == 6
    compared = rules_compared(table).set_index(["tested on", "rule"])
    for tested_on in tests:
        assert compared["mean"][tested_on, BY_TWINS] > 0.8
        assert compared["mean"][tested_on, EARLIEST] < 0.3
        assert compared.accuracy[tested_on, BY_TWINS] > 0.7
    assert "AUROC in 3 of 3 tests, and the lower one in 0" in rules_verdict(table)
    spread = split_spread(table)
    assert spread.index(BY_TWINS) < spread.index(EARLIEST) and "over 10 splits" in spread


@pytest.fixture(scope="module")
def two_sets() -> tuple[pd.DataFrame, dict]:
    """Twins of two data sets; layer 3 holds the answer, and layer 6 the truth as clearly."""
    rows = twins()
    rows["dataset"] = np.where(rows.example_id.str[1:].astype(int) // 3 % 2, "a", "b")
    features = {
        ("activation", "resid_post", 3): states_that_hold_y(
            rows.assign(y=rows.answer), 0.8, seed=1
        ),
        ("activation", "resid_post", 6): states_that_hold_y(rows, 0.8, seed=2),
    }
    return rows, features


@pytest.mark.slow
def test_every_table_reads_truth_where_twins_agree_and_not_at_the_earlier_layer_of_the_answer(
    two_sets,
):
    rows, features = two_sets
    matrix = transfer_matrix(rows, "dataset", features)
    assert len(matrix) == 6 and (matrix.layer == 6).all() and (matrix.rule == BY_TWINS).all()
    assert matrix.estimate.min() > 0.8 and with_few_twins(matrix) == ""
    # A probe that was fitted on lies cannot confuse the two, and keeps the earlier rule.
    among_lies = transfer_matrix(rows, "dataset", features, roles=("lie", "lie"))
    assert (among_lies.rule == EARLIEST).all() and (among_lies.layer == 3).all()
    assert example_curve(rows, features).groupby("probe").estimate.last().min() > 0.8
    styled = score_styles(rows, features, {})
    assert (styled.layer == 6).all() and styled.estimate.min() > 0.8


def test_labels_of_rows_told_to_lie_do_not_choose_the_layer_of_a_way(two_sets):
    rows, features = two_sets
    is_twin = (rows.role == "lie") & (rows.split == "validation")
    turned = rows.assign(y=np.where(is_twin, 1 - rows.y, rows.y))
    expected = transfer_matrix(rows, "dataset", features)
    pd.testing.assert_frame_equal(transfer_matrix(turned, "dataset", features), expected)


def test_a_data_set_with_too_few_twins_is_named(two_sets):
    rows, features = two_sets
    of_b = (rows.dataset == "b") & (rows.role == "lie") & (rows.split == "validation")
    matrix = transfer_matrix(rows[~of_b], "dataset", features).set_index("trained_on")
    assert set(matrix.rule[["b"]]) == {EARLIEST} and set(matrix.layer[["b"]]) == {3}
    assert set(matrix.rule[["a"]]) == {BY_TWINS}
    assert with_few_twins(matrix.reset_index()) == (
        "These are read at the earliest good layer, as they have fewer than 4 twins: b."
    )


@pytest.mark.slow
def test_where_the_model_knows_nothing_no_rule_is_praised():
    rows = twins().assign(knows=False)
    table = split_again(rows, {("activation", "resid_post", 1): states_that_hold_y(rows, 0.15)})
    assert (table.n_known == 0).all() and table.estimate.notna().all()
    assert split_spread(table) == "not scored"
    assert "nothing was scored" in rules_verdict(table)


def test_of_an_empty_table_of_splits_nothing_is_said():
    table = split_again(twins(9), {})
    assert split_spread(table) == "not scored" and rules_compared(table).empty
    assert "nothing was scored" in rules_verdict(table)


def test_a_probe_of_style_falls_in_another_style_and_one_of_truth_does_not():
    rows = twins()
    lies = rows[(rows.role == "lie") & (rows.split == "test")]
    state = states_that_hold_y(rows, 1.0)
    key = ("activation", "resid_post", 3)
    # The planted mistake: the style inverts what the probe reads.
    styles = {"same": (lies, {key: state}), "inverted": (lies, {key: lambda some: -state(some)})}
    table = score_styles(rows, {key: state}, styles).set_index(["probe", "style"])
    for probe in ("logistic", "mean_difference", "ttpd"):
        assert table.estimate[probe, "clean"] == table.estimate[probe, "same"] > 0.9
        assert table.estimate[probe, "inverted"] < 0.1
    assert (table.own_answer < 0.1).all() and (table.n == len(lies)).all()
    assert (table.layer == 3).all()


@pytest.mark.parametrize("make", [example_curve, split_again, score_styles])
def test_with_too_few_rows_of_a_class_a_table_is_empty_and_says_why(rows, features, make):
    one_class = rows[rows.y == 1]
    arguments = [one_class, features, {}] if make is score_styles else [one_class, features]
    table = make(*arguments)
    assert table.empty and "estimate" in table
    assert "expected rows of each class, at least" in table.attrs["too_few_rows"]


def test_with_too_few_rows_in_every_group_the_matrix_is_empty(rows, features):
    table = transfer_matrix(rows.groupby(["role", "split"]).head(3), "dataset", features)
    assert table.empty and "estimate" in table
