"""Probes on two dropout draws of a row: f is linear, and f(x1) - f(x0) = w (x1 - x0), so that each is a linear probe on the difference, without an intercept."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from torch import Tensor

from dlk_utils.probes.linear import Step, alike, batch, doubles, reweighted


class PairProbe(BaseEstimator):
    """`fit(X [n, 2, d] or [b, n, 2, d], y)`, y being how far draw 1 moved towards the truth; `decision_function` is above 0 where draw 1 ranks as the truer.

    Differences are scaled by their root mean square on train, per neuron: not centred, so that swapping the draws only flips the sign. `C` is the inverse of the
    L2 penalty per neuron.
    """

    def __init__(self, C: float = 0.1):
        self.C = C

    def loss(self, y: Float[Tensor, " n"]) -> Step:
        """What is made small; a method's own part."""
        raise NotImplementedError

    def fit(self, X: Any, y: Any) -> "PairProbe":
        """Raises `ValueError` if no answer moved."""
        rows = batch(X, 4)
        move = doubles(y).to(rows.device)
        if not (move != 0).any():
            raise ValueError("expected rows whose answer moved between the draws, got none")
        moved = rows[:, :, 1] - rows[:, :, 0]
        self.scale_ = (moved**2).mean(1, keepdim=True).sqrt() + 1e-8
        scaled = moved / self.scale_
        a, _ = reweighted(
            scaled @ scaled.transpose(1, 2),
            self.loss(move),
            rows.shape[-1] / self.C,
            intercept=False,
        )
        self.coef_ = torch.einsum("bn,bnd->bd", a, scaled) / self.scale_[:, 0]
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, "..."]:
        """f(x1) - f(x0), [n] or [b, n]."""
        rows = batch(X, 4)
        return alike(torch.einsum("bnd,bd->bn", rows[:, :, 1] - rows[:, :, 0], self.coef_), X, 4)
