"""Hub sets, from small local copies in the hub's layout.

That is `data/<split>-00000-of-00001.parquet`, or a folder for each configuration.
"""

from pathlib import Path
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


def record(name: str, i: int) -> dict:
    """Record number `i` of a data set, as the hub has it."""
    match name:
        case "amazon_polarity":
            return {"label": i % 2, "title": f"title {i}", "content": f"content {i} of a review"}
        case "imdb_hub":
            return {"text": f"film {i} was seen", "label": i % 2}
        case "sst2":
            return {"sentence": f"sentence {i} here", "label": i % 2, "idx": i}
        case "qnli":
            return {"question": f"is {i}?", "sentence": f"it is {i}", "label": i % 2, "idx": i}
        case "boolq":
            return {"question": f"is it {i}", "answer": bool(i % 2), "passage": f"passage {i}"}
        case "tweet_irony":
            return {"text": f"tweet {i} of mine", "label": i % 2}
        case "truthful_qa":
            return truthful_qa_record(i, f"right {i}", f"wrong {i}")


def truthful_qa_record(i: int, right: str, wrong: str) -> dict:
    return {
        "question": f"what happens {i}",
        "mc1_targets": {"choices": [right, wrong, "other"], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["x"], "labels": [1]},
    }


def local_copy(folder: Path, name: str, records: list[dict]) -> str:
    """A folder as the repository of a data set is.

    If the set has a configuration, it stands beside another one and the README names both.
    """
    rule = hub_sets()[name]
    copy, split, config = folder / name, rule["split"], rule.get("config")
    file_name = f"{split}-00000-of-00001.parquet"
    (copy / (config or "data")).mkdir(parents=True)
    pd.DataFrame(records).to_parquet(copy / (config or "data") / file_name)
    if config:
        (copy / "another").mkdir()
        pd.DataFrame({"unlike": range(9)}).to_parquet(copy / "another" / file_name)
        configs = "".join(
            f"- config_name: {c}\n  data_files:\n  - split: {split}\n    path: {c}/{split}-*\n"
            for c in ("another", config)
        )
        (copy / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return str(copy)


def copy_of(folder: Path, name: str) -> str:
    return local_copy(folder, name, [record(name, i) for i in range(60)])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", hub_sets())
def test_a_local_copy_in_the_hubs_layout_becomes_examples(tmp_path, name):
    folder = copy_of(tmp_path, name)
    examples = load_examples(folder, 20)
    [kind] = set(examples.kind)
    assert kind == hub_sets()[name]["kind"] and len(prompt_library(kind)) >= 4
    source = source_of(folder)
    assert source["folder"] == name and len(source["xxh3_128"]) == 32
    number = examples.text.str.extract(r"(\d+)")[0].astype(int)
    if name == "truthful_qa":
        right = [(e.choice_0, e.choice_1)[e.label] for e in examples.itertuples()]
        assert right == [f"right {i}" for i in number]
        # The right answer comes first in the data, and may not always be the same choice.
        assert set(examples.label) == {0, 1}
    else:
        turned = name == "qnli"
        assert (examples.label == (number + turned) % 2).all()


def test_a_folder_without_configurations_is_read_too(tmp_path):
    folder = tmp_path / "sst2" / "data"
    folder.mkdir(parents=True)
    records = pd.DataFrame([record("sst2", i) for i in range(60)])
    records.to_parquet(folder / "validation-00000-of-00001.parquet")
    assert len(load_examples(str(folder.parent), 20)) >= 20


@pytest.mark.trap(1)
def test_a_question_whose_choices_begin_alike_is_asked_by_letter_or_as_a_claim(tmp_path):
    records = [truthful_qa_record(i, f"The right {i}", f"The wrong {i}") for i in range(60)]
    examples = load_examples(local_copy(tmp_path, "truthful_qa", records), 20)
    rows = make_prompts(examples, byte_tokenizer(), n_known=3)
    choices = prompt_library("question").choices.str[0]
    quoting = choices.index[choices.str.contains("{{", regex=False)]
    assert len(quoting) and not set(rows.template) & set(quoting)
    assert set(rows.attrs["choices_alike"]) == set(rows.example_id)
    with pytest.raises(ChoiceError, match="differ in their first token"):
        make_prompts(examples, byte_tokenizer(), templates=["question_plain"])


@pytest.mark.trap(31)
def test_another_rule_is_another_source(tmp_path, monkeypatch):
    folder = copy_of(tmp_path, "qnli")
    before = source_of(folder)
    monkeypatch.setitem(hub_sets()["qnli"], "label_1", 1)
    assert source_of(folder) != before
    assert source_of(folder)["xxh3_128"] == before["xxh3_128"]


def test_a_set_of_the_hub_goes_by_its_commit(monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(
        HfApi, "repo_info", lambda *a, repo_type, **k: SimpleNamespace(sha=f"0123 of a {repo_type}")
    )
    assert source_of("boolq")["commit"] == "0123 of a dataset"


def test_a_copy_without_the_columns_is_refused(tmp_path):
    folder = local_copy(tmp_path, "boolq", [{"passage": "p", "answer": True}] * 60)
    with pytest.raises(DataError, match="expected columns for"):
        load_examples(folder, 20)


def test_a_folder_of_another_name_is_refused(tmp_path):
    (tmp_path / "whatever").mkdir()
    with pytest.raises(DataError, match="unknown data set"):
        load_examples(str(tmp_path / "whatever"), 20)
