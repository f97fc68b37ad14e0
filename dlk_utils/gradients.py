"""Gradients of the margin, at the price of little more than a forward pass, and what is made of them. Never of a loss that knows the label or the answer."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.choices import choice_logprobs, refuse_whole
from dlk_utils.contrast import first_tokens, said_states
from dlk_utils.extract import Batch, Layers, cached_prefix, fill_rows, forward, last_positions, named, pad, plan_batches
from dlk_utils.shared import plan_shared, shared_batch
from dlk_utils.sites import SITES, at_sites, blocks, layer_numbers, site_modules

States = dict[str, Float[Tensor, "b layer d"]]


def extract_gradients(model: nn.Module, prompts: pd.DataFrame, out: Path, *, record: Mapping[str, Any], sites: Sequence[str] = SITES, layers: Layers = "all", contrast: bool = False, batch_tokens: int = 2048, only: Sequence[int] | None = None) -> None:
    """Store `activation.site.layer.0` and `gradient.site.layer.0` [n, d] of one clean pass: d margin / d activation at the last token.

    With `contrast` also `said.resid_post.layer.k` [n, d], the state after choice `k` is said (`strict_ids`), from the same pass; a row whose choices begin alike raises `ValueError`, one whose choices are scored whole `ChoiceError`.
    """
    refuse_whole(prompts, "gradients")
    numbers = layer_numbers(layers, len(blocks(model)))

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        last = cached_prefix(model, shared_batch(model, list(rows.input_ids)))
        states, grads, logp = _last_token_gradients(model, last, list(rows.choice_ids), sites, numbers)
        found = named(states, "activation", 0, numbers) | named(grads, "gradient", 0, numbers) | {"choice_logprobs": logp}
        for k, said in enumerate(said_states(model, last, last["past_key_values"], first_tokens(list(rows.strict_ids)), ["resid_post"], numbers) if contrast else []):
            found |= named(said, "said", k, numbers)
        return found

    parts = {**record, "sites": list(sites), "layers": numbers, "gradient of": "margin", "contrast": contrast}
    fill_rows(out, prompts, parts, plan_shared(prompts, batch_tokens), compute, "gradients", batch_tokens, only)


def extract_counterfactual(model: nn.Module, prompts: pd.DataFrame, out: Path, *, record: Mapping[str, Any], at: int, step: float = 0.1, layers: Layers = "all", batch_tokens: int = 2048, only: Sequence[int] | None = None) -> None:
    """Store `activation.resid_post.layer.1` [n, d] and `choice_logprobs.1` [n, 2] of the second pass of `counterfactual_states`, moved at layer `at`: the other half of a pair with the clean pass."""
    refuse_whole(prompts, "counterfactual pass")
    numbers = layer_numbers(layers, len(blocks(model)))

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        states, logp = counterfactual_states(model, shared_batch(model, list(rows.input_ids)), list(rows.choice_ids), ["resid_post"], layer=at, step=step)
        return named({"resid_post": states["resid_post"][:, numbers]}, "activation", 1, numbers) | {"choice_logprobs.1": logp}

    fill_rows(out, prompts, {**record, "layers": numbers, "moved at": at, "step": step}, plan_shared(prompts, batch_tokens), compute, "counterfactual pass", batch_tokens, only)


def extract_weight_gradients(model: nn.Module, prompts: pd.DataFrame, out: Path, *, record: Mapping[str, Any], layers: Layers = "all", batch_tokens: int = 1024, only: Sequence[int] | None = None) -> None:
    """Store `weight_gradient.mlp_out.layer.0` [n, out + in]: of each row's margin, to the weight of the MLP's last linear layer, averaged over inputs and over outputs (`pooled_weight_gradients`)."""
    refuse_whole(prompts, "weight gradients")
    numbers = layer_numbers(layers, len(blocks(model)))
    names = {id(m): name for name, m in model.named_modules()}
    last = [names[id(module)] for module in (last_linear(model)[k] for k in numbers)]

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        pooled = pooled_weight_gradients(model, pad(rows.input_ids, device=model.device), list(rows.choice_ids), last)
        return {f"weight_gradient.mlp_out.{k}.0": torch.cat(pooled[name], 1) for k, name in zip(numbers, last, strict=True)}

    fill_rows(out, prompts, {**record, "layers": numbers, "gradient of": "margin, to weights"}, plan_batches(prompts, batch_tokens), compute, "weight gradients", batch_tokens, only)


def last_linear(model: nn.Module) -> list[nn.Module]:
    """For each layer, the MLP's last module with a weight of two dimensions (in families whose `mlp_out` is that of a norm, the MLP stands before it)."""
    linear = lambda module: [m for m in module.modules() if hasattr(m, "weight") and m.weight.dim() == 2]
    return [(linear(site) or linear(block.mlp))[-1] for site, block in zip(site_modules(model, "mlp_out"), blocks(model), strict=True)]


def states_and_gradients(model: nn.Module, batch: Batch, choice_ids: Sequence, sites: Sequence[str], layers: Layers = "all") -> tuple[States, States, Float[Tensor, "b 2"]]:
    """States, gradients of the margin, and choice log-probabilities, by the cached prefix (left padding only).

    No gradient path to a last-token activation passes through an earlier token, so the prefix runs without a graph and only the
    last token with one: the result equals full backprop. Gradients are asked of activations alone, so no weight gets one, quantised or not.
    """
    return _last_token_gradients(model, cached_prefix(model, batch), choice_ids, sites, layers)


