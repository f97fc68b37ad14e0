"""The stages that store what they compute: a table of prompts in, a folder of tensors out.

All of them take the same arguments besides their own:

model
    A causal model of transformers, in evaluation mode.
prompts
    Rows of `make_prompts`: `row_id`, `example_id`, `input_ids`, `choice_ids`.
out
    Folder of the store (`store.fill`). What is there already is not computed again.
record
    What else decides the content and belongs to the store's fingerprint, as JSON values: a
    model's identity, for instance.
batch_tokens
    Most tokens in a batch, padding included.
only
    Numbers of the shards to make, for one of several workers.

A stage raises `ChoiceError` for rows whose choices are scored by all their tokens, except
`store_answers`, because the margin at the next token says nothing about such choices.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from dlk_utils.errors import DataError
from dlk_utils.extract.answers import choice_logprobs, sequence_logprobs
from dlk_utils.extract.batches import (
    Layers,
    cached_prefix,
    in_halves,
    last_logits,
    pad,
    plan_batches,
)
from dlk_utils.extract.draws import seeded_draws
from dlk_utils.extract.dropout import DEFAULT_P, INJECTED
from dlk_utils.extract.gradients import (
    counterfactual_states,
    first_tokens,
    last_linear,
    last_token_gradients,
    pooled_weight_gradients,
    states_after_choices,
)
from dlk_utils.extract.packing import plan_shared, shared_batch
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import fill
from dlk_utils.models.sites import SITES, blocks, layer_numbers
from dlk_utils.questions.choices import require_first_token_choices


def store_answers(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    record: Mapping[str, Any] | None = None,
    batch_tokens: int = 2048,
) -> None:
    """Store the model's answer to each prompt.

    The tensors are `choice_logprobs` [n, 2], by label; `strict_logprobs` [n, 2], each choice as it
    is written, in no other spelling; and `top_token` [n].

    Parameters
    ----------
    model, prompts, out, record, batch_tokens
        As in all stages (see the top of the module). `prompts` may have `strict_ids`, the token ids
        of the choices as written; and `choice_tokens`, for choices that differ only after their
        first token, which are scored by the log-probability of all their tokens.
    """

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        logits = last_logits(model, shared_batch(model, list(rows.input_ids)))
        logprobs = choice_logprobs(logits, list(rows.choice_ids))
        strict = logprobs.clone()
        if "strict_ids" in rows:
            strict = choice_logprobs(logits, list(rows.strict_ids))
        complete = rows.choice_tokens if "choice_tokens" in rows else [None] * len(rows)
        for i, (ids, choices) in enumerate(zip(rows.input_ids, complete, strict=True)):
            if choices is not None:
                logprobs[i], strict[i] = _complete_logprobs(model, ids, choices)
        top_token = logits.argmax(-1)
        return {"choice_logprobs": logprobs, "strict_logprobs": strict, "top_token": top_token}

    options = {"batch_tokens": batch_tokens}
    fill_rows(out, prompts, compute, plan_shared, options, record=record, desc="answers")


def _complete_logprobs(
    model: nn.Module, prompt: Sequence[int], choices: Sequence[Sequence[Sequence[int]]]
) -> tuple[Tensor, Tensor]:
    """Score choices by all their tokens: over all spellings [2], and as written [2].

    The first spelling of each choice is the one that is written.
    """
    spellings = [sequence for choice in choices for sequence in choice]
    logprobs = torch.stack(sequence_logprobs(model, prompt, spellings))
    by_choice = logprobs.split([len(choice) for choice in choices])
    anyhow = torch.stack([choice.logsumexp(0) for choice in by_choice])
    return anyhow, torch.stack([choice[0] for choice in by_choice])


def store_draws(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    record: Mapping[str, Any] | None = None,
    sites: Sequence[str] = ("resid_post",),
    layers: Layers = "all",
    n_draws: int = 2,
    p: float = DEFAULT_P,
    scope: str = "sequence",
    places: str | Sequence[str] = INJECTED,
    positions: int = 1,
    seed: int = 0,
    batch_tokens: int = 2048,
    only: Sequence[int] | None = None,
) -> None:
    """Store dropout draws of each prompt, or one pass without dropout (`n_draws=1, p=0`).

    The tensors are `activation.site.layer.draw` [n, d] (or [n, positions, d]) and
    `choice_logprobs.draw` [n, 2]. A mask depends on the row's id, the draw and the seed alone.

    Parameters
    ----------
    model, prompts, out, record, batch_tokens, only
        As in all stages (see the top of the module).
    sites, layers, positions
        What to store: where, and how many tokens from the end of a prompt.
    n_draws, p, scope, places, seed
        How to draw (`draws.draw_states`).

    Raises
    ------
    DeadDropout
        If two draws of a row are equal.
    ValueError
        If there is one draw with dropout, or a prompt has fewer tokens than `positions`.
    """
    require_first_token_choices(prompts, "dropout draws")
    clean = (n_draws, p) == (1, 0)
    if n_draws < 2 and not clean:
        raise ValueError(
            "n_draws: expected at least 2 (or one clean pass, with n_draws=1 and p=0), got "
            f"{n_draws} with p={p}"
        )
    numbers = layer_numbers(layers, len(blocks(model)))
    draw_options = {
        "n_draws": n_draws,
        "p": p,
        "scope": scope,
        "places": places if isinstance(places, str) else list(places),
        "positions": positions,
        "seed": seed,
    }

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        if clean:
            batch = pad(rows.input_ids, device=model.device)
            draws = [forward_states(model, batch, sites, numbers, positions=positions)]
        else:
            keys = list(rows.row_id)
            draws = seeded_draws(model, rows.input_ids, keys, sites, numbers, **draw_options)
        tensors = {}
        for draw, (states, logits) in enumerate(draws):
            tensors |= named(states, "activation", draw, numbers)
            tensors[f"choice_logprobs.{draw}"] = choice_logprobs(logits, list(rows.choice_ids))
        return tensors

    mode = "clean" if clean else "dropout"
    options = {"mode": mode, "sites": list(sites), "layers": numbers, **draw_options}
    options["batch_tokens"] = batch_tokens
    fill_rows(
        out, prompts, compute, plan_batches, options, record=record, desc="dropout draws", only=only
    )


def store_gradients(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    record: Mapping[str, Any] | None = None,
    sites: Sequence[str] = SITES,
    layers: Layers = "all",
    contrast: bool = False,
    batch_tokens: int = 2048,
    only: Sequence[int] | None = None,
) -> None:
    """Store the states at the last token, and the gradients of the margin by them.

    The tensors are `activation.site.layer.0` and `gradient.site.layer.0` [n, d], and
    `choice_logprobs` [n, 2], all of one pass without dropout.

    Parameters
    ----------
    model, prompts, out, record, batch_tokens, only
        As in all stages (see the top of the module).
    sites, layers
        What to store.
    contrast
        Store contrast pairs too, from the same pass: `after_choice.resid_post.layer.k` [n, d], the
        state at the first token of choice k (`strict_ids`) appended to the prompt.

    Raises
    ------
    ChoiceError
        With `contrast`, if the choices of a row begin with the same token.
    """
    require_first_token_choices(prompts, "gradients")
    numbers = layer_numbers(layers, len(blocks(model)))

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        last = cached_prefix(model, shared_batch(model, list(rows.input_ids)))
        states, gradients, logprobs = last_token_gradients(
            model, last, list(rows.choice_ids), sites, numbers
        )
        tensors = named(states, "activation", 0, numbers) | named(gradients, "gradient", 0, numbers)
        tensors["choice_logprobs"] = logprobs
        if contrast:
            tokens, cache = first_tokens(rows.strict_ids), last["past_key_values"]
            pair = states_after_choices(model, last, cache, tokens, ["resid_post"], numbers)
            for choice, after_choice in enumerate(pair):
                tensors |= named(after_choice, "after_choice", choice, numbers)
        return tensors

    options = {"sites": list(sites), "layers": numbers, "contrast": contrast}
    options |= {"gradient of": "margin", "batch_tokens": batch_tokens}
    fill_rows(
        out, prompts, compute, plan_shared, options, record=record, desc="gradients", only=only
    )


def store_counterfactual(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    record: Mapping[str, Any] | None = None,
    at: int,
    step: float = 0.1,
    layers: Layers = "all",
    batch_tokens: int = 2048,
    only: Sequence[int] | None = None,
) -> None:
    """Store a second pass whose state is moved towards the other answer.

    The tensors are `activation.resid_post.layer.1` [n, d] and `choice_logprobs.1` [n, 2]: the other
    half of a pair with the pass of `store_gradients`.

    Parameters
    ----------
    model, prompts, out, record, batch_tokens, only
        As in all stages (see the top of the module).
    at, step
        Layer and relative length of the move (`gradients.counterfactual_states`).
    layers
        What to store.
    """
    require_first_token_choices(prompts, "counterfactual pass")
    numbers = layer_numbers(layers, len(blocks(model)))

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        batch, choice_ids = shared_batch(model, list(rows.input_ids)), list(rows.choice_ids)
        states, logprobs = counterfactual_states(
            model, batch, choice_ids, ["resid_post"], layer=at, step=step
        )
        some = {"resid_post": states["resid_post"][numbers]}
        return named(some, "activation", 1, numbers) | {"choice_logprobs.1": logprobs}

    options = {"layers": numbers, "moved at": at, "step": step, "batch_tokens": batch_tokens}
    desc = "counterfactual pass"
    fill_rows(out, prompts, compute, plan_shared, options, record=record, desc=desc, only=only)


def store_weight_gradients(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    record: Mapping[str, Any] | None = None,
    layers: Layers = "all",
    batch_tokens: int = 1024,
    only: Sequence[int] | None = None,
) -> None:
    """Store the gradient of each row's margin by the weight of each MLP's last linear layer.

    The tensors are `weight_gradient.mlp_out.layer.0` [n, out + in]: the gradient's means over
    inputs and over outputs, side by side (`gradients.pooled_weight_gradients`).

    Parameters
    ----------
    model, prompts, out, record, batch_tokens, only
        As in all stages (see the top of the module).
    layers
        What to store.
    """
    require_first_token_choices(prompts, "weight gradients")
    numbers = layer_numbers(layers, len(blocks(model)))
    name_of = {id(module): name for name, module in model.named_modules()}
    linear = last_linear(model)
    names = [name_of[id(linear[layer])] for layer in numbers]

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        batch = pad(rows.input_ids, device=model.device)
        pooled = pooled_weight_gradients(model, batch, list(rows.choice_ids), names)
        by_layer = zip(numbers, names, strict=True)
        return {f"weight_gradient.mlp_out.{i}.0": torch.cat(pooled[n], 1) for i, n in by_layer}

    options = {"layers": numbers, "gradient of": "margin, to weights", "batch_tokens": batch_tokens}
    desc = "weight gradients"
    fill_rows(out, prompts, compute, plan_batches, options, record=record, desc=desc, only=only)


def fill_rows(
    out: Path,
    prompts: pd.DataFrame,
    compute: Callable[[pd.DataFrame], dict[str, Tensor]],
    plan: Callable,
    options: Mapping[str, Any],
    *,
    record: Mapping[str, Any] | None = None,
    desc: str = "batches",
    only: Sequence[int] | None = None,
) -> None:
    """Fill a store with what `compute` gives for the prompts of each batch.

    Parameters
    ----------
    out, prompts, record, only
        As in all stages (see the top of the module).
    compute
        Takes rows of `prompts`, and returns named tensors [b, ...]. A batch that does not fit into
        the device's memory is computed in halves.
    plan
        `plan_batches` or `plan_shared`.
    options
        Everything of the stage that decides the content. `batch_tokens` is the size of the batches.
    desc
        What the progress bar says.

    Raises
    ------
    DataError
        If there are no prompts.
    """
    if prompts.empty:
        raise DataError(f"{desc}: expected at least one prompt, got none")
    by_id = prompts.set_index("row_id", drop=False)

    # As `wraps` says, it is the code of `compute` that decides the content.
    @functools.wraps(compute)
    def compute_ids(row_ids: list[str]) -> dict[str, Tensor]:
        parts = [part for _, part in in_halves(lambda ids: compute(by_id.loc[ids]), row_ids)]
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    fill(
        out,
        {**(record or {}), **options},
        plan(prompts, options["batch_tokens"]),
        compute_ids,
        examples=dict(zip(prompts.row_id, prompts.example_id, strict=True)),
        desc=desc,
        only=only,
    )


def named(
    states: Mapping[str, Tensor], kind: str, draw: int, layers: Sequence[int]
) -> dict[str, Tensor]:
    """Name states [layer, b, ...] by site as a store does, one tensor a layer.

    A name is `kind.site.layer.draw`, for instance `activation.resid_post.12.0`.
    """
    named_states = {}
    for site, by_layer in states.items():
        for layer, state in zip(layers, by_layer, strict=True):
            named_states[f"{kind}.{site}.{layer}.{draw}"] = state
    return named_states
