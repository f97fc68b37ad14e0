"""One long table in which every probe stands next to its controls, with intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.metrics import balanced_accuracy_score, brier_score_loss

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.controls import (
    first_layer_scores,
    fit_shuffled_labels,
    random_direction_scores,
    scores_without_states,
)
from dlk_utils.evaluation.selection import LayerProbe, fit_layers, stack_layers
from dlk_utils.evaluation.stats import (
    auroc,
    bootstrap_weights,
    calibrated,
    calibration_error,
    percentile_interval,
    recall_at,
    weighted_auroc,
)
from dlk_utils.evaluation.tasks import (
    POSITIVE_CONTROL,
    REGIMES,
    Features,
    Task,
    make_task,
    memory_features,
    regimes_of,
)
from dlk_utils.probes import (
    CONTRAST_PROBES,
    MORE_STATE_PROBES,
    PAIR_PROBES,
    STACK_PROBES,
    STATE_PROBES,
)

RESULT_COLUMNS = [
    *("target", "regime", "kind", "probe", "feature", "site", "layer"),
    *("selected", "compared", "validation", "validation_accuracy"),
    *("estimate", "low", "high", "accuracy", "balanced_accuracy", "recall_at_1", "recall_at_5"),
    *("brier", "calibration_error", "n", "n_train"),
    *("best_control", "lift", "lift_low", "lift_high"),
]
"""The columns of the table of results; `evaluate` says what they mean."""


def evaluate_targets(
    targets: Mapping[str, pd.DataFrame],
    features: Callable[[str], Features],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Evaluate every target in every regime that has enough rows.

    Parameters
    ----------
    targets : mapping
        Target -> its rows, as `make_targets` gives them.
    features : callable
        Gives the features of a target, as `target_features` does.

    Returns
    -------
    DataFrame
        The tables of `evaluate`, one below the other. `skipped_tasks` says what is left out.
    """
    tables = []
    for target, rows in targets.items():
        fits: dict = {}
        for regime in regimes_of(target):
            try:
                task = make_task(rows, target, regime)
            except TooFewRows:
                continue
            tables.append(evaluate(task, features(target), seed=seed, fits=fits))
    if not tables:
        return pd.DataFrame(columns=RESULT_COLUMNS)
    return pd.concat(tables, ignore_index=True)


def skipped_tasks(targets: Mapping[str, pd.DataFrame]) -> list[str]:
    """Say which tasks `evaluate_targets` leaves out and why, in one sentence each; fits nothing."""
    sentences = []
    for target, rows in targets.items():
        for regime in regimes_of(target):
            try:
                make_task(rows, target, regime)
            except TooFewRows as error:
                sentences.append(str(error))
    return sentences


def evaluate(
    task: Task, features: Features, *, n_boot: int = 1000, seed: int = 0, fits: dict | None = None
) -> pd.DataFrame:
    """Fit every probe on every feature, and score it next to the controls.

    All layers of a feature at a site are fitted in one batch, and one of them is chosen on
    validation rows (see `fit_layers`). To save time, only the first feature and site get the extra
    probes (not those of `POSITIVE_CONTROL`) and the controls that use states: shuffled labels, a
    random direction, and the first layer.

    Parameters
    ----------
    task : Task
        The rows to fit on, to choose the layer on, and to test on.
    features : Features
        Where the states are read.
    n_boot, seed : int
        Number of bootstrap resamples of examples; seed of these and of the random controls.
    fits : dict, optional
        Keeps what was fitted, for a later call with the same target, features and seed in another
        regime that trains on the same rows.

    Returns
    -------
    DataFrame
        One row for each probe at each layer (`kind` is "probe"; `layer` is -1 where there is no one
        layer) and for each control (`kind` is "control"), with `RESULT_COLUMNS`:

        * `selected`: whether this layer was chosen, of `compared` layers, on validation rows, where
          its AUROC is `validation`;
        * `estimate`, `low`, `high`: the signed AUROC on the `n` test rows and its 95 % interval;
        * `accuracy`, `balanced_accuracy`: at the threshold that was fitted on the training rows
          (`validation_accuracy`: the same on validation rows);
        * `recall_at_1`, `recall_at_5`: recall at 1 % and 5 % false positives;
        * for the selected layer of each probe, `brier` and `calibration_error` of probabilities
          calibrated on validation rows, and the `lift` over the `best_control` of the task, the one
          with the highest AUROC on the test rows: the difference of the AUROCs, with a 95 %
          interval that is paired by resample and takes that control as given.
    """
    fits = {} if fits is None else fits
    results = _Results(task, n_boot, seed)
    for number, layers_of_site in enumerate(_by_site(features)):
        in_memory = _read_once(layers_of_site, task)
        is_first = number == 0
        more_methods = is_first and task.target != POSITIVE_CONTROL
        for name, make_probe in _probes_for(in_memory, more_methods).items():
            _add_probe(results, name, make_probe, in_memory, fits)
        if is_first:
            _add_controls_on_states(results, in_memory, fits)
    for name, scores in scores_without_states(task).items():
        results.add("control", name, [scores])
    return results.table()


