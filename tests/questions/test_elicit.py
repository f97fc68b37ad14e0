import json

import numpy as np
import pandas as pd
import pytest
from conftest import byte_tokenizer

from dlk_utils.evaluation.behaviour import lie_strength
from dlk_utils.lab.tables.lie_rate import (
    doubling_down,
    doubling_down_gap,
    knowledge_levels,
    other_table,
    shots_effects,
    shots_table,
)
from dlk_utils.questions.elicit import (
    ASKS,
    OTHERS,
    SHOTS,
    follow_up_prompts,
    other_prompts,
    shots_grid_prompts,
)
from dlk_utils.questions.examples import load_examples


def answered(wrong, n: int = 40) -> pd.DataFrame:
    """A grid in which the answer to example i under (asks, shots) is wrong if `wrong(i, asks, shots)`."""
    rows = [
        dict(
            example_id=f"e{i}",
            dataset="d",
            template=f"t{i % 10}",
            asks=a,
            shots_say=s,
            correct=not wrong(i, a, s),
            readable=True,
        )
        for i in range(n)
        for a in ASKS
        for s in SHOTS
    ]
    return pd.DataFrame(rows)


def effect(table, name):
    return table[(table.dataset == "all") & (table.effect == name)].iloc[0]


def test_a_model_that_obeys_the_instruction_alone_shows_no_effect_of_shots():
    found = shots_effects(answered(lambda i, a, s: a == "lie"))
    assert (
        effect(found, "instruction").estimate == 1
        and effect(found, "shots").estimate == 0
        and effect(found, "any shots").estimate == 0
    )


def test_a_model_that_copies_the_shots_shows_no_effect_of_the_instruction():
    found = shots_effects(answered(lambda i, a, s: s == "lie"))
    assert effect(found, "shots").estimate == 1 and effect(found, "instruction").estimate == 0


def test_a_model_that_needs_both_obeys_the_instruction_only_with_shots():
    found = shots_effects(answered(lambda i, a, s: a == "lie" and s == "lie"))
    assert (
        effect(found, "together").estimate == 1
        and effect(found, "instruction").estimate == 0
        and effect(found, "instruction, with shots").estimate == 0.5
    )


def test_shots_of_any_kind_that_make_it_worse_are_seen_as_that_and_not_averaged_into_the_instruction():
    found = shots_effects(answered(lambda i, a, s: i % 2 == 0 if s != "none" else a == "lie"))
    assert (
        effect(found, "instruction").estimate == 1
        and effect(found, "instruction, with shots").estimate == 0
        and effect(found, "any shots").estimate == 0.5
        and effect(found, "shots").estimate == 0
    )


def test_an_answer_that_cannot_be_read_is_neither_right_nor_wrong():
    answers = answered(lambda i, a, s: i % 5 < 2)  # wrong in .4 whatever is asked and shown
    mute = (answers.shots_say == "none") & answers.example_id.str[1:].astype(int).mod(3).gt(0)
    found = shots_effects(answers.assign(readable=~mute))
    some = effect(found, "any shots")
    assert (
        some.estimate == 0
        and some.n
        == answers.example_id[~mute & (answers.shots_say == "none")].nunique()
        < answers.example_id.nunique()
    )
    assert effect(found, "shots").n == answers.example_id.nunique()
    none = effect(shots_effects(answers.assign(readable=answers.shots_say != "none")), "any shots")
    assert none.n == 0 and np.isnan(none.estimate)


def test_where_no_answer_can_be_read_nothing_is_asked_again(grid):
    again = follow_up_prompts(
        grid.head(4).assign(answer=0, correct=True, knows=True, readable=False), byte_tokenizer()
    )
    assert again.empty and doubling_down(again).empty and doubling_down_gap(again) == {}


def test_the_interval_of_an_effect_is_over_templates_whose_examples_share_their_shots():
    found = effect(
        shots_effects(answered(lambda i, a, s: a == "lie" and i % 10 < 5, n=400)), "instruction"
    )
    assert (
        found.estimate == 0.5 and found.estimate_high - found.estimate_low > 0.4
    )  # ten templates, of which half obey: over 400 examples the interval would be a fifth of that


