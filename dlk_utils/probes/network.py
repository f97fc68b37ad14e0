"""Small networks: what a linear probe might miss.

Method: `MLP`: one hidden layer of `width` rectified neurons on one state. `DepthConvolution`: layers as space, neurons as channels: two convolutions over three neighbouring layers each, the mean over depth, and a
linear read-out; it sees all layers of a row at once. Both: neurons scaled on train, logistic loss, Adam for a fixed number of steps, the mean score of `seeds` starts.
Regularisation: L2 on all weights, not tuned.
Source: SAPLMA (arXiv 2304.13734) for networks on states; the convolution is the one of the ablation that this work grows from.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dlk_utils.probes.descent import descend
from dlk_utils.probes.linear import LinearProbe


class MLP(LinearProbe):
    """One network for each feature matrix and seed, all at once."""

    def __init__(
        self,
        width: int = 16,
        penalty: float = 0.01,
        steps: int = 100,
        seeds: int = 3,
        scale: str = "neuron",
    ):
        self.width, self.penalty, self.steps, self.seeds, self.scale = (
            width,
            penalty,
            steps,
            seeds,
            scale,
        )

    def learn(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        X = X.float()
        first = _start((self.seeds, X.shape[2], self.width), X.shape[2], 0).repeat(len(X), 1, 1)
        last = _start((self.seeds, self.width), self.width, 1).repeat(len(X), 1)
        many, y = X.repeat_interleave(self.seeds, 0), y.float()

        def loss(w, b, v, c):
            error = functional.binary_cross_entropy_with_logits(
                _mlp(many, w, b, v, c), y.expand(len(many), -1), reduction="none"
            )
            return error.mean(1) + self.penalty * ((w**2).sum((1, 2)) + (v**2).sum(1))

        self.weights_ = descend(
            [first, torch.zeros(len(many), self.width), last, torch.zeros(len(many))],
            loss,
            steps=self.steps,
            rate=0.01,
        )

    def score(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
        many = X.float().repeat_interleave(self.seeds, 0)
        return _mlp(many, *self.weights_).view(len(X), self.seeds, -1).mean(1).double()


def _mlp(x, w, b, v, c):
    return torch.einsum("bnh,bh->bn", (torch.bmm(x, w) + b[:, None]).relu(), v) + c[:, None]


class DepthConvolution(LinearProbe):
    """`fit(X [b, n, d], y)` takes the matrices for neighbouring layers of the same rows, and gives one score a row."""

    def __init__(
        self,
        channels: int = 8,
        penalty: float = 0.01,
        steps: int = 100,
        seeds: int = 2,
        scale: str = "neuron",
    ):
        self.channels, self.penalty, self.steps, self.seeds, self.scale = (
            channels,
            penalty,
            steps,
            seeds,
            scale,
        )

    def learn(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        d, c = X.shape[2], self.channels
        start = [
            _start((self.seeds, c, d, 3), 3 * d, 0),
            torch.zeros(self.seeds, c),
            _start((self.seeds, c, c, 3), 3 * c, 1),
            torch.zeros(self.seeds, c),
            _start((self.seeds, c), c, 2),
            torch.zeros(self.seeds),
        ]
        rows, y = X.permute(1, 2, 0).float(), y.float()

        def loss(*weights):
            error = [
                functional.binary_cross_entropy_with_logits(
                    _convolve(rows, *(w[k] for w in weights)), y
                )
                for k in range(self.seeds)
            ]
            return torch.stack(error) + self.penalty * sum(
                (w**2).flatten(1).sum(1) for w in weights[::2]
            )

        self.weights_ = descend(start, loss, steps=self.steps, rate=0.01)

    def score(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "1 n"]:
        rows = X.permute(1, 2, 0).float()
        return (
            torch.stack(
                [_convolve(rows, *(w[k] for w in self.weights_)) for k in range(self.seeds)]
            )
            .mean(0, keepdim=True)
            .double()
        )

    def decision_function(self, X: Any) -> Float[np.ndarray, " n"]:
        """Above 0 for class 1, from all layers."""
        return super().decision_function(X)[0]


def _convolve(rows, w, b, w2, b2, v, c):
    hidden = functional.conv1d(
        functional.conv1d(rows, w, b, padding=1).relu(), w2, b2, padding=1
    ).relu()
    return hidden.mean(2) @ v + c


def _start(shape: tuple[int, ...], fan_in: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / fan_in**0.5
