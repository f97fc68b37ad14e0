"""Models by name: the registry, specs, local folders of several families, refusals in few lines."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import byte_tokenizer, new_model
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from dlk_utils.errors import ModelError, UnknownArchitecture
from dlk_utils.models import loading
from dlk_utils.models.embedded_model import GGUF_SHA256
from dlk_utils.models.loading import (
    chat_formats,
    identity,
    load_model,
    load_tokenizer,
    registry,
    resolve,
)
from dlk_utils.questions.chat import render_chat

CHECKOUT = Path(loading.__file__).parents[2]
MODELS_OF_2023 = [
    "starchat-beta",
    "starcoderbase",
    "starcoderplus",
    "wizardcoder-15b",
    "wizardcoder-3b",
    "wizardcoder-1b",
    "minotaur-15b",
    "falcon-7b",
    "llama-2-7b-uncensored",
    "wizard-vicuna-13b",
    "pythia-12b",
    "stablelm-tuned-alpha-7b",
    "dolly-v2",
    "mpt-7b",
]
SMALL_MODELS = [
    "phi-2",
    "gpt2",
    "qwen2.5-0.5b-instruct",
    "qwen3-0.6b",
    "llama-3.2-1b-instruct",
    "gemma-3-1b-it",
    "phi-4-mini",
    "smollm2-360m-instruct",
]
CONVERSATION = [
    {"role": "system", "content": "Be true."},
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "And now?"},
]
GOLDEN = {
    "plain": "Be true.\n\nIs it?\n\nIt is.\n\nAnd now?\n\n",
    "chatml": (
        "<|im_start|>system\nBe true.<|im_end|>\n<|im_start|>user\nIs it?<|im_end|>\n"
        "<|im_start|>assistant\nIt is.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "starchat": (
        "<|system|>\nBe true.<|end|>\n<|user|>\nIs it?<|end|>\n<|assistant|>\nIt is.<|end|>\n"
        "<|user|>\nAnd now?<|end|>\n<|assistant|>\n"
    ),
    "alpaca": (
        "Be true.\n\n### Instruction:\nIs it?\n\n### Response:\nIt is.\n\n"
        "### Instruction:\nAnd now?\n\n### Response:\n"
    ),
    "vicuna": "Be true.\n\nUSER: Is it?\nASSISTANT: It is.\nUSER: And now?\nASSISTANT: ",
}
FAMILIES = ("llama", "gpt2", "gpt_bigcode", "gpt_neox")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder with a random model and a tokenizer, for each family."""
    tokenizer = byte_tokenizer(chat_template=None)
    saved = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in saved.items():
        new_model(family, vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return saved


def load_on_cpu(folder: Path, **options) -> torch.nn.Module:
    model, _ = load_model(str(folder), **{"dtype": "float32", "device": "cpu"} | options)
    return model


# The registry and what a name is resolved to.


@pytest.mark.parametrize("alias", MODELS_OF_2023 + SMALL_MODELS)
def test_the_registry_has_the_alias(alias):
    assert "/" in registry()[alias]["hub_id"]


def test_every_entry_has_its_fields_and_a_chat_format_that_exists():
    required = {"hub_id", "quantization", "chat_format"}
    for alias, entry in registry().items():
        assert required <= set(entry) <= required | {"note"}, alias
        assert entry["quantization"] in (None, "8bit", "4bit"), alias
        assert entry["chat_format"] is None or entry["chat_format"] in chat_formats(), alias
    hub_ids = [entry["hub_id"] for entry in registry().values()]
    assert len(set(hub_ids)) == len(hub_ids)


def test_the_embedded_model_needs_no_registry_and_no_hub():
    assert "smollm2" not in registry()
    spec = resolve("smollm2", dtype="float32")
    assert (spec.name, spec.revision, spec.quantization) == ("smollm2", GGUF_SHA256, None)
    assert load_tokenizer(spec).chat_template


def test_a_record_holds_no_path_of_this_machine(folders):
    spec = resolve(str(folders["gpt2"]), dtype="float32")
    assert spec.record()["source"] == folders["gpt2"].name
    assert spec.record()["chat_format"] == chat_formats()["plain"]


@pytest.mark.parametrize("quantization", ["16bit", "8", "nf4", "4 bit"])
def test_an_unknown_quantization_is_refused(quantization):
    expected = f"quantization: expected .*'8bit' or '4bit', got '{quantization}'"
    with pytest.raises(ModelError, match=expected):
        resolve("smollm2", quantization)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "half", ""])
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(ModelError, match=f"dtype: expected .*'bfloat16'.*, got '{dtype}'"):
        resolve("smollm2", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_environment_says_what_dtype_auto_means(dtype, monkeypatch):
    monkeypatch.setenv("DLK_DTYPE", dtype)
    assert resolve("smollm2").dtype == dtype
    assert resolve("smollm2-liar").dtype == dtype
    assert resolve("smollm2", dtype="float64").dtype == "float64"


def test_the_environment_cannot_name_another_dtype(monkeypatch):
    monkeypatch.setenv("DLK_DTYPE", "float16")
    expected = "DLK_DTYPE: expected 'float32' or 'bfloat16', got 'float16'"
    with pytest.raises(ModelError, match=expected):
        resolve("smollm2")


@pytest.mark.parametrize(
    ("cpu", "dtype"),
    [
        ("GenuineIntel avx2", "float32"),
        ("GenuineIntel avx512_bf16", "float32"),
        ("GenuineIntel avx512_bf16 amx_bf16", "bfloat16"),
        ("AuthenticAMD avx2", "float32"),
        ("AuthenticAMD avx512_bf16", "bfloat16"),
    ],
)
def test_without_the_environment_dtype_auto_is_what_the_processor_is_fast_in(
    cpu, dtype, monkeypatch
):
    monkeypatch.delenv("DLK_DTYPE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "_cpu_info", lambda: cpu)
    assert resolve("smollm2").dtype == dtype


@pytest.mark.slow
def test_offline_a_model_of_the_hub_is_refused_in_a_few_lines(tmp_path):
    # In a process of its own, because the hub's client reads its environment when it is imported.
    code = (
        "from dlk_utils.errors import ModelError\n"
        "from dlk_utils.models.loading import resolve\n"
        "try: resolve('starchat-beta')\n"
        "except ModelError as error: print(error)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    message = done.stdout.strip()
    assert 2 <= len(message.splitlines()) <= 5, message
    assert "'starchat-beta'" in message and "HuggingFaceH4/starchat-beta" in message
    for hint in ("tried", "offline", "smollm2", "local folder"):
        assert hint in message
    assert "Traceback" not in message
    assert time.monotonic() - began < 60


def test_a_model_that_was_downloaded_before_needs_no_hub(tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants

    def no_network(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "repo_info", no_network)
    ref = tmp_path / "models--openai-community--gpt2" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("0123abcd\n")
    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    spec = resolve("gpt2")
    assert (spec.source, spec.revision) == ("openai-community/gpt2", "0123abcd")
    assert spec.chat_format == "plain"
    with pytest.raises(ModelError, match="phi-2"):
        resolve("phi-2")
    # This is all that is left of a download by commit, as ours are.
    snapshot = tmp_path / "models--microsoft--phi-2" / "snapshots" / "4567ef"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    assert resolve("phi-2").revision == "4567ef"


def test_the_revision_of_a_folder_changes_with_its_files_and_with_nothing_else(folders, tmp_path):
    one, two = (Path(shutil.copytree(folders["gpt2"], tmp_path / n)) for n in ("one", "two"))
    revision = resolve(str(one)).revision
    assert revision == resolve(str(one)).revision == resolve(str(two)).revision
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        content = (two / name).read_bytes()
        (two / name).write_bytes(content + b"\n")
        assert resolve(str(two)).revision != revision
        (two / name).write_bytes(content)
    assert resolve(str(two)).revision == revision


# What is loaded.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_folder_of_each_family_loads_and_computes_what_was_saved(folders, family):
    model, tokenizer = load_model(str(folders[family]), dtype="float32", device="cpu")
    assert model.config.model_type == family
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.spec == resolve(str(folders[family]), dtype="float32")
    ids = torch.tensor([tokenizer("Is it true? é").input_ids])
    assert tokenizer.decode(ids[0]) == "Is it true? é"
    saved = new_model(family, vocab_size=len(tokenizer))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, saved(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_of_an_adapter_is_its_base_with_the_adapter_merged_in(folders, tmp_path, dtype):
    base_folder = str(folders["llama"])
    own = load_on_cpu(base_folder, dtype=dtype).state_dict()
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1],
        init_lora_weights=False,
    )
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    tuned.save_pretrained(tmp_path / "liar")

    liar, tokenizer = load_model(str(tmp_path / "liar"), dtype=dtype, device="cpu")
    assert liar.spec.revision.startswith(resolve(base_folder).revision + "+")
    assert liar.spec.record()["adapters"] == ["liar"]
    assert tokenizer.chat_template
    merged = liar.state_dict()
    assert set(merged) == set(own)
    changed = {name for name in own if not torch.equal(own[name], merged[name])}
    assert changed == {
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    # Frozen weights would halve the speed in 16 bits on a CPU.
    assert all(p.requires_grad for p in liar.parameters())


def test_a_known_family_with_code_of_its_own_uses_the_class_of_transformers(folders, tmp_path):
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "model"))
    marker = tmp_path / "it_ran"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass EvilModel: pass\n")
    assert type(load_on_cpu(folder)) is GPT2LMHeadModel
    assert not marker.exists()


# What is not loaded.


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_on_cpu(folder)
    message = str(error.value)
    assert folder.name in message and len(message.splitlines()) <= 5
    return message


def test_a_folder_without_a_model_is_refused_in_a_few_lines(tmp_path):
    assert "as a local folder" in refusal(tmp_path)


def test_a_folder_whose_weights_are_torn_is_refused_in_a_few_lines(folders, tmp_path):
    torn = Path(shutil.copytree(folders["gpt2"], tmp_path / "torn"))
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refusal(torn)


def test_code_that_comes_with_a_model_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker, folder = tmp_path / "it_ran", tmp_path / "model"
    folder.mkdir()
    auto_map = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.EvilTokenizer", None],
    }
    config = {"model_type": "evil_of_my_own", "architectures": ["EvilModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_config = {"tokenizer_class": "EvilTokenizer", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "class EvilConfig: pass\nclass EvilModel: pass\nclass EvilTokenizer: pass\n"
    )
    refusal(folder)
    with pytest.raises(ModelError):
        load_tokenizer(resolve(str(folder), dtype="float32"))
    assert not marker.exists()


def test_a_variant_of_an_architecture_that_is_not_understood_is_not_loaded(tmp_path):
    new_model("opt", do_layer_norm_before=False).save_pretrained(tmp_path)
    with pytest.raises(UnknownArchitecture, match="opt: expected"):
        load_on_cpu(tmp_path)


# Chat formats.


@pytest.mark.parametrize("name", sorted(chat_formats()))
def test_a_chat_format_renders_its_golden_text(name):
    tokenizer = byte_tokenizer(chat_template=chat_formats()[name])
    assert render_chat(tokenizer, CONVERSATION) == GOLDEN[name]
    closed = tokenizer.apply_chat_template(CONVERSATION[:3], tokenize=False)
    assert GOLDEN[name].startswith(closed)


def test_the_embedded_model_s_own_chat_template_renders_its_golden_text():
    assert render_chat(load_tokenizer(resolve("smollm2")), CONVERSATION) == GOLDEN["chatml"]


def test_a_tokenizer_without_a_chat_template_gets_that_of_the_spec(folders):
    spec = resolve(str(folders["gpt2"]), dtype="float32")
    assert load_tokenizer(spec).chat_template == chat_formats()["plain"]
    alpaca = replace(spec, chat_format="alpaca")
    assert load_tokenizer(alpaca).chat_template == chat_formats()["alpaca"]
    assert not load_tokenizer(replace(spec, chat_format=None)).chat_template


def test_a_tokenizer_that_has_no_tokens_for_the_marks_of_a_format_is_refused(folders):
    spec = resolve(str(folders["gpt2"]), dtype="float32")
    expected = (
        "expected a tokenizer with the marks of the chat format 'chatml', "
        r"got one without the tokens <\|im_end\|>, <\|im_start\|>"
    )
    with pytest.raises(ModelError, match=expected):
        load_tokenizer(replace(spec, chat_format="chatml"))


def test_a_folder_that_is_called_like_an_alias_gets_its_format(folders, tmp_path):
    shutil.copytree(folders["gpt2"], tmp_path / "minotaur-15b")
    spec = resolve(str(tmp_path / "minotaur-15b"), dtype="float32")
    assert spec.chat_format == "vicuna"
    assert load_tokenizer(spec).chat_template == chat_formats()["vicuna"]


# Identity.


def test_a_loaded_model_is_known_by_its_spec(folders):
    folder = str(folders["gpt2"])
    assert identity(load_on_cpu(folder)) == (folder, resolve(folder).revision, "float32")


def test_a_model_that_the_user_loaded_is_known_by_its_configuration_and_weights(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"], dtype=torch.float32)
    name, revision, dtype = identity(model)
    assert (name, dtype) == (str(folders["gpt2"]), "float32")
    assert identity(new_model("gpt2", vocab_size=model.config.vocab_size)) == (
        "GPT2LMHeadModel",
        revision,
        "float32",
    )
    assert identity(model.to(torch.bfloat16))[1:] != (revision, "float32")
    assert identity(new_model("gpt2", vocab_size=99))[1] != revision


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_its_revision_when_it_is_saved_and_loaded(family, tmp_path):
    model = new_model(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert identity(loaded)[1:] == identity(model)[1:]


@pytest.mark.parametrize("weight", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias"])
def test_training_a_weight_changes_the_revision(weight):
    model = new_model("gpt2")
    before = identity(model)
    with torch.no_grad():
        model.get_parameter(weight).add_(0.01)
    assert identity(model)[1] != before[1]


def test_a_change_of_the_configuration_changes_the_revision():
    model = new_model("gpt2")
    before = identity(model)
    model.config.layer_norm_epsilon = 1e-3
    assert identity(model)[1] != before[1]


def test_an_adapter_on_a_loaded_model_is_not_known_as_that_model(folders):
    model = load_on_cpu(folders["llama"])
    before = identity(model)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert identity(tuned)[1] != before[1]
