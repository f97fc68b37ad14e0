"""Fit all probes and controls of a task; return one table of their test scores, with intervals.

`evaluate` does so for one task, and `evaluate_targets` for every target in every regime.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
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
    score_pairs,
    scores_without_states,
    told_to_lie_rows,
    turn_answers,
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
    *("selected", "rule", "compared", "validation", "validation_accuracy"),
    *("estimate", "low", "high", "choice_low", "choice_high"),
    *("accuracy", "balanced_accuracy", "recall_at_1", "recall_at_5"),
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
    """Evaluate every target in every regime, where there are enough rows.

    Parameters
    ----------
    targets : mapping
        Target -> its rows, as `make_targets` gives them.
    features : callable
        Gives the features of a target, as `target_features` does.

    Returns
    -------
    DataFrame
        The tables of `evaluate`, one below the other. `skipped_tasks` says which tasks are left
        out, and why.
    """
    tables = []
    for target, rows in targets.items():
        tasks = possible_tasks(rows, target)
        tables += evaluate_tasks(tasks, features(target), seed=seed)
    if not tables:
        return pd.DataFrame(columns=RESULT_COLUMNS)
    return pd.concat(tables, ignore_index=True)


def possible_tasks(rows: pd.DataFrame, target: str) -> list[Task]:
    """Make the tasks of a target, one for every regime in which there are enough rows."""
    tasks = []
    for regime in regimes_of(target):
        with suppress(TooFewRows):
            tasks.append(make_task(rows, target, regime))
    return tasks


def skipped_tasks(targets: Mapping[str, pd.DataFrame]) -> list[str]:
    """Say which tasks `evaluate_targets` leaves out and why, in one sentence each.

    It fits nothing, so it is quick.
    """
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
    validation rows. Probes of truth that are fitted on honest rows are read where their scores
    agree most between the twins of the validation examples, and other probes at the earliest good
    layer (see `fit_layers` and `choosing_twins`).

    Some things take long, and are done for the first feature and site only: the controls that use
    states (shuffled labels, a random direction, and the first layer), and the further probes
    `MORE_STATE_PROBES` and `STACK_PROBES`. The target `POSITIVE_CONTROL` has no further probes.

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

        * `selected`: whether this layer was chosen on the validation rows, of `compared` layers,
          by the `rule` (`selection.BY_TWINS` or `selection.EARLIEST`);
        * `validation`, `validation_accuracy`: AUROC and accuracy on the validation rows;
        * `estimate`, `low`, `high`: the signed AUROC on the test rows and its 95 % interval, with
          the layer fixed;
        * `n`, `n_smaller`, `n_train`: the number of test rows, of test rows in the smaller class,
          and of training rows. The fewer in the smaller class, the less an AUROC can say;
        * `accuracy`, `balanced_accuracy`: at the threshold that was fitted on the training rows;
        * `recall_at_1`, `recall_at_5`: recall at 1 % and 5 % false positives.

        The selected layer of each probe also has:

        * `choice_low`, `choice_high`: the 95 % interval of the AUROC if the layer is chosen anew in
          each resample, from resampled validation examples with their twins
          (`FittingRows.choose_again`). The training rows are still taken as given;
        * `brier`, `calibration_error`: of probabilities calibrated on the validation rows;
        * `best_control`: the control of the task with the highest AUROC on the test rows;
        * `lift`, `lift_low`, `lift_high`: the AUROC minus the AUROC of the best control, with its
          95 % interval. Both AUROCs come from the same resamples, and the layer is chosen anew in
          each. The interval does not account for the choice of this control on the test rows.
    """
    [table] = evaluate_tasks([task], features, n_boot=n_boot, seed=seed)
    return table


def evaluate_tasks(
    tasks: Sequence[Task], features: Features, *, n_boot: int = 1000, seed: int = 0
) -> list[pd.DataFrame]:
    """Evaluate the tasks of one target together; return a table of `evaluate` for each.

    The features are read once. Probes are fitted once for all tasks that train on the same role.
    The other arguments are those of `evaluate`.

    If the training rows of all tasks together have both roles, the target "truth" has two more
    controls. `TOLD_TO_LIE_PROBE` and `TOLD_TO_LIE_WORDS` predict from states, or from words,
    whether the model was told to lie, and turn its own answer round accordingly. Pairs have the
    control `TRUTH_TIMES_TURN`.
    """
    if not tasks:
        return []
    all_results = [_Results(task, n_boot, seed) for task in tasks]
    rows = pd.concat([task.rows for task in tasks]).drop_duplicates("row_id")
    for number, stored_features in enumerate(_split_by_site(features)):
        is_first = number == 0
        site_features = in_memory(stored_features, rows)
        fits_by_role: dict[str, _SiteFits] = {}
        for results in all_results:
            train_role, _ = REGIMES[results.task.regime]
            if train_role not in fits_by_role:
                fits_by_role[train_role] = _fit_site(
                    results.task, site_features, is_first=is_first, n_boot=n_boot, seed=seed
                )
            _add_probes(results, fits_by_role[train_role], site_features)
            if is_first and results.task.of_pairs:
                _add_truth_times_turn(results, site_features)
        if is_first:
            _add_answers_turned_round(all_results, site_features)
    for results in all_results:
        for name, scores in scores_without_states(results.task).items():
            results.add("control", name, [scores])
    return [results.table() for results in all_results]