def test_an_effect_by_chance_has_an_interval_that_holds_zero():
    rng = np.random.default_rng(0)
    found = shots_effects(answered(lambda i, a, s: rng.random() < 0.5, n=80))
    assert all(r.estimate_low < 0 < r.estimate_high for r in found.itertuples())


def test_the_table_has_every_combination_with_its_interval():
    table = shots_table(answered(lambda i, a, s: a == "lie"))
    assert (
        len(table[table.dataset == "all"]) == len(ASKS) * len(SHOTS)
        and (table.wrong_rate_low <= table.wrong_rate).all()
        and (table.wrong_rate <= table.wrong_rate_high).all()
    )


@pytest.fixture(scope="module")
def grid() -> pd.DataFrame:
    return shots_grid_prompts(
        load_examples("capitals", 20), byte_tokenizer(), n_examples=8, n_shots=2, context=10**6
    )


def test_the_nine_prompts_of_an_example_share_template_and_shots(grid):
    assert (grid.groupby("example_id").size() == 9).all() and grid.example_id.nunique() == 8
    assert (grid.groupby("example_id").template.nunique() == 1).all() and (
        grid.groupby(["example_id", "asks"]).instruction.nunique() == 1
    ).all()
    assert (
        grid[grid.shots_say != "none"]
        .groupby("example_id")
        .shots.agg(lambda s: s.map(tuple).nunique())
        == 1
    ).all()


def test_the_shots_say_what_the_condition_says_whatever_is_asked(grid):
    pool = load_examples("capitals", 20).set_index("example_id")
    for r in grid[grid.shots_say != "none"].itertuples():
        said = [
            m["content"].removeprefix(r.prefix).strip()
            for m in json.loads(r.messages)
            if m["role"] == "assistant"
        ]
        labels = [pool.label[s] for s in r.shots]
        assert said == [
            r.choices[label if r.shots_say == "truth" else 1 - label] for label in labels
        ]


def test_the_instruction_of_the_grid_never_hides_in_the_shots(grid):
    assert not grid.instruction.str.endswith("_shown").any()


def test_too_few_shots_give_an_empty_grid():
    examples = load_examples("capitals", 20)
    assert shots_grid_prompts(
        examples[examples.split != "shot"], byte_tokenizer(), context=10**6
    ).empty


def test_what_it_gets_right_in_another_form_or_only_with_shots_is_shown_apart():
    right = {"a": (True, True), "b": (True, False), "c": (False, False), "d": (False, False)}
    rows = [
        dict(
            example_id=e,
            dataset="d",
            role=role,
            asks="lie" if role == "lie" else "truth",
            shots=[],
            correct=c,
            readable=True,
        )
        for e, (one, two) in right.items()
        for role, c in (("truth", one), ("known", two), ("lie", False))
    ]
    grid = pd.DataFrame(
        [
            dict(example_id=e, asks="truth", shots_say=s, correct=e in ok, readable=True)
            for s, ok in (("truth", "ac"), ("none", "ab"))
            for e in right
        ]
    )
    found = knowledge_levels(pd.DataFrame(rows), grid)
    assert found.level.to_dict() == {
        "a": "always",
        "b": "in another form",
        "c": "only with shots",
        "d": "never",
    }
    shown = pd.DataFrame(rows).assign(
        correct=True, shots=[["s"]] * len(rows)
    )  # a run with shots: what it says without them is in the grid alone
    assert knowledge_levels(shown, grid).level.to_dict() == {
        "a": "always",
        "b": "always",
        "c": "only with shots",
        "d": "never",
    }
    assert found.right_with_shots.sum() == 2 and found.right_without.to_dict() == {
        "a": True,
        "b": True,
        "c": False,
        "d": False,
    }


