"""Log-probabilities of choices, at the next token and over all tokens of a choice."""

import pytest
import torch
from tiny_models import tiny

from dlk_utils.extract.answers import choice_logprobs, sequence_logprobs


def test_the_probability_of_a_choice_is_the_sum_over_its_tokens():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)
    logprobs = choice_logprobs(logits, [[[3], [7, 9]], [[1, 2], [4]]])
    expected = [
        [probabilities[0, 3], probabilities[0, [7, 9]].sum()],
        [probabilities[1, [1, 2]].sum(), probabilities[1, 4]],
    ]
    torch.testing.assert_close(logprobs.exp(), torch.tensor(expected))


def test_sixteen_bit_logits_are_normalised_in_single_precision():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    pairs = [[[3], [7, 9]]] * 3
    assert torch.equal(choice_logprobs(logits, pairs), choice_logprobs(logits.float(), pairs))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
@torch.no_grad()
def test_the_log_probability_of_a_sequence_is_the_sum_over_its_tokens(family):
    model, prompt, sequences = tiny(family), [3, 8, 4, 6], [[5], [7, 9], [7, 2, 11]]
    for sequence, logprob in zip(
        sequences, sequence_logprobs(model, prompt, sequences), strict=True
    ):
        logprobs = model(torch.tensor([prompt + sequence])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) - 1 + len(sequence))
        assert float(logprob) == pytest.approx(float(logprobs[places, sequence].sum()), rel=1e-5)
