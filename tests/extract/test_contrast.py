"""Contrast pairs, and the stores of counterfactual passes and weight gradients, on tiny models."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LAYERS, close, prompts_that_begin_alike, tiny, tiny_prompts

from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import forward, pad
from dlk_utils.extract.gradients import counterfactual_states
from dlk_utils.extract.stages import (
    store_counterfactual,
    store_gradients,
    store_weight_gradients,
)
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import read_rows
from dlk_utils.models.sites import blocks


def with_choices(rows):
    return rows.assign(strict_ids=[[[1], [3]] if i % 2 else [[4], [5]] for i in range(len(rows))])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [tiny_prompts, prompts_that_begin_alike])
def test_a_contrast_pair_is_the_state_of_the_prompt_with_the_choice_behind_it(
    family, make, tmp_path
):
    model, rows = tiny(family), with_choices(make())
    store_gradients(model, rows, tmp_path / "with", record={}, contrast=True, batch_tokens=64)
    store_gradients(model, rows, tmp_path / "without", record={}, batch_tokens=64)
    for k in (0, 1):
        for i, row in enumerate(rows.itertuples()):
            alone, _ = forward_states(
                model, pad([[*row.input_ids, row.strict_ids[k][0]]]), ["resid_post"]
            )
            for layer in range(LAYERS):
                found = read_rows(tmp_path / "with", rows, f"said.resid_post.{layer}.{k}")[i]
                expected = alone["resid_post"][0, layer]
                torch.testing.assert_close(
                    torch.tensor(found, dtype=expected.dtype),
                    expected,
                    **(
                        close(model) if model.dtype == torch.float32 else dict(rtol=1e-5, atol=1e-6)
                    ),
                )
    for name in (
        "activation.head_out.1.0",
        "gradient.mlp_out.2.0",
        "choice_logprobs",
    ):  # what else is stored is the same
        np.testing.assert_array_equal(
            read_rows(tmp_path / "with", rows, name), read_rows(tmp_path / "without", rows, name)
        )


def test_choices_that_begin_alike_have_no_contrast_pair(tmp_path):
    rows = with_choices(tiny_prompts()).assign(strict_ids=[[[1, 2], [1, 3]]] * 7)
    with pytest.raises(ValueError, match="differ in their first token"):
        store_gradients(tiny("llama"), rows, tmp_path / "store", record={}, contrast=True)


def test_the_second_pass_of_a_counterfactual_pair_is_stored_as_it_is_computed(tmp_path):
    model, rows = tiny("llama"), tiny_prompts()
    store_counterfactual(model, rows, tmp_path / "store", record={}, at=1, step=0.2)
    states, logp = counterfactual_states(
        model, pad(rows.input_ids), list(rows.choice_ids), ["resid_post"], layer=1, step=0.2
    )
    np.testing.assert_allclose(
        read_rows(tmp_path / "store", rows, "choice_logprobs.1"), logp.numpy(), rtol=1e-5
    )
    for layer in range(LAYERS):
        np.testing.assert_allclose(
            read_rows(tmp_path / "store", rows, f"activation.resid_post.{layer}.1"),
            states["resid_post"][:, layer].numpy(),
            rtol=1e-4,
            atol=1e-6,
        )


LAST = {
    "gpt2": "mlp.c_proj",
    "gpt_bigcode": "mlp.c_proj",
    "starcoder2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
    "phi": "mlp.fc2",
    "opt": "fc2",
    "mpt": "ffn.down_proj",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_weight_gradients_are_those_of_the_last_linear_layer_of_the_mlp(family, tmp_path):
    model, rows = tiny(family), tiny_prompts(3)
    store_weight_gradients(model, rows, tmp_path / "store", record={}, layers=[0, 2])
    found = read_rows(tmp_path / "store", rows, "weight_gradient.mlp_out.2.0")
    weight = (
        blocks(model)[2].get_submodule(LAST.get(model.config.model_type, "mlp.down_proj")).weight
    )
    for i, row in enumerate(rows.itertuples()):
        with torch.enable_grad():
            logp = choice_logprobs(
                forward(model, pad([row.input_ids]), use_cache=False).logits[:, -1],
                [row.choice_ids],
            )
            (full,) = torch.autograd.grad((logp[:, 1] - logp[:, 0]).sum(), [weight])
        full = full.mT if family == "gpt2" else full  # its layers hold [in, out]
        np.testing.assert_allclose(
            found[i],
            torch.cat([full.mean(1), full.mean(0)]).numpy(),
            rtol=1e-4,
            atol=1e-6 * float(full.abs().max()),
        )
