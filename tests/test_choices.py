"""Choices: two words that a next token can tell apart, and the log-probability that each gets."""

import numpy as np
import pytest
import torch

from dlk_utils.choices import ChoiceError, choice_ids, choice_logprobs
from dlk_utils.models import load_tokenizer, resolve
from dlk_utils.library import library

torch.set_num_threads(1)
IDS = [([3, 7], [5]), ([0], [1, 2, 9]), ([4, 8], [6, 10])]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("smollm2"))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 11, generator=torch.Generator().manual_seed(0)) * 4


def lse(x: np.ndarray) -> float:
    return float(np.log(np.exp(x.astype(float)).sum()))


@pytest.mark.trap(1)
def test_choices_that_begin_with_the_same_token_are_refused_by_place_and_token(tokenizer):
    with pytest.raises(ChoiceError) as e:
        choice_ids(tokenizer, ["They didn't like it!", "They loved it"], where="imdb, template thoughts")
    assert "imdb, template thoughts" in str(e.value)
    assert "'They'" in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("choices", [["yes", "yes"], ["yes", "Yes"], ["", "no"], ["yes", "no", "maybe"]])
def test_choices_that_are_equal_empty_or_not_two_are_refused(tokenizer, choices):
    with pytest.raises(ChoiceError, match="here"):
        choice_ids(tokenizer, choices, where="here")


@pytest.mark.parametrize("word", ["yes", "Positive", "false", "A"])
def test_the_word_counts_with_and_without_a_space_before_it(tokenizer, word):
    ids, _ = choice_ids(tokenizer, [word, "zebra"])
    first = {tokenizer(w, add_special_tokens=False).input_ids[0] for w in (word, " " + word)}
    assert len(first) == 2
    assert first <= set(ids)


def test_a_rarer_spelling_counts_only_if_it_is_one_token(tokenizer):
    ids, _ = choice_ids(tokenizer, ["negative", "positive"])
    spelt = [tokenizer.decode([i]).strip() for i in ids]
    assert set(spelt) <= {"negative", "Negative"}, spelt


@pytest.mark.trap(13)
@pytest.mark.parametrize("kind", ["review", "claim", "question"])
def test_every_template_of_the_library_has_disjoint_choices(tokenizer, kind):
    for template in library(kind).itertuples():
        words = [c.replace("{{ choice_0 }}", "Rome").replace("{{ choice_1 }}", "Paris") for c in template.choices]
        zero, one = choice_ids(tokenizer, words, where=template.name)
        assert zero and one and not set(zero) & set(one), template.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_probabilities_equal_an_independent_log_sum_exp(logits, dtype):
    logits = logits.to(dtype)
    x = logits.double().numpy()
    expected = [[lse(x[i][sets[k]]) - lse(x[i]) for k in (0, 1)] for i, sets in enumerate(IDS)]
    found = choice_logprobs(logits, IDS)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_swapping_the_two_sets_flips_the_margin(logits):
    margin = choice_logprobs(logits, IDS).diff(dim=1)
    swapped = choice_logprobs(logits, [(b, a) for a, b in IDS]).diff(dim=1)
    assert torch.equal(swapped, -margin)
    assert margin.abs().min() > 0


def test_the_mass_lies_between_0_and_1_and_is_1_if_the_sets_cover_the_vocabulary(logits):
    mass = choice_logprobs(logits, IDS).exp().sum(1)
    assert ((mass > 0) & (mass < 1)).all()
    whole = choice_logprobs(logits, [(range(4), range(4, 11))] * 3).exp().sum(1)
    torch.testing.assert_close(whole, torch.ones(3))


@pytest.mark.trap(14)
def test_a_mass_too_small_for_an_epsilon_keeps_its_margin():
    logits = torch.tensor([[50.0, -40.0, -43.0]])
    logp = choice_logprobs(logits, [([2], [1])])
    assert torch.isfinite(logp).all()
    torch.testing.assert_close(logp[0, 1] - logp[0, 0], torch.tensor(3.0))