@dataclass
class _Results:
    """The rows of a table of results, and the resampled AUROCs that their intervals come from."""

    task: Task
    n_boot: int
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    resampled: list[Float[np.ndarray, " b"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.y = self.task.test.y.to_numpy()
        self.weights = bootstrap_weights(self.task.test.example_id, self.n_boot, self.seed)

    def add(
        self, kind: str, probe: str, scores: Sequence[Float[np.ndarray, " n"]], **columns: Any
    ) -> None:
        """Add a row for scores of the test rows; those of several repeats are averaged."""
        resampled = np.mean([weighted_auroc(s, self.y, self.weights) for s in scores], axis=0)
        low, high = percentile_interval(resampled)
        self.resampled.append(resampled)
        # what a row says if `columns` do not say otherwise
        row = {
            "target": self.task.target,
            "regime": self.task.regime,
            "kind": kind,
            "probe": probe,
            "feature": "",
            "site": "",
            "layer": -1,
            "selected": True,
            "compared": 1,
            "low": low,
            "high": high,
            "n": len(self.y),
            "n_train": len(self.task.train),
        }
        metrics = pd.DataFrame([_metrics(s, self.y) for s in scores]).mean()
        self.rows.append(row | metrics.to_dict() | columns)

    def table(self) -> pd.DataFrame:
        """Lay out the rows, and add the lift of selected probes over the best control."""
        table = pd.DataFrame(self.rows).reindex(columns=RESULT_COLUMNS)
        best = table.estimate[table.kind == "control"].idxmax()
        table["best_control"] = ""
        for i in table.index[(table.kind == "probe") & table.selected]:
            low, high = percentile_interval(self.resampled[i] - self.resampled[best])
            table.loc[i, "best_control"] = table.probe[best]
            table.loc[i, "lift"] = table.estimate[i] - table.estimate[best]
            table.loc[i, ["lift_low", "lift_high"]] = [low, high]
        return table


def _metrics(scores: Float[np.ndarray, " n"], y: np.ndarray) -> dict[str, float]:
    predicted = scores > 0
    return {
        "estimate": auroc(scores, y),
        "accuracy": float(np.mean(predicted == y)),
        "balanced_accuracy": balanced_accuracy_score(y, predicted),
        "recall_at_1": recall_at(scores, y, 0.01),
        "recall_at_5": recall_at(scores, y, 0.05),
    }


def _by_site(features: Features) -> list[Features]:
    """Split features by feature and site, into the layers that a choice is made from."""
    groups: dict[tuple[str, str], Features] = {}
    for (feature, site, layer), read in features.items():
        groups.setdefault((feature, site), {})[feature, site, layer] = read
    return list(groups.values())


def _read_once(features: Features, task: Task) -> Features:
    """Read the states of all rows of a task, of one feature at one site, into memory."""
    rows = pd.concat([task.train, task.validation, task.test], ignore_index=True)
    feature, site, _ = next(iter(features))
    layers = [layer for _, _, layer in features]
    stack = stack_layers(features, rows)
    return memory_features(rows, {site: stack}, layers=layers, feature=feature)


def _probes_for(features: Features, more_methods: bool) -> dict[str, Callable[[], Any]]:
    feature, _, _ = next(iter(features))
    if feature in ("two draws", "two draws / move", "counterfactual"):
        return PAIR_PROBES
    if feature == "contrast":
        return CONTRAST_PROBES
    if more_methods:
        return STATE_PROBES | MORE_STATE_PROBES | STACK_PROBES
    return STATE_PROBES


def _add_probe(
    results: _Results,
    name: str,
    make_probe: Callable[[], Any],
    features: Features,
    fits: dict,
) -> None:
    """Add a row for a probe at each layer of a feature at a site."""
    task = results.task
    feature, site, _ = next(iter(features))
    key = (REGIMES[task.regime][0], feature, site, name)
    if key not in fits:
        fit = fit_layers(make_probe, features, task.train, task.validation, y=task.goal)
        fits[key] = _without_states(fit)
    fit = fits[key]
    validation_y = task.validation.y.to_numpy()
    test_scores = fit.score_layers(task.test, features)
    for i, layer in enumerate(fit.layers):
        columns: dict[str, Any] = {
            "feature": feature,
            "site": site,
            "layer": layer,
            "selected": i == fit.chosen,
            "compared": len(fit.layers),
            "validation": fit.validation_aurocs[i],
            "validation_accuracy": np.mean((fit.validation_scores[i] > 0) == validation_y),
        }
        if i == fit.chosen:
            p = calibrated(fit.validation_scores[i], validation_y, test_scores[i])
            columns["brier"] = brier_score_loss(results.y, p)
            columns["calibration_error"] = calibration_error(p, results.y)
        results.add("probe", name, [test_scores[i]], **columns)


def _add_controls_on_states(results: _Results, features: Features, fits: dict) -> None:
    """Add the controls that see the states of a feature at a site."""
    task, seed = results.task, results.seed
    keys = list(features)
    feature, site, first_layer = keys[0]
    make_probe = next(iter(_probes_for(features, more_methods=False).values()))
    key = (REGIMES[task.regime][0], feature, site, "shuffled labels")
    if key not in fits:
        shuffled = fit_shuffled_labels(make_probe, features, task, seed)
        fits[key] = [_without_states(fit) for fit in shuffled]
    where = {"feature": feature, "site": site}
    scores = [fit.score(task.test, features) for fit in fits[key]]
    results.add("control", "shuffled labels", scores, **where, compared=len(keys))
    read_middle_layer = features[keys[len(keys) // 2]]
    scores = list(random_direction_scores(read_middle_layer, task, seed))
    results.add("control", "random direction", scores, **where)
    scores = [first_layer_scores(make_probe, features, task)]
    results.add("control", "first layer", scores, **where, layer=first_layer)


def _without_states(fit: LayerProbe) -> LayerProbe:
    """Forget where a probe was fitted, so that what is kept does not hold all states in memory."""
    return replace(fit, features={})
