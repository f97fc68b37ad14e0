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
    """Read the same rows at every layer of `features`.

    Returns
    -------
    array [layer, n, d], or [layer, n, 2, d] for pairs
        Layers in the order of `features`.
    """
    return np.stack([read(rows) for read in features.values()])


@dataclass(frozen=True)
class LayerProbe:
    """A probe fitted on a stack of layers, and the layer that validation rows chose (`fit_layers`).

    Attributes
    ----------
    probe : estimator
        Its `decision_function` takes a stack [layer, n, d].
    features : Features
        What it was fitted on, and reads by default.
    keys : list
        The (feature, site, layer) of each layer of the stack.
    layers : list of int
        The layer number of each row of scores; [-1] for a probe that reads all layers together.
    chosen : int
        The index in `layers` that validation chose.
    validation_scores : array [layer, n]
        Scores of the validation rows.
    validation_aurocs : array [layer]
        Their signed AUROCs.
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
        """Score rows at every layer [layer, n]; above 0 speaks for class 1.

        `features` replaces the readers that the probe was fitted with, for rows that are kept
        elsewhere. It must have the same layers in the same order.
        """
        stack = stack_layers(self.features if features is None else features, rows)
        return np.atleast_2d(self.probe.decision_function(stack))

    def score(
        self, rows: pd.DataFrame, features: Features | None = None
    ) -> Float[np.ndarray, " n"]:
        """Score rows at the chosen layer [n]; see `score_layers`."""
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

    That is the earliest layer whose AUROC is within one standard error of the best one's
    (`earliest_good_layer`), by bootstrap over examples.

    Parameters
    ----------
    make_probe : callable
        Makes an unfitted probe: a class of `dlk_utils.probes`, or a `functools.partial` of one.
    features : Features
        The layers to choose from: those of one feature at one site.
    train, validation : DataFrame
        Rows with `y` (0 or 1) and `example_id`; `train` also has the columns that the probe needs.
    y : array [n], optional
        What the probe learns from `train`, if it is not the column `y`: for pairs, how far the
        answer moved. Validation always uses the column.
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
