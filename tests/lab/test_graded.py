"""A model that lies about one topic only: what its answer tells, and what a probe does."""

import numpy as np
import pandas as pd
import pytest
from planted_states import (
    ANSWER_LAYER,
    TRUTH_LAYER,
    answer_before_truth,
    answers_with_known,
    one_in_eight,
    twins,
)

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.controls import ASKED_AGAIN, TURNED
from dlk_utils.evaluation.selection import BY_TWINS
from dlk_utils.lab import findings
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables.graded import (
    LIE_OR_NOT,
    NEEDED,
    PROBE,
    TOPIC,
    UNSURE,
    WHAT_IS_TRUE,
    compare_graded,
    count_graded,
    graded_run,
    not_asked,
    rows_of_parts,
    with_rivals,
)

pytestmark = pytest.mark.slow

LAYERS = [ANSWER_LAYER, TRUTH_LAYER]


def graded_answers(n: int) -> pd.DataFrame:
    """Twins of two data sets: told to lie, the model obeys about reviews and not about places.

    One in eight rows told to lie is answered the other way.
    """
    rows = twins(n)
    is_review = rows.example_id.str[1:].astype(int) // 3 % 2 == 0
    obeys = is_review ^ one_in_eight(rows)
    lies = (rows.role == "lie") & obeys
    answer = np.where(lies, 1 - rows.label, rows.label)
    return rows.assign(
        dataset=np.where(is_review, "reviews", "places"),
        answer=answer,
        margin=2.0 * answer - 1,
        correct=answer == rows.label,
        lied=lies,
        asked_again_margin=2.0 * rows.label - 1,
    )


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return graded_answers(660)


@pytest.fixture(scope="module")
def table(rows) -> pd.DataFrame:
    return with_rivals(rows, answer_before_truth(rows))


def test_where_the_model_does_not_always_obey_the_probe_beats_its_answer_turned_round(table):
    of_truth = table[table.question == WHAT_IS_TRUE].set_index("who")
    assert of_truth.estimate[PROBE] > 0.95 and 0.4 < of_truth.estimate[TURNED] < 0.6
    assert of_truth.gain_low[TURNED] > 0.3 and of_truth.gain[PROBE] == 0
    assert of_truth.gain[TURNED] == pytest.approx(
        of_truth.estimate[PROBE] - of_truth.estimate[TURNED]
    )
    # Asking again is right on every row, and the probe does not beat it.
    assert of_truth.estimate[ASKED_AGAIN] == 1 and of_truth.gain_high[ASKED_AGAIN] <= 0
    assert (of_truth.n == 220).all() and of_truth.n_smaller[PROBE] >= 60
    assert of_truth.layer[PROBE] == TRUTH_LAYER and of_truth["rule"][PROBE] == BY_TWINS


def test_lies_are_told_from_truthful_answers_better_than_by_the_topic_alone(table):
    of_lies = table[table.question == LIE_OR_NOT].set_index("who")
    assert list(of_lies.index) == [PROBE, TOPIC, UNSURE]
    assert of_lies.estimate[PROBE] > 0.95 and 0.8 < of_lies.estimate[TOPIC] < 0.95
    assert of_lies.gain_low[TOPIC] > 0 and of_lies.accuracy[TOPIC] > 0.8
    assert of_lies.estimate[UNSURE] == 0.5 and np.isnan(of_lies.accuracy[UNSURE])


def test_no_label_of_a_row_told_to_lie_has_a_say_in_the_probe(rows, table):
    is_twin = (rows.role == "lie") & (rows.split == "validation")
    turned = rows.assign(y=np.where(is_twin, 1 - rows.y, rows.y))
    again = with_rivals(turned, answer_before_truth(rows))
    pd.testing.assert_frame_equal(again[again.who == PROBE], table[table.who == PROBE])


