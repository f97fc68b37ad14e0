"""Choices: two words that a next token can tell apart, and the tokens that count as each."""

import inspect
import string

import pandas as pd
import pytest
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlk_utils.errors import ChoiceError
from dlk_utils.models.loading import load_tokenizer, resolve
from dlk_utils.questions.choices import (
    choice_token_ids,
    choice_tokens_after,
    require_first_token_choices,
    spellings,
    whole_choice_token_ids,
)
from dlk_utils.questions.templates import KINDS, prompt_library


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("smollm2"))


@pytest.fixture(scope="module")
def sentencepiece_like():
    """A tokenizer that begins every text with a space of its own, as SentencePiece does: "yes" by
    itself is " yes", and on a new line it is not."""
    merges = [("n", "o"), ("\u2581", "no"), ("y", "e"), ("ye", "s"), ("\u2581", "yes")]
    symbols = ["<unk>", "\u2581", *string.printable, *("".join(pair) for pair in merges)]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.trap(1)
def test_choices_that_begin_with_the_same_token_are_refused_by_place_and_token(tokenizer):
    choices = ["They didn't like it!", "They loved it"]
    with pytest.raises(ChoiceError) as error:
        choice_token_ids(tokenizer, choices, where="imdb, template thoughts")
    assert "imdb, template thoughts" in str(error.value)
    assert "'They'" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "choices", [["yes", "yes"], ["yes", "Yes"], ["", "no"], ["yes", "no", "maybe"], ["yes"], []]
)
def test_choices_that_are_equal_empty_or_not_two_are_refused(tokenizer, choices):
    with pytest.raises(ChoiceError, match="here"):
        choice_token_ids(tokenizer, choices, where="here")


@pytest.mark.parametrize("word", ["yes", "Positive", "false", "A"])
def test_a_word_counts_with_and_without_a_space_before_it(tokenizer, word):
    ids, _ = choice_token_ids(tokenizer, [word, "zebra"])
    first = {ids_of(tokenizer, text)[0] for text in (word, f" {word}")}
    assert len(first) == 2
    assert first <= set(ids)


def test_a_rarer_spelling_counts_only_if_it_is_one_token(tokenizer):
    ids, _ = choice_token_ids(tokenizer, ["negative", "positive"])
    assert {tokenizer.decode([i]).strip() for i in ids} <= {"negative", "Negative"}


def test_a_single_letter_counts_in_its_own_case_only_for_a_is_a_word(tokenizer):
    assert len(ids_of(tokenizer, " a")) == 1
    a, b = choice_token_ids(tokenizer, ["A", "B"])
    assert {tokenizer.decode([i]) for i in a} == {"A", " A"}
    assert {tokenizer.decode([i]) for i in b} == {"B", " B"}


def test_a_token_keeps_the_first_reason_why_it_counts(tokenizer):
    reasons = spellings(tokenizer, "yes")
    assert reasons[ids_of(tokenizer, "yes")[0]] == "as given"
    assert reasons[ids_of(tokenizer, "Yes")[0]] == "capitalised"


def test_a_word_on_a_new_line_counts_where_it_is_a_token_of_its_own(sentencepiece_like):
    bare, after_space = sentencepiece_like.convert_tokens_to_ids(["yes", "\u2581yes"])
    assert ids_of(sentencepiece_like, "yes") == [after_space]
    assert ids_of(sentencepiece_like, "\nyes")[-1] == bare
    _, yes = choice_token_ids(sentencepiece_like, ["no", "yes"])
    assert set(yes) == {bare, after_space}


