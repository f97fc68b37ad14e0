"""Pair ranking with a margin.

Method: of two draws the truer should score higher by a margin of 1; loss max(0, 1 - sign(y) (f(x1) - f(x0)))^2 / 2, weighted by |y|, how far the answer moved.
Regularisation: L2, not tuned.
Source: ranking SVM, Herbrich et al. 2000 (with the squared hinge).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.probes.linear import Step
from dlk_utils.probes.pairs import PairProbe


class PairRanking(PairProbe):
    """Which of two draws is the truer."""

    def loss(self, y: Float[Tensor, " n"]) -> Step:
        weight, side = y.abs() / y.abs().mean(), y.sign()

        def step(f):
            short = (1 - side * f).clamp(min=0)
            return weight * short**2 / 2, weight * (short > 0), torch.broadcast_to(side, f.shape)

        return step
