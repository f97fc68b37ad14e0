"""What an example is, and its identity and split, which follow from its content alone."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd

from dlk_utils.errors import DataError

_ASKED_SHARES = {"shot": 10, "train": 25, "validation": 8, "test": 17}
_EMBEDDED_SHARES = {"organism": 40} | _ASKED_SHARES
"""Parts of the hash space that each split gets."""


@dataclass(frozen=True)
class Example:
    """A binary question with a known answer: one row of the table that `load_examples` returns."""

    example_id: str
    dataset: str
    kind: str
    """Which templates ask it, one of `templates.KINDS`."""
    text: str
    choice_0: str
    """The answer that label 0 stands for; empty where every template brings its own choices."""
    choice_1: str
    label: int
    """Index of the right choice. A claim has label 1 if it is true, a review if it is positive."""
    split: str
    near_duplicate_key: str
    """The same for examples that differ only in what `near_duplicate_key` leaves out."""
    subject: str
    """What it is about, the same for all examples that have to stay in one split.

    That is the `near_duplicate_key` of embedded examples, which are all about different things, and
    of those whose subject is not known (see `subjects`).
    """


EXAMPLE_COLUMNS = [field.name for field in fields(Example)]


def examples_of(table: pd.DataFrame) -> list[Example]:
    """Return each row of a table of examples as an `Example`, without further columns.

    Where the table has no `near_duplicate_key`, it is made of the content, and where it has no
    `subject`, that is the key. Raises `DataError` where another column is missing.
    """
    made_here = ("near_duplicate_key", "subject")
    needed = [column for column in EXAMPLE_COLUMNS if column not in made_here]
    require_columns(table, needed, "examples", "load_examples")
    contents = zip(table.text, table.choice_0, table.choice_1, strict=True)
    keys = pd.Series([near_duplicate_key(*content) for content in contents], table.index)
    if "near_duplicate_key" in table:
        keys = table.near_duplicate_key.fillna(keys)
    subjects = table.subject.fillna(keys) if "subject" in table else keys
    table = table.assign(near_duplicate_key=keys, subject=subjects)
    return [Example(*row) for row in table[EXAMPLE_COLUMNS].itertuples(index=False)]


def require_columns(table: Any, columns: Sequence[str], what: str, made_by: str) -> None:
    """Raise `DataError` if a table lacks columns; `made_by` names the step that gives them."""
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"{what}: expected a table of `{made_by}`, got a {type(table).__name__}")
    missing = [column for column in columns if column not in table]
    if missing:
        raise DataError(
            f"{what}: expected a table of `{made_by}`, got one without the columns "
            f"{', '.join(missing)}; run `{made_by}` first"
        )


def example_id(text: str, choice_0: str = "", choice_1: str = "") -> str:
    """Hash the content of an example to 16 hex digits.

    Unicode's composed and decomposed spellings (NFC), case and white space do not count; every
    other character does. The label is not part of the content.

    Case is that of `str.lower`, which knows no language. `str.casefold` would also take the German
    "Maße" (measures) for "Masse" (mass). The dotless ı of Turkish stays another letter than i.
    """
    parts = []
    for part in (text, choice_0, choice_1):
        lower = unicodedata.normalize("NFC", part).lower()
        parts.append(" ".join(unicodedata.normalize("NFC", lower).split()))
    return _hash_of_parts(parts)


def near_duplicate_key(text: str, choice_0: str = "", choice_1: str = "") -> str:
    """Hash the words of an example to 16 hex digits, the same for all that differ in less.

    Case, white space and punctuation do not count. The signs < > = +, and a minus before a digit,
    do. Other signs do not, and neither do the vowel signs of the scripts of India. So "3 = 4" and
    "3 ≠ 4", which are two examples, have one key. It decides the split, so that near-duplicates
    are never on both sides of one, and it tells what is close to a training example.
    """
    parts = []
    for part in (text, choice_0, choice_1):
        words = re.findall(r"\w+|[<>=+]|-(?=\d)", part.casefold())
        # A text of punctuation alone is kept as it is, or all of these would have one key.
        parts.append(" ".join(words) or part)
    return _hash_of_parts(parts)


def _hash_of_parts(parts: list[str]) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def split_of(near_duplicate_key: str, *, embedded: bool = True) -> str:
    """Return the split of an example, by hash alone: the same in every run and for every model.

    It is "shot" (shown solved), "train", "validation" or "test". Two fifths of the embedded data
    sets are "organism" instead: these train organisms and are never asked.
    """
    shares = _EMBEDDED_SHARES if embedded else _ASKED_SHARES
    digest = hashlib.sha256(f"split:{near_duplicate_key}".encode()).hexdigest()
    position = int(digest, 16) % sum(shares.values())
    for split, share in shares.items():
        if position < share:
            return split
        position -= share
    raise AssertionError("the shares cover every position")


def share_of(split: str) -> float:
    """Return the share of examples that a split gets: of all for "shot", else of those asked."""
    of_all = _ASKED_SHARES[split] / sum(_ASKED_SHARES.values())
    is_asked = 1 - _ASKED_SHARES["shot"] / sum(_ASKED_SHARES.values())
    return of_all if split == "shot" else of_all / is_asked
