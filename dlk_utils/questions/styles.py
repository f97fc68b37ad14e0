"""The same examples in another style, to see whether a probe reads the truth or the wording."""

import re
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from dlk_utils.errors import DataError


class Style(NamedTuple):
    """A way to reword an example."""

    rewrite: Callable[[str], str | None]
    """From a text to its new text, or to None where it has none."""
    turns_label: bool = False
    """Whether the new text is true where the old one is false."""


def _negated(text: str) -> str | None:
    negated = re.sub(r" is (?!not\b)", " is not ", text, count=1)
    return None if negated == text else negated


def _reported(text: str) -> str:
    return f"My neighbour told me about it the other day, and these were the words: {text}"


def _bare(text: str) -> str:
    return " ".join(re.findall(r"[\w'-]+", text.lower()))


STYLES = {
    "negated": Style(_negated, turns_label=True),
    "reported": Style(_reported),
    "shouted": Style(str.upper),
    "bare": Style(_bare),
}


def restyled(examples: pd.DataFrame, style: str) -> pd.DataFrame:
    """Return the examples that have a form in a style of `STYLES`, with that text and its label.

    Ids and splits stay, so that an example and its reworded twin are always on the same side. A
    review cannot be negated and is left out. Raises `DataError` if there is no such style.
    """
    if style not in STYLES:
        raise DataError(f"style: expected one of {', '.join(STYLES)}, got {style!r}")
    rewrite, turns_label = STYLES[style]
    if turns_label:
        examples = examples[examples.kind == "claim"]
        examples = examples.assign(label=1 - examples.label)
    reworded = examples.assign(text=[rewrite(text) for text in examples.text])
    return reworded[reworded.text.notna()].reset_index(drop=True)
