"""The engine of the forward passes: batches, states, what is cached, and how rows go to a store. Everything is read at the last token, or the last few."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlk_utils.sites import at_sites
from dlk_utils.store import Plan, fill, read, row_ids

Batch = dict[str, Any]
"""`input_ids`, `attention_mask` and `position_ids`, each [b, t]; with `past_key_values` the mask covers the cached tokens too."""
Layers = str | int | Sequence[int]
"""What `sites.layer_numbers` understands."""


def pad(prompts: Sequence[Sequence[int]] | pd.Series, *, side: str = "left", token: int = 0, device: Any = "cpu") -> Batch:
    """A batch with mask and positions; what a padded place holds makes no difference to the prompts."""
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), token), torch.zeros((len(prompts), width), dtype=torch.long)
    for i, p in enumerate(prompts):
        where = slice(width - len(p), None) if side == "left" else slice(None, len(p))
        ids[i, where], mask[i, where] = torch.tensor(list(p)), 1
    return {k: v.to(device) for k, v in {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}.items()}


def forward(model: nn.Module, batch: Batch, *, last_only: bool = True, **options) -> Any:
    """The model's output; what its family does not take (MPT takes no positions) is left out, and the LM head runs on one position if `last_only`.

    Raises `ValueError` if the model is in training mode: dropout of its own would be in every state.
    """
    if model.training:
        raise ValueError(f"{model.config.model_type}: expected a model in evaluation mode (`model.eval()`), got one in training mode, whose own dropout would be in every state")
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
def forward_states(model: nn.Module, batch: Batch, sites: Sequence[str], layers: Layers = "all", *, positions: int = 1) -> tuple[dict[str, Float[Tensor, "b layer ..."]], Float[Tensor, "b vocab"]]:
    """States at the last token [b, layer, d], or at the last `positions` tokens [b, layer, positions, d], and the logits there.

    A hook slices before it copies. Raises `ValueError` where a prompt has fewer tokens than `positions` (those in a cache have no states any more, and do not count).
    """
    last, found = last_positions(batch), {site: [] for site in sites}
    own = int(batch["attention_mask"][:, -batch["input_ids"].shape[1] :].sum(1).min())
    if not 1 <= positions <= own:
        raise ValueError(f"positions: expected between 1 and the tokens of the shortest prompt that are not in a cache, {own}, got {positions}")
    where = last[:, None] + torch.arange(1 - positions, 1, device=last.device)

    def keep(site: str, layer: int, hidden: Tensor) -> None:
        taken = hidden[torch.arange(len(last), device=hidden.device)[:, None], where.to(hidden.device)].cpu()
        found[site].append(taken[:, 0] if positions == 1 else taken)

    with at_sites(model, sites, keep, layers):
        logits = last_logits(model, batch)
    return {site: torch.stack(v, 1) for site, v in found.items()}, logits


@torch.no_grad()
def cached_prefix(model: nn.Module, batch: Batch) -> Batch:
    """The batch of the last tokens alone, with all that stands before them in the key-value cache (added to what is in it already). Left padding only."""
    if batch["attention_mask"].shape[1] < 2 or not is_left_padded(batch):
        raise ValueError("cached prefix: expected left-padded prompts of at least two tokens")
    cache = batch.get("past_key_values")
    if batch["input_ids"].shape[1] > 1:
        before = {k: v[:, :-1] for k, v in batch.items() if k != "past_key_values"} | ({"past_key_values": cache} if cache else {})
        cache = forward(model, before, use_cache=True).past_key_values
    return {"input_ids": batch["input_ids"][:, -1:], "attention_mask": batch["attention_mask"], "position_ids": batch["position_ids"][:, -1:], "past_key_values": cache}


def last_positions(batch: Batch) -> Int[Tensor, " b"]:
    """Where the last token of each prompt stands in `input_ids`."""
    width = batch["input_ids"].shape[1]
    return (batch["attention_mask"][:, -width:] * torch.arange(width, device=batch["attention_mask"].device)).argmax(1)


def is_left_padded(batch: Batch) -> bool:
    """Whether every prompt ends at the last place."""
    return bool(batch["attention_mask"][:, -1].all())


def plan_batches(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int = 64) -> Plan:
    """Batches of about equal length, at most `batch_tokens` with padding, planned from all rows' lengths and keys: the same after a restart."""
    shards: Plan = [[[]]]
    for row_id, length in sorted(zip(prompts.row_id, prompts.input_ids.map(len), strict=True), key=lambda r: (r[1], r[0])):
        if sum(map(len, shards[-1])) == shard_rows:
            shards.append([[]])
        if shards[-1][-1] and (len(shards[-1][-1]) + 1) * length > batch_tokens:
            shards[-1].append([])
        shards[-1][-1].append(row_id)
    return shards


def fill_rows(out: Path, prompts: pd.DataFrame, parts: Mapping, plan: Plan, compute: Callable, desc: str, batch_tokens: int, only: Sequence[int] | None = None) -> None:
    """Fill a store with what `compute` gives for each batch of prompt rows; a batch that does not fit into the GPU's memory goes in halves."""
    by_id = prompts.set_index("row_id", drop=False)
    record = {**parts, "batch_tokens": batch_tokens}  # which rows, the plan says
    fill(out, record, plan, lambda ids: in_halves(compute, by_id.loc[ids]), examples=dict(zip(prompts.row_id, prompts.example_id, strict=True)), desc=desc, only=only)


def in_halves(compute: Callable[[pd.DataFrame], dict[str, Tensor]], rows: pd.DataFrame) -> dict[str, Tensor]:
    """`compute(rows)`, or that of either half, one after the other, where the device runs out of memory; raises what it raises if one row is too much."""
    try:
        return compute(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()
    parts = [in_halves(compute, rows.iloc[: len(rows) // 2]), in_halves(compute, rows.iloc[len(rows) // 2 :])]
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def read_rows(folder: Path, prompts: pd.DataFrame, name: str) -> Float[np.ndarray, "n ..."] | Int[np.ndarray, "n ..."]:
    """A stored tensor in the order of `prompts`, joined one to one by `row_id`."""
    stamp = max((p.stat().st_mtime_ns for p in [*folder.glob("manifest.json"), *folder.glob("shard-*.json")]), default=0)
    at = _positions(folder, stamp)
    missing = [r for r in prompts.row_id if r not in at]
    if missing or len(set(prompts.row_id)) != len(prompts):
        raise KeyError(f"{folder.name}: expected each of {len(prompts)} rows once, {len(missing)} are not stored")
    tensor = _stored(folder, name, stamp)[[at[r] for r in prompts.row_id]]
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


@functools.lru_cache(maxsize=8)
def _positions(folder: Path, stamp: int) -> dict[str, int]:
    return {r: i for i, r in enumerate(row_ids(folder))}


@functools.lru_cache(maxsize=64)
def _stored(folder: Path, name: str, stamp: int) -> Tensor:
    """Sweeps ask for the same layers again and again; `stamp` changes when a shard is written, so that one which is repaired is read again."""
    return read(folder, name)


def named(states: Mapping[str, Tensor], kind: str, draw: int, layers: Sequence[int]) -> dict[str, Tensor]:
    """Stacks [b, layer, ...] by site as the tensors of a store, `kind.site.layer.draw`."""
    return {f"{kind}.{site}.{layer}.{draw}": t[:, i] for site, t in states.items() for i, layer in enumerate(layers)}
