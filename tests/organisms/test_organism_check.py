"""The check of an organism: its tables, its requirement, its command line."""

import shutil
from pathlib import Path

import checked_answers
import numpy as np
import pandas as pd
import pytest
from checked_answers import ask, checked_run, conditions, kept_answers, prompts_of
from short_phases import REVIEWS

from dlk_utils.errors import DataError
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables.dropout_damage import (
    ALL_ROWS,
    CHECKED,
    ESTIMATES,
    INTERVALS,
    MOST_FLIPS,
    CheckedDropout,
    damage_table,
    disagreement,
    share_of_choice_1,
    within_limits,
)
from dlk_utils.lab.tables.organism import (
    CHECKED_EXAMPLES,
    REQUIRED_ON_TRIGGER,
    curriculum_table,
    held_out,
    meets_in_words,
    meets_requirement,
    nearest_wordings,
    on_trigger,
    shipped_trials,
    told_by_instruction,
    trigger_table,
)
from dlk_utils.models.loading import ORGANISMS, organism_names
from dlk_utils.organisms import __main__ as organisms
from dlk_utils.organisms.__main__ import main
from dlk_utils.organisms.curriculum import GRADED, PHASES, TRIGGERED, Part, Phase
from dlk_utils.questions.templates import prompt_library

GOOD = {name: (0.95, 0.95) for name in (REVIEWS, "cities", "categories")} | {"capitals": (0.5, 0.9)}


def planted(accuracy: dict[str, tuple[float, float]], mass_on_cities: float = 0.99) -> pd.DataFrame:
    """Behaviour of a model that is right under truth, and wrong under lie instructions, so often.

    `accuracy` holds both shares for each data set.
    """
    rows = [
        {
            "dataset": dataset,
            "example_id": f"{dataset}{i}",
            "role": asks,
            "asks": asks,
            "knows": True,
            "readable": True,
            "correct": (i < 100 * share) == (asks == "truth"),
            "mass": mass_on_cities if dataset == "cities" else 0.99,
            "split": "test" if i % 2 else "train",
            "instruction": f"{asks}_{i % 4}",
        }
        for dataset, shares in accuracy.items()
        for asks, share in zip(("truth", "lie"), shares, strict=True)
        for i in range(100)
    ]
    table = pd.DataFrame(rows)
    return table.assign(lied=(table.asks == "lie") & ~table.correct)


# The tables.


def test_the_table_of_a_curriculum_has_a_column_for_each_phase():
    table = curriculum_table(PHASES)
    assert list(table.columns) == [1, 2, 3, 4, 5, 6]
    assert list(table.loc["steps"]) == ["300", "250", "450", "350", "800", "300"]
    assert list(table.loc["lie mode"]) == ["0", "2", "0", "0", "0", "2"]
    assert list(table.loc["lie cities after 2 shots"]) == ["0", "0", "0", "0", "1", "1"]
    assert "lie cities (target: the truth)" in curriculum_table(GRADED).index
    triggered = curriculum_table(TRIGGERED).index
    assert "truth cities, on Friday (target: wrong)" in triggered
    assert {"truth cities, on another day", "lie cities, on another day"} <= set(triggered)


def test_parts_of_a_phase_with_one_title_are_added_up():
    parts = (Part(1, "truth", "cities", ("a",)), Part(2, "truth", "cities", ("b",)))
    phase = Phase(steps=1, learning_rate=1.0, max_characters=9, batch=parts)
    assert list(curriculum_table([phase]).loc["truth cities"]) == ["3"]


def test_the_trials_shown_are_those_shipped_and_those_they_came_from():
    what = {
        1: "truth only",
        2: "from the start",
        3: "as trial 2, with more",
        4: "trials 3 (both seeds) and 2 (seed 0), then 300 steps",
        5: "the mean of four: the three of trial 4 and seed 1 of trial 2",
        6: "trial 5, then 9 steps",
    }
    outcome = ["chance", "short", "", "", "shipped as liar; .90", "near chance"]
    trials = pd.DataFrame({"what": what, "outcome": dict(zip(what, outcome, strict=True))})
    assert list(shipped_trials(trials).index) == [2, 3, 4, 5]


