"""Padded batches of prompts, and the forward pass over them."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlk_utils.extract.store import Plan

Batch = dict[str, Any]
"""`input_ids`, `attention_mask` and `position_ids`, each [b, t], as transformers takes them.

With `past_key_values`, the first tokens of each prompt are in that cache: `input_ids` holds the
others, and the mask covers all of them.
"""

Layers = str | int | Sequence[int]
"""Which layers: "all", an index, a list of them, or a slice such as "::3" (`layer_numbers`)."""


def pad(
    prompts: Sequence[Sequence[int]] | pd.Series,
    *,
    side: str = "left",
    token: int = 0,
    device: Any = "cpu",
) -> Batch:
    """Lay prompts of different lengths side by side, with padding on the left or right.

    The padding is masked, so which `token` fills it makes no difference to the prompts. Position
    ids count from the first token of each prompt.
    """
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), token)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, ids in enumerate(prompts):
        place = slice(width - len(ids), None) if side == "left" else slice(None, len(ids))
        input_ids[row, place] = torch.tensor(list(ids))
        mask[row, place] = 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    return {name: x.to(device) for name, x in batch.items()}


def after_prefix(batch: Batch, cache: Any, length: int) -> Batch:
    """Put a batch behind a prefix of `length` tokens, which every row has in `cache`."""
    mask = batch["attention_mask"]
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": torch.cat([mask.new_ones(len(mask), length), mask], 1),
        "position_ids": batch["position_ids"] + length,
        "past_key_values": cache,
    }


def forward(model: nn.Module, batch: Batch, *, last_only: bool = True, **options: Any) -> Any:
    """Run a model on a batch, without the inputs that its family does not take.

    With `last_only` the LM head runs on the last position alone, in the families that can do so.
    Raises `ValueError` if the model is in training mode.
    """
    require_evaluation_mode(model)
    accepted = _forward_parameters(type(model))
    inputs = {name: x for name, x in batch.items() if name in accepted}
    if last_only and "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    return model(**inputs, **options)


def require_evaluation_mode(model: nn.Module) -> None:
    """Raise `ValueError` if a model is in training mode, in which its own dropout is on."""
    if model.training:
        raise ValueError(
            f"{model.config.model_type}: expected a model in evaluation mode (`model.eval()`), got "
            "one in training mode, whose own dropout would be in every state"
        )


def takes_positions(model: nn.Module) -> bool:
    """Whether the family is told each token's position. MPT counts places, with the padding."""
    return "position_ids" in _forward_parameters(type(model))


@functools.cache
def _forward_parameters(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


@torch.no_grad()
def last_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "b vocab"]:
    """Return the logits of the token after each prompt.

    Where the padding is on the left, the LM head runs on one position only.
    """
    left = is_left_padded(batch)
    logits = forward(model, batch, last_only=left, use_cache="past_key_values" in batch).logits
    if left:
        return logits[:, -1]
    return logits[torch.arange(len(logits)), last_positions(batch).cpu()]


@torch.no_grad()
def cached_prefix(model: nn.Module, batch: Batch) -> Batch:
    """Run all tokens but the last of each prompt, and return the batch of the last ones alone.

    The earlier tokens are in its `past_key_values`; what was in a cache before is not run again.
    Raises `ValueError` if the padding is on the right, or a prompt has fewer than two tokens.
    """
    mask, cache = batch["attention_mask"], batch.get("past_key_values")
    if not is_left_padded(batch) or int(mask.sum(1).min()) < 2:
        raise ValueError("cached prefix: expected left-padded prompts of at least two tokens")
    if batch["input_ids"].shape[1] > 1:
        before = {name: x[:, :-1] for name, x in batch.items() if name != "past_key_values"}
        if cache is not None:
            before["past_key_values"] = cache
        cache = forward(model, before, use_cache=True).past_key_values
    return {
        "input_ids": batch["input_ids"][:, -1:],
        "attention_mask": mask,
        "position_ids": batch["position_ids"][:, -1:],
        "past_key_values": cache,
    }


def last_positions(batch: Batch) -> Int[Tensor, " b"]:
    """Return the place of each prompt's last token in `input_ids`."""
    width = batch["input_ids"].shape[1]
    mask = batch["attention_mask"][:, -width:]
    return (mask * torch.arange(width, device=mask.device)).argmax(1)


def is_left_padded(batch: Batch) -> bool:
    """Whether every prompt ends at the last place."""
    return bool(batch["attention_mask"][:, -1].all())


def plan_batches(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int = 64) -> Plan:
    """Plan batches of prompts of about equal length, in shards of `shard_rows` prompts.

    A batch has at most `batch_tokens` tokens, padding included, or a single prompt. The plan
    follows from the lengths and keys (`row_id`) alone, so that it is the same after a restart.
    """
    by_length = sorted(zip(prompts.input_ids.map(len), prompts.row_id, strict=True))
    starts = range(0, len(by_length), shard_rows)
    return [cut(by_length[i : i + shard_rows], batch_tokens, shard_rows) for i in starts]


def cut(rows: Iterable[tuple[int, Any]], batch_tokens: int, max_rows: int) -> list[list[Any]]:
    """Cut rows, given as (length, row id) with the shortest first, into batches."""
    batches: list[list[Any]] = []
    for length, row_id in rows:
        n = len(batches[-1]) if batches else 0
        if n in (0, max_rows) or (n + 1) * length > batch_tokens:
            batches.append([])
        batches[-1].append(row_id)
    return batches


def in_halves(compute: Callable, rows: Sequence) -> Iterator[tuple[Sequence, Any]]:
    """Yield (rows, compute(rows)), in smaller and smaller parts if the device's memory is short."""
    try:
        result = compute(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    else:
        yield rows, result
        return
    # Outside the except clause, in which the error holds on to the tensors of the failed attempt.
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    yield from in_halves(compute, rows[:middle])
    yield from in_halves(compute, rows[middle:])
