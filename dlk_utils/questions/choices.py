"""From the words of a choice to the token ids that count as it, and to the model's margin between two choices."""

import functools
from collections.abc import Sequence

import pandas as pd

from dlk_utils.errors import ChoiceError


def choice_token_ids(
    tokenizer,
    choices: Sequence[str],
    written: Sequence[Sequence[int]] | None = None,
    *,
    where: str = "these choices",
) -> tuple[list[int], list[int]]:
    """First-token ids of the spelling variants of two choices.

    The word as given, after a space and on a new line always counts, and so does the token with which it begins where it is `written`
    (the tokens of each choice after its prompt); lower case and capitalised only if they are one token (the first piece of a rarer
    spelling could begin any word), and not of a single letter (the word *a* is no choice A). Raises `ChoiceError` when the two sets share a token: such a pair reads the model's next word, not
    its choice.
    """
    begun = (
        [without_blank_tokens(tokenizer, w)[:1] for w in written]
        if written
        else [[] for _ in choices]
    )
    sets = [sorted({*spellings(tokenizer, c), *b}) for c, b in zip(choices, begun, strict=True)]
    shared = set(sets[0]) & set(sets[1])
    if len(choices) != 2 or shared or not all(sets):
        tokens = ", ".join(repr(tokenizer.decode([i])) for i in sorted(shared)) or "none"
        raise ChoiceError(
            f"{where}: expected two choices that differ in their first token, got {list(choices)} (shared first tokens: {tokens})"
        )
    return sets[0], sets[1]


def whole_choice_token_ids(
    tokenizer,
    choices: Sequence[str],
    written: Sequence[Sequence[int]],
    *,
    where: str = "these choices",
) -> list[list[list[int]]]:
    """Token sequences of each choice, first the one written, then other spellings: for choices that only differ further on.

    Raises `ChoiceError` if a choice is blank, or if one choice's tokens begin the other's, whose probability would then include it.
    """
    if not all(without_blank_tokens(tokenizer, w) for w in written):
        raise ChoiceError(f"{where}: expected two choices with a word in each, got {list(choices)}")
    variants = [[list(w)] for w in written]
    for found, word in zip(variants, choices, strict=True):
        for spelling in (word.lower(), word[:1].upper() + word[1:]):
            ids = tokenizer(
                (" " if tokenizer.decode(found[0])[:1] == " " else "") + spelling,
                add_special_tokens=False,
            ).input_ids
            found += [ids] if ids not in found else []
    for a in variants[0]:
        for b in variants[1]:
            if a[: len(b)] == b or b[: len(a)] == a:
                raise ChoiceError(
                    f"{where}: expected two choices of which neither begins the other, got {list(choices)}"
                )
    return variants


def require_first_token_choices(rows: pd.DataFrame, what: str) -> None:
    """Raises `ChoiceError`, by template, if `rows` has choices that are scored by all their tokens: the margin at the next token says nothing of them."""
    whole = rows[rows.choice_tokens.notna()] if "choice_tokens" in rows else rows.head(0)
    if len(whole):
        names = ", ".join(sorted(whole.template.unique())) if "template" in whole else "unnamed"
        raise ChoiceError(
            f"{what}: expected choices that differ in their first token, got {len(whole)} of {len(rows)} rows whose choices are scored whole (templates: {names}); only 01 and 02 work with those, so use templates whose choices begin differently"
        )


def without_blank_tokens(tokenizer, ids: Sequence[int]) -> list[int]:
    """Token ids without those that are white space alone."""
    return [i for i in ids if tokenizer.decode([i]).strip()]


@functools.lru_cache(maxsize=4096)
def spellings(tokenizer, word: str) -> dict[int, str]:
    """The first tokens that count as a word, and why each does."""
    encode = lambda text: without_blank_tokens(
        tokenizer, tokenizer(text, add_special_tokens=False).input_ids
    )
    found = [
        ("as given", encode(word)[:1]),
        ("after a space", encode(" " + word)[:1]),
        ("on a new line", encode("\n" + word)[:1]),
    ]
    for case, other in (
        (("lower case", word.lower()), ("capitalised", word.capitalize())) if len(word) > 1 else ()
    ):
        found += [
            (why, ids)
            for why, ids in ((case, encode(other)), (f"{case}, after a space", encode(" " + other)))
            if len(ids) == 1
        ]
    return {ids[0]: why for why, ids in reversed(found) if ids}
