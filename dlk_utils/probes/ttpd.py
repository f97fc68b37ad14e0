"""Training of truth and polarity direction (TTPD).

Method: 1. states are centred on train; 2. least squares of them on truth t and on t times polarity s (both +1 or -1) give a truth direction that holds for either polarity, and one that turns with it; 3. a logistic
regression of s on the states gives the polarity direction; 4. a logistic regression of t on the two projections (truth direction, polarity direction) is the probe.
Regularisation: that of the two logistic regressions. Without two polarities in train there is no polarity direction, and the truth direction is the difference of means.
Source: Bürger, Hamprecht, Nadler, arXiv 2407.12831. Here polarity is that of the question: +1 where affirming it says that label 1 is right.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.probes.linear import LinearProbe, doubles, logistic_loss, reweighted


class TTPD(LinearProbe):
    """`fit(X, y, polarity)`; `truth_` and `turning_` [b, d] are the two directions of the least squares."""

    needs = ("polarity",)

    def __init__(self, C: float = 0.01, scale: str = "none"):
        self.C, self.scale = C, scale

    def fit(self, X: Any, y: Any, polarity: Any = None) -> "TTPD":
        """`polarity` [n] holds +1 and -1; None: all alike."""
        self.polarity_ = (
            torch.ones(len(y), dtype=torch.float64) if polarity is None else doubles(polarity)
        )
        return super().fit(X, y)

    def learn(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        s, t = self.polarity_.to(X.device), 2 * y - 1
        mean = X.mean(1, keepdim=True)
        centred, two = X - mean, bool((s != s[0]).any())
        design = torch.stack([t, t * s], 1) if two else t[:, None]
        found = torch.linalg.pinv(design - design.mean(0)) @ centred
        self.truth_, self.turning_ = (
            found[:, 0],
            found[:, 1] if two else torch.zeros_like(found[:, 0]),
        )
        directions = [self.truth_]
        if two:
            K = centred @ centred.transpose(1, 2)
            a, _ = reweighted(
                K / K.diagonal(dim1=1, dim2=2).mean(1)[:, None, None],
                logistic_loss((s + 1) / 2),
                1 / (self.C * X.shape[2]),
            )
            directions.append(torch.einsum("bn,bnd->bd", a, centred))
        D = torch.stack([v / v.norm(dim=1, keepdim=True).clamp(min=1e-30) for v in directions], 1)
        Z = torch.einsum("bnd,bkd->bnk", centred, D)
        unit = Z.std(1, keepdim=True).clamp(min=1e-12)
        Z = Z / unit
        a, c = reweighted(Z @ Z.transpose(1, 2), logistic_loss(y), 1.0)
        self.coef_ = torch.einsum("bk,bkd->bd", torch.einsum("bn,bnk->bk", a, Z) / unit[:, 0], D)
        self.intercept_ = c - torch.einsum("bd,bd->b", self.coef_, mean[:, 0])
