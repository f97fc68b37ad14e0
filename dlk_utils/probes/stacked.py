"""All layers at once: their states side by side, as one wide state.

Method: 1. each neuron of each layer is scaled on train; 2. logistic regression on all of them.
Regularisation: L2, divided by the number of layers, so that the sum of the layers' products counts as one layer's does.
Source: the "residual, all layers" features of the ablation that this work grows from.
"""

from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor

from dlk_utils.probes.linear import batch
from dlk_utils.probes.logistic import Logistic


class AllLayers(ClassifierMixin, BaseEstimator):
    """`fit(X [b, n, d], y)` takes the matrices for the layers of the same rows, and gives one score a row."""

    def __init__(self, C: float = 0.01):
        self.C = C

    def fit(self, X: Any, y: Any) -> "AllLayers":
        """`y` holds 0 and 1, both at least once."""
        wide = self._wide(X)
        self.probe_ = Logistic(C=self.C / len(batch(X, 3))).fit(wide, y)
        self.classes_ = self.probe_.classes_
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, " n"]:
        """Above 0 for class 1."""
        return self.probe_.decision_function(self._wide(X))

    @staticmethod
    def _wide(X: Any) -> Float[Tensor, "n bd"]:
        return batch(X, 3).transpose(0, 1).flatten(1)
