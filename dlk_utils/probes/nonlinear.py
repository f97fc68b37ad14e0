"""Probes that least squares cannot fit: scikit-learn's classifiers, networks, and the dice loss."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import clone
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, conv1d

from dlk_utils.probes.base import LeastRows, StackProbe, StateProbe, adam_descent, register
from dlk_utils.probes.linear import LinearProbe


class ClassifierProbe(StateProbe):
    """Any classifier of scikit-learn, fitted to one feature matrix after another.

    1. Scale each neuron by its mean and standard deviation on the training rows.
    2. Fit a copy of the classifier.
    3. The score is its probability of class 1, minus one half.

    Registered as ``nearest`` with 15 nearest neighbours: a check that needs no direction.

    Parameters
    ----------
    classifier : estimator
        A classifier with `predict_proba`.
    scale : str
        How states are scaled: see `Scale`.
    """

    def __init__(self, classifier: Any, scale: str = "neuron"):
        self.classifier = classifier
        self.scale = scale

    @property
    def least_rows(self) -> LeastRows:
        """As many rows as the classifier looks for neighbours, if it does."""
        return LeastRows(in_all=getattr(self.classifier, "n_neighbors", 2))

    def _fit_scaled(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        labels = y.cpu().numpy()
        self._classifiers = [clone(self.classifier).fit(x, labels) for x in X.cpu().numpy()]

    def _score_scaled(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
        fitted = zip(self._classifiers, X.cpu().numpy(), strict=True)
        return torch.from_numpy(np.stack([c.predict_proba(x)[:, 1] for c, x in fitted]) - 0.5)


register("more state", "nearest", ClassifierProbe, classifier=KNeighborsClassifier(15))


class MLP(StateProbe):
    """A network with one hidden layer of rectified neurons: what a linear probe might miss.

    1. Scale each neuron by its mean and standard deviation on the training rows.
    2. Minimise the log-loss plus an L2 penalty by Adam, from several random starts.
    3. The score is the mean over the starts.

    Parameters
    ----------
    width : int
        Number of hidden neurons.
    penalty : float
        Weight of the sum of squared weights; not tuned.
    steps, seeds : int
        Number of steps of Adam, and of random starts.
    scale : str
        How states are scaled: see `Scale`.

    References
    ----------
    Azaria and Mitchell, The internal state of an LLM knows when it's lying, arXiv 2304.13734.
    """

    def __init__(
        self,
        width: int = 16,
        penalty: float = 0.01,
        steps: int = 100,
        seeds: int = 3,
        scale: str = "neuron",
    ):
        self.width = width
        self.penalty = penalty
        self.steps = steps
        self.seeds = seeds
        self.scale = scale

    def _fit_scaled(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        b, _, d = X.shape
        n_networks = b * self.seeds
        hidden = _random_weights((self.seeds, d, self.width), fan_in=d, seed=0)
        output = _random_weights((self.seeds, self.width), fan_in=self.width, seed=1)
        start = [
            hidden.repeat(b, 1, 1),
            torch.zeros(n_networks, self.width),
            output.repeat(b, 1),
            torch.zeros(n_networks),
        ]
        inputs, labels = self._inputs(X), y.float().expand(n_networks, -1)

        def log_loss(*weights: Tensor) -> Tensor:
            scores = _mlp(inputs, *weights)
            return binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(1)

        self._weights = _train(log_loss, start, penalty=self.penalty, steps=self.steps)

    def _score_scaled(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
        scores = _mlp(self._inputs(X), *self._weights)
        return scores.view(len(X), self.seeds, -1).mean(1).double()

    def _inputs(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "b_seeds n d"]:
        return X.float().repeat_interleave(self.seeds, 0)


register("more state", "mlp", MLP)


class Dice(LinearProbe):
    """A linear probe under the dice loss, which is kept to show what is wrong with that loss.

    1. Scale each neuron by its mean and standard deviation on the training rows.
    2. With ``p = sigmoid(w . x + c)``, minimise ``1 - 2 sum(p y) / (sum(p) + sum(y))``, with sums
       over all rows, plus an L2 penalty, by Adam.

    Where class 1 is frequent, always answering 1 makes this loss small.

    Parameters
    ----------
    penalty : float
        Weight of ``|w|^2 / d``; not tuned.
    steps : int
        Number of steps of Adam.
    scale : str
        How states are scaled: see `Scale`.

    Attributes
    ----------
    coef_, intercept_ : Tensor, [b, d] and [b]
        Weights of the scaled neurons, and intercept.

    References
    ----------
    Milletari et al., V-Net, arXiv 1606.04797. The original study uses it for a probe.
    """

    def __init__(self, penalty: float = 0.01, steps: int = 400, scale: str = "neuron"):
        self.penalty = penalty
        self.steps = steps
        self.scale = scale

    def _fit_scaled(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        X, y = X.float(), y.float()

        def loss(weights: Tensor, intercepts: Tensor) -> Tensor:
            p = (torch.einsum("bnd,bd->bn", X, weights) + intercepts[:, None]).sigmoid()
            dice = 1 - 2 * (p * y).sum(1) / (p.sum(1) + y.sum())
            return dice + self.penalty * (weights**2).mean(1)

        start = [X.new_zeros(len(X), X.shape[2]), X.new_zeros(len(X))]
        fitted, _ = adam_descent(start, loss, n_steps=self.steps, learning_rate=0.05)
        self.coef_, self.intercept_ = (parameter.double() for parameter in fitted)


register("more state", "dice", Dice)


class DepthConvolution(StackProbe):
    """A convolution along depth: layers as space, neurons as channels.

    1. Scale each neuron of each layer by its mean and standard deviation on the training rows.
    2. Train two convolutions over three neighbouring layers each, followed by the mean over layers
       and a linear read-out: minimise the log-loss plus an L2 penalty by Adam, from several random
       starts.
    3. The score is the mean over the starts.

    Parameters
    ----------
    channels : int
        Number of channels of each convolution.
    penalty : float
        Weight of the sum of squared weights; not tuned.
    steps, seeds : int
        Number of steps of Adam, and of random starts.
    scale : str
        How states are scaled: see `Scale`.

    References
    ----------
    The convolution of the original study.
    """

    def __init__(
        self,
        channels: int = 8,
        penalty: float = 0.01,
        steps: int = 100,
        seeds: int = 2,
        scale: str = "neuron",
    ):
        self.channels = channels
        self.penalty = penalty
        self.steps = steps
        self.seeds = seeds
        self.scale = scale

    def _fit_scaled(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        d, channels, seeds = X.shape[2], self.channels, self.seeds
        start = [
            _random_weights((seeds, channels, d, 3), fan_in=3 * d, seed=0),
            torch.zeros(seeds, channels),
            _random_weights((seeds, channels, channels, 3), fan_in=3 * channels, seed=1),
            torch.zeros(seeds, channels),
            _random_weights((seeds, channels), fan_in=channels, seed=2),
            torch.zeros(seeds),
        ]
        inputs, labels = self._inputs(X), y.float()

        def log_loss(*weights: Tensor) -> Tensor:
            scores = _convolve(inputs, *weights)
            return torch.stack([binary_cross_entropy_with_logits(s, labels) for s in scores])

        self._weights = _train(log_loss, start, penalty=self.penalty, steps=self.steps)

    def _score_scaled(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "1 n"]:
        scores = _convolve(self._inputs(X), *self._weights)
        return scores.mean(0, keepdim=True).double()

    def _inputs(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "n d b"]:
        # In the order in memory in which convolutions are fast.
        return X.permute(1, 2, 0).float().contiguous()


register("stack", "convolution", DepthConvolution)


def _random_weights(shape: tuple[int, ...], *, fan_in: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / fan_in**0.5


def _train(
    log_loss: Callable[..., Float[Tensor, " k"]],
    start: Sequence[Tensor],
    *,
    penalty: float,
    steps: int,
) -> list[Tensor]:
    """Train k networks at once, from weights and biases by turns, each [k, ...]."""

    def loss(*weights: Tensor) -> Tensor:
        squares = sum((w**2).flatten(1).sum(1) for w in weights[::2])
        return log_loss(*weights) + penalty * squares

    return adam_descent(start, loss, n_steps=steps, learning_rate=0.01)[0]


def _mlp(
    inputs: Float[Tensor, "k n d"],
    hidden: Float[Tensor, "k d width"],
    hidden_bias: Float[Tensor, "k width"],
    output: Float[Tensor, "k width"],
    output_bias: Float[Tensor, " k"],
) -> Float[Tensor, "k n"]:
    activations = (torch.bmm(inputs, hidden) + hidden_bias[:, None]).relu()
    return torch.einsum("knh,kh->kn", activations, output) + output_bias[:, None]


def _convolve(inputs: Float[Tensor, "n d b"], *weights: Tensor) -> Float[Tensor, "k n"]:
    scores = []
    for first, first_bias, second, second_bias, output, output_bias in zip(*weights, strict=True):
        hidden = conv1d(inputs, first, first_bias, padding=1).relu()
        hidden = conv1d(hidden, second, second_bias, padding=1).relu()
        scores.append(hidden.mean(2) @ output + output_bias)
    return torch.stack(scores)