@dataclass(frozen=True)
class _SiteFits:
    """What was fitted to a feature at a site.

    It has the probes by name, the layers that they choose on resampled validation rows [b], and
    probes with shuffled labels.
    """

    probes: dict[str, LayerProbe]
    resampled_layers: dict[str, Int[np.ndarray, " b"]]
    shuffled: list[LayerProbe]


def _fit_site(
    task: Task, features: Features, *, is_first: bool, n_boot: int, seed: int
) -> _SiteFits:
    """Fit the probes of a feature at a site.

    Further probes, and a probe with shuffled labels, are fitted only if it is the first one.
    """
    feature, _, _ = next(iter(features))
    with_further_probes = is_first and task.target != POSITIVE_CONTROL
    make_probes = _probes_for(feature, with_further_probes=with_further_probes)
    rows = FittingRows.of_task(features, task)
    probes = {name: rows.fit(make_probe, task.goal) for name, make_probe in make_probes.items()}
    # Validation rows are resampled independently of test rows, which have the seed itself.
    resampled_layers = {
        name: rows.choose_again(probe, n_boot=n_boot, seed=seed + 1)
        for name, probe in probes.items()
    }
    shuffled = []
    if is_first:
        first_probe = next(iter(make_probes.values()))
        shuffled = fit_shuffled_labels(first_probe, rows, task, seed)
    return _SiteFits(probes, resampled_layers, shuffled)


@dataclass
class _Results:
    """The rows of a table of results, and the AUROC of each row in every bootstrap resample."""

    task: Task
    n_boot: int
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    resampled: list[Float[np.ndarray, " b"]] = field(default_factory=list)
    with_choice: dict[int, Float[np.ndarray, " b"]] = field(default_factory=dict)
    """The AUROCs of some rows of the table if each resample chooses its layer."""

    def __post_init__(self) -> None:
        self.y = self.task.test.y.to_numpy()
        self.weights = bootstrap_weights(self.task.test.example_id, self.n_boot, self.seed)

    def add(
        self, kind: str, probe: str, scores: Sequence[Float[np.ndarray, " n"]], **columns: Any
    ) -> None:
        """Add a row for a probe or a control.

        Parameters
        ----------
        scores
            The scores of the test rows, once for each repeat. The row holds means over repeats.
        columns
            Values that differ from the usual ones.
        """
        resampled = np.mean([weighted_auroc(s, self.y, self.weights) for s in scores], axis=0)
        low, high = interval_of_aurocs(resampled, self.y, self.task.test.example_id)
        self.resampled.append(resampled)
        row = {
            "target": self.task.target,
            "regime": self.task.regime,
            "kind": kind,
            "probe": probe,
            "feature": "",
            "site": "",
            "layer": -1,
            "selected": True,
            "rule": "",
            "compared": 1,
            "low": low,
            "high": high,
            "n": len(self.y),
            "n_smaller": smaller_class(self.y),
            "n_train": len(self.task.train),
            "best_control": "",
        }
        repeats = [_metrics(s, self.y) for s in scores]
        means = {name: np.mean([metrics[name] for metrics in repeats]) for name in repeats[0]}
        self.rows.append(row | means | columns)

    def add_choice(self, n_layers: int, chosen: int, layers: Int[np.ndarray, " b"]) -> None:
        """Give a probe an interval in which each resample chooses its layer.

        The last `n_layers` rows are those of the probe. The interval is that of the row of the
        `chosen` layer; `layers` has the index of the layer that each resample chooses.
        """
        first = len(self.rows) - n_layers
        resampled = np.array(self.resampled[first:])[layers, np.arange(self.n_boot)]
        selected = first + chosen
        self.with_choice[selected] = resampled
        low, high = interval_of_aurocs(resampled, self.y, self.task.test.example_id)
        self.rows[selected] |= {"choice_low": low, "choice_high": high}

    def table(self) -> pd.DataFrame:
        """Return the table, with the lift of selected probes over the best control."""
        controls = [i for i, row in enumerate(self.rows) if row["kind"] == "control"]
        # Nothing compares above nan, so `max` would return a first estimate that is nan.
        best = max(controls, key=lambda i: np.nan_to_num(self.rows[i]["estimate"], nan=-np.inf))
        best_row, best_resampled = self.rows[best], self.resampled[best]
        for i, resampled in self.with_choice.items():
            row = self.rows[i]
            row["best_control"] = best_row["probe"]
            row["lift"] = row["estimate"] - best_row["estimate"]
            row["lift_low"], row["lift_high"] = percentile_interval(resampled - best_resampled)
        return pd.DataFrame(self.rows).reindex(columns=RESULT_COLUMNS)


