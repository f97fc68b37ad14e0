"""Fit a probe on every layer at once, choose a layer on validation rows, score other rows.

There are two rules for the layer. `BY_TWINS` is for probes of truth that are fitted on honest rows,
where the validation examples have twins told to lie; `EARLIEST` is for all others. Which tasks have
such twins is decided in `tasks.choosing_twins`, and whether they are enough in `FittingRows`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.stats import (
    agreeing_layers_in_resamples,
    auroc,
    earliest_good_layer,
    layers_in_resamples,
    most_agreeing_layer,
    require_finite_aurocs,
    twin_agreement,
)
from dlk_utils.evaluation.tasks import Features, Task, memory_features
from dlk_utils.probes import fit_probe
from dlk_utils.probes.base import TrainingStates, as_doubles

ALL_LAYERS = -1
"""The layer number of a probe that reads all layers together."""

EARLIEST = "earliest good layer"
"""The rule that needs no twins (`stats.earliest_good_layer`)."""

BY_TWINS = "layer where twins agree most"
"""The rule for probes of truth that are fitted on honest rows (`choose_by_twins`)."""

WITHIN = 0.03
"""How far below the best AUROC on validation rows a layer may lie for `BY_TWINS`."""

MIN_TWINS = 4
"""How many pairs of twins `BY_TWINS` needs. Of 4 the order agrees by chance once in 24 times."""


def stack_layers(features: Features, rows: pd.DataFrame) -> Float[np.ndarray, "layer n ..."]:
    """Read the same rows at every layer of `features`.

    Returns
    -------
    array [layer, n, d], or [layer, n, 2, d] for pairs
        Layers in the order of `features`.
    """
    return np.stack([read(rows) for read in features.values()])


def in_memory(features: Features, rows: pd.DataFrame) -> Features:
    """Read the states of rows, at every layer of one feature at one site, into memory.

    For tables that ask for the same rows many times.
    """
    feature, site, _ = next(iter(features))
    layers = [layer for _, _, layer in features]
    stack = stack_layers(features, rows)
    return memory_features(rows, {site: stack}, layers=layers, feature=feature)


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
    rule : str
        What it was chosen by: `EARLIEST` or `BY_TWINS`.
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
    rule: str
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
        return self.score_states(
            stack_layers(self.features if features is None else features, rows)
        )

    def score_states(self, states: Float[np.ndarray | Tensor, "layer n ..."]) -> np.ndarray:
        """Score states that `stack_layers` has read, at every layer [layer, n]."""
        return np.atleast_2d(self.probe.decision_function(states))

    def score(
        self, rows: pd.DataFrame, features: Features | None = None
    ) -> Float[np.ndarray, " n"]:
        """Score rows at the chosen layer [n]; see `score_layers`."""
        return self.score_layers(rows, features)[self.chosen]


@dataclass(frozen=True)
class ValidationTwins:
    """Honest validation rows that have a twin told to lie, and the states of these twins.

    Attributes
    ----------
    places : array [m]
        The places of the honest rows among the validation rows.
    states : Tensor [layer, m, ...]
        States of their twins, in the same order.
    """

    places: Int[np.ndarray, " m"]
    states: Tensor

    @classmethod
    def read(
        cls, features: Features, validation: pd.DataFrame, twins: pd.DataFrame
    ) -> "ValidationTwins | None":
        """Read the states of the `twins` told to lie; None if they are fewer than `MIN_TWINS`."""
        if not len(twins):
            return None
        numbered = validation.assign(place=np.arange(len(validation)))
        honest, lying = twin_rows(pd.concat([numbered, twins]))
        if len(lying) < MIN_TWINS:
            return None
        return cls(honest.place.to_numpy(int), as_doubles(stack_layers(features, lying)))

    def scores(
        self, probe: Any, validation_scores: Float[np.ndarray, "layer n"]
    ) -> tuple[Float[np.ndarray, "layer m"], Float[np.ndarray, "layer m"]]:
        """Score the honest twins, and those told to lie, at every layer."""
        lying = np.atleast_2d(probe.decision_function(self.states))
        return validation_scores[:, self.places], lying


@dataclass(frozen=True)
class FittingRows:
    """Training and validation rows with their states, read once for all probes that are fitted.

    Attributes
    ----------
    features : Features
        Where the states are read: the layers of one feature at one site.
    train, validation : DataFrame
        Rows with `y` (0 or 1) and `example_id`; `train` also has the columns that the probes need.
    train_states : TrainingStates
        States of the training rows at every layer.
    validation_states : Tensor [layer, n, ...]
        States of the validation rows at every layer.
    twins : ValidationTwins or None
        What `BY_TWINS` chooses by. None means the rule `EARLIEST`.
    """

    features: Features
    train: pd.DataFrame
    validation: pd.DataFrame
    train_states: TrainingStates
    validation_states: Tensor
    twins: ValidationTwins | None = None

    @classmethod
    def read(
        cls,
        features: Features,
        train: pd.DataFrame,
        validation: pd.DataFrame,
        twins: pd.DataFrame | None = None,
    ) -> "FittingRows":
        """Read the states of the rows, and of the `twins` that `choosing_twins` gives, if any."""
        return cls(
            features=features,
            train=train,
            validation=validation,
            train_states=TrainingStates(stack_layers(features, train)),
            validation_states=as_doubles(stack_layers(features, validation)),
            twins=None if twins is None else ValidationTwins.read(features, validation, twins),
        )

    @classmethod
    def of_task(cls, features: Features, task: Task) -> "FittingRows":
        """Read the states of the training and validation rows of a task, and of their twins."""
        return cls.read(features, task.train, task.validation, task.twins)

    def fit(self, make_probe: Callable[[], Any], y: np.ndarray | None = None) -> LayerProbe:
        """Fit a probe on all layers and choose the layer; see `fit_layers`."""
        probe = fit_probe(make_probe, self.train_states, self.train, y)
        raw_scores = probe.decision_function(self.validation_states)
        scores = np.atleast_2d(raw_scores)
        keys = list(self.features)
        one_score_per_layer = raw_scores.ndim == 2
        classes = self.validation.y.to_numpy()
        aurocs = np.array([auroc(s, classes) for s in scores])
        if self.twins is None:
            rule, chosen = EARLIEST, earliest_good_layer(scores, classes, self._examples)
        else:
            require_finite_aurocs(aurocs, classes)
            agreement = twin_agreement(*self.twins.scores(probe, scores))
            rule, chosen = BY_TWINS, most_agreeing_layer(aurocs, agreement, within=WITHIN)
        return LayerProbe(
            probe=probe,
            features=self.features,
            keys=keys,
            layers=[layer for _, _, layer in keys] if one_score_per_layer else [ALL_LAYERS],
            chosen=chosen,
            rule=rule,
            validation_scores=scores,
            validation_aurocs=aurocs,
        )

    def choose_again(self, fitted: LayerProbe, *, n_boot: int, seed: int) -> Int[np.ndarray, " b"]:
        """Choose the layer of a fitted probe anew in each of `n_boot` resamples of the examples.

        Validation rows are resampled together with their twins. Returns indices of layers [b].
        """
        classes = self.validation.y.to_numpy()
        resampling = {"n_boot": n_boot, "seed": seed}
        if self.twins is None:
            scores = fitted.validation_scores
            return layers_in_resamples(scores, classes, self._examples, **resampling)
        return agreeing_layers_in_resamples(
            fitted.validation_scores,
            classes,
            self._examples,
            self.twins.scores(fitted.probe, fitted.validation_scores),
            self._examples[self.twins.places],
            within=WITHIN,
            **resampling,
        )

    @property
    def _examples(self) -> np.ndarray:
        return self.validation.example_id.to_numpy()


def fit_layers(
    make_probe: Callable[[], Any],
    features: Features,
    train: pd.DataFrame,
    validation: pd.DataFrame,
    *,
    twins: pd.DataFrame | None = None,
    y: np.ndarray | None = None,
) -> LayerProbe:
    """Fit a probe on all layers in one batch and choose the layer on validation rows.

    With at least `MIN_TWINS` twins, that is the layer at which the probe agrees most between them
    (`choose_by_twins`). Otherwise it is the earliest layer whose AUROC is within one standard error
    of the best one's (`earliest_good_layer`), by bootstrap over examples. The `rule` of the result
    says which. `FittingRows` fits several probes to the same rows.

    Parameters
    ----------
    make_probe : callable
        Makes an unfitted probe: a class of `dlk_utils.probes`, or a `functools.partial` of one.
    features : Features
        The layers to choose from: those of one feature at one site.
    train, validation : DataFrame
        Rows with `y` (0 or 1) and `example_id`; `train` also has the columns that the probe needs.
    twins : DataFrame, optional
        Rows told to lie, the twins of validation rows, which then have a `role`. Their class is not
        read. `tasks.choosing_twins` gives them for the probes that this is right for.
    y : array [n], optional
        What the probe learns from `train`, if it is not the column `y`: for pairs, how far the
        answer moved. Validation always uses the column.
    """
    return FittingRows.read(features, train, validation, twins).fit(make_probe, y)


def fit_task(make_probe: Callable[[], Any], features: Features, task: Task) -> LayerProbe:
    """Fit a probe of a task on all layers, and choose the layer by the task's rule."""
    return FittingRows.of_task(features, task).fit(make_probe, task.goal)


