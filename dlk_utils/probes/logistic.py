"""Logistic regression.

Method: 1. each neuron is scaled by its mean and standard deviation on train; 2. logistic regression on them; 3. with `C="auto"` the strength is chosen among `STRENGTHS` by the
log-loss of left-out rows in five folds of train, rows of one group together.
Regularisation: L2; C is the inverse of its weight, as in scikit-learn.
Source: the linear probe of Alain and Bengio, arXiv 1610.01644.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.probes.linear import LinearProbe, logistic_loss, reweighted

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Logistic(LinearProbe):
    """`C_` [b] after `fit`: the strength that was used."""

    def __init__(self, C: float | str = 0.01, scale: str = "neuron", folds: int = 5):
        self.C, self.scale, self.folds = C, scale, folds

    def dual(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
        K = X @ X.transpose(1, 2)
        if self.C == "auto":
            self.C_ = self._chosen(K, y)
        else:
            self.C_ = torch.full((len(K),), float(self.C), dtype=K.dtype, device=K.device)
        return reweighted(K, logistic_loss(y), 1 / self.C_)

    def _chosen(self, K: Float[Tensor, "b n n"], y: Float[Tensor, " n"]) -> Float[Tensor, " b"]:
        fold = torch.zeros(len(y), dtype=torch.long)
        for label in (0.0, 1.0):  # folds with both labels
            rows = (y.cpu() == label).nonzero()[:, 0]
            fold[rows] = torch.as_tensor(np.random.default_rng(0).permutation(len(rows))) % self.folds
        left_out = torch.zeros(len(STRENGTHS), len(K), dtype=K.dtype, device=K.device)
        for k in range(self.folds):
            train, test = (fold != k).nonzero()[:, 0].to(K.device), (fold == k).nonzero()[:, 0].to(K.device)
            for i, C in enumerate(STRENGTHS):
                a, c = reweighted(K[:, train[:, None], train], logistic_loss(y[train]), 1 / C)
                f = torch.einsum("bij,bj->bi", K[:, test[:, None], train], a) + c[:, None]
                left_out[i] += logistic_loss(y[test])(f)[0].sum(1)
        return torch.tensor(STRENGTHS, dtype=K.dtype, device=K.device)[left_out.argmin(0)]
