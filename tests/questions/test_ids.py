"""Ids, keys and splits follow from the content of an example, and never change."""

import hashlib
import inspect

import pytest

from dlk_utils.questions.ids import example_id, near_duplicate_key, split_of


def split_by_percentage(key: str, *, shares: list[tuple[str, int]]) -> str:
    """The split of a key, written down apart from the package: cumulative percentages."""
    total = shares[-1][1]
    position = int(hashlib.sha256(f"split:{key}".encode()).hexdigest(), 16) % total
    return next(name for name, end in shares if position < end)


def test_the_id_ignores_case_white_space_and_how_unicode_spells_a_letter():
    base = example_id("The café, they say: is GOOD!", "Yes", "No")
    assert base == example_id(" the CAFÉ, they\u00a0 say: is good!", "yes", " NO")
    assert base == example_id("The cafe\u0301, they say: is GOOD!", "Yes", "No")


@pytest.mark.parametrize(
    "one, other",
    [
        ("3 = 4", "3 != 4"),
        ("3 = 4", "3 ≠ 4"),
        ("3 ≥ 4", "3 ≤ 4"),
        ("3 * 4 = 12", "3 / 4 = 12"),
        ("3 + 4 = 12", "3 - 4 = 12"),
        ("It costs $5.", "It costs €5."),
        ("It rains.", "It rains?"),
        ("x²", "x2"),
        ("Let's eat, grandpa.", "Let's eat grandpa."),
        # Words of other scripts that differ in a vowel sign, a mark or a joiner.
        ("दिल्ली", "दल्ली"),
        ("กา", "ก่า"),
        ("می\u200cخواهم", "میخواهم"),
        ("für", "fur"),
        # Two words by `str.lower`, one by `str.casefold`.
        ("In Maßen", "In Massen"),
        # Two letters of Turkish.
        ("kız", "kiz"),
        ("!!!", "???"),
        ("👍", "👎"),
    ],
)
def test_whatever_may_carry_meaning_makes_another_text(one, other):
    assert example_id(one) != example_id(other)
    assert example_id("Which?", one, "x") != example_id("Which?", other, "x")


@pytest.mark.parametrize("hash_of", [example_id, near_duplicate_key])
def test_a_hash_depends_on_which_part_holds_which_words(hash_of):
    base = hash_of("Which?", "Yes", "No")
    assert base != hash_of("Which?", "No", "Yes")
    assert hash_of("a b", "c") != hash_of("a", "b c")


def test_near_duplicates_have_the_same_words_in_the_same_order():
    base = near_duplicate_key("The film, they say: is GOOD!", "Yes", "No")
    assert base == near_duplicate_key(" the film they   say is good", "yes.", "no")
    assert base != near_duplicate_key("The film, they say: is BAD!", "Yes", "No")
    assert base != near_duplicate_key("film the they say is good", "Yes", "No")
    assert near_duplicate_key("3 = 4") == near_duplicate_key("3 != 4")


def test_some_signs_and_texts_of_punctuation_alone_are_no_near_duplicates():
    assert near_duplicate_key("1 < 2") != near_duplicate_key("1 > 2")
    assert near_duplicate_key("-3 degrees") != near_duplicate_key("3 degrees")
    assert near_duplicate_key("!!!") != near_duplicate_key("???")


def test_the_id_knows_nothing_of_the_label():
    for hash_of in (example_id, near_duplicate_key):
        assert list(inspect.signature(hash_of).parameters) == ["text", "choice_0", "choice_1"]


def test_ids_keys_and_splits_are_the_ones_that_were_written_down():
    # Another version of the package may not move an example to another side.
    assert example_id("The capital of France is Paris.") == "2fd3a68caf2c4f5f"
    assert near_duplicate_key("The capital of France is Paris.") == "f4fddaad11584ee4"
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
