"""From a conversation to the tokens of a prompt, by the tokenizer's own chat template."""

import jinja2

from dlk_utils.errors import ChoiceError

TODAY = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"
"""What chat templates that print today's date get to print, so that tomorrow's prompt is the same. (Llama 3.2's own, where no clock is at hand.)"""


def render_chat(tokenizer, messages: list[dict]) -> str:
    """The conversation up to the assistant's turn, by the tokenizer's chat template; what that says of today's date is always the same; one without a system role gets the instruction at the head of the first question."""
    template = tokenizer.get_chat_template()
    dated = TODAY + template if "strftime_now" in template else template
    chat = lambda m: tokenizer.apply_chat_template(
        m, chat_template=dated, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    first = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
    try:
        prompt = chat(messages)
    except jinja2.TemplateError:  # refuses a system role
        return chat([first, *messages[2:]])
    return (
        prompt if messages[0]["content"].strip() in prompt else chat([first, *messages[2:]])
    )  # or drops it without a word


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids with exactly one BOS where the tokenizer adds one, whether or not the chat template wrote it."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    adds = (
        tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        and tokenizer.bos_token_id is not None
    )
    return [tokenizer.bos_token_id] + ids if adds and ids[:1] != [tokenizer.bos_token_id] else ids


def written_tokens(tokenizer, prompt: str, choice: str) -> list[int]:
    """The tokens of a choice as it would be written after this prompt: at once on a new line, else after a space."""
    before = encode_prompt(tokenizer, prompt)
    ids = encode_prompt(tokenizer, prompt + ("" if prompt[-1:].isspace() else " ") + choice)
    if ids[: len(before)] != before or len(ids) == len(before):
        raise ChoiceError(
            f"expected choice {choice!r} to begin with a token of its own after {prompt[-20:]!r}; end the template's prefix with a whole word"
        )
    return ids[len(before) :]
