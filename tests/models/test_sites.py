from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LAYERS, close, tiny, tiny_prompts
from transformers import AutoConfig, AutoModelForCausalLM

from dlk_utils.errors import UnknownArchitecture
from dlk_utils.extract.batches import pad
from dlk_utils.extract.stages import store_gradients
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import read_rows
from dlk_utils.models.sites import (
    ARCHITECTURES,
    SITES,
    architecture,
    at_sites,
    check_sites,
    layer_numbers,
    site_modules,
)


@pytest.mark.trap(24, 26)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_resid_post_is_what_output_hidden_states_gives(family, n):
    model, batch = tiny(family), pad(tiny_prompts(n).input_ids)
    states = forward_states(model, batch, SITES)[0]["resid_post"]
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
    assert states.shape == (n, LAYERS, model.config.hidden_size)
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(states[:, layer], hidden[layer + 1][:, -1], **close(model))
    norms = (
        "model.norm",
        "transformer.ln_f",
        "transformer.norm_f",
        "gpt_neox.final_layer_norm",
        "model.final_layernorm",
        "model.decoder.final_layer_norm",
    )
    norm = next(m for name, m in model.named_modules() if name in norms)
    with torch.no_grad():
        torch.testing.assert_close(norm(states[:, -1]), hidden[-1][:, -1], **close(model))


@pytest.mark.trap(24)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_adds_what_attention_and_mlp_put_out(family):
    model = tiny(family)
    states = forward_states(model, pad(tiny_prompts().input_ids), SITES)[0]
    for layer in range(1, LAYERS):
        total = (
            states["resid_post"][:, layer - 1]
            + states["attn_out"][:, layer]
            + states["mlp_out"][:, layer]
        )
        torch.testing.assert_close(states["resid_post"][:, layer], total, **close(model))


def test_every_architecture_that_is_listed_and_can_be_built_small_is_tested():
    assert {tiny(f).config.model_type for f in FAMILIES} >= set(ARCHITECTURES)


def test_an_unknown_architecture_and_an_unknown_site_are_refused_by_name():
    model = tiny("llama")
    with pytest.raises(ValueError, match="head_in"):
        site_modules(model, "head_in")
    model.config.model_type = "elephant"
    try:
        with pytest.raises(ValueError, match=r"'elephant' is not known.*llama"):
            site_modules(model, "resid_post")
    finally:
        model.config.model_type = "llama"


def test_hooks_are_gone_after_an_error():
    model = tiny("gpt2")
    hooks = lambda: [len(m._forward_hooks) for m in model.modules()]
    before = hooks()
    with pytest.raises(ZeroDivisionError), at_sites(model, SITES, lambda *a: 1 / 0):
        model(torch.tensor([[1, 2]]))
    assert hooks() == before


@pytest.mark.trap(27)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_keeps_the_conventions_passes_the_check_and_the_heads_make_what_attention_puts_out(
    family,
):
    model = tiny(family)
    check_sites(model)
    if "layernorm" in architecture(model).attn:
        return  # a norm stands between W_O and what is added
    states = forward_states(model, pad(tiny_prompts().input_ids), ["head_out", "attn_out"])[0]
    for layer, w_o in enumerate(site_modules(model, "head_out")):
        with torch.no_grad():
            torch.testing.assert_close(
                w_o(states["head_out"][:, layer]), states["attn_out"][:, layer], **close(model)
            )


def test_states_that_are_not_numbers_do_not_pass_the_check():
    model = tiny("llama")
    weight = model.model.layers[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        with pytest.raises(UnknownArchitecture, match=r"not finite in torch.float64"):
            check_sites(model)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize("w_o", ["self_attn.v_proj", "mlp.up_proj", "self_attn.q_proj"])
def test_heads_that_are_read_elsewhere_than_before_w_o_do_not_pass_the_check(monkeypatch, w_o):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], w_o=w_o))
    with pytest.raises(
        UnknownArchitecture, match=r"llama: expected W_O of head_out\[0\] to be attn_out\[0\]"
    ):
        check_sites(tiny("llama"))


def test_a_variant_whose_blocks_do_something_else_is_refused_by_name():
    config = AutoConfig.for_model(
        "opt",
        vocab_size=97,
        hidden_size=36,
        ffn_dim=40,
        num_attention_heads=6,
        num_hidden_layers=3,
        word_embed_proj_dim=36,
        max_position_embeddings=64,
        do_layer_norm_before=False,
    )
    with pytest.raises(UnknownArchitecture, match=r"opt: expected resid_post\[0\] to be"):
        check_sites(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.trap(24)
@pytest.mark.parametrize("layers", [[2, 0], [-1, 0, 0], "2,0", "::-2"])
def test_layers_in_any_order_are_stored_under_their_own_names(layers, tmp_path):
    assert layer_numbers(layers, LAYERS) == [0, 2]
    model, rows = tiny("llama"), tiny_prompts()
    store_gradients(model, rows, tmp_path / "some", record={}, layers=layers)
    store_gradients(model, rows, tmp_path / "all", record={})
    for name in ("activation.resid_post.0.0", "activation.resid_post.2.0", "gradient.mlp_out.0.0"):
        np.testing.assert_allclose(
            read_rows(tmp_path / "some", rows, name),
            read_rows(tmp_path / "all", rows, name),
            rtol=1e-6,
        )


def test_a_fault_at_one_token_that_another_token_s_size_would_hide_does_not_pass_the_check(
    monkeypatch,
):
    model, real = tiny("llama"), at_sites
    with torch.no_grad():  # the first token's state is very large, as in many large models
        big = model.model.embed_tokens.weight[3].clone()
        model.model.embed_tokens.weight[3] *= 1e6
    try:
        check_sites(model)
        monkeypatch.setattr(
            "dlk_utils.models.sites.at_sites",
            lambda m, sites, act: real(
                m,
                sites,
                lambda site, layer, hidden: act(
                    site,
                    layer,
                    torch.cat([hidden[:, :-1], hidden[:, -1:] * 3], 1)
                    if (site, layer) == ("mlp_out", 1)
                    else hidden,
                ),
            ),
        )
        with pytest.raises(UnknownArchitecture, match=r"llama: expected resid_post\[1\] to be"):
            check_sites(model)
    finally:
        with torch.no_grad():
            model.model.embed_tokens.weight[3] = big
