"""Contrast pairs: the states of a row after it has said choice 0, and after choice 1. The prompt runs once.

Source: Burns, Ye, Klein, Steinhardt, arXiv 2212.03827.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from dlk_utils.extract import Layers, fill_rows, forward, forward_states, named
from dlk_utils.shared import plan_shared, shared_batch
from dlk_utils.sites import blocks, layer_numbers


def extract_contrast(model: nn.Module, prompts: pd.DataFrame, out: Path, *, record: Mapping[str, Any], sites: Sequence[str] = ("resid_post",), layers: Layers = "all", batch_tokens: int = 2048, only: Sequence[int] | None = None) -> None:
    """Store `activation.site.layer.k` [n, d] of one clean pass at the token that says choice `k`, 0 or 1 (its first token, as written).

    Raises `ValueError` for rows whose choices begin with the same token: nothing would tell the two apart.
    """
    alike = prompts[[a[0] == b[0] for a, b in prompts.strict_ids]]
    if len(alike):
        raise ValueError(f"contrast pairs: expected choices that differ in their first token, got {list(alike.choices.iloc[0])} (template {alike.template.iloc[0]})")
    numbers = layer_numbers(layers, len(blocks(model)))

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        batch, b, found = shared_batch(model, list(rows.input_ids)), len(rows), {}
        with torch.no_grad():
            cache = forward(model, batch, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        one = torch.ones(b, 1, dtype=torch.long, device=model.device)
        said = {"input_ids": torch.tensor([[c[0]] for pair in rows.strict_ids for c in pair], device=model.device), "attention_mask": torch.cat([batch["attention_mask"], one], 1).repeat_interleave(2, 0)}
        states, _ = forward_states(model, said | {"position_ids": (batch["position_ids"][:, -1:] + 1).repeat_interleave(2, 0), "past_key_values": cache}, sites, numbers)
        for k in (0, 1):
            found |= named({site: x.unflatten(0, (b, 2))[:, k] for site, x in states.items()}, "activation", k, numbers)
        return found

    fill_rows(out, prompts, {**record, "sites": list(sites), "layers": numbers, "pairs": "contrast"}, plan_shared(prompts, batch_tokens), compute, "contrast pairs", batch_tokens, only)
