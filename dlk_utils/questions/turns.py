"""Where a chat template puts what is said, and where it lets the assistant's answer begin.

Templates differ in more than their marks: some refuse a system turn or drop it, some do not begin
the answer, some begin a thought instead. All of that shows in two conversations of known words.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlk_utils.errors import TemplateError
from dlk_utils.questions.rendering import render_template

_FIXED_DATE = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"
"""Overrides today's date in chat templates that print it, so that tomorrow's prompt is the same.

It is the date that Llama 3.2's template prints where it has no clock.
"""

_WITHOUT_THOUGHT = {
    "enable_thinking": False,  # Qwen, SmolLM, GLM, EXAONE, Hunyuan
    "thinking": False,  # DeepSeek, Granite
    "reasoning": False,  # Command A
    "thinking_budget": 0,  # Seed-OSS
}
"""What templates call the switch by which a model answers without a thought."""

_THOUGHTS = (
    (r"<((?:\w+:)?(?:think|thought|reason)\w*)>", r"</\1>"),
    (r"\[(THINK|THOUGHT|REASON)(ING)?\]", r"[/\1\2]"),
    (r"◁(think)▷", r"◁/\1▷"),
    (r"<\|START_(THINK|THOUGHT|REASON)(ING)?\|>", r"<|END_\1\2|>"),
    (r"<\|begin_of_(thought|thinking|reasoning)\|>", r"<|end_of_\1|>"),
    (r"<\|(think|thought|reason)(ing)?_start\|>", r"<|\1\2_end|>"),
    (r"<\|channel>thought", r"<channel|>"),  # Gemma 4
)
"""How thoughts begin, as patterns, and the mark that ends each of them."""

_LONE_END = r"</(?:\w+:)?(?:think|thought|reason)\w*>"
"""An end without a beginning, which DeepSeek V3.1 writes for an empty thought."""

_SYSTEM, _QUESTION, _ANSWER, _NEXT = (
    f"{word} number 7319" for word in ("instruction", "question", "answer", "next question")
)

_ADVICE = "set another tokenizer.chat_template, or use another model"


@dataclass(frozen=True)
class TurnFormat:
    """What is known of a chat template."""

    template: str
    """The template, in jinja."""
    variables: dict[str, Any]
    """What it sees besides the conversation: special tokens, and `_WITHOUT_THOUGHT`."""
    tokens: frozenset[str]
    """The tokens that the tokenizer has besides those of ordinary text."""
    name: str
    """What errors call the tokenizer."""
    takes_parts: bool
    """Whether the text of a turn has to be a list of parts, as in some multimodal models."""
    has_system: bool
    """Whether it writes a system turn."""
    before_answer: str
    """What it writes between a question and an answer that was given."""
    after_answer: str
    """What it writes between that answer and the next question."""
    after_question: str
    """What it writes behind the last question: the generation prompt."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render a conversation up to where the assistant's answer begins.

        Where the template has no system turn, its text heads the first user turn. Raises
        `TemplateError` if the template leaves something out, or it is unclear where the answer
        begins.
        """
        if messages[0]["role"] == "system" and not self.has_system:
            system, first, *rest = messages
            text = f"{system['content']}\n\n{first['content']}"
            messages = [{"role": first["role"], "content": text}, *rest]
        written = _write(self.template, self.variables, self.name, messages, self.takes_parts)
        self._require_all(messages, written)
        generation_prompt = self._behind(messages[-1]["content"].strip(), written)
        return written + self._rest_of(generation_prompt)

    @property
    def marks(self) -> list[str]:
        """The marks of turns, such as ``ASSISTANT:``, that are not made of blanks or one word."""
        marks = (self.before_answer.strip(), self.after_answer.strip())
        return [mark for mark in marks if re.search(r"\w\W|\W\w", mark)]

    def _require_all(self, messages: Sequence[Mapping[str, str]], written: str) -> None:
        """Raise `TemplateError` if a turn is not in the text word for word, or not in its place."""
        position = 0
        for message in messages:
            content = message["content"].strip()
            # Some templates put the system turn before the last question, so its place is free.
            is_system = message["role"] == "system"
            found = written.find(content, 0 if is_system else position)
            if found < 0:
                raise TemplateError(
                    f"{self.name}: expected a chat template that writes every turn word for word, "
                    f"it leaves out or changes the {message['role']} turn {_shown(content)}; "
                    f"{_ADVICE}"
                )
            position = position if is_system else found + len(content)

    def _behind(self, question: str, written: str) -> str:
        """Return what the template has written behind the last question."""
        usual = self.after_question
        if written.endswith(usual) and written.removesuffix(usual).rstrip().endswith(question):
            return usual
        # An instruction may hold a switch by which the template begins answers in another way.
        return written[written.rindex(question) + len(question) :]

    def _rest_of(self, generation_prompt: str) -> str:
        """Return what is missing between a generation prompt and the place of the answer.

        An answer that was given shows where that is. Usually nothing is missing. It may be the end
        of a thought, all of the assistant's mark, or a mark that tells the answer from a thought.
        """
        end = self._end_of_thought(generation_prompt)
        rest = _missing(generation_prompt + end, self.before_answer)
        if rest is None:
            raise TemplateError(
                f"{self.name}: expected a generation prompt like the beginning of an answer that "
                f"was given, {_shown(self.before_answer)}, the chat template writes "
                f"{_shown(generation_prompt)}; {_ADVICE}"
            )
        return end + rest

    def _end_of_thought(self, prompt: str) -> str:
        """Return what closes the thought that a prompt opens; nothing if it opens none."""
        thought = _open_thought(prompt)
        if thought is None:
            return ""
        end, content = thought
        if content.strip() or not (end in self.template or end in self.tokens):
            reason = "is not empty" if content.strip() else f"has no end ({end}) in this format"
            raise TemplateError(
                f"{self.name}: expected a generation prompt after which the answer begins, the "
                f"chat template begins a thought that {reason}: {_shown(prompt)}; {_ADVICE}"
            )
        if not end.startswith("</"):
            return end
        # As reasoning models are taught to write an empty thought.
        return ("\n" if content else "\n\n") + end + "\n\n"


def turn_format(tokenizer: Any) -> TurnFormat:
    """Find out how the chat template of a tokenizer writes turns.

    Raises
    ------
    TemplateError
        If the tokenizer has no chat template, if that fails or takes too long, or if it leaves out
        a question or an answer that was given.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TemplateError(
            "expected a tokenizer with a chat template, this one has none; set "
            "tokenizer.chat_template, or use the plain text"
        )
    name = Path(str(getattr(tokenizer, "name_or_path", ""))).name or "this tokenizer"
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise TemplateError(f"{name}: {error}") from None
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    special_tokens = json.dumps(tokenizer.special_tokens_map, default=str)
    return _turn_format(tokenizer, template, special_tokens, name)


