"""What the probes share: their register, their interface, and two solvers.

A probe can be fitted to many feature matrices of the same rows at once, such as the layers of a
model, in one batched computation. In all shapes, b counts feature matrices, n rows and d neurons.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from dlk_utils.errors import DataError, ParameterError
from dlk_utils.probes.scale import Scale

Kind = Literal["state", "more state", "stack", "contrast", "pair"]
"""What a probe is fitted to, and where; the dicts in `dlk_utils.probes` say it in full."""

REGISTERED: dict[str, dict[str, Callable[[], Any]]] = {kind: {} for kind in get_args(Kind)}
"""For each kind, a function that makes a new probe, by the probe's name in result tables."""


def register(kind: Kind, name: str, probe_class: Callable[..., Any], /, **parameters: Any) -> None:
    """List a probe: `evaluate` then fits it, and the tests of all probes run for it.

    Parameters
    ----------
    kind : str
        What the probe is fitted to.
    name : str
        Its name in result tables, which show probes in the order in which they were registered.
    probe_class : type
        Class of the probe.
    **parameters
        Parameters of the class that differ from its defaults.
    """
    if any(name in probes for probes in REGISTERED.values()):
        raise ParameterError(f"expected a new name for a probe, got {name!r}, which is taken")
    REGISTERED[kind][name] = partial(probe_class, **parameters) if parameters else probe_class


def fit_probe(
    make_probe: Callable[[], Any], X: Any, rows: pd.DataFrame, y: np.ndarray | None = None
) -> Any:
    """Fit a new probe to the rows of a table.

    Parameters
    ----------
    make_probe : callable
        Makes the probe, such as ``STATE_PROBES["logistic"]``.
    X : array
        States of the rows, in the shape that this kind of probe takes.
    rows : DataFrame
        A row for each row of X. The columns that the probe lists in `fit_columns` go to its `fit`,
        as far as they are there.
    y : array, [n], optional
        What the probe is fitted to; by default the column y of `rows`.

    Returns
    -------
    Probe
        The fitted probe.
    """
    probe = make_probe()
    columns = {name: rows[name].to_numpy() for name in probe.fit_columns if name in rows}
    return probe.fit(X, rows.y.to_numpy() if y is None else y, **columns)


class TrainingStates:
    """States of training rows, for one probe or for several that are fitted to the same rows.

    What these fits have in common is computed when it is first asked for, and kept. `Probe.fit`
    takes such an object in place of X.

    Parameters
    ----------
    X : array or tensor
        States, [b, n, d], or [b, n, 2, d] for pairs, with the axis for the feature matrices.

    Attributes
    ----------
    X : Tensor
        The states in double precision.
    """

    def __init__(self, X: Any):
        self.X = as_doubles(X)
        self._scaled: dict[str, tuple[Scale, Tensor]] = {}
        self._products: dict[str, Tensor] = {}

    def scaled(self, how: str) -> tuple[Scale, Float[Tensor, "b n ..."]]:
        """Return a scale that was learned on the rows, and the rows scaled by it; see `Scale`.

        The two states of a pair are scaled separately.
        """
        if how not in self._scaled:
            rows = self.X.flatten(2)
            scale = Scale(how).fit(rows)
            scaled = scale.transform(rows)
            self._scaled[how] = scale, scaled.unflatten(2, self.X.shape[2:-1] + (-1,))
        return self._scaled[how]

    def products(self, how: str) -> Float[Tensor, "b n n"]:
        """Return the inner products of the scaled rows."""
        if how not in self._products:
            _, rows = self.scaled(how)
            self._products[how] = rows @ rows.transpose(1, 2)
        return self._products[how]

    @cached_property
    def differences(self) -> "Differences":
        """The differences of the two states of each pair, X [b, n, 2, d]."""
        difference = self.X[:, :, 1] - self.X[:, :, 0]
        size = (difference**2).mean(1, keepdim=True).sqrt() + 1e-8
        scaled = difference / size
        return Differences(scaled, size, scaled @ scaled.transpose(1, 2))


class Differences(NamedTuple):
    """What training on differences of pairs needs.

    Differences in units of their root mean square, [b, n, d]; this `size`, [b, 1, d]; and the
    inner products of the scaled rows, [b, n, n].
    """

    scaled: Tensor
    size: Tensor
    products: Tensor


class LeastRows(NamedTuple):
    """How many training rows a probe needs."""

    per_class: int = 1
    """Of each class."""
    in_all: int = 2
    """Of both classes together."""


