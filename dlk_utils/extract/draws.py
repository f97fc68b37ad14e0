"""Dropout draws of prompts: over the complete prompt, or over its last token alone."""

import copy
import itertools
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

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
    p: float,
    seed: int,
    scope: str,
    places: str | Sequence[str],
    positions: int = 1,
) -> list[Draw]:
    """Draw the states of some prompts, with masks that depend on (key, draw, seed) alone.

    Parameters
    ----------
    model, input_ids
        A causal model, and the token ids of each prompt.
    keys
        What names each prompt for the seeds.
    sites, layers, p, scope, places, positions
        As for `draw_states`.
    n_draws, seed
        Number of draws, and what tells one set of draws from another.

    Raises
    ------
    DeadDropout
        If two draws of a prompt are equal.
    """
    batch = pad(input_ids, device=model.device)
    seeds = [[draw_seed(key, draw, seed) for key in keys] for draw in range(n_draws)]
    options = {"p": p, "scope": scope, "places": places, "positions": positions}
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
    """Run a batch once for each dropout draw, and keep the states at the last token.

    Parameters
    ----------
    model, batch
        A causal model, and left-padded prompts.
    sites, layers
        Where to read.
    seeds
        For each draw, a `draw_seed` a row.
    p, places
        Share that is dropped, and where (`mc_dropout`).
    scope
        One of `SCOPES`. With "last_token" the tokens before the last run once, without dropout.
    positions
        How many tokens from the end to read; 1 with the scope "last_token".
    at_once
        With the scope "last_token", how many draws to run in one pass. By default as many as the
        batch is wide, so that their states take no more memory than the prompts' did, and one where
        the family's attention cannot be told what each draw sees (`takes_a_mask`).

    Returns
    -------
    list of (states, logits)
        For each draw the states by site, [layer, b, d] or [layer, b, positions, d], and the
        next-token logits [b, vocab].

    Raises
    ------
    ValueError
        If the scope is unknown, or more positions are asked for than have states.
    DeadDropout
        If dropout cannot act at one of the places in this family.
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
    """Run the last token of each row `k` times, in one pass.

    Parameters
    ----------
    model
        A causal model.
    last
        The last tokens with everything before them in the cache (`cached_prefix`). It stays as it
        is, so that further draws can start from it.
    k
        How many copies of the last token to run.
    sites, layers
        Where to read.

    Returns
    -------
    list of (states, logits)
        For each copy, as `draw_states` gives them.
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
    """Say what each of `k` copies of a prompt's last token sees.

    Each copy sees the prompt's tokens before it, which are in the cache, and itself. It does not
    see the other copies. For a prompt of tokens a b c and three copies of c, where 1 is "sees"::

              a b c1 c2 c3
        c1    1 1 1  0  0
        c2    1 1 0  1  0
        c3    1 1 0  0  1

    Parameters
    ----------
    attention_mask
        The prompts' own mask [b, t], 0 at padding.
    k
        Number of copies.

    Returns
    -------
    Tensor [b, 1, k, t - 1 + k]
        By row, (any) head, copy, and what may be seen.
    """
    b = len(attention_mask)
    before = attention_mask[:, None, :-1].bool().expand(-1, k, -1)
    itself = torch.eye(k, dtype=torch.bool, device=attention_mask.device).expand(b, k, k)
    return torch.cat([before, itself], 2)[:, None]


def takes_a_mask(model: nn.Module, width: int) -> bool:
    """Whether a mask alone decides what a token sees, in prompts of `width` tokens.

    It does not where distance is counted in places (ALiBi, or a window shorter than the prompt),
    nor in a fused kernel that takes no mask.
    """
    return (
        takes_positions(model)
        and not getattr(model.config, "alibi", False)
        and window(model) >= width
        and model.config._attn_implementation in ("sdpa", "eager")
    )


def _branch(cache: Cache) -> Cache:
    """Return a cache that can grow by itself.

    A layer of it makes new tensors when it grows, so those of `cache` stay, and none is copied.
    """
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

    Parameters
    ----------
    model, prompts
        A causal model, and rows with `row_id` and `input_ids`.
    p, seed, scope, places
        As for `draw_states`.

    Returns
    -------
    DataFrame
        `layer`; `relative_move`, the mean distance of the two states of `resid_post` relative to
        the first one's norm; `least`, its minimum over the prompts.

    Raises
    ------
    DeadDropout
        If two draws of a prompt are equal.
    """
    options = {"p": p, "seed": seed, "scope": scope, "places": places}
    keys = list(prompts.row_id)
    draws = seeded_draws(model, prompts.input_ids, keys, ["resid_post"], n_draws=2, **options)
    first, second = (states["resid_post"].float() for states, _ in draws)
    move = (second - first).norm(dim=-1) / first.norm(dim=-1)
    return pd.DataFrame(
        {
            "layer": range(len(move)),
            "relative_move": move.mean(1).numpy(),
            "least": move.min(1).values.numpy(),
        }
    )


def refuse_equal(a: Tensor, b: Tensor, names: Sequence[str]) -> None:
    """Raise `DeadDropout` if a row of two draws [n, d] is the same in both."""
    equal = (a == b).all(-1)
    if equal.any():
        first = names[int(equal.nonzero()[0])]
        raise DeadDropout(
            f"{int(equal.sum())} of {len(equal)} rows have two equal draws (first: {first}): "
            "dropout has no effect"
        )
