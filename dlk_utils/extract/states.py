"""States at the last token of each prompt, or at its last few tokens."""

from collections.abc import Sequence

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
) -> tuple[dict[str, Float[Tensor, "b layer ..."]], Float[Tensor, "b vocab"]]:
    """States at the last token [b, layer, d], or at the last `positions` tokens [b, layer, positions, d], and the logits there.

    A hook slices before it copies. Raises `ValueError` where a prompt has fewer tokens than `positions` (those in a cache have no states any more, and do not count).
    """
    last, found = last_positions(batch), {site: [] for site in sites}
    own = int(batch["attention_mask"][:, -batch["input_ids"].shape[1] :].sum(1).min())
    if not 1 <= positions <= own:
        raise ValueError(
            f"positions: expected between 1 and the tokens of the shortest prompt that are not in a cache, {own}, got {positions}"
        )
    where = last[:, None] + torch.arange(1 - positions, 1, device=last.device)

    def keep(site: str, layer: int, hidden: Tensor) -> None:
        taken = hidden[
            torch.arange(len(last), device=hidden.device)[:, None], where.to(hidden.device)
        ].cpu()
        found[site].append(taken[:, 0] if positions == 1 else taken)

    with at_sites(model, sites, keep, layers):
        logits = last_logits(model, batch)
    return {site: torch.stack(v, 1) for site, v in found.items()}, logits
