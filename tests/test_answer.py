import pytest
import torch
from conftest import prompts_that_begin_alike, tiny

from dlk_utils.answer import answer_prompts, sequence_logprobs
from dlk_utils.choices import choice_logprobs
from dlk_utils.extract import last_logits, pad, read_rows


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
def test_the_log_probability_of_a_sequence_is_the_sum_over_its_tokens(family):
    model, prompt, sequences = tiny(family), [3, 8, 4, 6], [[5], [7, 9], [7, 2, 11]]
    found = sequence_logprobs(model, prompt, sequences)
    for s, logp in zip(sequences, found, strict=True):
        logits = model(torch.tensor([prompt + s])).logits[0].log_softmax(-1)
        expected = sum(logits[len(prompt) - 1 + k, token] for k, token in enumerate(s))
        assert float(logp) == pytest.approx(float(expected), rel=1e-5)


def test_choices_that_share_a_token_are_told_apart_by_the_rest(tmp_path):
    model, rows = tiny("llama"), prompts_that_begin_alike(4)
    whole = [[[7, 9], [7, 2]] if i == 0 else None for i in range(4)]
    rows = rows.assign(strict_ids=rows.choice_ids, choice_tokens=[[[list(s)] for s in w] if w else None for w in whole])
    answer_prompts(model, rows, tmp_path / "a", record={})
    logp = read_rows(tmp_path / "a", rows, "choice_logprobs")
    expected = [float(x) for x in sequence_logprobs(model, rows.input_ids[0], whole[0])]
    assert list(logp[0]) == pytest.approx(expected, rel=1e-5) and logp[0][0] != logp[0][1]
    plain = choice_logprobs(last_logits(model, pad(rows.input_ids)), list(rows.choice_ids)).numpy()
    assert logp[1:] == pytest.approx(plain[1:], rel=1e-6)
