"""Hub sets from small local copies in the hub's layout: `data/<split>-00000-of-00001.parquet`, or a folder for each configuration."""

from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import byte_tokenizer

from dlk_utils.errors import ChoiceError, DataError
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.hub_sets import hub_sets
from dlk_utils.questions.prompts import make_prompts
from dlk_utils.questions.sources import source_of
from dlk_utils.questions.templates import prompt_library

ROWS = {
    "amazon_polarity": lambda i: {
        "label": i % 2,
        "title": f"title {i}",
        "content": f"content {i} of a review",
    },
    "imdb_hub": lambda i: {"text": f"film {i} was seen", "label": i % 2},
    "sst2": lambda i: {"sentence": f"sentence {i} here", "label": i % 2, "idx": i},
    "qnli": lambda i: {
        "question": f"what is {i}",
        "sentence": f"it is {i}",
        "label": i % 2,
        "idx": i,
    },
    "boolq": lambda i: {"question": f"is it {i}", "answer": bool(i % 2), "passage": f"passage {i}"},
    "tweet_irony": lambda i: {"text": f"tweet {i} of mine", "label": i % 2},
    "truthful_qa": lambda i: {
        "question": f"what happens {i}",
        "mc1_targets": {"choices": [f"right {i}", f"wrong {i}", "other"], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["x"], "labels": [1]},
    },
}


LABEL = {  # what is right, by the number in the text
    "amazon_polarity": lambda i: i % 2,
    "imdb_hub": lambda i: i % 2,
    "sst2": lambda i: i % 2,
    "qnli": lambda i: 1 - i % 2,
    "boolq": lambda i: i % 2,
    "tweet_irony": lambda i: i % 2,
}


def local(tmp_path, name, make, n=60):
    """A folder as the set's repository is: of several configurations in folders of their own, if it has any, named in the README."""
    folder, config, split = (
        tmp_path / name,
        hub_sets()[name].get("config"),
        hub_sets()[name]["split"],
    )
    file = f"{split}-00000-of-00001.parquet"
    (folder / (config or "data")).mkdir(parents=True)
    pd.DataFrame([make(i) for i in range(n)]).to_parquet(folder / (config or "data") / file)
    if config:
        (folder / "another").mkdir()
        pd.DataFrame([{"unlike": i} for i in range(9)]).to_parquet(folder / "another" / file)
        listed = "".join(
            f"- config_name: {c}\n  data_files:\n  - split: {split}\n    path: {c}/{split}-*\n"
            for c in ("another", config)
        )
        (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_each_set_of_the_registry_is_tried_here():
    assert set(ROWS) == set(hub_sets())


@pytest.mark.parametrize("name", ROWS)
def test_a_local_copy_in_the_hubs_layout_becomes_examples(tmp_path, name):
    folder = local(tmp_path, name, ROWS[name])
    found = load_examples(str(folder), 20)
    assert (
        set(found.kind) == {hub_sets()[name]["kind"]}
        and set(found.label) == {0, 1}
        and len(prompt_library(found.kind[0])) >= 4
    )
    assert (
        source_of(str(folder))["folder"] == name and len(source_of(str(folder))["xxh3_128"]) == 32
    )
    if name != "truthful_qa":
        assert (
            found.label == found.text.str.extract(r"(\d+)")[0].astype(int).map(LABEL[name])
        ).all()


def test_a_folder_without_configurations_is_read_too(tmp_path):
    (tmp_path / "sst2" / "data").mkdir(parents=True)
    pd.DataFrame([ROWS["sst2"](i) for i in range(60)]).to_parquet(
        tmp_path / "sst2" / "data" / "validation-00000-of-00001.parquet"
    )
    assert len(load_examples(str(tmp_path / "sst2"), 20)) >= 20


def test_the_right_answer_of_truthful_qa_is_not_always_the_same_choice(tmp_path):
    found = load_examples(str(local(tmp_path, "truthful_qa", ROWS["truthful_qa"])), 20)
    right = found.apply(lambda r: (r.choice_0, r.choice_1)[r.label], axis=1)
    assert right.str.startswith("right").all() and found.label.nunique() == 2


@pytest.mark.trap(1)
def test_a_question_whose_choices_begin_alike_is_asked_by_letter_or_as_a_claim(tmp_path):
    make = lambda i: (
        ROWS["truthful_qa"](i)
        | {"mc1_targets": {"choices": [f"The right {i}", f"The wrong {i}"], "labels": [1, 0]}}
    )
    rows = make_prompts(
        load_examples(str(local(tmp_path, "truthful_qa", make)), 20), byte_tokenizer(), n_known=3
    )
    said = prompt_library("question").choices.map(lambda c: "{{" in c[0])
    assert not set(rows.template) & set(said.index[said]) and set(
        rows.attrs["choices_alike"]
    ) == set(rows.example_id)
    with pytest.raises(ChoiceError, match="differ in their first token"):
        make_prompts(
            load_examples(str(tmp_path / "truthful_qa"), 20),
            byte_tokenizer(),
            templates=["question_plain"],
        )


@pytest.mark.trap(31)
def test_another_rule_is_another_source(tmp_path, monkeypatch):
    folder = str(local(tmp_path, "qnli", ROWS["qnli"]))
    before = source_of(folder)
    monkeypatch.setitem(hub_sets()["qnli"], "label_1", 1)
    assert source_of(folder) != before and source_of(folder)["xxh3_128"] == before["xxh3_128"]


def test_a_set_of_the_hub_goes_by_its_commit(monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(
        HfApi, "repo_info", lambda *a, repo_type, **k: SimpleNamespace(sha=f"0123 of a {repo_type}")
    )
    assert source_of("boolq")["commit"] == "0123 of a dataset"


def test_a_copy_without_the_columns_is_refused(tmp_path):
    folder = local(tmp_path, "boolq", lambda i: {"passage": "p", "answer": True})
    with pytest.raises(DataError, match="expected columns for"):
        load_examples(str(folder), 20)


def test_a_folder_of_another_name_is_refused(tmp_path):
    (tmp_path / "whatever").mkdir()
    with pytest.raises(DataError, match="unknown data set"):
        load_examples(str(tmp_path / "whatever"), 20)
