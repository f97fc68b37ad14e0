"""A classifier of scikit-learn as a probe: one for each feature matrix, in a loop. For what is no sum over rows: nearest neighbours, trees, networks.

Method: 1. the scale of the probe, learned on train; 2. the classifier's own; 3. the score is its probability of class 1 minus one half.
Source: scikit-learn.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.neighbors import KNeighborsClassifier

from dlk_utils.probes.linear import alike, batch
from dlk_utils.probes.scale import Scale


class Each(ClassifierMixin, BaseEstimator):
    """`fitted_`: the classifiers, one for each matrix."""

    def __init__(self, classifier: Any, scale: str = "neuron"):
        self.classifier, self.scale = classifier, scale

    def fit(self, X: Any, y: Any) -> "Each":
        """X [n, d] or [b, n, d]; y holds 0 and 1."""
        self.classes_ = np.unique(np.asarray(y))
        if list(self.classes_) != [0, 1]:
            raise ValueError(f"expected labels 0 and 1, got {list(self.classes_)}")
        rows = batch(X, 3)
        self.scale_ = Scale(self.scale).fit(rows)
        self.fitted_ = [
            clone(self.classifier).fit(x, np.asarray(y)) for x in self.scale_(rows).numpy()
        ]
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, "..."]:
        """Above 0 for class 1."""
        scores = [
            c.predict_proba(x)[:, 1] - 0.5
            for c, x in zip(self.fitted_, self.scale_(batch(X, 3)).numpy(), strict=True)
        ]
        return alike(torch.from_numpy(np.stack(scores)), X, 3)


def nearest(k: int = 15) -> Each:
    """k nearest neighbours: a check that needs no direction."""
    return Each(KNeighborsClassifier(k))
