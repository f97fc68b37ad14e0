"""The stages that store what they compute: a table of prompts in, a folder of tensors out.

Each takes a model in evaluation mode, rows of `make_prompts`, the folder of the store (`store`),
and options; `record`, `batch_tokens` and `only` are those of `fill_rows`. What is in the folder
already is not computed again. Except `store_answers`, the stages raise `ChoiceError` for choices
that are scored by all their tokens: the margin at the next token says nothing about those.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from dlk_utils.errors import ChoiceError, DataError, ParameterError
from dlk_utils.extract.answers import answer_batch, choice_logprobs, read_logits
from dlk_utils.extract.batches import Layers, in_halves, pad, plan_batches
from dlk_utils.extract.draws import seeded_draws
from dlk_utils.extract.dropout import DEFAULT_P, INJECTED
from dlk_utils.extract.gradients import (
    first_tokens,
    last_linear,
    last_token_gradients,
    move_to_other_answer,
    pooled_weight_gradients,
    states_after_choices,
    states_after_move,
)
from dlk_utils.extract.packing import plan_packed
from dlk_utils.extract.positions import divide_batches
from dlk_utils.extract.prefixes import in_parts, run_prefixes
from dlk_utils.extract.states import clean_states
from dlk_utils.extract.store import fill
from dlk_utils.models.sites import SITES, blocks, layer_numbers
from dlk_utils.questions.choices import require_first_token_choices


def store_answers(model: nn.Module, prompts: pd.DataFrame, out: Path, **storing: Any) -> None:
    """Store the model's answer to each prompt.

    The tensors are those of `answers.answer_batch`.
    """
    compute = functools.partial(answer_batch, model)
    fill_rows(model, out, prompts, compute, plan_packed, {}, desc="answers", **storing)


def store_states(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    sites: Sequence[str] = ("resid_post",),
    layers: Layers = "all",
    **storing: Any,
) -> None:
    """Store the states at the last token of each prompt, and the answers, of one pass.

    The tensors are `activation.site.layer.0` [n, d], and those of `store_answers`.
    """
    require_first_token_choices(prompts, "states")
    numbers = layer_numbers(layers, len(blocks(model)))

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        states, logits = clean_states(model, list(rows.input_ids), sites, numbers)
        return named(states, "activation", 0, numbers) | read_logits(logits, rows)

    parts = {"sites": list(sites), "layers": numbers}
    fill_rows(model, out, prompts, compute, plan_packed, parts, desc="states", **storing)


def store_draws(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    sites: Sequence[str] = ("resid_post",),
    layers: Layers = "all",
    n_draws: int = 2,
    p: float = DEFAULT_P,
    scope: str = "sequence",
    places: str | Sequence[str] = INJECTED,
    positions: int = 1,
    seed: int = 0,
    **storing: Any,
) -> None:
    """Store dropout draws of each prompt.

    The tensors are `activation.site.layer.draw` [n, d], or [n, positions, d] of the last few
    tokens, and `choice_logprobs.draw` [n, 2]. The options are those of `draws.draw_states`. A mask
    depends only on the row's id, the draw and the seed.

    Raises
    ------
    DeadDropout
        If two draws of a row are equal.
    ParameterError
        If there are fewer than two draws, or a prompt has fewer tokens than `positions`.
    """
    require_first_token_choices(prompts, "dropout draws")
    if n_draws < 2:
        raise ParameterError(f"n_draws: expected at least 2, got {n_draws}")
    numbers = layer_numbers(layers, len(blocks(model)))
    places = places if isinstance(places, str) else list(places)
    how = {"n_draws": n_draws, "p": p, "seed": seed, "scope": scope, "places": places}
    how["positions"] = positions

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        starts = list(rows.question_start) if scope == "question" else None
        draws = seeded_draws(
            model,
            rows.input_ids,
            list(rows.row_id),
            sites,
            numbers,
            question_starts=starts,
            **how,
        )
        tensors = {}
        for draw, (states, logits) in enumerate(draws):
            tensors |= named(states, "activation", draw, numbers)
            tensors[f"choice_logprobs.{draw}"] = choice_logprobs(logits, list(rows.choice_ids))
        return tensors

    parts = {"sites": list(sites), "layers": numbers, **how}
    plan = plan_of_draws(scope)
    fill_rows(model, out, prompts, compute, plan, parts, desc="dropout draws", **storing)


def plan_of_draws(scope: str) -> Callable:
    """Return the plan of `store_draws`: draws of the complete prompt have nothing to share."""
    return plan_batches if scope == "sequence" else plan_packed


def store_gradients(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    sites: Sequence[str] = SITES,
    layers: Layers = "all",
    contrast: bool = False,
    moved_at: int | None = None,
    step: float = 0.1,
    **storing: Any,
) -> None:
    """Store the states at the last token, and the gradients of the margin with respect to them.

    The tensors are `activation.site.layer.0` and `gradient.site.layer.0` [n, d], and the answers of
    `store_answers`, of one pass without dropout. The same pass over the prefixes also gives the
    second halves of two kinds of pairs, if they are asked for:

    * with `contrast`, `after_choice.resid_post.layer.k` [n, d], the state at the first token of
      choice k, as written (`strict_ids`), behind the prompt. Both choices of a row then have to
      begin with different tokens (`ChoiceError`);
    * with `moved_at`, `activation.resid_post.layer.1` [n, d] and `choice_logprobs.1` [n, 2], of the
      last token with its state at layer `moved_at` moved towards the other answer, by `step` times
      its norm (`gradients.counterfactual_states`). Layers below it are left out: there nothing
      changes. That layer has to be one of `layers`, and "resid_post" one of the `sites`.
    """
    require_first_token_choices(prompts, "gradients")
    numbers = layer_numbers(layers, len(blocks(model)))
    if moved_at is not None and (moved_at not in numbers or "resid_post" not in sites):
        raise ParameterError(
            f"moved_at: expected one of the layers {numbers}, with 'resid_post' among the sites, "
            f"got layer {moved_at} and the sites {', '.join(sites)}"
        )

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        prefixes = run_prefixes(model, list(rows.input_ids))
        last_tokens = prefixes.append()
        states, gradients, logits = last_token_gradients(
            model, last_tokens, list(rows.choice_ids), sites, numbers
        )
        tensors = named(states, "activation", 0, numbers) | named(gradients, "gradient", 0, numbers)
        tensors |= read_logits(logits, rows)
        if contrast:
            tokens, complete = first_tokens(rows.strict_ids), prefixes.extended(last_tokens)
            pair = states_after_choices(model, complete, tokens, ["resid_post"], numbers)
            for choice, after_choice in enumerate(pair):
                tensors |= named(after_choice, "after_choice", choice, numbers)
        if moved_at is not None:
            at = numbers.index(moved_at)
            move = move_to_other_answer(
                states["resid_post"][at],
                gradients["resid_post"][at],
                tensors["choice_logprobs"],
                step=step,
            )
            moved, moved_logits = states_after_move(
                model, prefixes, move, ["resid_post"], numbers[at:], layer=moved_at
            )
            tensors |= named(moved, "activation", 1, numbers[at:])
            tensors["choice_logprobs.1"] = choice_logprobs(moved_logits, list(rows.choice_ids))
        return tensors

    parts = {
        "sites": list(sites),
        "layers": numbers,
        "contrast": contrast,
        "moved_at": moved_at,
        "step": step,
    }
    fill_rows(model, out, prompts, compute, plan_packed, parts, desc="gradients", **storing)


def gives_gradients(prompts: pd.DataFrame) -> bool:
    """Whether `store_gradients` with contrast pairs takes these prompts."""
    try:
        require_first_token_choices(prompts, "gradients")
        first_tokens(prompts.strict_ids)
    except ChoiceError:
        return False
    return True


def store_weight_gradients(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    layers: Layers = "all",
    batch_tokens: int = 1024,
    **storing: Any,
) -> None:
    """Store each row's margin gradient with respect to the weights of each MLP's last linear layer.

    The tensors are `weight_gradient.mlp_out.layer.0` [n, out + in]: the gradient's means over
    inputs and over outputs, side by side (`gradients.pooled_weight_gradients`).
    """
    require_first_token_choices(prompts, "weight gradients")
    numbers = layer_numbers(layers, len(blocks(model)))
    name_of = {module: name for name, module in model.named_modules()}
    names = [name_of[module] for module in last_linear(model)]

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        batch, some = pad(rows.input_ids, device=model.device), [names[i] for i in numbers]
        pooled = pooled_weight_gradients(model, batch, list(rows.choice_ids), some)
        return {f"weight_gradient.mlp_out.{i}.0": torch.cat(pooled[names[i]], 1) for i in numbers}

    storing["batch_tokens"] = batch_tokens
    parts = {"layers": numbers}
    fill_rows(model, out, prompts, compute, plan_batches, parts, desc="weight gradients", **storing)


def fill_rows(
    model: nn.Module,
    out: Path,
    prompts: pd.DataFrame,
    compute: Callable[[pd.DataFrame], dict[str, Tensor]],
    plan: Callable,
    parts: Mapping[str, Any],
    *,
    desc: str,
    record: Mapping[str, Any] | None = None,
    batch_tokens: int = 2048,
    only: Sequence[int] | None = None,
) -> None:
    """Fill a store with what `compute` returns for each batch of prompts, named tensors [b, ...].

    Parameters
    ----------
    plan
        `plan_batches` or `plan_packed`.
    parts
        The stage's own options that decide the content.
    desc
        Name of the stage, which the progress bar shows.
    record
        What else decides the content, as JSON values: the model's identity, for instance.
    batch_tokens
        Most tokens in a batch, padding included. A batch that does not fit into the device's memory
        is computed in halves.
    only
        Numbers of the shards to make, for one of several workers.
    """
    if prompts.empty:
        raise DataError(f"{desc}: expected at least one prompt, got none")
    by_id = prompts.set_index("row_id", drop=False)

    def parts_of(row_ids: list[str]) -> Iterator[list[str]]:
        if plan is plan_packed:
            return in_parts(model, [row_ids], by_id.input_ids.__getitem__, batch_tokens)
        return divide_batches(model, [row_ids], by_id.input_ids.__getitem__)

    # `wraps`, so that the store goes by the code of `compute` and not of this function.
    @functools.wraps(compute)
    def compute_ids(row_ids: list[str]) -> dict[str, Tensor]:
        done: list[str] = []
        results = []
        for part in parts_of(row_ids):
            for some, tensors in in_halves(lambda ids: compute(by_id.loc[ids]), part):
                done += some
                results.append(tensors)
        if done == row_ids:
            return {name: torch.cat([r[name] for r in results]) for name in results[0]}
        # Padded parts are cut from rows that are sorted by length, others by what positions mean.
        places = {row_id: place for place, row_id in enumerate(done)}
        order = [places[row_id] for row_id in row_ids]
        return {name: torch.cat([r[name] for r in results])[order] for name in results[0]}

    parts = {**(record or {}), "stage": desc, **parts, "batch_tokens": batch_tokens}
    examples = dict(zip(prompts.row_id, prompts.example_id, strict=True))
    planned = plan(prompts, batch_tokens)
    fill(out, parts, planned, compute_ids, examples=examples, desc=desc, only=only)


def named(
    states: Mapping[str, Tensor], kind: str, draw: int, layers: Sequence[int]
) -> dict[str, Tensor]:
    """Name states [layer, b, ...] by site as a store does, `kind.site.layer.draw`."""
    tensors = {}
    for site, by_layer in states.items():
        for layer, state in zip(layers, by_layer, strict=True):
            tensors[f"{kind}.{site}.{layer}.{draw}"] = state
    return tensors