class Probe(BaseEstimator):
    """Base class of all probes, with the interface of a scikit-learn estimator.

    A subclass defines `_fit` and `_score`. Both get states in double precision, with the axis for
    the feature matrices: `_fit` as `TrainingStates`, and `_score` as a tensor.
    """

    fit_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of a table of rows, besides X and y, that `fit` takes as keywords."""
    _ndim: ClassVar[int] = 3
    """Number of axes of X, with the one for the feature matrices."""

    @property
    def least_rows(self) -> "LeastRows":
        """The fewest training rows that the probe can be fitted to."""
        return LeastRows()

    def fit(self, X: Any, y: Any, **columns: Any) -> "Probe":
        """Fit the probe.

        Parameters
        ----------
        X : array or tensor
            States of n rows: [n, d], or [n, 2, d] for probes on contrast pairs or pairs of draws.
            With another axis in front, b feature matrices, each of which gets a probe of its own.
            `TrainingStates` if several probes are fitted to the same rows.
        y : array or tensor, [n]
            Class of each row, 0 or 1; for pairs of draws, how far draw 1 moved towards the truth.
        **columns
            See `fit_columns`.

        Raises
        ------
        DataError
            If X has another number of axes, or y does not hold what is needed to learn from it.
        """
        states = X if isinstance(X, TrainingStates) else TrainingStates(self._as_batch(X))
        labels = as_doubles(y).to(states.X.device)
        n_rows = states.X.shape[1]
        # Rankers of several draws take a value for each draw of a row.
        if len(labels) != n_rows:
            raise DataError(
                f"{type(self).__name__}: expected y with a value for each of {n_rows} rows of X, "
                f"got the shape {list(labels.shape)}"
            )
        self._fit(states, labels, **columns)
        self.n_features_in_ = states.X.shape[-1]
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, "..."]:
        """Score rows: [n], or [b, n] if X has an axis for b feature matrices.

        Scores are above 0 for class 1, or where draw 1 ranks as the truer.

        Raises
        ------
        DataError
            If the probe is not fitted, or to states of another width; or if a state or a score is
            not finite: no comparison with nan means anything.
        """
        scores = self._score(self._rows_to_score(X))
        if not is_finite(scores):
            raise DataError(
                f"{type(self).__name__}: expected finite scores, got nan or inf; the fit has "
                "diverged on these training rows"
            )
        return (scores if np.ndim(X) == self._ndim else scores[0]).cpu().numpy()

    def predict(self, X: Any) -> Int[np.ndarray, "..."]:
        """Return 1 where the score is above 0, else 0."""
        return (self.decision_function(X) > 0).astype(int)

    def _rows_to_score(self, X: Any) -> Tensor:
        """Return the states with the axis for the feature matrices, if this fitted probe fits."""
        name = type(self).__name__
        try:
            check_is_fitted(self)
        except NotFittedError:
            raise DataError(f"{name}: expected a fitted probe, got a new one; call `fit`") from None
        rows = self._as_batch(X)
        # A probe that was read from a file does not have it.
        width = getattr(self, "n_features_in_", rows.shape[-1])
        if rows.shape[-1] != width:
            raise DataError(
                f"{name}: expected states of {width} neurons, as in the fit, got the shape "
                f"{list(rows.shape[1:])}"
            )
        return rows

    def _as_batch(self, X: Any) -> Tensor:
        rows = as_doubles(X)
        if rows.ndim == self._ndim - 1:
            return rows[None]
        if rows.ndim != self._ndim:
            axes = f"{self._ndim - 1} or {self._ndim}"
            raise DataError(f"expected states with {axes} axes, got the shape {list(rows.shape)}")
        return rows


class StateProbe(ClassifierMixin, Probe):
    """Base class of probes that classify one state per row.

    A subclass has a parameter `scale`, and defines `_fit_scaled` and `_score_scaled`.
    """

    def _fit(self, states: TrainingStates, y: Float[Tensor, " n"], **columns: Any) -> None:
        self.classes_ = check_labels(y)
        self.scale_, scaled = states.scaled(self.scale)
        self._fit_scaled(scaled, y, **columns)

    def _score(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "_ n"]:
        return self._score_scaled(self.scale_.transform(X))


class StackProbe(StateProbe):
    """Base class of probes on all layers of a row, X [b, n, d], that give one score per row."""

    def decision_function(self, X: Any) -> Float[np.ndarray, " n"]:
        """Score rows, X [b, n, d]: one score for each, [n], above 0 for class 1."""
        return self._score(self._rows_to_score(X))[0].cpu().numpy()


def check_labels(y: Float[Tensor, " n"]) -> Int[np.ndarray, " 2"]:
    """Return the classes, or raise `DataError` if y does not hold both 0 and 1, and only these."""
    classes = y.unique().tolist()
    if classes != [0, 1]:
        raise DataError(f"expected labels 0 and 1, got {classes}")
    return np.array([0, 1])


def as_doubles(values: Any) -> Tensor:
    """Return a tensor in double precision; an array is copied, and what is not finite refused."""
    if isinstance(values, Tensor):
        doubles = values.double()
    else:
        try:
            doubles = torch.from_numpy(np.array(values, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise DataError(f"expected numbers, got something else ({error})") from None
    if not is_finite(doubles):
        n_wrong = int((~doubles.isfinite()).sum())
        raise DataError(
            f"expected finite numbers, got nan or inf in {n_wrong} of {doubles.numel()} places of "
            f"an array of the shape {list(doubles.shape)}"
        )
    return doubles


def is_finite(values: Tensor) -> bool:
    """Whether all numbers are finite, in one pass: nan and inf carry over to the sum."""
    return bool(values.sum().isfinite())


def principal_direction(X: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
    """Return the first principal component of the rows, with length 1 and either sign."""
    centred = X - X.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred @ centred.transpose(1, 2))
    length = values[:, -1:].clamp(min=1e-30).sqrt()
    return torch.einsum("bn,bnd->bd", vectors[:, :, -1], centred) / length


def oriented(
    direction: Float[Tensor, "b d"], X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]
) -> Float[Tensor, "b d"]:
    """Give each direction the sign under which class 1 has the higher mean score."""
    scores = torch.einsum("bnd,bd->bn", X, direction)
    upright = scores[:, y == 1].mean(1) >= scores[:, y == 0].mean(1)
    return torch.where(upright[:, None], direction, -direction)


class LocalSquare(NamedTuple):
    """The loss of each row at its score, and the square that stands for it near there, [b, n].

    The square is ``weight / 2 * (target - score) ** 2``.
    """

    loss: Tensor
    weight: Tensor
    target: Tensor


RowLoss = Callable[[Tensor], LocalSquare]
"""A loss that is a sum over rows, as a function of their scores [b, n]."""


def logistic_loss(y: Float[Tensor, " n"], row_weight: Float[Tensor, " n"] | float = 1.0) -> RowLoss:
    """Return the log-loss for labels y (0 or 1), each row's times its `row_weight`."""

    def loss(scores: Tensor) -> LocalSquare:
        probability = scores.sigmoid()
        curvature = (probability * (1 - probability)).clamp(min=1e-12)
        log_loss = torch.nn.functional.softplus(scores) - y * scores
        target = scores + (y - probability) / curvature
        return LocalSquare(row_weight * log_loss, row_weight * curvature, target)

    return loss


