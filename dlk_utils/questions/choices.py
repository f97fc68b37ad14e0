"""From the words of two choices to the token ids that count as each of them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from dlk_utils.errors import ChoiceError
from dlk_utils.questions.chat import written_tokens


class ChoiceTokens(NamedTuple):
    """The tokens that stand for the two choices after a prompt, index = label."""

    strict: list[list[int]]
    """The token with which each choice begins as it is written there."""
    first: list[list[int]]
    """All first tokens that count as each choice."""
    whole: list[list[list[int]]] | None
    """Token sequences that count as each choice; None where the first token is scored."""


def choice_tokens_after(
    tokenizer: Any,
    prompt: str,
    choices: Sequence[str],
    *,
    scoring: str = "first",
    where: str = "these choices",
    prompt_ids: list[int] | None = None,
) -> ChoiceTokens:
    """Find the tokens that stand for two choices after a prompt.

    `scoring` is that of a `templates.Template`, and `prompt_ids` the prompt's tokens, if they are
    known. Raises `ChoiceError`, which names `where`, if the
    choices cannot be told apart by it.
    """
    written = [written_tokens(tokenizer, prompt, c, prompt_ids=prompt_ids) for c in choices]
    strict = [_without_blanks(tokenizer, ids)[:1] for ids in written]
    if scoring == "whole":
        whole = whole_choice_token_ids(tokenizer, choices, written, where=where)
        return ChoiceTokens(strict, [ids[:1] for ids in written], whole)
    first = choice_token_ids(tokenizer, choices, written, where=where)
    return ChoiceTokens(strict, list(first), None)


def choice_token_ids(
    tokenizer: Any,
    choices: Sequence[str],
    written: Sequence[Sequence[int]] | None = None,
    *,
    where: str = "these choices",
) -> tuple[list[int], list[int]]:
    """Return the first tokens that count as each of two choices.

    A choice counts as given, after a space and on a new line, and by the token with which it begins
    where it is `written`. Its spellings in lower case and with a capital count only where they are
    a single token, because the first piece of a longer one could begin any word. A single letter
    counts in its own case only: the word *a* is not the choice A.

    Parameters
    ----------
    tokenizer
        Any tokenizer of transformers.
    choices
        Two texts, index = label.
    written
        The tokens of each choice as it is written after its prompt, see `written_tokens`.
    where
        What an error names, such as the data set and the template.

    Returns
    -------
    tuple of two lists of int
        Sorted token ids of choice 0 and of choice 1.

    Raises
    ------
    ChoiceError
        If there are not two choices, one has no token, or they share a token: such a pair reads the
        model's next word and not its choice.
    """
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
        raise ChoiceError(f"{where}: expected a list of two texts, got {choices!r}")
    if len(choices) != 2:
        raise ChoiceError(f"{where}: expected two choices, got {len(choices)}: {list(choices)}")
    token_sets = [set(spellings(tokenizer, choice)) for choice in choices]
    for token_set, ids in zip(token_sets, written or (), strict=False):
        token_set.update(_without_blanks(tokenizer, ids)[:1])
    shared = set.intersection(*token_sets)
    if shared or not all(token_sets):
        tokens = ", ".join(repr(tokenizer.decode([i])) for i in sorted(shared)) or "none"
        raise ChoiceError(
            f"{where}: expected two choices that differ in their first token, got {list(choices)} "
            f"(shared first tokens: {tokens})"
        )
    return sorted(token_sets[0]), sorted(token_sets[1])


def whole_choice_token_ids(
    tokenizer: Any,
    choices: Sequence[str],
    written: Sequence[Sequence[int]],
    *,
    where: str = "these choices",
) -> list[list[list[int]]]:
    """Return the token sequences that count as each of two choices that differ only further on.

    Parameters are those of `choice_token_ids`. Each choice has the sequence that is `written`, and
    those of its lower-case and capitalised spellings if they differ. Raises `ChoiceError` if a
    choice is blank, or if one choice's tokens begin the other's, whose probability would then
    include it.
    """
    if not all(_without_blanks(tokenizer, ids) for ids in written):
        raise ChoiceError(f"{where}: expected two choices with a word in each, got {list(choices)}")
    sequences = [[list(ids)] for ids in written]
    for variants, word in zip(sequences, choices, strict=True):
        space = " " if tokenizer.decode(variants[0])[:1] == " " else ""
        for spelling in (word.lower(), word[:1].upper() + word[1:]):
            ids = tokenizer(space + spelling, add_special_tokens=False).input_ids
            if ids not in variants:
                variants.append(ids)
    for a in sequences[0]:
        for b in sequences[1]:
            shorter = min(len(a), len(b))
            if a[:shorter] == b[:shorter]:
                raise ChoiceError(
                    f"{where}: expected two choices, neither of which begins with the other, "
                    f"got {list(choices)}"
                )
    return sequences


def require_first_token_choices(rows: pd.DataFrame, what: str) -> None:
    """Raise `ChoiceError` if `rows` of `make_prompts` have choices scored by all their tokens.

    The margin between first tokens says nothing about these. The error names `what` needs the
    margin, and the templates.
    """
    if "choice_tokens" not in rows or rows.choice_tokens.isna().all():
        return
    refused = rows[rows.choice_tokens.notna()]
    names = ", ".join(sorted(refused.template.unique())) if "template" in refused else "unnamed"
    raise ChoiceError(
        f"{what}: expected choices that differ in their first token, got {len(refused)} of "
        f"{len(rows)} rows whose choices are scored by all their tokens (templates: {names}); only "
        "01 and 02 work with those, so use templates whose choices begin differently"
    )


@functools.lru_cache(maxsize=4096)
def spellings(tokenizer: Any, word: str) -> dict[int, str]:
    """Return the first tokens that count as a word, and why each of them does."""

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return _without_blanks(tokenizer, ids)

    variants = [
        ("as given", encode(word)[:1]),
        ("after a space", encode(f" {word}")[:1]),
        ("on a new line", encode(f"\n{word}")[:1]),
    ]
    cases = {"lower case": word.lower(), "capitalised": word.capitalize()} if len(word) > 1 else {}
    for case, spelling in cases.items():
        for reason, text in ((case, spelling), (f"{case}, after a space", f" {spelling}")):
            ids = encode(text)
            if len(ids) == 1:
                variants.append((reason, ids))
    # From the last to the first, so that a token keeps the first reason that was found for it.
    return {ids[0]: reason for reason, ids in reversed(variants) if ids}


def _without_blanks(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Leave out the tokens that are white space alone."""
    return [i for i in ids if tokenizer.decode([i]).strip()]
