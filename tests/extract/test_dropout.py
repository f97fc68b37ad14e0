"""Dropout masks: seeded, unrelated, of the right share, and the same in any batch."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import FAMILIES, close_in_single, tiny, tiny_prompts

from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.dropout import (
    PLACES,
    draw_seed,
    keep_mask,
    keep_pairs,
    mc_dropout,
    native_sites,
)
from dlk_utils.extract.states import forward_states

WITH_ATTENTION = [family for family in FAMILIES if not family.startswith(("falcon", "mpt"))]


def draw(model, rows: pd.DataFrame, k: int = 0, *, side: str = "left", p: float = 0.2, **options):
    """Draw k of the states of all layers, [layer, n, d]."""
    batch = pad(rows.input_ids, side=side)
    seeds = [draw_seed(row_id, k) for row_id in rows.row_id]
    with mc_dropout(model, p, seeds=seeds, position_ids=batch["position_ids"], **options):
        return forward_states(model, batch, ["resid_post"])[0]["resid_post"]


@pytest.mark.trap(21)
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_differ_on_every_row_and_layer_and_repeat_bit_for_bit(family):
    model, rows = tiny(family), tiny_prompts()
    first, again, other = draw(model, rows), draw(model, rows), draw(model, rows, 1)
    assert torch.equal(first, again)
    assert ((first - other).abs().amax(-1) > 0).all()


@pytest.mark.slow
@pytest.mark.trap(21)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_draw_does_not_depend_on_batch_size_order_or_padding(family, side):
    model, rows = tiny(family), tiny_prompts()
    together = draw(model, rows)
    reversed_rows = draw(model, rows[::-1], side=side).flip(1)
    alone = torch.cat([draw(model, rows.iloc[[i]], side=side) for i in range(len(rows))], 1)
    torch.testing.assert_close(reversed_rows, together, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", WITH_ATTENTION)
@pytest.mark.parametrize("place", ["attention", "embedding"])
def test_dropout_at_other_places_differs_repeats_and_does_not_depend_on_padding(family, place):
    model, rows = tiny(family), tiny_prompts()
    rows = rows[rows.input_ids.map(len) > 6]
    options = {"p": 0.4, "places": place}
    first = draw(model, rows, **options)
    assert torch.equal(first, draw(model, rows, **options))
    assert ((first - draw(model, rows, 1, **options)).abs().amax(-1) > 0).all()
    alone = torch.cat([draw(model, rows.iloc[[i]], **options) for i in range(len(rows))], 1)
    right = draw(model, rows, side="right", **options)
    torch.testing.assert_close(right, first, **close_in_single(model))
    torch.testing.assert_close(alone, first, **close_in_single(model))


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_attention_written_out_for_dropout_is_the_family_s_own_where_nothing_is_dropped(family):
    model, batch = tiny(family), pad(tiny_prompts().input_ids)
    # Below 1/65536 every mask keeps everything.
    options = {"seeds": range(7), "position_ids": batch["position_ids"], "places": "attention"}
    with mc_dropout(model, 1e-9, **options):
        written_out = last_logits(model, batch)
    torch.testing.assert_close(written_out, last_logits(model, batch), **close_in_single(model))


def test_masks_are_the_same_bits_for_either_padding_side_and_any_batch():
    rows = tiny_prompts()
    seeds = torch.arange(7, dtype=torch.int32)[:, None] * 977
    left, right = (
        keep_mask(seeds, pad(rows.input_ids, side=side)["position_ids"], 36, 0.1)
        for side in ("left", "right")
    )
    for i, n in enumerate(rows.input_ids.map(len)):
        alone = keep_mask(seeds[i : i + 1], torch.arange(n)[None], 36, 0.1)[0]
        assert torch.equal(left[i, -n:], alone) and torch.equal(right[i, :n], alone)


def assert_unrelated(keep: torch.Tensor) -> None:
    """Neighbours along no axis of a mask are correlated."""
    centred = (keep - keep.mean()) / keep.std()
    for axis in range(keep.dim()):
        n = keep.shape[axis] - 1
        products = centred.narrow(axis, 0, n) * centred.narrow(axis, 1, n)
        assert abs(float(products.mean())) < 5 / np.sqrt(keep.numel())


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_masks_keep_one_minus_p_and_are_unrelated_over_rows_tokens_and_channels(p):
    seeds = torch.arange(40, dtype=torch.int32)[:, None]
    keep = keep_mask(seeds, torch.arange(50).expand(40, 50), 100, p).double()
    assert abs(float(keep.mean()) - (1 - p)) < 4 * np.sqrt(p * (1 - p) / keep.numel())
    assert_unrelated(keep)


def test_masks_of_attention_keep_one_minus_p_and_are_unrelated_over_heads_queries_and_keys():
    seeds = torch.arange(9, dtype=torch.int32)[:, None]
    keep = keep_pairs(seeds, torch.arange(40).expand(9, 40), 6, 40, 0.3).double()
    assert keep.shape == (9, 6, 40, 40)
    assert abs(float(keep.mean()) - 0.7) < 4 * np.sqrt(0.21 / keep.numel())
    assert_unrelated(keep)
    # Nor is the pair of query i and key j related to that of query j and key i.
    centred = (keep - keep.mean()) / keep.std()
    off_diagonal = ~torch.eye(40, dtype=torch.bool).expand(9, 6, 40, 40)
    products = (centred * centred.mT)[off_diagonal]
    assert abs(float(products.mean())) < 5 / np.sqrt(products.numel())


def mlp_outputs(model, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first MLP puts out, and what dropout makes of it."""
    batch, seen = pad(tiny_prompts(1).input_ids), []

    def keep(module, args, output: torch.Tensor) -> None:
        seen.append(output.detach().double())

    mlp = model.model.layers[0].mlp
    before = mlp.register_forward_hook(keep)
    options = {"seeds": [5], "position_ids": batch["position_ids"], "places": ["mlp_out"]}
    with mc_dropout(model, p, **options):
        after = mlp.register_forward_hook(keep)
        last_logits(model, batch)
    before.remove()
    after.remove()
    return seen[0], seen[1]


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    before, after = mlp_outputs(tiny("llama"), 0.25)
    assert set((after / before).flatten().round(decimals=9).tolist()) == {0.0, round(4 / 3, 9)}


