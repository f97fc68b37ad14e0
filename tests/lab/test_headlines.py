"""Each mistake raises the score where there is nothing to find: that is what makes it one."""

import numpy as np
import pandas as pd
import pytest
from planted_states import read_from, states_that_hold_y, twins

from dlk_utils.lab.findings import (
    headline_findings,
    mistake_findings,
    mistakes_in_words,
    other_model_sentence,
    raised_title,
)
from dlk_utils.lab.tables.headlines import (
    CLEAN,
    TRUTH_OF_LIES,
    survivors,
    that_raise,
    with_each_mistake,
    with_mistake_kind,
)

WIDTH = 300


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    """Scores on states that hold the example, the same in both twins, and the system prompt.

    They hold nothing of the truth. The model knows all answers, and lies when it is told to.
    """
    rng = np.random.default_rng(0)
    rows = twins(240)
    example = {example_id: 3 * rng.normal(size=WIDTH) for example_id in rows.example_id.unique()}
    of_examples = np.stack([example[example_id] for example_id in rows.example_id])
    told_to_lie = (rows.role == "lie").to_numpy()[:, None] * 2 * rng.normal(size=WIDTH)
    features = {}
    for layer in range(6):
        states = of_examples + told_to_lie + rng.normal(size=of_examples.shape)
        reader = read_from(dict(zip(rows.row_id, states, strict=True)))
        features["activation", "resid_post", layer] = reader
    return with_each_mistake(rows, features).set_index("mistake")


def test_without_a_mistake_there_is_nothing(scores):
    clean = scores.loc[CLEAN]
    assert clean.low < 0.5 and clean.high > 0.4 and clean.estimate < 0.65


def test_as_it_should_be_the_layer_is_that_of_the_truth_and_not_an_earlier_one_of_the_answer():
    rows = twins(150)
    features = {
        ("activation", "resid_post", 1): states_that_hold_y(
            rows.assign(y=rows.answer), 1.0, seed=1
        ),
        ("activation", "resid_post", 2): states_that_hold_y(rows, 1.0, seed=2),
    }
    assert with_each_mistake(rows, features).set_index("mistake").estimate[CLEAN] > 0.9


@pytest.mark.trap(40)
def test_choosing_on_test_raises_the_score_and_choosing_the_sign_too_never_lowers_it(scores):
    chosen_on_test = scores.estimate["layer chosen on the test rows"]
    sign_too = scores.estimate["layer and sign chosen on the test rows"]
    assert chosen_on_test >= scores.estimate[CLEAN]
    assert sign_too >= max(0.5, chosen_on_test)


@pytest.mark.trap(5)
def test_twins_on_both_sides_make_a_score_out_of_nothing(scores):
    assert scores.low["split by row, twins on both sides"] > 0.6


@pytest.mark.trap(3)
def test_honest_rows_next_to_lies_let_the_probe_read_the_system_prompt(scores):
    assert scores.estimate["honest rows among the lies"] > 0.99


def test_only_the_first_row_is_as_it_should_be(scores):
    kinds = with_mistake_kind(scores.reset_index()).kind
    assert list(kinds) == ["as it should be"] + ["with a mistake"] * (len(scores) - 1)


def test_each_score_says_what_it_claims_and_each_mistake_what_is_wrong_with_that(scores):
    assert scores.claim[CLEAN] == TRUTH_OF_LIES and scores.but[CLEAN] == ""
    assert (scores.drop(CLEAN).claim.str.len() > 0).all()
    assert (scores.drop(CLEAN).but.str.len() > 0).all()


def mistakes_table(**intervals: tuple[float, float, float]) -> pd.DataFrame:
    """Scores with their intervals, the clean one first."""
    rows = [
        {"mistake": CLEAN if name == "clean" else name, "claim": "truth", "but": "it is not"}
        | {"estimate": estimate, "low": low, "high": high, "n": 53, "n_smaller": 26}
        for name, (estimate, low, high) in intervals.items()
    ]
    return pd.DataFrame(rows)


AT_CHANCE = mistakes_table(
    clean=(0.59, 0.43, 0.75), a=(0.61, 0.51, 0.78), b=(0.81, 0.65, 0.95), c=(0.98, 0.95, 1.0)
)


def test_a_mistake_raises_the_score_if_its_whole_interval_is_above_the_clean_one():
    assert list(that_raise(AT_CHANCE).mistake) == ["b", "c"]
    below = mistakes_table(clean=(0.3, 0.2, 0.4), a=(0.45, 0.4, 0.5), b=(0.6, 0.52, 0.7))
    assert list(that_raise(below).mistake) == ["b"]


def test_title_and_findings_count_mistakes_by_the_same_rule():
    title = raised_title(AT_CHANCE)
    assert title == (
        "0.59 [0.43, 0.75] without a mistake. 2 of 3 mistakes raise the score, to 0.98 at most (c)"
    )
    clean, *raised = mistake_findings({"m": AT_CHANCE})
    assert clean == "* Without a mistake, m scores 0.59 [0.43, 0.75], n = 53 (smaller class 26)."
    assert raised[0] == (
        "* With *b*, m scores 0.81 [0.65, 0.95] instead of 0.59 [0.43, 0.75]. The two "
        "intervals overlap. This looks like the score of a probe of truth, but it is not."
    )
    assert len(raised) == 2
    none = mistakes_table(clean=(0.95, 0.9, 0.99), a=(0.96, 0.94, 1.0))
    assert raised_title(none).endswith(". 0 of 1 mistakes raise the score")
    assert raised_title(none.head(0)) == "not scored"
    [line] = mistake_findings({"m": none.head(0)})
    assert line == "* m: there are too few rows of one class, so nothing was scored."


def test_a_page_has_plain_words_for_the_kinds_of_mistakes_and_for_all_that_scores_look_like(scores):
    table = with_mistake_kind(scores.reset_index())
    shown = mistakes_in_words(table)
    assert shown.mistake[0] == "none" and list(shown.mistake[1:]) == list(table.mistake[1:])
    assert set(shown.kind) == {"without a mistake", "with a mistake"}
    assert shown.claim.str.match("a (probe|detector) of ").all()
    assert (shown.estimate == table.estimate).all()


def test_mistakes_that_could_not_be_made_on_a_model_are_named(scores):
    table = survivors({}, {})
    every = scores.reset_index()
    without_lies = every[every.mistake != "honest rows among the lies"]
    _, line = headline_findings(table, {"m": every})
    assert "could not be tried" not in line
    _, line = headline_findings(table, {"m": without_lies})
    assert line.endswith(
        "*honest rows among the lies* could not be tried, because one class has too few rows."
    )


def test_the_other_model_is_said_to_know_only_what_passes():
    gate = pd.DataFrame(
        {"dataset": ["a", "b"], "truth_accuracy": [0.49, 0.6], "passes": [False, False]}
    )
    nothing = other_model_sentence("plain", gate)
    assert "on plain, which knows none of the data sets (told to tell the truth, it" in nothing
    assert "it answers 49 % to 60 % of the questions correctly). The knowledge gate" in nothing
    some = other_model_sentence("plain", gate.assign(passes=[False, True]))
    assert some.endswith("on plain, on the data sets that it knows: b.")


def test_with_too_few_rows_the_table_is_empty_and_says_why():
    rows = twins(9)
    table = with_each_mistake(rows, {})
    assert table.empty and "claim" in table and "too_few_rows" in table.attrs
