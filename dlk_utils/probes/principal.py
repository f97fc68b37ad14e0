"""First principal component of the states, without labels but for its sign.

Method: 1. the direction in which the rows of train vary most; 2. its sign is that under which class 1 scores higher on train; 3. the threshold is halfway between the class means.
Regularisation: none, and nothing to tune.
Source: the reading vector of Zou et al. (LAT), arXiv 2310.01405, on single states.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.probes.linear import LinearProbe


class Principal(LinearProbe):
    """`coef_` has length 1. States are not scaled: a scale per neuron would make every neuron vary alike."""

    def __init__(self, scale: str = "none"):
        self.scale = scale

    def dual(
        self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
        n = X.shape[1]
        centre = torch.eye(n, dtype=X.dtype, device=X.device) - 1 / n
        K = X @ X.transpose(1, 2)
        values, vectors = torch.linalg.eigh(centre @ K @ centre)
        a = vectors[:, :, -1] @ centre / values[:, -1:].clamp(min=1e-30).sqrt()
        scores = torch.einsum("bij,bj->bi", K, a)
        one, zero = (scores[:, y == k].mean(1) for k in (1, 0))
        sign = torch.where(one >= zero, 1.0, -1.0).to(X.dtype)
        return a * sign[:, None], -sign * (one + zero) / 2
