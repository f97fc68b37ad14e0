"""Probes on dropout draws of one prompt: which of them is the truer.

Pair probes take two draws of each row, X [n, 2, d] or [b, n, 2, d], and y [n], how far draw 1 moved
towards the truth. Their scores are above 0 where draw 1 ranks as the truer.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.errors import DataError, ParameterError
from dlk_utils.probes.base import (
    LocalSquare,
    Probe,
    RowLoss,
    TrainingStates,
    adam_descent,
    logistic_loss,
    register,
    reweighted_least_squares,
)
from dlk_utils.probes.linear import Logistic

DISTANCE_LOSSES = ("smooth_l1", "mse", "margin")
"""The losses that `PairDistance` knows."""


class PairProbe(Probe):
    """Base class of pair probes with a linear f of which only ``f(x1) - f(x0)`` counts.

    Differences of draws are divided by their root mean square on the training rows, per neuron.
    They are not centred and there is no intercept, so that swapping the draws only flips the sign.
    `_row_loss` of a subclass is what is minimised, plus an L2 penalty.
    """

    _ndim = 4

    def __init__(self, C: float = 0.1):
        self.C = C

    def _row_loss(self, moves: Float[Tensor, " n"]) -> RowLoss:
        """Return the loss of ``f(x1) - f(x0)``; `moves` is y in units of the mean of ``|y|``."""
        raise NotImplementedError

    def _fit(self, states: TrainingStates, y: Float[Tensor, " n"]) -> None:
        if not (y != 0).any():
            raise DataError("expected rows whose answer moved between the draws, got none")
        differences = states.differences
        row_weights, _ = reweighted_least_squares(
            differences.products,
            self._row_loss(y / y.abs().mean()),
            states.X.shape[-1] / self.C,
            intercept=False,
        )
        coef = torch.einsum("bn,bnd->bd", row_weights, differences.scaled)
        self.coef_ = coef / differences.size[:, 0]

    def _score(self, X: Float[Tensor, "b n 2 d"]) -> Float[Tensor, "b n"]:
        return torch.einsum("bnd,bd->bn", X[:, :, 1] - X[:, :, 0], self.coef_)


class PairRanking(PairProbe):
    """Ranking of two draws: the truer should score higher by a margin of 1.

    1. Scale the differences of the draws by their root mean square on the training rows.
    2. Minimise ``|y| max(0, 1 - sign(y) (f(x1) - f(x0)))^2 / 2`` plus an L2 penalty: each row is
       weighted by how far its answer moved.

    Parameters
    ----------
    C : float
        Inverse of the weight of the penalty per neuron; not tuned.

    Attributes
    ----------
    coef_ : Tensor, [b, d]
        Weights of f, in units of the states.

    References
    ----------
    Herbrich et al. (2000), Large margin rank boundaries for ordinal regression; squared hinge here.
    """

    def _row_loss(self, moves: Float[Tensor, " n"]) -> RowLoss:
        return _squared_hinge(moves)


class PairDirection(PairProbe):
    """Logistic regression of which of two draws is the truer.

    1. Scale the differences of the draws by their root mean square on the training rows.
    2. Minimise the log-loss of ``f(x1) - f(x0)`` for whether y is above 0, plus an L2 penalty. Rows
       that moved count the same, and the others not at all.

    Parameters
    ----------
    C : float
        Inverse of the weight of the penalty per neuron; not tuned.

    Attributes
    ----------
    coef_ : Tensor, [b, d]
        Weights of f, in units of the states.

    References
    ----------
    Bradley and Terry (1952), Rank analysis of incomplete block designs.
    """

    def _row_loss(self, moves: Float[Tensor, " n"]) -> RowLoss:
        return logistic_loss((moves > 0).double(), (moves != 0).double())


class PairDistance(PairProbe):
    """Regression of how far the answer moved towards the truth, in units of the mean move.

    1. Scale the differences of the draws by their root mean square on the training rows.
    2. Minimise the error of ``f(x1) - f(x0)`` as a prediction of y, plus an L2 penalty.

    Parameters
    ----------
    C : float
        Inverse of the weight of the penalty per neuron; not tuned.
    kind : str
        The error: ``"smooth_l1"`` (Huber's, which is linear from 1 on), ``"mse"``, or ``"margin"``:
        smooth L1 plus the loss of `PairRanking`, which keeps the sign right where the size is not.

    Attributes
    ----------
    coef_ : Tensor, [b, d]
        Weights of f, in units of the states.

    References
    ----------
    Huber (1964), Robust estimation of a location parameter.
    """

    def __init__(self, C: float = 0.1, kind: str = "smooth_l1"):
        self.C = C
        self.kind = kind

    def _row_loss(self, moves: Float[Tensor, " n"]) -> RowLoss:
        if self.kind not in DISTANCE_LOSSES:
            expected = ", ".join(DISTANCE_LOSSES)
            raise ParameterError(f"pair distance: expected one of {expected}, got {self.kind!r}")
        if self.kind == "margin":
            return _sum_of(_smooth_l1(moves), _squared_hinge(moves))
        return _smooth_l1(moves) if self.kind == "smooth_l1" else _squared_error(moves)


register("pair", "pair_ranking", PairRanking)
register("pair", "pair_direction", PairDirection)
register("pair", "pair_distance", PairDistance)
register("pair", "pair_distance_mse", PairDistance, kind="mse")
register("pair", "pair_distance_margin", PairDistance, kind="margin")


def _squared_hinge(moves: Float[Tensor, " n"]) -> RowLoss:
    amount, side = moves.abs(), moves.sign()

    def loss(scores: Tensor) -> LocalSquare:
        short = (1 - side * scores).clamp(min=0)
        return LocalSquare(amount * short**2 / 2, amount * (short > 0), side.expand_as(scores))

    return loss


def _squared_error(moves: Float[Tensor, " n"]) -> RowLoss:
    def loss(scores: Tensor) -> LocalSquare:
        error = (scores - moves) ** 2 / 2
        return LocalSquare(error, torch.ones_like(scores), moves.expand_as(scores))

    return loss


def _smooth_l1(moves: Float[Tensor, " n"]) -> RowLoss:
    def loss(scores: Tensor) -> LocalSquare:
        off = (scores - moves).abs()
        error = torch.where(off < 1, off**2 / 2, off - 0.5)
        return LocalSquare(error, 1 / off.clamp(min=1), moves.expand_as(scores))

    return loss


def _sum_of(first: RowLoss, second: RowLoss) -> RowLoss:
    def loss(scores: Tensor) -> LocalSquare:
        one, other = first(scores), second(scores)
        weight = one.weight + other.weight
        target = (one.weight * one.target + other.weight * other.target) / weight
        return LocalSquare(one.loss + other.loss, weight, target)

    return loss


class PairDual(Probe):
    """Logistic regression of which of two draws is the truer on both side by side, ``[x0, x1]``.

    1. Leave out rows whose answer did not move.
    2. Scale each neuron of either draw by its mean and standard deviation on the training rows.
    3. Logistic regression with an L2 penalty.

    It need not change its sign when the draws change places, unlike probes on the difference.

    Parameters
    ----------
    C : float
        Inverse of the weight of the penalty; not tuned.

    References
    ----------
    The dual-input network of the original study, made linear.
    """

    _ndim = 4

    def __init__(self, C: float = 0.01):
        self.C = C

    def _fit(self, states: TrainingStates, y: Float[Tensor, " n"]) -> None:
        moved = y != 0
        self._probe = Logistic(C=self.C).fit(states.X.flatten(2)[:, moved], y[moved] > 0)

    def _score(self, X: Float[Tensor, "b n 2 d"]) -> Float[Tensor, "b n"]:
        return torch.from_numpy(self._probe.decision_function(X.flatten(2)))


register("pair", "pair_dual", PairDual)


class Listwise(Probe):
    """List-wise ranking of k draws of a prompt, X [n, k, d] or [b, n, k, d] and y [n, k].

    1. Take away the mean over a prompt's draws, and divide by the root mean square of all neurons.
    2. The softmax of a linear f over a prompt's draws should be that of y, how far each draw lies
       towards the truth: minimise the cross-entropy (ListNet) plus an L2 penalty by Adam.

    Scores, [n, k] or [b, n, k], are higher for truer draws, and mean nothing across prompts.

    Parameters
    ----------
    penalty : float
        Weight of ``|w|^2``; not tuned.
    steps : int
        Number of steps of Adam.

    Attributes
    ----------
    coef_ : Tensor, [b, d]
        Weights of f, in units of the states.

    References
    ----------
    Cao et al. (2007), Learning to rank: from pairwise approach to listwise approach.
    """

    _ndim = 4

    def __init__(self, penalty: float = 0.1, steps: int = 200):
        self.penalty = penalty
        self.steps = steps

    def _fit(self, states: TrainingStates, y: Float[Tensor, "n k"]) -> None:
        X = states.X
        goal = y - y.mean(1, keepdim=True)
        if not goal.abs().max() > 0:
            raise DataError("expected prompts whose draws differ in their answer, got none")
        wanted = (goal / goal.std()).softmax(1)
        centred = X - X.mean(2, keepdim=True)
        size = (centred**2).mean((1, 2)).sqrt() + 1e-8
        scaled = centred / size[:, None, None]
        # Neurons first: the product of weights with such matrices is several times as fast.
        neurons = scaled.flatten(1, 2).transpose(1, 2).contiguous()

        def loss(weights: Tensor) -> Tensor:
            scores = torch.bmm(weights[:, None], neurons).view(X.shape[:3])
            cross_entropy = -(wanted * scores.log_softmax(-1)).sum(-1).mean(1)
            return cross_entropy + self.penalty * (weights**2).sum(1)

        start = [X.new_zeros(len(X), X.shape[-1])]
        (weights,), _ = adam_descent(start, loss, n_steps=self.steps, learning_rate=0.01)
        self.coef_ = weights / size

    def _score(self, X: Float[Tensor, "b n k d"]) -> Float[Tensor, "b n k"]:
        return torch.einsum("bnkd,bd->bnk", X, self.coef_)
