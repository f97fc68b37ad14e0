"""Contrast pairs: the states of a row after it has said choice 0, and after choice 1, from the cache of its prompt.

Source: Burns, Ye, Klein, Steinhardt, arXiv 2212.03827.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.extract import Batch, Layers, forward_states


def first_tokens(written: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """The token with which each choice of each row begins, as written. Raises `ValueError` where both begin alike: nothing would tell the two apart."""
    found = [[choice[0] for choice in row] for row in written]
    alike = [i for i, (a, b) in enumerate(found) if a == b]
    if alike:
        raise ValueError(f"contrast pairs: expected choices that differ in their first token, got token {found[alike[0]][0]} twice in {len(alike)} of {len(found)} rows")
    return found


@torch.no_grad()
def said_states(model: nn.Module, batch: Batch, cache: Any, tokens: Sequence[Sequence[int]], sites: Sequence[str], layers: Layers = "all") -> list[dict[str, Float[Tensor, "b layer d"]]]:
    """For choice 0, then 1: the states at its first token (`tokens` [b, 2]), said after the prompts of the left-padded `batch`, whose every token is in `cache` (which is used up)."""
    b = len(batch["input_ids"])
    cache.batch_repeat_interleave(2)
    one = torch.ones(b, 1, dtype=torch.long, device=model.device)
    said = {
        "input_ids": torch.tensor([[t] for pair in tokens for t in pair], device=model.device), "attention_mask": torch.cat([batch["attention_mask"], one], 1).repeat_interleave(2, 0),
        "position_ids": (batch["position_ids"][:, -1:] + 1).repeat_interleave(2, 0), "past_key_values": cache,
    }  # fmt: skip
    states, _ = forward_states(model, said, sites, layers)
    return [{site: x.unflatten(0, (b, 2))[:, k] for site, x in states.items()} for k in (0, 1)]
