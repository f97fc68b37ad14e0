"""Weights that are not all of the model's own: missing, of another shape, changed, or elsewhere."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import new_model, tiny_checkpoint
from torch import Tensor

from dlk_utils import provenance
from dlk_utils.errors import ModelError
from dlk_utils.models.loading import load_config, load_spec, load_tokenizer, resolve
from dlk_utils.provenance import hash_file

Weights = dict[str, Tensor]
LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def load(folder: Path) -> torch.nn.Module:
    return load_spec(resolve(str(folder), dtype="float32"), device="cpu")


def save(weights: Weights, folder: Path) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


FAULTS: dict[str, tuple[Callable[[Weights], Weights], dict, str]] = {
    "another prefix": (
        lambda weights: {f"module.{name}": weight for name, weight in weights.items()},
        {},
        "lacks weights, which would be random numbers: 30, such as lm_head.weight",
    ),
    "no head": (
        lambda weights: {name: w for name, w in weights.items() if name != "lm_head.weight"},
        {},
        "lacks weights.*: 1, such as lm_head.weight",
    ),
    "no layer": (
        lambda weights: {name: w for name, w in weights.items() if LAYER not in name},
        {},
        f"lacks weights.*: 9, such as {LAYER}input_layernorm.weight",
    ),
    "more layers in the configuration": (
        lambda weights: weights,
        {"num_hidden_layers": 4},
        r"lacks weights.*: 9, such as model.layers.3\.",
    ),
    "fewer layers in the configuration": (
        lambda weights: weights,
        {"num_hidden_layers": 2},
        r"has weights for which the model has no place: 9, such as model.layers.2\.",
    ),
    "biases of another family": (
        lambda weights: weights | {f"{LAYER}self_attn.q_proj.bias": torch.ones(36)},
        {},
        r"no place: 1, such as model.layers.1.self_attn.q_proj.bias",
    ),
    "another width": (
        lambda weights: weights | {"model.norm.weight": torch.ones(35)},
        {},
        r"other sizes: 1, such as model.norm.weight \(\[35\] for \[36\]\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_those_of_the_configuration_are_refused_by_name(folder, fault):
    change, settings, expected = FAULTS[fault]
    save(change(load_file(folder / "model.safetensors")), folder)
    change_config(folder, **settings)
    with pytest.raises(ModelError, match=expected):
        load(folder)


def test_tied_heads_old_buffers_and_other_heads_are_not_missed(tmp_path):
    tiny_checkpoint(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    old = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.0.attn.masked_bias": torch.ones(()),
        "v_head.summary.weight": torch.ones(1, 36),
    }
    save(weights | old, tmp_path)
    load(tmp_path)


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_one_of_tensors_is_read(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Path}))
    with pytest.raises(ModelError, match=r"a pickle that holds more .*save them as safetensors"):
        load(folder)


@pytest.mark.parametrize("config", ["[]", "{", '{"model_type": 5}', "\x00"])
def test_a_broken_configuration_is_one_clear_error(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="model"):
        load(folder)


# Indices of weights in several files.


def in_two_files(folder: Path) -> Path:
    """Save the weights of a folder in two files, and return the index."""
    model = new_model("llama", vocab_size=258)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder / "model.safetensors.index.json"


def test_weights_in_several_files_are_part_of_the_revision(folder):
    index = in_two_files(folder)
    before = resolve(str(folder)).revision
    load(folder)
    name = sorted(set(json.loads(index.read_text())["weight_map"].values()))[-1]
    weights = load_file(folder / name)
    save_file({key: weight + 1 for key, weight in weights.items()}, folder / name)
    assert resolve(str(folder)).revision != before


@pytest.mark.parametrize("elsewhere", ["../other.safetensors", "/other.safetensors", "a\\b", "C:x"])
def test_an_index_cannot_name_files_outside_the_folder(folder, elsewhere):
    index = in_two_files(folder)
    (folder.parent / "other.safetensors").write_bytes(b"")
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = elsewhere
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="expected names of files in that folder, got"):
        resolve(str(folder))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_one_clear_error(folder, content):
    in_two_files(folder).write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json in model: expected"):
        resolve(str(folder))


def test_a_part_of_the_weights_that_is_missing_is_named(folder):
    in_two_files(folder)
    part = sorted(folder.glob("model-*.safetensors"))[0]
    part.unlink()
    with pytest.raises(ModelError, match=part.name):
        resolve(str(folder))


# Files that are written over.


def test_files_that_were_written_over_since_the_model_was_resolved_are_not_taken(folder):
    spec = resolve(str(folder), dtype="float32")
    weights = load_file(folder / "model.safetensors")
    save({name: weight + 1 for name, weight in weights.items()}, folder)
    for stage in (load_spec, load_tokenizer, load_config):
        with pytest.raises(ModelError, match="have changed since this run began"):
            stage(spec)
    load_spec(resolve(str(folder), dtype="float32"))


def test_a_loaded_model_does_not_change_with_its_file(folder):
    model = load(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    size = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(bytes(size))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# Hashing.


def test_only_files_that_are_read_decide_the_revision(folder):
    before = resolve(str(folder)).revision
    for name in ("optimizer.pt", "README.md", ".git/HEAD", "checkpoint-2/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("anything")
    # A model is read from the first kind of file that there is.
    (folder / "pytorch_model.bin").write_text("anything")
    assert resolve(str(folder)).revision == before
    (folder / "chat_template.jinja").write_text("anything")
    assert resolve(str(folder)).revision != before


@pytest.fixture
def large_file(tmp_path, monkeypatch) -> Path:
    """A file that is large enough for its hash to be kept, and was not written just now."""
    monkeypatch.setenv("DLK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(provenance, "LARGE_FILE", 4)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    path = tmp_path / "weights"
    path.write_bytes(b"123456")
    return path


def test_the_hash_of_a_large_file_is_kept_until_the_file_changes(large_file, monkeypatch):
    first = hash_file(large_file)
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "_hash_content", lambda path: "read again")
        assert hash_file(large_file) == first
    times = large_file.stat()
    large_file.write_bytes(b"654321")
    # A copy with the times of the original still has another time of change.
    os.utime(large_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hash_file(large_file) != first


def test_a_kept_hash_that_is_broken_is_computed_again(large_file, tmp_path):
    first = hash_file(large_file)
    [kept] = (tmp_path / "cache" / "hashes").iterdir()
    content = kept.read_text()
    for broken in ("", content[:9], "0" * 32 + content[32:], "\xff\xff"):
        kept.write_text(broken, encoding="latin-1")
        assert hash_file(large_file) == first


def test_a_hash_that_cannot_be_kept_is_no_error(large_file, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert hash_file(large_file) == hash_file(large_file)
