"""Dropout draws of prompts: over the complete prompt, over its question, or over its last token.

A draw is one pass over the prompts with dropout masks of its own (`dropout`). All tokens before the
first one with dropout have the same states in every draw, so they run only once. With dropout at
the last token alone, they are all tokens but the last, and many draws of that token run in one
pass. With dropout over the question, they are the instruction; a model that does not take trees
(`prefixes.takes_trees`) runs it again for each draw.
"""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dlk_utils.errors import DeadDropout, ParameterError
from dlk_utils.extract.batches import Layers, Readout, pad
from dlk_utils.extract.dropout import DEFAULT_P, INJECTED, draw_seed, mc_dropout
from dlk_utils.extract.packing import pack
from dlk_utils.extract.positions import divide_batches, require_same_frequencies
from dlk_utils.extract.prefixes import run_prefixes, run_trunk, takes_trees
from dlk_utils.extract.states import (
    States,
    forward_states,
    highest_layer,
    readout_states,
)
from dlk_utils.models.sites import blocks, layer_numbers

SCOPES = ("sequence", "question", "last_token")
"""Where dropout acts.

"sequence" is the complete prompt, as in the original study's pairs. "question" is the tokens after
the instruction. "last_token" is the last token alone.
"""

Draw = tuple[States, Float[Tensor, "b vocab"] | None]
"""The states of one draw by site, and its next-token logits."""

