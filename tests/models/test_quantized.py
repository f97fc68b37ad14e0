"""Models in 8 and 4 bits, with and without an adapter: states, gradients and draws still hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, tiny_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dlk_utils.errors import ModelError
from dlk_utils.extract.batches import pad
from dlk_utils.extract.draws import draw_states
from dlk_utils.extract.gradients import full_backprop, pooled_weight_gradients, states_and_gradients
from dlk_utils.models.loading import load_model
from dlk_utils.models.sites import SITES

pytestmark = pytest.mark.slow

pytest.importorskip("bitsandbytes")
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12] * 9]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    # bitsandbytes takes weights of multiples of 32 and 64 only.
    return tiny_checkpoint(
        tmp_path_factory.mktemp("llama"),
        tokenizer=byte_tokenizer(chat_template=None),
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=128,
    )


@pytest.fixture(scope="module")
def adapter_folder(llama_folder, tmp_path_factory) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), config)
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_adapter(adapter_folder, tmp_path_factory) -> Path:
    """An adapter that changes states by 2 %, less than the rounding to 4 bits does."""
    folder = Path(shutil.copytree(adapter_folder, tmp_path_factory.mktemp("small") / "adapter"))
    torch.manual_seed(1)
    weights = load_file(folder / "adapter_model.safetensors")
    small = {name: 0.02 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(small, folder / "adapter_model.safetensors")
    return folder


def load_on_cpu(folder: Path, dtype: str, quantization: str | None) -> nn.Module:
    return load_model(str(folder), dtype=dtype, quantization=quantization, device="cpu")[0]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.double().flatten(1), b.double().flatten(1))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state without what is no tensor."""
    return {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}


@pytest.mark.parametrize(
    ("quantization", "layer"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")]
)
def test_a_quantized_model_stays_near_the_full_one(llama_folder, quantization, layer):
    model = load_on_cpu(llama_folder, "float32", quantization)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == layer
    assert model.spec.quantization == quantization
    full = load_on_cpu(llama_folder, "float32", None)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        logits = torch.stack([model(ids).logits.float().flatten(), full(ids).logits.flatten()])
    assert torch.isfinite(logits).all()
    assert torch.corrcoef(logits)[0, 1] > 0.95


# Of an adapter merged into the quantised weights, 95 % of the direction is left in 8 bits, and 80 %
# in 4. The states differ by less than these shares of their norm.
@pytest.mark.parametrize(("quantization", "difference"), [("8bit", 0.01), ("4bit", 0.03)])
def test_an_adapter_stays_beside_quantized_weights_and_acts_as_on_the_full_model(
    llama_folder, small_adapter, quantization, difference
):
    def last_states(model: nn.Module) -> Tensor:
        with torch.no_grad():
            output = model(torch.arange(2, 30)[None], output_hidden_states=True)
        return output.hidden_states[-1][0].double()

    def effect(quantization: str | None) -> Tensor:
        folders = small_adapter, llama_folder
        adapted, plain = (
            last_states(load_on_cpu(folder, "float32", quantization)) for folder in folders
        )
        return (adapted - plain).flatten()

    assert torch.cosine_similarity(effect(quantization), effect(None), dim=0) > 0.9
    adapted = load_on_cpu(small_adapter, "float32", quantization)
    assert "lora" in type(adapted.model.layers[0].mlp.down_proj).__module__
    base = load_on_cpu(llama_folder, "float32", quantization)
    merged = last_states(PeftModel.from_pretrained(base, small_adapter).merge_and_unload())
    beside = last_states(adapted)
    assert (merged - beside).norm() < difference * beside.norm()


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_an_adapter_on_a_checkpoint_that_was_saved_quantized_stays_beside_it(
    llama_folder, small_adapter, tmp_path, quantization
):
    base = load_on_cpu(llama_folder, "float32", quantization)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    folder = Path(shutil.copytree(small_adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    saved = load_on_cpu(folder, "float32", None)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        expected = load_on_cpu(small_adapter, "float32", quantization)(ids).logits
        torch.testing.assert_close(saved(ids).logits, expected, atol=1e-2, rtol=1e-2)
    with pytest.raises(ModelError, match="saved quantised; load it without quantization"):
        load_on_cpu(folder, "float32", quantization)


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_gradients_are_those_of_full_backprop_and_touch_no_weight(
    llama_folder, adapter_folder, quantization, with_adapter
):
    # peft freezes all that it is laid on, the embeddings included.
    folder = adapter_folder if with_adapter else llama_folder
    model = load_on_cpu(folder, "float32", quantization)
    assert bool(model.spec.adapters) == with_adapter
    before = tensors(model)
    batch, choices = pad(PROMPTS), [[[3], [4]]] * len(PROMPTS)

    gradients = states_and_gradients(model, PROMPTS, choices, SITES)[1]
    expected = full_backprop(model, batch, choices, SITES)
    for site in SITES:
        assert torch.isfinite(gradients[site]).all()
        assert gradients[site].abs().amax(-1).min() > 0
        # 8 bits round what enters a layer, and this goes by the batch that it comes in.
        assert cosine(gradients[site], expected[site]).min() > 0.99

    pooled = pooled_weight_gradients(model, batch, choices, ["model.layers.1.mlp.down_proj"])
    [(of_outputs, of_inputs)] = pooled.values()
    assert of_outputs.abs().sum() > 0 and of_inputs.abs().sum() > 0
    after = tensors(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "quantization", "with_adapter"),
    [
        ("bfloat16", None, False),
        ("float16", None, True),
        ("bfloat16", "8bit", False),
        ("float32", "8bit", True),
        ("bfloat16", "4bit", True),
        ("float32", "4bit", False),
    ],
)
def test_draws_of_the_last_token_side_by_side_are_those_one_by_one(
    llama_folder, adapter_folder, dtype, quantization, with_adapter
):
    folder = adapter_folder if with_adapter else llama_folder
    model = load_on_cpu(folder, dtype, quantization)
    seeds = [[k, 10 + k, 20 + k] for k in range(4)]

    def draws(at_once: int | None) -> list[Tensor]:
        drawn = draw_states(
            model,
            PROMPTS,
            ["resid_post"],
            seeds=seeds,
            p=0.3,
            scope="last_token",
            at_once=at_once,
        )
        return [states["resid_post"] for states, _ in drawn]

    together, one_by_one = draws(None), draws(1)
    for a, b in zip(together, one_by_one, strict=True):
        assert cosine(a, b).min() > 0.999
    # Another draw is further off.
    assert cosine(together[0], together[1]).max() < 0.999
