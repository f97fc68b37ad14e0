"""What prompts share is run once, and changes nothing: not the answers, not the states, not the gradients."""

import pandas as pd
import pytest
import torch
from conftest import FAMILIES, close, prompts_that_begin_alike, tiny

from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.gradients import states_and_gradients
from dlk_utils.extract.packing import MIN_SHARED, plan_shared, shared_batch
from dlk_utils.extract.states import forward_states
from dlk_utils.models.sites import SITES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_changes_no_answer(family):
    model, rows = tiny(family), prompts_that_begin_alike()
    together = last_logits(model, shared_batch(model, list(rows.input_ids)))
    for i, ids in enumerate(rows.input_ids):
        torch.testing.assert_close(together[i], last_logits(model, pad([ids]))[0], **close(model))


def test_the_shared_beginning_is_run_once(monkeypatch):
    model, rows, seen = tiny("llama"), prompts_that_begin_alike(), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: seen.append(k["input_ids"].numel()) or forward(*a, **k)
    )
    last_logits(model, shared_batch(model, list(rows.input_ids)))
    assert len(seen) == 2 and sum(seen) < rows.input_ids.map(len).sum()


def test_one_prompt_that_begins_another_is_answered_too():
    model, rows = tiny("llama"), prompts_that_begin_alike(2)
    ids = [rows.input_ids[0], rows.input_ids[0] + [5]]
    torch.testing.assert_close(
        last_logits(model, shared_batch(model, ids))[0],
        last_logits(model, pad(ids[:1]))[0],
        **close(model),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_changes_no_state_and_no_gradient(family):
    model, rows = tiny(family), prompts_that_begin_alike()
    ids, choices = list(rows.input_ids), list(rows.choice_ids)
    states = forward_states(model, shared_batch(model, ids), SITES)[0]
    shared = states_and_gradients(model, shared_batch(model, ids), choices, SITES)
    alone = states_and_gradients(model, pad(ids), choices, SITES)
    for site in SITES:
        torch.testing.assert_close(
            states[site], forward_states(model, pad(ids), SITES)[0][site], **close(model)
        )
        torch.testing.assert_close(shared[0][site], alone[0][site], **close(model))
        torch.testing.assert_close(shared[1][site], alone[1][site], **close(model))
    torch.testing.assert_close(shared[2], alone[2], **close(model))


def test_nothing_is_shared_where_a_sliding_window_does_not_reach_over_the_prompts(monkeypatch):
    ids = list(prompts_that_begin_alike().input_ids)
    shared = lambda family: "past_key_values" in shared_batch(tiny(family), ids)
    assert (
        shared("mistral")
        and shared("gemma2")
        and not shared("mistral window")
        and not shared("gemma3_text window")
    )
    monkeypatch.setattr(tiny("mistral window").config, "use_sliding_window", False, raising=False)
    assert shared("mistral window")


def test_no_states_are_asked_of_tokens_that_are_cached():
    model, ids = tiny("llama"), list(prompts_that_begin_alike().input_ids)
    own = min(map(len, ids)) - 20
    few = forward_states(model, shared_batch(model, ids), ["resid_post"], positions=own)[0][
        "resid_post"
    ]
    torch.testing.assert_close(
        few,
        forward_states(model, pad(ids), ["resid_post"], positions=own)[0]["resid_post"],
        **close(model),
    )
    with pytest.raises(ValueError, match=f"not in a cache, {own}, got {own + 1}"):
        forward_states(model, shared_batch(model, ids), ["resid_post"], positions=own + 1)


def test_prompts_that_differ_in_the_last_token_only_have_gradients_too():
    model, rows = tiny("llama"), prompts_that_begin_alike(1)
    ids = [[*rows.input_ids[0], token] for token in (5, 6, 7)]
    choices = list(rows.choice_ids) * 3
    for one, other in zip(
        states_and_gradients(model, shared_batch(model, ids), choices, SITES)[:2],
        states_and_gradients(model, pad(ids), choices, SITES)[:2],
        strict=True,
    ):
        for site in SITES:
            torch.testing.assert_close(one[site], other[site], **close(model))


def test_the_plan_has_each_row_once_and_groups_equal_beginnings():
    a, b = prompts_that_begin_alike(30), prompts_that_begin_alike(30, 24)
    rows = pd.concat([a, b.assign(row_id=b.row_id + "b")], ignore_index=True)
    plan = plan_shared(rows.sample(frac=1, random_state=1), 200)
    assert plan == plan_shared(rows, 200)
    batches = [batch for shard in plan for batch in shard]
    assert sorted(r for batch in batches for r in batch) == sorted(rows.row_id)
    by_id = rows.set_index("row_id").input_ids
    for batch in batches:
        ids = [by_id[r] for r in batch]
        assert all(i[:MIN_SHARED] == ids[0][:MIN_SHARED] for i in ids)
        assert len(ids) * max(map(len, ids)) <= 200 or len(ids) == 1


def test_the_plan_goes_as_deep_as_it_pays():
    """Two instructions, two templates under each, many questions under each of those: a batch shares instruction and template, and few rows are not worth a pass."""
    prefixes = [[10 + i] * 40 + [20 + 2 * i + t] * 60 for i in (0, 1) for t in (0, 1)]
    many = [(f"{k}-{q}", p + [50 + q] * 10) for k, p in enumerate(prefixes) for q in range(12)]
    batches = [
        b
        for shard in plan_shared(pd.DataFrame(many, columns=["row_id", "input_ids"]), 2048)
        for b in shard
    ]
    assert sorted(len(b) for b in batches) == [12, 12, 12, 12] and all(
        len({r.split("-")[0] for r in b}) == 1 for b in batches
    )
    few = [
        (f"{k}-{q}", [10] * 40 + [20 + k] * 20 + [50 + q] * 10) for k in range(4) for q in range(2)
    ]
    assert (
        len(
            [
                b
                for shard in plan_shared(pd.DataFrame(few, columns=["row_id", "input_ids"]), 2048)
                for b in shard
            ]
        )
        == 1
    )
