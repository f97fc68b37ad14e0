"""Hub sets, from small local copies in the hub's layout.

That is `data/<split>-00000-of-00001.parquet`, or a folder for each configuration.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from tiny_models import byte_tokenizer

from dlk_utils.errors import ChoiceError, DataError
from dlk_utils.questions import hub_sets as hub_sets_module
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


@pytest.mark.parametrize("name", ["sst2", "imdb_hub"])
def test_an_old_loading_script_beside_the_data_is_left_alone(tmp_path, name):
    folder = copy_of(tmp_path, name)
    ran = tmp_path / "ran"
    script = f"import pathlib\npathlib.Path({str(ran)!r}).write_text('it ran')\n"
    for script_name in (name, "glue"):
        (Path(folder) / f"{script_name}.py").write_text(script)
    # What such a clone also has; the parquet files need not have the numbers of rows in it.
    label = {"names": ["negative", "positive"], "_type": "ClassLabel"}
    text = {"dtype": "string", "_type": "Value"}
    split = {"name": hub_sets()[name]["split"], "num_bytes": 9, "num_examples": 25000}
    info = {"features": {"text": text, "label": label}, "splits": {split["name"]: split}}
    if name == "imdb_hub":
        infos = json.dumps({"plain_text": info})
        (Path(folder) / "dataset_infos.json").write_text(infos)
    examples = load_examples(folder, 20)
    assert len(examples) >= 20 and set(examples.label) == {0, 1}
    assert not ran.exists()


def test_pointers_of_git_lfs_are_recognised(tmp_path):
    folder = copy_of(tmp_path, "imdb_hub")
    [path] = Path(folder).rglob("*.parquet")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="git lfs pull"):
        load_examples(folder, 20)


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    folder = copy_of(tmp_path, "imdb_hub")
    load = hub_sets_module._load

    def load_while_another_writes(*arguments):
        records = load(*arguments)
        (Path(folder) / "more.txt").write_text("more")
        return records

    monkeypatch.setattr(hub_sets_module, "_load", load_while_another_writes)
    with pytest.raises(DataError, match="imdb_hub: the folder changed while it was read"):
        load_examples(folder, 20)
    monkeypatch.undo()
    assert load_examples(folder, 20).attrs["sources"] == {folder: source_of(folder)}


def test_hidden_files_are_no_part_of_the_source(tmp_path):
    folder = copy_of(tmp_path, "imdb_hub")
    before = source_of(folder)
    (Path(folder) / ".git").mkdir()
    (Path(folder) / ".git" / "index").write_text("of a clone")
    assert source_of(folder) == before


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


def test_a_copy_with_very_many_other_columns_is_refused_in_few_words(tmp_path):
    record = {f"column_{i}": i for i in range(1000)} | {"passage": "p"}
    folder = local_copy(tmp_path, "boolq", [record])
    with pytest.raises(DataError, match=r"\(1,001 in all\)") as error:
        load_examples(folder, 20)
    assert len(str(error.value)) < 800


def test_a_folder_of_another_name_is_refused(tmp_path):
    (tmp_path / "whatever").mkdir()
    with pytest.raises(DataError, match="unknown data set"):
        load_examples(str(tmp_path / "whatever"), 20)
