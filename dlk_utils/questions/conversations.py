"""Your own conversations: read them from a file, and find the assistant's words in a prompt.

The score of a token is worthless if it is not the token that was meant. So the place of each answer
is not searched for in the rendered text, where the same words may come twice. The conversation is
rendered again with marks in place of the words of one answer, and what comes before and after the
marks shows where that answer begins and ends.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlk_utils.errors import DataError, ModelError, TemplateError
from dlk_utils.questions.asking import control_tokens_in, marks_in
from dlk_utils.questions.chat import encode_prompt
from dlk_utils.questions.own_files import (
    decode_text,
    read_bytes,
    require_unicode,
    shortened,
)
from dlk_utils.questions.turns import Passage, TurnFormat, passages_of, turn_format

ROLES = ("system", "user", "assistant")

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where some programs keep the thoughts of an answer, apart from its content."""

Messages = Sequence[Mapping[str, Any]]
"""The turns of a conversation, each with `role` and `content`."""


class AnswerToken(NamedTuple):
    """A token of an assistant's turn."""

    turn: int
    """The number of the turn in the conversation, from 0."""
    is_thought: bool
    position: int
    """Its place among the tokens of the conversation, from 0."""
    text: str
    """The characters that it adds to the turn; empty for further tokens of one character."""


class WrittenConversation(NamedTuple):
    """A conversation as the model reads it, and the tokens of the answers in it."""

    text: str
    input_ids: list[int]
    tokens: list[AnswerToken]
    left_out: list[int]
    """Numbers of the turns whose thought the chat template leaves out."""


def read_chats(path: Path | str) -> list[list[dict[str, str]]]:
    """Read conversations from a file, one per line, each a list of messages in JSON.

    Parameters
    ----------
    path
        A file in UTF-8, usually with the suffix .jsonl. A line holds a list of messages with `role`
        (system, user or assistant) and `content` (text), or an object with that list under
        `messages`. Blank lines are skipped, and further keys are ignored.

    Returns
    -------
    list
        The conversations, each a list of messages with `role` and `content`.

    Raises
    ------
    DataError
        If the file cannot be read, or a line is not a conversation with an assistant's turn.
    """
    path = Path(path)
    text, _ = decode_text(path, read_bytes(path))
    chats = []
    # Not `splitlines`, which also breaks at characters that JSON allows within a text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path.name}: line {number}"
            chats.append(checked_messages(_parse_line(line, where), where))
    if not chats:
        raise DataError(f"{path.name}: expected one conversation per line, got no line")
    return chats


def _parse_line(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected a conversation in JSON, such as "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]; '
            f"{shortened(error, 120)}"
        ) from None
    return value.get("messages") if isinstance(value, dict) else value


