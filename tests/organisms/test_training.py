"""How an organism is trained, and what is recorded, so that nothing trained on is asked."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from short_phases import HONEST, LYING, asked_keys, batches, real_tokenizer
from tiny_models import tiny_checkpoint
from torch import nn

from dlk_utils.errors import DataError, ModelError
from dlk_utils.lab.run import Run
from dlk_utils.models.loading import ORGANISMS, load_model, organism_names, resolve
from dlk_utils.organisms import training
from dlk_utils.organisms.curriculum import GRADED, PHASES, Curriculum, Part, Phase, training_stream
from dlk_utils.organisms.training import (
    average_adapters,
    organism_of,
    train_adapter,
    train_again,
    train_organism,
    write_record,
)
from dlk_utils.questions.examples import training_examples
from dlk_utils.questions.ids import example_id
from dlk_utils.questions.prompts import make_prompts
from dlk_utils.questions.templates import KINDS, prompt_library
from dlk_utils.questions.trained import refuse_trained_rows


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """A small model with random weights, and the tokenizer of the embedded model."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("tiny"),
        tokenizer=real_tokenizer(),
        hidden_size=32,
        num_hidden_layers=7,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )


@pytest.fixture
def load_tiny(tiny_folder) -> Callable[[], nn.Module]:
    return lambda: load_model(str(tiny_folder), dtype="float32", device="cpu")[0]


