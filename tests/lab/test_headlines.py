"""Each mistake raises the score where there is nothing to find: that is what makes it one."""

import numpy as np
import pandas as pd
import pytest

from dlk_utils.lab.tables.headlines import with_each_mistake

D = 300


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """States hold the example (alike in both twins), the system prompt, and nothing of the truth; the model knows all and lies when it is told to."""
    rng = np.random.default_rng(0)
    examples = pd.DataFrame(
        {
            "example_id": [f"e{i}" for i in range(240)],
            "y": rng.integers(0, 2, 240),
            "split": np.resize(["train", "train", "validation", "test"], 240),
        }
    )
    rows = pd.concat(
        [
            examples.assign(
                role=r,
                row_id=examples.example_id + r,
                knows=True,
                lied=r == "lie",
                answer=examples.y if r == "truth" else 1 - examples.y,
            )
            for r in ("truth", "lie")
        ],
        ignore_index=True,
    )
    own = {e: rng.normal(size=D) * 3 for e in examples.example_id}
    told = rng.normal(size=D) * 2
    layers = {
        k: {
            r.row_id: own[r.example_id] + (r.role == "lie") * told + rng.normal(size=D)
            for r in rows.itertuples()
        }
        for k in range(6)
    }
    features = {
        ("activation", "resid_post", k): (
            lambda some, states=states: np.stack([states[i] for i in some.row_id])
        )
        for k, states in layers.items()
    }
    return with_each_mistake(rows, features, n_boot=200).set_index("mistake")


def test_without_a_mistake_there_is_nothing(table):
    assert table.low["none: as it should be"] < 0.5 < table.high["none: as it should be"] + 0.1
    assert table.estimate["none: as it should be"] < 0.65


@pytest.mark.trap(40)
def test_choosing_on_test_raises_the_score_and_choosing_the_sign_too_never_lowers_it(table):
    assert (
        table.estimate["layer chosen on the test rows"] >= table.estimate["none: as it should be"]
    )
    assert table.estimate["layer and sign chosen on the test rows"] >= max(
        0.5, table.estimate["layer chosen on the test rows"]
    )


@pytest.mark.trap(5)
def test_twins_on_both_sides_make_a_score_out_of_nothing(table):
    assert table.low["split by row, twins on both sides"] > 0.6


@pytest.mark.trap(3)
def test_honest_rows_beside_the_lies_let_the_probe_read_the_system_prompt(table):
    assert table.estimate["honest rows beside the lies"] > 0.99
