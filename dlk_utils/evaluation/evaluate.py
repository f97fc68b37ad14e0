"""One long table in which every probe stands next to its controls, with intervals."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.metrics import brier_score_loss
from torch import Tensor

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.controls import (
    TOLD_TO_LIE_PROBE,
    TOLD_TO_LIE_WORDS,
    TRUTH_TIMES_TURN,
    answers_turned_by_words,
    fit_shuffled_labels,
    random_direction_scores,
    scores_without_states,
    told_to_lie,
    truer_draw,
    turned,
)
from dlk_utils.evaluation.selection import FittingRows, LayerProbe, in_memory, stack_layers
from dlk_utils.evaluation.stats import (
    auroc,
    balanced_accuracy,
    bootstrap_weights,
    calibrated,
    calibration_error,
    interval_of_aurocs,
    percentile_interval,
    recall_at,
    smaller_class,
    weighted_auroc,
)
from dlk_utils.evaluation.tasks import (
    POSITIVE_CONTROL,
    REGIMES,
    Features,
    Task,
    make_task,
    regimes_of,
)
from dlk_utils.probes import (
    CONTRAST_PROBES,
    MORE_STATE_PROBES,
    PAIR_PROBES,
    STACK_PROBES,
    STATE_PROBES,
    Logistic,
)
from dlk_utils.probes.base import as_doubles

RESULT_COLUMNS = [
    *("target", "regime", "kind", "probe", "feature", "site", "layer"),
    *("selected", "compared", "validation", "validation_accuracy"),
    *("estimate", "low", "high", "accuracy", "balanced_accuracy", "recall_at_1", "recall_at_5"),
    *("brier", "calibration_error", "n", "n_smaller", "n_train"),
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
        tasks = possible_tasks(rows, target)
        tables += evaluate_tasks(tasks, features(target), seed=seed)
    if not tables:
        return pd.DataFrame(columns=RESULT_COLUMNS)
    return pd.concat(tables, ignore_index=True)


def possible_tasks(rows: pd.DataFrame, target: str) -> list[Task]:
    """Make the task of every regime of a target that has enough rows."""
    tasks = []
    for regime in regimes_of(target):
        with suppress(TooFewRows):
            tasks.append(make_task(rows, target, regime))
    return tasks


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


def evaluate(task: Task, features: Features, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
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

    Returns
    -------
    DataFrame
        One row for each probe at each layer (`kind` is "probe"; `layer` is -1 where there is no one
        layer) and for each control (`kind` is "control"), with `RESULT_COLUMNS`:

        * `selected`: whether this layer was chosen, of `compared` layers, on validation rows, where
          its AUROC is `validation`;
        * `estimate`, `low`, `high`: the signed AUROC on the `n` test rows and its 95 % interval;
          `n_smaller` of them are of the smaller class, which limits what an AUROC can say;
        * `accuracy`, `balanced_accuracy`: at the threshold that was fitted on the training rows
          (`validation_accuracy`: the same on validation rows);
        * `recall_at_1`, `recall_at_5`: recall at 1 % and 5 % false positives;
        * for the selected layer of each probe, `brier` and `calibration_error` of probabilities
          calibrated on validation rows, and the `lift` over the `best_control` of the task, the one
          with the highest AUROC on the test rows: the difference of the AUROCs, with a 95 %
          interval that is paired by resample and takes that control as given.
    """
    [table] = evaluate_tasks([task], features, n_boot=n_boot, seed=seed)
    return table


