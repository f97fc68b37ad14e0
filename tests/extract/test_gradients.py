from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, LAYERS, close, tiny, tiny_prompts

from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import last_logits, last_positions, pad
from dlk_utils.extract.gradients import (
    counterfactual_states,
    full_backprop,
    pooled_weight_gradients,
    states_and_gradients,
)
from dlk_utils.extract.states import forward_states
from dlk_utils.models.sites import SITES, at_sites, layer_numbers


@pytest.mark.trap(25)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_counterfactual_pass_moves_every_margin_towards_the_other_answer_and_no_weight(family):
    model, rows = tiny(family), tiny_prompts()
    batch, choices = pad(rows.input_ids), list(rows.choice_ids)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    clean, logits = forward_states(model, batch, SITES)
    states, logp = counterfactual_states(model, batch, choices, SITES, layer=1, step=0.01)
    before, after = (x[:, 1] - x[:, 0] for x in (choice_logprobs(logits, choices), logp))
    assert ((after - before) * before.sign() < 0).all()
    for site in SITES:
        unmoved = 2 if site != "resid_post" else 1
        torch.testing.assert_close(
            states[site][:, :unmoved], clean[site][:, :unmoved], **close(model)
        )
        assert ((states[site][:, 2] - clean[site][:, 2]).abs().amax(-1) > 0).all()
    length = (states["resid_post"][:, 1] - clean["resid_post"][:, 1]).norm(dim=-1) / clean[
        "resid_post"
    ][:, 1].norm(dim=-1)
    torch.testing.assert_close(length, torch.full_like(length, 0.01), rtol=1e-3, atol=0)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()) and all(
        p.grad is None for p in model.parameters()
    )


def test_a_counterfactual_pass_is_the_plain_pass_with_the_state_moved():
    model, rows = tiny("llama"), tiny_prompts()
    batch, choices = pad(rows.input_ids), list(rows.choice_ids)
    states, grads, logp = states_and_gradients(model, batch, choices, ["resid_post"])
    g, sign = grads["resid_post"][:, 1], -torch.sign(logp[:, 1] - logp[:, 0])[:, None]
    moved = states["resid_post"][:, 1] + sign * 0.3 * states["resid_post"][:, 1].norm(
        dim=-1, keepdim=True
    ) * g / g.norm(dim=-1, keepdim=True)

    def put(site, layer, hidden):
        return torch.cat([hidden[:, :-1], moved[:, None]], 1)

    with at_sites(model, ["resid_post"], put, 1):
        expected = choice_logprobs(last_logits(model, batch), choices)
    torch.testing.assert_close(
        counterfactual_states(model, batch, choices, SITES, layer=1, step=0.3)[1],
        expected,
        **close(model),
    )


def test_the_index_of_the_last_token_serves_layers_on_any_device(monkeypatch):
    """An index of the CPU does; here the index of the batch's device is one that serves nowhere."""
    model, rows = tiny("llama"), tiny_prompts()
    batch, choices = pad(rows.input_ids), list(rows.choice_ids)
    plain = full_backprop(model, batch, choices, ["mlp_out"])["mlp_out"]
    monkeypatch.setattr(
        "dlk_utils.extract.gradients.last_positions",
        lambda batch: SimpleNamespace(cpu=lambda: last_positions(batch)),
    )
    assert torch.equal(full_backprop(model, batch, choices, ["mlp_out"])["mlp_out"], plain)
    pooled_weight_gradients(model, batch, choices, ["model.layers.0.mlp.down_proj"])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.2.self_attn.o_proj",
    ],
)
def test_pooled_weight_gradients_are_those_of_each_row_s_own_backprop(name):
    model, rows = tiny("llama"), tiny_prompts()
    over_inputs, over_outputs = pooled_weight_gradients(
        model, pad(rows.input_ids), list(rows.choice_ids), [name]
    )[name]
    weight = model.get_submodule(name).weight
    for i, row in enumerate(rows.itertuples()):
        logp = choice_logprobs(model(**pad([row.input_ids])).logits[:, -1], [row.choice_ids])
        (full,) = torch.autograd.grad((logp[:, 1] - logp[:, 0]).sum(), [weight])
        torch.testing.assert_close(over_inputs[i], full.mean(1), **close(model))
        torch.testing.assert_close(over_outputs[i], full.mean(0), **close(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_last_few_positions_are_those_of_each_prompt_alone(family):
    model, rows = tiny(family), tiny_prompts()
    rows = rows[rows.input_ids.map(len) >= 3]
    for side in ("left", "right"):
        states = forward_states(
            model, pad(rows.input_ids, side=side), ["resid_post", "mlp_out"], positions=3
        )[0]
        assert states["resid_post"].shape == (len(rows), LAYERS, 3, model.config.hidden_size)
        for i, ids in enumerate(rows.input_ids):
            for back in range(3):
                with torch.no_grad():
                    hidden = model(**pad([ids]), output_hidden_states=True).hidden_states
                torch.testing.assert_close(
                    states["resid_post"][i, 0, 2 - back],
                    hidden[1][0, len(ids) - 1 - back],
                    **close(model),
                )
    with pytest.raises(
        ValueError, match=r"positions: expected between 1 and .* 3, got 4|positions: expected"
    ):
        forward_states(model, pad(rows.input_ids), SITES, positions=99)


def test_layers_are_chosen_by_index_list_slice_or_all():
    assert (
        layer_numbers("all", 4) == [0, 1, 2, 3]
        and layer_numbers("::2", 4) == [0, 2]
        and layer_numbers("1,3", 4) == [1, 3]
    )
    assert (
        layer_numbers(-1, 4) == [3]
        and layer_numbers([0, 2], 4) == [0, 2]
        and layer_numbers("1:", 4) == [1, 2, 3]
    )
    for wrong in ("first", 4, [0, 9], "0;1"):
        with pytest.raises(ValueError, match="layers: expected"):
            layer_numbers(wrong, 4)
    model, rows = tiny("gpt2"), tiny_prompts()
    every, some = (
        states_and_gradients(model, pad(rows.input_ids), list(rows.choice_ids), SITES, which)
        for which in ("all", [0, 2])
    )
    for site in SITES:
        torch.testing.assert_close(some[1][site], every[1][site][:, [0, 2]], **close(model))
