"""Gradients of the margin, at the price of little more than a forward pass, and what is made of them. Never of a loss that knows the label or the answer."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import Batch, Layers, cached_prefix, forward, last_positions
from dlk_utils.extract.states import forward_states
from dlk_utils.models.sites import at_sites, blocks, site_modules

States = dict[str, Float[Tensor, "b layer d"]]


def last_linear(model: nn.Module) -> list[nn.Module]:
    """For each layer, the MLP's last module with a weight of two dimensions (in families whose `mlp_out` is that of a norm, the MLP stands before it)."""
    linear = lambda module: [
        m for m in module.modules() if hasattr(m, "weight") and m.weight.dim() == 2
    ]
    return [
        (linear(site) or linear(block.mlp))[-1]
        for site, block in zip(site_modules(model, "mlp_out"), blocks(model), strict=True)
    ]


def states_and_gradients(
    model: nn.Module,
    batch: Batch,
    choice_ids: Sequence,
    sites: Sequence[str],
    layers: Layers = "all",
) -> tuple[States, States, Float[Tensor, "b 2"]]:
    """States, gradients of the margin, and choice log-probabilities, by the cached prefix (left padding only).

    No gradient path to a last-token activation passes through an earlier token, so the prefix runs without a graph and only the
    last token with one: the result equals full backprop. Gradients are asked of activations alone, so no weight gets one, quantised or not.
    """
    return _last_token_gradients(model, cached_prefix(model, batch), choice_ids, sites, layers)


def full_backprop(
    model: nn.Module,
    batch: Batch,
    choice_ids: Sequence,
    sites: Sequence[str],
    layers: Layers = "all",
) -> States:
    """The same gradients by backprop through the whole prompt: slower, and the reference for `states_and_gradients`."""
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    last, rows = (
        last_positions(batch).cpu(),
        torch.arange(len(batch["input_ids"])),
    )  # layers may lie on several devices: an index of the CPU fits all
    with (
        torch.enable_grad(),
        at_sites(model, sites, lambda site, layer, hidden: found[site].append(hidden), layers),
    ):
        logp = choice_logprobs(
            forward(model, _embedded(model, batch), last_only=False, use_cache=False).logits[
                rows, last
            ],
            choice_ids,
        )
        grads = iter(
            torch.autograd.grad(
                (logp[:, 1] - logp[:, 0]).sum(), [h for site in sites for h in found[site]]
            )
        )
    return {
        site: torch.stack([next(grads)[rows, last].cpu() for _ in found[site]], 1) for site in sites
    }


@torch.no_grad()
def counterfactual_states(
    model: nn.Module,
    batch: Batch,
    choice_ids: Sequence,
    sites: Sequence[str],
    *,
    layer: int,
    step: float = 0.1,
) -> tuple[States, Float[Tensor, "b 2"]]:
    """States and choice log-probabilities of a second pass in which `resid_post[layer]` at the last token is moved towards the other answer.

    The move has `step` times the state's norm and goes along the gradient of the margin, down if the margin is positive. It is laid on the
    activation: no weight is stepped, so none has to be restored. Sites before the move keep their states.
    """
    last = cached_prefix(model, batch)
    states, grads, logp = _last_token_gradients(
        model,
        last | {"past_key_values": copy.deepcopy(last["past_key_values"])},
        choice_ids,
        ["resid_post"],
        layer,
    )  # a copy: the last token is asked twice, and a window that has moved on cannot go back
    g = grads["resid_post"][:, 0].double()
    size = step * states["resid_post"][:, 0].double().norm(dim=-1, keepdim=True)
    move = (
        -torch.sign(logp[:, 1] - logp[:, 0])[:, None]
        * size
        * g
        / g.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    )
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    push = lambda site, at, hidden: torch.cat(
        [hidden[:, :-1], hidden[:, -1:] + move[:, None].to(hidden)], 1
    )
    with (
        at_sites(model, ["resid_post"], push, layer),
        at_sites(
            model,
            sites,
            lambda site, at, hidden: found[site].append(hidden[:, -1].to("cpu", copy=True)),
        ),
    ):
        logits = forward(model, last, use_cache=True).logits[:, -1]
    return {s: torch.stack(v, 1) for s, v in found.items()}, choice_logprobs(
        logits, choice_ids
    ).cpu()


