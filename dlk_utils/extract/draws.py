"""Dropout draws of prompts: over the complete prompt, or over its last token alone.

Draws of the last token share one pass over the tokens before it, and then run side by side, each
with its own dropout masks (`dropout`). What each of them may see is decided in `last_token_mask`.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dlk_utils.errors import DeadDropout
from dlk_utils.extract.batches import Batch, Layers, cached_prefix, forward, pad, takes_positions
from dlk_utils.extract.dropout import DEFAULT_P, INJECTED, draw_seed, mc_dropout
from dlk_utils.extract.packing import window
from dlk_utils.extract.states import forward_states, record_sites
from dlk_utils.models.sites import blocks, layer_numbers

SCOPES = ("sequence", "last_token")
"""Where dropout acts: on the complete prompt, as in the original study's pairs, or on its last
token alone, so that all draws share one pass over the tokens before it."""

Draw = tuple[dict[str, Float[Tensor, "layer b ..."]], Float[Tensor, "b vocab"]]
"""The states of one draw by site, and its next-token logits."""


def seeded_draws(
    model: nn.Module,
    input_ids: Sequence[Sequence[int]] | pd.Series,
    keys: Sequence[str],
    sites: Sequence[str],
    layers: Layers = "all",
    *,
    n_draws: int,
    seed: int,
    **options: Any,
) -> list[Draw]:
    """Make `n_draws` draws of some prompts, with masks that depend on (key, draw, seed) alone.

    `keys` has a name for each prompt; `options` are those of `draw_states`. Raises `DeadDropout` if
    two successive draws of a prompt are equal.
    """
    batch = pad(input_ids, device=model.device)
    seeds = [[draw_seed(key, draw, seed) for key in keys] for draw in range(n_draws)]
    draws = draw_states(model, batch, sites, layers, seeds=seeds, **options)
    n_layers = len(blocks(model))
    # Only the last layer: an earlier one may lie before everything that is dropped.
    has_last_state = "resid_post" in sites and n_layers - 1 in layer_numbers(layers, n_layers)
    for (states, logits), (next_states, next_logits) in itertools.pairwise(draws):
        refuse_equal(logits, next_logits, keys)
        if has_last_state:
            last, next_last = (x["resid_post"][-1].flatten(1) for x in (states, next_states))
            refuse_equal(last, next_last, keys)
    return draws


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
) -> list[Draw]:
    """Run a left-padded batch once for each draw, with what `forward_states` returns of each.

    Parameters
    ----------
    seeds
        For each draw, one `draw_seed` per row.
    p, places
        Share that is dropped, and where (`mc_dropout`).
    scope
        One of `SCOPES`. With "last_token" the tokens before the last run once, without dropout.
    at_once
        With "last_token", how many draws run side by side. By default the padded length of the
        prompts, so that a pass never holds more tokens than the prompts' own pass. Always one in
        families whose attention cannot be told what each draw sees (`takes_a_mask`).

    Raises
    ------
    ValueError
        If the scope is unknown, or "last_token" with more `positions` than that token.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if scope == "sequence":
        draws = []
        position_ids = batch["position_ids"]
        for row_seeds in seeds:
            with mc_dropout(model, p, seeds=row_seeds, position_ids=position_ids, places=places):
                draws.append(forward_states(model, batch, sites, layers, positions=positions))
        return draws
    if positions != 1:
        raise ValueError(
            "positions: expected 1 with scope 'last_token', for no other token has a draw of its "
            f"own, got {positions}"
        )
    last = cached_prefix(model, batch)
    width = batch["attention_mask"].shape[1]
    at_once = (at_once or width) if takes_a_mask(model, width) else 1
    draws = []
    for start in range(0, len(seeds), at_once):
        # [b, k]: each copy of a last token has the seed of its own draw.
        copy_seeds = torch.tensor([list(of_draw) for of_draw in seeds[start : start + at_once]]).T
        k = copy_seeds.shape[1]
        # The k copies of the last token stand at the same position.
        positions_of_copies = last["position_ids"].expand(-1, k - 1)
        position_ids = torch.cat([batch["position_ids"], positions_of_copies], 1)
        with mc_dropout(model, p, seeds=copy_seeds, position_ids=position_ids, places=places):
            draws += side_by_side(model, last, k, sites, layers)
    return draws


