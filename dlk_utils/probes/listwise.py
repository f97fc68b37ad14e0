"""List-wise ranking of more than two draws of a prompt.

Method: f is linear; the softmax of f over a prompt's K draws should be that of how far each lies towards the truth, y [n, K] (the cross-entropy of ListNet). Only differences between draws of one prompt matter.
Regularisation: L2, not tuned.
Source: Cao et al., *Learning to rank: from pairwise to listwise approach*, 2007.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator

from dlk_utils.probes.descent import descend
from dlk_utils.probes.linear import alike, batch, doubles


class Listwise(BaseEstimator):
    """`fit(X [n, K, d] or [b, n, K, d], y [n, K])`; `decision_function(X)` [n, K] or [b, n, K]: higher is truer, within a prompt."""

    def __init__(self, penalty: float = 0.1, steps: int = 200, rate: float = 0.01):
        self.penalty, self.steps, self.rate = penalty, steps, rate

    def fit(self, X: Any, y: Any) -> "Listwise":
        """Raises `ValueError` if no prompt's draws differ."""
        rows, goal = batch(X, 4), doubles(y)
        goal = goal - goal.mean(1, keepdim=True)
        if not goal.abs().max() > 0:
            raise ValueError("expected prompts whose draws differ in their answer, got none")
        inner = rows - rows.mean(2, keepdim=True)
        self.scale_ = (inner**2).mean((1, 2)).sqrt() + 1e-8
        inner, wanted = inner / self.scale_[:, None, None], (goal / goal.std()).softmax(1)

        def loss(w):
            f = torch.einsum("bnkd,bd->bnk", inner, w)
            return -(wanted * f.log_softmax(-1)).sum(-1).mean(1) + self.penalty * (w**2).sum(1)

        [w] = descend(
            [torch.zeros(len(rows), rows.shape[-1], dtype=rows.dtype)],
            loss,
            steps=self.steps,
            rate=self.rate,
        )
        self.coef_ = w / self.scale_
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, "..."]:
        """Comparable within a prompt only."""
        return alike(torch.einsum("bnkd,bd->bnk", batch(X, 4), self.coef_), X, 4)