@functools.lru_cache(maxsize=64)
def _turn_format(tokenizer: Any, template: str, special_tokens: str, name: str) -> TurnFormat:
    variables = json.loads(special_tokens) | _WITHOUT_THOUGHT
    conversation = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]
    gaps, takes_parts = _gaps(template, variables, name, conversation)
    _, before_answer, after_answer, after_question = gaps
    with_system = [{"role": "system", "content": _SYSTEM}, conversation[0]]
    try:
        written = _write(template, variables, name, with_system, takes_parts)
    except TemplateError:
        written = ""
    return TurnFormat(
        template=template,
        variables=variables,
        tokens=frozenset(tokenizer.get_added_vocab()),
        name=name,
        takes_parts=takes_parts,
        has_system=_between(written, [_SYSTEM, _QUESTION]) is not None,
        before_answer=before_answer,
        after_answer=after_answer,
        after_question=after_question,
    )


def _gaps(
    template: str, variables: Mapping[str, Any], name: str, conversation: list[dict[str, str]]
) -> tuple[list[str], bool]:
    """Return what a template writes around the turns, and whether it takes texts as parts only."""
    contents = [message["content"] for message in conversation]
    errors = []
    for takes_parts in (False, True):
        try:
            written = _write(template, variables, name, conversation, takes_parts)
        except TemplateError as error:
            errors.append(error)
            continue
        gaps = _between(written, contents)
        if gaps is not None:
            return gaps, takes_parts
        left_out = [content for content in contents if content not in written] or ["their order"]
        errors.append(
            TemplateError(
                f"{name}: expected a chat template that writes questions, and answers that were "
                f"given, of {contents} it leaves out {left_out}; {_ADVICE}"
            )
        )
    # What it says of a text in parts is no concern of whoever wrote a text.
    raise errors[0]


def _write(
    template: str,
    variables: Mapping[str, Any],
    name: str,
    messages: Sequence[Mapping[str, str]],
    takes_parts: bool,
) -> str:
    turns = [dict(message) for message in messages]
    if takes_parts:
        for turn in turns:
            turn["content"] = [{"type": "text", "text": turn["content"]}]
    try:
        return render_template(template, turns, variables=variables)
    except TemplateError as error:
        raise TemplateError(f"{name}: {error}; {_ADVICE}") from None


def _between(written: str, contents: Sequence[str]) -> list[str] | None:
    """Return the texts before, between and after some contents; None if these are not in order."""
    gaps = []
    for content in contents:
        gap, found, written = written.partition(content)
        if not found:
            return None
        gaps.append(gap)
    return [*gaps, written]


def _missing(prompt: str, before_answer: str) -> str | None:
    """Return what a prompt lacks of the text before an answer; None if they differ.

    Differences in white space do not count, nor does a thought that only the prompt has.
    """
    rest = _after(prompt, before_answer)
    if rest is None:
        prompt = _without_thoughts(prompt)
        rest = _after(prompt, _without_thoughts(before_answer))
    if rest is None:
        return None
    if not rest.strip():
        return ""
    return rest.lstrip() if prompt[-1:].isspace() else rest


def _after(beginning: str, text: str) -> str | None:
    """Return what a text has behind a beginning, which may have other white space in it."""
    pattern = r"\s*".join(re.escape(character) for character in "".join(beginning.split()))
    match = re.match(r"\s*" + pattern if pattern else "", text)
    return None if match is None else text[match.end() :]


def _without_thoughts(text: str) -> str:
    for begin, end in _THOUGHTS:
        while match := re.search(begin, text):
            before, content = text[: match.start()], text[match.end() :]
            text = before + content.partition(match.expand(end))[2]
    return re.sub(_LONE_END, "", text)


def _open_thought(text: str) -> tuple[str, str] | None:
    """Return the mark that would end an open thought, and what is in it so far."""
    for begin, end in _THOUGHTS:
        for match in re.finditer(begin, text):
            content, mark = text[match.end() :], match.expand(end)
            if mark not in content:
                return mark, content
    return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:40] + " ... " + text[-30:])
