"""What prompts share is run once, and changes nothing: no answer, no state, no gradient."""

import itertools

import pandas as pd
import pytest
import torch
from tiny_models import FAMILIES, close, prompts_that_begin_alike, tiny

from dlk_utils.extract.batches import last_logits, pad, plan_batches
from dlk_utils.extract.gradients import states_and_gradients
from dlk_utils.extract.packing import MIN_SHARED, cheaper_plan, plan_shared, shared_batch
from dlk_utils.extract.states import forward_states
from dlk_utils.models.sites import SITES


def batches_of(plan: list) -> list[list[str]]:
    return list(itertools.chain.from_iterable(plan))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_changes_no_answer_no_state_and_no_gradient(family):
    model, rows = tiny(family), prompts_that_begin_alike()
    ids, choices = list(rows.input_ids), list(rows.choice_ids)
    logits_alone = torch.cat([last_logits(model, pad([prompt])) for prompt in ids])
    states, logits = forward_states(model, shared_batch(model, ids), SITES)
    torch.testing.assert_close(logits, logits_alone, **close(model))
    shared = states_and_gradients(model, shared_batch(model, ids), choices, SITES)
    padded = states_and_gradients(model, pad(ids), choices, SITES)
    for site in SITES:
        torch.testing.assert_close(states[site], padded[0][site], **close(model))
        torch.testing.assert_close(shared[0][site], padded[0][site], **close(model))
        torch.testing.assert_close(shared[1][site], padded[1][site], **close(model))
    torch.testing.assert_close(shared[2], padded[2], **close(model))


def test_the_shared_beginning_is_run_once(monkeypatch):
    model, rows, tokens_run = tiny("llama"), prompts_that_begin_alike(), []
    real_forward = model.forward

    def counted(*args, **inputs):
        tokens_run.append(inputs["input_ids"].numel())
        return real_forward(*args, **inputs)

    monkeypatch.setattr(model, "forward", counted)
    last_logits(model, shared_batch(model, list(rows.input_ids)))
    assert len(tokens_run) == 2 and sum(tokens_run) < rows.input_ids.map(len).sum()


def test_a_prompt_with_which_another_begins_is_answered_too():
    model, rows = tiny("llama"), prompts_that_begin_alike(2)
    shorter = rows.input_ids[0]
    both = last_logits(model, shared_batch(model, [shorter, [*shorter, 5]]))
    alone = last_logits(model, pad([shorter]))
    torch.testing.assert_close(both[:1], alone, **close(model))


def test_prompts_that_differ_in_the_last_token_only_have_gradients_too():
    model, rows = tiny("llama"), prompts_that_begin_alike(1)
    ids = [[*rows.input_ids[0], token] for token in (5, 6, 7)]
    choices = list(rows.choice_ids) * 3
    shared = states_and_gradients(model, shared_batch(model, ids), choices, SITES)
    padded = states_and_gradients(model, pad(ids), choices, SITES)
    for site in SITES:
        torch.testing.assert_close(shared[0][site], padded[0][site], **close(model))
        torch.testing.assert_close(shared[1][site], padded[1][site], **close(model))


@pytest.mark.parametrize(
    ("family", "shared"),
    [
        ("mistral", True),
        ("gemma2", True),
        ("mistral window", False),
        ("gemma3_text window", False),
        ("mpt", False),
    ],
)
def test_nothing_is_shared_where_positions_or_a_window_count_the_padding(family, shared):
    batch = shared_batch(tiny(family), list(prompts_that_begin_alike().input_ids))
    assert ("past_key_values" in batch) == shared


def test_a_window_that_the_config_switches_off_does_not_count(monkeypatch):
    model = tiny("mistral window")
    monkeypatch.setattr(model.config, "use_sliding_window", False, raising=False)
    assert "past_key_values" in shared_batch(model, list(prompts_that_begin_alike().input_ids))


def test_the_plan_has_each_row_once_and_groups_equal_beginnings():
    a, b = prompts_that_begin_alike(30), prompts_that_begin_alike(30, 24)
    rows = pd.concat([a, b.assign(row_id=b.row_id + "b")], ignore_index=True)
    plan = plan_shared(rows.sample(frac=1, random_state=1), 200)
    assert plan == plan_shared(rows, 200)
    batches = batches_of(plan)
    assert sorted(row for batch in batches for row in batch) == sorted(rows.row_id)
    ids_of = rows.set_index("row_id").input_ids
    for batch in batches:
        ids = [ids_of[row] for row in batch]
        assert all(prompt[:MIN_SHARED] == ids[0][:MIN_SHARED] for prompt in ids)
        assert len(ids) * max(map(len, ids)) <= 200 or len(ids) == 1


def prompts_of(beginnings: list[list[int]], n_questions: int) -> pd.DataFrame:
    """Behind each beginning, questions of ten tokens."""
    rows = [
        (f"{k}-{q}", beginning + [50 + q] * 10)
        for k, beginning in enumerate(beginnings)
        for q in range(n_questions)
    ]
    return pd.DataFrame(rows, columns=["row_id", "input_ids"])


# Two instructions of 40 tokens, and two templates of 60 under each.
TEMPLATES = [[10 + i] * 40 + [20 + 2 * i + t] * 60 for i in (0, 1) for t in (0, 1)]


def test_a_batch_shares_instruction_and_template_where_many_questions_do():
    batches = batches_of(plan_shared(prompts_of(TEMPLATES, 12), 2048))
    assert [len(batch) for batch in batches] == [12, 12, 12, 12]
    assert all(len({row.split("-")[0] for row in batch}) == 1 for batch in batches)


def test_a_template_gets_no_pass_of_its_own_for_few_questions():
    one_instruction = [[10] * 40 + [20 + t] * 20 for t in range(4)]
    assert len(batches_of(plan_shared(prompts_of(one_instruction, 2), 2048))) == 1


def test_the_cheaper_plan_is_by_beginnings_where_there_are_any_and_by_length_elsewhere():
    model, alike = tiny("llama"), prompts_of(TEMPLATES, 12)
    assert cheaper_plan(model, alike, 2048) == plan_shared(alike, 2048)
    generator = torch.Generator().manual_seed(0)
    random_ids = [torch.randperm(150, generator=generator).tolist() for _ in alike.row_id]
    unlike = alike.assign(input_ids=random_ids)
    assert cheaper_plan(model, unlike, 2048) == plan_batches(unlike, 2048)
    assert cheaper_plan(tiny("mpt"), alike, 2048) == plan_batches(alike, 2048)
