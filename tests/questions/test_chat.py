"""Chat: texts and conversations become tokens with one BOS, and with the instruction in them."""

import inspect

import pytest
from tiny_models import TURNS, byte_tokenizer

from dlk_utils.errors import ChoiceError, DataError, ParameterError, TemplateError
from dlk_utils.questions.chat import encode_prompt, render_chat, tokenize, written_tokens

BOS = 0
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + TURNS
)
DROPS_SYSTEM = TURNS.replace("for m in messages", "for m in messages if m['role'] != 'system'")
CONVERSATION = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]


@pytest.mark.parametrize("bos", [True, False])
def test_plain_texts_become_tokens_with_one_bos_where_the_tokenizer_adds_one(bos):
    tokenizer = byte_tokenizer(bos=bos, chat_template=None)
    texts = ["one text", "another"]
    for text, ids in zip(texts, tokenize(tokenizer, texts), strict=True):
        assert ids.count(BOS) == int(bos)
        assert ids == tokenizer(text).input_ids
        assert tokenizer.decode(ids).removeprefix("<s>") == text


@pytest.mark.trap(17)
@pytest.mark.parametrize("written_by_template", ["", "{{ bos_token }}"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_chat_has_one_bos_whoever_writes_it(bos, written_by_template):
    tokenizer = byte_tokenizer(bos=bos, chat_template=written_by_template + TURNS)
    [ids] = tokenize(tokenizer, ["a question"], chat=True)
    expected = int(bos or bool(written_by_template))
    assert ids.count(BOS) == expected and ids[:1].count(BOS) == expected
    assert tokenizer.decode(ids).removeprefix("<s>") == "[user]a question[end][assistant]"


def test_a_chat_may_begin_with_a_system_turn():
    [ids] = tokenize(byte_tokenizer(), ["U"], chat=True, system="S")
    assert byte_tokenizer().decode(ids) == "[system]S[end][user]U[end][assistant]"


def test_a_chat_without_a_chat_template_is_refused_in_plain_words():
    with pytest.raises(TemplateError, match="expected a tokenizer with a chat template"):
        tokenize(byte_tokenizer(chat_template=None), ["U"], chat=True)


def test_texts_that_give_nothing_to_read_are_refused():
    with pytest.raises(DataError, match="expected a list of texts, got one text"):
        tokenize(byte_tokenizer(), "one text")
    with pytest.raises(DataError, match="got none in text 1"):
        tokenize(byte_tokenizer(), ["a text", ""])
    with pytest.raises(ParameterError, match="system"):
        tokenize(byte_tokenizer(), ["a text"], system="S")


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_without_a_system_role_the_instruction_heads_the_first_question(template):
    tokenizer = byte_tokenizer(chat_template=template)
    assert render_chat(tokenizer, CONVERSATION) == "[user]S\n\nU[end][assistant]"
    assert CONVERSATION[1]["content"] == "U"


def test_a_chat_template_that_prints_the_date_makes_the_same_prompt_tomorrow():
    tokenizer = byte_tokenizer(chat_template="Today: {{ strftime_now('%d %b %Y') }}\n" + TURNS)
    assert render_chat(tokenizer, CONVERSATION).startswith("Today: 26 Jul 2024\n")


def test_a_bos_that_is_not_added_by_the_tokenizer_is_not_added_here():
    tokenizer = byte_tokenizer(bos=False)
    assert tokenizer.bos_token_id == BOS
    assert encode_prompt(tokenizer, "a") == tokenizer("a").input_ids


def test_a_choice_is_written_after_a_space_or_at_once_on_a_new_line():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(written_tokens(tokenizer, "Answer:", "yes")) == " yes"
    assert tokenizer.decode(written_tokens(tokenizer, "Answer:\n", "yes")) == "yes"
    with pytest.raises(ChoiceError, match="a token of its own"):
        written_tokens(tokenizer, "Answer:\n", "")


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("text", [float("nan"), 3, None])
def test_what_is_no_text_is_refused_before_the_chat_template_sees_it(chat, text):
    with pytest.raises(DataError, match=f"got {text!r} as text 1"):
        inspect.unwrap(tokenize)(byte_tokenizer(), ["a text", text], chat=chat)
    with pytest.raises(DataError, match="expected a list of texts, got None"):
        inspect.unwrap(tokenize)(byte_tokenizer(), None, chat=chat)


def test_a_system_turn_that_is_no_text_is_refused():
    with pytest.raises(ParameterError, match="system: expected a text, got 3"):
        inspect.unwrap(tokenize)(byte_tokenizer(), ["a text"], chat=True, system=3)
