"""Dual input: a probe that sees both draws, [x0, x1], and need not turn its sign when they change places.

Method: logistic regression of which draw is the truer on both states side by side.
Regularisation: L2, not tuned.
Source: the dual-input network of the ablation that this work grows from, made linear.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator

from dlk_utils.probes.linear import alike, batch, doubles
from dlk_utils.probes.logistic import Logistic


class PairDual(BaseEstimator):
    """`fit(X [n, 2, d] or [b, n, 2, d], y)`, y being how far draw 1 moved towards the truth."""

    def __init__(self, C: float = 0.01):
        self.C = C

    def fit(self, X: Any, y: Any) -> "PairDual":
        """Rows that did not move are left out."""
        rows, move = batch(X, 4), doubles(y)
        kept = move != 0
        self.probe_ = Logistic(C=self.C).fit(rows.flatten(2)[:, kept], (move[kept] > 0).long())
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, "..."]:
        """Above 0 where draw 1 ranks as the truer."""
        return alike(torch.from_numpy(self.probe_.decision_function(batch(X, 4).flatten(2))), X, 4)
