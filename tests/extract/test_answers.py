"""Log-probabilities of several tokens (those of the next token: test_choice_logprobs.py)."""

import pytest
import torch
from tiny_models import tiny

from dlk_utils.extract.answers import sequence_logprobs


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
