"""How much two sequences have in common at their beginning."""

import pytest

from dlk_utils.questions.shared_prefix import shared_prefix_length


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [
        ([1, 2, 3], [1, 2, 4, 5], 2),
        ([1, 2], [1, 2, 3], 2),
        ((7,), [7], 1),
        ([1], [2, 1], 0),
        ([], [1], 0),
    ],
)
def test_only_the_beginning_counts(one, other, length):
    assert shared_prefix_length(one, other) == shared_prefix_length(other, one) == length
