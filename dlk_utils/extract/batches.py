"""The engine of the forward passes: batches, states, what is cached, and how rows go to a store. Everything is read at the last token, or the last few."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlk_utils.extract.store import Plan

Batch = dict[str, Any]
"""`input_ids`, `attention_mask` and `position_ids`, each [b, t]; with `past_key_values` the mask covers the cached tokens too."""


Layers = str | int | Sequence[int]
"""What `sites.layer_numbers` understands."""


def pad(
    prompts: Sequence[Sequence[int]] | pd.Series,
    *,
    side: str = "left",
    token: int = 0,
    device: Any = "cpu",
) -> Batch:
    """A batch with mask and positions; what a padded place holds makes no difference to the prompts."""
    width = max(map(len, prompts))
    ids, mask = (
        torch.full((len(prompts), width), token),
        torch.zeros((len(prompts), width), dtype=torch.long),
    )
    for i, p in enumerate(prompts):
        where = slice(width - len(p), None) if side == "left" else slice(None, len(p))
        ids[i, where], mask[i, where] = torch.tensor(list(p)), 1
    return {
        k: v.to(device)
        for k, v in {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }.items()
    }


def forward(model: nn.Module, batch: Batch, *, last_only: bool = True, **options) -> Any:
    """The model's output; what its family does not take (MPT takes no positions) is left out, and the LM head runs on one position if `last_only`.

    Raises `ValueError` if the model is in training mode: dropout of its own would be in every state.
    """
    if model.training:
        raise ValueError(
            f"{model.config.model_type}: expected a model in evaluation mode (`model.eval()`), got one in training mode, whose own dropout would be in every state"
        )
    takes = _parameters(type(model))
    head = {"logits_to_keep": 1} if last_only and "logits_to_keep" in takes else {}
    return model(**{k: v for k, v in batch.items() if k in takes}, **head, **options)


def takes_positions(model: nn.Module) -> bool:
    """Whether the family is told each token's position; MPT counts places, padding included, and only distances matter to it."""
    return "position_ids" in _parameters(type(model))


@functools.cache
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


@torch.no_grad()
def last_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "b vocab"]:
    """Next-token logits of each prompt; the LM head runs on one position where the padding is on the left."""
    left = is_left_padded(batch)
    logits = forward(model, batch, last_only=left, use_cache="past_key_values" in batch).logits
    return logits[:, -1] if left else logits[torch.arange(len(logits)), last_positions(batch).cpu()]


@torch.no_grad()
def cached_prefix(model: nn.Module, batch: Batch) -> Batch:
    """The batch of the last tokens alone, with all that stands before them in the key-value cache (added to what is in it already). Left padding only."""
    if batch["attention_mask"].shape[1] < 2 or not is_left_padded(batch):
        raise ValueError("cached prefix: expected left-padded prompts of at least two tokens")
    cache = batch.get("past_key_values")
    if batch["input_ids"].shape[1] > 1:
        before = {k: v[:, :-1] for k, v in batch.items() if k != "past_key_values"} | (
            {"past_key_values": cache} if cache else {}
        )
        cache = forward(model, before, use_cache=True).past_key_values
    return {
        "input_ids": batch["input_ids"][:, -1:],
        "attention_mask": batch["attention_mask"],
        "position_ids": batch["position_ids"][:, -1:],
        "past_key_values": cache,
    }


def last_positions(batch: Batch) -> Int[Tensor, " b"]:
    """Where the last token of each prompt stands in `input_ids`."""
    width = batch["input_ids"].shape[1]
    return (
        batch["attention_mask"][:, -width:]
        * torch.arange(width, device=batch["attention_mask"].device)
    ).argmax(1)


def is_left_padded(batch: Batch) -> bool:
    """Whether every prompt ends at the last place."""
    return bool(batch["attention_mask"][:, -1].all())


def plan_batches(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int = 64) -> Plan:
    """Batches of about equal length, at most `batch_tokens` with padding, planned from all rows' lengths and keys: the same after a restart."""
    shards: Plan = [[[]]]
    for row_id, length in sorted(
        zip(prompts.row_id, prompts.input_ids.map(len), strict=True), key=lambda r: (r[1], r[0])
    ):
        if sum(map(len, shards[-1])) == shard_rows:
            shards.append([[]])
        if shards[-1][-1] and (len(shards[-1][-1]) + 1) * length > batch_tokens:
            shards[-1].append([])
        shards[-1][-1].append(row_id)
    return shards
