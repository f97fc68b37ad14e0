"""What the model answers: one clean pass over each prompt, with what neighbouring prompts share computed once."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.choices import choice_logprobs
from dlk_utils.extract import fill_rows, forward, last_logits, pad, takes_positions
from dlk_utils.store import Plan

MIN_SHARED = 12
"""Tokens that a batch's prompts must have in common for a pass of their own to pay."""


def answer_prompts(model: nn.Module, prompts: pd.DataFrame, out: Path, *, record: Mapping[str, Any], batch_tokens: int = 2048) -> None:
    """Store for each prompt `choice_logprobs` [n, 2] (index = label), `strict_logprobs` [n, 2] (each choice as written, no other spelling) and `top_token` [n].

    A row with `choice_tokens` (choices that only differ after their first token) has each choice scored by its whole log-probability.
    """

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        logits = shared_logits(model, list(rows.input_ids))
        logp = choice_logprobs(logits, list(rows.choice_ids))
        strict = choice_logprobs(logits, list(rows.strict_ids)) if "strict_ids" in rows else logp
        for i, whole in enumerate(rows.choice_tokens if "choice_tokens" in rows else []):
            if whole is not None:
                per_choice = [torch.stack(sequence_logprobs(model, rows.input_ids.iloc[i], list(variants))) for variants in whole]
                logp[i] = torch.stack([p.logsumexp(0) for p in per_choice])
                strict[i] = torch.stack([p[0] for p in per_choice])
        return {"choice_logprobs": logp, "strict_logprobs": strict, "top_token": logits.argmax(-1)}

    fill_rows(out, prompts, record, plan_shared(prompts, batch_tokens), compute, "answers", batch_tokens)


@torch.no_grad()
def shared_logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "b vocab"]:
    """Next-token logits of each prompt. The tokens that all begin with (the instruction, the shots) run once; the rest reads them from the cache."""
    ids = [list(p) for p in prompts]
    shared = min(_common(ids[0], i) for i in ids) if len(ids) > 1 else 0
    shared = min(shared, min(map(len, ids)) - 1)
    if shared < MIN_SHARED or not takes_positions(model):  # the padding lies between the shared part and the rest
        return last_logits(model, pad(ids, device=model.device))
    cache = forward(model, pad([ids[0][:shared]], device=model.device), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids))
    rest = pad([i[shared:] for i in ids], device=model.device)
    mask = torch.cat([torch.ones(len(ids), shared, dtype=torch.long, device=model.device), rest["attention_mask"]], 1)
    positions = rest["position_ids"] + shared
    return last_logits(model, {"input_ids": rest["input_ids"], "attention_mask": mask, "position_ids": positions, "past_key_values": cache})


@torch.no_grad()
def sequence_logprobs(model: nn.Module, prompt: Sequence[int], sequences: Sequence[Sequence[int]]) -> list[Float[Tensor, ""]]:
    """Log-probability of each token sequence after the prompt, summed over its tokens: one pass over the prompt, one over all sequences."""
    first = forward(model, pad([list(prompt)], device=model.device), use_cache=True)
    after = [first.logits[0, -1].float().log_softmax(-1).expand(len(sequences), -1)[:, None]]
    if max(map(len, sequences)) > 1:
        cache, n = first.past_key_values, len(prompt)
        cache.batch_repeat_interleave(len(sequences))
        rest = pad([list(s)[:-1] or [0] for s in sequences], side="right", device=model.device)
        mask = torch.cat([torch.ones(len(sequences), n, dtype=torch.long, device=model.device), rest["attention_mask"]], 1)
        logits = forward(model, rest | {"attention_mask": mask, "position_ids": rest["position_ids"] + n, "past_key_values": cache}, last_only=False).logits
        after.append(logits.float().log_softmax(-1))
    logp = torch.cat(after, 1)
    return [logp[i, range(len(s)), list(s)].sum() for i, s in enumerate(sequences)]


def plan_shared(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int = 64) -> Plan:
    """Batches of neighbours in the order of their tokens, so that equal beginnings meet; cut where the next prompt shares too little or the batch is full.

    Planned from all rows' tokens and keys: the same after a restart.
    """
    rows = sorted(((tuple(ids), row_id) for ids, row_id in zip(prompts.input_ids, prompts.row_id, strict=True)))
    groups: list[list] = []
    for ids, row_id in rows:
        if not groups or _common(groups[-1][0][0], ids) < MIN_SHARED + 8:  # 8: chat markup that every prompt begins with
            groups.append([])
        groups[-1].append((ids, row_id))
    batches: list[list[str]] = []
    for group in groups:  # within a group by length, so that little is padded
        group.sort(key=lambda r: (len(r[0]), r[1]))
        width = 0
        for ids, row_id in group:
            if width == 0 or (len(batches[-1]) + 1) * len(ids) > batch_tokens:
                batches.append([])
            width = len(ids)
            batches[-1].append(row_id)
    shards: Plan = [[]]
    for batch in batches:
        if sum(map(len, shards[-1])) >= shard_rows:
            shards.append([])
        shards[-1].append(batch)
    return shards


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
