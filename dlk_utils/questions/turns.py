"""Render a conversation by a tokenizer's chat template, up to where the answer begins, or whole.

Chat templates differ in more than the marks between turns. Some raise an error for a system turn,
or drop it. Some write no generation prompt, and the generation prompts of reasoning models begin a
thought (``<think>``) instead of the answer.

`turn_format` finds out what a template does: it renders two short conversations of known text, and
looks at what the template writes before, between and after the turns. `TurnFormat.render` then
completes the generation prompt where something is missing before the answer.

In this module a *given answer* is the text of an assistant turn in the conversation. What the
template writes before it shows where the answer to the last question has to begin.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dlk_utils.errors import TemplateError
from dlk_utils.questions.rendering import render_template

_FIXED_DATE = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"
"""Jinja code that fixes the date in chat templates that print today's date.

Otherwise a prompt would change from day to day. Llama 3.2's template prints this date if it is not
given the current one.
"""

_THINKING_OFF = {
    "enable_thinking": False,  # Qwen, SmolLM, GLM, EXAONE, Hunyuan
    "thinking": False,  # DeepSeek, Granite
    "reasoning": False,  # Command A
    "thinking_budget": 0,  # Seed-OSS
}
"""The variables by which templates are told to answer without a thought, set to do so."""

_THOUGHTS = (
    (r"<((?:\w+:)?(?:think|thought|reason)\w*)>", r"</\1>"),
    (r"\[(THINK|THOUGHT|REASON)(ING)?\]", r"[/\1\2]"),
    (r"◁(think)▷", r"◁/\1▷"),
    (r"<\|START_(THINK|THOUGHT|REASON)(ING)?\|>", r"<|END_\1\2|>"),
    (r"<\|begin_of_(thought|thinking|reasoning)\|>", r"<|end_of_\1|>"),
    (r"<\|(think|thought|reason)(ing)?_start\|>", r"<|\1\2_end|>"),
    (r"<\|channel>thought", r"<channel|>"),  # Gemma 4
)
"""Patterns of the marks that begin a thought, each with the mark that ends it (`re` template)."""

_END_WITHOUT_BEGINNING = r"</(?:\w+:)?(?:think|thought|reason)\w*>"
"""DeepSeek V3.1 writes only the end mark for an empty thought."""

# Texts of the conversations by which a template is tried. No template contains them by chance.
_SYSTEM = "instruction number 7319"
_QUESTION = "question number 7319"
_ANSWER = "answer number 7319"
_NEXT_QUESTION = "next question number 7319"

_ADVICE = (
    "set another tokenizer.chat_template (in a folder: the file chat_template.jinja), or use "
    "another model"
)


@dataclass(frozen=True)
class TurnFormat:
    """A chat template, and how it writes the turns of a conversation."""

    template: str
    """The template, in jinja."""
    variables: dict[str, Any]
    """What the template sees besides the conversation: special tokens, and `_THINKING_OFF`."""
    added_tokens: frozenset[str]
    """The tokens that were added to the tokenizer's vocabulary, such as marks of turns."""
    name: str
    """The name of the tokenizer in error messages."""
    takes_parts: bool
    """Whether the content of a turn has to be a list of parts, as in some multimodal models."""
    has_system: bool
    """Whether the template writes a system turn."""
    before_answer: str
    """What it writes between a question and a given answer."""
    after_answer: str
    """What it writes between a given answer and the next question."""
    after_question: str
    """What it writes after the last question: usually the generation prompt."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render a conversation up to where the assistant's answer begins.

        If the template writes no system turn, the text of that turn is put at the start of the
        first user turn.

        Parameters
        ----------
        messages
            The turns, each with `role` and `content`. The last one is the question.

        Raises
        ------
        TemplateError
            If the template leaves out or changes a turn, or it is unclear where the answer begins.
        """
        messages = self._with_system_text(messages)
        written = _write(self.template, self.variables, self.name, messages, self.takes_parts)
        self._require_turns(messages, written)
        question = messages[-1]["content"].strip()
        generation_prompt = self._generation_prompt(question, written)
        return written + self._completion_of(generation_prompt)

    def render_whole(self, messages: Sequence[Mapping[str, str]], *, thinking: bool = False) -> str:
        """Render a complete conversation, without the beginning of a further answer.

        Parameters
        ----------
        messages
            The turns, each with `role` and `content`. A system turn is treated as by `render`.
        thinking
            Leave it to the template whether answers have thoughts. Otherwise it is told that they
            have none.

        Raises
        ------
        TemplateError
            If the template fails.
        """
        variables = self.variables
        if thinking:
            variables = {name: x for name, x in variables.items() if name not in _THINKING_OFF}
        messages = self._with_system_text(messages)
        return _write(
            *(self.template, variables, self.name, messages, self.takes_parts),
            add_generation_prompt=False,
        )

    def _with_system_text(
        self, messages: Sequence[Mapping[str, str]]
    ) -> Sequence[Mapping[str, str]]:
        """Put the text of a system turn into the first user turn, where there is no system turn."""
        if messages[0]["role"] != "system" or self.has_system:
            return messages
        system, first, *rest = messages
        text = f"{system['content']}\n\n{first['content']}"
        return [{"role": first["role"], "content": text}, *rest]

    @property
    def marks(self) -> list[str]:
        """The texts between turns that a user's text must not contain, such as ``ASSISTANT:``.

        White space and single words are left out: they occur in ordinary text.
        """
        marks = (self.before_answer.strip(), self.after_answer.strip())
        return [mark for mark in marks if re.search(r"\w\W|\W\w", mark)]

    def _require_turns(self, messages: Sequence[Mapping[str, str]], written: str) -> None:
        """Raise `TemplateError` unless the turns are in the text word for word and in order."""
        position = 0
        for message in messages:
            content = message["content"].strip()
            # The system turn may be anywhere: some templates put it before the last question.
            is_system = message["role"] == "system"
            found = written.find(content, 0 if is_system else position)
            if found < 0:
                raise TemplateError(
                    f"{self.name}: expected a chat template that writes every turn word for word, "
                    f"got one that leaves out or changes the {message['role']} turn "
                    f"{_shortened(content)}; {_ADVICE}"
                )
            if not is_system:
                position = found + len(content)

    def _generation_prompt(self, question: str, written: str) -> str:
        """Return what the template has written after the last question."""
        usual = self.after_question
        if written.endswith(usual) and written.removesuffix(usual).rstrip().endswith(question):
            return usual
        # In some templates, words in the instruction switch to another generation prompt.
        return written[written.rindex(question) + len(question) :]

    def _completion_of(self, generation_prompt: str) -> str:
        """Return what is missing between a generation prompt and the beginning of the answer.

        Usually that is nothing. It may be the end of a thought, the whole mark of the assistant's
        turn, or a mark that separates the answer from a thought. It is found by comparing the
        generation prompt with what the template writes before a given answer.
        """
        end_of_thought = self._end_of_thought(generation_prompt)
        missing = _missing_before_answer(generation_prompt + end_of_thought, self.before_answer)
        if missing is None:
            raise TemplateError(
                f"{self.name}: expected a chat template whose generation prompt is what it writes "
                f"before a given answer, {_shortened(self.before_answer)}, got "
                f"{_shortened(generation_prompt)}; {_ADVICE}"
            )
        return end_of_thought + missing

    def _end_of_thought(self, prompt: str) -> str:
        """Return the text that ends the thought which a prompt begins; "" if it begins none.

        Raises `TemplateError` if the thought is not empty, or if neither the template nor the
        tokenizer has a mark to end it.
        """
        thought = _open_thought(prompt)
        if thought is None:
            return ""
        end, content = thought
        is_empty = not content.strip()
        is_known = end in self.template or end in self.added_tokens
        if not (is_empty and is_known):
            reason = f"has no end ({end}) in this format" if is_empty else "is not empty"
            raise TemplateError(
                f"{self.name}: expected a generation prompt after which the answer begins, got one "
                f"that begins a thought that {reason}: {_shortened(prompt)}; {_ADVICE}"
            )
        if not end.startswith("</"):
            return end
        # Reasoning models are trained to write an empty thought with these line breaks.
        return ("\n" if content else "\n\n") + end + "\n\n"