def test_prompts_that_ask_for_neither_and_riddles_that_only_shots_reveal():
    rows = other_prompts(
        load_examples("capitals", 20), byte_tokenizer(), n_examples=8, context=10**6
    )
    plain, riddles = rows[rows.asks.isin(OTHERS)], rows[~rows.asks.isin(OTHERS)]
    assert (
        (plain.groupby("example_id").asks.agg(set) == set(OTHERS)).all()
        and plain.shots.map(len).eq(0).all()
        and plain.example_id.nunique() == 8
    )
    assert (
        len(riddles)
        and riddles.instruction.str.endswith("_shown").all()
        and riddles.shots.map(len).eq(2).all()
        and set(riddles.asks) == {"truth", "lie"}
    )
    answers = rows.assign(readable=True, correct=rows.asks != "lie", p1=0.9, mass=1.0)
    table = other_table(answers).set_index("asks")
    assert (
        table.loc["riddle, shots reveal lie", "wrong_rate"] == 1
        and table.loc["random", "wrong_rate"] == 0
        and table.loc["random", "n"] == 8
        and table.n.sum() == len(rows)
    )


def test_it_is_asked_again_in_the_same_conversation_with_the_answer_it_gave(grid):
    some = grid.head(4).assign(
        answer=[0, 1, 0, 1], correct=[True, True, False, False], knows=True, readable=True
    )
    assert (
        follow_up_prompts(some.assign(readable=[True, False, True, True]), byte_tokenizer()).shape[
            0
        ]
        == 3
    )  # what gave no answer cannot be asked about it
    again = follow_up_prompts(some, byte_tokenizer())
    longest = int(again.input_ids.map(len).max())
    assert (
        len(follow_up_prompts(some, byte_tokenizer(), context=longest - 1)) < 4
        and follow_up_prompts(some, byte_tokenizer(), context=9).empty
    )  # what does not fit is not asked
    for before, after in zip(some.itertuples(), again.itertuples(), strict=True):
        assert (
            after.prompt.startswith(before.prompt.removesuffix(before.prefix).rstrip("\n")[:200])
            and f"{before.prefix} {before.choices[before.answer]}".strip() in after.prompt
        )
        assert (after.label, after.choices) == (int(before.correct), ["no", "yes"])
    assert again.row_id.is_unique and not set(again.row_id) & set(some.row_id)


def test_doubling_down_counts_known_rows_by_what_was_asked_and_whether_it_was_true():
    again = pd.DataFrame(
        [
            dict(asks="lie", first_correct=False, first_knows=k, readable=True, answer=a)
            for k, a in ((True, 1), (True, 0), (True, 1), (False, 0))
        ]
    )
    [row] = doubling_down(again).itertuples()
    assert (row.n, row.answer) == (3, "was false") and row.says_true == pytest.approx(2 / 3)


def test_standing_by_a_lie_is_measured_against_standing_by_the_truth():
    rows = [
        dict(
            example_id=f"e{i}",
            asks=a,
            first_correct=a == "truth",
            first_knows=True,
            readable=True,
            answer=int(i % 4 < 3),
        )
        for i in range(80)
        for a in ("truth", "lie")
    ]
    same = doubling_down_gap(pd.DataFrame(rows))
    assert same["gap"] == 0 and same["lies"] == 0.75 and same["low"] <= 0 <= same["high"]
    owns_up = doubling_down_gap(
        pd.DataFrame(rows).assign(answer=lambda t: (t.asks == "truth").astype(int))
    )
    assert (
        owns_up["gap"] == -1
        and owns_up["high"] < 0
        and doubling_down_gap(pd.DataFrame(rows)[lambda t: t.asks == "truth"]) == {}
    )


def test_a_lie_is_unambiguous_by_the_probability_of_what_was_said():
    p1 = [0.1, 0.4, 0.9, 0.6]
    rows = pd.DataFrame(
        [
            dict(role="lie", readable=True, p1=p, knows=True, lied=lied, correct=not lied)
            for p, lied in zip(p1, (True, True, False, True), strict=True)
        ]
    )
    found = lie_strength(rows)
    assert (found["unambiguous lies %"], found["ambiguous lies %"], found["told to lie"]) == (
        25.0,
        50.0,
        4,
    )