def evaluate_tasks(
    tasks: Sequence[Task], features: Features, *, n_boot: int = 1000, seed: int = 0
) -> list[pd.DataFrame]:
    """Evaluate tasks of one target, which share their states and the probes of the same rows.

    The features are read once, and probes are fitted once for all tasks that train on the same
    role. Arguments, and the table of each task, are those of `evaluate`. Where the training rows of
    the tasks have both roles, there are two more controls of truth: a probe, and TF-IDF, that find
    out whether the model was told to lie, and turn its own answer round accordingly. Pairs of draws
    have the control `TRUTH_TIMES_TURN`.
    """
    if not tasks:
        return []
    all_results = [_Results(task, n_boot, seed) for task in tasks]
    rows = pd.concat([task.rows for task in tasks]).drop_duplicates("row_id")
    for number, stored_features in enumerate(_by_site(features)):
        features_of_site = in_memory(stored_features, rows)
        fits: dict[str, _SiteFits] = {}
        for results in all_results:
            fit_role, _ = REGIMES[results.task.regime]
            if fit_role not in fits:
                fits[fit_role] = _fit_site(results.task, features_of_site, number == 0, seed)
            _add_probes(results, fits[fit_role], features_of_site)
            if number == 0 and results.task.of_pairs:
                _add_truth_times_turn(results, features_of_site)
        if number == 0:
            _add_answers_turned_round(all_results, features_of_site)
    for results in all_results:
        for name, scores in scores_without_states(results.task).items():
            results.add("control", name, [scores])
    return [results.table() for results in all_results]


@dataclass(frozen=True)
class _SiteFits:
    """What was fitted to a feature at a site: probes by name, and those with shuffled labels."""

    probes: dict[str, LayerProbe]
    shuffled: list[LayerProbe]


def _fit_site(task: Task, features: Features, is_first: bool, seed: int) -> _SiteFits:
    """Fit the probes of a feature at a site; at the first also extra ones, and shuffled labels."""
    feature, _, _ = next(iter(features))
    make_probes = _probes_for(feature, is_first and task.target != POSITIVE_CONTROL)
    rows = FittingRows.read(features, task.train, task.validation)
    probes = {name: rows.fit(make_probe, task.goal) for name, make_probe in make_probes.items()}
    shuffled = []
    if is_first:
        first_probe = next(iter(make_probes.values()))
        shuffled = fit_shuffled_labels(first_probe, rows, task, seed)
    return _SiteFits(probes, shuffled)


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
        low, high = interval_of_aurocs(resampled, self.y, self.task.test.example_id)
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
            "n_smaller": smaller_class(self.y),
            "n_train": len(self.task.train),
            "best_control": "",
        }
        metrics = [_metrics(s, self.y) for s in scores]
        means = {name: np.mean([m[name] for m in metrics]) for name in metrics[0]}
        self.rows.append(row | means | columns)

    def table(self) -> pd.DataFrame:
        """Lay out the rows, and add the lift of selected probes over the best control."""
        controls = [i for i, row in enumerate(self.rows) if row["kind"] == "control"]
        # `max` would keep a first one that is nan.
        best = max(controls, key=lambda i: np.nan_to_num(self.rows[i]["estimate"], nan=-np.inf))
        for row, resampled in zip(self.rows, self.resampled, strict=True):
            if row["kind"] == "probe" and row["selected"]:
                row["best_control"] = self.rows[best]["probe"]
                row["lift"] = row["estimate"] - self.rows[best]["estimate"]
                lift_interval = percentile_interval(resampled - self.resampled[best])
                row["lift_low"], row["lift_high"] = lift_interval
        return pd.DataFrame(self.rows).reindex(columns=RESULT_COLUMNS)


def _metrics(scores: Float[np.ndarray, " n"], y: np.ndarray) -> dict[str, float]:
    return {
        "estimate": auroc(scores, y),
        "accuracy": float(np.mean((scores > 0) == y)),
        "balanced_accuracy": balanced_accuracy(scores, y),
        "recall_at_1": recall_at(scores, y, 0.01),
        "recall_at_5": recall_at(scores, y, 0.05),
    }


def _by_site(features: Features) -> list[Features]:
    """Split features by feature and site, into the layers that a choice is made from."""
    groups: dict[tuple[str, str], Features] = {}
    for (feature, site, layer), read in features.items():
        groups.setdefault((feature, site), {})[feature, site, layer] = read
    return list(groups.values())


