"""Linear probes: a direction in the states, and a threshold on it."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from torch.nn.functional import normalize

from dlk_utils.probes.base import (
    LeastRows,
    StackProbe,
    StateProbe,
    TrainingStates,
    as_doubles,
    check_labels,
    logistic_loss,
    oriented,
    principal_direction,
    register,
    reweighted_least_squares,
)

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The values of C among which ``Logistic(C="auto")`` chooses."""


class LinearProbe(StateProbe):
    """Base class of linear probes: the score of a scaled state x is ``coef_ . x + intercept_``.

    `_fit_scaled` of a subclass (or its `_fit`) sets `coef_` [b, d] and `intercept_` [b].
    """

    def raw_weights(self) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        """Return weights and intercepts that give the same scores on states that are not scaled.

        Raises `ParameterError` with ``scale="row"``, under which the score is not linear in the
        state.
        """
        return self.scale_.to_raw(self.coef_, self.intercept_)

    def _score_scaled(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
        return torch.einsum("bnd,bd->bn", X, self.coef_) + self.intercept_[:, None]


class Logistic(LinearProbe):
    """Logistic regression with an L2 penalty.

    1. Scale each neuron by its mean and standard deviation on the training rows.
    2. With ``C="auto"``, choose C among `STRENGTHS` by the log-loss of left-out rows in folds of
       the training rows, for each feature matrix by itself.
    3. Minimise the sum of log-losses plus ``|w|^2 / (2 C)``.

    Parameters
    ----------
    C : float or "auto"
        Inverse of the weight of the penalty, as in scikit-learn.
    scale : str
        How states are scaled: see `Scale`.
    folds : int
        Number of folds of step 2.

    Attributes
    ----------
    coef_, intercept_ : Tensor, [b, d] and [b]
        Weights of the scaled neurons, and intercept.
    C_ : Tensor, [b]
        The C that was used.

    References
    ----------
    Alain and Bengio, Understanding intermediate layers using linear classifier probes,
    arXiv 1610.01644.
    """

    fit_columns = ("example_id",)

    def __init__(self, C: float | str = 0.01, scale: str = "neuron", folds: int = 5):
        self.C = C
        self.scale = scale
        self.folds = folds

    @property
    def least_rows(self) -> LeastRows:
        """A row of each class for every fold, where folds choose C."""
        n_folds = self.folds if self.C == "auto" else 1
        return LeastRows(per_class=n_folds, in_all=2 * n_folds)

    def fit(self, X: Any, y: Any, example_id: Any = None) -> "Logistic":
        """Fit the probe to states X, [n, d] or [b, n, d], and labels y, [n].

        Rows of the same `example_id` [n] stay in one fold; by default each row is its own example.
        """
        return super().fit(X, y, example_id=example_id)

    def _fit(self, states: TrainingStates, y: Float[Tensor, " n"], example_id: Any) -> None:
        self.classes_ = check_labels(y)
        self.scale_, X = states.scaled(self.scale)
        products = states.products(self.scale)
        if self.C == "auto":
            groups = np.arange(len(y)) if example_id is None else np.asarray(example_id)
            self.C_ = self._choose_strength(products, y, groups)
        else:
            self.C_ = products.new_full((len(X),), float(self.C))
        row_weights, self.intercept_ = reweighted_least_squares(
            products, logistic_loss(y), 1 / self.C_
        )
        self.coef_ = torch.einsum("bn,bnd->bd", row_weights, X)

    def _choose_strength(
        self, products: Float[Tensor, "b n n"], y: Float[Tensor, " n"], groups: np.ndarray
    ) -> Float[Tensor, " b"]:
        # A choice among powers of ten does not need double precision.
        products, y = products.float(), y.float()
        labels = y.cpu().numpy()
        folds = StratifiedGroupKFold(self.folds, shuffle=True, random_state=0)
        left_out_loss = products.new_zeros(len(STRENGTHS), len(products))
        for fold in folds.split(labels, labels, groups):
            train, test = (torch.as_tensor(rows, device=products.device) for rows in fold)
            train_products = products[:, train[:, None], train]
            test_products = products[:, test[:, None], train]
            solution = None
            for i, C in enumerate(STRENGTHS):
                # The minimum under the strength before is close: a good place to start from.
                solution = reweighted_least_squares(
                    train_products, logistic_loss(y[train]), 1 / C, start=solution, tol=1e-4
                )
                row_weights, intercepts = solution
                scores = torch.einsum("bij,bj->bi", test_products, row_weights)
                left_out_loss[i] += logistic_loss(y[test])(scores + intercepts[:, None]).loss.sum(1)
        strengths = torch.tensor(STRENGTHS, dtype=torch.float64, device=products.device)
        # `argmin` takes nan for the least value.
        return strengths[left_out_loss.nan_to_num(nan=torch.inf).argmin(0)]


register("state", "logistic", Logistic)
register("more state", "logistic_tuned", Logistic, C="auto")


class MeanDifference(LinearProbe):
    """Difference of the class means, also called mass mean.

    1. The direction is the mean of class 1 minus the mean of class 0 on the training rows.
    2. The threshold is halfway between the two. There is no regularisation.

    Parameters
    ----------
    scale : str
        How states are scaled: see `Scale`.

    Attributes
    ----------
    coef_, intercept_ : Tensor, [b, d] and [b]
        Weights of the scaled neurons, and intercept.

    References
    ----------
    Marks and Tegmark, The geometry of truth, arXiv 2310.06824.
    """

    def __init__(self, scale: str = "none"):
        self.scale = scale

    def _fit_scaled(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        means = _class_means(X, y)
        self.coef_ = means[:, 1] - means[:, 0]
        self.intercept_ = _halfway(self.coef_, means)


class LDA(LinearProbe):
    """Linear discriminant analysis.

    1. The direction is the difference of the class means times the inverse of the covariance within
       classes. The covariance is shrunk towards a sphere by the formula of Ledoit and Wolf, so that
       nothing is tuned.
    2. The threshold is halfway between the class means.

    Parameters
    ----------
    scale : str
        How states are scaled: see `Scale`.

    Attributes
    ----------
    coef_, intercept_ : Tensor, [b, d] and [b]
        Weights of the scaled neurons, and intercept.

    References
    ----------
    Fisher (1936), The use of multiple measurements in taxonomic problems. Ledoit and Wolf (2004),
    A well-conditioned estimator for large-dimensional covariance matrices.
    """

    def __init__(self, scale: str = "none"):
        self.scale = scale

    @property
    def least_rows(self) -> LeastRows:
        """Two rows of each class, or nothing varies within the classes."""
        return LeastRows(per_class=2, in_all=4)

    def _fit_scaled(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        n, d = X.shape[1:]
        means = _class_means(X, y)
        difference = means[:, 1] - means[:, 0]
        residuals = X - means[:, y.long()]
        products = residuals @ residuals.transpose(1, 2)
        shrinkage, variance = _ledoit_wolf(products, d)
        # The covariance is s v I + (1 - s) R'R / n, with shrinkage s, mean variance v, residuals R.
        # Woodbury's identity gives its inverse from that of an [n, n] matrix.
        ridge = shrinkage * variance * n / (1 - shrinkage).clamp(min=1e-12)
        system = products + ridge[:, None, None] * torch.eye(n, dtype=X.dtype, device=X.device)
        row_weights = torch.cholesky_solve(
            residuals @ difference[:, :, None], torch.linalg.cholesky(system)
        )
        within_classes = torch.einsum("bnd,bnk->bd", residuals, row_weights)
        self.coef_ = (difference - within_classes) / (shrinkage * variance)[:, None]
        self.intercept_ = _halfway(self.coef_, means)


register("state", "mean_difference", MeanDifference)
register("state", "lda", LDA)


def _class_means(X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> Float[Tensor, "b 2 d"]:
    """Return the mean row of class 0 and that of class 1."""
    is_of_class = torch.stack([1 - y, y])
    return is_of_class / is_of_class.sum(1, keepdim=True) @ X


def _halfway(coef: Float[Tensor, "b d"], means: Float[Tensor, "b 2 d"]) -> Float[Tensor, " b"]:
    """Return the intercept that puts the threshold halfway between the class means."""
    return -(coef * means.mean(1)).sum(1)


def _ledoit_wolf(
    products: Float[Tensor, "b n n"], d: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Return the shrinkage and the mean variance of a neuron, from products of centred rows."""
    n = products.shape[1]
    squared_lengths = products.diagonal(dim1=1, dim2=2)
    variance = squared_lengths.sum(1) / (n * d)
    squares = (products**2).sum((1, 2)) / n**2
    error = ((squared_lengths**2).sum(1) / n - squares) / (d * n)
    distance = (squares - d * variance**2) / d
    return (torch.minimum(error, distance) / distance).clamp(min=1e-6, max=1.0), variance


class TTPD(LinearProbe):
    """Training of truth and polarity direction.

    1. Centre the states on the training rows.
    2. Regress them (least squares) on truth t and on t times polarity, both +1 or -1. This gives a
       truth direction that holds for either polarity, and one that turns round with it.
    3. A logistic regression of the polarity on the states gives the polarity direction.
    4. A logistic regression of t on the projections on the first direction of step 2 and that of
       step 3 is the probe.

    The polarity of a question is +1 where affirming it says that label 1 is right. If it is the
    same in all training rows, steps 2 and 3 give the difference of means and nothing else.

    Parameters
    ----------
    C : float
        Inverse of the weight of the L2 penalty of step 3. The penalty of step 4 has weight 1.
    scale : str
        How states are scaled: see `Scale`.

    Attributes
    ----------
    coef_, intercept_ : Tensor, [b, d] and [b]
        Weights of the scaled neurons, and intercept.
    general_truth_, polarity_sensitive_truth_ : Tensor, [b, d]
        The two directions of step 2.

    References
    ----------
    Bürger, Hamprecht and Nadler, Truth is universal, arXiv 2407.12831.
    """

    fit_columns = ("polarity",)

    def __init__(self, C: float = 0.01, scale: str = "none"):
        self.C = C
        self.scale = scale

    def fit(self, X: Any, y: Any, polarity: Any = None) -> "TTPD":
        """Fit the probe to states X, [n, d] or [b, n, d], and labels y, [n].

        `polarity` [n] is +1 or -1; by default it is the same for all rows.
        """
        return super().fit(X, y, polarity=polarity)

    def _fit_scaled(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"], polarity: Any) -> None:
        truth = 2 * y - 1
        polarity = torch.ones_like(y) if polarity is None else as_doubles(polarity).to(y.device)
        has_both = bool((polarity != polarity[0]).any())
        mean = X.mean(1, keepdim=True)
        centred = X - mean
        design = torch.stack([truth, truth * polarity], 1) if has_both else truth[:, None]
        slopes = torch.linalg.pinv(design - design.mean(0)) @ centred
        self.general_truth_ = slopes[:, 0]
        self.polarity_sensitive_truth_ = slopes[:, 1] if has_both else 0 * slopes[:, 0]
        directions = [self.general_truth_]
        if has_both:
            directions.append(self._polarity_direction(centred, polarity))
        directions = normalize(torch.stack(directions, 1), dim=2, eps=1e-30)
        projections = torch.einsum("bnd,bkd->bnk", centred, directions)
        spread = projections.std(1, keepdim=True).clamp(min=1e-12)
        projections = projections / spread
        row_weights, intercepts = reweighted_least_squares(
            projections @ projections.transpose(1, 2), logistic_loss(y), 1.0
        )
        weights = torch.einsum("bn,bnk->bk", row_weights, projections) / spread[:, 0]
        self.coef_ = torch.einsum("bk,bkd->bd", weights, directions)
        self.intercept_ = intercepts - (self.coef_ * mean[:, 0]).sum(1)

    def _polarity_direction(
        self, centred: Float[Tensor, "b n d"], polarity: Float[Tensor, " n"]
    ) -> Float[Tensor, "b d"]:
        products = centred @ centred.transpose(1, 2)
        # In units of a row's mean squared length, so that C means the same for every layer.
        products = products / products.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        row_weights, _ = reweighted_least_squares(
            products, logistic_loss((polarity + 1) / 2), 1 / (self.C * centred.shape[2])
        )
        return torch.einsum("bn,bnd->bd", row_weights, centred)


register("more state", "ttpd", TTPD)


class Principal(LinearProbe):
    """First principal component of the states.

    1. The direction is that in which the training rows vary most. Labels are not used.
    2. Its sign is the one under which class 1 scores higher on the training rows.
    3. The threshold is halfway between the class means. There is no regularisation.

    Parameters
    ----------
    scale : str
        How states are scaled: see `Scale`. With ``"neuron"``, all neurons would vary equally.

    Attributes
    ----------
    coef_, intercept_ : Tensor, [b, d] and [b]
        The direction, of length 1, and the intercept.

    References
    ----------
    Zou et al., Representation engineering, arXiv 2310.01405: the reading vector, on single states.
    """

    def __init__(self, scale: str = "none"):
        self.scale = scale

    def _fit_scaled(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        self.coef_ = oriented(principal_direction(X), X, y)
        self.intercept_ = _halfway(self.coef_, _class_means(X, y))


register("more state", "principal", Principal)


class AllLayers(StackProbe):
    """Logistic regression on the states of all layers side by side, as one wide state.

    1. Scale each neuron of each layer by its mean and standard deviation on the training rows.
    2. Logistic regression on all of them, with an L2 penalty.

    Parameters
    ----------
    C : float
        Inverse of the weight of the penalty for one layer. It is divided by the number of layers,
        so that all of them together count as much as one.
    scale : str
        How states are scaled: see `Scale`.

    References
    ----------
    The original study, where these features are called "residual, all layers".
    """

    def __init__(self, C: float = 0.01, scale: str = "neuron"):
        self.C = C
        self.scale = scale

    def _fit_scaled(self, X: Float[Tensor, "b n d"], y: Float[Tensor, " n"]) -> None:
        self._probe = Logistic(C=self.C / len(X), scale="none").fit(_side_by_side(X), y)

    def _score_scaled(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "1 n"]:
        return torch.from_numpy(self._probe.decision_function(_side_by_side(X)))[None]


register("stack", "all_layers", AllLayers)


def _side_by_side(layers: Float[Tensor, "b n d"]) -> Float[Tensor, "n bd"]:
    return layers.transpose(0, 1).flatten(1)
