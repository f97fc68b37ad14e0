"""Linear probes, many at once: one for each of `b` feature matrices of the same rows (layers, say), in one batched computation.

A weight vector of least norm is a sum over the rows, w = X'a, so that all is solved in the n x n products of rows K = XX'. With fewer rows than neurons that is the
smaller problem, and a sweep over layers is one batch of small systems on a CPU or a GPU.
Source: the representer theorem (Kimeldorf and Wahba 1971); iteratively reweighted least squares (Green 1984).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor

from dlk_utils.probes.scale import Scale

Step = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Of scores f [b, n]: the loss of each row, its weight and its working response, all [b, n]."""


class LinearProbe(ClassifierMixin, BaseEstimator):
    """scikit-learn's interface for one probe (X [n, d]) and the same for a batch of them (X [b, n, d]): `fit`, then `decision_function` [n] or [b, n]."""

    def __init__(self, scale: str = "neuron"):
        self.scale = scale

    def dual(
        self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
        """Coefficients of the rows and the intercept: a method's own part, if its weights are a sum over rows."""
        raise NotImplementedError

    def learn(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        """Sets `coef_` [b, d] and `intercept_` [b] from scaled rows: a method's own part, if they are not."""
        a, self.intercept_ = self.dual(X, y)
        self.coef_ = torch.einsum("bn,bnd->bd", a, X)

    def score(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
        """Of scaled rows."""
        return torch.einsum("bnd,bd->bn", X, self.coef_) + self.intercept_[:, None]

    def fit(self, X: Any, y: Any) -> "LinearProbe":
        """`y` holds 0 and 1, both at least once."""
        labels = np.unique(np.asarray(y))
        if list(labels) != [0, 1]:
            raise ValueError(f"expected labels 0 and 1, got {list(labels)}")
        self.classes_ = labels
        rows = batch(X, 3)
        self.scale_ = Scale(self.scale).fit(rows)
        self.learn(self.scale_(rows), doubles(y).to(rows.device))
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, "..."]:
        """Above 0 for class 1."""
        return alike(self.score(self.scale_(batch(X, 3))), X, 3)

    def predict(self, X: Any) -> Int[np.ndarray, "..."]:
        """0 or 1."""
        return (self.decision_function(X) > 0).astype(int)


def doubles(x: Any) -> Tensor:
    """A tensor in double precision; an array is copied."""
    return x.double() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float64))


def batch(X: Any, ndim: int) -> Tensor:
    """In double precision, with a first axis for the batch if `X` has none (if it has fewer than `ndim`)."""
    rows = doubles(X)
    return rows if rows.ndim == ndim else rows[None]


def alike(scores: Tensor, X: Any, ndim: int) -> Float[np.ndarray, "..."]:
    """Scores of a batch as an array; of the one member, if `X` had no axis for it."""
    return (scores if np.ndim(X) == ndim else scores[0]).cpu().numpy()


def reweighted(
    K: Float[Tensor, "b n n"],
    step: Step,
    penalty: Float[Tensor, " b"] | float,
    *,
    intercept: bool = True,
    start: tuple[Tensor, Tensor] | None = None,
    steps: int = 60,
    tol: float = 1e-7,
) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
    """The minimum of sum(loss(f)) + penalty / 2 |w|^2 over f = Ka + c, for each of the batch: Newton's steps, each halved until it does not make things worse.

    It begins at `start` (a, c), such as the minimum under another penalty, and ends when no step gains more than `tol` of the cost: what is left is then about the square of that.
    """
    b, n = K.shape[:2]
    penalty = torch.as_tensor(penalty, dtype=K.dtype, device=K.device).expand(b)
    a, c = start or (
        torch.zeros(b, n, dtype=K.dtype, device=K.device),
        torch.zeros(b, dtype=K.dtype, device=K.device),
    )
    products = lambda a: torch.einsum("bij,bj->bi", K, a)
    cost = lambda a, Ka, c: step(Ka + c[:, None])[0].sum(1) + penalty / 2 * (a * Ka).sum(1)
    Ka = products(a)
    best = cost(a, Ka, c)
    for _ in range(steps):
        _, weight, response = step(Ka + c[:, None])
        root = weight.sqrt()
        system = K * root[:, :, None] * root[:, None]
        system.diagonal(dim1=1, dim2=2).add_(
            penalty[:, None]
        )  # symmetric, and its eigenvalues are at least the penalty
        answer, ones = torch.cholesky_solve(
            torch.stack([root * response, root], 2), torch.linalg.cholesky(system)
        ).unbind(2)
        new_c = (
            (root * answer).sum(1) / (root * ones).sum(1).clamp(min=1e-30)
            if intercept
            else torch.zeros_like(c)
        )
        move, move_c = root * (answer - new_c[:, None] * ones) - a, new_c - c
        Kmove = products(move)
        size = torch.ones_like(c)
        for _ in range(8):
            tried = cost(a + size[:, None] * move, Ka + size[:, None] * Kmove, c + size * move_c)
            worse = tried > best + 100 * torch.finfo(K.dtype).eps * best.abs()
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        size = torch.where(worse, torch.zeros_like(size), size)
        a, Ka, c, gained = (
            a + size[:, None] * move,
            Ka + size[:, None] * Kmove,
            c + size * move_c,
            best - tried,
        )
        best = torch.where(worse, best, tried)
        if (gained <= tol * best.abs().clamp(min=1e-12)).all():
            break
    return a, c


def logistic_loss(y: Float[Tensor, " n"], weight: Float[Tensor, " n"] | float = 1.0) -> Step:
    """log(1 + exp(-f)) for y = 1, log(1 + exp(f)) for y = 0, each times its `weight`."""

    def step(f):
        p = f.sigmoid()
        curve = (p * (1 - p)).clamp(min=1e-12)
        return (
            weight * (torch.nn.functional.softplus(f) - y * f),
            weight * curve,
            f + (y - p) / curve,
        )

    return step
