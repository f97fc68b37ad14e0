"""Pair distance.

Method: f(x1) - f(x0) should equal y, how far draw 1 moved towards the truth, in units of the mean move. Losses: `smooth_l1` (Huber's, which bends at 1), `mse`, and
`margin`: smooth L1 plus the ranking margin, which keeps the direction right where the distance is not.
Regularisation: L2, not tuned.
Source: Huber 1964.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.probes.linear import Step
from dlk_utils.probes.pair_ranking import PairRanking
from dlk_utils.probes.pairs import PairProbe

LOSSES = ("smooth_l1", "mse", "margin")


class PairDistance(PairProbe):
    """`unit_`, the mean move on train, after `fit`."""

    def __init__(self, C: float = 0.1, kind: str = "smooth_l1"):
        self.C, self.kind = C, kind

    def loss(self, y: Float[Tensor, " n"]) -> Step:
        if self.kind not in LOSSES:
            raise ValueError(
                f"pair distance: expected one of {', '.join(LOSSES)}, got {self.kind!r}"
            )
        self.unit_ = float(y.abs().mean())
        aim, rank = y / self.unit_, PairRanking().loss(y)

        def step(f):
            off = (f - aim).abs()
            if self.kind == "mse":
                return off**2 / 2, torch.ones_like(f), torch.broadcast_to(aim, f.shape)
            cost, weight = torch.where(off < 1, off**2 / 2, off - 0.5), 1 / off.clamp(min=1)
            if self.kind == "smooth_l1":
                return cost, weight, torch.broadcast_to(aim, f.shape)
            more, extra, side = rank(f)
            return cost + more, weight + extra, (weight * aim + extra * side) / (weight + extra)

        return step
