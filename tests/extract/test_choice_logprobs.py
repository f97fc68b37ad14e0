"""Choice log-probabilities: equal to an independent log-sum-exp, and finite where they are tiny."""

import numpy as np
import pytest
import torch

from dlk_utils.extract.answers import choice_logprobs

CHOICE_IDS = [([3, 7], [5]), ([0], [1, 2, 9]), ([4, 8], [6, 10])]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 11, generator=torch.Generator().manual_seed(0)) * 4


def log_sum_exp(x: np.ndarray) -> float:
    return float(np.log(np.exp(x.astype(float)).sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_probabilities_equal_an_independent_log_sum_exp(logits, dtype):
    logits = logits.to(dtype)
    x = logits.double().numpy()
    expected = [
        [log_sum_exp(x[i][ids]) - log_sum_exp(x[i]) for ids in pair]
        for i, pair in enumerate(CHOICE_IDS)
    ]
    logprobs = choice_logprobs(logits, CHOICE_IDS)
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(logprobs.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_swapping_the_two_choices_flips_the_margin(logits):
    margin = choice_logprobs(logits, CHOICE_IDS).diff(dim=1)
    swapped = choice_logprobs(logits, [(b, a) for a, b in CHOICE_IDS]).diff(dim=1)
    assert torch.equal(swapped, -margin)
    assert margin.abs().min() > 0


def test_the_mass_lies_between_0_and_1_and_is_1_if_the_choices_cover_the_vocabulary(logits):
    mass = choice_logprobs(logits, CHOICE_IDS).exp().sum(1)
    assert ((mass > 0) & (mass < 1)).all()
    full_mass = choice_logprobs(logits, [(range(4), range(4, 11))] * 3).exp().sum(1)
    torch.testing.assert_close(full_mass, torch.ones(3))


@pytest.mark.trap(14)
def test_a_mass_too_small_for_an_epsilon_keeps_its_margin():
    logits = torch.tensor([[50.0, -40.0, -43.0]])
    logprobs = choice_logprobs(logits, [([2], [1])])
    assert torch.isfinite(logprobs).all()
    torch.testing.assert_close(logprobs[0, 1] - logprobs[0, 0], torch.tensor(3.0))
