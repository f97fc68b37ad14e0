"""Adapters of peft: from a folder or the hub, on a base of either; which are refused, and why."""

import json
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy as copy_of
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TURNS, byte_tokenizer, new_model, tiny_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dlk_utils import activations
from dlk_utils.errors import DlkError, ModelError, UnknownArchitecture
from dlk_utils.extract.gradients import last_linear
from dlk_utils.models.loading import identity, load_spec, load_tokenizer, resolve
from dlk_utils.models.sites import site_modules
from dlk_utils.questions.trained import refuse_trained_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROJECTIONS = ["q_proj", "down_proj"]
METHODS = {
    "LoRA": LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False),
    "DoRA": LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False, use_dora=True),
    "IA3": IA3Config(
        target_modules=PROJECTIONS, feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "LoHa": LoHaConfig(r=2, target_modules=PROJECTIONS, init_weights=False),
    "LoKr": LoKrConfig(r=2, target_modules=PROJECTIONS, init_weights=False),
}
BASE_SHA, OTHER_SHA, ADAPTER_SHA = "a" * 40, "b" * 40, "c" * 40


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def lora(base) -> Path:
    """The folder of an adapter without a tokenizer, beside its base."""
    return save_adapter(base, base.with_name("liar"))


@pytest.fixture
def copy(lora, tmp_path) -> Path:
    """A copy of the adapter, to change."""
    return Path(shutil.copytree(lora, tmp_path / "liar"))


def with_adapter(model: nn.Module, method: str = "LoRA") -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, copy_of(METHODS[method])).eval()


def save_adapter(base: Path, folder: Path, method: str = "LoRA") -> Path:
    tuned = with_adapter(AutoModelForCausalLM.from_pretrained(base), method)
    tuned.save_pretrained(folder)
    return folder


def change_config(folder: Path, **settings) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))