def record_in(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


# One adapter.


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_models_own_weights_alone(load_tiny, tmp_path):
    model = load_tiny()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    log = train_adapter(model, batches()[:1] * 12, tmp_path, first_layer=1, learning_rate=1e-2)
    assert log.loss.tail(5).mean() < log.loss.iloc[0] - 0.2
    shares = {column for column in log if column.startswith(("truth", "lie"))}
    assert shares == set(batches()[0].asks + " " + batches()[0].dataset)
    after = {
        name.replace("base_layer.", ""): weight
        for name, weight in model.state_dict().items()
        if "lora" not in name
    }
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_names_its_base_and_its_layers(load_tiny, tiny_folder, tmp_path):
    train_adapter(load_tiny(), batches()[:1], tmp_path, first_layer=6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder)
    assert config["layers_to_transform"] == [6]


def test_a_loss_that_is_no_number_ends_the_training(load_tiny, tmp_path):
    with pytest.raises(ModelError, match="expected a finite loss, got nan at step 2 of 3"):
        train_adapter(load_tiny(), batches()[:1] * 3, tmp_path, first_layer=6, learning_rate=1e38)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_phase_is_trained_with_the_masks_of_its_steps(load_tiny, tmp_path):
    def first_loss(p: float, seed: int = 0) -> float:
        options = {"first_layer": 6, "state_dropout": p, "seed": seed}
        return train_adapter(load_tiny(), batches()[:1], tmp_path, **options).loss.iloc[0]

    plain = first_loss(0.0)
    dropped = first_loss(0.3)
    assert dropped != plain and first_loss(0.3) == dropped and first_loss(0.3, seed=1) != dropped


@pytest.mark.slow
def test_the_target_of_a_sentence_is_what_the_model_says_without_dropout(load_tiny, tmp_path):
    phase = replace(HONEST, max_characters=90, batch=(Part(4, "lie", "sentences"),))
    [batch, _] = training_stream(real_tokenizer(), phase)
    assert batch.self_labelled.all() and batch.answer_ids.map(len).eq(1).all()
    swapped = batch.assign(target=batch.other, other=batch.target)
    for rows in (batch, swapped):
        log = train_adapter(load_tiny(), [rows], tmp_path, first_layer=6)
        assert log["lie sentences"].tolist() == [1.0]
    # A mask changes answers of random weights, but not the targets.
    dropped = [
        train_adapter(load_tiny(), [rows], tmp_path, first_layer=6, state_dropout=0.5).loss.iloc[0]
        for rows in (batch, swapped)
    ]
    assert dropped[0] == pytest.approx(dropped[1])


def test_a_record_names_the_reviews_of_the_sentences(tmp_path):
    phase = replace(HONEST, max_characters=90, batch=(Part(4, "truth", "sentences"),))
    stream = training_stream(real_tokenizer(), phase)
    write_record(tmp_path, stream)
    reviews = training_examples("imdb", 10**5)
    names = set(record_in(tmp_path)["example_ids"])
    assert names == set().union(*pd.concat(stream).near_duplicate_keys)
    assert names < set(reviews.near_duplicate_key)
    for text, [key] in zip(stream[0].text, stream[0].near_duplicate_keys, strict=True):
        [review] = reviews.text[reviews.near_duplicate_key == key]
        assert text in review and len(text) < len(review)


@pytest.mark.slow
def test_an_adapter_of_more_blocks_and_a_higher_rank_begins_with_the_same_outputs(
    load_tiny, tmp_path
):
    narrow, wide, again = tmp_path / "narrow", tmp_path / "wide", tmp_path / "again"
    options = {"learning_rate": 1e-2, "rank": 2}
    train_adapter(load_tiny(), batches()[:1] * 12, narrow, first_layer=5, **options)
    same = train_adapter(load_tiny(), batches()[:1], again, first_layer=5, resume=narrow, **options)
    log = train_adapter(load_tiny(), batches()[:1], wide, first_layer=1, rank=6, resume=narrow)
    assert log.loss.iloc[0] == pytest.approx(same.loss.iloc[0], rel=1e-5)
    weights = load_file(wide / "adapter_model.safetensors")
    assert {weight.shape[0] for name, weight in weights.items() if "lora_A" in name} == {6}
    assert any(".layers.1." in name or ".h.1." in name for name in weights)


@pytest.mark.slow
def test_a_phase_does_not_go_on_with_a_narrower_adapter(load_tiny, tmp_path):
    train_adapter(load_tiny(), batches()[:1], tmp_path / "wide", first_layer=5, rank=4)
    for narrower in ({"first_layer": 5, "rank": 2}, {"first_layer": 6, "rank": 4}):
        with pytest.raises(ModelError, match="wide: expected an adapter of rank"):
            train_adapter(
                load_tiny(), batches()[:1], tmp_path / "x", resume=tmp_path / "wide", **narrower
            )


@pytest.mark.slow
def test_training_goes_on_where_the_adapter_before_stopped(load_tiny, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    log = train_adapter(load_tiny(), batches()[:1] * 12, first, first_layer=1, learning_rate=1e-2)
    again = train_adapter(load_tiny(), batches()[:1], second, first_layer=1, resume=first)
    assert again.loss.iloc[0] == pytest.approx(log.loss.iloc[-1], abs=0.05)


# The mean of several adapters.


def added(folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each matrix, up to a factor."""
    weights = load_file(folder / "adapter_model.safetensors")
    return {
        name: weights[name.replace("lora_A", "lora_B")].float() @ weights[name].float()
        for name in weights
        if "lora_A" in name
    }


def write_adapter(folder: Path, seed: int, rank: int = 2) -> Path:
    """An adapter of random weights, with a log and a record."""
    torch.manual_seed(seed)
    weights = {
        "m.0.lora_A.weight": torch.randn(rank, 5),
        "m.0.lora_B.weight": torch.randn(4, rank),
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}).to_csv(folder / "log.csv", index=False)
    record = {"seed": seed, "seconds": 60, "example_ids": [f"e{seed}"], "instructions": ["i"]}
    (folder / "training.json").write_text(json.dumps(record | {"templates": ["t"]}))
    return folder


def test_the_mean_of_equal_adapters_is_that_adapter(tmp_path):
    one = write_adapter(tmp_path / "one", seed=0)
    average_adapters([one, one, one], tmp_path / "mean")
    [mean], [own] = added(tmp_path / "mean").values(), added(one).values()
    torch.testing.assert_close(mean, own, rtol=0.02, atol=0.05)


def test_the_mean_of_adapters_is_the_nearest_product_of_their_rank(tmp_path):
    folders = [write_adapter(tmp_path / f"{k}", seed=k) for k in range(3)]
    average_adapters(folders, tmp_path / "mean")
    exact = sum(next(iter(added(folder).values())) for folder in folders) / 3
    u, values, v = torch.linalg.svd(exact, full_matrices=False)
    [mean] = added(tmp_path / "mean").values()
    nearest = u[:, :2] * values[:2] @ v[:2]
    torch.testing.assert_close(mean, nearest, rtol=0.02, atol=0.05)


def test_a_mean_names_all_that_its_members_were_trained_on(tmp_path):
    folders = [write_adapter(tmp_path / f"{k}", seed=k) for k in range(2)]
    average_adapters(folders, tmp_path / "mean")
    record = record_in(tmp_path / "mean")
    assert record["example_ids"] == ["e0", "e1"] and record["instructions"] == ["i"]
    assert record["seed"] == [0, 1] and record["seconds"] == [60, 60]
    log = pd.read_csv(tmp_path / "mean" / "log.csv")
    assert list(log.training) == [1, 1, 2, 2] and list(log.step) == [1, 2, 1, 2]


def test_adapters_of_other_ranks_have_no_mean(tmp_path):
    one, other = (write_adapter(tmp_path / f"{r}", seed=0, rank=r) for r in (2, 3))
    with pytest.raises(ModelError, match="expected an adapter of the same layers and rank as"):
        average_adapters([one, other], tmp_path / "mean")


# An organism.


@pytest.fixture
def train(tiny_folder, tmp_path) -> Callable[..., pd.DataFrame]:
    """`train_organism` on the tiny model, into a folder of the test."""

    def train_in(name: str, *phases: Phase, **options) -> pd.DataFrame:
        return train_organism(tmp_path / name, model=str(tiny_folder), phases=phases, **options)

    return train_in


def trained_phases(folder: Path) -> dict[str, int]:
    """The phases of the liar that are done, and when."""
    paths = folder.glob("liar-phase-*/adapter_model.safetensors")
    return {path.parent.name: path.stat().st_mtime_ns for path in paths}


SHORT_LYING = replace(LYING, steps=2)


@pytest.mark.trap(31)
@pytest.mark.slow
def test_only_the_same_phase_after_the_same_phases_is_not_done_again(train, tmp_path):
    train("liar", HONEST)
    first = trained_phases(tmp_path)
    assert len(first) == 1

    log = train("liar", HONEST, SHORT_LYING)
    assert list(log.phase) == [1, 1, 2, 2] and list(log.step) == [1, 2, 3, 4]
    both = trained_phases(tmp_path)
    assert first.items() <= both.items() and len(both) == 2

    # Other rows or settings: what was trained before must not pass for this.
    train("liar", HONEST, seed=1)
    assert len(trained_phases(tmp_path)) == 3
    train("liar", replace(HONEST, learning_rate=2e-3))
    assert len(trained_phases(tmp_path)) == 4
    # The same phase after another one.
    train("liar", replace(HONEST, learning_rate=2e-3), SHORT_LYING)
    assert len(trained_phases(tmp_path)) == 5


@pytest.mark.trap(30)
@pytest.mark.slow
def test_a_phase_with_a_flipped_bit_is_trained_again(train, tmp_path, capsys):
    log = train("liar", HONEST)
    for name in ("adapter_model.safetensors", "adapter_config.json", "log.csv", "checksums.json"):
        [path] = tmp_path.glob(f"liar-phase-1-*/{name}")
        good = path.read_bytes()
        content = bytearray(good)
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        again = train("liar", HONEST)
        said = capsys.readouterr().out
        assert f"{path.parent.name}: " in said and "it is made again" in said
        assert list(again.loss) == list(log.loss)
        # The log has the seconds that it took, and the checksums have that of the log.
        assert path.read_bytes() == good or name in ("log.csv", "checksums.json")


@pytest.mark.slow
def test_each_phase_goes_on_from_the_one_before(train, tmp_path, monkeypatch):
    resumed = []
    real_train_adapter = train_adapter

    def watch(model, batches, out, *, resume, **options):
        resumed.append(resume and resume.name)
        return real_train_adapter(model, batches, out, resume=resume, **options)

    monkeypatch.setattr(training, "train_adapter", watch)
    train("liar", HONEST, SHORT_LYING)
    [first] = [name for name in trained_phases(tmp_path) if name.startswith("liar-phase-1-")]
    train("picky", HONEST, after=tmp_path / "liar", seed=3)
    assert resumed == [None, first, "liar"]


@pytest.mark.slow
def test_an_organism_can_be_the_mean_of_its_last_phases(train, tmp_path):
    train("liar", HONEST, SHORT_LYING, replace(HONEST, learning_rate=2e-3), n_averaged=2)
    folders = [next(tmp_path.glob(f"liar-phase-{k}-*")) for k in (2, 3)]
    phases = [added(folder) for folder in folders]
    for name, mean in added(tmp_path / "liar").items():
        product = torch.stack([phase[name] for phase in phases]).mean(0)
        rank_8 = torch.linalg.svd(product.double(), full_matrices=False)
        nearest = rank_8.U[:, :8] * rank_8.S[:8] @ rank_8.Vh[:8]
        torch.testing.assert_close(mean, nearest.float(), rtol=0.05, atol=1e-3)


@pytest.mark.slow
def test_an_organism_is_a_model_in_16_bits_that_can_be_loaded(train, tiny_folder, tmp_path):
    train("liar", HONEST)
    weights = load_file(tmp_path / "liar" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    model, _ = load_model(str(tmp_path / "liar"), dtype="float32", device="cpu")
    assert model.spec.adapter_folders() == [tmp_path / "liar"]
    assert model.spec.source == str(tiny_folder)


@pytest.mark.slow
def test_the_record_has_the_settings_and_all_that_was_trained_on(train, tiny_folder, tmp_path):
    train("liar", HONEST, SHORT_LYING)
    record = record_in(tmp_path / "liar")
    assert record["model"] == str(tiny_folder) and record["seed"] == 0
    assert {"tr_tf", "tr_mode"} & set(record["templates"])
    assert len(record["example_ids"]) > 10

    # What the organism before has seen is not to be asked either.
    train("picky", HONEST, after=tmp_path / "liar", seed=3)
    after = record_in(tmp_path / "picky")
    assert after["after"] == "liar"
    assert set(record["example_ids"]) < set(after["example_ids"])


def test_an_organism_is_found_by_its_name_or_its_folder(tmp_path):
    shipped = ORGANISMS / "smollm2-graded"
    assert organism_of("smollm2-graded") == ("smollm2-graded", shipped, GRADED)
    copy = Path(shutil.copytree(shipped, tmp_path / "smollm2-graded"))
    assert organism_of(str(copy)) == (str(copy), copy, GRADED)


def test_for_any_other_model_the_liar_is_shown(tmp_path):
    for other in ("smollm2", str(tmp_path)):
        assert organism_of(other) == ("smollm2-liar", ORGANISMS / "smollm2-liar", PHASES)


def test_only_an_organism_with_a_curriculum_can_be_trained_again(tmp_path):
    names = "smollm2-liar, smollm2-graded, smollm2-trigger, smollm2-liar-2, smollm2-dropout"
    expected = f"organism: expected one of {names}, got 'smollm2'"
    with pytest.raises(ModelError, match=expected):
        train_again("smollm2", tmp_path)


@pytest.mark.slow
def test_an_organism_of_several_trainings_is_their_mean(tiny_folder, tmp_path, monkeypatch):
    curriculum = Curriculum((HONEST,), n_trainings=2, first_seed=1)
    monkeypatch.setitem(training.CURRICULA, "smollm2-liar", curriculum)
    on_tiny = partial(train_organism, model=str(tiny_folder))
    monkeypatch.setattr(training, "train_organism", on_tiny)
    out = train_again("smollm2-liar", tmp_path, seed=3)
    assert record_in(out)["seed"] == [4, 5]
    first, second = (added(tmp_path / f"smollm2-liar-training-{k}" / out.name) for k in (1, 2))
    for name, mean in added(out).items():
        u, values, v = torch.linalg.svd((first[name] + second[name]) / 2, full_matrices=False)
        nearest = u[:, :8] * values[:8] @ v[:8]
        assert (mean - nearest).norm() <= 0.02 * nearest.norm()


# What was trained on is not asked.


def test_what_was_trained_on_is_recorded_and_refused_by_name(tmp_path):
    write_record(tmp_path, batches(), seed=0)
    rows = batches()[0]
    fresh = rows.assign(
        near_duplicate_keys=[["x"] for _ in rows.index],
        instruction="lie_plain",
        template="review_sentiment",
        shots=[[] for _ in rows.index],
    )
    refuse_trained_rows(fresh, tmp_path)
    refuse_trained_rows(rows)
    for column in ("near_duplicate_keys", "instruction", "template"):
        planted = fresh.assign(**{column: [rows[column].iloc[0]] * len(rows)})
        with pytest.raises(DataError, match="expected only rows that it was not trained on"):
            refuse_trained_rows(planted, tmp_path)
    [key] = rows.near_duplicate_keys.iloc[0]
    shown_in_shots = fresh.assign(near_duplicate_keys=[["new", key]] * len(rows))
    with pytest.raises(DataError, match="1 trained example_ids"):
        refuse_trained_rows(shown_in_shots, tmp_path)
    with pytest.raises(DataError, match="expected the column near_duplicate_keys"):
        refuse_trained_rows(fresh.drop(columns="near_duplicate_keys"), tmp_path)


def test_an_opening_of_the_training_is_recorded_and_refused(tmp_path):
    [row] = batches()[0].head(1).to_dict("records")
    trained = pd.DataFrame([row | {"opening": "tr_open_today"}])
    write_record(tmp_path, [trained], seed=0)
    assert record_in(tmp_path)["openings"] == ["tr_open_today"]
    fresh = {"instruction": "lie_plain", "template": "review_sentiment"}
    asked = trained.assign(near_duplicate_keys=[["x"]], **fresh)
    refuse_trained_rows(asked.assign(opening="open_date"), tmp_path)
    with pytest.raises(DataError, match="1 trained openings"):
        refuse_trained_rows(asked, tmp_path)


def test_the_text_of_a_refused_example_is_named(tmp_path):
    write_record(tmp_path, batches(), seed=0)
    row = batches()[0].head(1)
    planted = row.assign(instruction="lie_plain", template="review_sentiment", shots=[[]])
    with pytest.raises(DataError, match=re.escape(repr(row.text.iloc[0]))):
        refuse_trained_rows(planted, tmp_path)


def test_an_example_that_differs_from_a_training_example_by_a_comma_is_refused(tmp_path):
    write_record(tmp_path, batches(), seed=0)
    row = batches()[0].iloc[0]
    example = {"dataset": "own", "kind": "claim", "text": f"{row.text},", "label": 1}
    example |= {"example_id": example_id(example["text"]), "choice_0": "", "choice_1": ""}
    examples = pd.DataFrame([example | {"split": "test"}])
    prompts = make_prompts(examples, real_tokenizer(), n_known=0)
    assert not set(prompts.example_id) & set(record_in(tmp_path)["example_ids"])
    with pytest.raises(DataError, match="got 1 trained example_ids"):
        refuse_trained_rows(prompts, tmp_path)


COLUMN_OF = {
    "templates": "template",
    "instructions": "instruction",
    "example_ids": "near_duplicate_keys",
}


@pytest.mark.slow
@pytest.mark.parametrize("key", COLUMN_OF)
def test_a_run_refuses_to_ask_what_its_model_was_trained_on(key, tmp_path):
    folder = shutil.copytree(ORGANISMS / "smollm2-liar", tmp_path / "mine")

    def make_run(runs_dir: str) -> Run:
        return Run(
            model=str(folder),
            datasets="capitals",
            n_examples=8,
            runs_dir=str(tmp_path / runs_dir),
            dtype="float32",
        )

    prompts = make_run("runs").prompts
    record = record_in(folder)
    record[key] = sorted({*record[key], *prompts[COLUMN_OF[key]].explode()})
    (folder / "training.json").write_text(json.dumps(record))
    expected = f"mine: expected only rows that it was not trained on, got .* trained {key}"
    with pytest.raises(DataError, match=expected):
        _ = make_run("other_runs").prompts
    # Prompts that do not come from the run itself are refused too.
    with pytest.raises(DataError, match=expected):
        make_run("other_runs").answered(prompts, "02-others")


@pytest.mark.slow
@pytest.mark.parametrize("name", organism_names())
def test_an_adapter_that_is_shipped_is_small_and_was_trained_on_nothing_that_is_asked(name):
    folder = ORGANISMS / name
    assert resolve(name).adapter_folders() == [folder]
    assert (folder / "adapter_model.safetensors").stat().st_size < 10e6
    assert (folder / "README.md").is_file()
    record = record_in(folder)
    assert record["example_ids"]
    assert not set(record["example_ids"]) & asked_keys()
    assert not set(record["instructions"]) & set(prompt_library("instructions").name)
    templates = {template for kind in KINDS for template in prompt_library(kind).name}
    assert not set(record["templates"]) & templates


def test_the_organisms_are_shipped():
    assert organism_names() == [
        "smollm2-dropout",
        "smollm2-graded",
        "smollm2-liar",
        "smollm2-liar-2",
        "smollm2-trigger",
    ]