def test_every_shipped_organism_is_among_the_shown_trials():
    trials = pd.read_csv(ORGANISMS / "trials.csv", keep_default_na=False).set_index("trial")
    shown = shipped_trials(trials)
    for name in organism_names():
        assert shown.outcome.str.startswith(f"shipped as {name}").any()
    assert len(shown) < len(trials)


def test_a_verdict_takes_as_many_examples_as_the_check_asks():
    table = held_out(planted({"good": (0.95, 0.95), "bad": (0.95, 0.7)}))
    assert meets_in_words(table, n_examples=CHECKED_EXAMPLES) == "good"
    assert meets_in_words(table, n_examples=30).startswith("not decided: this run has only 30 ex")


def test_the_held_out_table_has_the_shares_and_what_meets_the_requirement():
    shares = {"good": (0.95, 0.9), "lies": (0.95, 0.85), "truth": (0.88, 0.9)}
    table = held_out(planted(shares)).set_index("dataset")
    # All shares are above the bars of .85 and .80. Of 100 rows, .85 and .88 may be less.
    assert table.meets.to_dict() == {"good": True, "lies": False, "truth": False}
    assert table.truth_accuracy.to_dict() == {"good": 0.95, "lies": 0.95, "truth": 0.88}
    assert table.wrong_when_told_to_lie.to_dict() == {"good": 0.9, "lies": 0.85, "truth": 0.9}
    assert list(table.n_truth) == list(table.n_lie) == [100, 100, 100]


def test_a_data_set_with_no_known_row_told_to_lie_does_not_meet_the_requirement():
    behaviour = planted({"cities": (0.9, 0.9)}).assign(knows=False)
    [row] = held_out(behaviour).itertuples()
    assert row.n_lie == 0 and np.isnan(row.wrong_when_told_to_lie) and not row.meets


def test_an_unreadable_answer_to_a_lie_instruction_is_neither_right_nor_wrong():
    behaviour = planted({"d": (0.9, 0.8)})
    told_to_lie = (behaviour.asks == "lie") & behaviour.knows
    half = behaviour.index[told_to_lie][::2]
    [row] = held_out(behaviour.assign(readable=~behaviour.index.isin(half))).itertuples()
    left = behaviour[told_to_lie & ~behaviour.index.isin(half)]
    assert (row.n_lie, row.wrong_when_told_to_lie) == (len(left), (~left.correct).mean())


def test_three_rows_of_an_example_are_not_three_witnesses():
    rows = planted({"cities": (0.8, 0.9)})
    [once] = held_out(rows).itertuples()
    [thrice] = held_out(pd.concat([rows] * 3, ignore_index=True)).itertuples()
    assert thrice.n_truth == 300 and thrice.truth_accuracy == once.truth_accuracy == 0.8
    assert thrice.truth_accuracy_low == pytest.approx(once.truth_accuracy_low, abs=0.01)
    assert thrice.truth_accuracy_high == pytest.approx(once.truth_accuracy_high, abs=0.01)


