"""Examples: balanced by label, split by hash, without repeats and without training data."""

import inspect
import re
import warnings
from pathlib import Path

import pandas as pd
import pytest

from dlk_utils.errors import DataError
from dlk_utils.questions.examples import load_examples, training_examples
from dlk_utils.questions.ids import EXAMPLE_COLUMNS, split_of
from dlk_utils.questions.sources import dataset_names, source_of
from dlk_utils.questions.trained import trained_keys

CLAIMS = [(f"Item {i} is {'red' if i % 2 else 'blue'}, they say", i % 2) for i in range(60)]


@pytest.fixture(scope="module")
def embedded() -> pd.DataFrame:
    return load_examples(dataset_names(), 100)


@pytest.fixture(scope="module")
def many() -> pd.DataFrame:
    return load_examples("arithmetic,comparisons,capitals", 5000)


def claims_csv(path: Path, claims: list[tuple[str, int]] = CLAIMS) -> str:
    pd.DataFrame(claims, columns=["statement", "label"]).to_csv(path, index=False)
    return str(path)


def without_case_and_punctuation(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def test_a_file_of_one_label_is_taken_as_it_is(tmp_path):
    path = claims_csv(tmp_path / "ones.csv", [(text, 1) for text, _ in CLAIMS])
    asked = load_examples(path, 20).query("split != 'shot'")
    assert len(asked) == 20 and set(asked.label) == {1}


def test_every_row_is_complete_and_has_an_id_of_its_own(embedded):
    assert list(embedded.columns) == EXAMPLE_COLUMNS
    assert embedded.notna().all(axis=None) and embedded.example_id.is_unique
    assert sorted(embedded.dataset.unique()) == dataset_names()


def test_labels_are_balanced_in_each_data_set_and_pool(embedded):
    is_shot = embedded.split == "shot"
    queries = embedded[~is_shot].groupby(["dataset", "label"]).size()
    assert (queries == 50).all() and len(queries) == 2 * len(dataset_names())
    pool = embedded[is_shot].groupby(["dataset", "label"]).size()
    assert pool.between(6, 16).all() and len(pool) == 2 * len(dataset_names())


def test_an_odd_number_of_examples_differs_by_one_between_the_labels():
    examples = load_examples("arithmetic", 21)
    assert sorted(examples[examples.split != "shot"].label.value_counts()) == [10, 11]


def test_a_seed_decides_which_examples_are_taken():
    one, again, other = (load_examples("arithmetic,capitals", 40, seed=s) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(one, again)
    assert set(one.example_id) != set(other.example_id)


def test_the_split_does_not_depend_on_seed_size_or_other_data_sets():
    few = load_examples("capitals,arithmetic", 30, seed=3)
    alone = load_examples("capitals", 5000, seed=8)
    both = few.merge(alone, on="example_id")
    assert len(both) >= 30
    assert (both.split_x == both.split_y).all()
    assert [split_of(key) for key in alone.near_duplicate_key] == list(alone.split)


def test_about_half_of_what_is_asked_is_train_a_third_test_and_a_sixth_validation(many):
    asked = many[(many.dataset != "capitals") & (many.split != "shot")]
    share = asked.split.value_counts(normalize=True)
    assert share["train"] == pytest.approx(1 / 2, abs=0.03)
    assert share["test"] == pytest.approx(1 / 3, abs=0.03)
    assert share["validation"] == pytest.approx(1 / 6, abs=0.03)


@pytest.mark.trap(5)
def test_no_example_or_normalised_text_is_on_two_sides(embedded, many):
    for examples in (embedded, many):
        by_text = examples.groupby(examples.text.map(without_case_and_punctuation))
        assert (by_text.split.nunique() == 1).all()


def test_the_label_has_no_part_in_the_split(tmp_path):
    one = load_examples(claims_csv(tmp_path / "a.csv"), 40)
    turned = load_examples(claims_csv(tmp_path / "b.csv", [(t, 1 - y) for t, y in CLAIMS]), 40)
    both = one.merge(turned, on="example_id")
    assert len(both) == len(one)
    assert (both.label_x == 1 - both.label_y).all() and (both.split_x == both.split_y).all()


@pytest.mark.parametrize("right, wrong", ["≠=", "<>", "≤≥", "+*", "-/"])
def test_claims_that_differ_in_a_sign_only_are_two_examples(tmp_path, right, wrong):
    claims = [(f"{i} {sign} {i + 1}", y) for i in range(60) for y, sign in enumerate(wrong + right)]
    path = claims_csv(tmp_path / "signs.csv", claims)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        examples = load_examples(path, 1000, n_pool=1000)
    assert len(examples) == 120 and examples.example_id.is_unique
    assert examples.attrs["dropped_duplicates"] == {path: 0}


def test_near_duplicates_are_counted_reported_and_kept_in_one_split(tmp_path):
    claims = CLAIMS + [("3 = 4", 0), ("3 != 4", 1), ("It rains.", 1), ("It rains!", 1)]
    path = claims_csv(tmp_path / "near.csv", claims)
    expected = "near.csv: 4 rows differ .* 2 of them also in the label .*'3 = 4' and '3 != 4'"
    with pytest.warns(UserWarning, match=expected):
        examples = load_examples(path, 1000, n_pool=1000)
    assert examples.attrs["near_duplicates"] == {path: 4}
    assert len(examples) == 64
    near = examples[examples.near_duplicate_key.duplicated(keep=False)]
    assert len(near) == 4
    assert (near.groupby("near_duplicate_key").split.nunique() == 1).all()


def test_embedded_data_has_no_near_duplicates(embedded):
    assert not embedded.near_duplicate_key.duplicated().any()
    assert set(embedded.attrs["near_duplicates"].values()) == {0}


def test_embedded_data_is_split_by_its_words_and_nothing_of_it_is_left_out(embedded):
    assert list(embedded.split) == [split_of(key) for key in embedded.near_duplicate_key]
    assert list(embedded.subject) == list(embedded.near_duplicate_key)
    assert set(embedded.attrs["dropped_trained_on"].values()) == {0}
    assert set(embedded.attrs["trained_on"].values()) == {""}


@pytest.mark.slow
@pytest.mark.trap(5)
def test_a_near_duplicate_in_a_data_set_of_other_shares_is_on_no_other_side(tmp_path):
    # Embedded data has a split more than others have.
    of_package = load_examples("arithmetic", 1000, n_pool=1000)
    claims = list(zip(of_package.text.str.removesuffix(".") + "!", of_package.label, strict=True))
    path = claims_csv(tmp_path / "own.csv", claims)
    both = load_examples(["arithmetic", path], 1000, n_pool=1000)
    assert (both.groupby("near_duplicate_key").split.nunique() == 1).all()
    n_left_out = both.attrs["dropped_in_another"][path]
    assert n_left_out > 0 and (both.dataset == path).sum() > 0


def test_repeated_rows_of_one_label_count_once(tmp_path):
    path = claims_csv(tmp_path / "twice.csv", CLAIMS + [(t.upper(), y) for t, y in CLAIMS])
    examples = load_examples(path, 1000)
    assert examples.example_id.is_unique and len(examples) == 60
    assert examples.attrs["dropped_duplicates"] == {path: 60}


@pytest.mark.parametrize("n", [3, 0, -5, True, 10.5, "ten", None])
def test_a_number_of_examples_that_is_no_whole_number_of_4_or_more_is_refused(n):
    # Unwrapped: here beartype would answer before the package does.
    with pytest.raises(DataError, match=f"n_examples.*{re.escape(repr(n))}"):
        inspect.unwrap(load_examples)("capitals", n)


@pytest.mark.parametrize(
    "names",
    ["capitals,capitals", "capitals, capitals", "", "capitals,", ",", [], ["capitals", "capitals"]],
)
def test_data_sets_that_repeat_or_are_empty_are_refused(names):
    with pytest.raises(DataError, match="datasets: expected different names"):
        load_examples(names, 10)


def test_examples_say_where_they_come_from():
    assert load_examples("capitals", 4).attrs["sources"] == {"capitals": source_of("capitals")}


def test_what_an_organism_was_trained_on_is_left_out_of_an_own_file_and_counted(tmp_path):
    reviews = training_examples("rotten_tomatoes", 4000)
    trained = reviews[reviews.near_duplicate_key.isin(trained_keys())].head(6)
    assert len(trained) == 6
    # A near-duplicate is left out too.
    texts = [*trained.text[:3], *(f"{text}, , !" for text in trained.text[3:])]
    trained_claims = list(zip(texts, trained.label, strict=True))
    path = claims_csv(tmp_path / "own.csv", CLAIMS + trained_claims)
    examples = load_examples(path, 1000)
    assert not set(examples.text) & set(texts) and len(examples) == 60
    assert examples.attrs["dropped_trained_on"] == {path: 6}
    only_trained = claims_csv(tmp_path / "all.csv", trained_claims)
    with pytest.raises(DataError, match="left out: 6, because an organism was trained on"):
        load_examples(only_trained, 10)


def test_what_an_earlier_data_set_has_is_counted_and_not_asked_twice(tmp_path):
    more_claims = [(f"Only here: {text}", label) for text, label in CLAIMS]
    one = claims_csv(tmp_path / "one.csv")
    two = claims_csv(tmp_path / "two.csv", CLAIMS + more_claims)
    examples = load_examples([one, two], 1000)
    assert examples.example_id.is_unique
    assert examples.dataset.value_counts().to_dict() == {one: 60, two: 60}
    assert examples.attrs["dropped_in_another"] == {one: 0, two: 60}
    with pytest.raises(DataError, match="got none; left out: 60, because an earlier data set"):
        load_examples([one, claims_csv(tmp_path / "three.csv")], 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["capitals", "cities", "arithmetic"])
def test_training_examples_are_of_their_own_split_and_balanced(name):
    examples = training_examples(name, 60)
    assert set(examples.split) == {"organism"} and list(examples.columns) == EXAMPLE_COLUMNS
    assert examples.label.value_counts().to_dict() == {0: 30, 1: 30}


def test_there_are_no_training_examples_in_data_that_is_not_embedded():
    with pytest.raises(DataError, match=r"expected one of arithmetic, .* got 'sst2'"):
        training_examples("sst2", 10)


def test_a_path_is_taken_alone_and_in_a_list(tmp_path):
    path = Path(claims_csv(tmp_path / "own.csv"))
    expected = load_examples(str(path), 8)
    for datasets in (path, [path], (str(path),)):
        pd.testing.assert_frame_equal(load_examples(datasets, 8), expected)


@pytest.mark.parametrize("datasets", [None, 3, [3], b"cities", {"cities": 1}])
def test_what_is_no_name_of_a_data_set_is_refused(datasets):
    with pytest.raises(DataError, match="datasets: expected names or paths"):
        inspect.unwrap(load_examples)(datasets, 8)


def test_one_file_under_two_names_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claims_csv(tmp_path / "own.csv")
    (tmp_path / "link.csv").symlink_to("own.csv")
    for other in ("./own.csv", "link.csv", str(tmp_path / "own.csv")):
        with pytest.raises(
            DataError, match=r"each file once, got one file under two names, 'own.csv' and"
        ):
            load_examples(["own.csv", other], 8)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = claims_csv(tmp_path / "own.csv")
    pd.testing.assert_frame_equal(load_examples("~/own.csv", 8), load_examples(path, 8))


@pytest.mark.parametrize("name", ["https://x.org/a.csv", "a.csv", "folder"])
def test_an_address_a_missing_file_and_a_folder_are_named_as_such(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    reason = {"h": "got an address of the web", "a": "no such file", "f": "is a folder"}
    with pytest.raises(DataError, match=reason[name[0]]):
        load_examples(name, 8)
