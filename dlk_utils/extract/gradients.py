"""Gradients of the margin with respect to states at the last token, and what is made of them.

The margin is log p(choice 1) - log p(choice 0). It knows neither the label nor the answer given,
and so its gradient does not leak them.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.errors import ChoiceError, UnknownArchitecture
from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import Batch, Layers, Readout, forward, last_positions
from dlk_utils.extract.prefixes import Prefixes, run_prefixes
from dlk_utils.extract.states import States, readout_states, record_sites
from dlk_utils.models.architectures import ARCHITECTURES
from dlk_utils.models.sites import architecture, at_sites, blocks, site_modules


def states_and_gradients(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choice_ids: Sequence,
    sites: Sequence[str],
    layers: Layers = "all",
) -> tuple[States, States, Float[Tensor, "b vocab"]]:
    """Return the states at the last token, and the gradients of the margin there.

    No gradient path to a last-token state passes through an earlier token. So the earlier tokens
    run without a graph, and the last tokens alone run with one, for little more than the price of a
    forward pass. The result equals that of `full_backprop`. Raises `ParameterError` if a prompt has
    fewer than two tokens.

    Returns
    -------
    states, gradients : dict
        For each site [layer, b, d].
    logits : Tensor [b, vocab]
        Of the token after each prompt.
    """
    appended = run_prefixes(model, prompts).append()
    return last_token_gradients(model, appended, choice_ids, sites, layers)


def last_token_gradients(
    model: nn.Module,
    last_tokens: Readout,
    choice_ids: Sequence,
    sites: Sequence[str],
    layers: Layers = "all",
) -> tuple[States, States, Float[Tensor, "b vocab"]]:
    """Do the second half of `states_and_gradients`: run the last tokens behind their prefixes.

    They too are in the batch's cache afterwards.
    """
    values: dict[str, list[Tensor]] = {site: [] for site in sites}
    activations: dict[str, list[Tensor]] = {site: [] for site in sites}

    def keep(site: str, layer: int, hidden: Tensor) -> None:
        activations[site].append(hidden)
        # Copied at once, because Falcon later adds to it in place.
        values[site].append(last_tokens.take(hidden.detach())[0].to("cpu", copy=True))

    with _graph_from_embeddings(model), at_sites(model, sites, keep, layers):
        [logits] = last_tokens.logits(model)
        gradients = _margin_gradients(choice_logprobs(logits, choice_ids), activations)
    by_site = {}
    for site, some in gradients.items():
        by_site[site] = torch.stack([last_tokens.take(g)[0].cpu() for g in some])
    return (
        {site: torch.stack(by_layer) for site, by_layer in values.items()},
        by_site,
        logits.detach().cpu(),
    )


def full_backprop(
    model: nn.Module,
    batch: Batch,
    choice_ids: Sequence,
    sites: Sequence[str],
    layers: Layers = "all",
) -> States:
    """Return the gradients of `states_and_gradients` by backpropagation through complete prompts.

    This is slower, and serves as the reference. Prompts may be padded on either side.
    """
    rows, last = _last_token_index(batch)
    recording = record_sites(model, sites, layers, lambda x: x)
    with _graph_from_embeddings(model), recording as activations:
        output = forward(model, batch, n_logits=None, use_cache=False)
        logprobs = choice_logprobs(output.logits[rows, last], choice_ids)
        gradients = _margin_gradients(logprobs, activations)
    return {site: torch.stack([g[rows, last].cpu() for g in gs]) for site, gs in gradients.items()}


def counterfactual_states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choice_ids: Sequence,
    sites: Sequence[str],
    *,
    layer: int,
    step: float = 0.1,
) -> tuple[States, Float[Tensor, "b 2"]]:
    """Run a pass in which the state at one layer is moved towards the other answer.

    `resid_post[layer]` at the last token moves by `step` times its norm along the gradient of the
    margin, down where the margin is positive and up elsewhere. No weight is changed.

    Returns
    -------
    states : dict
        At all layers, for each site [layer, b, d]. Those before the move are as without it.
    choice_logprobs : Tensor [b, 2]
        After the move.
    """
    prefixes = run_prefixes(model, prompts)
    states, gradients, logits = last_token_gradients(
        model, prefixes.append(), choice_ids, ["resid_post"], layer
    )
    move = move_to_other_answer(
        states["resid_post"][0],
        gradients["resid_post"][0],
        choice_logprobs(logits, choice_ids),
        step=step,
    )
    moved_states, moved_logits = states_after_move(model, prefixes, move, sites, layer=layer)
    return moved_states, choice_logprobs(moved_logits, choice_ids).cpu()


def move_to_other_answer(
    state: Float[Tensor, "b d"],
    gradient: Float[Tensor, "b d"],
    logprobs: Float[Tensor, "b 2"],
    *,
    step: float,
) -> Float[Tensor, "b d"]:
    """Return the move of a state, `step` times its norm, along the gradient to the other answer."""
    state, gradient = state.double(), gradient.double()
    towards_other_answer = -torch.sign(logprobs[:, 1] - logprobs[:, 0])[:, None]
    length = step * state.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(torch.float64).tiny
    gradient_norm = gradient.norm(dim=-1, keepdim=True).clamp(min=tiny)
    return towards_other_answer * length * gradient / gradient_norm


def states_after_move(
    model: nn.Module,
    prefixes: Prefixes,
    move: Float[Tensor, "b d"],
    sites: Sequence[str],
    layers: Layers = "all",
    *,
    layer: int,
) -> tuple[States, Float[Tensor, "b vocab"]]:
    """Run the last tokens with `resid_post[layer]` moved; return their states and logits."""
    appended = prefixes.append()
    moves = appended.spread(move[None])

    def push(site: str, at: int, hidden: Tensor) -> Tensor:
        return hidden + moves.to(hidden)

    with at_sites(model, ["resid_post"], push, layer):
        [states], logits = readout_states(model, appended, sites, layers)
    return states, logits[0]


def pooled_weight_gradients(
    model: nn.Module, batch: Batch, choice_ids: Sequence, modules: Sequence[str]
) -> dict[str, tuple[Float[Tensor, "b out"], Float[Tensor, "b in"]]]:
    """Return gradients of each row's margin by weights, averaged over inputs and outputs.

    The gradient by a weight [out, in] is the sum over tokens t of the outer product of the gradient
    by the output, g_t, and the input, a_t. So its mean over inputs is the sum of g_t * mean(a_t),
    and its mean over outputs the sum of mean(g_t) * a_t. No gradient of a weight's size is ever
    made, and rows do not mix. The result has the means over inputs [b, out] and over outputs
    [b, in] for each name in `modules`.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        inputs[name], outputs[name] = args[0].detach(), [output]

    rows, last = _last_token_index(batch)
    handles = []
    try:
        for name in modules:
            hook = functools.partial(keep, name)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        with _graph_from_embeddings(model):
            output = forward(model, batch, n_logits=None, use_cache=False)
            logprobs = choice_logprobs(output.logits[rows, last], choice_ids)
            gradients = _margin_gradients(logprobs, outputs)
    finally:
        for handle in handles:
            handle.remove()
    pooled = {}
    for name in modules:
        # [b, t, ...] also where a family lays the tokens of all rows in one line.
        a, g = (x.reshape(len(rows), -1, x.shape[-1]) for x in (inputs[name], gradients[name][0]))
        over_inputs = (g * a.mean(-1, keepdim=True)).sum(1)
        over_outputs = (g.mean(-1, keepdim=True) * a).sum(1)
        pooled[name] = over_inputs.cpu(), over_outputs.cpu()
    return pooled