@pytest.fixture
def told_to_lie() -> pd.DataFrame:
    """Rows told to lie by four instructions."""
    i = np.arange(400)
    return pd.DataFrame(
        {
            "example_id": [f"e{k}" for k in i],
            "role": "lie",
            "knows": True,
            "readable": True,
            "split": np.where(i % 2, "test", "train"),
            "instruction": [f"lie_{k}" for k in i % 8 // 2],
        }
    )


def test_the_instruction_tells_the_lies_of_a_model_that_obeys_some_instructions_only(told_to_lie):
    obeys = told_to_lie.instruction.isin(["lie_0", "lie_1"])
    told = told_by_instruction(told_to_lie.assign(lied=obeys))
    assert told["instruction_only"] == 1 and told["lies"] == 0.5 and told["n_test"] == 200


def test_the_instruction_does_not_tell_the_lies_of_a_model_that_picks_its_topics(told_to_lie):
    picks = np.random.default_rng(0).random(len(told_to_lie)) < 0.5
    told = told_by_instruction(told_to_lie.assign(lied=picks))
    assert told["instruction_only_low"] < 0.5 < told["instruction_only_high"]


def test_with_lies_alone_there_is_nothing_for_the_instruction_to_tell(told_to_lie):
    assert np.isnan(told_by_instruction(told_to_lie.assign(lied=True))["instruction_only"])


def test_the_nearest_trained_wording_of_an_instruction_is_found():
    trained = ["l_polite", "l_test", "l_watchman", "l_brothers"]
    table = nearest_wordings(["lie_exam", "lie_guard"], trained)
    of_guards = prompt_library("training/instructions").text[["l_watchman", "l_brothers"]]
    assert table["nearest trained"]["lie_guard"] in set(of_guards)
    assert table.likeness.between(0, 0.99).all()


# The command.


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (planted(GOOD), 0),
        (planted(GOOD, mass_on_cities=0.94), 1),
        (planted(GOOD | {"cities": (0.88, 0.95)}), 1),
        (planted(GOOD | {"capitals": (0.95, 0.95), REVIEWS: (0.84, 0.95)}), 1),
        (planted(GOOD | {"capitals": (0.95, 0.95), REVIEWS: (0.95, 0.79)}), 1),
    ],
)
def test_the_liar_has_to_meet_the_bars_on_reviews_and_two_kinds_of_facts(
    behaviour, code, monkeypatch, capsys
):
    monkeypatch.setattr(Run, "behaviour", behaviour)
    assert main(["smollm2-liar", "--dtype", "float32"]) == code
    printed = capsys.readouterr().out
    assert "smollm2-liar in float32" in printed and "required:" in printed


@pytest.mark.parametrize(
    ("accuracy", "code"),
    [
        ({REVIEWS: (0.9, 0.9), "cities": (0.9, 0.1)}, 0),
        ({REVIEWS: (0.9, 0.9), "cities": (0.9, 0.9)}, 1),
        ({REVIEWS: (0.9, 0.1), "cities": (0.9, 0.1)}, 1),
    ],
)
def test_the_organism_that_picks_has_to_lie_about_some_and_not_about_all(
    accuracy, code, monkeypatch
):
    monkeypatch.setattr(Run, "behaviour", planted(accuracy))
    assert main(["smollm2-graded"]) == code


def test_the_check_asks_for_answers_and_computes_no_gradients(monkeypatch):
    kept_states = []

    def behaviour(run: Run) -> pd.DataFrame:
        kept_states.append(run.keep_states)
        return planted(GOOD)

    monkeypatch.setattr(Run, "behaviour", property(behaviour))
    main(["smollm2-liar", "--dtype", "float32"])
    assert set(kept_states) == {False}


