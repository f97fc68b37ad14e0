"""Monte-Carlo dropout with seeded masks, injected where the residual branches end (Gal and Ghahramani, arXiv 1506.02142).

Most chat models ship with dropout 0 and no dropout modules, so switching to train mode changes nothing. Here the outputs of
attention and MLP are dropped out in eval mode: the place of GPT-2's and GPTBigCode's own residual dropout. A mask value is a hash
of (seed of the row's draw, site, layer, token position, channel), so it does not depend on batch, order, padding or device.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dlk_utils.sites import on_output

DROPOUT_SITES = ("attn_out", "mlp_out")


class DeadDropout(RuntimeError):
    """Two draws that do not differ."""


def draw_seed(row_id: str, draw: int, seed: int = 0) -> int:
    """The 32-bit seed of one draw of one row."""
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{row_id}:{draw}".encode()).digest()[:4], "little", signed=True)


@contextlib.contextmanager
def mc_dropout(
    model: nn.Module,
    p: float = 0.1,
    *,
    seeds: Sequence[int],
    positions: Int[Tensor, "b t"],
    sites: Sequence[str] = DROPOUT_SITES,
) -> Iterator[None]:
    """Within it, a forward pass of the batch drops channels with probability `p` and scales the rest by 1/(1-p).

    `seeds` holds one `draw_seed` a row; `positions` each token's place in its own prompt (values under padding do not matter).
    """
    if not 0 < p < 1:
        raise ValueError(f"dropout p: expected 0 < p < 1, got {p}")
    base = torch.tensor(list(seeds), dtype=torch.int32, device=positions.device)

    def drop(site: str, layer: int, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        place = _mix(base.clone() ^ (1 + layer * len(DROPOUT_SITES) + DROPOUT_SITES.index(site)))
        keep = keep_mask(place.to(hidden.device), positions.to(hidden.device), hidden.shape[-1], p)
        return hidden * keep.to(hidden.dtype).mul_(1 / (1 - p))

    with on_output(model, sites, drop):
        yield


def keep_mask(seeds: Int[Tensor, " b"], positions: Int[Tensor, "b t"], d: int, p: float) -> Bool[Tensor, "b t d"]:
    """Which channels stay: a counter-based generator (murmur3's finaliser), 16 bits a channel, so `p` is exact to 1/65536."""
    tokens = _mix(seeds[:, None] ^ _mix(positions.to(torch.int32) + 1))
    channels = torch.arange(1, (d + 1) // 2 + 1, dtype=torch.int32, device=seeds.device) * -1640531535  # spread by the golden ratio
    bits = _mix(tokens[:, :, None] ^ channels).view(torch.int16)[..., :d]
    return bits >= round(p * 65536) - 32768


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    for shift, mask, factor in ((16, 0xFFFF, -2048144789), (13, 0x7FFFF, -1028477387), (16, 0xFFFF, 1)):
        x = x ^ ((x >> shift) & mask)  # the mask makes the arithmetic shift a logical one
        if factor != 1:
            x = x * factor
    return x
