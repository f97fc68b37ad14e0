"""Answers, the knowledge gate, knowing and lying, on small tables worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import prompts_that_begin_alike, tiny

from dlk_utils.errors import DataError
from dlk_utils.evaluation.behaviour import (
    LIE_RATE_COLUMNS,
    MIN_MASS,
    answer_prompts,
    knowledge_gate,
    known_datasets,
    label_behaviour,
    lie_rates,
    lie_strength,
    read_answers,
)
from dlk_utils.evaluation.stats import wilson_interval
from dlk_utils.evaluation.tasks import truth_rows
from dlk_utils.extract.stages import store_answers
from dlk_utils.extract.store import read_rows

PASSED = pd.DataFrame({"dataset": ["sums"], "passes": [True]})
FAILED = pd.DataFrame({"dataset": ["sums"], "passes": [False]})


def row(
    example: str,
    role: str,
    correct: bool,
    *,
    margin: float = 2.0,
    readable: bool = True,
    label: int = 1,
    dataset: str = "sums",
    instruction: str = "i",
) -> dict:
    """One answered prompt."""
    answer = label if correct else 1 - label
    told_to_lie = role == "lie"
    return {
        "example_id": example,
        "role": role,
        "asks": "lie" if told_to_lie else "truth",
        "wanted": 1 - label if told_to_lie else label,
        "label": label,
        "answer": answer,
        "correct": correct,
        "readable": readable,
        "margin": margin if answer else -margin,
        "mass": 0.9,
        "dataset": dataset,
        "instruction": instruction,
    }


def example(
    name: str, *, truth: bool = True, lie: bool = False, known=(True, True), **options
) -> list[dict]:
    """The rows of an example; `truth`, `lie` and `known` say which are answered correctly."""
    return [
        row(name, "truth", truth, **options),
        row(name, "lie", lie, **options),
        *(row(name, "known", correct, **options) for correct in known),
    ]


def unreadable(rows: list[dict], *roles: str) -> list[dict]:
    """The same rows, where those of the roles cannot be read."""
    return [r | {"readable": r["role"] not in roles} for r in rows]


def labelled(rows: list[dict], gate: pd.DataFrame = PASSED) -> pd.DataFrame:
    return label_behaviour(pd.DataFrame(rows), gate)


def row_of(table: pd.DataFrame, name: str, role: str) -> pd.Series:
    return table[(table.example_id == name) & (table.role == role)].iloc[0]


def gate_of(n: int, accuracy: float, labels: list[int] | None = None) -> pd.Series:
    """The gate's row for n examples of which a share is answered correctly."""
    labels = [i % 2 for i in range(n)] if labels is None else labels
    rows = [row(f"e{i}", "truth", i < accuracy * n, label=labels[i]) for i in range(n)]
    return knowledge_gate(pd.DataFrame(rows)).iloc[0]


def test_answers_are_read_from_the_two_log_probabilities():
    prompts = pd.DataFrame({"label": [1, 0, 1, 0]})
    p = np.array([[0.2, 0.6], [0.2, 0.6], [0.03, 0.01], [0.04, 0.01]])
    answers = read_answers(prompts, np.log(p), np.array([5, 6, 7, 8]), "<{}>".format)
    expected = [math.log(3), math.log(3), -math.log(3), -math.log(4)]
    np.testing.assert_allclose(answers.margin, expected)
    np.testing.assert_allclose(answers["mass"], [0.8, 0.8, 0.04, 0.05])
    np.testing.assert_allclose(answers.p1, [0.75, 0.75, 0.25, 0.2])
    assert list(answers.answer) == [1, 1, 0, 0]
    assert list(answers.correct) == [True, False, False, True]
    assert list(answers.readable[:3]) == [True, True, False]
    assert list(answers.top_token) == ["<5>", "<6>", "<7>", "<8>"]


@pytest.mark.trap(14)
def test_where_the_label_is_not_known_nothing_is_right_or_wrong():
    prompts = pd.DataFrame({"label": [-1, 1, 0], "template": "t", "instruction": "i"})
    logprobs = np.log([[0.2, 0.7], [0.2, 0.7], [0.2, 0.7]])
    answers = read_answers(prompts, logprobs, np.zeros(3, int), str)
    assert answers.correct.isna().tolist() == [True, False, False]
    assert answers.correct[1:].tolist() == [True, False] and answers.answer.tolist() == [1, 1, 1]
    known = read_answers(prompts[1:], logprobs[1:], np.zeros(2, int), str)
    assert known.correct.dtype == bool


