import json

import numpy as np
import pandas as pd
import pytest
from conftest import byte_tokenizer

from dlk_utils.behaviour import lie_strength
from dlk_utils.elicit import ASKS, SHOTS, doubling_down, follow_ups, knowledge_levels, shots_effects, shots_grid, shots_table
from dlk_utils.examples import load_examples


def answered(wrong, n: int = 40) -> pd.DataFrame:
    """A grid in which the answer to example i under (asks, shots) is wrong if `wrong(i, asks, shots)`."""
    rows = [dict(example_id=f"e{i}", dataset="d", asks=a, shots_say=s, correct=not wrong(i, a, s), readable=True) for i in range(n) for a in ASKS for s in SHOTS]
    return pd.DataFrame(rows)


def effect(table, name):
    return table[(table.dataset == "all") & (table.effect == name)].iloc[0]


def test_a_model_that_obeys_the_instruction_alone_shows_no_effect_of_shots():
    found = shots_effects(answered(lambda i, a, s: a == "lie"))
    assert effect(found, "instruction").estimate == 1 and effect(found, "shots").estimate == 0 and effect(found, "interaction").estimate == 0


def test_a_model_that_copies_the_shots_shows_no_effect_of_the_instruction():
    found = shots_effects(answered(lambda i, a, s: s == "lie"))
    assert effect(found, "shots").estimate == 1 and effect(found, "instruction").estimate == 0


def test_a_model_that_needs_both_shows_an_interaction():
    found = shots_effects(answered(lambda i, a, s: a == "lie" and s == "lie"))
    assert effect(found, "interaction").estimate == 1 and effect(found, "together").estimate == 1 and effect(found, "instruction").estimate == pytest.approx(1 / 3)


def test_an_effect_by_chance_has_an_interval_that_holds_zero():
    rng = np.random.default_rng(0)
    found = shots_effects(answered(lambda i, a, s: rng.random() < 0.5, n=80))
    assert all(r.estimate_low < 0 < r.estimate_high for r in found.itertuples())


def test_the_table_has_every_combination_with_its_interval():
    table = shots_table(answered(lambda i, a, s: a == "lie"))
    assert len(table[table.dataset == "all"]) == len(ASKS) * len(SHOTS) and (table.wrong_rate_low <= table.wrong_rate).all() and (table.wrong_rate <= table.wrong_rate_high).all()


@pytest.fixture(scope="module")
def grid() -> pd.DataFrame:
    return shots_grid(load_examples("capitals", 20), byte_tokenizer(), n_examples=8, n_shots=2, context=10**6)


def test_the_nine_prompts_of_an_example_share_template_and_shots(grid):
    assert (grid.groupby("example_id").size() == 9).all() and grid.example_id.nunique() == 8
    assert (grid.groupby("example_id").template.nunique() == 1).all() and (grid.groupby(["example_id", "asks"]).instruction.nunique() == 1).all()
    assert (grid[grid.shots_say != "none"].groupby("example_id").shots.agg(lambda s: s.map(tuple).nunique()) == 1).all()


def test_the_shots_say_what_the_condition_says_whatever_is_asked(grid):
    pool = load_examples("capitals", 20).set_index("example_id")
    for r in grid[grid.shots_say != "none"].itertuples():
        said = [m["content"].removeprefix(r.prefix).strip() for m in json.loads(r.messages) if m["role"] == "assistant"]
        labels = [pool.label[s] for s in r.shots]
        assert said == [r.choices[label if r.shots_say == "truth" else 1 - label] for label in labels]


def test_the_instruction_of_the_grid_never_hides_in_the_shots(grid):
    assert not grid.instruction.str.endswith("_shown").any()


def test_too_few_shots_give_an_empty_grid():
    examples = load_examples("capitals", 20)
    assert shots_grid(examples[examples.split != "shot"], byte_tokenizer(), context=10**6).empty


def test_what_it_gets_right_only_with_shots_is_shown_apart():
    rows = [dict(example_id=e, dataset="d", role=role, asks="lie" if role == "lie" else "truth", correct=c, readable=True) for e, ok in {"a": True, "b": False, "c": False}.items() for role, c in (("truth", True), ("known", ok), ("lie", False))]
    grid = pd.DataFrame([dict(example_id=e, asks="truth", shots_say="truth", correct=c, readable=True) for e, c in {"a": True, "b": True, "c": False}.items()])
    assert knowledge_levels(pd.DataFrame(rows), grid).level.to_dict() == {"a": "always", "b": "better prompting", "c": "never"}


def test_it_is_asked_again_in_the_same_conversation_with_the_answer_it_gave(grid):
    some = grid.head(4).assign(answer=[0, 1, 0, 1], correct=[True, True, False, False], knows=True)
    again = follow_ups(some, byte_tokenizer())
    for before, after in zip(some.itertuples(), again.itertuples(), strict=True):
        assert after.prompt.startswith(before.prompt.removesuffix(before.prefix).rstrip("\n")[:200]) and f"{before.prefix} {before.choices[before.answer]}".strip() in after.prompt
        assert (after.label, after.choices) == (int(before.correct), ["no", "yes"])
    assert again.row_id.is_unique and not set(again.row_id) & set(some.row_id)


def test_doubling_down_counts_known_rows_by_what_was_asked_and_whether_it_was_true():
    again = pd.DataFrame([dict(asks="lie", first_correct=False, first_knows=k, readable=True, answer=a) for k, a in ((True, 1), (True, 0), (True, 1), (False, 0))])
    [row] = doubling_down(again).itertuples()
    assert (row.n, row.answer) == (3, "was false") and row.says_true == pytest.approx(2 / 3)


def test_a_lie_is_unambiguous_by_the_probability_of_what_was_said():
    p1 = [0.1, 0.4, 0.9, 0.6]
    rows = pd.DataFrame([dict(role="lie", readable=True, p1=p, knows=True, lied=lied, correct=not lied) for p, lied in zip(p1, (True, True, False, True), strict=True)])
    found = lie_strength(rows)
    assert (found["unambiguous lies %"], found["ambiguous lies %"], found["told to lie"]) == (25.0, 50.0, 4)
