"""Reading at a follow-up question, on states of which it is known where the truth stands."""

import json

import numpy as np
import pandas as pd
import pytest
from planted_states import read_from, twins
from tiny_models import byte_tokenizer

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.controls import TURNED
from dlk_utils.evaluation.selection import BY_TWINS
from dlk_utils.lab import findings
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables.follow_up import (
    AT_ANSWER,
    DIRECT_AT,
    FITTED_OR_TESTED,
    PROBE_AT,
    SAID_AT,
    SAME,
    SEPARATE,
    compare_follow_ups,
    compare_graded_follow_ups,
    compare_places,
    joined,
)
from dlk_utils.lab.tables.graded import LIE_OR_NOT, WHAT_IS_TRUE
from dlk_utils.questions.elicit import draw_answers

LAYERS = [1, 2]


def with_own_answers(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose model obeys, but for every fourth example: there it refuses to lie."""
    numbers = pd.factorize(rows.example_id)[0]
    lies = (rows.role == "lie").to_numpy() & (numbers // 3 % 4 != 0)
    answer = np.where(lies, 1 - rows.label, rows.label)
    return rows.assign(answer=answer, margin=4.0 * answer - 2, correct=~lies, lied=lies)


def states_of(rows: pd.DataFrame, **strengths: float) -> dict:
    """States of which each layer holds one column of the rows, whose values lie so far apart."""
    features = {}
    for layer, (column, strength) in enumerate(strengths.items(), 1):
        rng = np.random.default_rng(layer)
        states = rng.normal(size=(len(rows), 6))
        states[:, 0] += strength * (rows[column].astype(float) - 0.5)
        features["activation", "resid_post", layer] = read_from(
            dict(zip(rows.row_id, states, strict=True))
        )
    return features


def asked_after(rows: pd.DataFrame, place: str, strength: float, says: np.ndarray) -> tuple:
    """Answers to follow-ups of rows, and states by layer.

    The layers hold the answer shown, which choice is right, and whether the answer shown is.
    """
    is_test = rows.split == "test"
    shown = pd.concat([draw_answers(rows[~is_test]), rows[is_test]]).loc[rows.index]
    answers = shown.assign(
        row_id=shown.row_id + place,
        first_row_id=shown.row_id,
        first_answer=shown.answer,
        truth=shown.label,
        label=shown.correct.astype(int),
        margin=says,
        readable=True,
    )
    return answers, states_of(answers, first_answer=6, truth=strength, correct=strength)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    rows = with_own_answers(twins(180))
    is_needed = [key in FITTED_OR_TESTED for key in zip(rows.split, rows.role, strict=True)]
    return rows[is_needed].reset_index(drop=True)


@pytest.fixture(scope="module")
def states(rows) -> dict:
    """At the answer, a layer holds the instruction, and another one the truth, with some noise."""
    return states_of(rows.assign(told=rows.role == "lie"), told=6, label=1.5)


@pytest.fixture(scope="module")
def follow_ups(rows) -> dict:
    """In the same conversation the states hold the truth, in a separate one the answer alone.

    There the model says yes of every answer; in the same conversation, what it says is right.
    """
    yes = np.ones(len(rows))
    right = pd.concat([draw_answers(rows[rows.split != "test"]), rows[rows.split == "test"]])
    says = np.where(right.correct.loc[rows.index], 1.0, -1.0)
    return {
        SAME: asked_after(rows, SAME, 8, says),
        SEPARATE: asked_after(rows, SEPARATE, 0, yes),
    }


@pytest.fixture(scope="module")
def table(rows, states, follow_ups) -> pd.DataFrame:
    return compare_places(rows, states, follow_ups, probe="logistic_tuned")


def of_question(table: pd.DataFrame, question: str) -> pd.DataFrame:
    return table[table.question == question].set_index("who")


@pytest.mark.parametrize("question", [WHAT_IS_TRUE, LIE_OR_NOT])
def test_where_the_state_at_the_follow_up_holds_the_truth_it_is_read_better_there(table, question):
    scores = of_question(table, question)
    same, separate = (scores.loc[PROBE_AT[place]] for place in (SAME, SEPARATE))
    assert 0.7 < scores.estimate[AT_ANSWER] < 0.97
    assert same.estimate > 0.97 and same.gain_high < 0
    assert separate.estimate < scores.estimate[AT_ANSWER] and separate.gain_low > 0
    assert (scores["rule"][[AT_ANSWER, *PROBE_AT.values()]] == BY_TWINS).all()
    assert scores.layer[AT_ANSWER] == same.layer == 2
    assert (scores.n == 60).all() and (scores.n_train == 60).all()


def test_lies_are_also_read_by_a_probe_that_learns_whether_the_answer_shown_is_true(table):
    assert not set(DIRECT_AT.values()) & set(of_question(table, WHAT_IS_TRUE).index)
    scores = of_question(table, LIE_OR_NOT)
    same, separate = (scores.loc[DIRECT_AT[place]] for place in (SAME, SEPARATE))
    assert same.layer == 3 and same["rule"] == BY_TWINS and same.estimate > 0.97
    assert same.lead_low > -0.1 and separate.estimate < 0.75


def test_a_probe_stands_beside_what_the_model_says_at_the_same_place(table):
    scores = of_question(table, WHAT_IS_TRUE)
    assert scores.estimate[SAID_AT[SAME]] == 1 and scores.lead[PROBE_AT[SAME]] <= 0
    # Who calls every answer true says the opposite of one who calls all of them false.
    always_yes = scores.estimate[SAID_AT[SEPARATE]]
    assert always_yes == pytest.approx(1 - scores.estimate[TURNED]) and always_yes < 0.4
    lead = scores.loc[PROBE_AT[SEPARATE]]
    assert lead.lead == pytest.approx(lead.estimate - always_yes)
    of_lies = of_question(table, LIE_OR_NOT)
    assert of_lies.estimate[SAID_AT[SEPARATE]] == 0.5 and TURNED not in of_lies.index
    assert (of_lies.n_smaller == 15).all()


def test_the_labels_of_rows_told_to_lie_have_no_say_in_the_probes(rows, states, follow_ups):
    def turned(answers: pd.DataFrame, column: str) -> pd.DataFrame:
        is_twin = (answers.role == "lie") & (answers.split == "validation")
        return answers.assign(**{column: answers[column].where(~is_twin, 1 - answers[column])})

    turned_follow_ups = {
        place: (turned(answers, "label"), features)
        for place, (answers, features) in follow_ups.items()
    }
    table = compare_places(rows, states, follow_ups)
    again = compare_places(turned(rows, "y"), states, turned_follow_ups)
    pd.testing.assert_frame_equal(again, table)


def test_a_row_that_one_place_does_not_ask_about_is_compared_at_none(rows, states, follow_ups):
    answers, features = follow_ups[SEPARATE]
    is_told = (rows.split == "test") & (rows.role == "lie")
    left_out = rows.row_id[is_told].iloc[:5]
    unreadable = answers.first_row_id == rows.row_id[is_told].iloc[-1]
    fewer = answers[~answers.first_row_id.isin(left_out)].assign(readable=~unreadable)
    table = compare_places(rows, states, follow_ups | {SEPARATE: (fewer, features)})
    scores = of_question(table, WHAT_IS_TRUE)
    assert (scores.n == 55).all()
    assert scores.unreadable.to_dict() == dict.fromkeys(scores.index, 0) | {SAID_AT[SEPARATE]: 1}


def test_answers_of_one_kind_are_too_few_to_learn_from(rows, states, follow_ups):
    answers, features = follow_ups[SAME]
    one_kind = {SAME: (answers.assign(label=1), features)}
    with pytest.raises(TooFewRows, match="follow-up, honest rows: expected rows of each class"):
        compare_places(rows, states, one_kind)
    with pytest.raises(TooFewRows):
        compare_places(rows[rows.split != "test"], states, follow_ups)


def test_without_a_truthful_answer_lies_are_not_told_from_them(rows, states, follow_ups):
    lied = (rows.role == "lie") & (rows.split == "test")
    table = compare_places(rows.assign(lied=lied), states, follow_ups)
    assert set(table.question) == {WHAT_IS_TRUE}


# A run.


class AskedRun(Run):
    """A run whose answers and states are planted."""

    context = 10**6

    def states(self, layers) -> dict:
        return states_of(self.prompts, answer=8, label=8)

    def answered_with_states(self, prompts, name, *, layers) -> tuple[pd.DataFrame, dict]:
        if "first_answer" not in prompts:
            return prompts, self.states(layers)
        vars(self).setdefault("asked", []).append(prompts)
        # Choice 1 is right where an answer that says so is.
        truth = np.where(prompts.label == 1, prompts.first_answer, 1 - prompts.first_answer)
        answers = prompts.assign(margin=1.0, readable=True, truth=truth)
        return answers, states_of(answers, first_answer=8, truth=8)


@pytest.fixture(scope="module")
def prompts() -> pd.DataFrame:
    """Readable answers to prompts told to tell the truth, twice, and to lie."""
    pair = twins(60)
    known = pair[pair.role == "truth"]
    known = [known.assign(role="known", row_id=known.row_id + f" {number}") for number in (1, 2)]
    rows = with_own_answers(pd.concat([pair, *known], ignore_index=True))
    messages = [
        json.dumps(
            [
                {"role": "system", "content": f"Be told: {row.role}."},
                {"role": "user", "content": f"Is it so? {row.text}"},
            ]
        )
        for row in rows.itertuples()
    ]
    return rows.assign(
        messages=messages,
        prefix="It is",
        choices=[["no", "yes"]] * len(rows),
        near_duplicate_keys=[[text] for text in rows.text],
        asks=np.where(rows.role == "lie", "lie", "truth"),
        wanted=rows.answer,
        readable=True,
        mass=1.0,
        # Of examples that are not tested it need not be asked whether the model knows the answer.
        knows=np.where(rows.split == "test", True, np.nan),
    )


def asked_run(folder, rows: pd.DataFrame) -> AskedRun:
    run = AskedRun(runs_dir=str(folder))
    planted = {"prompts": rows, "truth_rows": rows, "record": {}, "tokenizer": byte_tokenizer()}
    vars(run).update(planted)
    return run


@pytest.mark.slow
def test_a_run_shows_drawn_answers_in_honest_rows_and_its_own_in_those_that_are_tested(
    prompts, tmp_path
):
    run = asked_run(tmp_path, prompts)
    table = compare_follow_ups(run, layers=LAYERS, probe="logistic")
    scores = of_question(table, WHAT_IS_TRUE)
    assert scores.estimate[[AT_ANSWER, *PROBE_AT.values()]].min() > 0.9
    own = prompts.set_index("row_id")
    same, separate = vars(run)["asked"]
    for asked in (same, separate):
        assert set(zip(asked.split, asked.role, strict=True)) == FITTED_OR_TESTED
        is_test = asked.split == "test"
        own_answers = own.answer.loc[asked.first_row_id].to_numpy()
        assert (asked.first_answer == own_answers)[is_test].all()
        assert 0.2 < (asked.first_answer == own_answers)[~is_test].mean() < 0.8
        assert asked.groupby("example_id").first_answer.nunique().eq(1).all()
    assert same.prompt.str.contains("Be told: ").all()
    assert not separate.prompt.str.contains("Be told: ").any()
    # It is kept.
    compare_follow_ups(run, layers=LAYERS, probe="logistic")
    assert len(vars(run)["asked"]) == 2


def test_a_second_organism_is_asked_about_the_answers_that_it_has_given(prompts, tmp_path):
    run = asked_run(tmp_path, prompts.drop(columns=["y", "knows", "lied"]))
    table = compare_graded_follow_ups(run, layers=LAYERS, probe="logistic")
    assert set(table.question) == {WHAT_IS_TRUE, LIE_OR_NOT}
    n_told = int(((prompts.split == "test") & (prompts.role == "lie")).sum())
    assert (table.n == n_told).all() and len(vars(run)["asked"]) == 2


@pytest.mark.parametrize("left_out, context", [("train", 10**6), ("", 9)])
def test_a_run_with_too_few_rows_has_an_empty_table_that_says_why(
    prompts, tmp_path, left_out, context
):
    """Too few rows to fit on, or no follow-up that fits the context."""
    run = asked_run(tmp_path, prompts[prompts.split != left_out])
    vars(run)["context"] = context
    table = compare_follow_ups(run, layers=LAYERS, probe="logistic")
    assert table.empty and "expected rows of each class" in table.attrs["too_few_rows"]
    assert "asked" not in vars(run)
    both = joined({"a": table, "b": table})
    assert both.empty and both.attrs == table.attrs and "model" in both
    lines = findings.follow_up_findings({"a": table})
    assert len(lines) == 2 and all("is not known, as there are too few rows" in x for x in lines)


# What is said.


def scores(
    gains: tuple[tuple[float, float], ...], *, lead: float = -0.1, n_smaller: int = 40
) -> pd.DataFrame:
    """A table in which the probe at the answer leads those at the follow-ups by these intervals."""
    row = {"question": WHAT_IS_TRUE, "estimate": 0.8, "low": 0.7, "high": 0.9, "n": 100}
    row |= {"accuracy": 0.7, "n_smaller": n_smaller}
    row |= {"gain": 0.0, "gain_low": 0.0, "gain_high": 0.0}
    row |= {"lead": np.nan, "lead_low": np.nan, "lead_high": np.nan}
    rows = [row | {"who": AT_ANSWER}]
    for place, (low, high) in zip((SAME, SEPARATE), gains, strict=True):
        gain = {"gain": (low + high) / 2, "gain_low": low, "gain_high": high}
        rows.append(row | {"who": PROBE_AT[place], "lead_low": lead} | gain)
        rows.append(row | {"who": SAID_AT[place]})
    return pd.DataFrame(rows)


BETTER, WORSE, EQUAL = (-0.3, -0.1), (0.1, 0.3), (-0.1, 0.1)


@pytest.mark.parametrize(
    "gains, sentence",
    [
        ((BETTER, BETTER), "makes it easier to read what is true. Of 2 "),
        ((WORSE, WORSE), "makes it harder to read what is true. Of 2 "),
        (
            (BETTER, WORSE),
            "makes it clearly easier to read what is true for 1 of 2 probes, and clearly ",
        ),
        (
            (BETTER, EQUAL),
            "makes it clearly easier to read what is true for 1 of 2 probes, and clearly h",
        ),
        (
            (EQUAL, WORSE),
            "makes it clearly harder to read what is true for 1 of 2 probes, and clearly e",
        ),
        ((EQUAL, EQUAL), "makes it neither clearly easier nor clearly harder to read what is true"),
    ],
)
def test_the_finding_goes_by_the_intervals_of_the_differences(gains, sentence):
    said = findings.follow_up_finding({"m": scores(gains)}, WHAT_IS_TRUE)
    assert said.startswith(f"By AUROC, a follow-up question {sentence}")
    n_better, n_worse = gains.count(BETTER), gains.count(WORSE)
    assert f"{n_better} score clearly higher" in said and f"and {n_worse} clearly lower" in said


def test_the_finding_counts_probes_that_beat_the_words_and_models_with_enough_rows():
    better, few = scores((BETTER, BETTER), lead=0.1), scores((WORSE, WORSE), n_smaller=19)
    said = findings.follow_up_finding({"m": better, "few": few}, WHAT_IS_TRUE)
    assert said.startswith("By AUROC, a follow-up question makes it easier to read what is true. ")
    assert "clearly lower, and 2 score clearly higher than what the model says there. " in said
    assert said.endswith(
        ". Nothing is claimed about few, where one class has 19 rows, and 20 are needed"
    )
    absent = findings.follow_up_finding({"m": better, "few": few.head(0)}, WHAT_IS_TRUE)
    assert absent.endswith(". Nothing is claimed about few, which has too few rows")
    worse = findings.follow_up_finding({"m": scores((WORSE, WORSE))}, WHAT_IS_TRUE)
    assert "clearly lower, and 0 score clearly higher than what the model says there. " in worse
    assert "Nothing is claimed" not in worse


def test_the_finding_names_the_threshold_that_does_not_carry_over():
    other = scores((BETTER, BETTER))
    off = other.who == PROBE_AT[SAME]
    table = other.assign(accuracy=np.where(off, 0.51, 0.84))
    said = findings.follow_up_finding({"one": table, "other": other}, WHAT_IS_TRUE)
    assert (
        "is 0.70 to 0.84 for the probe at the answer, and 0.51 to 0.84 for probes at the " in said
    )
    assert said.endswith(f"*{PROBE_AT[SAME]}*, on one)")


def test_probes_of_whether_the_answer_was_true_count_among_those_at_the_follow_up():
    table = scores((BETTER, BETTER)).assign(question=LIE_OR_NOT)
    direct = table[table.who.isin(list(PROBE_AT.values()))]
    direct = direct.assign(who=list(DIRECT_AT.values()), estimate=[0.5, 0.6], gain_high=0.1)
    said = findings.follow_up_finding({"m": pd.concat([table, direct])}, LIE_OR_NOT)
    assert said.startswith("By AUROC, a follow-up question makes it clearly easier to tell ")
    assert ". Of 4 probes that read the state there (on m), 2 score clearly higher" in said
    assert (
        "The AUROC is 0.80 at the answer, and at the follow-up it is 0.80 for probes that "
        "learned which choice is right and 0.50 to 0.60 for probes that learned whether the answer "
        "was true. "
    ) in said


def test_each_question_has_a_finding_of_its_own():
    table = scores((WORSE, WORSE))
    both = pd.concat([table, scores((BETTER, BETTER)).assign(question=LIE_OR_NOT)])
    of_truth, of_lies = findings.follow_up_findings({"m": both})
    assert of_truth.startswith("* By AUROC, a follow-up question makes it harder to read what is ")
    assert of_lies.startswith("* By AUROC, a follow-up question makes it easier to tell lies from ")
    _, not_known = findings.follow_up_findings({"m": table})
    assert not_known == (
        "* Whether a follow-up question makes it easier to tell lies from truthful answers is not "
        "known, as there are too few rows."
    )


def test_tables_of_models_stand_below_each_other_and_one_without_rows_is_left_out(table):
    both = joined({"a": table, "b": table.iloc[:0]})
    assert set(both.model) == {"a"} and len(both) == len(table)
    assert list(joined({"a": table, "b": table}).model.unique()) == ["a", "b"]
    has_layer = both.who.isin([AT_ANSWER, *PROBE_AT.values(), *DIRECT_AT.values()])
    assert both.layer[has_layer].isin([1, 2, 3]).all() and both.layer[~has_layer].isna().all()
