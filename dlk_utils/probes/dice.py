"""Linear probe under the dice loss, as in the ablation that this work grows from; its flaw is shown, not mended.

Method: 1. each neuron is scaled on train; 2. p = sigmoid(w.x + c); 3. the loss is 1 - 2 sum(p y) / (sum(p) + sum(y)), over all rows at once, which "always 1" makes small where class 1 is frequent.
Regularisation: L2 on w, not tuned.
Source: Milletari et al., V-Net, arXiv 1606.04797.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.probes.descent import descend
from dlk_utils.probes.linear import LinearProbe


class Dice(LinearProbe):
    """`penalty` is the weight of |w|^2 / d."""

    def __init__(self, penalty: float = 0.01, steps: int = 400, scale: str = "neuron"):
        self.penalty, self.steps, self.scale = penalty, steps, scale

    def learn(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        X, y = X.float(), y.float()

        def loss(w, c):
            p = (torch.einsum("bnd,bd->bn", X, w) + c[:, None]).sigmoid()
            return 1 - 2 * (p * y).sum(1) / (p.sum(1) + y.sum()) + self.penalty * (w**2).mean(1)

        zero = torch.zeros(len(X), X.shape[2], dtype=X.dtype, device=X.device)
        self.coef_, self.intercept_ = (
            x.double() for x in descend([zero, zero[:, 0]], loss, steps=self.steps, rate=0.05)
        )