@pytest.mark.parametrize("p", [0.02, 0.05, 0.1])
def test_in_sixteen_bits_the_scale_is_not_rounded_before_it_is_used(p):
    before, after = mlp_outputs(tiny("llama", torch.bfloat16), p)
    kept = after != 0
    scale = float(after[kept].abs().sum() / before[kept].abs().sum())
    # Rounded to 8 bits, 1/0.98 is off by 0.003.
    assert scale == pytest.approx(1 / (1 - p), abs=1e-3)


@pytest.mark.trap(19)
def test_outside_the_context_the_forward_pass_is_the_plain_one_bit_for_bit():
    model, rows = tiny("gpt2"), tiny_prompts()
    before, _ = forward_states(model, pad(rows.input_ids), ["resid_post"])
    draw(model, rows, places="native")
    after, _ = forward_states(model, pad(rows.input_ids), ["resid_post"])
    assert torch.equal(before["resid_post"], after["resid_post"])
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1])
def test_a_p_that_drops_nothing_or_everything_is_refused(p):
    with pytest.raises(ValueError, match="0 < p < 1"):
        draw(tiny("llama"), tiny_prompts(), p=p)


@pytest.mark.parametrize(
    ("family", "places"),
    [
        ("gpt2", list(PLACES)),
        ("llama", ["attention"]),
        ("gpt_neox", list(PLACES)),
        ("stablelm", ["mlp_out", "attention"]),
        ("phi3", ["attn_out", "mlp_out", "attention"]),
        ("falcon", ["attn_out", "mlp_out"]),
        ("mpt", ["attn_out", "mlp_out"]),
    ],
)
def test_a_family_says_where_its_own_dropout_is(family, places):
    assert native_sites(tiny(family)) == places


def test_native_dropout_acts_where_the_family_has_its_own():
    model, rows = tiny("llama"), tiny_prompts()
    native = draw(model, rows, places="native")
    assert torch.equal(native, draw(model, rows, places=["attention"]))
    assert not torch.equal(native, draw(model, rows, places=["attn_out"]))
