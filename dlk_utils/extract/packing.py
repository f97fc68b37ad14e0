"""Prompts that begin with the same tokens (an instruction, solved examples) run them only once."""

import itertools
import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import nn

from dlk_utils.extract.batches import (
    Batch,
    after_prefix,
    cut,
    forward,
    pad,
    plan_batches,
    takes_positions,
)
from dlk_utils.extract.store import Plan

MIN_SHARED = 12
"""Tokens that a batch's prompts must have in common for a pass of their own to pay."""

PASS_TOKENS = 100
"""Tokens that cost about as much as starting one more pass."""


@torch.no_grad()
def shared_batch(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Batch:
    """Run what all prompts begin with once, and return the left-padded batch of what follows.

    The shared beginning is in `past_key_values`; the last token of a prompt is never part of it.
    Where nothing can be shared (`shared_length`), the batch holds the complete prompts.
    """
    ids = [list(prompt) for prompt in prompts]
    shared = shared_length(model, ids)
    if not shared:
        return pad(ids, device=model.device)
    beginning = pad([ids[0][:shared]], device=model.device)
    cache = forward(model, beginning, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids))
    rest = pad([prompt[shared:] for prompt in ids], device=model.device)
    return after_prefix(rest, cache, shared)


def shared_length(model: nn.Module, prompts: Sequence[Sequence[int]]) -> int:
    """Return how many of the tokens that these prompts begin with to run once for all.

    The padding comes to lie behind the shared beginning. That is exact only where the family is
    told positions, and where a sliding window, which counts places with the padding, reaches over
    the longest prompt. Elsewhere, and below `MIN_SHARED`, the answer is 0.
    """
    lengths = [len(ids) for ids in prompts]
    if len(prompts) < 2 or not takes_positions(model) or window(model) <= max(lengths):
        return 0
    common = min(_n_common(prompts[0], ids) for ids in prompts)
    shared = min(common, min(lengths) - 1)
    return shared if shared >= MIN_SHARED else 0


def window(model: nn.Module) -> float:
    """Return how many tokens a layer with a sliding window sees; infinite without a window."""
    config = model.config.get_text_config()
    if not getattr(config, "use_sliding_window", True):
        return math.inf
    return float(getattr(config, "sliding_window", None) or math.inf)


def plan_shared(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int = 64) -> Plan:
    """Plan batches of prompts that begin with the same tokens, at most `shard_rows` in each.

    Prompts are taken in the order of their tokens, so that equal beginnings are neighbours. A
    prompt joins the group before it, unless what the group would then no longer share costs more
    than running the prompt's own beginning. As in `plan_batches`, a batch has at most
    `batch_tokens` tokens, and the plan follows from the tokens and keys (`row_id`) alone.
    """
    rows = sorted(zip(prompts.input_ids.map(tuple), prompts.row_id, strict=True))
    groups: list[list[tuple[int, str]]] = []
    first: Sequence[int] = ()
    shared = 0
    for ids, row_id in rows:
        common = _n_common(first, ids)
        if not groups or len(groups[-1]) * (shared - common) > common + PASS_TOKENS:
            groups.append([])
            first, shared = ids, len(ids)
        else:
            shared = min(shared, common)
        groups[-1].append((len(ids), row_id))
    shards: Plan = [[]]
    for group in groups:
        # By length within a group, so that there is little padding.
        for batch in cut(sorted(group), batch_tokens, shard_rows):
            if sum(len(b) for b in shards[-1]) >= shard_rows:
                shards.append([])
            shards[-1].append(batch)
    return shards


def cheaper_plan(model: nn.Module, prompts: pd.DataFrame, batch_tokens: int) -> Plan:
    """Return `plan_shared`, or `plan_batches` where that leaves less to run."""
    ids = dict(zip(prompts.row_id, prompts.input_ids, strict=True))

    def cost(plan: Plan) -> int:
        total = 0
        for batch in itertools.chain.from_iterable(plan):
            some = [ids[row_id] for row_id in batch]
            shared = shared_length(model, some)
            total += len(some) * (max(map(len, some)) - shared) + PASS_TOKENS
            total += shared + PASS_TOKENS if shared else 0
        return total

    return min(plan_shared(prompts, batch_tokens), plan_batches(prompts, batch_tokens), key=cost)


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two prompts have in common at their beginning."""
    equal = (x == y for x, y in zip(a, b, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, equal))
