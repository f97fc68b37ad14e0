"""The headline over new splits of the examples, for two trainings of a liar."""

import numpy as np
import pandas as pd
import pytest
from planted_states import answers_with_known, read_from, twins

from dlk_utils.evaluation.controls import ASKED_AGAIN, TURNED, TWIN
from dlk_utils.lab import findings
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables.graded import PROBE
from dlk_utils.lab.tables.trainings import (
    ALL_ROWS,
    KNOWN_ROWS,
    headline_of_further_training,
    headline_over_splits,
    run_of_training,
    score_over_splits,
    trainings_compared,
)

LAYER = 3


def answers_of_a_liar(n: int = 300) -> pd.DataFrame:
    """Twins that all obey. Of five examples one is not known: asked again, its answer is wrong."""
    rows = twins(n)
    knows = rows.example_id.str[1:].astype(int) % 5 > 0
    truth = 2.0 * rows.label - 1
    return rows.assign(
        knows=knows, twin_margin=truth, asked_again_margin=truth.where(knows, -truth)
    )


def states_of(rows: pd.DataFrame, strength: float = 1.5) -> dict:
    """Noise in which the first channel holds what is true."""
    states = np.random.default_rng(0).normal(size=(len(rows), 6))
    states[:, 0] += strength * (2 * rows.label.to_numpy() - 1)
    return {
        ("activation", "resid_post", LAYER): read_from(dict(zip(rows.row_id, states, strict=True)))
    }


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rows = answers_of_a_liar()
    return score_over_splits(rows, states_of(rows), probe="mean_difference")


def test_each_split_scores_the_probe_and_its_rivals_on_the_same_rows(table):
    assert table.again.nunique() == 10
    who_of = table.groupby(["again", "where"]).who.agg(tuple).unstack()
    assert (who_of[KNOWN_ROWS].map(set) == {PROBE, TURNED, TWIN}).all()
    assert (who_of[ALL_ROWS].map(set) == {PROBE, TURNED, ASKED_AGAIN}).all()
    counts = table.groupby(["again", "where"])[["n", "n_smaller"]].nunique()
    assert (counts == 1).all(axis=None)
    assert (table.n[table["where"] == ALL_ROWS] == 100).all()
    assert table.n[table["where"] == KNOWN_ROWS].between(65, 95).all()
    scores = table.groupby(["where", "who"]).estimate
    assert scores.min()[ALL_ROWS, PROBE] > 0.9 and scores.nunique()[ALL_ROWS, PROBE] > 5
    assert scores.min()[KNOWN_ROWS, TURNED] == scores.min()[KNOWN_ROWS, TWIN] == 1
    # Asked again, what is not known is answered wrongly.
    assert scores.mean()[ALL_ROWS, ASKED_AGAIN] == pytest.approx(0.8, abs=0.05)
    assert set(table.layer[table.who == PROBE]) == {LAYER}


def test_the_summary_has_the_spread_and_the_gain_over_each_rival(table):
    summary = trainings_compared({"one": table, "two": table}).set_index(["model", "where", "who"])
    for model in ("one", "two"):
        of_model = summary.loc[model]
        assert len(of_model) == 2 * 3 and (of_model.splits == 10).all()
        assert (of_model.least <= of_model["mean"]).all()
        assert (of_model["mean"] <= of_model.greatest).all()
        gain = of_model.gain
        assert gain[KNOWN_ROWS, PROBE] == gain[ALL_ROWS, PROBE] == 0
        assert gain[KNOWN_ROWS, TWIN] < 0 < gain[ALL_ROWS, ASKED_AGAIN]
    assert trainings_compared({}).empty and trainings_compared({"none": table[:0]}).empty


def of_scores(probe: tuple[float, float], rival: float, n_smaller: int = 40) -> pd.DataFrame:
    """A table of two splits with these scores of the probe, and this one of its best rival."""
    scores = {PROBE: probe, TURNED: (rival, rival)}
    return pd.DataFrame(
        [
            {"again": again, "where": where, "who": who, "layer": 15, "estimate": score}
            | {"accuracy": 0.9, "n": 90, "n_smaller": n_smaller}
            for where in (KNOWN_ROWS, ALL_ROWS)
            for who, of_who in scores.items()
            for again, score in enumerate(of_who)
        ]
    )


FIRST = of_scores((0.9, 1.0), rival=0.99)


@pytest.mark.parametrize(
    ("second", "agrees"),
    [
        (of_scores((0.92, 0.99), rival=0.98), True),
        # It scores lower than in any split of the first one.
        (of_scores((0.6, 0.8), rival=0.98), False),
        # Here the probe is ahead of its best rival, and there behind it.
        (of_scores((0.92, 0.99), rival=0.9), False),
    ],
)
def test_trainings_agree_where_scores_and_best_rivals_do(second, agrees):
    assert findings.trainings_agree(FIRST, second) is agrees
    assert findings.trainings_agree(second, FIRST) is agrees
    lines = findings.trainings_findings({"a": FIRST, "b": second})
    assert len(lines) == 5 and ("do not agree" in lines[-1]) is not agrees
    scores = f"the probe scores 0.95 (0.90 to 1.00) and its best rival ({TURNED}) 0.99"
    assert lines[0] == f"* With a, on known rows told to lie and over 2 splits, {scores}."


@pytest.mark.parametrize(
    "tables",
    [
        {"a": FIRST},
        {"a": FIRST, "b": FIRST[:0]},
        {"a": FIRST, "b": of_scores((0.9, 1.0), rival=0.99, n_smaller=19)},
    ],
)
def test_of_one_training_or_of_few_rows_nothing_is_claimed(tables):
    assert not findings.can_compare_trainings(tables)
    assert "Nothing is claimed" in findings.trainings_findings(tables)[-1]


class AskedRun(Run):
    """A run whose prompts, answers and states are planted."""

    answers_of_prompts: pd.DataFrame

    @property
    def record(self) -> dict:
        return {"planted": True}

    @property
    def prompts(self) -> pd.DataFrame:
        return self.answers_of_prompts

    @property
    def answers(self) -> pd.DataFrame:
        return self.answers_of_prompts

    def states(self, layers):
        return states_of(self.answers_of_prompts)

    def answered_with_states(self, prompts, name, *, layers):
        return prompts, states_of(self.answers_of_prompts)


def asked_run(folder, n: int) -> AskedRun:
    run = AskedRun(n_examples=16, runs_dir=str(folder))
    vars(run)["answers_of_prompts"] = answers_with_known(twins(n))
    return run


@pytest.mark.slow
def test_a_further_training_gets_the_table_that_a_run_of_its_own_would_get(tmp_path):
    options = {"layers": [LAYER], "probe": "mean_difference"}
    further = headline_of_further_training(asked_run(tmp_path, 90), **options)
    of_run = headline_over_splits(asked_run(tmp_path, 90), **options)
    assert len(further) == 2 * 3 * 10
    pd.testing.assert_frame_equal(further, of_run)


def test_a_run_with_too_few_rows_has_an_empty_table_that_says_why(tmp_path):
    table = headline_of_further_training(asked_run(tmp_path, 9), layers=[LAYER], probe="logistic")
    assert table.empty and "expected rows of each class" in table.attrs["too_few_rows"]


def test_another_training_is_asked_the_same_and_none_is_asked_without_a_name():
    run = Run(model="smollm2-liar", n_examples=16, seed=3)
    second = run_of_training(run, "smollm2-liar-2")
    assert (second.model, second.n_examples, second.seed) == ("smollm2-liar-2", 16, 3)
    assert run_of_training(run, "") is None
