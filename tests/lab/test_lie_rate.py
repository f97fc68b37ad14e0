"""Tables of notebook 02: effects of instruction and shots, levels of knowledge, doubling down."""

import numpy as np
import pandas as pd
import pytest

from dlk_utils.lab.sentences import shots_help_sentence
from dlk_utils.lab.tables.lie_rate import (
    doubling_down,
    doubling_down_gap,
    knowledge_levels,
    other_table,
    shots_effects,
    shots_table,
)
from dlk_utils.questions.elicit import ASKS, SHOTS


def answered(is_wrong, n: int = 40) -> pd.DataFrame:
    """A grid of answers that are wrong where `is_wrong(example number, asks, shots)` says so."""
    rows = [
        {
            "example_id": f"e{i}",
            "dataset": "d",
            "template": f"t{i % 10}",
            "asks": asks,
            "shots_say": shots,
            "correct": not is_wrong(i, asks, shots),
            "readable": True,
        }
        for i in range(n)
        for asks in ASKS
        for shots in SHOTS
    ]
    return pd.DataFrame(rows)


def effects(answers: pd.DataFrame) -> pd.DataFrame:
    """The effects over all data sets, by name."""
    table = shots_effects(answers)
    return table[table.dataset == "all"].set_index("effect")


def test_a_model_that_obeys_the_instruction_alone_shows_no_effect_of_shots():
    estimate = effects(answered(lambda i, asks, shots: asks == "lie")).estimate
    assert estimate["instruction"] == 1
    assert estimate["shots"] == estimate["any shots"] == 0


def test_a_model_that_copies_the_shots_shows_no_effect_of_the_instruction():
    estimate = effects(answered(lambda i, asks, shots: shots == "lie")).estimate
    assert estimate["shots"] == 1 and estimate["instruction"] == 0


def test_a_model_that_needs_both_obeys_the_instruction_only_with_shots():
    estimate = effects(answered(lambda i, asks, shots: asks == shots == "lie")).estimate
    assert estimate["together"] == 1 and estimate["instruction"] == 0
    assert estimate["instruction, with shots"] == 0.5


def test_shots_of_any_kind_that_make_it_worse_are_no_effect_of_the_instruction():
    def is_wrong(i: int, asks: str, shots: str) -> bool:
        return asks == "lie" if shots == "none" else i % 2 == 0

    estimate = effects(answered(is_wrong)).estimate
    assert estimate["instruction"] == 1 and estimate["any shots"] == 0.5
    assert estimate["instruction, with shots"] == estimate["shots"] == 0


def test_an_answer_that_cannot_be_read_is_neither_right_nor_wrong():
    # Two fifths of the answers are wrong, whatever is asked and shown.
    answers = answered(lambda i, asks, shots: i % 5 < 2)
    number = answers.example_id.str[1:].astype(int)
    is_mute = (answers.shots_say == "none") & (number % 3 > 0)
    table = effects(answers.assign(readable=~is_mute))
    n_readable = answers.example_id[~is_mute & (answers.shots_say == "none")].nunique()
    assert table.estimate["any shots"] == 0
    assert table.n["any shots"] == n_readable < answers.example_id.nunique()
    assert table.n["shots"] == answers.example_id.nunique()
    none_readable = effects(answers.assign(readable=answers.shots_say != "none"))
    assert none_readable.n["any shots"] == 0 and np.isnan(none_readable.estimate["any shots"])


def test_the_interval_of_an_effect_is_over_templates_whose_examples_share_their_shots():
    # Ten templates, of which half obey: over 400 examples the interval would be a fifth of this.
    table = effects(answered(lambda i, asks, shots: asks == "lie" and i % 10 < 5, n=400))
    instruction = table.loc["instruction"]
    assert instruction.estimate == 0.5
    assert instruction.estimate_high - instruction.estimate_low > 0.4


def test_an_effect_by_chance_has_an_interval_that_holds_zero():
    rng = np.random.default_rng(0)
    table = shots_effects(answered(lambda i, asks, shots: rng.random() < 0.5, n=80))
    assert (table.estimate_low < 0).all() and (table.estimate_high > 0).all()


def test_the_table_has_every_combination_with_its_interval():
    table = shots_table(answered(lambda i, asks, shots: asks == "lie"))
    assert (table.dataset == "all").sum() == len(ASKS) * len(SHOTS)
    assert (table.wrong_rate_low <= table.wrong_rate).all()
    assert (table.wrong_rate <= table.wrong_rate_high).all()


def test_an_empty_table_of_shots_says_whether_shots_or_readable_answers_are_missing():
    answers = answered(lambda i, asks, shots: True)
    unreadable = shots_table(answers.assign(readable=False))
    assert unreadable.attrs["too_few_rows"] == "no answer is readable"
    assert "shot pools" in shots_table(answers.head(0)).attrs["too_few_rows"]