class _Position(NamedTuple):
    """Where the solver is, or a step from there.

    Scores are without the intercepts. They are linear in the row weights, and so can be carried
    along, instead of being computed for every length of a step that is tried.
    """

    row_weights: Float[Tensor, "b n"]
    scores: Float[Tensor, "b n"]
    intercepts: Float[Tensor, " b"]

    def moved(self, step: "_Position", size: Float[Tensor, " b"]) -> "_Position":
        return _Position(
            self.row_weights + size[:, None] * step.row_weights,
            self.scores + size[:, None] * step.scores,
            self.intercepts + size * step.intercepts,
        )


def reweighted_least_squares(
    products: Float[Tensor, "b n n"],
    row_loss: RowLoss,
    penalty: Float[Tensor, " b"] | float,
    *,
    intercept: bool = True,
    start: tuple[Tensor, Tensor] | None = None,
    max_steps: int = 60,
    tol: float = 1e-7,
) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
    """Minimise a sum of row losses plus an L2 penalty, for a batch of linear probes at once.

    The best weights are a sum of rows, ``w = X' a``, so that the products of rows ``K = X X'`` are
    all that is needed, and the scores are ``K a + c``. With fewer rows than neurons that is the
    smaller problem, and a sweep over layers is one batch of small systems, on a CPU or a GPU. Each
    step is Newton's, halved until the cost does not rise.

    Parameters
    ----------
    products : Tensor, [b, n, n]
        K.
    row_loss : callable
        The loss of each row.
    penalty : float or Tensor, [b]
        Weight of ``|w|^2 / 2``.
    intercept : bool
        Whether to fit c; it is not penalised.
    start : tuple of Tensor, optional
        a and c to start from, such as the minimum under another penalty.
    max_steps, tol : int, float
        Stop after so many steps, or when no probe's cost falls by more than the share `tol`. The
        cost is then off its minimum by about the square of that.

    Returns
    -------
    row_weights, intercepts : Tensor, [b, n] and [b]
        a and c.

    References
    ----------
    Kimeldorf and Wahba (1971) for the representer theorem; Green (1984) for the solver.
    """
    b, n = products.shape[:2]
    penalty = torch.as_tensor(penalty, dtype=products.dtype, device=products.device).expand(b)
    row_weights, intercepts = start or (products.new_zeros(b, n), products.new_zeros(b))
    here = _Position(row_weights, torch.einsum("bij,bj->bi", products, row_weights), intercepts)

    def cost(position: _Position) -> Float[Tensor, " b"]:
        loss = row_loss(position.scores + position.intercepts[:, None]).loss
        return loss.sum(1) + penalty / 2 * (position.row_weights * position.scores).sum(1)

    lowest = cost(here)
    for _ in range(max_steps):
        step = _newton_step(products, row_loss, penalty, here, intercept)
        size = torch.ones_like(here.intercepts)
        for _ in range(8):
            reached = cost(here.moved(step, size))
            # A cost that is higher by rounding alone is not worse; one that is no number is.
            limit = lowest + 100 * torch.finfo(products.dtype).eps * lowest.abs()
            worse = ~(reached <= limit)
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        here = here.moved(step, size.masked_fill(worse, 0))
        gained = lowest - reached
        lowest = torch.where(worse, lowest, reached)
        if (gained <= tol * lowest.abs().clamp(min=1e-12)).all():
            break
    return here.row_weights, here.intercepts


