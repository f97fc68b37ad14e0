"""Pair ranking with a margin loss.

Method: 1. f is linear; 2. of two draws the truer should score higher by a margin, loss max(0, 1 - sign(y)(f(x1) - f(x0))), weighted by |y|;
3. as f(x1) - f(x0) = w (x1 - x0), that is a linear SVM without intercept on the scaled differences.
Regularisation: L2 with C = 0.1, not tuned.
Source: Herbrich et al. 2000 (ranking SVM); the estimator is scikit-learn's LinearSVC.
"""

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.svm import LinearSVC


class PairRanking(BaseEstimator):
    """`weight_` [d] in the units of the states after `fit`."""

    def __init__(self, C: float = 0.1):
        self.C = C

    def fit(self, X: Float[np.ndarray, "n 2 d"], y: Float[np.ndarray, " n"]) -> "PairRanking":
        """`y` is the signed move towards the truth from draw 0 to draw 1; its zeros teach nothing."""
        scale = pair_scale(X)
        svm = LinearSVC(loss="hinge", fit_intercept=False, C=self.C / X.shape[-1], max_iter=5000, random_state=0)
        svm.fit((X[:, 1] - X[:, 0]) / scale, np.sign(y), sample_weight=np.abs(y) / np.abs(y).mean())
        self.weight_ = svm.coef_[0] / scale
        return self

    def decision_function(self, X: Float[np.ndarray, "n 2 d"]) -> Float[np.ndarray, " n"]:
        """f(x1) - f(x0): above 0 where draw 1 ranks as the truer."""
        return (X[:, 1] - X[:, 0]) @ self.weight_


def pair_scale(X: Float[np.ndarray, "n 2 d"]) -> Float[np.ndarray, " d"]:
    """Root mean square of the draws' difference, per neuron: not centred, so swapping two draws only flips the sign."""
    return np.sqrt(((X[:, 1] - X[:, 0]) ** 2).mean(0)) + 1e-8
