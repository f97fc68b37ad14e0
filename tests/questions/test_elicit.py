"""Further prompts: instruction against shots, riddles, and the follow-up question."""

import json

import numpy as np
import pandas as pd
import pytest
from tiny_models import byte_tokenizer

from dlk_utils.questions.elicit import (
    OTHERS,
    draw_answers,
    follow_up_prompts,
    other_prompts,
    shots_grid_prompts,
)
from dlk_utils.questions.examples import load_examples

NO_LIMIT = 10**6


@pytest.fixture(scope="module")
def examples() -> pd.DataFrame:
    return load_examples("capitals", 20)


@pytest.fixture(scope="module")
def grid(examples) -> pd.DataFrame:
    return shots_grid_prompts(examples, byte_tokenizer(), n_examples=8, context=NO_LIMIT)


@pytest.fixture
def answers(grid) -> pd.DataFrame:
    return grid.head(4).assign(
        answer=[0, 1, 0, 1], correct=[True, True, False, False], knows=True, readable=True
    )


def test_the_nine_prompts_of_an_example_share_template_and_shots(grid):
    by_example = grid.groupby("example_id")
    assert len(by_example) == 8 and (by_example.size() == 9).all()
    assert (by_example.template.nunique() == 1).all()
    assert (grid.groupby(["example_id", "asks"]).instruction.nunique() == 1).all()
    with_shots = grid[grid.shots_say != "none"]
    shots = with_shots.shots.map(tuple)
    assert (shots.groupby(with_shots.example_id).nunique() == 1).all()


def test_the_shots_say_what_the_condition_says_whatever_is_asked(grid, examples):
    label = examples.set_index("example_id").label
    for row in grid[grid.shots_say != "none"].itertuples():
        answers = [
            message["content"].removeprefix(row.prefix).strip()
            for message in json.loads(row.messages)
            if message["role"] == "assistant"
        ]
        told = [label[s] if row.shots_say == "truth" else 1 - label[s] for s in row.shots]
        assert answers == [row.choices[i] for i in told]


def test_no_instruction_of_the_grid_has_its_role_in_the_shots(grid):
    assert not grid.instruction.str.endswith("_shown").any()


def test_without_shots_there_is_no_grid(examples):
    queries = examples[examples.split != "shot"]
    assert shots_grid_prompts(queries, byte_tokenizer(), context=NO_LIMIT).empty


def test_other_prompts_ask_for_neither_or_are_riddles_that_only_shots_reveal(examples):
    rows = other_prompts(examples, byte_tokenizer(), n_examples=8, context=NO_LIMIT)
    is_plain = rows.asks.isin(OTHERS)
    plain, riddles = rows[is_plain], rows[~is_plain]
    assert (plain.groupby("example_id").asks.agg(set) == set(OTHERS)).all()
    assert plain.example_id.nunique() == 8 and (plain.shots.map(len) == 0).all()
    assert set(riddles.asks) == {"truth", "lie"} and (riddles.shots.map(len) == 2).all()
    assert riddles.instruction.str.endswith("_shown").all()


def test_the_follow_up_goes_on_in_the_same_conversation_with_the_answer_given(answers):
    follow_ups = follow_up_prompts(answers, byte_tokenizer())
    assert follow_ups.row_id.is_unique and not set(follow_ups.row_id) & set(answers.row_id)
    for before, after in zip(answers.itertuples(), follow_ups.itertuples(), strict=True):
        given = f"{before.prefix} {before.choices[before.answer]}".strip()
        # Up to the assistant's turn, which the follow-up closes with the answer that was given.
        conversation = before.prompt.removesuffix(before.prefix)
        assert after.prompt.startswith(f"{conversation}{given}[end]")
        assert (after.label, after.choices) == (int(before.correct), ["no", "yes"])
        assert (after.first_row_id, after.first_answer) == (before.row_id, before.answer)
        assert after.split == before.split


def test_in_a_separate_context_question_and_answer_are_quoted_without_the_instruction(grid):
    # The nine prompts of one example.
    rows = grid.groupby(["asks", "shots_say"]).head(1)
    rows = rows.assign(answer=1, correct=rows.label == 1, knows=True, readable=True)
    assert rows.shots.map(len).max() == 2
    separate = follow_up_prompts(rows, byte_tokenizer(), separate=True)
    same = follow_up_prompts(rows, byte_tokenizer())
    assert not set(separate.row_id) & set(same.row_id) and separate.row_id.is_unique
    assert (separate.label == same.label).all()
    for before, after in zip(rows.itertuples(), separate.itertuples(), strict=True):
        instruction, *_, question = (m["content"] for m in json.loads(before.messages))
        assert after.prompt.count("[user]") == 1 and instruction not in after.prompt
        assert f"{question}\n\nThe answer was this:\n\n{before.prefix}" in after.prompt
    # So nothing tells whether the model was told to lie: twins have one prompt between them.
    assert separate.groupby("example_id").prompt.nunique().eq(1).all()
    assert same.prompt.is_unique


def test_drawn_answers_are_shared_by_twins_and_the_label_has_no_say(grid):
    drawn = draw_answers(grid)
    assert drawn.groupby("example_id").answer.nunique().eq(1).all()
    assert (drawn.correct == (drawn.answer == drawn.label)).all()
    turned = draw_answers(grid.assign(label=1 - grid.label))
    assert (turned.answer == drawn.answer).all() and (turned.correct != drawn.correct).all()
    many = pd.DataFrame({"example_id": [f"e{i}" for i in range(400)], "label": 1})
    assert 0.4 < draw_answers(many).answer.mean() < 0.6
    assert (draw_answers(many, seed=1).answer != draw_answers(many).answer).any()


def test_where_the_label_is_not_known_a_drawn_answer_is_neither_right_nor_wrong(answers):
    drawn = draw_answers(answers.assign(label=[-1, 0, 1, -1]))
    assert drawn.correct.isna().tolist() == [True, False, False, True]
    assert len(follow_up_prompts(drawn, byte_tokenizer())) == 2


def test_where_it_was_not_asked_whether_the_model_knows_an_answer_it_does_not(answers):
    follow_ups = follow_up_prompts(
        answers.assign(knows=[True, False, np.nan, None]), byte_tokenizer()
    )
    assert follow_ups.first_knows.tolist() == [True, False, False, False]


def test_an_answer_that_is_neither_right_nor_wrong_has_no_follow_up(answers):
    correct = pd.array([True, None, False, None], dtype="boolean")
    follow_ups = follow_up_prompts(answers.assign(correct=correct), byte_tokenizer())
    assert follow_ups.label.tolist() == [1, 0]


def test_an_answer_that_is_not_readable_or_too_long_has_no_follow_up(answers):
    tokenizer = byte_tokenizer()
    some_readable = answers.assign(readable=[True, False, True, True])
    assert len(follow_up_prompts(some_readable, tokenizer)) == 3
    longest = follow_up_prompts(answers, tokenizer).input_ids.map(len).max()
    assert len(follow_up_prompts(answers, tokenizer, context=int(longest) - 1)) < 4
    none = follow_up_prompts(answers, tokenizer, context=9)
    assert none.empty and {"readable", "answer", "first_correct"} <= set(none.columns)