def pooled_weight_gradients(
    model: nn.Module, batch: Batch, choice_ids: Sequence, modules: Sequence[str]
) -> dict[str, tuple[Float[Tensor, "b out"], Float[Tensor, "b in"]]]:
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
            logp = choice_logprobs(
                forward(model, _embedded(model, batch), last_only=False, use_cache=False).logits[
                    torch.arange(len(batch["input_ids"])), last_positions(batch).cpu()
                ],
                choice_ids,
            )
            grads = torch.autograd.grad(
                (logp[:, 1] - logp[:, 0]).sum(), [seen[n][1] for n in modules]
            )
    finally:
        for handle in handles:
            handle.remove()
    b = len(batch["input_ids"])
    found = {}
    for name, g in zip(modules, grads, strict=True):
        a, g = (x.reshape(b, -1, x.shape[-1]) for x in (seen[name][0], g))
        found[name] = (
            (g * a.mean(-1, keepdim=True)).sum(1).cpu(),
            (g.mean(-1, keepdim=True) * a).sum(1).cpu(),
        )
    return found


def _last_token_gradients(
    model: nn.Module, last: Batch, choice_ids: Sequence, sites: Sequence[str], layers: Layers
) -> tuple[States, States, Float[Tensor, "b 2"]]:
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    values: dict[str, list[Tensor]] = {site: [] for site in sites}

    def keep(site: str, layer: int, hidden: Tensor) -> None:
        found[site].append(hidden)
        values[site].append(
            hidden.detach()[:, -1].to("cpu", copy=True)
        )  # now: Falcon adds to it in place

    with torch.enable_grad(), at_sites(model, sites, keep, layers):
        logp = choice_logprobs(
            forward(model, _embedded(model, last), use_cache=True).logits[:, -1], choice_ids
        )
        grads = iter(
            torch.autograd.grad(
                (logp[:, 1] - logp[:, 0]).sum(), [h for site in sites for h in found[site]]
            )
        )
    return (
        {s: torch.stack(values[s], 1) for s in sites},
        {s: torch.stack([next(grads)[:, -1].cpu() for _ in found[s]], 1) for s in sites},
        logp.detach().cpu(),
    )


def _embedded(model: nn.Module, batch: Batch) -> Batch:
    """The batch with embeddings in place of tokens. The graph begins there, whether or not a weight (quantised, frozen by an adapter) asks for a gradient."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    return {k: v for k, v in batch.items() if k != "input_ids"} | {"inputs_embeds": embedded}


def first_tokens(written: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """The token with which each choice of each row begins, as written. Raises `ValueError` where both begin alike: nothing would tell the two apart."""
    found = [[choice[0] for choice in row] for row in written]
    alike = [i for i, (a, b) in enumerate(found) if a == b]
    if alike:
        raise ValueError(
            f"contrast pairs: expected choices that differ in their first token, got token {found[alike[0]][0]} twice in {len(alike)} of {len(found)} rows"
        )
    return found


@torch.no_grad()
def states_after_choices(
    model: nn.Module,
    batch: Batch,
    cache: Any,
    tokens: Sequence[Sequence[int]],
    sites: Sequence[str],
    layers: Layers = "all",
) -> list[dict[str, Float[Tensor, "b layer d"]]]:
    """For choice 0, then 1: the states at its first token (`tokens` [b, 2]), said after the prompts of the left-padded `batch`, whose every token is in `cache` (which is used up)."""
    b = len(batch["input_ids"])
    cache.batch_repeat_interleave(2)
    one = torch.ones(b, 1, dtype=torch.long, device=model.device)
    said = {
        "input_ids": torch.tensor([[t] for pair in tokens for t in pair], device=model.device),
        "attention_mask": torch.cat([batch["attention_mask"], one], 1).repeat_interleave(2, 0),
        "position_ids": (batch["position_ids"][:, -1:] + 1).repeat_interleave(2, 0),
        "past_key_values": cache,
    }
    states, _ = forward_states(model, said, sites, layers)
    return [{site: x.unflatten(0, (b, 2))[:, k] for site, x in states.items()} for k in (0, 1)]
