"""Targets, regimes and features: which rows are fitted and tested on, and what is read for them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted_rows import TRUTH, make_rows

from dlk_utils.errors import DataError, TooFewRows
from dlk_utils.evaluation.controls import scores_without_states
from dlk_utils.evaluation.stats import auroc
from dlk_utils.evaluation.tasks import (
    KNOWN,
    LYING,
    POSITIVE_CONTROL,
    REGIMES,
    least_rows,
    make_targets,
    make_task,
    memory_features,
    pair_features,
    pair_rows,
    regimes_of,
    require_rows,
    shortages,
    truth_rows,
)
from dlk_utils.probes import MORE_STATE_PROBES, Logistic
from dlk_utils.probes.base import LeastRows

N_EXAMPLES = 240
SPLITS = ("train", "train", "validation", "test", "test")


def labelled_row(rng: np.random.Generator, i: int, role: str, *, told_lie: bool) -> dict:
    knows = i % 3 > 0
    label = i % 2
    wrong = told_lie if role == "lie" else not knows
    readable = bool(rng.random() < 0.95)
    return {
        "row_id": f"r{i} {role}",
        "example_id": f"e{i:03}",
        "split": SPLITS[i // 2 % 5],
        "role": role,
        "asks": "lie" if role == "lie" else "truth",
        "instruction": f"{role} {rng.integers(3)}",
        "template": "t",
        "dataset": "d",
        "choices": ["no", "yes"],
        "label": label,
        "answer": label ^ wrong,
        "readable": readable,
        "knows": knows,
        "lied": role == "lie" and knows and wrong and readable,
        "margin": rng.normal(),
        "p1": rng.random(),
        "text": f"word{rng.integers(9)}",
        "prompt": f"{role} word{rng.integers(9)}",
    }


@pytest.fixture
def probe_rows() -> pd.DataFrame:
    """Three rows of each example: two in three are known, half of those told to lie do lie."""
    rng, rows = np.random.default_rng(0), []
    for i in range(N_EXAMPLES):
        told_lie = bool(rng.random() < 0.5)
        roles = ("truth", "lie", "known")
        rows += [labelled_row(rng, i, role, told_lie=told_lie) for role in roles]
    return pd.DataFrame(rows)


@pytest.fixture
def stored_logprobs(monkeypatch) -> None:
    """A store in which every tensor says [0, (1 + draw) * row number]."""

    def read_rows(folder, rows, name):
        draw = int(name.rsplit(".", 1)[1])
        return np.outer(np.arange(len(rows)), [0.0, 1.0 + draw])

    monkeypatch.setattr("dlk_utils.evaluation.tasks.read_rows", read_rows)


@pytest.fixture
def targets(probe_rows, stored_logprobs) -> dict[str, pd.DataFrame]:
    return make_targets(probe_rows, probe_rows[probe_rows.role == "truth"], Path("draws"))


def test_the_rows_of_truth_have_the_label_and_the_polarity_of_their_words():
    answers = pd.DataFrame(
        {
            "readable": [True, True, False, True],
            "label": [1, 0, 1, 1],
            "choices": [["No", "Yes"], ["yes", "no"], ["no", "yes"], ["right", "Wrong"]],
        }
    )
    rows = truth_rows(answers)
    assert list(rows.y) == [1, 0, 1]
    assert list(rows.polarity) == [1, -1, -1]


@pytest.mark.trap(3)
def test_lies_are_looked_for_among_readable_known_rows_told_to_lie_and_nowhere_else(
    probe_rows, targets
):
    lie = targets["lie"]
    told_to_lie = probe_rows.role == "lie"
    expected = probe_rows[told_to_lie & probe_rows.knows & probe_rows.readable]
    assert set(lie.row_id) == set(expected.row_id) and len(lie) < told_to_lie.sum()
    assert (lie.y == lie.lied).all() and lie.y.mean() == pytest.approx(0.5, abs=0.1)
    # the planted mistake: a detector that reads the instruction scores well where all rows count
    everywhere = probe_rows[probe_rows.knows & probe_rows.readable]
    says_lie = (everywhere.asks == "lie").to_numpy(float)
    assert auroc(says_lie, everywhere.lied.to_numpy(int)) > 0.8
    assert auroc((lie.asks == "lie").to_numpy(float), lie.y.to_numpy()) == 0.5


def test_unreadable_rows_are_in_no_target(probe_rows, targets):
    readable = set(probe_rows.row_id[probe_rows.readable])
    assert set(targets["truth"].row_id) == set(targets[POSITIVE_CONTROL].row_id) == readable
    assert all(set(rows.row_id) <= readable for rows in targets.values())


def test_there_is_no_target_of_pairs_without_draws(probe_rows, targets):
    assert set(targets["pair"].role) == {"truth"}
    assert set(make_targets(probe_rows)) == set(targets) - {"pair"}


def test_pairs_move_towards_the_truth_or_away_from_it(probe_rows, stored_logprobs):
    rows = probe_rows.head(6)
    pairs = pair_rows(rows, Path("draws"))
    # the first row does not move
    assert list(pairs.row_id) == list(rows.row_id[1:])
    # the second draw always leans more to choice 1
    assert (pairs.p1_draw1 > pairs.p1_draw0).all()
    assert list(pairs.y) == list(pairs.label)
    assert np.allclose(pairs.move.abs(), pairs.p1_draw1 - pairs.p1_draw0)
    plain = pair_rows(rows, Path("moved"), plain=True)
    assert list(plain.p1_draw0) == list(rows.p1[rows.row_id.isin(plain.row_id)])


def test_pairs_can_be_divided_by_their_move(probe_rows, stored_logprobs):
    rows = probe_rows.head(3).assign(p1_draw0=[0.5, 0.5, 0.5], p1_draw1=[0.5, 0.4, 1.0])
    key = ("two draws / move", "resid_post", 7)
    divided = pair_features("two draws / move", Path("draws"), [7])[key](rows)
    pairs = pair_features("two draws", Path("draws"), [7])["two draws", "resid_post", 7](rows)
    np.testing.assert_allclose(divided, pairs / np.array([0.01, 0.1, 0.5])[:, None, None])


@pytest.mark.trap(3)
def test_lies_are_scored_in_the_one_regime_that_fits_and_tests_on_rows_told_to_lie(targets):
    assert regimes_of("lie") == ["by example, lie rows"]
    task = make_task(targets["lie"], "lie", "by example, lie rows")
    for part in (task.train, task.validation, task.test):
        assert set(part.role) == {"lie"}
    scores = scores_without_states(task)["instruction only"]
    assert abs(auroc(scores, task.test.y.to_numpy()) - 0.5) < 0.2


@pytest.mark.trap(5)
def test_an_example_in_two_splits_is_refused():
    rows = make_rows()
    rows.loc[rows.split == "test", "example_id"] = rows.example_id[rows.split == "train"].iloc[0]
    with pytest.raises(DataError, match="expected each example in one split, got e0000 in two"):
        make_task(rows, "truth", TRUTH)


def test_only_probes_of_truth_that_are_fitted_on_honest_rows_have_twins_to_choose_by(
    probe_rows, targets
):
    readable = probe_rows[probe_rows.readable]
    told_to_lie = readable[(readable.role == "lie") & (readable.split == "validation")]
    for regime, (fit_role, _) in REGIMES.items():
        twins = make_task(targets["truth"], "truth", regime).twins
        assert set(twins.row_id) == (set(told_to_lie.row_id) if fit_role == "truth" else set())
    assert make_task(targets[POSITIVE_CONTROL], POSITIVE_CONTROL, LYING).twins.empty
    assert make_task(targets["lie"], "lie", "by example, lie rows").twins.empty
    # They are read, but neither fitted nor tested on.
    task = make_task(targets["truth"], "truth", LYING)
    parts = (task.train, task.validation, task.test, task.twins)
    assert list(task.rows.row_id) == [row_id for part in parts for row_id in part.row_id]
    assert task.rows.row_id.is_unique


@pytest.mark.trap(6)
@pytest.mark.parametrize(
    "regime, fit_roles, test_role",
    [
        (TRUTH, {"truth", "known"}, "truth"),
        ("by example, lie rows", {"lie"}, "lie"),
        (LYING, {"truth", "known"}, "lie"),
        (KNOWN, {"truth", "known"}, "lie"),
    ],
)
def test_a_regime_takes_its_roles_and_keeps_examples_apart(regime, fit_roles, test_role):
    parts = [make_rows().assign(role=role) for role in ("truth", "lie", "known")]
    rows = pd.concat(parts, ignore_index=True)
    rows["row_id"] += rows.role
    rows["knows"] = rows.example_id.str[-1] != "3"
    # further honest rows teach, and are never tested
    rows = rows[(rows.role != "known") | (rows.split != "test")]
    task = make_task(rows, "truth", regime)
    assert set(REGIMES) >= {regime}
    assert set(task.train.role) == set(task.validation.role) == fit_roles
    assert set(task.test.role) == {test_role}
    assert task.test.knows.all() == (regime == KNOWN)
    examples = [set(part.example_id) for part in (task.train, task.validation, task.test)]
    assert sum(map(len, examples)) == len(set.union(*examples))
    expected = rows[(rows.role == test_role) & (rows.split == "test")]
    assert len(task.test) == (expected.knows.sum() if regime == KNOWN else len(expected))


def test_too_few_rows_are_refused_in_one_sentence_with_counts_and_remedy():
    rows = make_rows(60)
    rows["y"] = (rows.groupby("split").cumcount() < 4).astype(int)
    with pytest.raises(TooFewRows) as refusal:
        make_task(rows, "truth", TRUTH)
    assert str(refusal.value) == (
        "truth, by example, truth rows: expected rows of each class, at least 5 in train, "
        "2 in validation, 4 in test, and 15 rows in all in train, got 20 and 4 in train, "
        "8 and 4 in validation, 20 and 4 in test (of class 0 and 1); ask for more examples "
        "(n_examples), or add rows to your own file."
    )


def test_where_no_row_has_a_class_more_examples_are_not_advised():
    for rows, absent in (
        (make_rows(60).assign(y=1), "class 0"),
        (make_rows(60).head(0), "class 0 or 1"),
    ):
        with pytest.raises(TooFewRows) as refusal:
            make_task(rows, "truth", TRUTH)
        assert str(refusal.value).endswith(f"(of class 0 and 1); no split has a row of {absent}.")


@pytest.mark.parametrize("target, in_all", [("truth", 15), ("lie", 15), ("pair", 10)])
def test_the_least_rows_of_train_are_what_the_probes_of_the_target_need(target, in_all):
    least = least_rows(target)
    assert least["train"] == LeastRows(per_class=5, in_all=in_all)
    assert least["validation"].per_class == 2 and least["test"].per_class == 4


def test_the_least_rows_count_also_what_a_probe_needs_that_is_registered_later(monkeypatch):
    class Greedy(Logistic):
        least_rows = LeastRows(per_class=40, in_all=90)

    monkeypatch.setitem(MORE_STATE_PROBES, "greedy", Greedy)
    assert least_rows("truth")["train"] == LeastRows(40, 90)


def test_fifteen_neighbours_are_not_looked_for_among_twelve_rows():
    rows = make_rows(60)
    few = rows[(rows.split != "train") | (rows.groupby("split").cumcount() < 12)]
    with pytest.raises(TooFewRows, match=r"and 15 rows in all in train, got . and . in train"):
        make_task(few, "truth", TRUTH)
    parts = {"train": few[few.split == "train"]}
    [shortage] = shortages(parts, least=least_rows("truth"))
    assert sum(shortage.counts.values()) == 12 and sum(shortage.per_class.values()) == 3


def test_the_classes_their_column_and_the_least_count_can_be_others():
    rows = pd.DataFrame({"kind": ["a"] * 3 + ["b"] * 3})
    options = {"column": "kind", "classes": ("a", "b")}
    require_rows({"test": rows}, "kinds", least={"test": 3}, **options)
    with pytest.raises(TooFewRows, match=r"kinds: .* 4 in test, got 3 and 3 in test"):
        require_rows({"test": rows}, "kinds", least={"test": 4}, **options)
    with pytest.raises(TooFewRows, match="got 3 and 3 and 0 in test"):
        require_rows({"test": rows}, "kinds", column="kind", classes=("a", "b", "c"))


def test_states_in_memory_are_read_by_row_id_in_any_order():
    rows = make_rows(20)
    states = np.random.default_rng(0).normal(size=(2, 20, 5))
    features = memory_features(rows, {"resid_post": states}, layers=[4, 8])
    assert list(features) == [("activation", "resid_post", 4), ("activation", "resid_post", 8)]
    some_rows = rows.sample(7, random_state=1).reset_index(drop=True)
    where = [list(rows.row_id).index(row_id) for row_id in some_rows.row_id]
    read = features["activation", "resid_post", 8]
    np.testing.assert_array_equal(read(some_rows), states[1, where])


def test_states_in_memory_of_other_rows_or_layers_are_refused():
    rows, states = make_rows(20), np.zeros((2, 20, 5))
    read = memory_features(rows, {"resid_post": states})["activation", "resid_post", 0]
    with pytest.raises(DataError, match="got 5 of 10 rows without states"):
        read(rows.tail(10).assign(row_id=[*rows.row_id[:5], *"abcde"]))
    with pytest.raises(DataError, match="different row_id"):
        memory_features(rows.assign(row_id="same"), {"resid_post": states})
    with pytest.raises(DataError, match=r"3 layers and 20 rows at resid_post, got \[2, 20, 5\]"):
        memory_features(rows, {"resid_post": states}, layers=[0, 1, 2])