def test_a_tiny_mass_keeps_its_margin_but_is_not_read():
    prompts, logprobs = pd.DataFrame({"label": [1]}), np.array([[-44.0, -40.0]])
    answers = read_answers(prompts, logprobs, np.array([0]), str)
    assert answers.margin[0] == 4.0
    assert not answers.readable[0]


def test_a_probability_that_is_no_number_is_not_read_as_an_answer():
    logprobs = np.log(np.array([[0.2, 0.7], [np.nan, np.nan]]))
    with pytest.raises(DataError, match="logprobs: expected numbers, got nan in 1 of 2 rows"):
        read_answers(pd.DataFrame({"label": [1, 1]}), logprobs, np.zeros(2, int), str)


@pytest.mark.trap(14)
def test_a_form_of_question_that_is_hardly_ever_answered_is_not_read_at_all():
    forms = {"dataset": "d", "template": ["a", "a", "a", "b"], "instruction": "i"}
    p = np.array([[0.001, 0.002], [0.001, 0.002], [0.03, 0.03], [0.3, 0.6]])
    prompts = pd.DataFrame({"label": 1, **forms})
    answers = read_answers(prompts, np.log(p), np.zeros(4, int), str)
    # the third row has .06, in a form whose mean is .022
    assert answers["mass"][2] > MIN_MASS
    assert list(answers.readable) == [False, False, False, True]


def test_the_gate_says_how_often_choice_1_is_answered_of_the_readable_answers():
    rows = pd.DataFrame([row(f"e{i}", "truth", True, label=i % 2) for i in range(8)])
    rows["readable"] = rows.answer == 1
    assert knowledge_gate(rows).says_choice_1[0] == 1
    assert np.isnan(knowledge_gate(rows.assign(readable=False)).says_choice_1[0])