@torch.no_grad()
def side_by_side(
    model: nn.Module, last: Batch, k: int, sites: Sequence[str], layers: Layers = "all"
) -> list[Draw]:
    """Run the last token of each row `k` times in one pass, and return the states of each copy.

    `last` has everything before the last tokens in its cache (`cached_prefix`). That cache stays as
    it is, so that further draws can start from it.
    """
    mask = last["attention_mask"]
    if k > 1:
        sees = last_token_mask(mask, k)
        # Added to the scores of attention: 0 where a copy sees a token, else the least number.
        mask = torch.zeros(sees.shape, dtype=model.dtype, device=mask.device)
        mask = mask.masked_fill(~sees, torch.finfo(model.dtype).min)
    batch = {
        "input_ids": last["input_ids"].expand(-1, k),
        "position_ids": last["position_ids"].expand(-1, k),
        "attention_mask": mask,
        "past_key_values": _branch(last["past_key_values"]),
    }
    with record_sites(model, sites, layers, lambda x: x.to("cpu", copy=True)) as recorded:
        logits = forward(model, batch, last_only=False, use_cache=True).logits
    states = {site: torch.stack(by_layer) for site, by_layer in recorded.items()}
    return [({site: x[:, :, i] for site, x in states.items()}, logits[:, i]) for i in range(k)]


def last_token_mask(attention_mask: Tensor, k: int) -> Bool[Tensor, "b 1 k keys"]:
    """Make the attention mask of draws of the last token: which keys each of `k` copies sees.

    A copy sees the tokens before it, which are in the cache, and itself, but no other copy. For a
    prompt a b c and three copies of c::

              a  b  c1 c2 c3
        c1    1  1  1  0  0
        c2    1  1  0  1  0
        c3    1  1  0  0  1

    `attention_mask` [b, t] is that of the prompts: 0 at padding, which no copy sees.
    """
    b = len(attention_mask)
    before = attention_mask[:, None, :-1].bool().expand(-1, k, -1)
    itself = torch.eye(k, dtype=torch.bool, device=attention_mask.device).expand(b, k, k)
    return torch.cat([before, itself], 2)[:, None]


def takes_a_mask(model: nn.Module, width: int) -> bool:
    """Whether a mask alone decides what a token sees, in a batch that is `width` tokens wide.

    It does not where distance is counted in places (ALiBi, or a window shorter than that), nor in a
    fused kernel that takes no mask.
    """
    return (
        takes_positions(model)
        and not getattr(model.config, "alibi", False)
        and window(model) >= width
        and model.config._attn_implementation in ("sdpa", "eager")
    )


def _branch(cache: Any) -> Any:
    """Return a cache with the same tensors, which stay as they are when it grows."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch


def dropout_audit(
    model: nn.Module,
    prompts: pd.DataFrame,
    *,
    p: float = DEFAULT_P,
    seed: int = 0,
    scope: str = "sequence",
    places: str | Sequence[str] = INJECTED,
) -> pd.DataFrame:
    """Measure how far two draws lie apart, layer by layer, over a few prompts.

    Returns
    -------
    DataFrame
        `layer`; `relative_move`, the distance of the two states of `resid_post` relative to the
        first one's norm, on average over the prompts; and `least`, its minimum.

    Raises
    ------
    DeadDropout
        If two successive draws of a prompt are equal.
    """
    options = {"n_draws": 2, "p": p, "seed": seed, "scope": scope, "places": places}
    keys = list(prompts.row_id)
    draws = seeded_draws(model, prompts.input_ids, keys, ["resid_post"], **options)
    first, second = (states["resid_post"].float() for states, _ in draws)
    move = (second - first).norm(dim=-1) / first.norm(dim=-1)
    mean, least = move.mean(1).numpy(), move.min(1).values.numpy()
    return pd.DataFrame({"layer": range(len(move)), "relative_move": mean, "least": least})


def refuse_equal(a: Tensor, b: Tensor, names: Sequence[str]) -> None:
    """Raise `DeadDropout` if a row of two draws [n, d] is the same in both."""
    equal = (a == b).all(-1)
    if equal.any():
        first = names[int(equal.nonzero()[0])]
        raise DeadDropout(
            f"{int(equal.sum())} of {len(equal)} rows have two equal draws (first: {first}): "
            "dropout has no effect"
        )
