"""Read a model in memory: its states, dropout draws of them, gradients, and answers.

Each function takes a causal model of transformers, in evaluation mode, and the token ids of some
prompts, and returns numpy arrays with the prompts in the order given::

    states = activations(model, input_ids)["resid_post"]  # float32 [layer, n, d]
    draws = dropout_draws(model, input_ids)["resid_post"]  # float32 [draw, layer, n, d]

Each function checks the model and the prompts, and defines what to compute for a batch. The rest is
the same for all of them, and done by `_in_batches`: it plans the batches, runs them, and puts the
results into the order of the prompts. Except for rounding, the result for a prompt does not depend
on the other prompts, nor on their order.

All of them raise `UnknownArchitecture` if the model's family is not known or its sites are not what
`models.sites` says, `ModelError` if its states in the check of these sites are not finite,
`DataError` if there are no prompts, a prompt has too few tokens, or a result is not finite, and
`ParameterError` if the model is in training mode, an option is out of range, or the model cannot
run prompts in parts (`prefixes`). What else a function raises, its docstring says.
"""

import hashlib
import itertools
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from dlk_utils.errors import ChoiceError, DataError, ParameterError
from dlk_utils.extract.answers import answer_batch, choice_logprobs
from dlk_utils.extract.batches import (
    Layers,
    Readout,
    in_halves,
    pad,
    plan_batches,
    require_evaluation_mode,
)
from dlk_utils.extract.draws import seeded_draws
from dlk_utils.extract.dropout import DEFAULT_P, INJECTED
from dlk_utils.extract.gradients import states_and_gradients
from dlk_utils.extract.packing import plan_packed
from dlk_utils.extract.positions import divide_batches
from dlk_utils.extract.prefixes import in_parts, run_prefixes
from dlk_utils.extract.states import clean_states, forward_states
from dlk_utils.models import configuration
from dlk_utils.models.sites import at_sites, blocks, check_sites, layer_numbers

InputIds = Sequence[Sequence[int]] | Mapping[str, Any]
"""Token ids of prompts, or what a tokenizer of transformers returns for a list of texts."""