class Numbers:
    """A tokenizer that writes token ids as numbers."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompts_answered_in_memory_have_the_answers_that_are_stored(family, tmp_path):
    prompts = prompts_that_begin_alike(6).assign(
        strict_ids=[[[1], [3]] if i % 2 else [[4], [5]] for i in range(6)],
        # choices that share their first token are scored by all their tokens
        choice_tokens=[[[[7, 9], [8]], [[7, 2]]] if i == 3 else None for i in range(6)],
    )
    model = tiny(family)
    answers = answer_prompts(model, Numbers(), prompts, batch_tokens=50)
    store_answers(model, prompts, tmp_path / "answers", record={})
    logprobs, strict, top_token = (
        read_rows(tmp_path / "answers", prompts, name)
        for name in ("choice_logprobs", "strict_logprobs", "top_token")
    )
    expected = read_answers(prompts, logprobs, top_token, str, strict=strict)
    pd.testing.assert_frame_equal(answers, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.trap(7)
def test_the_gate_refuses_a_data_set_at_chance_and_passes_one_well_above():
    chance, good = gate_of(100, 0.5), gate_of(100, 0.85)
    assert not chance.passes and chance.low < 0.5 < chance.high
    assert good.passes and good.truth_accuracy == 0.85 and good.chance == 0.5
    assert good.n_examples == 100
    assert good.says_choice_1 == np.mean([(i % 2) == (i < 85) for i in range(100)])


def test_the_chance_of_an_unbalanced_data_set_is_its_more_frequent_answer():
    always_yes = gate_of(100, 0.75, [1] * 75 + [0] * 25)
    assert always_yes.chance == 0.75 and always_yes.truth_accuracy == 0.75
    assert not always_yes.passes


@pytest.mark.trap(7)
def test_a_few_lucky_examples_do_not_pass_the_gate():
    assert not gate_of(6, 4 / 6).passes


def test_the_gate_counts_known_rows_but_no_lies_and_unreadable_answers_as_wrong():
    rows = [r for i in range(40) for r in example(f"e{i}", lie=False, label=i % 2)]
    assert knowledge_gate(pd.DataFrame(rows)).truth_accuracy[0] == 1.0
    gate = knowledge_gate(pd.DataFrame(unreadable(rows, "known")))
    assert gate.truth_accuracy[0] == pytest.approx(1 / 3)


def test_data_sets_that_pass_are_used_and_all_if_none_does():
    gate = pd.DataFrame({"dataset": ["a", "b"], "passes": [False, True]})
    assert known_datasets(gate) == ["b"]
    assert known_datasets(gate.assign(passes=False)) == ["a", "b"]


def test_knowing_needs_every_known_row_right_with_a_margin_and_readable():
    rows = example("all right")
    rows += example("one wrong", known=(True, False))
    rows += example("three, one wrong", known=(True, True, False))
    rows += example("unsure", known=(True,)) + [row("unsure", "known", True, margin=0.05)]
    rows += example("unread", known=(True,)) + [row("unread", "known", True, readable=False)]
    table = labelled(rows)
    assert table.groupby("example_id").knows.nunique().eq(1).all()
    assert set(table.example_id[table.knows]) == {"all right"}
    assert table.groupby("example_id").unknown_by.first().to_dict() == {
        "all right": "",
        "one wrong": "wrong elsewhere",
        "three, one wrong": "wrong elsewhere",
        "unsure": "margin",
        "unread": "wrong elsewhere",
    }


@pytest.mark.trap(3)
def test_the_scored_row_is_no_evidence_of_knowing():
    rows = example("a", truth=False, lie=True) + example("b", known=(False, False))
    table = labelled(rows)
    assert row_of(table, "a", "truth").knows
    assert not row_of(table, "b", "truth").knows


@pytest.mark.trap(4)
def test_knowing_goes_by_example_and_not_by_the_number_of_the_row():
    known = {
        "sums": [True, False, True, False, False],
        "towns": [False, True, True, False, True],
    }
    parts = []
    for name, of_dataset in known.items():
        rows = []
        for i, knows in enumerate(of_dataset):
            rows += example(f"{name} {i}", known=(True, knows), dataset=name)
        parts.append(pd.DataFrame(rows))
    # the planted mistake: row numbers start again in the second data set
    assert list(parts[0].index) == list(parts[1].index)
    expected = {f"{name} {i}": [k] for name, ks in known.items() for i, k in enumerate(ks)}
    gate = pd.DataFrame({"dataset": list(known), "passes": True})
    both = pd.concat(parts)
    for answers in (both, pd.concat(parts[::-1]), both.sort_index(kind="stable")):
        table = label_behaviour(answers, gate)
        assert table.groupby("example_id").knows.unique().map(list).to_dict() == expected
        assert set(table.example_id[table.lied]) == set(table.example_id[table.knows])


def test_nothing_is_known_in_a_data_set_that_fails_the_gate():
    table = labelled(example("a") + example("b"), FAILED)
    assert not table.knows.any() and not table.lied.any()
    assert set(table.unknown_by) == {"data set refused"}


def test_without_a_gate_that_of_the_answers_decides():
    right = [r for i in range(40) for r in example(f"e{i}", label=i % 2)]
    half = [
        r
        for i in range(40)
        for r in example(f"e{i}", label=i % 2, known=[i % 4 > 1] * 2, truth=i % 4 > 1)
    ]
    for rows, passes in ((right, True), (half, False)):
        answers = pd.DataFrame(rows)
        table = label_behaviour(answers)
        pd.testing.assert_frame_equal(table, label_behaviour(answers, knowledge_gate(answers)))
        assert table.knows.any() == passes


def test_lied_is_told_to_lie_and_knows_and_wrong():
    rows = example("lie")
    rows += example("refuses to lie", lie=True)
    rows += example("does not know", known=(True, False))
    rows += example("confused", truth=False)
    rows += unreadable(example("mumbles"), "lie")
    table = labelled(rows)
    lies = set(zip(table.example_id[table.lied], table.role[table.lied], strict=True))
    assert lies == {("lie", "lie"), ("confused", "lie")}


def test_obeyed_is_the_wanted_answer_whether_or_not_it_knows():
    rows = example("a")
    rows += example("b", truth=False, lie=True, known=(False, False))
    rows += unreadable(example("c"), "truth", "lie", "known")
    table = labelled(rows)
    obeyed = {
        name: [row_of(table, name, role).obeyed for role in ("truth", "lie")] for name in "abc"
    }
    assert obeyed == {"a": [True, True], "b": [False, False], "c": [False, False]}


def test_where_neither_answer_is_wanted_nothing_is_obeyed():
    unsure = row("a", "unsure", True) | {"wanted": -1, "asks": "unsure"}
    assert not row_of(labelled([*example("a"), unsure]), "a", "unsure").obeyed


@pytest.mark.parametrize(
    "rows, truth, lie",
    [
        (example("e"), "correct", "lie"),
        (example("e", truth=False, lie=True), "confused", "correct"),
        (example("e", known=(False, True)), "luck", "ignorance"),
        (example("e", truth=False, lie=True, known=(False, False)), "ignorance", "luck"),
        (unreadable(example("e"), "truth", "lie"), "unreadable", "unreadable"),
    ],
)
def test_the_quadrant_of_each_case(rows, truth, lie):
    table = labelled(rows)
    assert row_of(table, "e", "truth").quadrant == truth
    assert row_of(table, "e", "lie").quadrant == lie
    merged = {"luck": "unknown", "ignorance": "unknown"}
    assert list(table.three_class) == [merged.get(q, q) for q in table.quadrant]


@pytest.mark.parametrize("known", [(), (True,)])
def test_fewer_than_two_known_rows_are_refused_by_example(known):
    with pytest.raises(DataError, match=f"at least 2 .*got {len(known)} of example lonely"):
        labelled(example("a") + example("lonely", known=known))


def test_lie_rates_are_taken_against_the_truth_twins():
    rows = []
    for i in range(40):
        # told to lie: 20 of 40 wrong; told to tell the truth: 8 of 40 wrong
        instruction = "spy" if i < 20 else "guard"
        rows += example(f"e{i}", truth=i % 5 != 0, lie=i % 2 == 0, instruction=instruction)
    rates = lie_rates(labelled(rows)).set_index("instruction")
    assert list(rates.index) == ["all lie instructions", "guard", "spy"]
    assert rates.n[["spy", "guard"]].to_list() == [20, 20]
    all_rows = rates.loc["all lie instructions"]
    assert (all_rows.n, all_rows.wrong_rate, all_rows.truth_accuracy) == (40, 0.5, 0.8)
    assert (all_rows.wrong_rate_low, all_rows.wrong_rate_high) == wilson_interval(20, 40)
    assert (all_rows.truth_accuracy_low, all_rows.truth_accuracy_high) == wilson_interval(32, 40)
    assert all_rows.lie_above_error == pytest.approx(0.3)
    assert all_rows.lie_above_error_low < 0.3 < all_rows.lie_above_error_high
    assert all_rows["mass"] == pytest.approx(0.9) and all_rows.n_lied == 20


@pytest.mark.trap(8)
def test_a_wrong_rate_that_equals_the_plain_error_is_no_lying():
    rows = [r for i in range(60) for r in example(f"e{i}", truth=i % 3 != 0, lie=i % 3 != 1)]
    rates = lie_rates(labelled(rows)).set_index("instruction")
    all_rows = rates.loc["all lie instructions"]
    assert all_rows.wrong_rate == pytest.approx(1 / 3)
    assert all_rows.lie_above_error_low <= 0 <= all_rows.lie_above_error_high


def test_rows_without_a_readable_twin_do_not_count_in_lie_rates():
    rows = example("a") + example("b") + unreadable(example("c"), "truth")
    assert lie_rates(labelled(rows)).n.max() == 2


def test_a_model_whose_answers_cannot_be_read_has_an_empty_table_of_lie_rates():
    rates = lie_rates(labelled(unreadable(example("a"), "truth", "lie", "known")))
    assert rates.attrs["too_few_rows"].startswith("no row told to lie is readable")
    assert rates.empty and list(rates.columns) == LIE_RATE_COLUMNS


def test_a_lie_rate_of_five_of_five_still_has_an_interval():
    rates = lie_rates(labelled([r for name in "abcde" for r in example(name)]))
    assert (rates.lie_above_error_low < rates.lie_above_error_high).all()


def test_a_lie_is_unambiguous_by_the_probability_of_its_answer():
    lied = [True, True, False, True]
    rows = {"role": "lie", "readable": True, "knows": True, "p1": [0.1, 0.4, 0.9, 0.6]}
    behaviour = pd.DataFrame(rows | {"lied": lied, "correct": np.logical_not(lied)})
    strength = lie_strength(behaviour)
    assert strength["told to lie"] == 4
    assert (strength["unambiguous lies %"], strength["ambiguous lies %"]) == (25.0, 50.0)


@pytest.mark.parametrize(
    "step, before",
    [
        (lambda table: answer_prompts(torch.nn.Identity(), None, table), "make_prompts"),
        (label_behaviour, "answer_prompts"),
        (truth_rows, "answer_prompts"),
    ],
)
def test_a_table_of_another_step_is_refused_by_naming_the_step_that_is_missing(step, before):
    table = pd.DataFrame({"text": ["a"], "label": [1], "role": ["known"], "example_id": ["1"]})
    with pytest.raises(DataError, match=f"without the columns .*; run `{before}` first"):
        step(table)
