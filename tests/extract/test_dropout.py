import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny, tiny_prompts

from dlk_utils.errors import DeadDropout
from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.draws import dropout_audit
from dlk_utils.extract.dropout import draw_seed, keep_mask, mc_dropout
from dlk_utils.extract.states import forward_states


def draw(model, rows, k=0, side="left", p=0.2):
    batch = pad(rows.input_ids, side=side)
    with mc_dropout(
        model, p, seeds=[draw_seed(r, k) for r in rows.row_id], positions=batch["position_ids"]
    ):
        return forward_states(model, batch, ["resid_post"])[0]["resid_post"]


@pytest.mark.trap(21)
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_differ_on_every_row_and_layer_and_repeat_bit_for_bit(family):
    model, rows = tiny(family), tiny_prompts()
    first, again, other = draw(model, rows), draw(model, rows), draw(model, rows, 1)
    assert torch.equal(first, again)
    assert ((first - other).abs().amax(-1) > 0).all()


@pytest.mark.trap(21)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_draw_does_not_depend_on_batch_size_order_or_padding(family, side):
    model, rows = tiny(family), tiny_prompts()
    whole = draw(model, rows)
    turned = draw(model, rows[::-1], side=side).flip(0)
    alone = torch.cat([draw(model, rows.iloc[[i]], side=side) for i in range(len(rows))])
    torch.testing.assert_close(turned, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone, whole, rtol=1e-9, atol=1e-12)


def test_masks_are_the_same_bits_for_either_padding_side_and_any_batch():
    rows, seeds = tiny_prompts(), torch.arange(7, dtype=torch.int32) * 977
    left, right = (pad(rows.input_ids, side=s) for s in ("left", "right"))
    a, b = (
        keep_mask(seeds[:, None], left["position_ids"], 36, 0.1),
        keep_mask(seeds[:, None], right["position_ids"], 36, 0.1),
    )
    for i, n in enumerate(rows.input_ids.map(len)):
        alone = keep_mask(seeds[i : i + 1, None], torch.arange(n)[None], 36, 0.1)[0]
        assert torch.equal(a[i, -n:], b[i, :n]) and torch.equal(alone, b[i, :n])


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_the_share_that_is_kept_is_one_minus_p_and_masks_of_rows_tokens_and_channels_are_unrelated(
    p,
):
    keep = keep_mask(
        torch.arange(40, dtype=torch.int32)[:, None], torch.arange(50).expand(40, 50), 100, p
    ).double()
    assert abs(float(keep.mean()) - (1 - p)) < 4 * np.sqrt(p * (1 - p) / keep.numel())
    centred = (keep - keep.mean()) / keep.std()
    for a, b in [
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
    ]:
        assert abs(float((a * b).mean())) < 5 / np.sqrt(a.numel())


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    model, rows = tiny("llama"), tiny_prompts(1)
    batch, seen = pad(rows.input_ids), []
    handle = model.model.layers[0].mlp.register_forward_hook(
        lambda m, a, out: seen.append(out.detach())
    )
    with mc_dropout(model, 0.25, seeds=[5], positions=batch["position_ids"], sites=["mlp_out"]):
        after = model.model.layers[0].mlp.register_forward_hook(
            lambda m, a, out: seen.append(out.detach())
        )
        last_logits(model, batch)
    handle.remove(), after.remove()
    ratio = (seen[1] / seen[0]).flatten()
    assert set(ratio.round(decimals=9).tolist()) == {0.0, round(4 / 3, 9)}


@pytest.mark.parametrize("p", [0.02, 0.05, 0.1])
def test_in_sixteen_bits_the_scale_is_not_rounded_before_it_is_used(p):
    model, rows = tiny("llama", torch.bfloat16), tiny_prompts(1)
    batch, seen = pad(rows.input_ids), []
    keep = lambda m, a, out: seen.append(out.detach().double())
    handle = model.model.layers[0].mlp.register_forward_hook(keep)
    with mc_dropout(model, p, seeds=[5], positions=batch["position_ids"], sites=["mlp_out"]):
        after = model.model.layers[0].mlp.register_forward_hook(keep)
        last_logits(model, batch)
    handle.remove(), after.remove()
    kept = seen[1] != 0
    assert float(seen[1][kept].abs().sum() / seen[0][kept].abs().sum()) == pytest.approx(
        1 / (1 - p), abs=1e-3
    )  # rounded to 8 bits, 1/0.98 is off by 0.003


@pytest.mark.trap(19)
def test_outside_the_context_the_forward_pass_is_the_plain_one_bit_for_bit():
    model, rows = tiny("gpt2"), tiny_prompts()
    before = forward_states(model, pad(rows.input_ids), ["resid_post"])[0]["resid_post"]
    draw(model, rows)
    assert torch.equal(
        forward_states(model, pad(rows.input_ids), ["resid_post"])[0]["resid_post"], before
    )


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1])
def test_a_p_that_drops_nothing_or_everything_is_refused(p):
    with pytest.raises(ValueError, match="0 < p < 1"):
        draw(tiny("llama"), tiny_prompts(), p=p)


@pytest.mark.trap(18)
def test_a_model_in_which_nothing_moves_is_refused():
    model = tiny("llama", torch.float32)
    weights = [
        m.weight
        for layer in model.model.layers
        for m in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    kept = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            [w.zero_() for w in weights]
        with pytest.raises(DeadDropout, match="7 of 7 rows"):
            dropout_audit(model, tiny_prompts())
    finally:
        with torch.no_grad():
            [w.copy_(k) for w, k in zip(weights, kept, strict=True)]
    assert (dropout_audit(model, tiny_prompts()).least > 0).all()
