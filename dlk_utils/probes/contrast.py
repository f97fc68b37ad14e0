"""Probes on contrast pairs: the state after the prompt and choice 0, and after it and choice 1."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import ClassifierMixin
from torch import Tensor

from dlk_utils.probes.base import (
    Probe,
    TrainingStates,
    adam_descent,
    check_labels,
    oriented,
    principal_direction,
    register,
)
from dlk_utils.probes.linear import Logistic


class ContrastProbe(ClassifierMixin, Probe):
    """Base class of probes on contrast pairs, X [n, 2, d] or [b, n, 2, d].

    Each neuron is scaled by its mean and standard deviation on the training rows, separately after
    choice 0 and after choice 1, so that which choice was appended cannot be read from it. The score
    is ``coef_ . (x1 - x0) + intercept_``. `_fit_scaled` of a subclass sets `coef_` [b, d], and
    `intercept_` [b] if it is not 0.
    """

    _ndim = 4

    def _fit(self, states: TrainingStates, y: Float[Tensor, " n"]) -> None:
        self.classes_ = check_labels(y)
        self.scale_, scaled = states.scaled("neuron")
        self.intercept_ = scaled.new_zeros(len(scaled))
        self._fit_scaled(scaled, y)

    def _score(self, X: Float[Tensor, "b n 2 d"]) -> Float[Tensor, "b n"]:
        scores = torch.einsum("bnd,bd->bn", _difference(self._scaled(X)), self.coef_)
        return scores + self.intercept_[:, None]

    def _scaled(self, X: Float[Tensor, "b n 2 d"]) -> Float[Tensor, "b n 2 d"]:
        return self.scale_.transform(X.flatten(2)).view(X.shape)


def _difference(X: Float[Tensor, "b n 2 d"]) -> Float[Tensor, "b n d"]:
    return X[:, :, 1] - X[:, :, 0]


class CCS(ContrastProbe):
    """Contrast-consistent search: a direction along which the two states contradict each other.

    1. Scale the states after either choice separately.
    2. With a probability ``p = sigmoid(w . x + c)`` for each of the two, minimise the mean of
       ``(p1 - (1 - p0))^2 + min(p0, p1)^2`` by Adam: they should add up to 1 (consistent), and not
       both be one half (confident). Labels are not used, and there is no regularisation.
    3. Of several random starts, keep the one with the lowest loss.
    4. Its sign is the one under which class 1 scores higher on the training rows.

    Parameters
    ----------
    restarts, steps : int
        Number of random starts, and of steps of Adam.

    Attributes
    ----------
    coef_ : Tensor, [b, d]
        Weights of the scaled neurons.
    losses_ : Tensor, [b, restarts]
        Loss of each start.

    References
    ----------
    Burns, Ye, Klein and Steinhardt, Discovering latent knowledge, arXiv 2212.03827.
    """

    def __init__(self, restarts: int = 10, steps: int = 400):
        self.restarts = restarts
        self.steps = steps

    def score_starts(self, X: Any) -> Float[np.ndarray, "b restarts n"]:
        """Score rows by each of the random starts, with the sign that each has on training rows."""
        difference = _difference(self._scaled(self._as_batch(X)))
        return torch.einsum("bnd,brd->brn", difference, self._starts).cpu().numpy()

    def _fit_scaled(self, X: Float[Tensor, "b n 2 d"], y: Float[Tensor, " n"]) -> None:
        b, _, _, d = X.shape
        after_choice = [x.contiguous() for x in X.float().unbind(2)]
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(self.restarts, d, generator=generator).to(X.device)
        directions = directions / directions.norm(dim=1, keepdim=True)
        start = [directions.repeat(b, 1, 1), directions.new_zeros(b, self.restarts)]

        def loss(weights: Tensor, intercepts: Tensor) -> Tensor:
            p0, p1 = (
                (torch.einsum("bnd,brd->brn", x, weights) + intercepts[..., None]).sigmoid()
                for x in after_choice
            )
            return ((p1 - (1 - p0)) ** 2 + torch.minimum(p0, p1) ** 2).mean(-1)

        (weights, _), self.losses_ = adam_descent(
            start, loss, n_steps=self.steps, learning_rate=0.01
        )
        difference = _difference(X)
        starts = [oriented(start, difference, y) for start in weights.double().unbind(1)]
        self._starts = torch.stack(starts, 1)
        # `argmin` takes nan for the least value.
        best = self.losses_.nan_to_num(nan=torch.inf).argmin(1)
        self.coef_ = self._starts[torch.arange(b), best]


class CRC(ContrastProbe):
    """Contrastive representation clustering: the direction in which the two states differ most.

    1. Scale the states after either choice separately.
    2. The direction is the first principal component of their differences. Labels are not used, and
       there is no regularisation.
    3. Its sign is the one under which class 1 scores higher on the training rows.

    Attributes
    ----------
    coef_ : Tensor, [b, d]
        Weights of the scaled neurons, of length 1.

    References
    ----------
    Burns, Ye, Klein and Steinhardt, Discovering latent knowledge, arXiv 2212.03827 (CRC-TPC).
    """

    def _fit_scaled(self, X: Float[Tensor, "b n 2 d"], y: Float[Tensor, " n"]) -> None:
        difference = _difference(X)
        self.coef_ = oriented(principal_direction(difference), difference, y)


class ContrastLogistic(ContrastProbe):
    """Logistic regression on the differences: what supervision adds to CCS and CRC.

    1. Scale the states after either choice separately.
    2. Logistic regression of the label on their differences, with an L2 penalty.

    Parameters
    ----------
    C : float
        Inverse of the weight of the penalty; not tuned.

    Attributes
    ----------
    coef_, intercept_ : Tensor, [b, d] and [b]
        Weights of the scaled neurons, and intercept.

    References
    ----------
    Burns, Ye, Klein and Steinhardt, Discovering latent knowledge, arXiv 2212.03827.
    """

    def __init__(self, C: float = 0.01):
        self.C = C

    def _fit_scaled(self, X: Float[Tensor, "b n 2 d"], y: Float[Tensor, " n"]) -> None:
        probe = Logistic(C=self.C, scale="none").fit(_difference(X), y)
        self.coef_, self.intercept_ = probe.coef_, probe.intercept_


register("contrast", "ccs", CCS)
register("contrast", "crc", CRC)
register("contrast", "contrast_logistic", ContrastLogistic)
