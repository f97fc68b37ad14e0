"""States at the last tokens: those of each prompt alone, and those that transformers returns."""

import pytest
import torch
from tiny_models import FAMILIES, LAYERS, close, tiny, tiny_prompts

from dlk_utils.extract.batches import pad
from dlk_utils.extract.states import forward_states
from dlk_utils.models.sites import SITES


@pytest.mark.trap(16)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_padded_on_either_side_gives_what_each_prompt_gives_alone(family):
    model, rows = tiny(family), tiny_prompts()
    alone = [forward_states(model, pad([ids]), SITES) for ids in rows.input_ids]
    for side in ("left", "right"):
        batch = pad(rows.input_ids, side=side, token=50)
        states, logits = forward_states(model, batch, SITES)
        expected = torch.cat([logits_alone for _, logits_alone in alone])
        torch.testing.assert_close(logits, expected, **close(model))
        for site in SITES:
            expected = torch.cat([states_alone[site] for states_alone, _ in alone], 1)
            torch.testing.assert_close(states[site], expected, **close(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_few_positions_are_the_hidden_states_of_each_prompt(family, side):
    model, rows = tiny(family), tiny_prompts()
    prompts = [ids for ids in rows.input_ids if len(ids) >= 3]
    sites = ["resid_post", "mlp_out"]
    states, _ = forward_states(model, pad(prompts, side=side), sites, positions=3)
    assert states["resid_post"].shape == (LAYERS, len(prompts), 3, model.config.hidden_size)
    for i, ids in enumerate(prompts):
        with torch.no_grad():
            hidden = model(**pad([ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(
            states["resid_post"][0, i], hidden[1][0, len(ids) - 3 :], **close(model)
        )


def test_more_positions_than_the_shortest_prompt_has_are_refused():
    with pytest.raises(ValueError, match=r"positions: expected between 1 and .* 2, got 3"):
        forward_states(tiny("llama"), pad([[5, 6], [7, 8, 9]]), SITES, positions=3)
