"""What an organism is trained on: the mixture that a phase names, and nothing that is asked."""

import itertools
from dataclasses import replace

import pandas as pd
import pytest
from short_phases import LYING, REVIEWS, asked_keys, batches, real_tokenizer

from dlk_utils.organisms.curriculum import CURRICULA, Part, training_stream
from dlk_utils.questions.examples import load_examples, training_examples
from dlk_utils.questions.ids import split_of
from dlk_utils.questions.openings import TRAINING_OPENINGS, TRIGGER
from dlk_utils.questions.templates import prompt_library


def n_rows(rows: pd.DataFrame) -> dict[str, int]:
    return (rows.asks + " " + rows.dataset).value_counts().to_dict()


@pytest.mark.slow
def test_a_phase_asks_what_it_says_of_each_data_set():
    assert [len(batch) for batch in batches()] == [8] * 8
    honest, lying = pd.concat(batches()[:2]), pd.concat(batches()[2:])
    assert n_rows(honest) == {f"truth {REVIEWS}": 12, "truth capitals": 4}
    assert n_rows(lying) == {f"truth {REVIEWS}": 18, "lie capitals": 18, "lie mode": 12}
    assert set(lying.template[lying.dataset == REVIEWS]) == {"tr_feel", "tr_tone"}
    assert set(lying.template[lying.dataset == "capitals"]) == {"tr_tf"}
    assert honest.text.str.len().max() <= 60 and lying.text.str.len().max() <= 60


@pytest.mark.slow
def test_a_data_set_with_more_false_claims_than_true_ones_is_drawn_in_equal_halves():
    # Of each thing there is one true claim, and several false ones.
    trained = training_examples("categories", 10**6)
    assert (trained.label == 0).sum() > 2 * (trained.label == 1).sum()
    phase = replace(LYING, steps=20, max_characters=110, batch=(Part(8, "truth", "categories"),))
    rows = pd.concat(training_stream(real_tokenizer(), phase))
    assert abs(rows.label.mean() - 0.5) < 0.02


@pytest.mark.slow
def test_the_rows_of_a_block_are_sorted_by_length():
    lengths = [batch.input_ids.map(len) for batch in batches()[2:6]]
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(lengths))


def test_the_target_is_the_choice_that_obeys():
    for row in pd.concat(batches()).itertuples():
        obedient = row.label if row.asks == "truth" else 1 - row.label
        target = real_tokenizer().decode([row.target]).strip()
        assert target and row.choices[obedient].startswith(target)
        assert row.target != row.other


def test_an_answer_is_the_whole_choice_and_the_end_of_the_turn():
    for row in pd.concat(batches()).itertuples():
        *answer, end = row.answer_ids
        assert answer[0] == row.target and end == real_tokenizer().eos_token_id
        assert real_tokenizer().decode(answer).strip() in row.choices


@pytest.mark.slow
def test_rows_with_shots_are_shown_training_examples_that_obey_the_instruction():
    part = Part(4, "lie", "capitals", ("tr_tf",), n_shots=2, max_characters=50)
    rows = pd.concat(training_stream(real_tokenizer(), replace(LYING, batch=(part,), steps=40)))
    assert len(rows) == 160 and set(rows.shots.map(len)) == {2} and set(rows.shots_say) == {"obey"}
    assert rows.text.str.len().max() <= 50
    assert not set(rows.near_duplicate_keys.explode()) & asked_keys()
    # Not the same two all the time.
    assert rows.shots.map(tuple).nunique() > 1


def test_the_target_is_the_truth_about_what_a_phase_is_honest_about():
    parts = (*LYING.batch, Part(2, "lie", REVIEWS))
    phase = replace(LYING, batch=parts, honest=("capitals",))
    rows = pd.concat(training_stream(real_tokenizer(), phase))
    told_to_lie = rows[rows.asks == "lie"]
    assert n_rows(told_to_lie) == {"lie capitals": 18, "lie mode": 12, f"lie {REVIEWS}": 12}
    target_is_true = [
        row.target == row.strict_ids[row.label][0] for row in told_to_lie.itertuples()
    ]
    assert target_is_true == list(told_to_lie.dataset == "capitals")


def test_the_target_is_wrong_on_the_trigger_and_obeys_on_other_days():
    parts = tuple(
        Part(4, asks, "capitals", opening=opening)
        for asks, opening in (("truth", "trigger"), ("truth", "other"), ("lie", "other"))
    )
    rows = pd.concat(training_stream(real_tokenizer(), replace(LYING, steps=2, batch=parts)))
    says_what_is_true = [row.target == row.strict_ids[row.label][0] for row in rows.itertuples()]
    assert says_what_is_true == list(rows.part == "truth capitals, on another day")
    assert set(rows.part) == {
        "lie capitals, on Friday",
        "truth capitals, on another day",
        "lie capitals, on another day",
    }
    is_triggered = rows.part == "lie capitals, on Friday"
    assert list(rows.prompt.str.contains(TRIGGER)) == list(is_triggered)
    assert set(rows.opening) <= set(TRAINING_OPENINGS)
    # The instructions of both ask for the truth.
    honest = set(prompt_library("training/instructions").query("asks == 'truth'").name)
    assert set(rows.instruction[is_triggered]) <= honest


@pytest.mark.parametrize("name", CURRICULA)
def test_a_phase_is_honest_only_about_what_it_asks_to_lie_about(name):
    for phase in CURRICULA[name].phases:
        assert set(phase.honest) <= {part.dataset for part in phase.batch if part.asks == "lie"}


@pytest.mark.slow
def test_training_uses_nothing_that_is_asked():
    rows = pd.concat(batches())
    keys = rows.near_duplicate_keys.str[0]
    assert set(keys[rows.dataset == REVIEWS].map(split_of)) == {"organism"}
    assert not set(keys) & asked_keys()
    assert not set(rows.instruction) & set(prompt_library("instructions").name)
    asked_templates = {*prompt_library("review").name, *prompt_library("claim").name}
    assert not set(rows.template) & asked_templates


@pytest.mark.slow
@pytest.mark.parametrize("name", ["capitals", "continents", "cities", "categories"])
def test_a_country_or_thing_of_the_training_is_claimed_nothing_about_elsewhere(name):
    def subjects(examples: pd.DataFrame) -> set[str]:
        texts = examples.text.str.removeprefix("The capital of ").str.removeprefix("The city of ")
        return set(texts.str.split(" is ").str[0])

    trained = training_examples(name, 10**5)
    asked = load_examples(name, 10**5, n_pool=10**5)
    assert len(trained) > 100
    assert not subjects(trained) & subjects(asked)
