"""Difference of means, also called mass mean; and the same with the inverse covariance, which is linear discriminant analysis.

Method: 1. the direction is mean(class 1) - mean(class 0) on train, times the inverse of the covariance within classes if `covariance`; 2. the score is the projection on it;
3. the threshold is halfway between the means.
Regularisation: none of the plain one; the covariance is shrunk towards a sphere as Ledoit and Wolf 2004 say, by a formula, so that nothing is tuned.
Source: Marks and Tegmark, arXiv 2310.06824; Fisher 1936.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.probes.linear import LinearProbe


class MeanDifference(LinearProbe):
    """`coef_` is the direction, in the units of `scale`."""

    def __init__(self, covariance: bool = False, scale: str = "none"):
        self.covariance, self.scale = covariance, scale

    def dual(
        self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
        one, zero = y / y.sum(), (1 - y) / (1 - y).sum()
        K = X @ X.transpose(1, 2)
        a = (one - zero).expand(len(K), -1)
        if self.covariance:
            n, d = X.shape[1:]
            within = (
                torch.eye(n, dtype=K.dtype, device=K.device)
                - y[:, None] * one
                - (1 - y)[:, None] * zero
            )  # takes each row's class mean away
            inner = within @ K @ within.T
            shrink, mean = _ledoit_wolf(inner, n, d)
            # (s m I + (1 - s) Z'Z / n)^-1 v, by Woodbury's identity, for rows Z without their class mean
            ridge = (shrink * mean * n / (1 - shrink).clamp(min=1e-12))[:, None, None] * torch.eye(
                n, dtype=K.dtype, device=K.device
            )
            a = (
                a
                - torch.cholesky_solve(
                    within @ K @ a[..., None], torch.linalg.cholesky(ridge + inner)
                ).squeeze(-1)
                @ within
            ) / (shrink * mean)[:, None]
        return a, -torch.einsum("bi,bij,j->b", a, K, (one + zero) / 2)


def _ledoit_wolf(
    inner: Float[Tensor, "b n n"], n: int, d: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """The shrinkage and the mean variance, from the products of the centred rows alone."""
    mean = inner.diagonal(dim1=1, dim2=2).sum(1) / (n * d)
    squares = (inner**2).sum((1, 2)) / n**2
    spread = ((inner.diagonal(dim1=1, dim2=2) ** 2).sum(1) / n - squares) / (d * n)
    distance = (squares - d * mean**2) / d
    return (torch.minimum(spread, distance) / distance).clamp(min=1e-6, max=1.0), mean
