"""Monte-Carlo dropout draws of a prompt: over the whole sequence, or over its last token with everything before it shared."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from dlk_utils.behaviour import bootstrap_mean
from dlk_utils.choices import choice_logprobs, refuse_whole
from dlk_utils.dropout import INJECTED, DeadDropout, draw_seed, mc_dropout
from dlk_utils.extract import Batch, Layers, cached_prefix, fill_rows, forward_states, last_logits, named, pad, plan_batches
from dlk_utils.sites import blocks, layer_numbers

SCOPES = ("sequence", "last_token")
"""Where dropout acts: on the whole prompt (the original's meaning of a pair), or on the last token alone (all draws share one prefix)."""


def extract_activations(
    model: nn.Module, prompts: pd.DataFrame, out: Path, *, record: Mapping[str, Any], sites: Sequence[str] = ("resid_post",), layers: Layers = "all",
    draws: int = 2, p: float = 0.1, scope: str = "sequence", places: str | Sequence[str] = INJECTED, positions: int = 1, seed: int = 0, batch_tokens: int = 2048, only: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Store `activation.site.layer.draw` [n, d] and `choice_logprobs.draw` [n, 2] for `draws` dropout draws of each prompt; with `draws=1, p=0.0` for one clean pass.

    The masks depend on (row, draw) alone. `places` are where `mc_dropout` acts. With `positions` above 1 (and scope "sequence") the states are [n, positions, d], of the last
    tokens. Raises `DeadDropout` if two draws of a row are equal, `ChoiceError` if choices are scored whole, `ValueError` where a prompt has fewer tokens than that.
    """
    refuse_whole(prompts, "dropout draws")
    clean = (draws, p) == (1, 0)
    if draws < 2 and not clean:
        raise ValueError(f"draws: expected at least 2 (or one clean pass, with draws=1 and p=0), got {draws} with p={p}")
    numbers = layer_numbers(layers, len(blocks(model)))

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        batch, found = pad(rows.input_ids, device=model.device), {}
        seeds = [[draw_seed(r, k, seed) for r in rows.row_id] for k in range(draws)]
        drawn = [forward_states(model, batch, sites, numbers, positions=positions)] if clean else draw_states(model, batch, sites, numbers, seeds=seeds, p=p, scope=scope, places=places, positions=positions)
        for k, (states, logits) in enumerate(drawn):
            found |= named(states, "activation", k, numbers) | {f"choice_logprobs.{k}": choice_logprobs(logits, list(rows.choice_ids))}
            if k:
                refuse_equal(drawn[k - 1][1], logits, rows.row_id)  # of the logits: a site early in the model may come before anything that is dropped
        return found

    parts = {**record, "mode": "clean" if clean else "dropout", "sites": list(sites), "layers": numbers, "draws": draws, "p": p, "scope": scope, "places": places if isinstance(places, str) else list(places), "positions": positions, "seed": seed}
    fill_rows(out, prompts, parts, plan_batches(prompts, batch_tokens), compute, "dropout draws", batch_tokens, only)


def draw_states(
    model: nn.Module, batch: Batch, sites: Sequence[str], layers: Layers = "all", *, seeds: Sequence[Sequence[int]], p: float, scope: str = "sequence", places: str | Sequence[str] = INJECTED, positions: int = 1, copies: int = 16
) -> list[tuple[dict[str, Float[Tensor, "b layer ..."]], Float[Tensor, "b vocab"]]]:
    """States and logits at the last token (the last `positions`, as `forward_states` gives them), draw after draw; `seeds` holds a seed a row for each draw.

    With `scope="last_token"` the prompt runs once without dropout, and `copies` draws at a time go on from its cache; one token is all that has states then.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if scope == "sequence":
        found = []
        for of_rows in seeds:
            with mc_dropout(model, p, seeds=of_rows, positions=batch["position_ids"], sites=places):
                found.append(forward_states(model, batch, sites, layers, positions=positions))
        return found
    last, b, found = cached_prefix(model, batch), len(batch["input_ids"]), []
    for start in range(0, len(seeds), copies):
        some = seeds[start : start + copies]
        k = len(some)
        repeated = {name: x.repeat_interleave(k, 0) for name, x in last.items() if name != "past_key_values"} | {"past_key_values": repeated_cache(last["past_key_values"], k)}
        with mc_dropout(model, p, seeds=[s for row in zip(*some, strict=True) for s in row], positions=batch["position_ids"].repeat_interleave(k, 0), sites=places):
            states, logits = forward_states(model, repeated, sites, layers, positions=positions)
        found += [({site: x.view(b, k, *x.shape[1:])[:, i] for site, x in states.items()}, logits.view(b, k, -1)[:, i]) for i in range(k)]
    return found


def repeated_cache(cache: Cache, k: int) -> Cache:
    """A key-value cache with each row `k` times, for one pass. A layer's rows are repeated when that layer is run, so that no more than one layer's are there at once, and `cache` stays as it is."""
    layers = [copy.copy(layer) for layer in cache.layers]

    def update(layer: CacheLayerMixin, *new, **options) -> tuple[Tensor, Tensor]:
        own = copy.copy(layer)
        own.batch_repeat_interleave(k)
        return own.update(*new, **options)

    for layer, own in zip(layers, cache.layers, strict=True):
        layer.update = partial(update, own)
    repeated = copy.copy(cache)
    repeated.layers = layers
    return repeated


def dropout_audit(model: nn.Module, prompts: pd.DataFrame, *, p: float = 0.1, seed: int = 0, scope: str = "sequence", places: str | Sequence[str] = INJECTED) -> pd.DataFrame:
    """How far two draws lie apart by layer, relative to the state's norm, over a few prompts. Raises `DeadDropout` if nothing moves."""
    batch = pad(prompts.input_ids, device=model.device)
    seeds = [[draw_seed(r, k, seed) for r in prompts.row_id] for k in (0, 1)]
    one, other = (states["resid_post"].float() for states, _ in draw_states(model, batch, ["resid_post"], seeds=seeds, p=p, scope=scope, places=places))
    move = (other - one).norm(dim=-1) / one.norm(dim=-1)
    refuse_equal(one[:, -1], other[:, -1], prompts.row_id)
    return pd.DataFrame({"layer": range(move.shape[1]), "relative_move": move.mean(0).numpy(), "least": move.min(0).values.numpy()})


def move_table(model: nn.Module, prompts: pd.DataFrame, *, ps: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.4), scopes: Sequence[str] = SCOPES, seed: int = 0) -> pd.DataFrame:
    """For each scope and p, over a few prompts: how far two draws move the last layer's state (relative to its norm) and the probability of choice 1
    (the mean, with a 95 % bootstrap interval), and how often they disagree about the answer."""
    refuse_whole(prompts, "dropout draws")
    batch, rows = pad(prompts.input_ids, device=model.device), []
    seeds = [[draw_seed(r, k, seed) for r in prompts.row_id] for k in (0, 1)]
    for scope in scopes:
        for p in ps:
            (one, first), (other, second) = draw_states(model, batch, ["resid_post"], -1, seeds=seeds, p=p, scope=scope)
            a, b = (x["resid_post"][:, 0].float() for x in (one, other))
            p1 = [(logp[:, 1] - logp[:, 0]).double().sigmoid().cpu().numpy() for logp in (choice_logprobs(x, list(prompts.choice_ids)) for x in (first, second))]
            move = np.abs(p1[1] - p1[0])
            low, high = bootstrap_mean(move, prompts.example_id.to_numpy())
            rows.append({"scope": scope, "p": p, "rows": len(move), "state_move": float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean()), "answer_move": move.mean(), "answer_move_low": low, "answer_move_high": high, "disagree": float(((p1[0] > 0.5) != (p1[1] > 0.5)).mean())})
    return pd.DataFrame(rows)


