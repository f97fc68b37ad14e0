"""Whether a probe carries over, on states in which it is known whether it does."""

import numpy as np
import pandas as pd
import pytest

from dlk_utils.lab.tables.carry_over import example_curve, transfer_matrix
from dlk_utils.lab.tables.headlines import with_each_mistake

D = 30


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Three data sets of twins: `a` and `b` hold the class in one direction, `c` in the opposite one; lie rows hold it as truth rows do."""
    rng = np.random.default_rng(0)
    t = pd.DataFrame(
        [
            {
                "example_id": f"{d}{i}",
                "dataset": d,
                "y": int(rng.integers(2)),
                "split": ("train", "validation", "test")[i % 3],
            }
            for d in "abc"
            for i in range(180)
        ]
    )
    return pd.concat(
        [t.assign(role=r, row_id=t.example_id + r) for r in ("truth", "lie")], ignore_index=True
    )


@pytest.fixture(scope="module")
def features(rows) -> dict:
    rng, direction = np.random.default_rng(1), np.eye(D)[4]
    sign = rows.dataset.map({"a": 1, "b": 1, "c": -1}).to_numpy()
    held = dict(
        zip(
            rows.row_id,
            rng.normal(size=(len(rows), D))
            + 6 * ((rows.y - 0.5) * sign).to_numpy()[:, None] * direction,
            strict=True,
        )
    )
    noise = dict(zip(rows.row_id, rng.normal(size=(len(rows), D)), strict=True))
    return {
        ("activation", "resid_post", k): (
            lambda some, table=table: np.stack([table[i] for i in some.row_id])
        )
        for k, table in ((3, noise), (7, held))
    }


def test_the_matrix_shows_what_carries_over_what_turns_round_and_which_layer_holds_it(
    rows, features
):
    table = transfer_matrix(rows, "dataset", features, n_boot=200)
    cell = table.set_index(["trained_on", "tested_on"])
    assert (table.layer.head(9) == 7).all() and len(
        table
    ) == 9 + 3  # of opposite ones together nothing is left to choose by
    for one, other in (("a", "a"), ("a", "b"), ("b", "a"), ("c", "c")):
        assert cell.low[one, other] > 0.85
    for one, other in (("a", "c"), ("c", "b")):
        assert cell.high[one, other] < 0.15  # inverted, and shown so
    assert cell.high["all others", "c"] < 0.15
    assert (
        (table.n == 60).all()
        and cell.n_train["a", "b"] == 60
        and cell.n_train["all others", "a"] == 120
    )


def test_a_group_with_too_few_rows_of_a_class_is_left_out(rows, features):
    few = rows[(rows.dataset != "b") | (rows.y == 1)]
    table = transfer_matrix(few, "dataset", features, n_boot=50)
    assert "b" not in set(table.trained_on) | set(table.tested_on) and {
        "a",
        "c",
        "all others",
    } == set(table.trained_on)


def test_no_example_of_the_test_rows_was_trained_on(rows, features):
    seen = []
    watched = {
        k: (lambda some, f=f: seen.append(set(some.example_id)) or f(some))
        for k, f in features.items()
    }
    transfer_matrix(rows, "dataset", watched, n_boot=10)
    splits = rows.set_index("example_id").split
    assert all(splits[list(s)].nunique() == 1 for s in seen)


def test_more_examples_help_and_all_of_them_are_the_last_point(rows, features):
    some = rows[rows.dataset != "c"]
    curve = example_curve(some, features, sizes=(4, 16, 64), probes=("logistic", "mean_difference"))
    assert list(curve.n_train) == [4, 16, 64, 120] * 2
    for _, t in curve.groupby("probe"):
        assert t.estimate.iloc[-1] > 0.95 and t.estimate.iloc[0] < t.estimate.iloc[-1]
        assert (
            (t.least <= t.estimate).all()
            and (t.estimate <= t.most).all()
            and list(t.draws) == [5, 5, 5, 1]
        )


def test_with_too_few_rows_every_table_is_empty_and_no_error(rows, features):
    few = (
        rows.groupby(["role", "split"])
        .head(3)
        .assign(knows=True, answer=lambda t: t.y, lied=lambda t: t.role == "lie")
    )
    assert (
        len(transfer_matrix(few, "dataset", features))
        == len(example_curve(few, features))
        == len(with_each_mistake(few, features))
        == 0
    )
    one = rows[rows.y == 1].assign(knows=True, answer=lambda t: t.y, lied=lambda t: t.role == "lie")
    assert (
        len(transfer_matrix(one, "dataset", features))
        == len(example_curve(one, features))
        == len(with_each_mistake(one, features))
        == 0
    )