def test_the_token_that_is_written_after_a_prompt_counts_whatever_it_is(
    sentencepiece_like, monkeypatch
):
    tokens = choice_tokens_after(sentencepiece_like, "Is it?\n", ["no", "yes"])
    assert sentencepiece_like.convert_ids_to_tokens([i for [i] in tokens.strict]) == ["no", "yes"]
    for strict, first in zip(tokens.strict, tokens.first, strict=True):
        assert set(strict) < set(first)
    written = {
        "no": sentencepiece_like.convert_tokens_to_ids(["a"]),
        "yes": sentencepiece_like.convert_tokens_to_ids(["b"]),
    }
    monkeypatch.setattr(
        "dlk_utils.questions.choices.written_tokens",
        lambda _, prompt, choice, **known: written[choice],
    )
    tokens = choice_tokens_after(sentencepiece_like, "Is it?\n", ["no", "yes"])
    assert tokens.strict == list(written.values())
    for strict, first in zip(tokens.strict, tokens.first, strict=True):
        assert set(strict) < set(first)


def test_a_written_token_is_refused_where_the_other_choice_has_it(tokenizer):
    blank, zebra, lion = (ids_of(tokenizer, text) for text in ("\n", "zebra", "lion"))
    no, yes = choice_token_ids(tokenizer, ["no", "yes"])
    expected = (sorted([*no, zebra[0]]), sorted([*yes, lion[0]]))
    assert choice_token_ids(tokenizer, ["no", "yes"], [zebra, blank + lion]) == expected
    with pytest.raises(ChoiceError, match="here: expected two choices that differ"):
        choice_token_ids(tokenizer, ["no", "yes"], [zebra, blank + zebra], where="here")
    with pytest.raises(ChoiceError, match="differ"):
        choice_token_ids(tokenizer, ["no", "yes"], [yes[:1], lion])


def test_choices_that_are_scored_whole_may_begin_with_the_same_word():
    tokenizer = byte_tokenizer()
    tokens = choice_tokens_after(tokenizer, "It is", ["very bad", "very good"], scoring="whole")
    spelt = [[tokenizer.decode(ids) for ids in variants] for variants in tokens.whole]
    assert spelt == [[" very bad", " Very bad"], [" very good", " Very good"]]
    assert tokens.first == [ids_of(tokenizer, " ")] * 2


@pytest.mark.parametrize("choices", [["good", "goods"], ["", "good"]])
def test_a_whole_choice_that_begins_the_other_or_is_blank_is_refused(choices):
    tokenizer = byte_tokenizer()
    written = [ids_of(tokenizer, f" {choice}") for choice in choices]
    with pytest.raises(ChoiceError, match="here"):
        whole_choice_token_ids(tokenizer, choices, written, where="here")


def test_rows_whose_choices_are_scored_whole_have_no_margin():
    first = pd.DataFrame({"template": ["a", "b"], "choice_tokens": [None, None]})
    require_first_token_choices(first, "gradients")
    require_first_token_choices(first.drop(columns="choice_tokens"), "gradients")
    some_whole = first.assign(choice_tokens=[None, [[[1]], [[2]]]])
    with pytest.raises(ChoiceError, match=r"gradients: .* got 1 of 2 rows .*\(templates: b\)"):
        require_first_token_choices(some_whole, "gradients")


@pytest.mark.trap(13)
@pytest.mark.parametrize("kind", KINDS)
def test_every_template_of_the_library_has_disjoint_choices(tokenizer, kind):
    for template in prompt_library(kind).itertuples():
        choices = [
            choice.replace("{{ choice_0 }}", "Rome").replace("{{ choice_1 }}", "Paris")
            for choice in template.choices
        ]
        zero, one = choice_token_ids(tokenizer, choices, where=template.name)
        assert zero and one and not set(zero) & set(one), template.name


@pytest.mark.parametrize(
    "choices, reason",
    [
        ("Yes", "expected a list of two texts, got 'Yes'"),
        ([0, 1], r"expected a list of two texts, got \[0, 1\]"),
        (["Yes", "No", "Maybe"], "expected two choices, got 3"),
        ([], "expected two choices, got 0"),
    ],
)
def test_choices_that_are_not_two_texts_are_refused(choices, reason):
    with pytest.raises(ChoiceError, match=reason):
        inspect.unwrap(choice_token_ids)(byte_tokenizer(), choices)
