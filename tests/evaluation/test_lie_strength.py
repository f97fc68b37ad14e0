"""Lie strength: a lie is unambiguous by the probability of the answer that was given."""

import pandas as pd

from dlk_utils.evaluation.behaviour import lie_strength


def test_a_lie_is_unambiguous_by_the_probability_of_its_answer():
    lied = [True, True, False, True]
    rows = pd.DataFrame(
        {
            "role": "lie",
            "readable": True,
            "p1": [0.1, 0.4, 0.9, 0.6],
            "knows": True,
            "lied": lied,
            "correct": [not lie for lie in lied],
        }
    )
    table = lie_strength(rows)
    assert table["unambiguous lies %"] == 25
    assert table["ambiguous lies %"] == 50
    assert table["told to lie"] == 4
