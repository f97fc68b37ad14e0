"""A model runs on another device only if it computes there what it computes on the CPU."""

import pytest
import torch
from tiny_models import new_model, tiny_checkpoint

from dlk_utils.errors import ModelError
from dlk_utils.models import loading
from dlk_utils.models.loading import device_of, load_model, load_spec, move_checked, resolve


def device_that_computes(monkeypatch, change, family: str = "llama", **options):
    """A model whose second block puts out `change(hidden)` once it is moved, and as it was before.

    That stands for a device: the only thing about it that is not real is its numbers.
    """
    model = new_model(family, **options)
    block = model.get_submodule("model.layers")[1]

    def move(device: str) -> torch.nn.Module:
        block.register_forward_hook(lambda module, args, hidden: change(hidden))
        return model

    monkeypatch.setattr(model, "to", move)
    return model


def test_a_device_that_rounds_otherwise_is_taken(monkeypatch):
    move_checked(device_that_computes(monkeypatch, lambda hidden: hidden * (1 + 1e-5)), "mps")


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden: hidden * 1.01,
        lambda hidden: hidden.flip(1),
        lambda hidden: hidden.index_fill(1, torch.tensor([11]), 0.0),
        lambda hidden: hidden * torch.nan,
    ],
    ids=["1 % off", "other tokens", "one token lost", "nan"],
)
def test_a_device_with_other_states_is_refused(monkeypatch, change):
    model = device_that_computes(monkeypatch, change)
    with pytest.raises(ModelError, match=r"^device .mps.: expected the states of the CPU to 0\.1%"):
        move_checked(model, "mps")


def test_a_device_that_computes_padding_wrongly_is_refused(monkeypatch):
    def lose_the_padded_text(hidden):
        return torch.cat([hidden[:1], hidden[1:].roll(1, 1)])

    with pytest.raises(ModelError, match="hidden state 3 off by "):
        move_checked(device_that_computes(monkeypatch, lose_the_padded_text), "mps")


def test_what_stands_at_the_padding_does_not_count(monkeypatch):
    def other_padding(hidden):
        hidden = hidden.clone()
        hidden[1, :5] = torch.nan
        return hidden

    # In the last block, after which nothing reads it.
    move_checked(device_that_computes(monkeypatch, other_padding, num_hidden_layers=2), "mps")


def test_in_16_bits_states_may_differ_more(monkeypatch):
    model = device_that_computes(monkeypatch, lambda hidden: hidden * 1.01).bfloat16()
    move_checked(model, "mps")
    model = device_that_computes(monkeypatch, lambda hidden: hidden * 1.2).bfloat16()
    with pytest.raises(ModelError, match=r"to 5\.0%, got .* in torch.bfloat16; use device 'cpu'"):
        move_checked(model, "mps")


def test_a_device_that_is_not_there_is_refused_without_its_own_error():
    with pytest.raises(ModelError, match=r"device 'mps' cannot run this model in torch.float32"):
        move_checked(new_model("llama"), "mps" if not torch.backends.mps.is_available() else "xpu")


def test_a_device_is_one_that_is_here():
    assert device_of("cpu") == "cpu"
    assert device_of("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "CPU", "cuda:", "cuda:99", "cuda:-1", "meta", "", "x" * 9000):
        with pytest.raises(ModelError, match=r"^device: expected .*; here: cpu") as error:
            device_of(name)
        assert len(str(error.value)) < 300


@pytest.fixture
def with_mps(monkeypatch):
    """A machine that says it has MPS."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("DLK_DTYPE", raising=False)


def test_mps_is_used_where_it_is_asked_for_and_in_single_precision(with_mps):
    assert device_of("mps") == "mps" and device_of("auto") != "mps"
    assert resolve("smollm2", device="mps").dtype == "float32"


def test_a_model_for_mps_is_loaded_on_the_cpu_and_checked(with_mps, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(
        loading, "move_checked", lambda model, device: moved.append((model.device.type, device))
    )
    model, _ = load_model(str(tiny_checkpoint(tmp_path)), dtype="float32", device="mps")
    assert moved == [("cpu", "mps")] and model.spec.dtype == "float32"


def test_a_quantized_model_is_refused_on_mps(with_mps, tmp_path):
    spec = resolve(str(tiny_checkpoint(tmp_path)), "8bit", "float32")
    with pytest.raises(ModelError, match="expected a CUDA GPU or a CPU for quantization '8bit'"):
        load_spec(spec, "mps")