def _probes_for(feature: str, more_methods: bool) -> dict[str, Callable[[], Any]]:
    if feature in ("two draws", "two draws / move", "counterfactual"):
        return PAIR_PROBES
    if feature == "contrast":
        return CONTRAST_PROBES
    if more_methods:
        return STATE_PROBES | MORE_STATE_PROBES | STACK_PROBES
    return STATE_PROBES


def _add_probes(results: _Results, fits: _SiteFits, features: Features) -> None:
    """Add the rows of a site's probes, and of the controls that see its states."""
    test_states = as_doubles(stack_layers(features, results.task.test))
    for name, fit in fits.probes.items():
        _add_probe(results, name, fit, test_states)
    if fits.shuffled:
        _add_controls_on_states(results, fits, features, test_states)


def _add_probe(
    results: _Results, name: str, fit: LayerProbe, test_states: Float[Tensor, "layer n ..."]
) -> None:
    """Add a row for a probe at each layer of a feature at a site."""
    validation_y = results.task.validation.y.to_numpy()
    test_scores = fit.score_states(test_states)
    feature, site, _ = fit.keys[0]
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


def _add_truth_times_turn(results: _Results, features: Features) -> None:
    """Add the control of pairs that reads the truth, and looks which way the answer turned.

    The probe of truth is fitted on the means of the pairs of the training rows, and its layer is
    chosen on those of the validation rows.
    """
    task = results.task

    def read_mean(rows: pd.DataFrame, read: Callable) -> Float[np.ndarray, "n d"]:
        return read(rows).mean(axis=1)

    means = {key: partial(read_mean, read=read) for key, read in features.items()}
    train, validation = (rows.assign(y=rows.label) for rows in (task.train, task.validation))
    if train.y.nunique() < 2 or validation.y.nunique() < 2:
        return
    probe = FittingRows.read(means, train, validation).fit(Logistic)
    feature, site, _ = probe.keys[0]
    where = {"feature": feature, "site": site, "layer": probe.layer}
    scores = truer_draw(probe.score(task.test), task)
    results.add("control", TRUTH_TIMES_TURN, [scores], **where, compared=len(probe.layers))


def _add_answers_turned_round(all_results: Sequence[_Results], features: Features) -> None:
    """Add the own answer, turned round where a probe or the words of the prompt say "told to lie".

    The probe is fitted on the training rows of all tasks together, and its layer is chosen on their
    validation rows.
    """
    tasks = [results.task for results in all_results]
    train, validation = (
        told_to_lie(pd.concat(parts).drop_duplicates("row_id", ignore_index=True))
        for parts in ([task.train for task in tasks], [task.validation for task in tasks])
    )
    has_both_roles = train.y.nunique() == 2 and validation.y.nunique() == 2
    if tasks[0].target != "truth" or not has_both_roles:
        return
    probe = FittingRows.read(features, train, validation).fit(Logistic)
    feature, site, _ = probe.keys[0]
    where = {"feature": feature, "site": site, "layer": probe.layer}
    for results in all_results:
        scores = turned(probe.score(results.task.test), results.task)
        results.add("control", TOLD_TO_LIE_PROBE, [scores], **where, compared=len(probe.layers))
        scores = answers_turned_by_words(train, results.task)
        results.add("control", TOLD_TO_LIE_WORDS, [scores])


def _add_controls_on_states(
    results: _Results,
    fits: _SiteFits,
    features: Features,
    test_states: Float[Tensor, "layer n ..."],
) -> None:
    """Add the controls that see the states of a feature at a site."""
    first_probe = next(iter(fits.probes.values()))
    keys = list(features)
    feature, site, first_layer = keys[0]
    where = {"feature": feature, "site": site}

    scores = [fit.score_states(test_states)[fit.chosen] for fit in fits.shuffled]
    results.add("control", "shuffled labels", scores, **where, compared=len(keys))

    read_middle_layer = features[keys[len(keys) // 2]]
    scores = list(random_direction_scores(read_middle_layer, results.task, results.seed))
    results.add("control", "random direction", scores, **where)

    # the first layer has hardly begun to compute
    scores = [first_probe.score_states(test_states)[0]]
    results.add("control", "first layer", scores, **where, layer=first_layer)