_checked_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def activations(
    model: nn.Module,
    input_ids: InputIds,
    *,
    sites: Sequence[str] = ("resid_post",),
    layers: Layers = "all",
    positions: int = 1,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> dict[str, Float[np.ndarray, "layer n ..."]]:
    """Return the states at the last token of each prompt, or at its last few tokens.

    Parameters
    ----------
    model
        A causal model of transformers, in evaluation mode.
    input_ids
        Token ids of each prompt, without padding; or what a tokenizer returns for a list of texts.
    sites
        Some of "resid_post", "attn_out", "mlp_out", "head_out" (`models.sites`).
    layers
        "all", an index (from the end if negative), a list of them, or a slice such as "::3".
        Layers come back in ascending order, without repeats.
    positions
        How many tokens to read, counted from the end of a prompt.
    batch_tokens
        The largest number of tokens in a batch. Padding counts; a beginning that several prompts
        share counts once. A longer prompt runs alone.
    progress
        Show a progress bar.

    Returns
    -------
    dict
        For each site a float32 array [layer, n, d], or [layer, n, positions, d] if `positions` is
        above 1, where n counts prompts.
    """
    prompts = _checked(model, input_ids, least_tokens=max(1, positions))
    # Prompts that begin alike run as a tree, in which tokens that they share run once
    # (`prefixes`). Only the last token of each prompt can be read there.
    as_trees = positions == 1

    def compute(rows: list[int]) -> dict[str, Tensor]:
        batch_ids = [prompts[row] for row in rows]
        if as_trees:
            states, _ = clean_states(model, batch_ids, sites, layers, with_logits=False)
        else:
            batch = pad(batch_ids, device=model.device)
            states, _ = forward_states(
                model, batch, sites, layers, positions=positions, with_logits=False
            )
        return states

    return _in_batches(
        model,
        prompts,
        compute,
        batch_tokens,
        progress,
        desc="states",
        row_axis=1,
        as_trees=as_trees,
    )


def dropout_draws(
    model: nn.Module,
    input_ids: InputIds,
    *,
    n_draws: int = 2,
    p: float = DEFAULT_P,
    scope: str = "sequence",
    sites: Sequence[str] = ("resid_post",),
    layers: Layers = "all",
    places: str | Sequence[str] = INJECTED,
    seed: int = 0,
    keys: Sequence[str] | pd.Series | None = None,
    question_starts: Sequence[int] | pd.Series | None = None,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> dict[str, Float[np.ndarray, "draw layer n d"]]:
    """Return the states at the last token of each prompt under Monte-Carlo dropout.

    The model needs no dropout of its own. A mask depends only on the prompt's key, the index of the
    draw and the seed.

    Parameters
    ----------
    model, input_ids, sites, layers, batch_tokens, progress
        As for `activations`.
    n_draws
        How often to draw.
    p
        Share of the channels that a draw drops.
    scope
        "sequence": drop in the complete prompt. "question": drop in the tokens after the
        instruction, which then runs once for all draws if the model takes trees
        (`prefixes.takes_trees`). "last_token": drop at the last token alone, so that many draws
        cost little more than one pass. Prompts then need at least two tokens.
    places
        Where to drop: some of "attn_out", "mlp_out", "embedding", "attention", or "native" for the
        places where the model's family has dropout of its own.
    seed
        Another seed gives other masks.
    keys
        One string per prompt, which names it for the seeds. By default a hash of its token ids, so
        identical prompts get identical masks. With the column `row_id` of a table of prompts, draws
        are those of `stages.store_draws`.
    question_starts
        Required with scope "question": how many tokens of each prompt come before its question (the
        column `question_start` of a table of prompts). Other scopes do not use it.

    Returns
    -------
    dict
        For each site a float32 array [draw, layer, n, d].

    Raises
    ------
    DeadDropout
        If the family cannot drop at a place, or two successive draws of a prompt are equal. The
        latter is checked where `resid_post` of the last layer is read: earlier states may have no
        dropout before them.
    """
    prompts = _checked(model, input_ids, least_tokens=2 if scope == "last_token" else 1)
    if not isinstance(n_draws, Integral) or n_draws < 1:
        raise ParameterError(f"n_draws: expected a whole number of at least 1, got {n_draws!r}")
    keys = [_hash(ids) for ids in prompts] if keys is None else list(keys)
    if len(keys) != len(prompts):
        raise DataError(f"keys: expected one per prompt ({len(prompts)}), got {len(keys)}")
    # A list, as a column of a table would be read by its labels.
    question_starts = None if question_starts is None else list(question_starts)
    if question_starts is not None and len(question_starts) != len(prompts):
        raise ParameterError(
            f"question_starts: expected one per prompt ({len(prompts)}), got {len(question_starts)}"
        )
    draw_options = {"n_draws": n_draws, "p": p, "seed": seed, "scope": scope, "places": places}

    def compute(rows: list[int]) -> dict[str, Tensor]:
        batch_starts = None
        if question_starts is not None:
            batch_starts = [question_starts[row] for row in rows]
        draws = seeded_draws(
            model,
            [prompts[row] for row in rows],
            [keys[row] for row in rows],
            sites,
            layers,
            question_starts=batch_starts,
            with_logits=False,
            **draw_options,
        )
        return {site: torch.stack([states[site] for states, _ in draws]) for site in sites}

    # With dropout from the first token on, prompts have no states in common.
    as_trees = scope != "sequence"
    return _in_batches(
        model, prompts, compute, batch_tokens, progress, desc="draws", row_axis=2, as_trees=as_trees
    )


def margin_gradients(
    model: nn.Module,
    input_ids: InputIds,
    choice_ids: Sequence,
    *,
    sites: Sequence[str] = ("resid_post",),
    layers: Layers = "all",
    batch_tokens: int = 2048,
    progress: bool = True,
) -> dict[str, Float[np.ndarray, "layer n d"]]:
    """Return the gradient of each margin with respect to the states at the last token.

    The margin is log p(choice 1) - log p(choice 0) at the next token. It does not depend on which
    choice is right.

    Parameters
    ----------
    model, input_ids, sites, layers, batch_tokens, progress
        As for `activations`. Prompts need at least two tokens. Only the last one runs with a graph
        for backprop, which saves memory.
    choice_ids
        The token ids that count as choice 0 and as choice 1: one pair for all prompts, such as
        `([3], [7, 9])`, or a list with one pair per prompt (`questions.choices.choice_token_ids`).

    Returns
    -------
    dict
        For each site a float32 array [layer, n, d].

    Raises
    ------
    ChoiceError
        If `choice_ids` are not pairs, or a token counts as both choices.
    """
    prompts = _checked(model, input_ids, least_tokens=2)
    pairs = _pairs(choice_ids, len(prompts))

    def compute(rows: list[int]) -> dict[str, Tensor]:
        batch_ids = [prompts[row] for row in rows]
        batch_pairs = [pairs[row] for row in rows]
        _, gradients, _ = states_and_gradients(model, batch_ids, batch_pairs, sites, layers)
        return gradients

    return _in_batches(
        model, prompts, compute, batch_tokens, progress, desc="gradients", row_axis=1, as_trees=True
    )


def answer_logprobs(
    model: nn.Module,
    input_ids: InputIds,
    choice_ids: Sequence,
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> tuple[Float[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """Return the log-probability of two choices after each prompt, and the likeliest token.

    Parameters
    ----------
    model, input_ids, batch_tokens, progress
        As for `activations`.
    choice_ids
        As for `margin_gradients`. A choice has the sum of the probabilities of its tokens.

    Returns
    -------
    choice_logprobs : ndarray [n, 2], float32
        Natural logarithms. Column 1 minus column 0 is the margin.
    top_token : ndarray [n], int64
        The token that the model would write next.

    Raises
    ------
    ChoiceError
        If `choice_ids` are not pairs, or a token counts as both choices.
    """
    prompts = _checked(model, input_ids)
    pairs = _pairs(choice_ids, len(prompts))

    def compute(rows: list[int]) -> dict[str, Tensor]:
        _, logits = clean_states(model, [prompts[row] for row in rows], [])
        logprobs = choice_logprobs(logits, [pairs[row] for row in rows])
        return {"choice_logprobs": logprobs, "top_token": logits.argmax(-1)}

    answers = _in_batches(
        model, prompts, compute, batch_tokens, progress, desc="answers", row_axis=0, as_trees=True
    )
    return answers["choice_logprobs"], answers["top_token"]


def states_and_answers(
    model: nn.Module,
    input_ids: InputIds,
    choice_ids: Sequence,
    *,
    sites: Sequence[str] = ("resid_post",),
    layers: Layers = "all",
    batch_tokens: int = 2048,
    progress: bool = True,
) -> tuple[dict[str, Float[np.ndarray, "layer n d"]], Float[np.ndarray, "n 2"]]:
    """Return the states of `activations` and the log-probabilities of `answer_logprobs`.

    Both come from one pass. The arguments, and the errors, are those of the two functions.

    Returns
    -------
    states : dict
        For each site a float32 array [layer, n, d].
    choice_logprobs : ndarray [n, 2], float32
        Natural logarithms. Column 1 minus column 0 is the margin.
    """
    prompts = _checked(model, input_ids)
    pairs = _pairs(choice_ids, len(prompts))

    def compute(rows: list[int]) -> dict[str, Tensor]:
        states, logits = clean_states(model, [prompts[row] for row in rows], sites, layers)
        logprobs = choice_logprobs(logits, [pairs[row] for row in rows])
        # `row_axis` is 1, as the first axis of states is the layer. So the log-probabilities get a
        # first axis too, of length 1, which is removed below.
        return {**states, "choice_logprobs": logprobs[None]}

    arrays = _in_batches(
        model, prompts, compute, batch_tokens, progress, desc="states", row_axis=1, as_trees=True
    )
    [logprobs] = arrays.pop("choice_logprobs")
    return arrays, logprobs


class Move(NamedTuple):
    """A change of the state at the last token of each of n prompts, at `resid_post` of a layer."""

    layer: int
    """Number of the layer, from the end if negative."""
    vectors: Float[np.ndarray, "n d"]
    """A vector for each prompt. To use one for all, give `np.broadcast_to(vector, (n, d))`."""
    scales: Float[np.ndarray, " n"]
    """How many times its vector is added to the state of each prompt."""


MOVED_AT_ONCE = 512
"""About how many last tokens run together: each has logits for the whole vocabulary.

At least one move of a batch runs at a time, whatever its number of prompts.
"""


@torch.no_grad()
def answers_after_moves(
    model: nn.Module,
    input_ids: InputIds,
    choice_ids: Sequence,
    moves: Sequence[Move],
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Float[np.ndarray, "move n 2"]:
    """Return the log-probabilities of two choices after each of many moves of the last state.

    All tokens but the last of a prompt run once, unchanged. Then the last ones run once for each
    move. Therefore, a hundred moves take little longer than one.

    Parameters
    ----------
    model, input_ids, batch_tokens, progress
        As for `activations`. Prompts need at least two tokens.
    choice_ids
        As for `margin_gradients`.
    moves
        The changes, each of which is made by itself.

    Returns
    -------
    ndarray [move, n, 2], float32
        Natural logarithms. Column 1 minus column 0 is the margin.

    Raises
    ------
    ParameterError
        If the vectors or scales of a move do not fit the number of prompts or the width of the
        model, or its layer does not exist.
    ChoiceError
        As for `margin_gradients`.
    """
    prompts = _checked(model, input_ids, least_tokens=2)
    pairs = _pairs(choice_ids, len(prompts))
    shape = (len(prompts), configuration.width(model))
    moves_by_layer: dict[int, list[int]] = {}
    for number, move in enumerate(moves):
        if np.shape(move.vectors) != shape or len(move.scales) != len(prompts):
            raise ParameterError(
                f"moves: expected vectors {list(shape)} and a scale for each prompt, got vectors "
                f"{list(np.shape(move.vectors))} and {len(move.scales)} scales in move {number}"
            )
        [layer] = layer_numbers(move.layer, len(blocks(model)))
        moves_by_layer.setdefault(layer, []).append(number)

    def compute(rows: list[int]) -> dict[str, Tensor]:
        prefixes = run_prefixes(model, [prompts[row] for row in rows])
        batch_pairs = [pairs[row] for row in rows]
        at_once = max(1, MOVED_AT_ONCE // len(rows))
        logprobs = torch.empty(len(moves), len(rows), 2)
        for layer, move_numbers in moves_by_layer.items():
            for places in prefixes.rounds(len(move_numbers), at_once):
                round_numbers = [move_numbers[place] for place in places]
                shifts = torch.stack([_shifts(moves[number], rows) for number in round_numbers])
                last_tokens = prefixes.append(prefixes.next_ids.expand(len(round_numbers), -1))
                logits = _logits_after_shifts(model, last_tokens, shifts, layer)
                for number, move_logits in zip(round_numbers, logits, strict=True):
                    logprobs[number] = choice_logprobs(move_logits, batch_pairs).cpu()
        return {"choice_logprobs": logprobs}

    answers = _in_batches(
        model, prompts, compute, batch_tokens, progress, desc="moves", row_axis=1, as_trees=True
    )
    return answers["choice_logprobs"]


def _shifts(move: Move, rows: list[int]) -> Float[Tensor, "n d"]:
    """Return by how much a move changes the states of some prompts."""
    scales = np.asarray(move.scales, dtype=float)[rows]
    return torch.from_numpy(scales[:, None] * np.asarray(move.vectors)[rows])


def _logits_after_shifts(
    model: nn.Module, last_tokens: Readout, shifts: Float[Tensor, "copy n d"], layer: int
) -> Float[Tensor, "copy n vocab"]:
    """Run last tokens behind their prefixes, with their states at a layer changed by `shifts`."""
    laid_out = last_tokens.spread(shifts)

    def push(site: str, at: int, hidden: Tensor) -> Tensor:
        return hidden + laid_out.to(hidden)

    with at_sites(model, ["resid_post"], push, layer):
        return last_tokens.logits(model)


def answer_rows(
    model: nn.Module, table: pd.DataFrame, *, batch_tokens: int = 2048, progress: bool = True
) -> dict[str, np.ndarray]:
    """Return the model's answers to a table of prompts, as `make_prompts` makes it.

    Unlike `answer_logprobs`, this takes choices of several tokens, and also scores each choice
    exactly as it is written.

    Returns
    -------
    dict
        The arrays of `answers.answer_batch`: `choice_logprobs` [n, 2], `strict_logprobs` [n, 2],
        and `top_token` [n].
    """
    prompts = _checked(model, list(table.input_ids))

    def compute(rows: list[int]) -> dict[str, Tensor]:
        return answer_batch(model, table.iloc[rows])

    return _in_batches(
        model, prompts, compute, batch_tokens, progress, desc="answers", row_axis=0, as_trees=True
    )


def check_model(model: nn.Module) -> None:
    """Refuse anything but a model in evaluation mode whose sites are what `models.sites` says.

    The sites are checked by a short forward pass, the first time that the model is used.
    `steering` calls this before it changes states: the check adds up what the blocks write to the
    residual stream, and changed states would fail it.

    Raises
    ------
    UnknownArchitecture
        If the model's family is not known, or its sites are others.
    ParameterError
        If it is not a model, or is in training mode.
    ModelError
        If its states are not finite.
    """
    if not isinstance(model, nn.Module):
        raise ParameterError(
            f"model: expected a model of transformers, got a {type(model).__name__}; the model "
            "comes first, and the token ids second"
        )
    require_evaluation_mode(model)
    if model not in _checked_models:
        check_sites(model)
        _checked_models.add(model)


def _in_batches(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    compute: Callable[[list[int]], dict[str, Tensor]],
    batch_tokens: int,
    progress: bool,
    *,
    desc: str,
    row_axis: int,
    as_trees: bool,
) -> dict[str, np.ndarray]:
    """Compute all prompts batch by batch, and return the results in the order of the prompts.

    A batch that does not fit into memory is split.

    Parameters
    ----------
    compute
        Takes the row numbers of a batch's prompts, and returns tensors by name.
    desc
        What the progress bar and errors call the results.
    row_axis
        The axis of each tensor, and of the array that is returned for it, that counts prompts.
    as_trees
        Make batches of prompts that begin alike, which `compute` runs as a tree if the model takes
        trees. Otherwise make padded batches of prompts of about equal length.
    """
    n = len(prompts)
    table = pd.DataFrame({"row_id": range(n), "input_ids": prompts})
    plan = plan_packed if as_trees else plan_batches
    # A plan has groups of batches, one for each shard of a store. Here there is no store.
    planned = itertools.chain.from_iterable(plan(table, batch_tokens))
    if as_trees:
        batches = in_parts(model, planned, prompts.__getitem__, batch_tokens)
    else:
        batches = divide_batches(model, planned, prompts.__getitem__)
    arrays: dict[str, np.ndarray] = {}
    with tqdm(total=n, desc=desc, unit="prompt", disable=not progress) as bar:
        for batch in batches:
            for rows, tensors in in_halves(compute, batch):
                for name, tensor in tensors.items():
                    values = _finite_array(tensor, f"{desc}: {name}")
                    if name not in arrays:
                        shape = list(values.shape)
                        shape[row_axis] = n
                        arrays[name] = np.empty(shape, values.dtype)
                    # A view with the rows first, through which they are written to the array.
                    by_row = np.moveaxis(arrays[name], row_axis, 0)
                    by_row[rows] = np.moveaxis(values, row_axis, 0)
                bar.update(len(rows))
    return arrays


def _finite_array(tensor: Tensor, what: str) -> np.ndarray:
    """Return a tensor as an array, floating-point numbers as float32; refuse inf and nan."""
    widened = tensor.float() if tensor.is_floating_point() else tensor
    values = widened.cpu().numpy()
    if not np.isfinite(values).all():
        raise DataError(
            f"{what}: expected finite numbers, got nan or inf in {tensor.dtype}; load the model in "
            "a wider dtype, such as torch.float32"
        )
    return values


def _checked(model: nn.Module, input_ids: InputIds, *, least_tokens: int = 1) -> list[list[int]]:
    """Check the model and the prompts, and return the prompts as lists."""
    check_model(model)
    prompts = _as_lists(input_ids)
    if not prompts:
        raise DataError("input_ids: expected at least one prompt, got none")
    lengths = [len(ids) for ids in prompts]
    if min(lengths) < least_tokens:
        raise DataError(
            f"input_ids: expected at least {least_tokens} tokens in each prompt, got "
            f"{min(lengths)} in prompt {lengths.index(min(lengths))}"
        )
    n_embedded = model.get_input_embeddings().weight.shape[0]
    for row, ids in enumerate(prompts):
        if min(ids) < 0 or max(ids) >= n_embedded:
            raise DataError(
                f"input_ids: expected token ids from 0 to {n_embedded - 1:,}, for which the model "
                f"has embeddings, got {min(ids)} to {max(ids)} in prompt {row}; use the model's "
                "own tokenizer, or resize its embedding"
            )
    return prompts


def _as_lists(input_ids: Any) -> list[list[int]]:
    """Return prompts as lists of token ids, without the padding that an attention mask names.

    Raises `DataError` for anything but a list of lists of whole numbers, and for a mask of another
    shape.
    """
    mask = None
    if isinstance(input_ids, Mapping):
        input_ids, mask = input_ids.get("input_ids"), input_ids.get("attention_mask")
    try:
        # Not `int`, which would also take 1.5 and "7".
        prompts = [[operator.index(token) for token in ids] for ids in input_ids]
    except TypeError:
        raise DataError(
            "input_ids: expected a list of prompts, each a list of whole numbers, got "
            f"{repr(input_ids)[:60]}; turn texts into token ids with `tokenize`"
        ) from None
    if mask is None:
        return prompts
    lengths, mask_lengths = [len(ids) for ids in prompts], [len(kept) for kept in mask]
    if lengths != mask_lengths:
        raise DataError(
            "attention_mask: expected as many values as token ids in each prompt, got "
            f"{_first_difference(lengths, mask_lengths)}"
        )
    return [
        [token for token, is_kept in zip(ids, kept, strict=True) if is_kept]
        for ids, kept in zip(prompts, mask, strict=True)
    ]


def _first_difference(lengths: list[int], mask_lengths: list[int]) -> str:
    """Say where the lengths of prompts and those of their masks first differ."""
    if len(lengths) != len(mask_lengths):
        return f"{len(mask_lengths)} masks for {len(lengths)} prompts"
    pairs = enumerate(zip(lengths, mask_lengths, strict=True))
    row, (length, mask_length) = next((row, pair) for row, pair in pairs if pair[0] != pair[1])
    return f"{mask_length} for {length} token ids in prompt {row}"


def _pairs(choice_ids: Sequence, n: int) -> list[Sequence]:
    """Return a pair of choices for each of `n` prompts, given one pair for all or a list of `n`."""
    pairs = [choice_ids] * n if _is_pair(choice_ids) else list(choice_ids)
    if len(pairs) != n:
        raise ChoiceError(
            f"choice_ids: expected one pair, or one per prompt ({n}), got {len(pairs)}"
        )
    for row, pair in enumerate(pairs):
        if not _is_pair(pair) or set(pair[0]) & set(pair[1]):
            raise ChoiceError(
                "choice_ids: expected two lists of token ids without a token in common, got "
                f"{pair} for prompt {row}"
            )
    return pairs


def _is_pair(x: Any) -> bool:
    """Whether `x` is two lists of token ids, neither of them empty."""
    return np.iterable(x) and len(x) == 2 and all(_is_choice(choice) for choice in x)


def _is_choice(x: Any) -> bool:
    """Whether `x` is a list of token ids that is not empty."""
    return np.iterable(x) and len(x) > 0 and all(isinstance(token, Integral) for token in x)


def _hash(ids: Sequence[int]) -> str:
    """Return 16 hexadecimal digits that stand for a prompt's token ids."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]
