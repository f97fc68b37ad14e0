"""What neighbouring prompts begin with (the instruction, the shots) is computed once: how to batch them, and the batch that has it in its cache."""

import math
from collections.abc import Sequence
from itertools import takewhile

import pandas as pd
import torch
from torch import nn

from dlk_utils.extract.batches import Batch, forward, pad, takes_positions
from dlk_utils.extract.store import Plan

MIN_SHARED = 12
"""Tokens that a batch's prompts must have in common for a pass of their own to pay."""


PASS_TOKENS = 100
"""Tokens that cost about as much as starting one more pass."""


@torch.no_grad()
def shared_batch(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Batch:
    """The left-padded batch of what each prompt has of its own, at least its last token, with what all begin with in the key-value cache.

    The padding lies between the shared part and the rest, so nothing is shared in a family that is not told positions, or whose sliding window (counted in places,
    padding included) does not reach over the longest prompt; nor below `MIN_SHARED` tokens.
    """
    ids = [list(p) for p in prompts]
    shared = min(_common(ids[0], i) for i in ids) if len(ids) > 1 else 0
    shared = min(shared, min(map(len, ids)) - 1)
    if shared < MIN_SHARED or not takes_positions(model) or window(model) <= max(map(len, ids)):
        return pad(ids, device=model.device)
    cache = forward(
        model, pad([ids[0][:shared]], device=model.device), use_cache=True
    ).past_key_values
    cache.batch_repeat_interleave(len(ids))
    rest = pad([i[shared:] for i in ids], device=model.device)
    mask = torch.cat(
        [
            torch.ones(len(ids), shared, dtype=torch.long, device=model.device),
            rest["attention_mask"],
        ],
        1,
    )
    return {
        "input_ids": rest["input_ids"],
        "attention_mask": mask,
        "position_ids": rest["position_ids"] + shared,
        "past_key_values": cache,
    }


def plan_shared(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int = 64) -> Plan:
    """Batches of neighbours in the order of their tokens, so that equal beginnings meet, at most `batch_tokens` with padding.

    A prompt joins the group before it unless what the group would then share no longer costs more than running its own beginning again.
    Planned from all rows' tokens and keys: the same after a restart.
    """
    rows = sorted(
        (
            (tuple(ids), row_id)
            for ids, row_id in zip(prompts.input_ids, prompts.row_id, strict=True)
        )
    )
    groups: list[list] = []
    shared = 0
    for ids, row_id in rows:
        common = _common(groups[-1][0][0], ids) if groups else 0
        if not groups or len(groups[-1]) * (shared - common) > common + PASS_TOKENS:
            groups.append([])
            common = len(ids)
        shared = min(shared, common) if groups[-1] else common
        groups[-1].append((ids, row_id))
    batches: list[list[str]] = []
    for group in groups:  # within a group by length, so that little is padded
        group.sort(key=lambda r: (len(r[0]), r[1]))
        n = 0
        for ids, row_id in group:
            if n in (0, shard_rows) or (n + 1) * len(ids) > batch_tokens:
                batches.append([])
                n = 0
            batches[-1].append(row_id)
            n += 1
    shards: Plan = [[]]
    for batch in batches:
        if sum(map(len, shards[-1])) >= shard_rows:
            shards.append([])
        shards[-1].append(batch)
    return shards


def window(model: nn.Module) -> float:
    """Tokens that a layer with a sliding window sees, itself included; infinite where there is no window."""
    config = model.config.get_text_config()
    places = (
        getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True)
        else None
    )
    return float(places or math.inf)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
