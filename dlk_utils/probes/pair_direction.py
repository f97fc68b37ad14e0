"""Pair direction.

Method: logistic regression on f(x1) - f(x0): binary cross-entropy of which draw is the truer, each row counting alike.
Regularisation: L2, not tuned.
Source: Bradley and Terry 1952.
"""

from jaxtyping import Float
from torch import Tensor

from dlk_utils.probes.linear import Step, logistic_loss
from dlk_utils.probes.pairs import PairProbe


class PairDirection(PairProbe):
    """Which of two draws is the truer, as a probability."""

    def loss(self, y: Float[Tensor, " n"]) -> Step:
        return logistic_loss((y > 0).double(), (y != 0).double())
