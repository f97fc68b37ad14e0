"""From the words of a choice to the token ids that count as it, and to the model's margin between two choices."""

import functools
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor


class ChoiceError(ValueError):
    """Two choices that a model's next token cannot tell apart."""


def choice_ids(tokenizer, choices: Sequence[str], written: Sequence[Sequence[int]] | None = None, *, where: str = "these choices") -> tuple[list[int], list[int]]:
    """First-token ids of the spelling variants of two choices.

    The word as given, after a space and on a new line always counts, and so does the token with which it begins where it is `written`
    (the tokens of each choice after its prompt); lower case and capitalised only if they are one token (the first piece of a rarer
    spelling could begin any word), and not of a single letter (the word *a* is no choice A). Raises `ChoiceError` when the two sets share a token: such a pair reads the model's next word, not
    its choice.
    """
    begun = [spelt(tokenizer, w)[:1] for w in written] if written else [[] for _ in choices]
    sets = [sorted({*spellings(tokenizer, c), *b}) for c, b in zip(choices, begun, strict=True)]
    shared = set(sets[0]) & set(sets[1])
    if len(choices) != 2 or shared or not all(sets):
        tokens = ", ".join(repr(tokenizer.decode([i])) for i in sorted(shared)) or "none"
        raise ChoiceError(f"{where}: expected two choices that differ in their first token, got {list(choices)} (shared first tokens: {tokens})")
    return sets[0], sets[1]


def whole_choices(tokenizer, choices: Sequence[str], written: Sequence[Sequence[int]], *, where: str = "these choices") -> list[list[list[int]]]:
    """Token sequences of each choice, first the one written, then other spellings: for choices that only differ further on.

    Raises `ChoiceError` if a choice is blank, or if one choice's tokens begin the other's, whose probability would then include it.
    """
    if not all(spelt(tokenizer, w) for w in written):
        raise ChoiceError(f"{where}: expected two choices with a word in each, got {list(choices)}")
    variants = [[list(w)] for w in written]
    for found, word in zip(variants, choices, strict=True):
        for spelling in (word.lower(), word[:1].upper() + word[1:]):
            ids = tokenizer((" " if tokenizer.decode(found[0])[:1] == " " else "") + spelling, add_special_tokens=False).input_ids
            found += [ids] if ids not in found else []
    for a in variants[0]:
        for b in variants[1]:
            if a[: len(b)] == b or b[: len(a)] == a:
                raise ChoiceError(f"{where}: expected two choices of which neither begins the other, got {list(choices)}")
    return variants


def refuse_whole(rows: pd.DataFrame, what: str) -> None:
    """Raises `ChoiceError`, by template, if `rows` has choices that are scored by all their tokens: the margin at the next token says nothing of them."""
    whole = rows[rows.choice_tokens.notna()] if "choice_tokens" in rows else rows.head(0)
    if len(whole):
        names = ", ".join(sorted(whole.template.unique())) if "template" in whole else "unnamed"
        raise ChoiceError(f"{what}: expected choices that differ in their first token, got {len(whole)} of {len(rows)} rows whose choices are scored whole (templates: {names}); only 01 and 02 work with those, so use templates whose choices begin differently")


def choice_logprobs(logits: Float[Tensor, "n vocab"], ids: Sequence) -> Float[Tensor, "n 2"]:
    """Log-probability of each choice at the next token: log-sum-exp over its variants, in fp32, with no epsilon.

    `ids` holds, for each row, the token ids of choice 0 and those of choice 1, as `choice_ids` gives them.
    The margin is column 1 minus column 0; the choice mass is the sum of the exponentials.
    """
    logp = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
    return torch.stack([torch.stack([logp[i, list(s)].logsumexp(0) for s in sets]) for i, sets in enumerate(ids)])


def spelt(tokenizer, ids: Sequence[int]) -> list[int]:
    """Token ids without those that are white space alone."""
    return [i for i in ids if tokenizer.decode([i]).strip()]


@functools.lru_cache(maxsize=4096)
def spellings(tokenizer, word: str) -> dict[int, str]:
    """The first tokens that count as a word, and why each does."""
    encode = lambda text: spelt(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)
    found = [("as given", encode(word)[:1]), ("after a space", encode(" " + word)[:1]), ("on a new line", encode("\n" + word)[:1])]
    for case, other in (("lower case", word.lower()), ("capitalised", word.capitalize())) if len(word) > 1 else ():
        found += [(why, ids) for why, ids in ((case, encode(other)), (f"{case}, after a space", encode(" " + other))) if len(ids) == 1]
    return {ids[0]: why for why, ids in reversed(found) if ids}