def _metrics(scores: Float[np.ndarray, " n"], y: np.ndarray) -> dict[str, float]:
    return {
        "estimate": auroc(scores, y),
        "accuracy": float(np.mean((scores > 0) == y)),
        "balanced_accuracy": balanced_accuracy(scores, y),
        "recall_at_1": recall_at(scores, y, 0.01),
        "recall_at_5": recall_at(scores, y, 0.05),
    }


def _split_by_site(features: Features) -> list[Features]:
    """Split features into groups, each with all layers of one feature at one site."""
    groups: dict[tuple[str, str], Features] = {}
    for (feature, site, layer), read in features.items():
        groups.setdefault((feature, site), {})[feature, site, layer] = read
    return list(groups.values())


def _probes_for(feature: str, *, with_further_probes: bool) -> dict[str, Callable[[], Any]]:
    """Return what makes each probe that reads a feature, by name."""
    if feature in ("two draws", "two draws / move", "counterfactual"):
        return PAIR_PROBES
    if feature == "contrast":
        return CONTRAST_PROBES
    if with_further_probes:
        return STATE_PROBES | MORE_STATE_PROBES | STACK_PROBES
    return STATE_PROBES


def _add_probes(results: _Results, fits: _SiteFits, features: Features) -> None:
    """Add the rows of a site's probes and, at the first site, of the controls that use states."""
    test_states = as_doubles(stack_layers(features, results.task.test))
    for name, fit in fits.probes.items():
        _add_probe(results, name, fit, test_states)
        results.add_choice(len(fit.layers), fit.chosen, fits.resampled_layers[name])
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
            "rule": fit.rule,
            "compared": len(fit.layers),
            "validation": fit.validation_aurocs[i],
            "validation_accuracy": np.mean((fit.validation_scores[i] > 0) == validation_y),
        }
        if i == fit.chosen:
            probabilities = calibrated(fit.validation_scores[i], validation_y, test_scores[i])
            columns["brier"] = brier_score_loss(results.y, probabilities)
            columns["calibration_error"] = calibration_error(probabilities, results.y)
        results.add("probe", name, [test_scores[i]], **columns)


def _add_truth_times_turn(results: _Results, features: Features) -> None:
    """Add the control of pairs that reads the truth, and looks which way the answer turned.

    The probe of truth is fitted on the means of the pairs of the training rows, and its layer is
    chosen on those of the validation rows, by `EARLIEST`: their twins told to lie have no draws.
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
    scores = score_pairs(probe.score(task.test), task)
    results.add("control", TRUTH_TIMES_TURN, [scores], **where, compared=len(probe.layers))


def _add_answers_turned_round(all_results: Sequence[_Results], features: Features) -> None:
    """Add the own answer, reversed where a probe or the words of the prompt say "told to lie".

    The probe is fitted on the training rows of all tasks together, and its layer is chosen on their
    validation rows. Nothing is added to other targets than "truth", or if these rows lack a role.
    """
    train = _rows_by_role([results.task.train for results in all_results])
    validation = _rows_by_role([results.task.validation for results in all_results])
    has_both_roles = train.y.nunique() == 2 and validation.y.nunique() == 2
    if all_results[0].task.target != "truth" or not has_both_roles:
        return
    probe = FittingRows.read(features, train, validation).fit(Logistic)
    feature, site, _ = probe.keys[0]
    columns = {
        "feature": feature,
        "site": site,
        "layer": probe.layer,
        "compared": len(probe.layers),
    }
    for results in all_results:
        by_probe = turn_answers(results.task, probe.score(results.task.test))
        results.add("control", TOLD_TO_LIE_PROBE, [by_probe], **columns)
        by_words = answers_turned_by_words(train, results.task)
        results.add("control", TOLD_TO_LIE_WORDS, [by_words])


def _rows_by_role(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the distinct rows of some tables; their class `y` is whether they are told to lie."""
    return told_to_lie_rows(pd.concat(parts).drop_duplicates("row_id", ignore_index=True))


def _add_controls_on_states(
    results: _Results,
    fits: _SiteFits,
    features: Features,
    test_states: Float[Tensor, "layer n ..."],
) -> None:
    """Add the controls that use the states of a feature at a site."""
    keys = list(features)
    feature, site, first_layer = keys[0]
    columns = {"feature": feature, "site": site}

    scores = [fit.score_states(test_states)[fit.chosen] for fit in fits.shuffled]
    results.add("control", "shuffled labels", scores, **columns, compared=len(keys))

    read_middle_layer = features[keys[len(keys) // 2]]
    scores = list(random_direction_scores(read_middle_layer, results.task, results.seed))
    results.add("control", "random direction", scores, **columns)

    # The first layer has hardly begun to compute: what is found there is mostly in the words.
    first_probe = next(iter(fits.probes.values()))
    scores = [first_probe.score_states(test_states)[0]]
    results.add("control", "first layer", scores, **columns, layer=first_layer)