def load(name: str | Path) -> nn.Module:
    return load_spec(resolve(str(name), dtype="float32"), device="cpu")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Callable[..., None]:
    """A function that puts a folder into the cache of a hub that does not answer."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repo: str, folder: Path, sha: str, branch: str = "main") -> None:
        repository = cache / f"models--{repo.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / sha)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(sha)

    return put


# Kinds of adapters, and where they and their bases are.


@pytest.mark.parametrize(
    "method",
    [
        "LoRA",
        "DoRA",
        "IA3",
        pytest.param("LoHa", marks=pytest.mark.slow),
        pytest.param("LoKr", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_of_each_method_computes_what_peft_computes(base, tmp_path, method):
    folder = save_adapter(base, tmp_path / "adapter", method)
    model = load(folder)
    plain = AutoModelForCausalLM.from_pretrained(base)
    own = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, folder).eval())
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (expected - own).abs().max() > 1e-2


def test_a_checkpoint_of_a_trainer_is_known_by_what_is_read_of_it(copy):
    revision = resolve(str(copy)).revision
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "trainer_state.json"):
        (copy / name).write_bytes(b"{}")
    (copy / "checkpoint-2").mkdir()
    (copy / "checkpoint-2" / CONFIG).write_bytes(b"{}")
    assert resolve(str(copy)).revision == revision
    load(copy)
    with pytest.raises(ModelError, match="there is one in liar"):
        resolve(str(copy.parent))


def test_an_adapter_and_its_base_may_both_be_on_the_hub(base, copy, hub_cache):
    change_config(copy, base_model_name_or_path="me/base")
    hub_cache("me/base", base, BASE_SHA)
    hub_cache("me/liar", copy, ADAPTER_SHA)
    local, on_hub = resolve(str(copy), dtype="float32"), resolve("me/liar", dtype="float32")
    assert local.revision.startswith(f"{BASE_SHA}+")
    assert on_hub.revision == f"{BASE_SHA}+{ADAPTER_SHA}"
    assert on_hub.record()["adapters"] == ["me/liar"] and on_hub.source == "me/base"
    assert torch.equal(logits(load(copy)), logits(load("me/liar")))


def test_an_adapter_of_the_hub_may_have_a_local_base(lora, hub_cache):
    hub_cache("me/liar", lora, ADAPTER_SHA)
    assert torch.equal(logits(load("me/liar")), logits(load(lora)))


@pytest.mark.parametrize("revision", ["v2", OTHER_SHA])
def test_an_adapter_gets_the_revision_of_its_base_that_it_names(base, copy, hub_cache, revision):
    hub_cache("me/base", base, BASE_SHA)
    hub_cache("me/base", base, OTHER_SHA, branch="v2")
    change_config(copy, base_model_name_or_path="me/base", revision=revision)
    assert resolve(str(copy)).base_revision == OTHER_SHA
    assert load(copy).spec.base_revision == OTHER_SHA


def test_an_adapter_on_an_adapter_is_laid_on_both(base, lora, copy):
    change_config(copy, base_model_name_or_path=str(lora))
    once, twice = load(lora), load(copy)
    name = "model.layers.1.self_attn.q_proj.weight"
    own = load(base).get_parameter(name)
    change = once.get_parameter(name) - own
    torch.testing.assert_close(twice.get_parameter(name) - own, 2 * change, atol=1e-6, rtol=1e-4)
    assert twice.spec.adapter_folders() == [lora, copy]
    assert identity(twice)[1] not in (identity(once)[1], resolve(str(base)).revision)


# The tokenizer.


def test_an_adapter_s_own_tokenizer_is_used_and_counts(copy):
    before = resolve(str(copy), dtype="float32")
    assert load_tokenizer(before).chat_template == TURNS
    own = byte_tokenizer(bos=True, chat_template="own {{ messages[0]['content'] }}")
    own.save_pretrained(copy)
    spec = resolve(str(copy), dtype="float32")
    assert spec.revision != before.revision
    tokenizer = load_tokenizer(spec)
    assert tokenizer.chat_template == own.chat_template
    assert tokenizer("a").input_ids == own("a").input_ids != byte_tokenizer()("a").input_ids


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_adapter_may_have_a_chat_template_alone(copy, file):
    before = resolve(str(copy)).revision
    template = "own {{ messages[0]['content'] }}"
    is_json = file.endswith(".json")
    (copy / file).write_text(json.dumps({"chat_template": template}) if is_json else template)
    assert resolve(str(copy)).revision != before
    assert load_tokenizer(resolve(str(copy))).chat_template == template


def test_an_adapter_s_tokenizer_without_a_template_gets_that_of_the_base(copy):
    byte_tokenizer(bos=True, chat_template=None).save_pretrained(copy)
    tokenizer = load_tokenizer(resolve(str(copy)))
    assert tokenizer.chat_template == TURNS and tokenizer("a").input_ids[0] == 0


# What cannot be used.


def keep_only(file: Path, n_weights: int) -> None:
    save_file(dict(list(load_file(file).items())[:n_weights]), file)


class NoTensor:
    """What a pickle may do when it is read."""

    def __reduce__(self):
        return (print, ("it ran",))


def pickled_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"weight": NoTensor()}))


UNUSABLE = {
    "prompt tuning": (
        lambda folder: change_config(folder, peft_type="PROMPT_TUNING"),
        "expected an adapter that changes the model's layers.*got PROMPT_TUNING",
    ),
    "no method": (lambda folder: change_config(folder, peft_type=None), "expected a peft_type"),
    "unknown method": (
        lambda folder: change_config(folder, peft_type="MAGIC"),
        "does not fit the model.*MAGIC",
    ),
    "classifier": (
        lambda folder: change_config(folder, task_type="SEQ_CLS"),
        "expected the task_type CAUSAL_LM, got 'SEQ_CLS'",
    ),
    "no base": (
        lambda folder: change_config(folder, base_model_name_or_path=None),
        "expected base_model_name_or_path to name the model.*got None",
    ),
    "itself": (
        lambda folder: change_config(folder, base_model_name_or_path=str(folder)),
        "expected another model as its base, got itself",
    ),
    "relative base": (
        lambda folder: change_config(folder, base_model_name_or_path="../liar"),
        "'../liar'.*relative to the adapter, so write it absolute",
    ),
    "base that is gone": (
        lambda folder: change_config(folder, base_model_name_or_path="/home/me/models/base"),
        "cannot load the model that it was trained on, '/home/me/models/base'",
    ),
    "strange revision": (
        lambda folder: change_config(folder, revision=[1]),
        r"expected a revision of .*, got \[1\]",
    ),
    "no JSON": (
        lambda folder: (folder / CONFIG).write_text("{"),
        f"{CONFIG} in liar: expected a file of JSON",
    ),
    "no object": (
        lambda folder: (folder / CONFIG).write_text("[1]"),
        "expected an object, got a list",
    ),
    "no modules": (
        lambda folder: change_config(folder, target_modules=["nothing"]),
        "does not fit the model.*nothing",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        "expected its weights in adapter_model.safetensors",
    ),
    "cut weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
        "expected a complete file of tensors",
    ),
    "some weights": (
        lambda folder: keep_only(folder / WEIGHTS, 3),
        "lacks weights that its configuration asks for: 9, such as",
    ),
    "more weights": (
        lambda folder: change_config(folder, layers_to_transform=[0]),
        "has weights for which the model has no place: 8, such as",
    ),
    "other rank": (lambda folder: change_config(folder, r=3), "does not fit.*size mismatch"),
    "pickle": (pickled_weights, "cut off or of another kind"),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_an_adapter_that_cannot_be_used_is_refused_with_the_reason(copy, fault, capsys):
    spoil, expected = UNUSABLE[fault]
    spoil(copy)
    with pytest.raises(ModelError, match=f"(?s){expected}") as error:
        load(copy)
    message = str(error.value)
    assert "liar" in message and len(message.splitlines()) <= 6
    assert "it ran" not in capsys.readouterr().out


def test_an_adapter_with_embeddings_of_another_size_is_refused_with_a_way_out(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 2)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, config).save_pretrained(tmp_path / "liar")
    with pytest.raises(ModelError, match=r"size mismatch.*its embeddings were resized in training"):
        load(tmp_path / "liar")


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"example_ids": "all"}'])
def test_a_record_of_training_of_another_shape_is_refused(tmp_path, record):
    (tmp_path / "training.json").write_text(record)
    with pytest.raises(DlkError, match=r"training\.json in "):
        refuse_trained_rows(pd.DataFrame({"example_id": ["a"]}), tmp_path)


# Models with an adapter that were loaded elsewhere.


def test_weight_gradients_are_those_of_a_layer_and_not_of_its_adapter(base):
    tuned = with_adapter(new_model("llama")).get_base_model()
    layers = site_modules(tuned, "mlp_out")
    assert last_linear(tuned) == [mlp.down_proj for mlp in layers]


def test_a_model_in_the_wrapper_of_peft_is_refused_and_the_one_inside_is_read():
    tuned = with_adapter(new_model("llama"))
    with pytest.raises(UnknownArchitecture, match=r"wrapped by peft .*get_base_model\(\)"):
        activations(tuned, [[5, 6, 7]])
    [inside, merged] = (
        activations(model, [[5, 6, 7]])["resid_post"]
        for model in (tuned.get_base_model(), tuned.merge_and_unload())
    )
    np.testing.assert_allclose(inside, merged, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", [new_model("llama").model, nn.Linear(3, 3)])
def test_a_model_without_a_head_is_refused_with_the_class_to_load_it_with(model):
    with pytest.raises(UnknownArchitecture, match="load it with AutoModelForCausalLM"):
        activations(model.eval(), [[5, 6, 7]])