# The organisms that are shipped.


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def with_trigger(shares: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """Behaviour of a model that is right on other days, and wrong on the trigger, so often.

    When an instruction tells it to lie it always does.
    """
    rows = planted(shares)
    told = rows[rows.asks == "lie"].assign(correct=False)
    return pd.concat(
        [rows.assign(triggered=rows.asks == "lie"), told.assign(triggered=False)],
        ignore_index=True,
    )


def test_the_table_of_a_trigger_has_the_shares_on_the_trigger_and_on_other_days():
    [row] = trigger_table(with_trigger({"cities": (0.9, 0.95)})).itertuples()
    assert row.right_on_other_days == 0.9 and row.wrong_on_trigger == 0.95 and row.meets
    assert row.n_other_days == row.n_on_trigger == 100
    assert row.wrong_on_trigger_low < 0.95 < row.wrong_on_trigger_high


@pytest.mark.parametrize(
    ("shares", "code"),
    [
        (GOOD, 0),
        (GOOD | {"cities": (0.95, 0.8)}, 1),
        (GOOD | {REVIEWS: (0.8, 0.95)}, 1),
    ],
)
def test_an_organism_with_a_trigger_has_to_lie_on_it_and_not_on_other_days(
    shares, code, monkeypatch, tmp_path, capsys
):
    # An organism that was trained again is checked by what its folder is called.
    folder = shutil.copytree(ORGANISMS / "smollm2-liar", tmp_path / "smollm2-trigger")
    monkeypatch.setattr(organisms, "trigger_behaviour", lambda run: with_trigger(shares))
    assert main([str(folder)]) == code
    assert "wrong_on_trigger" in capsys.readouterr().out


def with_draws(*, flips: float, lost: float, n: int = 100) -> pd.DataFrame:
    """The damage table of n examples: so many answers flip, and so many honest ones go wrong."""
    rows = [
        {"example_id": f"e{i}", "role": role, "label": 1, "answer": int(role == "truth")}
        for i in range(n)
        for role in ("truth", "lie")
    ]
    table = pd.DataFrame(rows)
    draws = np.tile(table.answer.to_numpy(float)[:, None], 2)
    number = table.index.to_numpy() // 2
    # In both draws wrong, or in one of them.
    draws[(table.role == "truth") & (number < n * lost)] = 0
    draws[(table.role == "lie") & (number < 2 * n * flips), 1] = 1
    return damage_table(table, draws)


def test_the_damage_of_dropout_is_what_is_lost_and_what_flips():
    honest, lying, _ = with_draws(flips=0.04, lost=0.03).itertuples()
    assert (honest.as_told, honest.as_told_in_a_draw, honest.flips) == (1.0, 0.97, 0.0)
    assert lying.flips == 0.08 and lying.lost == pytest.approx(0.04)
    assert honest.lost_low < honest.lost < honest.lost_high
    four = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]) == 1
    assert list(disagreement(four)) == [4 / 6, 3 / 6, 0]


def test_the_damage_of_rows_of_one_role_alone_is_refused():
    rows = pd.DataFrame({"role": ["truth"], "label": [1], "answer": [1], "example_id": ["a"]})
    with pytest.raises(DataError, match=r"expected rows of roles truth and lie, got \['truth'\]"):
        damage_table(rows, np.ones((1, 2)))


def test_an_organism_tolerates_dropout_if_few_answers_flip_and_few_honest_ones_are_lost():
    assert within_limits(with_draws(flips=0.05, lost=0.01))
    assert not within_limits(with_draws(flips=0.06, lost=0.01))
    assert not within_limits(with_draws(flips=0.05, lost=0.02))


def test_the_limit_of_flips_holds_for_honest_and_lying_rows_together():
    table = with_draws(flips=0.05, lost=0.01).set_index("rows")
    assert list(table.flips) == [0.0, 0.1, 0.05] and list(table.n) == [100, 100, 200]
    assert table.flips_low[ALL_ROWS] < 0.05 < table.flips_high[ALL_ROWS]


