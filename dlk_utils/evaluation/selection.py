"""Fit a probe on every layer at once, choose a layer on validation rows, score other rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from dlk_utils.evaluation.stats import auroc, earliest_good_layer
from dlk_utils.evaluation.tasks import Features
from dlk_utils.probes import fit_probe

ALL_LAYERS = -1
"""The layer number of a probe that reads all layers together."""


def stack_layers(features: Features, rows: pd.DataFrame) -> Float[np.ndarray, "layer n ..."]:
    """Read the same rows from every entry of `features`, one entry after the other.

    Parameters
    ----------
    features
        Maps (feature, site, layer) to a function from rows to an array [n, d], or [n, 2, d] for
        pairs of states. All entries must give the same shape.
    rows
        The rows to read, n of them.

    Returns
    -------
    array
        [layer, n, d] or [layer, n, 2, d], layers in the order of `features`.
    """
    return np.stack([read(rows) for read in features.values()])


@dataclass(frozen=True)
class LayerProbe:
    """A probe fitted on a stack of layers, with the layer that validation rows chose.

    `fit_layers` makes it.

    Attributes
    ----------
    probe
        The fitted estimator; its `decision_function` takes a stack [layer, n, d].
    features
        The features it was fitted on, which `score` and `score_layers` read by default.
    keys
        The (feature, site, layer) of each layer of the stack.
    layers
        The layer number of each row of scores; [-1] for a probe that reads all layers together.
    chosen
        Which of `layers` was chosen on validation, as an index.
    validation_scores
        Scores of the validation rows [layer, n]; [1, n] for a probe that reads all layers together.
    validation_aurocs
        The signed AUROC of each row of `validation_scores` [layer].
    """

    probe: Any
    features: Features
    keys: list[tuple[str, str, int]]
    layers: list[int]
    chosen: int
    validation_scores: Float[np.ndarray, "layer n"]
    validation_aurocs: Float[np.ndarray, " layer"]

    @property
    def layer(self) -> int:
        """The number of the chosen layer; -1 for a probe that reads all layers together."""
        return self.layers[self.chosen]

    def score_layers(
        self, rows: pd.DataFrame, features: Features | None = None
    ) -> Float[np.ndarray, "layer n"]:
        """Score rows at every layer; above 0 speaks for class 1.

        Parameters
        ----------
        rows
            The rows to score, n of them.
        features
            Where to read them, if not from the features of the fit: the same layers in that order.

        Returns
        -------
        array
            [layer, n]; [1, n] for a probe that reads all layers together.
        """
        stack = stack_layers(self.features if features is None else features, rows)
        return np.atleast_2d(self.probe.decision_function(stack))

    def score(
        self, rows: pd.DataFrame, features: Features | None = None
    ) -> Float[np.ndarray, " n"]:
        """Score rows at the chosen layer; see `score_layers`."""
        return self.score_layers(rows, features)[self.chosen]


def fit_layers(
    make_probe: Callable[[], Any],
    features: Features,
    train: pd.DataFrame,
    validation: pd.DataFrame,
    *,
    y: np.ndarray | None = None,
) -> LayerProbe:
    """Fit a probe on all layers in one batch and choose the layer on validation rows.

    The choice is that of `earliest_good_layer`: the earliest layer whose AUROC is within one
    standard error of the best one's, resampling examples.

    Parameters
    ----------
    make_probe
        Makes an unfitted probe: a class of `dlk_utils.probes`, or a `functools.partial` of one.
    features
        Maps (feature, site, layer) to a function from rows to their states. To choose a layer, give
        the layers of one feature at one site.
    train
        Rows to fit on, with the class `y` (0 or 1) and the columns that the probe needs.
    validation
        Rows that choose the layer, with `y` and `example_id`.
    y
        What the probe learns from `train` [n], if it is not the column `y`: for pairs, how far the
        answer moved.

    Returns
    -------
    LayerProbe
        The fitted probe and the chosen layer.
    """
    probe = fit_probe(make_probe, stack_layers(features, train), train, y)
    raw_scores = probe.decision_function(stack_layers(features, validation))
    scores = np.atleast_2d(raw_scores)
    keys = list(features)
    one_score_per_layer = raw_scores.ndim == 2
    classes = validation.y.to_numpy()
    return LayerProbe(
        probe=probe,
        features=features,
        keys=keys,
        layers=[layer for _, _, layer in keys] if one_score_per_layer else [ALL_LAYERS],
        chosen=earliest_good_layer(scores, classes, validation.example_id),
        validation_scores=scores,
        validation_aurocs=np.array([auroc(s, classes) for s in scores]),
    )
