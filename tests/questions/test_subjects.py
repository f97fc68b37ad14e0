"""Subjects: rows of own data are left out by what they are about, and split by it."""

from pathlib import Path

import pandas as pd
import pytest

from dlk_utils.errors import DataError
from dlk_utils.questions import embedded
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.ids import near_duplicate_key, split_of
from dlk_utils.questions.sources import EMBEDDED
from dlk_utils.questions.subjects import Subject, known_subjects, split_by_subject, subjects_in
from dlk_utils.questions.trained import trained_keys

CITIES = [s for s in known_subjects() if s.dataset == "cities" and " " not in s.name]
TRAINED_CITIES = [s.name for s in CITIES if s.is_trained]
UNTRAINED_CITIES = [s.name for s in CITIES if not s.is_trained and len(subjects_in(s.name)) == 1]
WORDINGS = (
    "The city of {} is in Narnia.",
    "The city of {} is not in Narnia.",
    "It is not true that {} lies in Narnia.",
    "Narnia's largest city is {}!",
)


def first_of(dataset: str, *, trained: bool) -> Subject:
    return next(
        s
        for s in known_subjects()
        if s.dataset == dataset and s.is_trained == trained and s.noun in ("country", "thing")
    )


def rows_of(texts: list[str], kind: str = "claim") -> pd.DataFrame:
    """Rows as `load_examples` gives them to `split_by_subject`."""
    keys = [near_duplicate_key(text) for text in texts]
    table = pd.DataFrame({"text": texts, "near_duplicate_key": keys})
    return table.assign(kind=kind, choice_0="", choice_1="")


def claims_csv(path: Path, texts: list[str]) -> str:
    table = pd.DataFrame({"statement": texts, "label": [i % 2 for i in range(len(texts))]})
    table.to_csv(path, index=False)
    return str(path)


def splits_of(texts: list[str]) -> list[str]:
    return list(split_by_subject(rows_of(texts)).split)


# What is left out.


@pytest.mark.trap(5)
def test_a_trained_city_is_left_out_in_other_wordings_and_negated_and_counted(tmp_path, capsys):
    trained = [wording.format(TRAINED_CITIES[0]) for wording in WORDINGS]
    others = [wording.format(city) for city in UNTRAINED_CITIES[:20] for wording in WORDINGS]
    path = claims_csv(tmp_path / "own.csv", others + trained)
    examples = load_examples(path, 1000, n_pool=1000)
    assert sorted(examples.text) == sorted(others)
    assert examples.attrs["dropped_trained_on"] == {path: 4}
    said = examples.attrs["trained_on"][path]
    assert said.startswith("left out 4 of 84 rows because an organism of this package was trained")
    assert f"4 that name a city (first: '{trained[0]}')" in said
    assert f"own.csv: {said}" in capsys.readouterr().out


def test_a_trained_country_is_left_out_with_its_capital_alone():
    country = first_of("capitals", trained=True).name
    capital = dict(embedded.capital_facts())[country]
    about_capital = [
        f"The capital of {country} is Narnia City.",
        f"Narnia City isn't the capital of {country}.",
        f"{capital} is a fine place.",
    ]
    reasons = split_by_subject(rows_of([*about_capital, f"{country} has hills."])).trained_on
    assert list(reasons) == ["country", "country", "city", ""]


def test_a_trained_thing_is_left_out_where_a_claim_begins_with_it():
    thing = first_of("categories", trained=True).name
    noun = thing.removeprefix("A ").removeprefix("An ")
    texts = [f"{thing} is a fruit.", f"The {noun} isn't blue.", f"{noun.title()}s are old."]
    reasons = split_by_subject(rows_of([*texts, f"They saw a {noun}."])).trained_on
    assert list(reasons) == ["thing", "thing", "thing", ""]


@pytest.mark.parametrize(
    "text, name",
    [
        ("The city of Koeln is in Japan.", "Köln"),
        ("Lodz's centre is old.", "Łódź"),
        ("Nice is in France.", "Nice"),
        ("Mice are animals.", "A mouse"),
        ("Sheep are animals.", "A sheep"),
        ("Salmon is a fruit.", "A salmon"),
        ("Gold is not a fruit.", "Gold"),
        ("Table tennis is a sport.", "Table tennis"),
    ],
)
def test_a_subject_is_known_in_other_spellings(text, name):
    assert name.casefold() in {subject.name.casefold() for subject in subjects_in(text)}


@pytest.mark.parametrize(
    "text",
    [
        "Nice people live here.",
        "Male giraffes fight.",
        "nice and perm",
        "Gold medals are heavy.",
        "Sheep farms are large.",
        "Parisian cafes are open.",
        "Luxembourg is small.",
        "",
        "?!",
    ],
)
def test_an_ordinary_word_or_a_part_of_one_is_no_subject(text):
    assert subjects_in(text) == []


@pytest.mark.parametrize("word", ["Nice", "Gold", "Sheep"])
def test_a_word_that_may_be_something_else_is_a_name_before_some_verbs_alone(word):
    assert subjects_in(f"{word} is old.") and subjects_in(f"{word} has a price.")
    assert subjects_in(f"{word} grows every year.") == []
    # It then goes by how it begins, like a claim about anything else.
    [row] = split_by_subject(rows_of([f"{word} grows every year."])).itertuples()
    assert row.subject == f"begins: {word.lower()}" and row.trained_on == ""


