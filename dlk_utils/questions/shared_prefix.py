"""How much two sequences, such as the tokens of two prompts, have in common at their beginning."""

from collections.abc import Sequence
from typing import Any


def shared_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items two sequences have in common at their beginning."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
