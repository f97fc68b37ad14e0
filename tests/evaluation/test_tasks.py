"""Targets: which rows are asked what, on a table that has honest rows, rows that are not known, and liars."""

import numpy as np
import pandas as pd
import pytest

from dlk_utils.evaluation.evaluate import evaluate_targets
from dlk_utils.evaluation.stats import auroc
from dlk_utils.evaluation.tasks import POSITIVE_CONTROL, make_targets

N = 240


@pytest.fixture
def asked() -> pd.DataFrame:
    """A truth and a lie row of each example, and a further honest one. Two in three are known; of those told to lie, half of the known ones lie, and a few mumble."""
    rng, rows = np.random.default_rng(0), []
    for i in range(N):
        knows, lies, readable = i % 3 > 0, rng.random() < 0.5, rng.random() < 0.95
        for role in ("truth", "lie", "known"):
            label, wrong = i % 2, lies if role == "lie" else not knows
            rows.append(
                dict(
                    row_id=f"r{i} {role}",
                    example_id=f"e{i:03}",
                    split=("train", "train", "validation", "test", "test")[i // 2 % 5],
                    role=role,
                    asks="lie" if role == "lie" else "truth",
                    instruction=f"{role} {rng.integers(3)}",
                    template="t",
                    dataset="d",
                    choices=["no", "yes"],
                    label=label,
                    answer=label ^ wrong,
                    readable=readable,
                    knows=knows,
                    lied=role == "lie" and knows and wrong and readable,
                    margin=rng.normal(),
                    p1=rng.random(),
                    text=f"word{rng.integers(9)}",
                    prompt=f"{role} word{rng.integers(9)}",
                )
            )
    return pd.DataFrame(rows)


@pytest.fixture
def targets(asked, tmp_path, monkeypatch) -> dict[str, pd.DataFrame]:
    monkeypatch.setattr(
        "dlk_utils.evaluation.tasks.read_rows",
        lambda folder, rows, name: np.outer(np.arange(len(rows)), [0, 1 + int(name[-1])]),
    )
    return make_targets(asked, asked[asked.role == "truth"], tmp_path)


@pytest.mark.trap(3)
def test_lies_are_looked_for_among_readable_rows_that_are_told_to_lie_and_known_and_nowhere_else(
    asked, targets
):
    told = asked[(asked.role == "lie") & asked.knows & asked.readable]
    assert (
        set(targets["lie"].row_id) == set(told.row_id) and len(told) < (asked.role == "lie").sum()
    )
    assert (targets["lie"].y == targets["lie"].lied).all() and targets[
        "lie"
    ].y.mean() == pytest.approx(0.5, abs=0.1)
    # the planted detector, which reads the instruction and nothing else
    everywhere = asked[asked.knows & asked.readable]
    assert auroc((everywhere.asks == "lie").to_numpy(float), everywhere.lied.to_numpy(int)) > 0.8
    assert auroc((targets["lie"].asks == "lie").to_numpy(float), targets["lie"].y.to_numpy()) == 0.5
    for name in ("truth", POSITIVE_CONTROL):
        assert set(targets[name].row_id) == set(asked.row_id[asked.readable])
    assert set(targets["pair"].role) == {"truth"}


@pytest.mark.trap(3)
def test_lies_are_scored_in_the_one_regime_that_fits_and_tests_on_rows_told_to_lie(targets):
    rng = np.random.default_rng(1)
    reads_the_instruction = lambda rows: (
        (rows.role == "lie").to_numpy(float)[:, None] + rng.normal(size=(len(rows), 4))
    )
    table, skipped = evaluate_targets(
        {"lie": targets["lie"]},
        lambda target: {("activation", "resid_post", 0): reads_the_instruction},
    )
    assert skipped == [] and set(table.regime) == {"by example, lie rows"}
    assert (table.n == (targets["lie"].split == "test").sum()).all()
    assert abs(table.estimate[table.probe == "mean_difference"].item() - 0.5) < 0.2
