"""Families that are not in the table are found from the model, or refused by name."""

import pytest
import torch
from tiny_models import FAMILIES, tiny

from dlk_utils.errors import UnknownArchitecture
from dlk_utils.extract.families import tiny_model
from dlk_utils.models.architectures import ARCHITECTURES
from dlk_utils.models.finding import find_architecture, trial_tokens
from dlk_utils.models.sites import SITES, at_sites, check_sites

# A parallel Falcon drops the sum of what attention and the MLP put out, StableLM hides its dropout
# of attention, and OPT gives its rate another name.
HIDDEN = {
    "falcon": (),
    "falcon grouped": (),
    "stablelm": ("mlp_out",),
    "opt": ("attn_out", "mlp_out"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_in_a_family_of_the_table_is_what_the_table_says(family):
    model = tiny(family)
    found, known = find_architecture(model), ARCHITECTURES[model.config.model_type]
    assert (found.blocks, found.attn, found.mlp, found.w_o, found.scale) == (
        known.blocks,
        known.attn,
        known.mlp,
        known.w_o,
        known.scale,
    )
    assert found.dropout == HIDDEN.get(family, known.dropout)


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", "cohere2", "olmo3", pytest.param("dbrx", marks=pytest.mark.slow)]
)
def test_a_family_is_found_also_in_16_bits(kind):
    model = tiny_model(kind)
    found = find_architecture(model)
    in_16_bits = find_architecture(model.to(torch.bfloat16))
    assert (in_16_bits.attn, in_16_bits.mlp, in_16_bits.w_o) == (found.attn, found.mlp, found.w_o)
    check_sites(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_before_what_is_added_is_read_from_the_configuration(dtype):
    model = tiny_model("granite").to(dtype)
    assert find_architecture(model).scale == 0.22
    check_sites(model)


def test_a_state_that_is_multiplied_before_it_is_added_can_be_replaced():
    """What `act` returns for attn_out is what is added, not what is multiplied."""
    model = tiny_model("granite")
    token_ids = torch.tensor([trial_tokens(model)])
    states = {}

    def add_ones(site, layer, hidden):
        states[site, layer] = hidden.clone()
        return torch.ones_like(hidden) if site != "resid_post" else None

    with torch.no_grad(), at_sites(model, SITES[:3], add_ones):
        model(token_ids)
    torch.testing.assert_close(states["resid_post", 1] - 2, states["resid_post", 0])


REFUSED = {
    "qwen3_5_text": "only one of block 0 and block 3 has linear_attn and self_attn",
    "lfm2": "blocks are of different kinds: only one of block 0 and block 2 has conv and",
    "gemma4_text": "the outputs of no two modules in a block add up to what the block adds",
    "gemma4_unified_text": "the heads of its blocks differ in width",
    "mamba": "no list of 6 blocks has its 7 hidden states as inputs and outputs",
    "bert": "the outputs of no two modules in a block add up to what the block adds",
    "roberta-prelayernorm": "its tokens see later ones",
    "whisper": "padding changes its states",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_cannot_be_proved_is_refused_by_name_with_what_failed(kind):
    expected = f"architecture '{kind}' cannot be used.*{REFUSED[kind]}"
    with pytest.raises(UnknownArchitecture, match=expected):
        check_sites(tiny_model(kind))


def test_an_error_of_the_model_is_refused_by_name_too(monkeypatch):
    model = tiny_model("cohere")

    def fail(*args, **options):
        raise KeyError("no such mask")

    monkeypatch.setattr(model.model.layers[2].mlp, "forward", fail)
    with pytest.raises(UnknownArchitecture, match=r"'cohere' cannot .*KeyError: 'no such mask'"):
        check_sites(model)


def test_a_model_in_training_mode_is_not_looked_at():
    with pytest.raises(UnknownArchitecture, match="evaluation mode"):
        find_architecture(tiny_model("cohere").train())


def test_trial_tokens_stand_for_no_image():
    model = tiny_model("gemma3", image_token_id=4)
    model.config.image_token_id = 4
    assert trial_tokens(model) == [3, 5, 6, 7, 8, 9]