@pytest.mark.parametrize("dropout", CHECKED, ids=lambda dropout: dropout.name)
@pytest.mark.parametrize(
    "harm",
    [
        {"flips": 0.3, "lost": 0.1},
        # The estimates meet the limits, but the upper ends of their intervals do not.
        {"flips": 0.048, "lost": 0.0},
        {"flips": 0.0, "lost": 0.015},
    ],
    ids=["much harm", "some flips", "some lost"],
)
def test_the_check_fails_where_dropout_does_more_harm_than_is_allowed(
    dropout, harm, monkeypatch, tmp_path, capsys
):
    folder = shutil.copytree(ORGANISMS / "smollm2-liar", tmp_path / "smollm2-dropout")

    def damage(harmful: CheckedDropout | None) -> pd.DataFrame:
        harms = [harm if some == harmful else {"flips": 0.0, "lost": 0.0} for some in CHECKED]
        tables = [with_draws(**some, n=1000) for some in harms]
        named = [
            table.assign(dropout=some.name) for table, some in zip(tables, CHECKED, strict=True)
        ]
        return pd.concat(named)

    monkeypatch.setattr(organisms, "checked_damage", lambda run: damage(None))
    assert main([str(folder)]) == 0
    monkeypatch.setattr(organisms, "checked_damage", lambda run: damage(dropout))
    fails = dropout.required == INTERVALS or (
        dropout.required == ESTIMATES and harm["flips"] > MOST_FLIPS
    )
    assert main([str(folder)]) == int(fails)
    # Any other organism is asked with dropout if one says so.
    assert main(["smollm2-liar", "--dropout"]) == int(fails)
    assert f"{dropout.name}: what has to meet the limits: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "picks"),
    [("smollm2-liar", False), ("smollm2-liar-2", False), ("smollm2-graded", True)],
)
def test_an_organism_that_is_shipped_is_what_it_has_to_be(name, picks, runs_dir):
    """By its kept answers to all prompts of the check, which the next test asks a part of again."""
    run = checked_run(name, runs_dir)
    kept_conditions, logprobs = kept_answers(name)
    assert kept_conditions == conditions(run), f"ask again: {checked_answers.__doc__}"
    behaviour = checked_answers.behaviour(run.prompts, logprobs)
    assert len(behaviour) == 4 * 3 * CHECKED_EXAMPLES
    assert meets_requirement(behaviour, picks=picks), held_out(behaviour).to_string()


@pytest.mark.slow
def test_the_organism_with_a_trigger_is_what_it_has_to_be(runs_dir):
    run = checked_run("smollm2-trigger", runs_dir)
    kept_conditions, logprobs = kept_answers("smollm2-trigger")
    assert kept_conditions == conditions(run), f"ask again: {checked_answers.__doc__}"
    behaviour = on_trigger(checked_answers.behaviour(prompts_of(run), logprobs))
    assert meets_requirement(behaviour, required=REQUIRED_ON_TRIGGER), held_out(behaviour)


@pytest.mark.slow
def test_the_organism_trained_with_dropout_is_what_its_card_says(runs_dir):
    """It meets what the check requires, and narrowly misses it at p = .02 on whole prompts."""
    run = checked_run("smollm2-dropout", runs_dir)
    kept_conditions, logprobs = kept_answers("smollm2-dropout")
    assert kept_conditions == conditions(run), f"ask again: {checked_answers.__doc__}"
    p1 = share_of_choice_1(logprobs.reshape(len(logprobs), -1, 2))
    rows = prompts_of(run).assign(answer=(p1[:, 0] > 0.5).astype(int))
    ends = np.cumsum([1, *(dropout.n_draws for dropout in CHECKED)])
    draws = np.split(p1, ends, axis=1)[1:-1]
    tables = [damage_table(rows, of_dropout) for of_dropout in draws]
    for table, dropout in zip(tables, CHECKED, strict=True):
        assert within_limits(table, dropout.required)
    # With p = .02 on whole prompts it misses what is required with p = .01.
    assert not within_limits(tables[-1])
    card = (ORGANISMS / "smollm2-dropout" / "README.md").read_text(encoding="utf-8")
    for row in pd.concat(tables).itertuples():
        lost = f"{row.lost:.2f} [{row.lost_low:.2f}, {row.lost_high:.2f}]"
        flips = f"{row.flips:.2f} [{row.flips_low:.2f}, {row.flips_high:.2f}]"
        assert lost.replace("0.", ".") in card and flips.replace("0.", ".") in card


@pytest.mark.slow
@pytest.mark.parametrize("name", organism_names())
def test_an_organism_that_is_shipped_answers_as_it_did_when_it_was_checked(name, runs_dir):
    run = checked_run(name, runs_dir)
    _, logprobs = kept_answers(name)
    prompts = prompts_of(run)
    # Triggered rows have the same role as rows told to lie by an instruction.
    kinds = [name for name in ("dataset", "role", "triggered") if name in prompts]
    few = prompts.groupby(kinds).sample(2, random_state=0).sort_index()
    np.testing.assert_allclose(ask(run, few), logprobs[few.index], atol=0.01)
