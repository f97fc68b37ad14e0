"""Choices: two words that a next token can tell apart, and the log-probability that each gets."""

import string

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlk_utils.errors import ChoiceError
from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.models.loading import load_tokenizer, resolve
from dlk_utils.questions.choices import choice_token_ids
from dlk_utils.questions.ids import example_id
from dlk_utils.questions.prompts import make_prompts
from dlk_utils.questions.templates import KINDS, prompt_library, read_templates

torch.set_num_threads(1)
IDS = [([3, 7], [5]), ([0], [1, 2, 9]), ([4, 8], [6, 10])]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("smollm2"))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 11, generator=torch.Generator().manual_seed(0)) * 4


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer in the manner of SentencePiece: a text begins with a space of its own, so that "yes" by itself is " yes", and on a new line it is not."""
    pieces = [("n", "o"), ("\u2581", "no"), ("y", "e"), ("ye", "s"), ("\u2581", "yes")]
    symbols = ["<unk>", "\u2581", *string.printable, *("".join(p) for p in pieces)]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(symbols)}, pieces, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    made.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]{{ '\\n' }}"
    return made


def lse(x: np.ndarray) -> float:
    return float(np.log(np.exp(x.astype(float)).sum()))


@pytest.mark.trap(1)
def test_choices_that_begin_with_the_same_token_are_refused_by_place_and_token(tokenizer):
    with pytest.raises(ChoiceError) as e:
        choice_token_ids(
            tokenizer, ["They didn't like it!", "They loved it"], where="imdb, template thoughts"
        )
    assert "imdb, template thoughts" in str(e.value)
    assert "'They'" in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    "choices", [["yes", "yes"], ["yes", "Yes"], ["", "no"], ["yes", "no", "maybe"]]
)
def test_choices_that_are_equal_empty_or_not_two_are_refused(tokenizer, choices):
    with pytest.raises(ChoiceError, match="here"):
        choice_token_ids(tokenizer, choices, where="here")


@pytest.mark.parametrize("word", ["yes", "Positive", "false", "A"])
def test_the_word_counts_with_and_without_a_space_before_it(tokenizer, word):
    ids, _ = choice_token_ids(tokenizer, [word, "zebra"])
    first = {tokenizer(w, add_special_tokens=False).input_ids[0] for w in (word, " " + word)}
    assert len(first) == 2
    assert first <= set(ids)


def test_a_rarer_spelling_counts_only_if_it_is_one_token(tokenizer):
    ids, _ = choice_token_ids(tokenizer, ["negative", "positive"])
    spelt = [tokenizer.decode([i]).strip() for i in ids]
    assert set(spelt) <= {"negative", "Negative"}, spelt


def test_the_word_on_a_new_line_counts_where_it_is_a_token_of_its_own(spaced):
    bare, after_space = spaced.convert_tokens_to_ids(["yes", "\u2581yes"])
    assert spaced("yes").input_ids == [after_space] and spaced("\nyes").input_ids[-1] == bare
    assert set(choice_token_ids(spaced, ["no", "yes"])[1]) == {bare, after_space}


def test_the_token_that_a_template_without_a_prefix_writes_is_among_those_of_its_choice(
    spaced, tmp_path, monkeypatch
):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "dataset: mine\ntemplates:\n  1: !Template\n    name: bare\n    answer_choices: no ||| yes\n    jinja: '{{ text }} Is it? ||| {{ answer_choices[label] }}'\n"
    )
    mine = read_templates(path)
    monkeypatch.setattr(
        "dlk_utils.questions.prompts.library",
        lambda name: prompt_library(name) if name.endswith("instructions") else mine,
    )
    example = dict(
        example_id=example_id("a"),
        dataset="own",
        kind="claim",
        text="A cat barks.",
        choice_0="",
        choice_1="",
        label=0,
        split="test",
    )
    for row in make_prompts(pd.DataFrame([example]), spaced).itertuples():
        assert row.prefix == "" and row.prompt.endswith("[assistant]\n")
        assert spaced.convert_ids_to_tokens([ids for [ids] in row.strict_ids]) == ["no", "yes"]
        assert all(
            set(written) < set(ids)
            for written, ids in zip(row.strict_ids, row.choice_ids, strict=True)
        )
    other = {
        "no": spaced.convert_tokens_to_ids(["a"]),
        "yes": spaced.convert_tokens_to_ids(["b"]),
    }  # no spelling of either, and yet written
    monkeypatch.setattr(
        "dlk_utils.questions.chat.written_tokens", lambda tokenizer, prompt, choice: other[choice]
    )
    for row in make_prompts(pd.DataFrame([example]), spaced).itertuples():
        assert row.strict_ids == list(other.values())
        assert all(
            set(written) < set(ids)
            for written, ids in zip(row.strict_ids, row.choice_ids, strict=True)
        )


def test_the_token_that_is_written_counts_and_is_refused_where_the_other_choice_has_it(tokenizer):
    blank, one, other = (
        tokenizer(t, add_special_tokens=False).input_ids for t in ("\n", "zebra", "lion")
    )
    plain, found = (
        choice_token_ids(tokenizer, ["no", "yes"]),
        choice_token_ids(tokenizer, ["no", "yes"], [one, blank + other]),
    )
    assert found == tuple(sorted({*p, *w[:1]}) for p, w in zip(plain, (one, other), strict=True))
    with pytest.raises(ChoiceError, match="here: expected two choices that differ"):
        choice_token_ids(tokenizer, ["no", "yes"], [one, blank + one], where="here")
    with pytest.raises(ChoiceError, match="differ"):
        choice_token_ids(tokenizer, ["no", "yes"], [plain[1][:1], other])


@pytest.mark.trap(13)
@pytest.mark.parametrize("kind", KINDS)
def test_every_template_of_the_library_has_disjoint_choices(tokenizer, kind):
    for template in prompt_library(kind).itertuples():
        words = [
            c.replace("{{ choice_0 }}", "Rome").replace("{{ choice_1 }}", "Paris")
            for c in template.choices
        ]
        zero, one = choice_token_ids(tokenizer, words, where=template.name)
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


def test_a_letter_counts_in_its_own_case_only_for_a_is_a_word(tokenizer):
    a, b = ({tokenizer.decode([i]) for i in ids} for ids in choice_token_ids(tokenizer, ["A", "B"]))
    assert a == {"A", " A"} and b == {"B", " B"}
    assert (
        len(tokenizer(" a", add_special_tokens=False).input_ids) == 1
    )  # it would have been let in