def turn_format(tokenizer: Any) -> TurnFormat:
    """Find out how the chat template of a tokenizer writes turns.

    The result is kept until the chat template or the special tokens change.

    Parameters
    ----------
    tokenizer
        Any tokenizer of transformers.

    Raises
    ------
    TemplateError
        If the tokenizer has no chat template, if the template fails or takes too long, or if it
        leaves out a question or a given answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TemplateError(
            "expected a tokenizer with a chat template, got one without; set "
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
    variables = json.loads(special_tokens) | _THINKING_OFF
    conversation = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT_QUESTION},
    ]
    gaps, takes_parts = _try_template(template, variables, name, conversation)
    _, before_answer, after_answer, after_question = gaps
    with_system = [{"role": "system", "content": _SYSTEM}, conversation[0]]
    try:
        written = _write(template, variables, name, with_system, takes_parts)
    except TemplateError:
        written = ""
    has_system = _gaps_between([_SYSTEM, _QUESTION], written) is not None
    return TurnFormat(
        template=template,
        variables=variables,
        added_tokens=frozenset(tokenizer.get_added_vocab()),
        name=name,
        takes_parts=takes_parts,
        has_system=has_system,
        before_answer=before_answer,
        after_answer=after_answer,
        after_question=after_question,
    )


def _try_template(
    template: str, variables: Mapping[str, Any], name: str, conversation: list[dict[str, str]]
) -> tuple[list[str], bool]:
    """Render a conversation, with contents as texts or else as parts.

    Returns
    -------
    tuple of list of str and bool
        What the template writes before, between and after the contents, and whether it needs these
        as lists of parts.

    Raises
    ------
    TemplateError
        If the template fails in both ways, or leaves out a turn.
    """
    contents = [message["content"] for message in conversation]
    errors = []
    for takes_parts in (False, True):
        try:
            written = _write(template, variables, name, conversation, takes_parts)
        except TemplateError as error:
            errors.append(error)
            continue
        gaps = _gaps_between(contents, written)
        if gaps is not None:
            return gaps, takes_parts
        left_out = [content for content in contents if content not in written] or ["their order"]
        errors.append(
            TemplateError(
                f"{name}: expected a chat template that writes questions and given answers word "
                f"for word, got one that leaves out or changes {left_out} of {contents}; {_ADVICE}"
            )
        )
    # Report the failure with plain texts, which is what the caller gave.
    raise errors[0]


def _write(
    template: str,
    variables: Mapping[str, Any],
    name: str,
    messages: Sequence[Mapping[str, str]],
    takes_parts: bool,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render messages by a template; an error names the tokenizer and says what to do."""
    turns = [dict(message) for message in messages]
    if takes_parts:
        for turn in turns:
            turn["content"] = [{"type": "text", "text": turn["content"]}]
    try:
        return render_template(
            template, turns, variables=variables, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise TemplateError(f"{name}: {error}; {_ADVICE}") from None


def _gaps_between(contents: Sequence[str], written: str) -> list[str] | None:
    """Return the texts before, between and after some contents in what a template has written.

    Return None if a content is missing, or they are in another order.
    """
    gaps = []
    rest = written
    for content in contents:
        gap, found, rest = rest.partition(content)
        if not found:
            return None
        gaps.append(gap)
    return [*gaps, rest]


def _missing_before_answer(prompt: str, before_answer: str) -> str | None:
    """Return what has to be added to a prompt so that it ends like the text before an answer.

    Differences in white space do not count, nor does a thought that only the prompt has. Return
    None if `before_answer` does not begin like the prompt.
    """
    missing = _continuation(prompt, before_answer)
    if missing is None:
        prompt = _without_thoughts(prompt)
        missing = _continuation(prompt, _without_thoughts(before_answer))
    if missing is None:
        return None
    if not missing.strip():
        return ""
    return missing.lstrip() if prompt[-1:].isspace() else missing


def _continuation(beginning: str, text: str) -> str | None:
    """Return the rest of a text that has this beginning, up to white space; None if it has not."""
    characters = "".join(beginning.split())
    if not characters:
        return text
    pattern = r"\s*" + r"\s*".join(re.escape(character) for character in characters)
    match = re.match(pattern, text)
    return None if match is None else text[match.end() :]


def _without_thoughts(text: str) -> str:
    """Remove thoughts with their marks. A thought that does not end is removed to the end."""
    for begin, end in _THOUGHTS:
        while match := re.search(begin, text):
            before, after_mark = text[: match.start()], text[match.end() :]
            _, _, after_thought = after_mark.partition(match.expand(end))
            text = before + after_thought
    return re.sub(_END_WITHOUT_BEGINNING, "", text)


def _open_thought(text: str) -> tuple[str, str] | None:
    """Return the mark that would end an open thought, and its content so far; None if none is."""
    for begin, end in _THOUGHTS:
        for match in re.finditer(begin, text):
            content, end_mark = text[match.end() :], match.expand(end)
            if end_mark not in content:
                return end_mark, content
    return None


class Passage(NamedTuple):
    """A part of an answer's text without blanks at its ends: a thought, or what is said."""

    start: int
    end: int
    is_thought: bool


def passages_of(answer: str) -> list[Passage]:
    """Divide an answer into its thoughts, without their marks, and what is said outside of them.

    A thought that does not end goes on to the end of the text. What stands before an end mark that
    has no beginning is a thought as well: the chat template may have written the beginning.
    """
    passages = []
    place = 0
    while place < len(answer):
        begins = [
            (match, match.expand(end))
            for begin, end in _THOUGHTS
            if (match := re.compile(begin).search(answer, place))
        ]
        begin, end_mark = min(begins, key=lambda found: found[0].start(), default=(None, ""))
        until = len(answer) if begin is None else begin.start()
        lone_end = re.compile(_END_WITHOUT_BEGINNING).search(answer, place, until)
        if lone_end:
            passages.append(Passage(place, lone_end.start(), True))
            place = lone_end.end()
            continue
        passages.append(Passage(place, until, False))
        if begin is None:
            break
        end = answer.find(end_mark, begin.end())
        end = len(answer) if end < 0 else end
        passages.append(Passage(begin.end(), end, True))
        place = end + len(end_mark)
    return [
        _trimmed(passage, answer) for passage in passages if answer[slice(*passage[:2])].strip()
    ]


def _trimmed(passage: Passage, answer: str) -> Passage:
    text = answer[passage.start : passage.end]
    start = passage.start + len(text) - len(text.lstrip())
    return Passage(start, start + len(text.strip()), passage.is_thought)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:40] + " ... " + text[-30:])
