"""Write prompts: turn a conversation into the tokens of a prompt that asks for one of two choices.

Every prompt of this package is written by `write_prompt`. The other functions find texts that could
not be part of one: those that spell marks of the chat format, and those that are too long.
"""

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dlk_utils.errors import DataError, ModelError
from dlk_utils.questions.chat import encode_prompt, render_chat
from dlk_utils.questions.choices import ChoiceTokens, choice_tokens_after
from dlk_utils.questions.shared_prefix import shared_prefix_length
from dlk_utils.questions.turns import turn_format

_LENGTH_MARGIN = 64
"""Tokens beyond the context that a text may have alone.

A text may have fewer tokens within a prompt, where they merge with those of the text after it. This
is far more than it could lose.
"""

_CHARACTERS_PER_TOKEN = 16
"""Characters per token of a text: more than in nearly all texts."""


class Prompt(NamedTuple):
    """A prompt, up to where the model answers with one of two choices."""

    text: str
    """The rendered conversation, with the prefix of the answer."""
    input_ids: list[int]
    """The tokens of the text, with exactly one BOS where the tokenizer adds one."""
    question_start: int
    """The number of tokens before the last question."""
    choices: ChoiceTokens
    """The tokens that count as each choice after this prompt."""

    def columns(self) -> dict[str, Any]:
        """Return the columns of `make_prompts` that the written prompt decides."""
        return {
            "prompt": self.text,
            "input_ids": self.input_ids,
            "question_start": self.question_start,
            "choice_ids": self.choices.first,
            "strict_ids": self.choices.strict,
            "choice_tokens": self.choices.whole,
        }


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
    """Write the prompt of a conversation, up to where the model answers with one of two choices.

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
        The largest number of tokens that a prompt may have.
    vocab_size
        How many tokens the model has an embedding for, if known.
    scoring
        Whether the first token of a choice is scored ("first"), or all of its tokens ("whole").
    where
        What error messages name as the place, such as the data set and the template.

    Returns
    -------
    Prompt or None
        The prompt, or None if it has more than `context` tokens. Prompts are never truncated.

    Raises
    ------
    ChoiceError
        If the choices cannot be told apart.
    DataError
        If a turn contains the text of a control token, which could end the turn.
    ModelError
        If the id of a token is not below `vocab_size`.
    TemplateError
        If the chat template cannot be used: see `chat.render_chat`.
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
    # Two prompts that differ in the last question alone share the tokens before it.
    other_ids = _ids_with_another_question(
        tokenizer, json.dumps(messages[:-1]), _cache_key(tokenizer)
    )
    question_start = shared_prefix_length(input_ids[:-1], other_ids)
    return Prompt(text, input_ids, question_start, tokens)


def control_tokens_in(tokenizer: Any, text: str) -> list[str]:
    """Return the control tokens whose text occurs in a text. Each could end the turn it is in."""
    tokens, pattern = _control_tokens(tokenizer, _cache_key(tokenizer))
    return sorted(set(pattern.findall(text))) if tokens else []


def marks_in(tokenizer: Any, text: str) -> list[str]:
    """Return the parts of a user's text that the chat format could take for the end of the turn.

    These are control tokens, and marks between turns that are plain text, such as ``ASSISTANT:``.
    """
    marks = [mark for mark in turn_format(tokenizer).marks if mark in text]
    return [*control_tokens_in(tokenizer, text), *marks]


def is_too_long(tokenizer: Any, text: str, context: int) -> bool:
    """Return whether a text is certainly too long for a prompt of at most `context` tokens.

    This is fast also for very long texts, because only their beginning is tokenized. A text that is
    only a little too long, or only with the rest of its prompt, gives False: `write_prompt` then
    returns None.
    """
    most_tokens = context + _LENGTH_MARGIN
    # A character has at most four bytes, and so at most four tokens.
    if 4 * len(text) <= most_tokens:
        return False
    beginning = text[: _CHARACTERS_PER_TOKEN * most_tokens]
    return len(tokenizer(beginning, add_special_tokens=False).input_ids) > most_tokens


def _cache_key(tokenizer: Any) -> tuple:
    """Return what decides a prompt and may change after a tokenizer is loaded.

    Cached functions take it as an argument, so that they run again after such a change.
    """
    return len(tokenizer), str(tokenizer.chat_template)


@functools.lru_cache(maxsize=16)
def _control_tokens(tokenizer: Any, cache_key: tuple) -> tuple[set[str], re.Pattern]:
    """Return the control tokens of a tokenizer, and a pattern that finds them in a text.

    These are the special tokens, and added tokens in brackets, such as ``<think>``. Other added
    tokens are ordinary text, such as runs of spaces.
    """
    tokens = set(tokenizer.all_special_tokens)
    in_brackets = re.compile(r"[<\[◁].*\w.*[>\]▷]")
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or in_brackets.fullmatch(token.content.strip()):
            tokens.add(token.content)
    tokens.discard("")
    # The pattern takes the first alternative that fits, and one token may begin another.
    longest_first = sorted(tokens, key=len, reverse=True)
    return tokens, re.compile("|".join(map(re.escape, longest_first)))


@functools.lru_cache(maxsize=4096)
def _ids_with_another_question(
    tokenizer: Any, turns_before: str, cache_key: tuple
) -> tuple[int, ...]:
    """Return the token ids of a conversation, given as JSON, after which "~" is asked."""
    messages = [*json.loads(turns_before), {"role": "user", "content": "~"}]
    return tuple(encode_prompt(tokenizer, render_chat(tokenizer, messages)))


def _require_embedding(tokenizer: Any, token_ids: Sequence[int], vocab_size: int | None) -> None:
    """Raise `ModelError` if the model has no embedding for one of the tokens."""
    if vocab_size is None or max(token_ids) < vocab_size:
        return
    beyond = sorted({token for token in token_ids if token >= vocab_size})
    shown = ", ".join(f"{token} ({tokenizer.decode([token])!r})" for token in beyond[:5])
    raise ModelError(
        f"expected token ids below {vocab_size:,}, for which the model has embeddings, got {shown} "
        f"of a tokenizer with {len(tokenizer):,} tokens; use the model's own tokenizer and chat "
        "template, or resize its embedding"
    )
