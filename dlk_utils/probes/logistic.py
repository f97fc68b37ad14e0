"""Logistic regression.

Method: 1. each neuron is scaled by its mean and standard deviation on train; 2. logistic regression on them; 3. with `C="auto"` the strength is chosen among `STRENGTHS` by the
log-loss of left-out rows in five folds of train, the rows of an example together.
Regularisation: L2; C is the inverse of its weight, as in scikit-learn.
Source: the linear probe of Alain and Bengio, arXiv 1610.01644.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from dlk_utils.probes.linear import LinearProbe, logistic_loss, reweighted

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Logistic(LinearProbe):
    """`C_` [b] after `fit`: the strength that was used."""

    needs = ("example_id",)

    def __init__(self, C: float | str = 0.01, scale: str = "neuron", folds: int = 5):
        self.C, self.scale, self.folds = C, scale, folds

    def fit(self, X: Any, y: Any, example_id: Any = None) -> "Logistic":
        """`example_id` [n] tells which rows are of one example; None: each its own."""
        self.groups_ = np.arange(len(y)) if example_id is None else np.asarray(example_id)
        return super().fit(X, y)

    def dual(
        self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
        K = X @ X.transpose(1, 2)
        if self.C == "auto":
            self.C_ = self._chosen(K, y)
        else:
            self.C_ = torch.full((len(K),), float(self.C), dtype=K.dtype, device=K.device)
        return reweighted(K, logistic_loss(y), 1 / self.C_)

    def _chosen(self, K: Float[Tensor, "b n n"], y: Float[Tensor, " n"]) -> Float[Tensor, " b"]:
        K, y = K.float(), y.float()  # a choice among tens does not need doubles
        left_out = torch.zeros(len(STRENGTHS), len(K), device=K.device)
        labels = y.cpu().numpy()
        for parts in StratifiedGroupKFold(self.folds, shuffle=True, random_state=0).split(
            labels, labels, self.groups_
        ):
            train, test = (torch.as_tensor(part, device=K.device) for part in parts)
            inner, across, found = K[:, train[:, None], train], K[:, test[:, None], train], None
            for i, C in enumerate(STRENGTHS):
                found = reweighted(inner, logistic_loss(y[train]), 1 / C, start=found, tol=1e-4)
                f = torch.einsum("bij,bj->bi", across, found[0]) + found[1][:, None]
                left_out[i] += logistic_loss(y[test])(f)[0].sum(1)
        return torch.tensor(STRENGTHS, dtype=torch.float64, device=K.device)[left_out.argmin(0)]
