"""Pair distance with a smooth-L1 loss.

Method: 1. f is linear; 2. f(x1) - f(x0) should equal y, how far draw 1 moved towards the truth; 3. smooth L1 (Huber's loss), no intercept.
Regularisation: L2, alpha = 1 per neuron on scaled differences, not tuned.
Source: Huber 1964; the estimator is scikit-learn's HuberRegressor.
"""

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.linear_model import HuberRegressor

from dlk_utils.probes.pair_ranking import pair_scale


class PairDistance(BaseEstimator):
    """`weight_` [d] in the units of the states after `fit`."""

    def __init__(self, alpha: float = 1.0):
        self.alpha = alpha

    def fit(self, X: Float[np.ndarray, "n 2 d"], y: Float[np.ndarray, " n"]) -> "PairDistance":
        """`y` is the signed move towards the truth from draw 0 to draw 1."""
        scale = pair_scale(X)
        self.unit_ = np.abs(y).mean()
        huber = HuberRegressor(alpha=self.alpha * X.shape[-1] / 100, fit_intercept=False, max_iter=500, tol=1e-4)
        huber.fit((X[:, 1] - X[:, 0]) / scale, y / self.unit_)
        self.weight_ = huber.coef_ / scale
        return self

    def decision_function(self, X: Float[np.ndarray, "n 2 d"]) -> Float[np.ndarray, " n"]:
        """Predicted move towards the truth, in units of its mean size on train."""
        return (X[:, 1] - X[:, 0]) @ self.weight_
