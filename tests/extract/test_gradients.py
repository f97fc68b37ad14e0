"""Gradients of the margin: against full backprop, finite differences and each row alone."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    FAMILIES,
    LAYERS,
    PRECISE,
    close,
    close_in_single,
    prompts_that_begin_alike,
    tiny,
    tiny_prompts,
)

from dlk_utils.errors import ChoiceError
from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import last_logits, last_positions, pad
from dlk_utils.extract.gradients import (
    counterfactual_states,
    first_tokens,
    full_backprop,
    last_token_gradients,
    pooled_weight_gradients,
    states_after_choices,
    states_and_gradients,
)
from dlk_utils.extract.prefixes import run_prefixes
from dlk_utils.extract.states import forward_states
from dlk_utils.models.sites import SITES, at_sites


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Each vector lies near the expected one, relative to its length."""
    distance = (found - expected).norm(dim=-1)
    assert (distance <= PRECISE[dtype] * expected.norm(dim=-1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_from_the_cached_prefix_equal_full_backprop(family):
    model, rows = tiny(family), tiny_prompts()
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    states, gradients, logits = states_and_gradients(model, prompts, choices, SITES)
    full = full_backprop(model, pad(prompts), choices, SITES)
    clean_states, clean_logits = forward_states(model, pad(prompts), SITES)
    torch.testing.assert_close(logits, clean_logits, **close(model))
    for site in SITES:
        assert gradients[site].shape == full[site].shape == states[site].shape
        assert gradients[site].shape[:2] == (LAYERS, len(rows))
        assert (gradients[site].abs().amax(-1) > 0).all()
        assert_near(gradients[site], full[site], model.dtype)
        torch.testing.assert_close(states[site], clean_states[site], **close(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_gradients_in_single_precision_are_those_of_double_precision(family):
    rows = tiny_prompts()
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    single, double = (
        states_and_gradients(tiny(family, dtype), prompts, choices, SITES)[1]
        for dtype in (torch.float32, torch.float64)
    )
    for site in SITES:
        assert_near(single[site], double[site], torch.float32)


@pytest.mark.slow
@pytest.mark.trap(22, 24)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
@pytest.mark.parametrize("site", SITES)
def test_gradients_equal_finite_differences_of_the_margin(family, site):
    # A llama's RMS norm computes in single precision whatever the model's: a larger step, and a
    # wider tolerance.
    step, rel, noise = (1e-3, 1e-3, 6e-5) if family == "llama" else (1e-5, 1e-6, 1e-8)
    model, rows = tiny(family), tiny_prompts(1)
    batch, choices = pad(rows.input_ids), list(rows.choice_ids)
    gradients = states_and_gradients(model, list(rows.input_ids), choices, [site])[1][site]

    def margin(layer: int, channel: int, by: float) -> float:
        def push(_, at: int, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.clone()
            hidden[:, -1, channel] += by
            return hidden

        with at_sites(model, [site], push, layer):
            logprobs = choice_logprobs(last_logits(model, batch), choices)
        return float(logprobs[0, 1] - logprobs[0, 0])

    for layer in range(LAYERS):
        for channel in (0, 17, 35):
            slope = (margin(layer, channel, step) - margin(layer, channel, -step)) / (2 * step)
            assert slope == pytest.approx(float(gradients[layer, 0, channel]), rel=rel, abs=noise)


@pytest.mark.trap(23)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
def test_a_row_s_gradient_does_not_depend_on_what_else_is_in_the_batch(family):
    model, rows = tiny(family), tiny_prompts()
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    together = states_and_gradients(model, prompts, choices, SITES)[1]
    for i, ids in enumerate(prompts):
        alone = states_and_gradients(model, [ids], choices[i : i + 1], SITES)[1]
        for site in SITES:
            torch.testing.assert_close(together[site][:, i], alone[site][:, 0], **close(model))


def test_gradients_at_some_layers_are_those_of_all_layers():
    model, rows = tiny("gpt2"), tiny_prompts()
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    every = states_and_gradients(model, prompts, choices, SITES)[1]
    some = states_and_gradients(model, prompts, choices, SITES, [0, 2])[1]
    for site in SITES:
        torch.testing.assert_close(some[site], every[site][[0, 2]], **close(model))


@pytest.mark.trap(25)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_counterfactual_pass_moves_every_margin_towards_the_other_answer_and_no_weight(family):
    model, rows = tiny(family), tiny_prompts()
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    clean, logits = forward_states(model, pad(prompts), SITES)
    moved, logprobs = counterfactual_states(model, prompts, choices, SITES, layer=1, step=0.01)
    before, after = torch.diff(choice_logprobs(logits, choices)), torch.diff(logprobs)
    assert ((after - before) * before.sign() < 0).all()
    for site in SITES:
        n_before_the_move = 1 if site == "resid_post" else 2
        torch.testing.assert_close(
            moved[site][:n_before_the_move], clean[site][:n_before_the_move], **close(model)
        )
        assert ((moved[site][2] - clean[site][2]).abs().amax(-1) > 0).all()
    move = (moved["resid_post"][1] - clean["resid_post"][1]).norm(dim=-1)
    length = move / clean["resid_post"][1].norm(dim=-1)
    torch.testing.assert_close(length, torch.full_like(length, 0.01), rtol=1e-3, atol=0)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_counterfactual_pass_is_the_plain_pass_with_the_state_moved():
    model, rows = tiny("llama"), tiny_prompts()
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    states, gradients, logits = states_and_gradients(model, prompts, choices, ["resid_post"])
    margins = torch.diff(choice_logprobs(logits, choices))
    state, gradient = states["resid_post"][1], gradients["resid_post"][1]
    direction = gradient / gradient.norm(dim=-1, keepdim=True)
    length = 0.3 * state.norm(dim=-1, keepdim=True)
    moved = state - margins.sign() * length * direction

    def put(site: str, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden[:, :-1], moved[:, None]], 1)

    with at_sites(model, ["resid_post"], put, 1):
        expected = choice_logprobs(last_logits(model, pad(prompts)), choices)
    _, found = counterfactual_states(model, prompts, choices, SITES, layer=1, step=0.3)
    torch.testing.assert_close(found, expected, **close(model))


def test_the_index_of_the_last_token_serves_layers_on_any_device(monkeypatch):
    """An index on the CPU does. Here the one on the batch's device would fail."""
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
    batch, choices = pad(rows.input_ids), list(rows.choice_ids)
    over_inputs, over_outputs = pooled_weight_gradients(model, batch, choices, [name])[name]
    weight = model.get_submodule(name).weight
    for i, ids in enumerate(rows.input_ids):
        logprobs = choice_logprobs(model(**pad([ids])).logits[:, -1], choices[i : i + 1])
        [gradient] = torch.autograd.grad(torch.diff(logprobs).sum(), [weight])
        torch.testing.assert_close(over_inputs[i], gradient.mean(1), **close(model))
        torch.testing.assert_close(over_outputs[i], gradient.mean(0), **close(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make_prompts", [tiny_prompts, prompts_that_begin_alike])
def test_a_state_after_a_choice_is_that_of_the_prompt_with_the_choice_behind_it(
    family, make_prompts
):
    model, rows = tiny(family), make_prompts()
    prefixes = run_prefixes(model, list(rows.input_ids))
    last_tokens = prefixes.append()
    last_token_gradients(model, last_tokens, list(rows.choice_ids), ["resid_post"])
    tokens = first_tokens(rows.strict_ids)
    complete = prefixes.extended(last_tokens)
    pair = states_after_choices(model, complete, tokens, ["resid_post"])
    for choice, after_choice in enumerate(pair):
        longer = [[*ids, pair[choice]] for ids, pair in zip(rows.input_ids, tokens, strict=True)]
        expected, _ = forward_states(model, pad(longer), ["resid_post"])
        torch.testing.assert_close(
            after_choice["resid_post"], expected["resid_post"], **close_in_single(model)
        )


def test_choices_that_begin_with_the_same_token_have_no_contrast_pair():
    with pytest.raises(
        ChoiceError, match=r"differ in their first token, got the same one \(such as 1\) in 2 of 3"
    ):
        first_tokens([[[1, 2], [1, 3]], [[4], [5]], [[1], [1, 5]]])
