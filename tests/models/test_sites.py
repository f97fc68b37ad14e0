"""The sites of every family keep the conventions; what does not keep them is refused by name."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, LAYERS, WIDTH, close, new_model, tiny, tiny_prompts
from torch import Tensor, nn

from dlk_utils.errors import ModelError, UnknownArchitecture
from dlk_utils.extract.batches import forward, pad
from dlk_utils.extract.stages import store_gradients
from dlk_utils.extract.store import read_rows
from dlk_utils.models import sites as sites_module
from dlk_utils.models.sites import (
    ARCHITECTURES,
    SITES,
    architecture,
    at_sites,
    check_sites,
    layer_numbers,
    site_modules,
)


@torch.no_grad()
def last_token_states(
    model: nn.Module, n_prompts: int, *, layers: str | Sequence[int] = "all"
) -> tuple[dict[str, list[Tensor]], tuple[Tensor, ...]]:
    """Each site by layer, and transformers' hidden states, each [n_prompts, d]."""
    states: dict[str, list[Tensor]] = {site: [] for site in SITES}

    def record(site: str, layer: int, hidden: Tensor) -> None:
        states[site].append(hidden[:, -1].clone())

    batch = pad(tiny_prompts(n_prompts).input_ids)
    with at_sites(model, SITES, record, layers):
        output = forward(model, batch, output_hidden_states=True)
    return states, tuple(hidden[:, -1] for hidden in output.hidden_states)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm after the last block, a sibling of the list of blocks."""
    parent = model.get_submodule(architecture(model).blocks.rpartition(".")[0])
    norms = [m for name, m in parent.named_children() if "norm" in name or name == "ln_f"]
    return norms[-1]


@pytest.mark.trap(24, 26)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_resid_post_is_what_output_hidden_states_gives(family, n):
    model = tiny(family)
    states, hidden_states = last_token_states(model, n)
    resid_post = states["resid_post"]
    assert [state.shape for state in resid_post] == [(n, WIDTH)] * LAYERS
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(resid_post[layer], hidden_states[layer + 1], **close(model))
    with torch.no_grad():
        normed = final_norm(model)(resid_post[-1])
    torch.testing.assert_close(normed, hidden_states[-1], **close(model))


@pytest.mark.trap(24)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_adds_what_attention_and_mlp_put_out(family):
    model = tiny(family)
    states, _ = last_token_states(model, 7)
    resid_post, attn_out, mlp_out = (states[s] for s in ("resid_post", "attn_out", "mlp_out"))
    for layer in range(1, LAYERS):
        total = resid_post[layer - 1] + attn_out[layer] + mlp_out[layer]
        torch.testing.assert_close(resid_post[layer], total, **close(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_make_what_attention_puts_out(family):
    model = tiny(family)
    sites = architecture(model)
    # In some families a norm stands between W_O and the residual stream.
    norm_follows = not sites.w_o.startswith(sites.attn)
    states, _ = last_token_states(model, 7)
    for layer, w_o in enumerate(site_modules(model, "head_out")):
        with torch.no_grad():
            projected = w_o(states["head_out"][layer])
            if norm_follows:
                projected = site_modules(model, "attn_out")[layer](projected)
        torch.testing.assert_close(projected, states["attn_out"][layer], **close(model))


@pytest.mark.trap(27)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_keeps_the_conventions_passes_the_check(family):
    check_sites(tiny(family))


def test_every_architecture_is_tested():
    assert {tiny(family).config.model_type for family in FAMILIES} >= set(ARCHITECTURES)


def test_the_places_of_dropout_are_named_as_the_masks_know_them():
    places = {"attn_out", "mlp_out", "embedding", "attention"}
    for kind, family in ARCHITECTURES.items():
        assert family.dropout and set(family.dropout) <= places, kind


def test_an_unknown_site_is_refused_by_name():
    with pytest.raises(ValueError, match="head_in"):
        site_modules(tiny("llama"), "head_in")


def test_an_unknown_architecture_is_refused_by_name():
    # Its norms come after the sum, so that what its blocks do is no sum.
    model = new_model("opt", do_layer_norm_before=False)
    model.config.model_type = "elephant"
    with pytest.raises(UnknownArchitecture, match=r"'elephant' cannot be used.*no two modul"):
        site_modules(model, "resid_post")


def test_hooks_are_gone_after_an_error():
    model = tiny("gpt2")

    def n_hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def fail(site: str, layer: int, hidden: Tensor) -> None:
        raise ZeroDivisionError

    before = n_hooks()
    with pytest.raises(ZeroDivisionError), at_sites(model, SITES, fail):
        model(torch.tensor([[1, 2]]))
    assert n_hooks() == before


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_model_goes_on_with_a_tensor_that_is_returned(family, site):
    """OPT is among them because its MLP sees the tokens of all prompts in one row."""
    model = tiny(family)
    batch = pad(tiny_prompts(3).input_ids)
    shapes = []

    def set_to_zero(site: str, layer: int, hidden: Tensor) -> Tensor:
        shapes.append(hidden.shape[:2])
        return torch.zeros_like(hidden)

    with torch.no_grad():
        with at_sites(model, [site], set_to_zero, layers=LAYERS - 1):
            changed = model(**batch).logits[:, -1]
        plain = model(**batch).logits[:, -1]
    assert shapes == [batch["input_ids"].shape]
    assert not torch.allclose(changed, plain)
    if site == "resid_post":
        torch.testing.assert_close(changed[0], changed[1])


def test_what_is_kept_from_a_site_is_part_of_the_graph():
    kept = {}
    model = tiny("opt")
    with at_sites(model, SITES, lambda site, layer, hidden: kept.update({(site, layer): hidden})):
        logits = model(**pad(tiny_prompts(3).input_ids)).logits
    gradients = torch.autograd.grad(logits[:, -1].sum(), list(kept.values()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.trap(24)
@pytest.mark.parametrize("layers", [[2, 0], [-1, 0, 0], "2,0", "::-2"])
def test_layers_in_any_order_are_read_under_their_own_numbers(layers):
    assert layer_numbers(layers, LAYERS) == [0, 2]
    model = tiny("llama")
    some, _ = last_token_states(model, 3, layers=layers)
    every, _ = last_token_states(model, 3)
    for site in SITES:
        for state, layer in zip(some[site], [0, 2], strict=True):
            torch.testing.assert_close(state, every[site][layer], **close(model))


@pytest.mark.trap(24)
def test_layers_in_any_order_are_stored_under_their_own_names(tmp_path):
    model, rows = tiny("llama"), tiny_prompts()
    store_gradients(model, rows, tmp_path / "some", record={}, layers=[2, 0])
    store_gradients(model, rows, tmp_path / "all", record={})
    for name in ("activation.resid_post.0.0", "activation.resid_post.2.0", "gradient.mlp_out.0.0"):
        some = read_rows(tmp_path / "some", rows, name)
        np.testing.assert_allclose(some, read_rows(tmp_path / "all", rows, name), rtol=1e-6)


@pytest.mark.parametrize("layers", ["some", "1,9", "::0", 9, [7]])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match="layers: expected 'all', an index below 7"):
        layer_numbers(layers, 7)


def test_states_that_are_not_finite_do_not_pass_the_check():
    model = tiny("llama")
    weight = model.model.layers[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        with pytest.raises(ModelError, match=r"nan or inf in torch.float64"):
            check_sites(model)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize("w_o", ["self_attn.v_proj", "mlp.up_proj", "self_attn.q_proj"])
def test_heads_that_are_read_elsewhere_than_before_w_o_do_not_pass_the_check(monkeypatch, w_o):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], w_o=w_o))
    expected = r"llama: expected W_O of head_out\[0\] to be attn_out\[0\]"
    with pytest.raises(UnknownArchitecture, match=expected):
        check_sites(tiny("llama"))


def test_a_variant_whose_blocks_do_something_else_is_refused_by_name():
    with pytest.raises(UnknownArchitecture, match=r"opt: expected resid_post\[0\] to be"):
        check_sites(new_model("opt", do_layer_norm_before=False))


def test_a_fault_at_one_token_is_not_hidden_by_the_size_of_another(monkeypatch):
    model = tiny("llama")
    embeddings = model.model.embed_tokens.weight
    kept = embeddings[3].detach().clone()

    def at_sites_with_fault(model: nn.Module, sites: Sequence[str], act):
        def act_on_wrong_state(site: str, layer: int, hidden: Tensor):
            if (site, layer) == ("mlp_out", 1):
                hidden = torch.cat([hidden[:, :-1], hidden[:, -1:] * 3], dim=1)
            return act(site, layer, hidden)

        return at_sites(model, sites, act_on_wrong_state)

    try:
        with torch.no_grad():
            # The first token's state is very large, as in many large models.
            embeddings[3] *= 1e6
        check_sites(model)
        monkeypatch.setattr(sites_module, "at_sites", at_sites_with_fault)
        with pytest.raises(UnknownArchitecture, match=r"llama: expected resid_post\[1\] to be"):
            check_sites(model)
    finally:
        with torch.no_grad():
            embeddings[3] = kept