def spread_table(model: nn.Module, prompts: pd.DataFrame, *, n_draws: int = 16, p: float = 0.1, scopes: Sequence[str] = SCOPES, seed: int = 0) -> pd.DataFrame:
    """For each scope and the first 2, 4, ... `n_draws` draws of a few prompts: the range of the probability of choice 1 (its mean, with a 95 % bootstrap interval),
    and how far its mean over the draws lies from that of the plain pass."""
    refuse_whole(prompts, "dropout draws")
    batch, rows, examples = pad(prompts.input_ids, device=model.device), [], prompts.example_id.to_numpy()
    p1 = lambda logits: torch.diff(choice_logprobs(logits, list(prompts.choice_ids)).double())[:, 0].sigmoid().cpu().numpy()
    plain, seeds = p1(last_logits(model, batch)), [[draw_seed(r, k, seed) for r in prompts.row_id] for k in range(n_draws)]
    for scope in scopes:
        drawn = np.stack([p1(logits) for _, logits in draw_states(model, batch, ["resid_post"], -1, seeds=seeds, p=p, scope=scope)])
        for k in [2**i for i in range(1, n_draws.bit_length())]:
            spread, off = np.ptp(drawn[:k], axis=0), np.abs(drawn[:k].mean(0) - plain)
            low, high = bootstrap_mean(spread, examples)
            rows.append({"scope": scope, "draws": k, "range": spread.mean(), "range_low": low, "range_high": high, "mean_off_plain": off.mean()})
    return pd.DataFrame(rows)


def refuse_equal(a: Tensor, b: Tensor, rows: Sequence[str] | pd.Series) -> None:
    """Raises `DeadDropout` if a row of two draws [n, d] is the same in both."""
    same = (a == b).all(-1)
    if same.any():
        raise DeadDropout(f"{int(same.sum())} of {len(same)} rows have two equal draws (first: {list(rows)[int(same.nonzero()[0])]}): dropout has no effect")
