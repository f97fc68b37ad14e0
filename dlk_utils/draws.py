"""Monte-Carlo dropout draws of a prompt: over the whole sequence, or over its last token with everything before it shared."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dlk_utils.behaviour import bootstrap_mean
from dlk_utils.choices import choice_logprobs, refuse_whole
from dlk_utils.dropout import INJECTED, DeadDropout, draw_seed, mc_dropout
from dlk_utils.extract import Batch, Layers, cached_prefix, fill_rows, forward, forward_states, last_logits, named, pad, plan_batches, takes_positions
from dlk_utils.shared import window
from dlk_utils.sites import at_sites, blocks, layer_numbers

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
                refuse_equal(drawn[k - 1][1], logits, rows.row_id)
                if "resid_post" in states and numbers[-1] + 1 == len(blocks(model)):  # an earlier site may come before anything that is dropped
                    refuse_equal(drawn[k - 1][0]["resid_post"][:, -1].flatten(1), states["resid_post"][:, -1].flatten(1), rows.row_id)
        return found

    parts = {**record, "mode": "clean" if clean else "dropout", "sites": list(sites), "layers": numbers, "draws": draws, "p": p, "scope": scope, "places": places if isinstance(places, str) else list(places), "positions": positions, "seed": seed}
    fill_rows(out, prompts, parts, plan_batches(prompts, batch_tokens), compute, "dropout draws", batch_tokens, only)


def draw_states(
    model: nn.Module, batch: Batch, sites: Sequence[str], layers: Layers = "all", *, seeds: Sequence[Sequence[int]], p: float, scope: str = "sequence", places: str | Sequence[str] = INJECTED, positions: int = 1, at_once: int | None = None
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
        raise ValueError(f"positions: expected 1 with scope 'last_token', for no other token has a draw of its own, got {positions}")
    width = batch["attention_mask"].shape[1]
    at_once, last, found = (at_once or width) if takes_a_mask(model, width) else 1, cached_prefix(model, batch), []
    for start in range(0, len(seeds), at_once):
        some = torch.tensor([list(of_rows) for of_rows in seeds[start : start + at_once]]).T
        with mc_dropout(model, p, seeds=some, positions=torch.cat([batch["position_ids"], last["position_ids"].expand(-1, some.shape[1] - 1)], 1), sites=places):
            found += side_by_side(model, last, some.shape[1], sites, layers)
    return found


def takes_a_mask(model: nn.Module, width: int) -> bool:
    """Whether a mask of which token sees which is all that says so, in prompts of so many tokens: not where distance is counted in places (ALiBi, a window that is shorter), nor in a fused kernel without a mask."""
    return takes_positions(model) and not getattr(model.config, "alibi", False) and window(model) >= width and model.config._attn_implementation in ("sdpa", "eager")


@torch.no_grad()
def side_by_side(model: nn.Module, last: Batch, k: int, sites: Sequence[str], layers: Layers = "all") -> list[tuple[dict[str, Tensor], Tensor]]:
    """`k` times the last token of each row, in one pass: they stand at the same position, and each sees what is in the cache and itself, not its neighbours. The cache stays as it is."""
    b, mask = len(last["input_ids"]), last["attention_mask"]
    if k > 1:
        itself = torch.eye(k, dtype=torch.bool, device=mask.device).expand(b, k, k)
        sees = torch.cat([mask[:, None, :-1].bool().expand(-1, k, -1), itself], 2)[:, None]
        mask = torch.zeros(sees.shape, dtype=model.dtype, device=mask.device).masked_fill(~sees, torch.finfo(model.dtype).min)
    batch = {"input_ids": last["input_ids"].expand(-1, k), "position_ids": last["position_ids"].expand(-1, k), "attention_mask": mask, "past_key_values": _own(last["past_key_values"])}
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    with at_sites(model, sites, lambda site, layer, hidden: found[site].append(hidden.to("cpu", copy=True)), layers):
        logits = forward(model, batch, last_only=False, use_cache=True).logits
    states = {site: torch.stack(of_layers, 2) for site, of_layers in found.items()}
    return [({site: x[:, i] for site, x in states.items()}, logits[:, i]) for i in range(k)]


def _own(cache: Cache) -> Cache:
    """A cache that can go on by itself: a layer makes new tensors when it grows, and those of `cache` stay."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


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