@pytest.fixture
def twins() -> pd.DataFrame:
    """Rows of four examples: whether the truth row and the known row are correct."""
    right = {"a": (True, True), "b": (True, False), "c": (False, False), "d": (False, False)}
    rows = []
    for example, (truth, known) in right.items():
        for role, correct in (("truth", truth), ("known", known), ("lie", False)):
            rows.append(
                {
                    "example_id": example,
                    "dataset": "d",
                    "role": role,
                    "asks": "lie" if role == "lie" else "truth",
                    "shots": [],
                    "correct": correct,
                    "readable": True,
                }
            )
    return pd.DataFrame(rows)


@pytest.fixture
def truth_grid() -> pd.DataFrame:
    """Answers to the same examples with shots (a and c correct) and without (a and b)."""
    rows = [
        {
            "example_id": example,
            "asks": "truth",
            "shots_say": shots,
            "correct": example in correct,
            "readable": True,
        }
        for shots, correct in (("truth", "ac"), ("none", "ab"))
        for example in "abcd"
    ]
    return pd.DataFrame(rows)


def test_what_is_right_in_another_form_or_only_with_shots_is_shown_apart(twins, truth_grid):
    table = knowledge_levels(twins, truth_grid)
    levels = {"a": "always", "b": "in another form", "c": "only with shots", "d": "never"}
    assert table.level.to_dict() == levels
    assert table.right_with_shots.sum() == 2
    assert table.right_without.to_dict() == {"a": True, "b": True, "c": False, "d": False}


def test_in_a_run_with_shots_only_the_grid_says_what_is_right_without_them(twins, truth_grid):
    with_shots = twins.assign(correct=True, shots=[["s"]] * len(twins))
    levels = {"a": "always", "b": "always", "c": "only with shots", "d": "never"}
    assert knowledge_levels(with_shots, truth_grid).level.to_dict() == levels


def test_an_example_without_a_readable_answer_has_no_level_and_is_not_wrong(twins, truth_grid):
    unreadable = knowledge_levels(twins.assign(readable=False), truth_grid.assign(readable=False))
    assert set(unreadable.level) == {"unreadable"}
    assert unreadable.wrong_when_told_to_lie.isna().all()
    assert "No example has a readable answer" in shots_help_sentence(unreadable)
    # Without the known rows, b is right under every prompt that it answers.
    known_unreadable = twins.assign(readable=twins.role != "known")
    levels = {"a": "always", "b": "always", "c": "only with shots", "d": "never"}
    assert knowledge_levels(known_unreadable, truth_grid).level.to_dict() == levels


def test_riddles_are_shown_apart_by_what_their_shots_reveal():
    answers = pd.DataFrame(
        {
            "asks": ["random", "random", "truth", "lie"],
            "shots": [[], [], ["s"], ["s"]],
            "example_id": ["a", "b", "a", "b"],
            "readable": True,
            "correct": [True, True, True, False],
            "p1": 0.9,
            "mass": 1.0,
        }
    )
    table = other_table(answers).set_index("asks")
    assert table.loc["riddle, shots reveal lie", "wrong_rate"] == 1
    assert table.loc["random", "wrong_rate"] == 0 and table.loc["random", "n"] == 2
    assert table.n.sum() == len(answers)


def test_doubling_down_counts_known_rows_by_what_was_asked_and_whether_it_was_true():
    follow_ups = pd.DataFrame(
        {
            "asks": "lie",
            "first_correct": False,
            "first_knows": [True, True, True, False],
            "readable": True,
            "answer": [1, 0, 1, 0],
        }
    )
    [row] = doubling_down(follow_ups).itertuples()
    assert (row.n, row.answer) == (3, "was false")
    assert row.says_true == pytest.approx(2 / 3)


def test_standing_by_a_lie_is_measured_against_standing_by_the_truth():
    rows = [
        {
            "example_id": f"e{i}",
            "asks": asks,
            "first_correct": asks == "truth",
            "first_knows": True,
            "readable": True,
            "answer": int(i % 4 < 3),
        }
        for i in range(80)
        for asks in ("truth", "lie")
    ]
    follow_ups = pd.DataFrame(rows)
    same = doubling_down_gap(follow_ups)
    assert same["gap"] == 0 and same["lies"] == 0.75 and same["low"] <= 0 <= same["high"]
    honest = doubling_down_gap(follow_ups.assign(answer=(follow_ups.asks == "truth").astype(int)))
    assert honest["gap"] == -1 and honest["high"] < 0
    assert doubling_down_gap(follow_ups[follow_ups.asks == "truth"]) == {}


def test_without_a_follow_up_nothing_doubles_down():
    columns = ["asks", "first_correct", "first_knows", "readable", "answer", "example_id"]
    empty = pd.DataFrame({column: [] for column in columns})
    empty = empty.astype({"first_correct": bool, "first_knows": bool, "readable": bool})
    assert doubling_down(empty).empty and doubling_down_gap(empty) == {}
