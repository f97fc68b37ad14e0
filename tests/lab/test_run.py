"""Runs share a kept result only if everything that decides it is equal."""

import inspect
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_models import WIDTH, byte_tokenizer, tiny_checkpoint
from transformers import LlamaForCausalLM

from dlk_utils.errors import DataError, ModelError, ParameterError
from dlk_utils.extract.families import tiny_model
from dlk_utils.extract.stages import store_answers, store_draws, store_gradients
from dlk_utils.lab import cache
from dlk_utils.lab import run as run_module
from dlk_utils.lab.run import Run, dataset_labels, default_runs_folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """The folder of a tiny model with random weights, which reads single bytes."""
    folder = tmp_path_factory.mktemp("model")
    return str(tiny_checkpoint(folder, num_hidden_layers=5, max_position_embeddings=1024))


@pytest.fixture(scope="module")
def answered(checkpoint, tmp_path_factory) -> Run:
    """A run whose prompts and answers are kept."""
    folder = str(tmp_path_factory.mktemp("runs"))
    run = Run(checkpoint, datasets="capitals", n_examples=12, runs_dir=folder, dtype="float32")
    assert len(run.answers) == len(run.prompts) > 0
    return run


def again(run: Run, **changes) -> Run:
    """A run that has computed nothing yet."""
    return replace(run, **changes)


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.cache.folder.iterdir())


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error."""

    def refuse(spec, device):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run_module, "load_spec", refuse)


@pytest.fixture
def finds_everything(monkeypatch, no_model):
    """Every store is taken to be complete, so that stages only say where it is."""
    monkeypatch.setattr(run_module, "is_complete", lambda folder: True)


def test_another_model_is_asked_about_no_more_examples_and_has_to_have_a_tokenizer(
    answered, checkpoint, tmp_path, no_model
):
    assert answered.with_model(checkpoint, n_examples=48).n_examples == answered.n_examples
    other = answered.with_model(checkpoint, n_examples=4)
    assert (other.n_examples, other.datasets) == (4, answered.datasets)
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(ModelError, match="it has no tokenizer"):
        answered.with_model(str(bare), n_examples=4)


def test_equal_parameters_share_files_and_load_no_model(answered, no_model):
    before = names(answered)
    other = again(answered)
    pd.testing.assert_frame_equal(other.answers, answered.answers)
    assert other.prompts.attrs == answered.prompts.attrs and names(other) == before


@pytest.mark.slow
@pytest.mark.trap(31)
@pytest.mark.parametrize(
    "change",
    [{"datasets": "categories"}, {"n_examples": 14}, {"seed": 1}, {"n_shots": 2}],
    ids=lambda change: next(iter(change)),
)
def test_each_parameter_that_decides_the_prompts_is_in_the_name_of_their_file(answered, change):
    before = names(answered)
    other = again(answered, **change)
    assert len(other.prompts) and len(names(answered)) == len(before) + 2
    assert other.record != answered.record


@pytest.mark.trap(31)
def test_another_model_or_number_format_gives_other_answers(
    answered, checkpoint, tmp_path, finds_everything
):
    def store(run: Run) -> str:
        return run.stored(store_answers, answered.prompts, "02-answers").name

    model = LlamaForCausalLM.from_pretrained(checkpoint)
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    others = [again(answered, dtype="float64"), again(answered, model=str(tmp_path))]
    assert len({store(run) for run in (answered, *others)}) == 3


def test_where_files_lie_and_how_they_are_computed_decide_nothing(
    answered, finds_everything, tmp_path
):
    options = {"contrast": True, "moved_at": answered.middle_layer}
    for change in ({"runs_dir": str(tmp_path)}, {"device": "cpu"}, {"engine": "ray"}):
        other = again(answered, **change)
        store = other.stored(store_gradients, answered.prompts, "02-clean-pass", **options)
        assert store.name in names(answered) and other.record == answered.record


def test_with_and_without_kept_states_the_model_gives_the_same_answers(answered):
    answers_only = again(answered, keep_states=False)
    assert answers_only.disk_of_states == "none: answers only"
    assert answered.disk_of_states.endswith("MB")
    columns = ["row_id", "margin", "mass", "top_token"]
    pd.testing.assert_frame_equal(
        answers_only.answers[columns], answered.answers[columns], rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_states_and_gradients_come_from_the_pass_that_answered(answered):
    assert answered.gradients().name.startswith("02-clean-pass")
    assert again(answered, keep_states=False).gradients().name.startswith("04-gradients")


@pytest.mark.trap(31)
def test_each_option_of_a_stage_and_its_rows_are_in_the_name_of_its_store(
    answered, finds_everything
):
    rows = answered.prompts

    def store(rows: pd.DataFrame = rows, **options) -> str:
        options = {"n_draws": 2, "p": 0.1, "scope": "sequence", "layers": "all"} | options
        return answered.stored(store_draws, rows, "03-draws", **options).name

    changes = [{"n_draws": 4}, {"p": 0.2}, {"scope": "last_token"}, {"layers": [0, 1]}]
    stores = [store(), store(rows.tail(-1)), *(store(**change) for change in changes)]
    assert len(set(stores)) == len(stores)
    assert store(layers=(0, 1)) == store(layers=[0, 1])


@pytest.mark.parametrize("column", ["input_ids", "choice_ids", "strict_ids", "choice_tokens"])
def test_what_a_stage_reads_of_its_rows_is_in_the_name_of_its_store(
    answered, finds_everything, column
):
    rows = answered.prompts
    other = rows.assign(**{column: [[[1], [2]]] * len(rows)})
    stores = [answered.stored(store_answers, r, "02-answers").name for r in (rows, other)]
    assert stores[0] != stores[1]


@pytest.mark.trap(31)
def test_what_other_code_made_is_not_read(answered, monkeypatch, no_model):
    monkeypatch.setattr(cache, "code_hash", lambda function: "of another version")
    with pytest.raises(AssertionError, match="a model was loaded"):
        again(answered).answers  # noqa: B018


def test_what_was_left_out_is_kept_with_the_prompts(answered):
    attrs = again(answered).prompts.attrs
    dropped = attrs["dropped"]
    assert dropped["too_long"] == [] and dropped["trained_on"] == {"capitals": 0}
    assert attrs["trained_on"] == {"capitals": ""}


def claims_file(path: Path, subject: str) -> Path:
    rows = [f"{subject} {i} is {'red' if i % 2 else 'blue'}.,{i % 2}" for i in range(40)]
    path.write_text("statement,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.mark.trap(31)
def test_a_file_that_is_saved_again_is_never_kept_under_the_hash_of_other_rows(
    checkpoint, tmp_path
):
    path = claims_file(tmp_path / "own.csv", "Apple")
    options = {"n_examples": 8, "dtype": "float32", "runs_dir": str(tmp_path / "runs")}
    run = Run(checkpoint, datasets=str(path), **options)
    assert run.examples.text.str.startswith("Apple").all()
    claims_file(path, "House")
    # The rows that were read, under the hash of the bytes that were read.
    assert run.prompts.text.str.startswith("Apple").all()
    assert run.record["sources"] == run.examples.attrs["sources"]
    # A later run reads the new rows.
    assert again(run).prompts.text.str.startswith("House").all()
    # A run that has said what it will read does not read anything else.
    other = again(run, seed=1)
    assert other.sources
    claims_file(path, "Third")
    with pytest.raises(DataError, match="it has changed since this run began"):
        other.prompts  # noqa: B018


@pytest.mark.parametrize("name", ["gone.csv", "nothing_of_that_name", "/"])
def test_a_data_set_that_is_not_there_is_refused_by_the_record_of_a_run(checkpoint, name):
    with pytest.raises((DataError, ParameterError), match=f"{name}.*"):
        Run(checkpoint, datasets=name).record  # noqa: B018


def test_no_probe_is_tested_on_rows_that_only_tell_what_is_known(answered):
    extra = answered.probe_rows[answered.probe_rows.role == "known"]
    assert set(extra.split) == {"train", "validation"}
    scored = answered.probe_rows[answered.probe_rows.role != "known"]
    assert set(scored.row_id) == set(answered.scored.row_id)


def test_draws_are_taken_of_honest_rows_and_of_test_rows(answered):
    rows = answered.dropout_rows
    assert set(rows.split[rows.role == "lie"]) == {"test"}
    assert set(rows.split[rows.role == "truth"]) == {"train", "validation", "test"}


def test_without_a_test_row_draws_are_taken_of_honest_rows_alone(answered):
    run = again(answered)
    vars(run)["scored"] = answered.scored[answered.scored.split != "test"]
    assert set(run.dropout_rows.role) == {"truth"}


def test_the_states_of_a_run_are_read_by_layer(answered):
    layers = answered.layers(2)
    features = answered.states(layers)
    assert [key[-1] for key in features] == layers
    states = features[("activation", "resid_post", 0)](answered.probe_rows)
    assert states.shape == (len(answered.probe_rows), WIDTH) and np.isfinite(states).all()


def test_layers_are_every_so_many_and_the_last(answered):
    assert answered.n_layers == 5
    assert answered.layers(1) == [0, 1, 2, 3, 4]
    assert answered.layers(3) == [0, 3, 4]
    assert answered.layers(9) == [0, 4]


@pytest.mark.parametrize("name", ["n_examples", "seed", "n_shots"])
@pytest.mark.parametrize("value", [-1, True])
def test_a_number_that_is_no_whole_number_is_refused(name, value):
    with pytest.raises(ParameterError, match=f"{name}: expected a whole number from "):
        Run(**{name: value})


def test_an_unknown_engine_is_refused():
    with pytest.raises(ParameterError, match='engine: expected "local" or "ray", got \'spark\''):
        Run(engine="spark")


# What pages call models and data sets.


def own_file(folder, name: str) -> str:
    folder.mkdir(exist_ok=True)
    rows = [f"Claim {i} of {folder.name} holds.,{i % 2}" for i in range(40)]
    (folder / name).write_text("statement,label\n" + "\n".join(rows) + "\n")
    return str(folder / name)


def test_tables_have_a_data_sets_and_a_models_name_and_not_where_they_lie(checkpoint, tmp_path):
    files = [own_file(tmp_path / folder, "my claims.csv") for folder in ("one", "two")]
    options = {"n_examples": 8, "runs_dir": str(tmp_path / "runs")}
    run = Run(checkpoint, datasets=",".join([files[0], "capitals"]), **options)
    assert list(run.prompts.dataset.unique()) == ["my claims.csv", "capitals"]
    assert list(run.sources) == list(run.prompts.attrs["dropped"]["duplicates"])
    assert str(tmp_path) not in run.prompts.to_json() + str(run.prompts.attrs)
    assert f"/{run.model_name}" in checkpoint and "/" not in run.model_name


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    files = [own_file(tmp_path / folder, "a.csv") for folder in ("one", "two")]
    assert list(dataset_labels([*files, "cities"]).values()) == ["one/a.csv", "two/a.csv", "cities"]
    assert dataset_labels(["org/set", "no_such.csv"]) == {
        "org/set": "org/set",
        "no_such.csv": "no_such.csv",
    }


def test_runs_go_into_the_checkout():
    folder = default_runs_folder()
    assert (
        folder.name == "runs" and (folder.parent / "notebooks" / "02_check_lie_rate.ipynb").exists()
    )


def test_layers_heads_and_context_are_read_also_from_a_model_of_images(tmp_path):
    tiny_model("gemma3").save_pretrained(tmp_path)
    run = Run(str(tmp_path), runs_dir=str(tmp_path / "runs"), dtype="float32")
    assert (run.n_layers, run.middle_layer, run.n_heads, run.context) == (6, 3, 4, 512)


@pytest.mark.parametrize("layers", [[99], 5, ["a"], "a", None])
def test_states_of_a_layer_that_is_not_there_are_refused_at_once(
    answered, no_model, monkeypatch, layers
):
    # Unwrapped: here beartype would answer before the package does.
    monkeypatch.setattr(run_module, "layer_numbers", inspect.unwrap(run_module.layer_numbers))
    with pytest.raises(ParameterError, match="layers: expected 'all', an index below 5"):
        inspect.unwrap(Run.states)(answered, layers)


def test_states_of_one_layer_are_asked_for_by_its_number_or_from_the_end(answered, no_model):
    assert list(answered.states(2)) == [("activation", "resid_post", 2)]
    assert list(answered.states([-1])) == list(answered.states(4)) == list(answered.states("4"))


@pytest.mark.parametrize("stride", [0, -1, 1.5, "2", None])
def test_a_stride_that_is_no_whole_number_of_1_or_more_is_refused(answered, stride):
    with pytest.raises(ParameterError, match="stride: expected a whole number of at least 1"):
        inspect.unwrap(Run.layers)(answered, stride)
