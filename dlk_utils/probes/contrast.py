"""Probes on contrast pairs: the state after the prompt with choice 0 said, and with choice 1 said, X [n, 2, d]. What tells them apart for good and all, the words of the choices, is taken away first.

Method: each of the two is centred and scaled per neuron on train, apart, so that which choice was said cannot be read from it. Then
`CCS`: a probability p = sigmoid(w.x + c) for either, with p1 = 1 - p0 (consistent) and not both one half (confident); no labels; `restarts` starts, of which the one with the lowest loss is kept.
`CRC`: the first principal component of the differences x1 - x0; no labels. `ContrastLogistic`: logistic regression of the label on the differences, the supervised ceiling.
The sign of CCS and CRC is that under which class 1 scores higher on train: that is the one thing they take from labels.
Regularisation: none of CCS and CRC; L2 of the logistic regression.
Source: Burns, Ye, Klein, Steinhardt, arXiv 2212.03827.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor

from dlk_utils.probes.descent import descend
from dlk_utils.probes.linear import alike, batch, doubles
from dlk_utils.probes.logistic import Logistic


class ContrastProbe(ClassifierMixin, BaseEstimator):
    """`fit(X [n, 2, d] or [b, n, 2, d], y)`, `decision_function(X)` [n] or [b, n], above 0 for class 1."""

    def learn(self, X: Float[Tensor, "b n 2 d"], y: Float[Tensor, " n"]) -> None:
        """A method's own part: sets `coef_` [b, d]."""
        raise NotImplementedError

    def fit(self, X: Any, y: Any) -> "ContrastProbe":
        """`y` holds 0 and 1, both at least once."""
        self.classes_ = np.unique(np.asarray(y))
        if list(self.classes_) != [0, 1]:
            raise ValueError(f"expected labels 0 and 1, got {list(self.classes_)}")
        rows = batch(X, 4)
        self.mean_, deviation = rows.mean(1, keepdim=True), rows.std(1, correction=0, keepdim=True)
        self.deviation_ = torch.where(deviation > 1e-12, deviation, torch.ones_like(deviation))
        self.intercept_ = torch.zeros(len(rows), dtype=rows.dtype)
        self.learn(self._scaled(rows), doubles(y))
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, "..."]:
        """What speaks for choice 1 minus what speaks for choice 0."""
        scaled = self._scaled(batch(X, 4))
        return alike(
            torch.einsum("bnd,bd->bn", scaled[:, :, 1] - scaled[:, :, 0], self.coef_)
            + self.intercept_[:, None],
            X,
            4,
        )

    def _oriented(
        self, w: Float[Tensor, "b d"], difference: Float[Tensor, "b n d"], y: Float[Tensor, " n"]
    ) -> Float[Tensor, "b d"]:
        scores = torch.einsum("bnd,bd->bn", difference, w)
        return w * torch.where(scores[:, y == 1].mean(1) >= scores[:, y == 0].mean(1), 1.0, -1.0)[
            :, None
        ].to(w.dtype)

    def _scaled(self, rows: Float[Tensor, "b n 2 d"]) -> Float[Tensor, "b n 2 d"]:
        return (rows - self.mean_) / self.deviation_


class CCS(ContrastProbe):
    """`losses_` and `starts_` [b, restarts]: the loss of each start, and its AUROC on train under the sign of the kept one's rule, to be shown as spread."""

    def __init__(self, restarts: int = 10, steps: int = 400, rate: float = 0.01):
        self.restarts, self.steps, self.rate = restarts, steps, rate

    def learn(self, X: Float[Tensor, "b n 2 d"], y: Float[Tensor, " n"]) -> None:
        (b, _, _, d), full, X = X.shape, X, X.float()
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(self.restarts, d, generator=generator).to(X.dtype)
        w = (w / w.norm(dim=1, keepdim=True)).repeat(b, 1, 1)

        def loss(w, c):
            p0, p1 = (
                torch.einsum("bnd,brd->brn", X[:, :, k], w).add(c[..., None]).sigmoid()
                for k in (0, 1)
            )
            each = ((p1 - (1 - p0)) ** 2 + torch.minimum(p0, p1) ** 2).mean(-1)
            self.losses_ = each.detach()
            return each.sum(1)

        w, _ = descend([w, torch.zeros(b, self.restarts)], loss, steps=self.steps, rate=self.rate)
        self.all_ = torch.stack(
            [
                self._oriented(w[:, r].double(), full[:, :, 1] - full[:, :, 0], y)
                for r in range(self.restarts)
            ],
            1,
        )
        self.coef_ = self.all_[torch.arange(b), self.losses_.argmin(1)]

    def each_start(self, X: Any) -> Float[np.ndarray, "b restarts n"]:
        """The scores of every start, each with the sign of train."""
        scaled = self._scaled(batch(X, 4))
        return torch.einsum("bnd,brd->brn", scaled[:, :, 1] - scaled[:, :, 0], self.all_).numpy()


class CRC(ContrastProbe):
    """First principal component of the differences."""

    def learn(self, X: Float[Tensor, "b n 2 d"], y: Float[Tensor, " n"]) -> None:
        difference = X[:, :, 1] - X[:, :, 0]
        centred = difference - difference.mean(1, keepdim=True)
        self.coef_ = self._oriented(
            torch.linalg.svd(centred, full_matrices=False)[2][:, 0], difference, y
        )


class ContrastLogistic(ContrastProbe):
    """The supervised one."""

    def __init__(self, C: float = 0.01):
        self.C = C

    def learn(self, X: Float[Tensor, "b n 2 d"], y: Float[Tensor, " n"]) -> None:
        fitted = Logistic(C=self.C, scale="none").fit(X[:, :, 1] - X[:, :, 0], y)
        self.coef_, self.intercept_ = fitted.coef_, fitted.intercept_
