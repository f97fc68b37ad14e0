"""Ids and splits: both follow from the content of an example, and never change."""

import hashlib
import inspect

import pytest

from dlk_utils.questions.ids import example_id, split_of


def split_by_percentage(key: str, *, shares: list[tuple[str, int]]) -> str:
    """The split of a key, written down apart from the package: cumulative percentages."""
    total = shares[-1][1]
    position = int(hashlib.sha256(f"split:{key}".encode()).hexdigest(), 16) % total
    return next(name for name, end in shares if position < end)


def test_the_id_ignores_case_space_and_punctuation_but_not_the_words():
    base = example_id("The film, they say: is GOOD!", "Yes", "No")
    assert base == example_id(" the film they   say is good", "yes.", "no")
    assert base != example_id("The film, they say: is BAD!", "Yes", "No")
    assert base != example_id("film the they say is good", "Yes", "No")


def test_the_id_depends_on_which_part_holds_which_words():
    base = example_id("Which?", "Yes", "No")
    assert base != example_id("Which?", "No", "Yes")
    assert example_id("a b", "c") != example_id("a", "b c")


def test_signs_and_texts_of_punctuation_alone_count():
    assert example_id("1 < 2") != example_id("1 > 2")
    assert example_id("-3 degrees") != example_id("3 degrees")
    assert example_id("!!!") != example_id("???")


def test_the_id_knows_nothing_of_the_label():
    assert list(inspect.signature(example_id).parameters) == ["text", "choice_0", "choice_1"]


def test_ids_and_splits_are_the_ones_that_were_written_down():
    # Another version of the package may not move an example to another side.
    assert example_id("The capital of France is Paris.") == "f4fddaad11584ee4"
    assert split_of("f4fddaad11584ee4") == "organism"


@pytest.mark.parametrize("embedded", [True, False])
def test_the_split_is_a_fixed_share_of_the_hash_space(embedded):
    shares = [("shot", 10), ("train", 35), ("validation", 43), ("test", 60)]
    if embedded:
        shares = [("organism", 40)] + [(name, 40 + end) for name, end in shares]
    keys = [f"key {i}" for i in range(2000)]
    splits = [split_of(key, embedded=embedded) for key in keys]
    assert splits == [split_by_percentage(key, shares=shares) for key in keys]
    assert set(splits) == {name for name, _ in shares}
