"""From a text or a conversation to the tokens of a prompt, by the tokenizer's own chat template."""

from collections.abc import Iterable
from typing import Any

from dlk_utils.errors import ChoiceError, DataError, ParameterError
from dlk_utils.questions.turns import turn_format


def tokenize(
    tokenizer: Any, texts: Iterable[str], *, chat: bool = False, system: str | None = None
) -> list[list[int]]:
    """Turn texts into the token ids that `activations` and the other passes take.

    Parameters
    ----------
    tokenizer
        Any tokenizer of transformers.
    texts
        The texts. Control tokens that are spelt out in them are read as control tokens.
    chat
        Whether each text is what a user says. It is then rendered by the tokenizer's chat template,
        up to where the assistant's turn begins.
    system
        Text of a system turn before the user's, with `chat=True` only. Where the chat template has
        no system turn, this text is put at the beginning of the user's turn.

    Returns
    -------
    list of list of int
        Token ids of each text, with exactly one token for the beginning of the text where the
        tokenizer adds one, and none at the end.

    Raises
    ------
    DataError
        If `texts` is a single text, or if one of them is not a text or gives no token.
    ParameterError
        If there is a `system` turn without `chat=True`, or it is not a text.
    TemplateError
        If `chat=True` and the tokenizer has no chat template.
    """
    if isinstance(texts, str):
        raise DataError(f"texts: expected a list of texts, got one text ({texts[:40]!r})")
    if system is not None and not chat:
        raise ParameterError("system: expected chat=True with a system turn, got chat=False")
    if system is not None and not isinstance(system, str):
        raise ParameterError(f"system: expected a text, got {system!r}")
    if not isinstance(texts, Iterable):
        raise DataError(f"texts: expected a list of texts, got {texts!r}")
    token_ids = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"texts: expected a list of texts, got {text!r} as text {number}")
        if chat:
            turns = [] if system is None else [{"role": "system", "content": system}]
            text = render_chat(tokenizer, [*turns, {"role": "user", "content": text}])
        token_ids.append(encode_prompt(tokenizer, text))
        if not token_ids[-1]:
            raise DataError(
                f"texts: expected at least one token in each, got none in text {number}"
            )
    return token_ids


def render_chat(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Render a conversation by the tokenizer's chat template, up to where the answer begins.

    Where the chat template refuses a system turn, or drops it silently, its text heads the first
    user turn. Where it does not begin the assistant's turn, that is begun as the template does for
    an answer that was given. A thought that it begins is closed, empty as it is.

    Raises
    ------
    TemplateError
        If the tokenizer has no chat template, if that fails, takes too long or writes too much, if
        it leaves out a turn, or if it is unclear where the answer begins.
    """
    return turn_format(tokenizer).render(messages)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a prompt, with exactly one BOS where the tokenizer adds one.

    It makes no difference whether the chat template has already written it.
    """
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos]:
        return ids
    adds_bos = tokenizer("a").input_ids[:1] == [bos]
    return [bos, *ids] if adds_bos else ids


def written_tokens(
    tokenizer: Any, prompt: str, choice: str, *, prompt_ids: list[int] | None = None
) -> list[int]:
    """Return the tokens of a choice as it would be written after a prompt.

    It follows at once where the prompt ends in white space, and after a space elsewhere.
    `prompt_ids` are the prompt's tokens, if they are known. Raises `ChoiceError` if these change
    when the choice follows.
    """
    before = encode_prompt(tokenizer, prompt) if prompt_ids is None else prompt_ids
    gap = "" if prompt[-1:].isspace() else " "
    ids = encode_prompt(tokenizer, f"{prompt}{gap}{choice}")
    if ids[: len(before)] != before or len(ids) == len(before):
        raise ChoiceError(
            f"expected choice {choice!r} to begin with a token of its own after {prompt[-20:]!r}; "
            "end the template's prefix with a whole word"
        )
    return ids[len(before) :]
