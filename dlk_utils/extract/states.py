"""The states of a batch at the last token of each prompt, or at its last few tokens."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.extract.batches import Batch, Layers, last_logits, last_positions
from dlk_utils.models.sites import at_sites


@torch.no_grad()
def forward_states(
    model: nn.Module,
    batch: Batch,
    sites: Sequence[str],
    layers: Layers = "all",
    *,
    positions: int = 1,
) -> tuple[dict[str, Float[Tensor, "layer b ..."]], Float[Tensor, "b vocab"]]:
    """Run a batch once; return the states at the last tokens of each prompt, and the logits there.

    Returns
    -------
    states : dict
        For each site [layer, b, d], or [layer, b, positions, d] if `positions` is above 1.
    logits : Tensor [b, vocab]
        Of the token after each prompt.

    Raises
    ------
    ValueError
        If a prompt has fewer tokens than `positions`, not counting those in a cache, whose states
        are gone.
    """
    width = batch["input_ids"].shape[1]
    shortest = int(batch["attention_mask"][:, -width:].sum(1).min())
    if not 1 <= positions <= shortest:
        raise ValueError(
            "positions: expected between 1 and the tokens of the shortest prompt that are not in a "
            f"cache, {shortest}, got {positions}"
        )
    last = last_positions(batch)
    rows = torch.arange(len(last), device=last.device)[:, None]
    places = last[:, None] + torch.arange(1 - positions, 1, device=last.device)

    def last_tokens(hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b ..."]:
        # Sliced before it is copied: the states of the other tokens never leave the device.
        taken = hidden[rows.to(hidden.device), places.to(hidden.device)].cpu()
        return taken[:, 0] if positions == 1 else taken

    with record_sites(model, sites, layers, last_tokens) as recorded:
        logits = last_logits(model, batch)
    return {site: torch.stack(by_layer) for site, by_layer in recorded.items()}, logits


@contextlib.contextmanager
def record_sites(
    model: nn.Module, sites: Sequence[str], layers: Layers, take: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, a forward pass appends `take(hidden)` to the list of each site, layer by layer."""
    recorded: dict[str, list[Tensor]] = {site: [] for site in sites}

    def record(site: str, layer: int, hidden: Tensor) -> None:
        recorded[site].append(take(hidden))

    with at_sites(model, sites, record, layers):
        yield recorded
