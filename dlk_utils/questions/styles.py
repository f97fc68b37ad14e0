"""The same examples in another style, to see whether a probe reads the truth or the way it is put. Ids and splits stay, so that an example and its restyled twin are always on one side."""

import re
from collections.abc import Callable

import pandas as pd


def _negated(text: str) -> str | None:
    found = re.sub(r" is (?!not\b)", " is not ", text, count=1)
    return None if found == text else found


STYLES: dict[str, tuple[Callable[[str], str | None], bool]] = {
    "negated": (_negated, True),
    "reported": (
        lambda text: (
            f"My neighbour told me about it the other day, and these were the words: {text}"
        ),
        False,
    ),
    "shouted": (str.upper, False),
    "bare": (lambda text: " ".join(re.findall(r"[\w'-]+", text.lower())), False),
}
"""name -> (the new text, or None where it has none; whether the label turns)."""


def restyled(examples: pd.DataFrame, style: str) -> pd.DataFrame:
    """Examples with new text, and the label turned where the style turns it; those that have no such form (a review cannot be negated) are left out."""
    if style not in STYLES:
        raise ValueError(f"style: expected one of {', '.join(STYLES)}, got {style!r}")
    change, turns = STYLES[style]
    some = examples[examples.kind == "claim"] if turns else examples
    out = some.assign(text=[change(t) for t in some.text])
    out = out[out.text.notna()]
    return (out.assign(label=1 - out.label) if turns else out).reset_index(drop=True)