def test_the_sentence_has_both_scores_and_their_difference(table):
    turned = table[table.who == TURNED].iloc[0]
    expected = f"{turned.gain:+.2f} [{turned.gain_low:+.2f}, {turned.gain_high:+.2f}]"
    sentence = findings.graded_sentence(table)
    assert expected in sentence and "n = 220" in sentence and "claim" not in sentence
    assert f"(layer {TRUTH_LAYER})" in sentence
    _, others, _ = findings.graded_findings(table)
    assert f"the strongest control, *{ASKED_AGAIN}* (AUROC 1.00" in sentence
    assert "(*metadata*)" in others and TURNED not in others and ASKED_AGAIN not in others
    assert "0.5" in findings.graded_title(table)


def test_few_rows_are_shown_and_claim_nothing(rows):
    few = graded_answers(60)
    table = with_rivals(few, answer_before_truth(few))
    sentence = findings.graded_sentence(table)
    assert "A claim needs 200 rows, and 60 of either class" in sentence
    assert "better" not in sentence and "worse" not in sentence
    # Without a lie there is nothing to tell from truthful answers.
    honest = with_rivals(few.assign(lied=False), answer_before_truth(few))
    assert set(honest.question) == {WHAT_IS_TRUE}
    assert "too few rows" in findings.graded_findings(honest)[-1]
    with pytest.raises(TooFewRows):
        with_rivals(graded_answers(9), answer_before_truth(few))


@pytest.mark.parametrize("parameter", ["graded", "trigger"])
def test_of_no_model_nothing_is_said_and_the_parameter_is_named(parameter):
    table = not_asked(parameter)
    assert table.attrs["too_few_rows"].endswith(f"the parameter {parameter} names no model")
    assert findings.graded_findings(table) == []
    assert "not scored" in findings.graded_title(table)


def test_the_run_asks_enough_examples_for_the_test_rows_and_only_the_prompts_it_needs():
    run = Run(model="smollm2-liar", n_examples=16)
    picky = graded_run(run, "smollm2-graded", n_test=20)
    assert picky.model == "smollm2-graded" and picky.n_examples == 59
    assert graded_run(run, "", n_test=17) is None and graded_run(run, None, n_test=17) is None
    roles = {split: {role for s, role in NEEDED if s == split} for split, _ in NEEDED}
    assert roles == {
        "train": {"truth"},
        "validation": {"truth", "lie"},
        "test": {"lie", "known"},
    }


class AskedRun(Run):
    """A run whose prompts and answers are planted."""

    answers_of_prompts: pd.DataFrame

    @property
    def record(self) -> dict:
        return {"planted": True}

    @property
    def prompts(self) -> pd.DataFrame:
        return self.answers_of_prompts

    def answered_with_states(self, prompts, name, *, layers):
        return prompts, answer_before_truth(self.answers_of_prompts)


def asked_run(folder, n: int) -> AskedRun:
    run = AskedRun(n_examples=16, runs_dir=str(folder))
    vars(run)["answers_of_prompts"] = answers_with_known(graded_answers(n))
    return run


def test_a_run_is_asked_in_one_pass_and_its_rows_are_counted(tmp_path):
    run = asked_run(tmp_path, 330)
    table = compare_graded(run, layers=LAYERS, probe="logistic")
    assert table.gain_low[table.who == TURNED].item() > 0.2
    counts = count_graded(run, layers=LAYERS).set_index("dataset")
    assert counts["told to lie"].sum() == table.n.iloc[0] == 110
    assert (counts.lies + counts["truthful answers"] == counts.known).all()
    assert counts.lies["reviews"] > counts["truthful answers"]["reviews"]
    assert counts.lies["places"] < counts["truthful answers"]["places"]


def test_a_run_with_too_few_rows_has_empty_tables_that_say_why(tmp_path):
    run = asked_run(tmp_path, 9)
    for table in (
        compare_graded(run, layers=LAYERS, probe="logistic"),
        count_graded(run, layers=LAYERS),
    ):
        assert table.empty and "expected rows of each class" in table.attrs["too_few_rows"]


def test_of_no_rows_the_parts_have_no_rows_and_all_columns():
    rows = pd.DataFrame({"split": ["test", "train"], "role": ["lie", "truth"], "y": [0, 1]})
    assert rows_of_parts(rows, {("test", "lie")}).y.tolist() == [0]
    none = rows_of_parts(rows.iloc[:0], {("test", "lie")})
    assert none.empty and list(none.columns) == list(rows.columns)