def full_backprop(model: nn.Module, batch: Batch, choice_ids: Sequence, sites: Sequence[str], layers: Layers = "all") -> States:
    """The same gradients by backprop through the whole prompt: slower, and the reference for `states_and_gradients`."""
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    last, rows = last_positions(batch).cpu(), torch.arange(len(batch["input_ids"]))  # layers may lie on several devices: an index of the CPU fits all
    with torch.enable_grad(), at_sites(model, sites, lambda site, layer, hidden: found[site].append(hidden), layers):
        logp = choice_logprobs(forward(model, _embedded(model, batch), last_only=False, use_cache=False).logits[rows, last], choice_ids)
        grads = iter(torch.autograd.grad((logp[:, 1] - logp[:, 0]).sum(), [h for site in sites for h in found[site]]))
    return {site: torch.stack([next(grads)[rows, last].cpu() for _ in found[site]], 1) for site in sites}


@torch.no_grad()
def counterfactual_states(model: nn.Module, batch: Batch, choice_ids: Sequence, sites: Sequence[str], *, layer: int, step: float = 0.1) -> tuple[States, Float[Tensor, "b 2"]]:
    """States and choice log-probabilities of a second pass in which `resid_post[layer]` at the last token is moved towards the other answer.

    The move has `step` times the state's norm and goes along the gradient of the margin, down if the margin is positive. It is laid on the
    activation: no weight is stepped, so none has to be restored. Sites before the move keep their states.
    """
    last = cached_prefix(model, batch)
    states, grads, logp = _last_token_gradients(model, last | {"past_key_values": copy.deepcopy(last["past_key_values"])}, choice_ids, ["resid_post"], layer)  # a copy: the last token is asked twice, and a window that has moved on cannot go back
    g = grads["resid_post"][:, 0].double()
    size = step * states["resid_post"][:, 0].double().norm(dim=-1, keepdim=True)
    move = -torch.sign(logp[:, 1] - logp[:, 0])[:, None] * size * g / g.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    push = lambda site, at, hidden: torch.cat([hidden[:, :-1], hidden[:, -1:] + move[:, None].to(hidden)], 1)
    with at_sites(model, ["resid_post"], push, layer), at_sites(model, sites, lambda site, at, hidden: found[site].append(hidden[:, -1].to("cpu", copy=True))):
        logits = forward(model, last, use_cache=True).logits[:, -1]
    return {s: torch.stack(v, 1) for s, v in found.items()}, choice_logprobs(logits, choice_ids).cpu()


def pooled_weight_gradients(model: nn.Module, batch: Batch, choice_ids: Sequence, modules: Sequence[str]) -> dict[str, tuple[Float[Tensor, "b out"], Float[Tensor, "b in"]]]:
    """For each linear module by name, the gradient of each row's margin to its weight [out, in], averaged over inputs and over outputs.

    Of one row it is the sum over tokens t of the outer product of the output's gradient g_t and the input a_t. So its mean over inputs is
    sum_t g_t * mean(a_t), and over outputs sum_t mean(g_t) * a_t: no weight gradient is ever laid out, and rows do not mix.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str):
        def run(module, args, output):
            seen[name] = (args[0].detach(), output)

        return run

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    try:
        with torch.enable_grad():
            logp = choice_logprobs(forward(model, _embedded(model, batch), last_only=False, use_cache=False).logits[torch.arange(len(batch["input_ids"])), last_positions(batch).cpu()], choice_ids)
            grads = torch.autograd.grad((logp[:, 1] - logp[:, 0]).sum(), [seen[n][1] for n in modules])
    finally:
        for handle in handles:
            handle.remove()
    b = len(batch["input_ids"])
    found = {}
    for name, g in zip(modules, grads, strict=True):
        a, g = (x.reshape(b, -1, x.shape[-1]) for x in (seen[name][0], g))
        found[name] = ((g * a.mean(-1, keepdim=True)).sum(1).cpu(), (g.mean(-1, keepdim=True) * a).sum(1).cpu())
    return found


def _last_token_gradients(model: nn.Module, last: Batch, choice_ids: Sequence, sites: Sequence[str], layers: Layers) -> tuple[States, States, Float[Tensor, "b 2"]]:
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    values: dict[str, list[Tensor]] = {site: [] for site in sites}

    def keep(site: str, layer: int, hidden: Tensor) -> None:
        found[site].append(hidden)
        values[site].append(hidden.detach()[:, -1].to("cpu", copy=True))  # now: Falcon adds to it in place

    with torch.enable_grad(), at_sites(model, sites, keep, layers):
        logp = choice_logprobs(forward(model, _embedded(model, last), use_cache=True).logits[:, -1], choice_ids)
        grads = iter(torch.autograd.grad((logp[:, 1] - logp[:, 0]).sum(), [h for site in sites for h in found[site]]))
    return {s: torch.stack(values[s], 1) for s in sites}, {s: torch.stack([next(grads)[:, -1].cpu() for _ in found[s]], 1) for s in sites}, logp.detach().cpu()


def _embedded(model: nn.Module, batch: Batch) -> Batch:
    """The batch with embeddings in place of tokens. The graph begins there, whether or not a weight (quantised, frozen by an adapter) asks for a gradient."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    return {k: v for k, v in batch.items() if k != "input_ids"} | {"inputs_embeds": embedded}
