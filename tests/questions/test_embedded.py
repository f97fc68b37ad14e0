"""Embedded data sets: labels are recomputed from the text, and answers do not give them away."""

import re

import pandas as pd
import pytest

from dlk_utils.questions.sources import EMBEDDED, read_source

CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Egypt": "Cairo",
    "Spain": "Madrid",
    "Norway": "Oslo",
    "Cuba": "Havana",
    "Canada": "Ottawa",
    "Austria": "Vienna",
}
COUNTRIES = {
    "Osaka": "Japan",
    "Milan": "Italy",
    "Ankara": "Turkey",
    "Hamburg": "Germany",
    "Chicago": "United States",
    "Mumbai": "India",
    "Busan": "South Korea",
    "Kazan": "Russia",
    "Toronto": "Canada",
    "Medellín": "Colombia",
    "Shanghai": "China",
    "Sydney": "Australia",
}


@pytest.mark.slow
def test_reviews_hold_text_without_html_line_breaks_or_entities():
    text = read_source("imdb").text
    assert not text.str.contains(r"<\s*br|&amp;|&quot;|&#\d", regex=True).any()
    assert not text.str.contains(r"\s\s|\n").any()


def test_labels_of_arithmetic_are_right():
    for row in read_source("arithmetic").itertuples():
        a, b, total = map(int, re.fullmatch(r"(\d+) plus (\d+) equals (\d+)\.", row.text).groups())
        assert row.label == (a + b == total), row.text


def test_labels_of_comparisons_are_right():
    for row in read_source("comparisons").itertuples():
        a, word, b = re.fullmatch(r"(\d+) is (larger|smaller) than (\d+)\.", row.text).groups()
        is_true = int(a) > int(b) if word == "larger" else int(a) < int(b)
        assert row.label == is_true, row.text


def test_two_numbers_are_added_or_compared_only_once():
    sums = [tuple(re.findall(r"\d+", text)[:2]) for text in read_source("arithmetic").text]
    pairs = [frozenset(re.findall(r"\d+", text)) for text in read_source("comparisons").text]
    assert len(set(sums)) == len(sums) and len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    "name, pattern, answers, n_subjects",
    [
        ("capitals", r"^The capital of (?P<subject>.+) is (?P<answer>.+)\.$", CAPITALS, 150),
        ("cities", r"^The city of (?P<subject>.+) is in (?P<answer>.+)\.$", COUNTRIES, 700),
    ],
)
def test_there_is_one_claim_a_subject_and_its_label_is_right(name, pattern, answers, n_subjects):
    rows = read_source(name)
    claims = rows.text.str.extract(pattern).assign(label=rows.label)
    assert claims.notna().all(axis=None)
    assert claims.subject.is_unique and len(claims) >= n_subjects
    known = claims[claims.subject.isin(answers)]
    assert len(known) == len(answers)
    assert (known.label == (known.answer == known.subject.map(answers))).all()


@pytest.mark.parametrize("name", ["cities", "continents", "categories"])
def test_the_answer_that_a_claim_gives_does_not_tell_whether_it_is_true(name):
    """The mistake would be to draw false answers evenly: *China*, the most frequent true answer of
    all, would then be true nearly always."""
    rows = pd.DataFrame(EMBEDDED[name].make_rows(8), columns=["text", "label"])
    answer = rows.text.str.removesuffix(".")
    answer = answer.str.split(r" is in (?:the )?| is an? ", regex=True).str[-1]
    # True and false claims weigh the same in sum.
    weight = rows.label.map(1 / rows.label.value_counts())
    share_true = (weight * rows.label).groupby(answer).sum() / weight.groupby(answer).sum()
    n_claims = answer.value_counts()
    frequent = share_true[n_claims.index[n_claims >= 100]]
    assert len(frequent) >= 4
    assert frequent.between(0.3, 0.75).all(), frequent.round(2).to_dict()
