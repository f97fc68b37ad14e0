"""A ranking of two dropout draws that is not linear in their difference."""

import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.errors import DataError
from dlk_utils.probes.base import Probe, TrainingStates, adam_descent


class PairBilinear(Probe):
    """Ranking of two draws by a product: what holds for both of them, times how they differ.

    Which of two draws is nearer to the truth depends on what is true, and on which of them leans to
    that answer. No score that is linear in the difference of the draws can say so. This one is
    ``(u . m + c) (v . d)``, where m is the mean of the two states and d their difference. Swapping
    the draws only flips its sign.

    1. Scale each neuron: means of draws by their mean and standard deviation on the training rows,
       differences by their root mean square.
    2. Start from the two directions whose product goes best with y: the first singular vectors of
       the sum of ``y d (m, 1)'`` over the training rows.
    3. Minimise the log-loss of which draw is truer, each row weighted by how far its answer moved,
       plus an L2 penalty by Adam.

    X is [n, 2, d] or [b, n, 2, d], and y [n], how far draw 1 moved towards the truth, as for the
    probes of `pairs`.

    Parameters
    ----------
    penalty : float
        Weight of ``|u|^2 + |v|^2``; not tuned.
    steps : int
        Number of steps of Adam.

    Attributes
    ----------
    context_, offset_ : Tensor, [b, d] and [b]
        u and c, in units of the states.
    turn_ : Tensor, [b, d]
        v, in units of the states.

    References
    ----------
    Tenenbaum and Freeman (2000), Separating style and content with bilinear models.
    """

    _ndim = 4

    def __init__(self, penalty: float = 0.03, steps: int = 200):
        self.penalty = penalty
        self.steps = steps

    def _fit(self, states: TrainingStates, y: Float[Tensor, " n"]) -> None:
        if not (y != 0).any():
            raise DataError("expected rows whose answer moved between the draws, got none")
        middles, differences = states.X.mean(2), states.X[:, :, 1] - states.X[:, :, 0]
        mean, deviation = middles.mean(1), middles.std(1) + 1e-8
        size = (differences**2).mean(1).sqrt() + 1e-8
        middles = (middles - mean[:, None]) / deviation[:, None]
        differences = differences / size[:, None]
        weight, side = y.abs() / y.abs().mean(), y.sign()

        def product(u: Tensor, c: Tensor, v: Tensor) -> Float[Tensor, "b n"]:
            context = torch.einsum("bnd,bd->bn", middles, u) + c[:, None]
            return context * torch.einsum("bnd,bd->bn", differences, v)

        def loss(u: Tensor, c: Tensor, v: Tensor) -> Float[Tensor, " b"]:
            wrong = torch.nn.functional.softplus(-side * product(u, c, v))
            return (weight * wrong).mean(1) + self.penalty * (u**2 + v**2).sum(1)

        start = _best_product(middles, differences, y)
        (u, c, v), _ = adam_descent(start, loss, n_steps=self.steps, learning_rate=0.01)
        self.context_ = u / deviation
        self.offset_ = c - (self.context_ * mean).sum(1)
        self.turn_ = v / size

    def _score(self, X: Float[Tensor, "b n 2 d"]) -> Float[Tensor, "b n"]:
        return self.score_all_pairs(X)[:, :, 0, 1]

    def score_all_pairs(self, X: Float[Tensor, "b n k d"]) -> Float[Tensor, "b n k k"]:
        """Score every two of k draws of each row: [..., i, j] is above 0 where j is the truer."""
        context = torch.einsum("bnkd,bd->bnk", X, self.context_) + self.offset_[:, None, None]
        turn = torch.einsum("bnkd,bd->bnk", X, self.turn_)
        of_both = (context[..., :, None] + context[..., None, :]) / 2
        return of_both * (turn[..., None, :] - turn[..., :, None])


def _best_product(
    middles: Float[Tensor, "b n d"], differences: Float[Tensor, "b n d"], y: Float[Tensor, " n"]
) -> list[Tensor]:
    """Return u [b, d], c [b] and v [b, d] to start from; both factors have a mean square of 1."""
    ones = middles.new_ones(*middles.shape[:2], 1)
    with_one = torch.cat([middles, ones], 2)
    moments = torch.einsum("bnd,n,bne->bde", differences, y, with_one)
    left, _, right = torch.linalg.svd(moments, full_matrices=False)
    turn, context = left[:, :, 0], right[:, 0]

    def unit(rows: Tensor, weights: Tensor) -> Tensor:
        scores = torch.einsum("bnd,bd->bn", rows, weights)
        return weights / (scores.square().mean(1).sqrt() + 1e-8)[:, None]

    context = unit(with_one, context)
    return [context[:, :-1].contiguous(), context[:, -1].contiguous(), unit(differences, turn)]
