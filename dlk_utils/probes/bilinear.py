"""A ranking of two dropout draws that is not linear in their difference."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.errors import DataError
from dlk_utils.probes.base import (
    Probe,
    RowLoss,
    TrainingStates,
    adam_descent,
    as_doubles,
    check_labels,
    logistic_loss,
    reweighted_least_squares,
)


class PairBilinear(Probe):
    """Ranking of two draws by a product: what holds for both of them, times how they differ.

    Which of two draws is nearer to the truth depends on what is true, and on which of them leans to
    that answer. No score that is linear in the difference of the draws can say so. This one is
    ``(u . m + c) (v . d)``, where m is the mean of the two states and d their difference. Swapping
    the draws only flips its sign.

    1. Scale each neuron: means of draws by their mean and standard deviation on the training rows,
       differences by their root mean square.
    2. Begin with two factors, each fitted by itself, with an L2 penalty: u and c by logistic
       regression of the label on the means, all pairs with the same weight; v by logistic
       regression of which draw leans to choice 1 on the differences, each pair weighted by how far
       its answer moved.
    3. From there, lower by a few steps of Adam the log-loss with which the product tells the truer
       draw, each pair weighted as for v, plus an L2 penalty.

    X is [n, 2, d] or [b, n, 2, d], and y [n], how far draw 1 moved towards the truth, as for the
    probes of `pairs`. The product alone does not find its factors among many neurons from few rows;
    so `fit` takes the `label` [n] too, which choice is right (0 or 1). The probes of `PAIR_PROBES`
    are fitted without one, and so this one is not among them.

    Parameters
    ----------
    C : float
        Inverse of the weight of the penalties of step 2; not tuned. There the log-loss is a sum
        over pairs, so that more draws of the same rows weaken the penalties.
    penalty : float
        Weight of ``|u|^2 + |v|^2`` in step 3, next to the mean log-loss of a pair; not tuned.
    steps : int
        Number of steps of Adam.

    Attributes
    ----------
    context_, offset_ : Tensor, [b, d] and [b]
        u and c, in units of the states.
    lean_ : Tensor, [b, d]
        v, in units of the states.

    References
    ----------
    Tenenbaum and Freeman (2000), Separating style and content with bilinear models.
    """

    _ndim = 4

    fit_columns = ("label",)

    def __init__(self, C: float = 0.01, penalty: float = 0.03, steps: int = 50):
        self.C = C
        self.penalty = penalty
        self.steps = steps

    def fit(self, X: Any, y: Any, label: Any) -> "PairBilinear":
        """Fit the probe; `label` [n] says which choice is right. See `Probe.fit`."""
        return super().fit(X, y, label=label)

    def _fit(self, states: TrainingStates, y: Float[Tensor, " n"], label: Any) -> None:
        if not (y != 0).any():
            raise DataError("expected rows whose answer moved between the draws, got none")
        middles, differences = states.X.mean(2), states.X[:, :, 1] - states.X[:, :, 0]
        mean, deviation = middles.mean(1), middles.std(1) + 1e-8
        size = (differences**2).mean(1).sqrt() + 1e-8
        middles = (middles - mean[:, None]) / deviation[:, None]
        differences = differences / size[:, None]
        weight, side = y.abs() / y.abs().mean(), y.sign()

        labels = as_doubles(label)
        check_labels(labels)
        lean = y * (2 * labels - 1)

        def product(u: Tensor, c: Tensor, v: Tensor) -> Float[Tensor, "b n"]:
            context = torch.einsum("bnd,bd->bn", middles, u) + c[:, None]
            return context * torch.einsum("bnd,bd->bn", differences, v)

        def loss(u: Tensor, c: Tensor, v: Tensor) -> Float[Tensor, " b"]:
            wrong = torch.nn.functional.softplus(-side * product(u, c, v))
            return (weight * wrong).mean(1) + self.penalty * (u**2 + v**2).sum(1)

        u, c = self._logistic(middles, logistic_loss(labels), intercept=True)
        lean_loss = logistic_loss((lean > 0).double(), weight)
        v, _ = self._logistic(differences, lean_loss, intercept=False)
        (u, c, v), _ = adam_descent([u, c, v], loss, n_steps=self.steps, learning_rate=0.001)
        self.context_ = u / deviation
        self.offset_ = c - (self.context_ * mean).sum(1)
        self.lean_ = v / size

    def _logistic(
        self, X: Float[Tensor, "b n d"], loss: RowLoss, *, intercept: bool
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        row_weights, intercepts = reweighted_least_squares(
            X @ X.transpose(1, 2), loss, 1 / self.C, intercept=intercept
        )
        return torch.einsum("bn,bnd->bd", row_weights, X), intercepts

    def _score(self, X: Float[Tensor, "b n 2 d"]) -> Float[Tensor, "b n"]:
        return self.score_all_pairs(X)[:, :, 0, 1]

    def score_all_pairs(self, X: Float[Tensor, "b n k d"]) -> Float[Tensor, "b n k k"]:
        """Score every two of k draws of each row: [..., i, j] is above 0 where j is the truer."""
        context = torch.einsum("bnkd,bd->bnk", X, self.context_) + self.offset_[:, None, None]
        lean = torch.einsum("bnkd,bd->bnk", X, self.lean_)
        of_both = (context[..., :, None] + context[..., None, :]) / 2
        return of_both * (lean[..., None, :] - lean[..., :, None])
