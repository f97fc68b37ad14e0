"""Rotary frequencies that depend on the longest prompt of a batch give no prompt another state."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import LAYERS, VOCAB, new_model, tiny

from dlk_utils.extract.batches import forward, pad
from dlk_utils.extract.draws import dropout_audit, seeded_draws
from dlk_utils.extract.gradients import full_backprop
from dlk_utils.extract.passes import activations, dropout_draws, margin_gradients
from dlk_utils.extract.positions import depends_on_batch, divide_batches
from dlk_utils.extract.prefixes import run_prefixes
from dlk_utils.extract.states import clean_states, forward_states
from dlk_utils.models.sites import SITES

QUIET = {"progress": False}
ORIGINAL = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
KINDS = {
    "longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    ),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
}


@functools.cache
def model_of(kind: str):
    family, options = KINDS[kind]
    return new_model(family, initializer_range=0.3, **options).double()


def long_beside_short() -> list[list[int]]:
    """Prompts below and above the original context, of a common beginning."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (40,), generator=generator).tolist()
    lengths = (30, 9, 17, 16, 18, 30, 9, 24)
    return [ids[:12][:length] + ids[12 + i : length + i] for i, length in enumerate(lengths)]


def alone(model, ids: list[int]) -> torch.Tensor:
    """States of one prompt, by a new copy of the model that has seen no other."""
    return forward_states(model, pad([ids]), SITES)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_found_whose_positions_depend_on_the_batch(kind):
    assert depends_on_batch(model_of(kind))
    # Without our frequencies, a short prompt has another state beside a long one.
    model, short, long = model_of(kind), list(range(1, 9)), list(range(1, 31))
    with torch.no_grad():
        by_itself = model(**pad([short])).logits[0, -1]
        beside = model(**pad([short, long])).logits[0, -1]
    assert (beside - by_itself).norm() > 1e-2 * by_itself.norm()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "mpt"])
def test_other_models_are_left_alone(family):
    assert not depends_on_batch(tiny(family))
    assert list(divide_batches(tiny(family), [[3, 1]], {3: [1] * 90, 1: [1]}.get)) == [[3, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_each_prompt_has_the_states_that_it_has_alone(kind):
    model, prompts = model_of(kind), long_beside_short()
    got = activations(model, prompts, sites=SITES, **QUIET)
    several = activations(model, prompts, positions=2, **QUIET)["resid_post"]
    for n, ids in enumerate(prompts):
        expected = alone(model_of.__wrapped__(kind), ids)
        for site in SITES:
            np.testing.assert_allclose(got[site][:, n], expected[site][:, 0], rtol=1e-5, atol=1e-6)
        last = expected["resid_post"][:, 0]
        np.testing.assert_allclose(several[:, n, 1], last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_full_backprop_of_each_prompt_alone(kind):
    model, prompts, choices = model_of(kind), long_beside_short(), ([3], [5, 6])
    got = margin_gradients(model, prompts, choices, **QUIET)["resid_post"]
    for n, ids in enumerate(prompts):
        expected = full_backprop(model, pad([ids]), [choices], ["resid_post"])["resid_post"]
        np.testing.assert_allclose(got[:, n], expected[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["sequence", "question", "last_token"])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_those_of_each_prompt_alone(kind, scope):
    model, prompts = model_of(kind), long_beside_short()[:4]
    keys, starts = list("abcd"), [4] * 4
    options = {"n_draws": 2, "seed": 3, "p": 0.1, "scope": scope}
    got = dropout_draws(model, prompts, keys=keys, question_starts=starts, **options, **QUIET)
    for n, ids in enumerate(prompts):
        draws = seeded_draws(
            model, [ids], [keys[n]], ["resid_post"], question_starts=[4], **options
        )
        expected = torch.stack([states["resid_post"][:, 0] for states, _ in draws])
        np.testing.assert_allclose(got["resid_post"][:, :, n], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_whose_positions_mean_different_things_is_refused(kind):
    model, prompts = model_of(kind), [[1] * 9, [1] * 30]
    for compute in (
        lambda: forward(model, pad(prompts)),
        lambda: clean_states(model, prompts, SITES),
        lambda: run_prefixes(model, prompts),
    ):
        with pytest.raises(ValueError, match=r"same rotary frequencies .* lengths of 9 and 30"):
            compute()


def test_the_audit_of_dropout_divides_the_prompts():
    prompts = long_beside_short()[:3]
    table = pd.DataFrame({"row_id": list("abc"), "input_ids": prompts})
    assert len(dropout_audit(model_of("longrope"), table)) == LAYERS


def test_prompts_of_lengths_that_mean_the_same_stay_together():
    lengths = {"a": [1] * 9, "b": [1] * 30, "c": [1] * 16, "d": [1] * 24}
    divide = functools.partial(divide_batches, batches=[list("abcd")], ids_of=lengths.get)
    assert list(divide(model_of("longrope"))) == [["a", "c"], ["b", "d"]]
    assert list(divide(model_of("dynamic"))) == [["a", "c"], ["b"], ["d"]]
