"""Monte-Carlo dropout draws of a prompt: over the whole sequence, or over its last token with everything before it shared."""

import copy
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dlk_utils.errors import DeadDropout
from dlk_utils.extract.batches import Batch, Layers, cached_prefix, forward, pad, takes_positions
from dlk_utils.extract.dropout import INJECTED, draw_seed, mc_dropout
from dlk_utils.extract.packing import window
from dlk_utils.extract.states import forward_states
from dlk_utils.models.sites import at_sites

SCOPES = ("sequence", "last_token")
"""Where dropout acts: on the whole prompt (the original's meaning of a pair), or on the last token alone (all draws share one prefix)."""


def draw_states(
    model: nn.Module,
    batch: Batch,
    sites: Sequence[str],
    layers: Layers = "all",
    *,
    seeds: Sequence[Sequence[int]],
    p: float,
    scope: str = "sequence",
    places: str | Sequence[str] = INJECTED,
    positions: int = 1,
    at_once: int | None = None,
) -> list[tuple[dict[str, Float[Tensor, "b layer ..."]], Float[Tensor, "b vocab"]]]:
    """States and logits at the last token (the last `positions`, as `forward_states` gives them), draw after draw; `seeds` holds a seed a row for each draw.

    With `scope="last_token"` the prompt runs once without dropout, and from its cache go `at_once` draws together, by default as many as the batch is wide, so that their states take no more memory than the
    prompt's did (their logits, which are returned, have a row for each draw); one by one where a family's mask cannot be given (`takes_a_mask`). Raises `ValueError` for another scope, or for more than the one position that has states then.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if scope == "sequence":
        found = []
        for of_rows in seeds:
            with mc_dropout(model, p, seeds=of_rows, positions=batch["position_ids"], sites=places):
                found.append(forward_states(model, batch, sites, layers, positions=positions))
        return found
    if positions != 1:
        raise ValueError(
            f"positions: expected 1 with scope 'last_token', for no other token has a draw of its own, got {positions}"
        )
    width = batch["attention_mask"].shape[1]
    at_once, last, found = (
        (at_once or width) if takes_a_mask(model, width) else 1,
        cached_prefix(model, batch),
        [],
    )
    for start in range(0, len(seeds), at_once):
        some = torch.tensor([list(of_rows) for of_rows in seeds[start : start + at_once]]).T
        with mc_dropout(
            model,
            p,
            seeds=some,
            positions=torch.cat(
                [batch["position_ids"], last["position_ids"].expand(-1, some.shape[1] - 1)], 1
            ),
            sites=places,
        ):
            found += side_by_side(model, last, some.shape[1], sites, layers)
    return found


def takes_a_mask(model: nn.Module, width: int) -> bool:
    """Whether a mask of which token sees which is all that says so, in prompts of so many tokens: not where distance is counted in places (ALiBi, a window that is shorter), nor in a fused kernel without a mask."""
    return (
        takes_positions(model)
        and not getattr(model.config, "alibi", False)
        and window(model) >= width
        and model.config._attn_implementation in ("sdpa", "eager")
    )


@torch.no_grad()
def side_by_side(
    model: nn.Module, last: Batch, k: int, sites: Sequence[str], layers: Layers = "all"
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """`k` times the last token of each row, in one pass: they stand at the same position, and each sees what is in the cache and itself, not its neighbours. The cache stays as it is."""
    b, mask = len(last["input_ids"]), last["attention_mask"]
    if k > 1:
        itself = torch.eye(k, dtype=torch.bool, device=mask.device).expand(b, k, k)
        sees = torch.cat([mask[:, None, :-1].bool().expand(-1, k, -1), itself], 2)[:, None]
        mask = torch.zeros(sees.shape, dtype=model.dtype, device=mask.device).masked_fill(
            ~sees, torch.finfo(model.dtype).min
        )
    batch = {
        "input_ids": last["input_ids"].expand(-1, k),
        "position_ids": last["position_ids"].expand(-1, k),
        "attention_mask": mask,
        "past_key_values": _own(last["past_key_values"]),
    }
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    with at_sites(
        model,
        sites,
        lambda site, layer, hidden: found[site].append(hidden.to("cpu", copy=True)),
        layers,
    ):
        logits = forward(model, batch, last_only=False, use_cache=True).logits
    states = {site: torch.stack(of_layers, 2) for site, of_layers in found.items()}
    return [({site: x[:, i] for site, x in states.items()}, logits[:, i]) for i in range(k)]


def _own(cache: Cache) -> Cache:
    """A cache that can go on by itself: a layer makes new tensors when it grows, and those of `cache` stay."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


def dropout_audit(
    model: nn.Module,
    prompts: pd.DataFrame,
    *,
    p: float = 0.1,
    seed: int = 0,
    scope: str = "sequence",
    places: str | Sequence[str] = INJECTED,
) -> pd.DataFrame:
    """How far two draws lie apart by layer, relative to the state's norm, over a few prompts. Raises `DeadDropout` if nothing moves."""
    batch = pad(prompts.input_ids, device=model.device)
    seeds = [[draw_seed(r, k, seed) for r in prompts.row_id] for k in (0, 1)]
    one, other = (
        states["resid_post"].float()
        for states, _ in draw_states(
            model, batch, ["resid_post"], seeds=seeds, p=p, scope=scope, places=places
        )
    )
    move = (other - one).norm(dim=-1) / one.norm(dim=-1)
    refuse_equal(one[:, -1], other[:, -1], prompts.row_id)
    return pd.DataFrame(
        {
            "layer": range(move.shape[1]),
            "relative_move": move.mean(0).numpy(),
            "least": move.min(0).values.numpy(),
        }
    )


def refuse_equal(a: Tensor, b: Tensor, rows: Sequence[str] | pd.Series) -> None:
    """Raises `DeadDropout` if a row of two draws [n, d] is the same in both."""
    same = (a == b).all(-1)
    if same.any():
        raise DeadDropout(
            f"{int(same.sum())} of {len(same)} rows have two equal draws (first: {list(rows)[int(same.nonzero()[0])]}): dropout has no effect"
        )
