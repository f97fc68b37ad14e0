"""The stages that store: a table of prompts in, a store of tensors out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from dlk_utils.extract.answers import choice_logprobs, sequence_logprobs
from dlk_utils.extract.batches import Layers, cached_prefix, last_logits, pad, plan_batches
from dlk_utils.extract.draws import draw_states, refuse_equal
from dlk_utils.extract.dropout import INJECTED, draw_seed
from dlk_utils.extract.gradients import (
    _last_token_gradients,
    counterfactual_states,
    first_tokens,
    last_linear,
    pooled_weight_gradients,
    states_after_choices,
)
from dlk_utils.extract.packing import plan_shared, shared_batch
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import Plan, fill
from dlk_utils.models.sites import SITES, blocks, layer_numbers
from dlk_utils.questions.choices import require_first_token_choices


def store_answers(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    record: Mapping[str, Any],
    batch_tokens: int = 2048,
) -> None:
    """Store for each prompt `choice_logprobs` [n, 2] (index = label), `strict_logprobs` [n, 2] (each choice as written, no other spelling) and `top_token` [n].

    A row with `choice_tokens` (choices that only differ after their first token) has each choice scored by its whole log-probability.
    """

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        logits = last_logits(model, shared_batch(model, list(rows.input_ids)))
        logp = choice_logprobs(logits, list(rows.choice_ids))
        strict = (
            choice_logprobs(logits, list(rows.strict_ids)) if "strict_ids" in rows else logp.clone()
        )
        for i, whole in enumerate(rows.choice_tokens if "choice_tokens" in rows else []):
            if whole is not None:
                found = torch.stack(
                    sequence_logprobs(
                        model, rows.input_ids.iloc[i], [v for variants in whole for v in variants]
                    )
                )
                per_choice = found.split([len(variants) for variants in whole])
                logp[i] = torch.stack([p.logsumexp(0) for p in per_choice])
                strict[i] = torch.stack([p[0] for p in per_choice])
        return {"choice_logprobs": logp, "strict_logprobs": strict, "top_token": logits.argmax(-1)}

    fill_rows(
        out, prompts, record, plan_shared(prompts, batch_tokens), compute, "answers", batch_tokens
    )


def store_draws(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    record: Mapping[str, Any],
    sites: Sequence[str] = ("resid_post",),
    layers: Layers = "all",
    n_draws: int = 2,
    p: float = 0.1,
    scope: str = "sequence",
    places: str | Sequence[str] = INJECTED,
    positions: int = 1,
    seed: int = 0,
    batch_tokens: int = 2048,
    only: Sequence[int] | None = None,
) -> None:
    """Store `activation.site.layer.draw` [n, d] and `choice_logprobs.draw` [n, 2] for `n_draws` dropout draws of each prompt; with `n_draws=1, p=0.0` for one clean pass.

    The masks depend on (row, draw) alone. `places` are where `mc_dropout` acts. With `positions` above 1 (and scope "sequence") the states are [n, positions, d], of the last
    tokens. Raises `DeadDropout` if two draws of a row are equal, `ChoiceError` if choices are scored whole, `ValueError` where a prompt has fewer tokens than that.
    """
    require_first_token_choices(prompts, "dropout n_draws")
    clean = (n_draws, p) == (1, 0)
    if n_draws < 2 and not clean:
        raise ValueError(
            f"n_draws: expected at least 2 (or one clean pass, with n_draws=1 and p=0), got {n_draws} with p={p}"
        )
    numbers = layer_numbers(layers, len(blocks(model)))

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        batch, found = pad(rows.input_ids, device=model.device), {}
        seeds = [[draw_seed(r, k, seed) for r in rows.row_id] for k in range(n_draws)]
        drawn = (
            [forward_states(model, batch, sites, numbers, positions=positions)]
            if clean
            else draw_states(
                model,
                batch,
                sites,
                numbers,
                seeds=seeds,
                p=p,
                scope=scope,
                places=places,
                positions=positions,
            )
        )
        for k, (states, logits) in enumerate(drawn):
            found |= named(states, "activation", k, numbers) | {
                f"choice_logprobs.{k}": choice_logprobs(logits, list(rows.choice_ids))
            }
            if k:
                refuse_equal(drawn[k - 1][1], logits, rows.row_id)
                if "resid_post" in states and numbers[-1] + 1 == len(
                    blocks(model)
                ):  # an earlier site may come before anything that is dropped
                    refuse_equal(
                        drawn[k - 1][0]["resid_post"][:, -1].flatten(1),
                        states["resid_post"][:, -1].flatten(1),
                        rows.row_id,
                    )
        return found

    parts = {
        **record,
        "mode": "clean" if clean else "dropout",
        "sites": list(sites),
        "layers": numbers,
        "n_draws": n_draws,
        "p": p,
        "scope": scope,
        "places": places if isinstance(places, str) else list(places),
        "positions": positions,
        "seed": seed,
    }
    fill_rows(
        out,
        prompts,
        parts,
        plan_batches(prompts, batch_tokens),
        compute,
        "dropout n_draws",
        batch_tokens,
        only,
    )


def store_gradients(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    record: Mapping[str, Any],
    sites: Sequence[str] = SITES,
    layers: Layers = "all",
    contrast: bool = False,
    batch_tokens: int = 2048,
    only: Sequence[int] | None = None,
) -> None:
    """Store `activation.site.layer.0` and `gradient.site.layer.0` [n, d] of one clean pass: d margin / d activation at the last token.

    With `contrast` also `said.resid_post.layer.k` [n, d], the state after choice `k` is said (`strict_ids`), from the same pass; a row whose choices begin alike raises `ValueError`, one whose choices are scored whole `ChoiceError`.
    """
    require_first_token_choices(prompts, "gradients")
    numbers = layer_numbers(layers, len(blocks(model)))

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        last = cached_prefix(model, shared_batch(model, list(rows.input_ids)))
        states, grads, logp = _last_token_gradients(
            model, last, list(rows.choice_ids), sites, numbers
        )
        found = (
            named(states, "activation", 0, numbers)
            | named(grads, "gradient", 0, numbers)
            | {"choice_logprobs": logp}
        )
        for k, said in enumerate(
            states_after_choices(
                model,
                last,
                last["past_key_values"],
                first_tokens(list(rows.strict_ids)),
                ["resid_post"],
                numbers,
            )
            if contrast
            else []
        ):
            found |= named(said, "said", k, numbers)
        return found

    parts = {
        **record,
        "sites": list(sites),
        "layers": numbers,
        "gradient of": "margin",
        "contrast": contrast,
    }
    fill_rows(
        out,
        prompts,
        parts,
        plan_shared(prompts, batch_tokens),
        compute,
        "gradients",
        batch_tokens,
        only,
    )


def store_counterfactual(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    record: Mapping[str, Any],
    at: int,
    step: float = 0.1,
    layers: Layers = "all",
    batch_tokens: int = 2048,
    only: Sequence[int] | None = None,
) -> None:
    """Store `activation.resid_post.layer.1` [n, d] and `choice_logprobs.1` [n, 2] of the second pass of `counterfactual_states`, moved at layer `at`: the other half of a pair with the clean pass."""
    require_first_token_choices(prompts, "counterfactual pass")
    numbers = layer_numbers(layers, len(blocks(model)))

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        states, logp = counterfactual_states(
            model,
            shared_batch(model, list(rows.input_ids)),
            list(rows.choice_ids),
            ["resid_post"],
            layer=at,
            step=step,
        )
        return named({"resid_post": states["resid_post"][:, numbers]}, "activation", 1, numbers) | {
            "choice_logprobs.1": logp
        }

    fill_rows(
        out,
        prompts,
        {**record, "layers": numbers, "moved at": at, "step": step},
        plan_shared(prompts, batch_tokens),
        compute,
        "counterfactual pass",
        batch_tokens,
        only,
    )


def store_weight_gradients(
    model: nn.Module,
    prompts: pd.DataFrame,
    out: Path,
    *,
    record: Mapping[str, Any],
    layers: Layers = "all",
    batch_tokens: int = 1024,
    only: Sequence[int] | None = None,
) -> None:
    """Store `weight_gradient.mlp_out.layer.0` [n, out + in]: of each row's margin, to the weight of the MLP's last linear layer, averaged over inputs and over outputs (`pooled_weight_gradients`)."""
    require_first_token_choices(prompts, "weight gradients")
    numbers = layer_numbers(layers, len(blocks(model)))
    names = {id(m): name for name, m in model.named_modules()}
    last = [names[id(module)] for module in (last_linear(model)[k] for k in numbers)]

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        pooled = pooled_weight_gradients(
            model, pad(rows.input_ids, device=model.device), list(rows.choice_ids), last
        )
        return {
            f"weight_gradient.mlp_out.{k}.0": torch.cat(pooled[name], 1)
            for k, name in zip(numbers, last, strict=True)
        }

    fill_rows(
        out,
        prompts,
        {**record, "layers": numbers, "gradient of": "margin, to weights"},
        plan_batches(prompts, batch_tokens),
        compute,
        "weight gradients",
        batch_tokens,
        only,
    )


def fill_rows(
    out: Path,
    prompts: pd.DataFrame,
    parts: Mapping,
    plan: Plan,
    compute: Callable,
    desc: str,
    batch_tokens: int,
    only: Sequence[int] | None = None,
) -> None:
    """Fill a store with what `compute` gives for each batch of prompt rows; a batch that does not fit into the GPU's memory goes in halves."""
    by_id = prompts.set_index("row_id", drop=False)
    record = {**parts, "batch_tokens": batch_tokens}  # which rows, the plan says
    fill(
        out,
        record,
        plan,
        lambda ids: in_halves(compute, by_id.loc[ids]),
        examples=dict(zip(prompts.row_id, prompts.example_id, strict=True)),
        desc=desc,
        only=only,
    )


def in_halves(
    compute: Callable[[pd.DataFrame], dict[str, Tensor]], rows: pd.DataFrame
) -> dict[str, Tensor]:
    """`compute(rows)`, or that of either half, one after the other, where the device runs out of memory; raises what it raises if one row is too much."""
    try:
        return compute(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()
    parts = [
        in_halves(compute, rows.iloc[: len(rows) // 2]),
        in_halves(compute, rows.iloc[len(rows) // 2 :]),
    ]
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def named(
    states: Mapping[str, Tensor], kind: str, draw: int, layers: Sequence[int]
) -> dict[str, Tensor]:
    """Stacks [b, layer, ...] by site as the tensors of a store, `kind.site.layer.draw`."""
    return {
        f"{kind}.{site}.{layer}.{draw}": t[:, i]
        for site, t in states.items()
        for i, layer in enumerate(layers)
    }
