"""Identity and split of an example: both follow from its content alone."""

import hashlib
import re

_ASKED = {"shot": 10, "train": 25, "validation": 8, "test": 17}


_SPLITS = (
    {"organism": 40} | _ASKED
)  # per cent of the hash space; `organism`, of embedded sets only, trains models and is asked nowhere


def example_id(text: str, choice_0: str = "", choice_1: str = "") -> str:
    """Hash of the normalised content (case, white space and punctuation do not count, signs such as < and - before a number do; the label is not part of it)."""
    norm = "\x1f".join(
        " ".join(re.findall(r"\w+|[<>=+]|-(?=\d)", s.casefold())) or s
        for s in (text, choice_0, choice_1)
    )
    return hashlib.sha256(norm.encode()).hexdigest()[:16]


def split_of(key: str, *, embedded: bool = True) -> str:
    """The split that an `example_id` belongs to, by hash alone: the same in every run, for every model. Only what is embedded trains an organism."""
    shares = _SPLITS if embedded else _ASKED
    bucket = int(hashlib.sha256(f"split:{key}".encode()).hexdigest(), 16) % sum(shares.values())
    for name, share in shares.items():
        bucket -= share
        if bucket < 0:
            return name
    raise AssertionError("no split holds the bucket")
