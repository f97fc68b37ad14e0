"""Batches: padding, plans, and batches that do not fit into memory."""

import pytest
import torch
from tiny_models import close, tiny, tiny_prompts

from dlk_utils.extract.batches import (
    forward,
    in_halves,
    last_logits,
    pad,
    plan_batches,
)


def test_padding_on_either_side_and_any_token_in_it_give_the_same_logits():
    model, rows = tiny("llama"), tiny_prompts()
    left = last_logits(model, pad(rows.input_ids))
    right = last_logits(model, pad(rows.input_ids, side="right", token=50))
    torch.testing.assert_close(left, right, **close(model))


def test_a_batch_plan_has_each_row_once_within_the_budget_in_whatever_order_the_rows_come():
    rows = tiny_prompts(150)
    plan = plan_batches(rows, batch_tokens=30)
    assert plan == plan_batches(rows[::-1], batch_tokens=30)
    batches = [batch for shard in plan for batch in shard]
    assert sorted(row for batch in batches for row in batch) == sorted(rows.row_id)
    length = dict(zip(rows.row_id, rows.input_ids.map(len), strict=True))
    assert all(len(batch) * max(length[row] for row in batch) <= 30 for batch in batches)
    assert [sum(map(len, shard)) for shard in plan] == [64, 64, 22]


@pytest.mark.trap(19)
def test_a_model_left_in_training_mode_is_refused():
    model = tiny("gpt2")
    model.train()
    try:
        with pytest.raises(ValueError, match="evaluation mode"):
            forward(model, pad(tiny_prompts().input_ids))
    finally:
        model.eval()


def test_a_batch_that_does_not_fit_into_memory_is_computed_in_halves():
    sizes = []

    def compute(rows: list[int]) -> list[int]:
        sizes.append(len(rows))
        if len(rows) > 4:
            raise torch.OutOfMemoryError("planted: more than four rows do not fit")
        return [10 * row for row in rows]

    parts = list(in_halves(compute, list(range(30))))
    assert [row for rows, _ in parts for row in rows] == list(range(30))
    assert all(result == [10 * row for row in rows] for rows, result in parts)
    assert max(sizes) == 30 and sorted(sizes)[:2] == [3, 3]


def test_a_single_row_that_does_not_fit_into_memory_is_an_error():
    def compute(rows: list[int]) -> None:
        raise torch.OutOfMemoryError("planted")

    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        list(in_halves(compute, [1, 2, 3]))
