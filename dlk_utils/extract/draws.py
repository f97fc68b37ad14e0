"""Dropout draws of prompts: over the complete prompt, over its question, or over its last token.

The narrower the scope, the more of a prompt is the same in all its draws and runs only once. Draws
of the last token share one pass over the tokens before it, and then run side by side, each with its
own dropout masks (`dropout`). Draws of the question share the instruction.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.errors import DeadDropout, ParameterError
from dlk_utils.extract.batches import Layers, pad
from dlk_utils.extract.dropout import DEFAULT_P, INJECTED, draw_seed, mc_dropout
from dlk_utils.extract.packing import pack
from dlk_utils.extract.positions import divide_batches, require_same_frequencies
from dlk_utils.extract.prefixes import run_prefixes, run_trunk, takes_trees
from dlk_utils.extract.states import (
    States,
    forward_states,
    highest_layer,
    read_states,
)
from dlk_utils.models.sites import blocks, layer_numbers

SCOPES = ("sequence", "question", "last_token")
"""Where dropout acts: on the complete prompt, as in the original study's pairs; on the tokens after
the instruction, which then runs once for all draws; or on the last token alone."""

Draw = tuple[States, Float[Tensor, "b vocab"] | None]
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
    seeds = [[draw_seed(key, draw, seed) for key in keys] for draw in range(n_draws)]
    draws = draw_states(model, list(input_ids), sites, layers, seeds=seeds, **options)
    n_layers = len(blocks(model))
    # Only the last layer: an earlier one may lie before everything that is dropped.
    has_last_state = "resid_post" in sites and n_layers - 1 in layer_numbers(layers, n_layers)
    for (states, logits), (next_states, next_logits) in itertools.pairwise(draws):
        if logits is not None:
            refuse_equal(logits, next_logits, keys)
        if has_last_state:
            last, next_last = (x["resid_post"][-1].flatten(1) for x in (states, next_states))
            refuse_equal(last, next_last, keys)
    return draws


def draw_states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sites: Sequence[str],
    layers: Layers = "all",
    *,
    seeds: Sequence[Sequence[int]],
    p: float,
    scope: str = "sequence",
    places: str | Sequence[str] = INJECTED,
    positions: int = 1,
    question_starts: Sequence[int] | None = None,
    at_once: int | None = None,
    with_logits: bool = True,
) -> list[Draw]:
    """Run prompts once for each draw, with the states and logits at their last tokens.

    Parameters
    ----------
    seeds
        For each draw, one `draw_seed` per prompt.
    p, places
        Share that is dropped, and where (`mc_dropout`).
    scope
        One of `SCOPES`.
    positions
        How many tokens to read at the end of each prompt, with scope "sequence".
    question_starts
        With scope "question", how many tokens of each prompt stand before its question.
    at_once
        With scope "last_token", how many draws run side by side. By default they have about as many
        tokens as the prompts. Always one if the model does not take trees
        (`prefixes.takes_trees`).
    with_logits
        If false, the logits are None, and no layer above the highest one asked for runs.

    Raises
    ------
    ParameterError
        If the scope is unknown, if `positions` is above 1 in another scope than "sequence", or if
        `question_starts` are missing or leave no token of a prompt.
    """
    if scope not in SCOPES:
        raise ParameterError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if positions != 1 and scope != "sequence":
        raise ParameterError(
            f"positions: expected 1 with scope {scope!r}, in which not every token has a draw of "
            f"its own, got {positions}"
        )
    dropout = {"p": p, "places": places}
    if scope == "last_token":
        return _last_token_draws(
            model, prompts, sites, layers, seeds, dropout, at_once, with_logits
        )
    if scope == "sequence":
        starts = [0] * len(prompts)
    else:
        starts = _checked_starts(question_starts, prompts)
        if takes_trees(model, max(map(len, prompts))):
            return _question_draws(
                model, prompts, starts, sites, layers, seeds, dropout, with_logits
            )
    batch = pad(prompts, device=model.device)
    position_ids = batch["position_ids"]
    acts = None
    if any(starts):
        acts = position_ids >= torch.tensor(starts, device=position_ids.device)[:, None]
    draws = []
    for row_seeds in seeds:
        with mc_dropout(model, seeds=row_seeds, position_ids=position_ids, acts=acts, **dropout):
            draws.append(
                forward_states(
                    model, batch, sites, layers, positions=positions, with_logits=with_logits
                )
            )
    return draws


@torch.no_grad()
def _last_token_draws(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sites: Sequence[str],
    layers: Layers,
    seeds: Sequence[Sequence[int]],
    dropout: dict[str, Any],
    at_once: int | None,
    with_logits: bool,
) -> list[Draw]:
    """Run the prefixes once, without dropout, and behind them a copy of the last token per draw."""
    highest = None if with_logits else highest_layer(model, layers)
    prefixes = run_prefixes(model, prompts, highest=highest)
    all_seeds = torch.tensor([list(row_seeds) for row_seeds in seeds])
    draws: list[Draw] = []
    for some in prefixes.rounds(len(seeds), at_once):
        appended = prefixes.append(prefixes.next_ids.expand(len(some), -1))
        # Each copy of a last token has the seed of its own draw.
        token_seeds = appended.spread(all_seeds[list(some)])
        position_ids = torch.cat([prefixes.position_ids, appended.batch["position_ids"]], 1)
        with mc_dropout(model, seeds=token_seeds, position_ids=position_ids, **dropout):
            states, logits = read_states(model, appended, sites, layers, with_logits=with_logits)
        by_draw = [None] * len(some) if logits is None else list(logits)
        draws += zip(states, by_draw, strict=True)
    return draws


@torch.no_grad()
def _question_draws(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    starts: Sequence[int],
    sites: Sequence[str],
    layers: Layers,
    seeds: Sequence[Sequence[int]],
    dropout: dict[str, Any],
    with_logits: bool,
) -> list[Draw]:
    """Run all prompts as one tree for each draw; what is trunk of it runs once for all draws.

    What stands at a node is (token, prompt), so that two questions share nothing, for each has
    masks of its own. Before the question, the prompt is -1.
    """
    sequences = []
    for number, (ids, start) in enumerate(zip(prompts, starts, strict=True)):
        instruction = [(token, -1) for token in ids[:start]]
        sequences.append(instruction + [(token, number) for token in ids[start:]])
    packed = pack(sequences)
    token_ids = [[0 if key is None else key[0] for key in row] for row in packed.keys]
    highest = None if with_logits else highest_layer(model, layers)
    n_tokens = max(map(len, prompts))
    require_same_frequencies(model, map(len, prompts))
    rows = run_trunk(model, packed, token_ids, n_tokens=n_tokens, highest=highest)
    # No question is in the trunk, as two prompts share nothing of it.
    numbers = [[-1 if key is None else key[1] for key in row] for row in packed.keys]
    prompt_of = torch.tensor(numbers)[:, packed.n_trunk :]
    where = {
        "acts": (prompt_of >= 0).to(model.device),
        "position_ids": torch.from_numpy(packed.depth).to(model.device),
    }
    draws: list[Draw] = []
    for row_seeds in seeds:
        node_seeds = torch.tensor(row_seeds)[prompt_of].to(model.device)
        with mc_dropout(model, seeds=node_seeds, **where, **dropout):
            [states], logits = read_states(model, rows, sites, layers, with_logits=with_logits)
        draws.append((states, None if logits is None else logits[0]))
    return draws


def _checked_starts(starts: Sequence[int] | None, prompts: Sequence[Sequence[int]]) -> list[int]:
    if starts is None:
        raise ParameterError("scope 'question': expected question_starts, one for each prompt")
    starts = [int(start) for start in starts]
    if len(starts) != len(prompts):
        raise ParameterError(
            f"question_starts: expected one for each prompt ({len(prompts)}), got {len(starts)}"
        )
    for number, (start, ids) in enumerate(zip(starts, prompts, strict=True)):
        if not 0 <= start < len(ids):
            raise ParameterError(
                f"question_starts: expected a place in each prompt, got {start} in prompt {number} "
                f"of {len(ids)} tokens"
            )
    return starts


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
    moves = []
    for numbers in divide_batches(model, [range(len(prompts))], prompts.input_ids.iloc.__getitem__):
        some = prompts.iloc[numbers]
        draws = seeded_draws(model, some.input_ids, list(some.row_id), ["resid_post"], **options)
        first, second = (states["resid_post"].float() for states, _ in draws)
        moves.append((second - first).norm(dim=-1) / first.norm(dim=-1))
    move = torch.cat(moves, 1)
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
