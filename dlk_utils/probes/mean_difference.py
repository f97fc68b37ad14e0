"""Difference of means, also called mass mean.

Method: 1. the direction is mean(class 1) - mean(class 0) on train; 2. the score is the projection on it; 3. the threshold is halfway between the means.
Regularisation: none, and nothing to tune.
Source: Marks and Tegmark, arXiv 2310.06824.
"""

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin


class MeanDifference(ClassifierMixin, BaseEstimator):
    """`direction_` [d] and `midpoint_` [d] after `fit`."""

    def fit(self, X: Float[np.ndarray, "n d"], y: Int[np.ndarray, " n"]) -> "MeanDifference":
        """`y` holds 0 and 1, both at least once."""
        self.classes_ = np.unique(y)
        if list(self.classes_) != [0, 1]:
            raise ValueError(f"expected labels 0 and 1, got {list(self.classes_)}")
        means = X[y == 0].mean(0), X[y == 1].mean(0)
        self.direction_, self.midpoint_ = means[1] - means[0], (means[1] + means[0]) / 2
        return self

    def decision_function(self, X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Signed distance from the midpoint along the direction, in units of its length."""
        return (X - self.midpoint_) @ self.direction_

    def predict(self, X: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        """0 or 1."""
        return (self.decision_function(X) > 0).astype(int)