def twin_rows(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of role "truth" that have a twin of role "lie", and these twins in order.

    Twins have the same `example_id`. Other rows are left out.
    """
    by_role = [rows[rows.role == role].drop_duplicates("example_id") for role in ("truth", "lie")]
    honest, lying = (some.sort_values("example_id") for some in by_role)
    return (
        honest[honest.example_id.isin(lying.example_id)],
        lying[lying.example_id.isin(honest.example_id)],
    )


def require_twins(
    twins: tuple[pd.DataFrame, pd.DataFrame],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what `twin_rows` gives, or raise `TooFewRows` if there are too few of them."""
    n_twins = len(twins[0])
    if n_twins < MIN_TWINS:
        raise TooFewRows(
            f"twins: expected at least {MIN_TWINS} examples with a row told to tell the truth "
            f"and one told to lie, got {n_twins}; ask for more examples (n_examples), or add rows "
            "to your own file."
        )
    return twins


def choose_by_twins(
    probe: LayerProbe,
    rows: pd.DataFrame,
    *,
    within: float = WITHIN,
    features: Features | None = None,
) -> LayerProbe:
    """Choose the layer of a fitted probe anew: the one at which it agrees most between twins.

    Twins show the same example, and tell the model to tell the truth or to lie. What is true is the
    same in both, so a probe of truth should give them the same score. A probe that reads the answer
    about to be given turns round between them. Among the layers whose AUROC on validation rows is
    `within` so much of the best one's, the layer with the highest rank correlation between the
    scores of twins is chosen. This needs rows told to lie, but none of their labels.

    `fit_layers` chooses in this way by itself if it is given twins. This function chooses with
    other twins, or for a probe that was fitted without any.

    Parameters
    ----------
    probe : LayerProbe
        Fitted on honest rows.
    rows : DataFrame
        Rows with `role` and `example_id`, of examples that the probe was not fitted on, such as all
        validation rows. Only rows of role "truth" or "lie" that have their twin count.
    within : float
        How far below the best AUROC a layer may lie.
    features : Features, optional
        Where the states of `rows` are read, as in `LayerProbe.score_layers`.

    Returns
    -------
    LayerProbe
        The same probe at the chosen layer.

    Raises
    ------
    TooFewRows
        If there are fewer than `MIN_TWINS` pairs of twins.
    """
    honest, lying = require_twins(twin_rows(rows))
    agreement = twin_agreement(
        probe.score_layers(honest, features), probe.score_layers(lying, features)
    )
    chosen = most_agreeing_layer(probe.validation_aurocs, agreement, within=within)
    return replace(probe, chosen=chosen, rule=BY_TWINS)