def test_of_two_names_at_one_place_the_longer_counts():
    assert {s.name for s in subjects_in("They went to Ho Chi Minh City.")} == {"Ho Chi Minh City"}


def test_every_claim_that_an_organism_was_trained_on_is_about_a_subject_that_is_left_out():
    trained = {(s.dataset, s.name) for s in known_subjects() if s.is_trained}
    facts = {
        "cities": (embedded.city_facts, embedded.smaller_city_facts),
        "capitals": (embedded.capital_facts,),
        "continents": (embedded.continent_facts,),
        "categories": (embedded.category_facts,),
    }
    n_trained_claims = 0
    for dataset, facts_of in facts.items():
        source = EMBEDDED[dataset]
        makers = (source.make_rows, source.make_unasked_rows)
        for make_facts, make_rows in zip(facts_of, makers, strict=False):
            subjects = [name for name, _ in make_facts() for _ in range(4)]
            for name, (text, _) in zip(subjects, make_rows(4), strict=True):
                if near_duplicate_key(text) in trained_keys():
                    n_trained_claims += 1
                    assert (dataset, name) in trained, text
                    assert any(subject.is_trained for subject in subjects_in(text)), text
    assert n_trained_claims > 2000


def test_reviews_go_by_near_duplicates_alone():
    texts = [f"This film shows {TRAINED_CITIES[0]} and {i} trains" for i in range(30)]
    table = split_by_subject(rows_of(texts, kind="review"))
    assert set(table.trained_on) == {""}
    keys = [near_duplicate_key(text) for text in texts]
    assert list(table.split) == [split_of(key, embedded=False) for key in keys]


def test_a_file_of_trained_subjects_alone_is_refused(tmp_path):
    path = claims_csv(tmp_path / "own.csv", [WORDINGS[0].format(c) for c in TRAINED_CITIES[:9]])
    with pytest.raises(DataError, match="left out: 9, because an organism was trained on"):
        load_examples(path, 10)


# The split.


@pytest.mark.slow
@pytest.mark.trap(5)
def test_all_claims_about_a_city_are_in_the_split_of_the_embedded_claim_about_it(tmp_path):
    wordings = [wording.format(city) for city in UNTRAINED_CITIES[:200] for wording in WORDINGS]
    path = claims_csv(tmp_path / "own.csv", wordings)
    both = load_examples(["cities", path], 1000, n_pool=1000)
    city = both.text.map(lambda text: subjects_in(text)[0].name)
    assert (both.groupby(city).split.nunique() == 1).all()
    assert (both.groupby(city).subject.nunique() == 1).all()
    assert both.attrs["dropped_in_another"][path] == 0
    assert set(both.split) == {"shot", "train", "validation", "test"}


PAIRS = {
    "translations": (
        [
            f"The Spanish word 'palabra{i}' means '{end}'."
            for i in range(60)
            for end in ("x", "to y")
        ],
        [f"The Spanish word 'palabra{i}' does not mean 'x'." for i in range(60) for _ in "ab"],
    ),
    "comparisons": (
        [f"{10 + i} is larger than {90 - j}." for i in range(30) for j in range(2)],
        [f"{10 + i} is not smaller than {90 - j}." for i in range(30) for j in range(2)],
    ),
    "cities that nobody knows": (
        [f"The city of Atl{i} is in {end}." for i in range(60) for end in ("France", "the U. K.")],
        [f"The city of Atl{i} is not in {end}." for i in range(60) for end in ("France", "Fiji")],
    ),
    "without a verb that is known": (
        [f"Пан{i} {end}" for i in range(60) for end in ("живёт в Киеве", "любит чай")],
        [f"Пан{i} не {end}" for i in range(60) for end in ("живёт в Киеве", "любит чай")],
    ),
}


@pytest.mark.trap(5)
@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
def test_both_claims_of_a_pair_and_their_negations_are_in_one_split(pairs):
    claims, negations = map(splits_of, pairs)
    assert claims[::2] == claims[1::2] == negations[::2]
    # And the pairs do not all end in one.
    assert set(claims) == {"shot", "train", "validation", "test"}


def test_claims_that_all_begin_alike_are_split_where_they_differ():
    splits = splits_of([f"It is said that the hall has {i} doors" for i in range(400)])
    assert {splits.count(split) > 20 for split in set(splits)} == {True} and len(set(splits)) == 4


def test_the_split_of_a_near_duplicate_is_the_same_in_another_case():
    texts = [WORDINGS[0].format(city) for city in UNTRAINED_CITIES[:40]]
    splits = splits_of([*(text.lower() for text in texts), *texts])
    assert splits[:40] == splits[40:] == splits_of(texts)


def test_texts_of_very_many_words_that_begin_alike_go_by_all_of_their_words():
    texts = ["so " * 5000 + str(i) for i in range(60)]
    assert splits_of(texts) == [split_of(near_duplicate_key(t), embedded=False) for t in texts]
