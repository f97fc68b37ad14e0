"""The one way in for every prompt: from a conversation to tokens, or to why it cannot be asked."""

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dlk_utils.errors import DataError, ModelError
from dlk_utils.questions.chat import encode_prompt, render_chat
from dlk_utils.questions.choices import ChoiceTokens, choice_tokens_after
from dlk_utils.questions.turns import turn_format

_SLACK = 64
"""How many tokens a text may lose where other text follows it, generously."""

_LONG_TOKEN = 16
"""Characters of a token that is longer than nearly all."""


class Prompt(NamedTuple):
    """A prompt that can be asked."""

    text: str
    input_ids: list[int]
    """Its tokens, with exactly one BOS where the tokenizer has one."""
    question_start: int
    """How many of them stand before the last question."""
    choices: ChoiceTokens


def write_prompt(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    prefix: str,
    choices: Sequence[str],
    *,
    context: int,
    vocab_size: int | None = None,
    scoring: str = "first",
    where: str = "this prompt",
) -> Prompt | None:
    """Write a conversation, up to where its answer is one of two choices.

    Parameters
    ----------
    tokenizer
        The model's tokenizer, with a chat template.
    messages
        The turns, of which the last is the question.
    prefix
        How the answer begins, up to the choice.
    choices
        The two choices, index = label.
    context
        Most tokens of a prompt.
    vocab_size
        How many tokens the model has an embedding for, if known.
    scoring
        As in a `templates.Template`.
    where
        What an error names, such as the data set and the template.

    Returns
    -------
    Prompt or None
        None if it is longer than `context`. Nothing is ever truncated.

    Raises
    ------
    ChoiceError
        If the choices cannot be told apart.
    DataError
        If a turn spells a control token, which could end it.
    ModelError
        If a token is beyond `vocab_size`.
    TemplateError
        If the chat template cannot be used, see `chat.render_chat`.
    """
    for message in messages:
        if spelt := control_tokens_in(tokenizer, message["content"]):
            raise DataError(
                f"{where}: expected a {message['role']} turn without control tokens, which could "
                f"end it, got {', '.join(map(repr, spelt))}"
            )
    text = render_chat(tokenizer, messages) + prefix
    input_ids = encode_prompt(tokenizer, text)
    if len(input_ids) > context:
        return None
    tokens = choice_tokens_after(
        tokenizer, text, choices, scoring=scoring, where=where, prompt_ids=input_ids
    )
    _require_embedding(tokenizer, [*input_ids, *itertools.chain(*tokens.first)], vocab_size)
    # Other questions after the same turns show what stands before the question.
    other = _ids_of_another_question(tokenizer, json.dumps(messages[:-1]), _key(tokenizer))
    pairs = zip(input_ids[:-1], other, strict=False)
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Prompt(text, input_ids, start, tokens)


def control_tokens_in(tokenizer: Any, text: str) -> list[str]:
    """Return the control tokens that a text spells, each of which could end its turn."""
    tokens, pattern = _control_tokens(tokenizer, _key(tokenizer))
    return sorted(set(pattern.findall(text))) if tokens else []


def marks_in(tokenizer: Any, text: str) -> list[str]:
    """Return what a user's text spells that the chat format reads as the end of a turn.

    These are control tokens, and marks of turns such as ``ASSISTANT:`` that are no tokens.
    """
    marks = [mark for mark in turn_format(tokenizer).marks if mark in text]
    return [*control_tokens_in(tokenizer, text), *marks]


def is_too_long(tokenizer: Any, text: str, context: int) -> bool:
    """Whether a text alone has more tokens than `context`, by its beginning.

    The rest is never read. Where only the complete prompt is too long, or it is a near thing, the
    answer is False.
    """
    most = context + _SLACK
    # A character is at most four tokens, its bytes.
    if 4 * len(text) <= most:
        return False
    beginning = text[: _LONG_TOKEN * most]
    return len(tokenizer(beginning, add_special_tokens=False).input_ids) > most


def _key(tokenizer: Any) -> tuple:
    """What of a tokenizer may be changed after it is loaded, and decides a prompt."""
    return len(tokenizer), str(tokenizer.chat_template)


@functools.lru_cache(maxsize=16)
def _control_tokens(tokenizer: Any, key: tuple) -> tuple[set[str], re.Pattern]:
    """Return the tokens that are no text, and a pattern that finds them.

    These are the special ones, and those in brackets such as ``<think>``: what they begin or end is
    not said by a user. Added tokens may also be text, such as runs of blanks.
    """
    added = tokenizer.added_tokens_decoder.values()
    in_brackets = re.compile(r"[<\[◁].*\w.*[>\]▷]")
    tokens = {t.content for t in added if t.special or in_brackets.fullmatch(t.content.strip())}
    tokens = {*tokens, *tokenizer.all_special_tokens} - {""}
    longest_first = sorted(tokens, key=len, reverse=True)
    return tokens, re.compile("|".join(map(re.escape, longest_first)))


@functools.lru_cache(maxsize=4096)
def _ids_of_another_question(tokenizer: Any, turns_before: str, key: tuple) -> tuple[int, ...]:
    other = [*json.loads(turns_before), {"role": "user", "content": "~"}]
    return tuple(encode_prompt(tokenizer, render_chat(tokenizer, other)))


def _require_embedding(tokenizer: Any, token_ids: Sequence[int], vocab_size: int | None) -> None:
    if vocab_size is None or max(token_ids) < vocab_size:
        return
    beyond = sorted({token for token in token_ids if token >= vocab_size})
    shown = ", ".join(f"{token} ({tokenizer.decode([token])!r})" for token in beyond[:5])
    raise ModelError(
        f"expected tokens that the model has an embedding for, ids below {vocab_size:,}, got "
        f"{shown}; the tokenizer has {len(tokenizer):,} tokens: use the model's own tokenizer and "
        "chat template, or resize its embedding"
    )