_SHARED = -1
"""The owner of an instruction's token, which several prompts may share (see `_question_draws`)."""


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
    """Make `n_draws` draws of some prompts, and check that they differ.

    Parameters
    ----------
    keys
        A name for each prompt. The masks of a prompt depend on its key, the number of the draw and
        `seed` alone.
    options
        Those of `draw_states`.

    Raises
    ------
    DeadDropout
        If two successive draws of a prompt are equal. They are compared by their logits, and by
        `resid_post` of the last layer if it is read.
    """
    seeds = [[draw_seed(key, draw, seed) for key in keys] for draw in range(n_draws)]
    draws = draw_states(model, list(input_ids), sites, layers, seeds=seeds, **options)
    n_layers = len(blocks(model))
    # Earlier layers are not compared: there may be no dropout before them.
    has_last_layer = "resid_post" in sites and n_layers - 1 in layer_numbers(layers, n_layers)
    for (states, logits), (next_states, next_logits) in itertools.pairwise(draws):
        if logits is not None:
            refuse_equal(logits, next_logits, keys)
        if has_last_layer:
            last, next_last = states["resid_post"][-1], next_states["resid_post"][-1]
            refuse_equal(last.flatten(1), next_last.flatten(1), keys)
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
    """Run prompts once for each draw; return the states and logits at their last tokens.

    Parameters
    ----------
    seeds
        For each draw, one `draw_seed` per prompt.
    p, places
        Which share of the channels is dropped, and at which places (`mc_dropout`).
    scope
        One of `SCOPES`.
    positions
        How many tokens to read at the end of each prompt, with scope "sequence".
    question_starts
        With scope "question", how many tokens of each prompt come before its question.
    at_once
        With scope "last_token", how many draws run in one pass. By default as many as make that
        pass about as long as the one over the other tokens (`Prefixes.rounds`). A model that does
        not take trees (`prefixes.takes_trees`) runs one at a time.
    with_logits
        If false, the logits are None, and no layer above the highest one asked for runs.

    Returns
    -------
    list
        For each draw its states [layer, b, d] by site, with an axis for positions before the last
        one if `positions` is above 1, and its logits [b, vocab].

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
    passes = _DrawPasses(model, sites, layers, with_logits=with_logits, p=p, places=places)
    if scope == "last_token":
        return _last_token_draws(passes, prompts, seeds, at_once=at_once)
    if scope == "sequence":
        return _padded_draws(passes, prompts, seeds, positions=positions)
    question_starts = _checked_starts(question_starts, prompts)
    if takes_trees(model, max(map(len, prompts))):
        return _question_draws(passes, prompts, seeds, question_starts)
    return _padded_draws(passes, prompts, seeds, question_starts=question_starts)


@dataclass(frozen=True)
class _DrawPasses:
    """What all passes of a set of draws have in common: what they read, and how they drop."""

    model: nn.Module
    sites: Sequence[str]
    layers: Layers
    with_logits: bool
    p: float
    places: str | Sequence[str]

    @property
    def highest_layer(self) -> int | None:
        """The highest layer that has to run; None if all of them and the LM head do."""
        return None if self.with_logits else highest_layer(self.model, self.layers)

    def dropout(
        self,
        seeds: Sequence[int] | Int[Tensor, "b k"],
        position_ids: Int[Tensor, "b t"],
        drop_at: Bool[Tensor, "b k"] | None = None,
    ) -> AbstractContextManager[None]:
        """Return the context in which a pass has dropout; see `mc_dropout`."""
        return mc_dropout(
            self.model,
            self.p,
            seeds=seeds,
            position_ids=position_ids,
            drop_at=drop_at,
            places=self.places,
        )

    def read(self, readout: Readout) -> list[Draw]:
        """Run a batch, and return the draw that each copy of the tokens to be read gives."""
        states, logits = readout_states(
            self.model, readout, self.sites, self.layers, with_logits=self.with_logits
        )
        if logits is None:
            return [(copy_states, None) for copy_states in states]
        return list(zip(states, logits, strict=True))


def _padded_draws(
    passes: _DrawPasses,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    *,
    positions: int = 1,
    question_starts: Sequence[int] | None = None,
) -> list[Draw]:
    """Run the complete prompts as a padded batch, once for each draw.

    Dropout acts on all tokens, or on those from the question on if `question_starts` are given.
    """
    batch = pad(prompts, device=passes.model.device)
    position_ids = batch["position_ids"]
    drop_at = None
    if question_starts is not None:
        starts = torch.tensor(question_starts, device=position_ids.device)
        drop_at = position_ids >= starts[:, None]
    draws = []
    for prompt_seeds in seeds:
        with passes.dropout(prompt_seeds, position_ids, drop_at):
            draw = forward_states(
                passes.model,
                batch,
                passes.sites,
                passes.layers,
                positions=positions,
                with_logits=passes.with_logits,
            )
        draws.append(draw)
    return draws


@torch.no_grad()
def _last_token_draws(
    passes: _DrawPasses,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    *,
    at_once: int | None,
) -> list[Draw]:
    """Run all tokens but the last once, without dropout; then a copy of the last one per draw."""
    prefixes = run_prefixes(passes.model, prompts, highest=passes.highest_layer)
    seeds_by_draw = torch.tensor([list(prompt_seeds) for prompt_seeds in seeds])
    draws: list[Draw] = []
    for group in prefixes.rounds(len(seeds), at_once):
        last_tokens = prefixes.append(prefixes.next_ids.expand(len(group), -1))
        # Each copy of a last token has the seed of its own draw.
        token_seeds = last_tokens.spread(seeds_by_draw[list(group)])
        position_ids = torch.cat([prefixes.position_ids, last_tokens.batch["position_ids"]], 1)
        with passes.dropout(token_seeds, position_ids):
            draws += passes.read(last_tokens)
    return draws


@torch.no_grad()
def _question_draws(
    passes: _DrawPasses,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    question_starts: Sequence[int],
) -> list[Draw]:
    """Run all prompts as one tree for each draw; its trunk runs once for all draws.

    A node of the tree is a pair of a token and its *owner*. The owner of a question's token is the
    number of its prompt, and that of an instruction's token is `_SHARED`. So prompts share the
    beginnings of their instructions, but nothing of their questions, even where these are equal:
    each question has dropout masks of its own.
    """
    sequences = []
    for number, (ids, start) in enumerate(zip(prompts, question_starts, strict=True)):
        owners = [_SHARED] * start + [number] * (len(ids) - start)
        sequences.append(list(zip(ids, owners, strict=True)))
    packed = pack(sequences)
    padding = (0, _SHARED)
    nodes = [[padding if node is None else node for node in row] for row in packed.keys]
    token_ids = [[token for token, _ in row] for row in nodes]
    require_same_frequencies(passes.model, map(len, prompts))
    rows = run_trunk(
        passes.model,
        packed,
        token_ids,
        n_tokens=max(map(len, prompts)),
        highest=passes.highest_layer,
    )
    # The trunk has run without dropout. It holds only what prompts share, so no question.
    owner_at = torch.tensor([[owner for _, owner in row] for row in nodes])[:, packed.n_trunk :]
    drop_at = (owner_at != _SHARED).to(passes.model.device)
    position_ids = torch.from_numpy(packed.depth).to(passes.model.device)
    draws: list[Draw] = []
    for prompt_seeds in seeds:
        # Shared tokens get any seed, as none of their channels are dropped.
        node_seeds = torch.tensor(prompt_seeds)[owner_at.clamp(min=0)].to(passes.model.device)
        with passes.dropout(node_seeds, position_ids, drop_at):
            draws += passes.read(rows)
    return draws


def _checked_starts(starts: Sequence[int] | None, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the starts of the questions; refuse those that are missing or not in their prompt."""
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
                f"question_starts: expected the place of a token in each prompt, got {start} in "
                f"prompt {number}, which has {len(ids)} tokens"
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

    Parameters
    ----------
    prompts
        Rows with `row_id` and `input_ids`.
    p, seed, scope, places
        Options of `seeded_draws`.

    Returns
    -------
    DataFrame
        `layer`; `relative_move`, the mean over the prompts of the distance between the two states
        of `resid_post`, divided by the norm of the first; and `least`, the minimum over them.

    Raises
    ------
    DeadDropout
        If two successive draws of a prompt are equal.
    """
    options = {"n_draws": 2, "p": p, "seed": seed, "scope": scope, "places": places}
    all_prompts = range(len(prompts))
    parts = []
    for batch in divide_batches(model, [all_prompts], prompts.input_ids.iloc.__getitem__):
        rows = prompts.iloc[batch]
        draws = seeded_draws(model, rows.input_ids, list(rows.row_id), ["resid_post"], **options)
        first, second = (states["resid_post"].float() for states, _ in draws)
        parts.append((second - first).norm(dim=-1) / first.norm(dim=-1))
    moves = torch.cat(parts, 1)
    return pd.DataFrame(
        {
            "layer": range(len(moves)),
            "relative_move": moves.mean(1).numpy(),
            "least": moves.min(1).values.numpy(),
        }
    )


def refuse_equal(
    draw: Float[Tensor, "n d"], next_draw: Float[Tensor, "n d"], keys: Sequence[str]
) -> None:
    """Raise `DeadDropout` if two draws of a prompt are equal; `keys` name the prompts."""
    equal = (draw == next_draw).all(-1)
    if equal.any():
        first = keys[int(equal.nonzero()[0])]
        raise DeadDropout(
            f"{int(equal.sum())} of {len(equal)} rows have two equal draws (first: {first}): "
            "dropout has no effect"
        )
