"""Run prompts, and read the states and the next-token logits at their last tokens.

`clean_states` takes prompts, and runs what they share only once where it can. The other two take
batches that are already laid out: `forward_states` a padded one, and `readout_states` one of packed
prompts or with tokens in a cache (`Readout`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.errors import ParameterError
from dlk_utils.extract.batches import (
    Batch,
    Layers,
    Readout,
    forward_to_layer,
    last_logits,
    last_positions,
    pad,
)
from dlk_utils.extract.prefixes import takes_trees, tree_of
from dlk_utils.models.sites import at_sites, blocks, layer_numbers

States = dict[str, Float[Tensor, "layer b ..."]]
"""For each site, the states of the layers that were asked for."""


@torch.no_grad()
def clean_states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sites: Sequence[str],
    layers: Layers = "all",
    *,
    with_logits: bool = True,
) -> tuple[States, Float[Tensor, "b vocab"] | None]:
    """Run prompts once, without dropout; return the states and the logits at their last tokens.

    Shared beginnings run once if the model takes trees (`prefixes.takes_trees`).

    Returns
    -------
    states : dict
        For each site [layer, b, d].
    logits : Tensor [b, vocab], or None
        Of the token after each prompt. If `with_logits` is false, the pass stops at the highest
        layer that was asked for.
    """
    if not takes_trees(model, max(len(ids) for ids in prompts)):
        batch = pad(prompts, device=model.device)
        return forward_states(model, batch, sites, layers, with_logits=with_logits)
    highest = None if with_logits else highest_layer(model, layers)
    tree = tree_of(model, prompts, highest=highest)
    [states], logits = readout_states(model, tree, sites, layers, with_logits=with_logits)
    return states, None if logits is None else logits[0]


@torch.no_grad()
def readout_states(
    model: nn.Module,
    readout: Readout,
    sites: Sequence[str],
    layers: Layers = "all",
    *,
    with_logits: bool = True,
) -> tuple[list[States], Float[Tensor, "copy b vocab"] | None]:
    """Run the batch of a readout; return the states and the logits at the tokens that it reads.

    Returns
    -------
    states : list of dict
        For each copy and site [layer, b, d].
    logits : Tensor [copy, b, vocab], or None
        If `with_logits` is false, the pass stops at the highest layer that was asked for.
    """

    def read_tokens(hidden: Float[Tensor, "r t d"]) -> Float[Tensor, "copy b d"]:
        return readout.take(hidden).cpu()

    compute_logits = functools.partial(readout.logits, model) if with_logits else None
    recorded, logits = _record_pass(
        model, readout.batch, sites, layers, take=read_tokens, compute_logits=compute_logits
    )
    by_site = {site: torch.stack(by_layer, 1) for site, by_layer in recorded.items()}
    n_copies = len(readout.row)
    by_copy = [{site: x[copy] for site, x in by_site.items()} for copy in range(n_copies)]
    return by_copy, logits


@torch.no_grad()
def forward_states(
    model: nn.Module,
    batch: Batch,
    sites: Sequence[str],
    layers: Layers = "all",
    *,
    positions: int = 1,
    with_logits: bool = True,
) -> tuple[States, Float[Tensor, "b vocab"] | None]:
    """Run a padded batch once; return the states at the last tokens, and the logits there.

    Returns
    -------
    states : dict
        For each site [layer, b, d], or [layer, b, positions, d] if `positions` is above 1.
    logits : Tensor [b, vocab], or None
        Of the token after each prompt. If `with_logits` is false, the pass stops at the highest
        layer that was asked for.

    Raises
    ------
    ParameterError
        If a prompt has fewer tokens than `positions`.
    """
    shortest = int(batch["attention_mask"].sum(1).min())
    if not 1 <= positions <= shortest:
        raise ParameterError(
            "positions: expected between 1 and the tokens of the shortest prompt, "
            f"{shortest}, got {positions}"
        )
    last = last_positions(batch)
    rows = torch.arange(len(last), device=last.device)[:, None]
    places = last[:, None] + torch.arange(1 - positions, 1, device=last.device)

    def last_tokens(hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b ..."]:
        # Sliced before it is copied: the states of the other tokens never leave the device.
        taken = hidden[rows.to(hidden.device), places.to(hidden.device)].cpu()
        return taken[:, 0] if positions == 1 else taken

    compute_logits = functools.partial(last_logits, model, batch) if with_logits else None
    recorded, logits = _record_pass(
        model, batch, sites, layers, take=last_tokens, compute_logits=compute_logits
    )
    return {site: torch.stack(by_layer) for site, by_layer in recorded.items()}, logits


def _record_pass(
    model: nn.Module,
    batch: Batch,
    sites: Sequence[str],
    layers: Layers,
    *,
    take: Callable[[Tensor], Tensor],
    compute_logits: Callable[[], Tensor] | None,
) -> tuple[dict[str, list[Tensor]], Tensor | None]:
    """Run a batch; return what `record_sites` records, and the logits.

    `compute_logits` runs the batch through all layers. If it is None, the pass stops at the highest
    of `layers`, and there are no logits.
    """
    with record_sites(model, sites, layers, take) as recorded:
        if compute_logits is not None:
            logits = compute_logits()
        else:
            logits = None
            # If earlier tokens are in a cache, the pass has to use it. If not, none is needed.
            use_cache = "past_key_values" in batch
            forward_to_layer(model, batch, highest_layer(model, layers), use_cache=use_cache)
    return recorded, logits


@contextlib.contextmanager
def record_sites(
    model: nn.Module, sites: Sequence[str], layers: Layers, take: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, list[Tensor]]]:
    """Inside the context, a forward pass appends `take(hidden)`, by layer, to each site's list."""
    recorded: dict[str, list[Tensor]] = {site: [] for site in sites}

    def record(site: str, layer: int, hidden: Tensor) -> None:
        recorded[site].append(take(hidden))

    with at_sites(model, sites, record, layers):
        yield recorded


def highest_layer(model: nn.Module, layers: Layers) -> int:
    """Return the number of the highest of some layers."""
    return layer_numbers(layers, len(blocks(model)))[-1]
