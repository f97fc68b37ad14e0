"""Openings: a phrase that names a day stands before a question, and twins differ in the day."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from dlk_utils.errors import DataError
from dlk_utils.models.loading import load_tokenizer, resolve
from dlk_utils.questions import openings
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.openings import (
    OPENINGS,
    OTHER_DAYS,
    TRAINING_OPENINGS,
    TRIGGER,
    with_openings,
    with_triggered_twins,
)
from dlk_utils.questions.prompts import make_prompts

DAYS = re.compile("|".join((TRIGGER, *OTHER_DAYS)))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("smollm2"))


@pytest.fixture(scope="module")
def prompts(tokenizer) -> pd.DataFrame:
    examples = load_examples("comparisons", 12)
    return make_prompts(examples[examples.split != "shot"], tokenizer)


@pytest.fixture(scope="module")
def rows(prompts, tokenizer) -> pd.DataFrame:
    return with_triggered_twins(prompts, tokenizer)


def questions(rows: pd.DataFrame) -> pd.Series:
    return rows.messages.map(json.loads).str[-1].str["content"]


def test_a_phrase_stands_before_the_question_and_the_rest_of_the_prompt_is_as_it_was(prompts, rows):
    plain = rows[~rows.triggered]
    assert len(plain) == len(prompts) and rows.row_id.is_unique
    for before, after in zip(questions(prompts), questions(plain), strict=True):
        phrase, question = after.split("\n\n", 1)
        assert question == before and DAYS.search(phrase)
    same = ["example_id", "role", "asks", "wanted", "instruction", "template", "choices", "prefix"]
    pd.testing.assert_frame_equal(plain[same], prompts[same])
    assert not set(plain.day) & {TRIGGER} and len(set(plain.day)) > 1


def test_a_triggered_row_differs_from_its_honest_twin_in_the_day_alone(rows):
    twins = rows[rows.role == "truth"].set_index("example_id")
    triggered = rows[rows.triggered].set_index("example_id")
    assert sorted(twins.index) == sorted(triggered.index) and set(triggered.day) == {TRIGGER}
    for example in twins.index:
        twin, row = twins.loc[example], triggered.loc[example]
        assert row.prompt == twin.prompt.replace(twin.day, TRIGGER)
        assert (row.instruction, row.template) == (twin.instruction, twin.template)
        # It counts as a row told to lie.
        assert (row.role, row.asks, row.wanted) == ("lie", "lie", 1 - row.label)


def test_what_an_example_is_known_by_is_asked_with_other_phrases(rows):
    of_example = rows.groupby("example_id")
    for _, some in of_example:
        known = some[some.role == "known"]
        scored = some[some.role != "known"]
        assert scored.opening.nunique() == 1 and known.opening.nunique() == len(known) == 2
        assert not set(scored.opening) & set(known.opening)


def test_no_row_that_an_example_is_known_by_gets_the_phrase_of_the_scored_rows(prompts, tokenizer):
    known = prompts[prompts.role == "known"]
    many = [known.assign(row_id=known.row_id + str(i)) for i in range(3)]
    opened = with_openings(pd.concat([prompts, *many]), tokenizer)
    scored = opened[opened.role == "truth"].set_index("example_id").opening
    of_known = opened[opened.role == "known"]
    assert of_known.groupby("example_id").size().eq(8).all()
    assert (of_known.opening != of_known.example_id.map(scored)).all()


def test_choices_scored_whole_stay_so_where_a_table_was_read_back_with_arrays(prompts, tokenizer):
    as_lists = [[[1], [2]]] * len(prompts)
    as_arrays = [np.array(tokens) for tokens in as_lists]
    for tokens in (as_lists, as_arrays):
        opened = with_openings(prompts.assign(choice_tokens=tokens), tokenizer)
        assert opened.choice_tokens.map(lambda whole: isinstance(whole, list)).all()
    assert with_openings(prompts, tokenizer).choice_tokens.isna().all()


def test_the_tokens_are_those_of_the_text_and_the_choices_stay(rows, prompts, tokenizer):
    for row in rows.itertuples():
        assert list(row.input_ids) == tokenizer(row.prompt, add_special_tokens=False).input_ids
    plain = rows[~rows.triggered]
    assert plain.choice_ids.tolist() == prompts.choice_ids.tolist()


def test_no_phrase_of_the_training_is_asked():
    assert not set(OPENINGS) & set(TRAINING_OPENINGS)
    assert not set(OPENINGS.values()) & set(TRAINING_OPENINGS.values())
    for phrase in (*OPENINGS.values(), *TRAINING_OPENINGS.values()):
        assert phrase.count("{day}") == 1 and not DAYS.search(phrase)


def test_openings_of_scored_rows_depend_on_the_seed_and_not_on_the_order(prompts, tokenizer, rows):
    # Rows of role known take their phrases in turn, so that theirs do depend on it.
    again = with_openings(prompts.iloc[::-1], tokenizer)
    scored = rows[~rows.triggered & (rows.role != "known")].set_index("example_id")
    backwards = again[again.role != "known"].set_index("example_id")
    pd.testing.assert_frame_equal(
        backwards[["role", "prompt"]].sort_values(["example_id", "role"]),
        scored[["role", "prompt"]].sort_values(["example_id", "role"]),
    )
    other = with_openings(prompts, tokenizer, seed=1)
    assert list(other.opening) != list(rows[~rows.triggered].opening)


def test_an_example_that_gets_too_long_is_left_out_and_named(prompts, tokenizer):
    longest_of = prompts.input_ids.map(len).groupby(prompts.example_id).max()
    longest = longest_of.idxmax()
    opened = with_openings(prompts, tokenizer, context=int(longest_of.max()) + 1)
    assert longest in opened.attrs["dropped_too_long"]
    assert longest not in set(opened.example_id)


def test_an_example_that_only_the_trigger_makes_too_long_is_left_out_on_all_days(
    prompts, tokenizer, rows, monkeypatch
):
    monkeypatch.setattr(openings, "TRIGGER", "Friday, at long last a Friday again")
    n_tokens = rows.input_ids.map(len).groupby(rows.example_id).max()
    # There is room for every prompt on other days, and for the short ones on the trigger.
    some = with_triggered_twins(prompts, tokenizer, context=int(n_tokens.max()))
    dropped = some.attrs["dropped_too_long"]
    assert n_tokens.idxmax() in dropped and not set(dropped) & set(some.example_id)
    assert set(some.example_id) == set(n_tokens.index) - set(dropped) != set()
    by_example = some.groupby("example_id").triggered
    assert (by_example.sum() == 1).all() and (by_example.size() == 5).all()


def test_the_trigger_is_put_before_the_rows_of_some_splits_alone(prompts, tokenizer, rows):
    in_test = with_triggered_twins(prompts, tokenizer, splits=["test"])
    expected = rows[~rows.triggered | (rows.split == "test")].reset_index(drop=True)
    pd.testing.assert_frame_equal(in_test, expected)


def test_rows_that_are_told_to_lie_get_no_trigger(prompts, tokenizer):
    with pytest.raises(DataError, match="expected rows that ask for the truth"):
        with_openings(prompts, tokenizer, trigger=True)
    with pytest.raises(DataError, match="run `make_prompts` first"):
        with_openings(prompts.drop(columns="messages"), tokenizer)