def last_linear(model: nn.Module) -> list[nn.Module]:
    """For each layer, return the last linear layer of the MLP.

    Raises
    ------
    UnknownArchitecture
        If it has none, as in mixtures of experts.
    """
    kind, family = model.config.model_type, architecture(model)
    if family.down:
        return [block.get_submodule(family.down) for block in blocks(model)]
    if kind not in ARCHITECTURES:
        raise UnknownArchitecture(
            f"{kind}: expected an MLP with a last linear layer, whose weights have gradients; "
            f"{family.mlp} has none"
        )
    found = []
    for site, block in zip(site_modules(model, "mlp_out"), blocks(model), strict=True):
        # In some families `mlp_out` is the output of a norm, which comes after the MLP.
        found.append((_with_matrix(site) or _with_matrix(block.mlp))[-1])
    return found


def first_tokens(written: Iterable[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Return the first token of each row's two choices, given the tokens of both as written.

    Raises `ChoiceError` if both are the same, so that nothing tells the choices apart.
    """
    first = [[choice[0] for choice in choices] for choices in written]
    same = [zero for zero, one in first if zero == one]
    if same:
        raise ChoiceError(
            "contrast pairs: expected choices that differ in their first token, got the same one "
            f"(such as {same[0]}) in {len(same)} of {len(first)} rows"
        )
    return first


@torch.no_grad()
def states_after_choices(
    model: nn.Module,
    prompts: Prefixes,
    tokens: Sequence[Sequence[int]],
    sites: Sequence[str],
    layers: Layers = "all",
) -> list[States]:
    """Return the states at the first token of choice 0, then of choice 1, behind each prompt.

    `prompts` has every token of the prompts (`Prefixes.extended`), and `tokens` both choices' first
    token for each of them.
    """
    by_choice = torch.tensor([list(pair) for pair in tokens]).T
    states = []
    for choices in prompts.rounds(2):
        appended = prompts.append(by_choice[list(choices)])
        states += readout_states(model, appended, sites, layers, with_logits=False)[0]
    return states


def _margin_gradients(
    logprobs: Float[Tensor, "b 2"], activations: dict[str, list[Tensor]]
) -> dict[str, list[Tensor]]:
    """Return the gradients of each row's margin by some activations, in the same lists.

    Rows do not mix, so the gradient of the sum of the margins is that of each. As activations alone
    are asked for, no weight ever gets a gradient, quantised or not.
    """
    flat = [x for some in activations.values() for x in some]
    margins = logprobs[:, 1] - logprobs[:, 0]
    gradients = iter(torch.autograd.grad(margins.sum(), flat))
    return {name: [next(gradients) for _ in some] for name, some in activations.items()}


def _last_token_index(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return an index of each row's last token. On the CPU it serves layers on any device."""
    return torch.arange(len(batch["input_ids"])), last_positions(batch).cpu()


@contextlib.contextmanager
def _graph_from_embeddings(model: nn.Module) -> Iterator[None]:
    """Within it, passes build a graph whose leaves are the embeddings of the tokens.

    So there is a graph even if no weight (quantised, frozen by an adapter) asks for a gradient. The
    embeddings are changed where they are made, for some families take no others.
    """

    def begin(module: nn.Module, args: tuple, embeddings: Tensor) -> Tensor:
        # A copy of the leaf, for some families change it in place.
        return embeddings.detach().requires_grad_().clone()

    handle = model.get_input_embeddings().register_forward_hook(begin)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


def _with_matrix(module: nn.Module) -> list[nn.Module]:
    """Return the modules with a matrix as their weight: of one with an adapter the whole."""
    if hasattr(module, "weight") and module.weight.dim() == 2:
        return [module]
    return [found for child in module.children() for found in _with_matrix(child)]