def _newton_step(
    products: Float[Tensor, "b n n"],
    row_loss: RowLoss,
    penalty: Float[Tensor, " b"],
    here: _Position,
    intercept: bool,
) -> _Position:
    """Return the step to the minimum of the rows' squares, which is a weighted ridge regression."""
    _, weight, target = row_loss(here.scores + here.intercepts[:, None])
    root = weight.sqrt()
    # The system is symmetric, and its eigenvalues are at least the penalty, so that Cholesky's
    # decomposition exists.
    system = products * root[:, :, None] * root[:, None]
    system.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
    right_sides = torch.stack([root * target, root], 2)
    solved = torch.cholesky_solve(right_sides, torch.linalg.cholesky(system))
    for_target, for_ones = solved.unbind(2)
    intercepts = torch.zeros_like(here.intercepts)
    if intercept:
        intercepts = (root * for_target).sum(1) / (root * for_ones).sum(1).clamp(min=1e-30)
    move = root * (for_target - intercepts[:, None] * for_ones) - here.row_weights
    scores = torch.einsum("bij,bj->bi", products, move)
    return _Position(move, scores, intercepts - here.intercepts)


def adam_descent(
    start: Sequence[Tensor],
    loss: Callable[..., Float[Tensor, "b ..."]],
    *,
    n_steps: int,
    learning_rate: float,
) -> tuple[list[Tensor], Float[Tensor, "b ..."]]:
    """Minimise the losses of a batch of probes by Adam, where least squares do not apply.

    Adam treats each number by itself, so that the probes of a batch do not influence one another.
    The learning rate falls to zero along half a cosine.

    Parameters
    ----------
    start : sequence of Tensor, each [b, ...]
        Parameters to start from.
    loss : callable
        From the parameters to the loss of each probe.
    n_steps, learning_rate : int, float
        Number of steps, and learning rate of the first.

    Returns
    -------
    parameters : list of Tensor
        Parameters after the last step.
    losses : Tensor, [b, ...]
        Loss of each probe before the last step.

    References
    ----------
    Kingma and Ba, arXiv 1412.6980.
    """
    parameters = [x.clone().requires_grad_() for x in start]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    with torch.enable_grad():
        for _ in range(n_steps):
            optimizer.zero_grad()
            losses = loss(*parameters)
            losses.sum().backward()
            optimizer.step()
            schedule.step()
    return [x.detach() for x in parameters], losses.detach()