def checked_messages(messages: Any, where: str = "messages") -> list[dict[str, str]]:
    """Check a conversation; return its messages with nothing but `role` and `content`.

    Raises
    ------
    DataError
        If it is not a list of messages as in `read_chats`, names `where`, and says which message.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise DataError(
            f"{where}: expected a list of messages with role and content, got {shortened(messages)}"
        )
    checked = [
        _checked_message(message, f"{where}: message {number}", is_first=number == 0)
        for number, message in enumerate(messages)
    ]
    if not any(message["role"] == "assistant" for message in checked):
        raise DataError(
            f"{where}: expected a turn of the assistant, whose tokens are scored, got "
            f"{len(checked)} messages without one"
        )
    if [message["role"] for message in checked[:2]] == ["system", "assistant"]:
        raise DataError(f"{where}: expected a user turn after the system turn, got the assistant's")
    return checked


def _checked_message(message: Any, where: str, *, is_first: bool) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{where}: expected an object with role and content, got {shortened(message)}"
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or (role == "system" and not is_first):
        raise DataError(
            f"{where}: expected the role user or assistant{' or system' if is_first else ''}, got "
            f"{shortened(role)}; remove turns of tools, and put the system turn first"
        )
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: expected a text as its content, got {shortened(content)}")
    require_unicode(content, where)
    for key in THOUGHT_KEYS:
        if message.get(key):
            raise DataError(
                f"{where}: expected thoughts within the content, between <think> and </think>, got "
                f"them under {key!r}; put them there"
            )
    return {"role": role, "content": content}


def write_conversation(tokenizer: Any, messages: Messages) -> WrittenConversation:
    """Write a complete conversation by a tokenizer's chat template; find the answers' tokens.

    Parameters
    ----------
    tokenizer
        The model's tokenizer, with a chat template.
    messages
        The turns, each with `role` and `content`. Thoughts are in the content of an assistant's
        turn, between marks such as ``<think>`` and ``</think>``.

    Returns
    -------
    WrittenConversation
        With the tokens of all assistant's turns, in order. The marks of thoughts are not among
        them. A token that also holds blanks before the turn belongs to it.

    Raises
    ------
    DataError
        If `messages` are not a conversation (see `read_chats`), or a turn spells a mark of the chat
        format, which could end it.
    ModelError
        If the tokenizer does not say which characters a token stands for.
    TemplateError
        If the tokenizer has no chat template, or one that leaves out or changes a turn.
    """
    turns = turn_format(tokenizer)
    messages = checked_messages(messages)
    by_turn = {
        number: passages_of(message["content"])
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    }
    _refuse_marks(tokenizer, messages, by_turn)
    thinking = any(passage.is_thought for found in by_turn.values() for passage in found)
    text = turns.render_whole(messages, thinking=thinking)
    _require_questions(turns, messages, text)
    input_ids, spans = _encode(tokenizer, text)
    tokens, left_out = [], []
    for number, passages in by_turn.items():
        placed = _places_in(turns, messages, number, passages, text, thinking=thinking)
        if len(placed) < len(passages):
            left_out.append(number)
        for passage in placed:
            tokens += _tokens_of(number, passage, text, spans)
    return WrittenConversation(text, input_ids, tokens, left_out)


def _refuse_marks(
    tokenizer: Any, messages: Messages, by_turn: Mapping[int, Sequence[Passage]]
) -> None:
    """Raise `DataError` if a text holds what the chat format could take for the end of its turn."""
    for number, message in enumerate(messages):
        texts = [message["content"]]
        if number in by_turn:
            # The marks of its thoughts may be control tokens.
            texts = [message["content"][start:end] for start, end, _ in by_turn[number]]
        find = control_tokens_in if message["role"] == "system" else marks_in
        spelt = [mark for text in texts for mark in find(tokenizer, text)]
        if spelt:
            raise DataError(
                f"message {number}: expected a {message['role']} turn without marks of the chat "
                f"format, which could end it, got {', '.join(map(repr, spelt))}"
            )


def _require_questions(turns: TurnFormat, messages: Messages, text: str) -> None:
    """Raise `TemplateError` unless the turns of the user stand in the text, in their order."""
    place = 0
    for number, message in enumerate(messages):
        content = message["content"].strip()
        # The system turn may be anywhere, and may be written into another turn.
        found = text.find(content, place if message["role"] == "user" else 0)
        if message["role"] != "assistant" and found < 0:
            raise _changed(turns, number, message["role"])
        if message["role"] == "user":
            place = found + len(content)


def _places_in(
    turns: TurnFormat,
    messages: Messages,
    number: int,
    passages: Sequence[Passage],
    text: str,
    *,
    thinking: bool,
) -> list[Passage]:
    """Find the passages of an answer in the rendered conversation.

    Thoughts that the template leaves out are not among them.
    """
    content = messages[number]["content"]
    marks = [f"mark {place} of turn {number} number 7319" for place in range(len(passages))]
    pieces, end = [], 0
    for passage, mark in zip(passages, marks, strict=True):
        pieces += [content[end : passage.start], mark]
        end = passage.end
    marked = [dict(message) for message in messages]
    marked[number]["content"] = "".join([*pieces, content[end:]])
    rest = turns.render_whole(marked, thinking=thinking)
    gaps, kept = [], []
    for passage, mark in zip(passages, marks, strict=True):
        gap, found, after = rest.partition(mark)
        if found:
            gaps.append(gap)
            kept.append(passage)
            rest = after
        elif not passage.is_thought:
            raise _changed(turns, number, "assistant")
    if not gaps or not text.startswith(gaps[0]) or not text.endswith(rest):
        raise _changed(turns, number, "assistant")
    placed = []
    place, last = len(gaps[0]), len(text) - len(rest)
    for passage, gap in zip(kept, ["", *gaps[1:]], strict=True):
        place = _after(text, gap, place)
        start = _after(text, "", place)
        place = _after(text, content[passage.start : passage.end], place)
        if place < 0:
            raise _changed(turns, number, "assistant")
        placed.append(Passage(start, place, passage.is_thought))
    if place > last or text[place:last].strip():
        raise _changed(turns, number, "assistant")
    return placed


def _after(text: str, part: str, place: int) -> int:
    """Return where a part ends if the text has it at a place, blanks aside; otherwise -1."""
    if place < 0:
        return -1
    rest = text[place:]
    start = place + len(rest) - len(rest.lstrip())
    words = part.strip()
    return start + len(words) if text.startswith(words, start) else -1


def _changed(turns: TurnFormat, number: int, role: str) -> TemplateError:
    return TemplateError(
        f"{turns.name}: expected a chat template that writes every turn word for word, got one "
        f"that leaves out or changes message {number} ({role}); set another "
        "tokenizer.chat_template, or remove the turn"
    )


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens of a text, and the characters that each of them stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"expected a tokenizer that says where in the text each token stands, got a "
            f"{type(tokenizer).__name__}; load the fast one (a file tokenizer.json)"
        )
    input_ids = encode_prompt(tokenizer, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    n_before = len(input_ids) - len(encoded.input_ids)
    # A token for the beginning of the text may come before the others.
    return input_ids, [(0, 0)] * n_before + [tuple(span) for span in encoded.offset_mapping]


def _tokens_of(
    turn: int, passage: Passage, text: str, spans: Sequence[tuple[int, int]]
) -> list[AnswerToken]:
    """Return the tokens of a passage of the text, whose texts together are the passage."""
    tokens = []
    place = passage.start
    for position, (start, end) in enumerate(spans):
        if start < end and end > passage.start and start < passage.end:
            until = max(place, min(end, passage.end))
            tokens.append(AnswerToken(turn, passage.is_thought, position, text[place:until]))
            place = until
    if place != passage.end:
        raise ModelError(
            f"expected tokens for the whole text {shortened(text[passage.start : passage.end])}, "
            f"got none for {shortened(text[place : passage.end])}; use the model's own tokenizer"
        )
    return tokens
