"""Logistic regression.

Method: 1. each neuron is scaled by its mean and standard deviation on train; 2. logistic regression on them.
Regularisation: L2 with C = 0.01, set once for states wider than the number of rows, not tuned.
Source: the linear probe of Alain and Bengio, arXiv 1610.01644; the estimator is scikit-learn's.
"""

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


def logistic(C: float = 0.01) -> Pipeline:
    """A scikit-learn pipeline for X [n, d] and y in {0, 1}."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=300))
