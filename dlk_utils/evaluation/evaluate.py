"""Splits, controls, metrics and intervals: one long table in which every probe stands beside its controls."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import OneHotEncoder

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.stats import (
    auroc,
    balanced_accuracy,
    bootstrap_weights,
    brier,
    calibrated,
    calibration_error,
    earliest_good_layer,
    recall_at,
    weighted_auroc,
)
from dlk_utils.evaluation.tasks import (
    KNOWN,
    LYING,
    POSITIVE_CONTROL,
    REGIMES,
    Features,
    Task,
    make_task,
)
from dlk_utils.probes import (
    CONTRAST_PROBES,
    MORE_STATE_PROBES,
    PAIR_PROBES,
    STACK_PROBES,
    STATE_PROBES,
    Logistic,
    fit_probe,
)

RESULT_COLUMNS = [
    "target",
    "regime",
    "kind",
    "probe",
    "feature",
    "site",
    "layer",
    "selected",
    "compared",
    "validation",
    "validation_accuracy",
    "estimate",
    "low",
    "high",
    "accuracy",
    "balanced_accuracy",
    "recall_at_1",
    "recall_at_5",
    "brier",
    "calibration_error",
    "n",
    "n_train",
    "best_control",
    "lift",
    "lift_low",
    "lift_high",
]


def evaluate_targets(
    targets: Mapping[str, pd.DataFrame], features: Callable[[str], Features], *, seed: int = 0
) -> tuple[pd.DataFrame, list[str]]:
    """The long table of every target in every regime, and a sentence for each task that has too few rows. `features` gives those of a target."""
    tables, skipped = [pd.DataFrame(columns=RESULT_COLUMNS)], []
    for target, rows in targets.items():
        fits: dict = {}
        only = {
            "lie": ["by example, lie rows"],
            "truth": list(REGIMES),
            "pair": ["by example, truth rows", LYING],
        }  # only rows told to lie can be lies; of those only the test rows are drawn
        for regime in only.get(target, [r for r in REGIMES if r != KNOWN]):
            try:
                tables.append(
                    evaluate(
                        make_task(rows, target, regime), features(target), seed=seed, fits=fits
                    )
                )
            except TooFewRows as e:
                skipped.append(str(e))
    return pd.concat([t for t in tables if len(t)] or tables, ignore_index=True), skipped


def evaluate(
    task: Task, features: Features, *, n_boot: int = 1000, seed: int = 0, fits: dict | None = None
) -> pd.DataFrame:
    """Every probe on every feature, and the controls, on one task: a long table.

    `features` maps (feature, site, layer) to a function from rows to X ([n, d], or [n, 2, d] for the target `pair`). The layer is chosen on
    validation (`selected`; see `metrics.earliest`); the test AUROC is signed, with a 95 % interval by bootstrap over examples, and for selected rows the
    `lift` over the best control of the task, paired by resample. `compared` counts the layers that the choice was made from; all layers of a feature are fitted
    in one batch. Accuracies are at the threshold that was fixed on train, on validation rows and carried over to test rows; `brier` and `calibration_error` of probabilities calibrated on validation, for selected rows.
    `fits` keeps what was fitted, for regimes that train on the same rows.
    """
    fits = {} if fits is None else fits
    pair = task.target == "pair"
    weights = bootstrap_weights(task.test.example_id, n_boot, seed)
    label = task.test.y.to_numpy()
    rows, boots = [], {}

    def once(key: tuple, make: Callable) -> Any:
        key = (REGIMES[task.regime][0], *key)
        if key not in fits:
            fits[key] = make()
        return fits[key]

    def add(kind: str, probe: str, scores: list[Float[np.ndarray, " n"]], **more) -> None:
        boots[len(rows)] = np.mean([weighted_auroc(s, label, weights) for s in scores], 0)
        low, high = np.nanpercentile(boots[len(rows)], [2.5, 97.5])
        mean = lambda metric: float(np.mean([metric(s, label) for s in scores]))
        scored = {
            "estimate": mean(auroc),
            "low": low,
            "high": high,
            "accuracy": mean(lambda s, y: np.mean((s > 0) == y)),
            "balanced_accuracy": mean(balanced_accuracy),
            "recall_at_1": mean(lambda s, y: recall_at(s, y, 0.01)),
            "recall_at_5": mean(lambda s, y: recall_at(s, y, 0.05)),
        }
        rows.append(
            {
                "target": task.target,
                "regime": task.regime,
                "kind": kind,
                "probe": probe,
                "feature": "",
                "site": "",
                "layer": -1,
                "selected": True,
                "compared": 1,
                "validation": np.nan,
                "validation_accuracy": np.nan,
                "n": len(label),
                "n_train": len(task.train),
                **scored,
                **more,
            }
        )

    groups: dict[tuple[str, str], list[int]] = {}
    for feature, site, layer in features:
        groups.setdefault((feature, site), []).append(layer)
    checked, goal = task.validation.y.to_numpy(), _goal(task.train, pair)
    for (feature, site), layers in groups.items():
        X = [
            np.stack([features[feature, site, layer](part) for layer in layers])
            for part in (task.train, task.validation, task.test)
        ]
        first = (feature, site) == next(iter(groups))
        for name, make in probes_on(feature, first and task.target != POSITIVE_CONTROL).items():
            probe = once(
                (feature, site, name),
                lambda make=make, X=X: fit_probe(make, X[0], task.train, goal),
            )
            on_validation, on_test = (np.atleast_2d(probe.decision_function(x)) for x in X[1:])
            stacked = name in STACK_PROBES
            chosen_by = [auroc(s, checked) for s in on_validation]
            best = earliest_good_layer(on_validation, checked, task.validation.example_id)
            for i, layer in enumerate([-1] if stacked else layers):
                where = {
                    "feature": feature,
                    "site": site,
                    "layer": layer,
                    "selected": i == best,
                    "compared": len(on_validation),
                }
                p = calibrated(on_validation[i], checked, on_test[i]) if i == best else None
                sure = (
                    {}
                    if p is None
                    else {
                        "brier": brier(p, label),
                        "calibration_error": calibration_error(p, label),
                    }
                )
                add(
                    "probe",
                    name,
                    [on_test[i]],
                    validation=chosen_by[i],
                    validation_accuracy=float(np.mean((on_validation[i] > 0) == checked)),
                    **where,
                    **sure,
                )
        if first:
            make, where = (
                next(iter(probes_on(feature, False).values())),
                {"feature": feature, "site": site, "compared": len(layers)},
            )
            null = once(
                (feature, site, "shuffled"),
                lambda X=X, make=make: list(_shuffled(task, X, make, pair, seed)),
            )
            add(
                "control",
                "shuffled labels",
                [probe.decision_function(X[2])[k] for probe, k in null],
                **where,
            )
            add(
                "control",
                "random direction",
                list(_random(task, [x[len(layers) // 2] for x in X], pair, seed)),
                **where | {"compared": 1},
            )
            add(
                "control",
                "first layer",
                [make().fit(X[0][0], goal).decision_function(X[2][0])],
                **where | {"layer": layers[0], "compared": 1},
            )
    for name, score in _controls(task, pair).items():
        add("control", name, [score])
    table = pd.DataFrame(rows)
    return _with_lift(table, boots)


def probes_on(feature: str, more: bool) -> dict[str, Callable]:
    """The probes for a kind of feature; `more`: also those that are fitted at one site only."""
    if feature in ("two draws", "two draws / move", "counterfactual"):
        return PAIR_PROBES
    if feature == "contrast":
        return CONTRAST_PROBES
    return STATE_PROBES | (MORE_STATE_PROBES | STACK_PROBES if more else {})


def _goal(rows: pd.DataFrame, pair: bool) -> np.ndarray:
    return rows.move.to_numpy(float) if pair else rows.y.to_numpy()


def _shuffled(task, X, make, pair, seed, repeats: int = 5):
    """The whole selection again with labels that say nothing: fitted probes, and the layer that each chose."""
    for r in range(repeats):
        rng = np.random.default_rng([seed, r])
        goal, y = (
            rng.permutation(_goal(task.train, pair)),
            rng.permutation(task.validation.y.to_numpy()),
        )
        if pair:
            goal = goal * rng.choice([-1, 1], len(goal))
        fitted = make().fit(X[0], goal)
        yield (
            fitted,
            earliest_good_layer(fitted.decision_function(X[1]), y, task.validation.example_id),
        )


def _random(task, X, pair, seed, repeats: int = 20):
    """Random directions at a middle layer, oriented on train as any probe is."""
    train, _, test = (x[:, 1] - x[:, 0] if pair else x for x in X)
    mean, scale = (0 if pair else train.mean(0)), train.std(0) + 1e-8
    for r in range(repeats):
        w = np.random.default_rng([seed, 7, r]).standard_normal(train.shape[1]) / scale
        sign = 1 if auroc((train - mean) @ w, task.train.y.to_numpy()) >= 0.5 else -1
        yield sign * ((test - mean) @ w)


def _controls(task: Task, pair: bool) -> dict[str, np.ndarray]:
    """What can be scored without the states. For pairs, a guess of the truth times the observed change of the answer."""
    y = (task.train.label if pair else task.train.y).to_numpy()
    turn = (task.test.p1_draw1 - task.test.p1_draw0).to_numpy() if pair else 1.0

    def learned(make, columns, C: float) -> np.ndarray:
        known = make().fit(columns(task.train))
        dense = lambda rows: np.asarray(known.transform(columns(rows)).astype(float).toarray())
        return Logistic(C=C).fit(dense(task.train), y).decision_function(dense(task.test))

    onehot, words = (
        lambda: OneHotEncoder(handle_unknown="ignore"),
        lambda: TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
    )
    length = lambda rows: np.log(rows.prompt.str.len().to_numpy(float))[:, None]
    score = {
        "majority": np.full(len(task.test), y.mean() - 0.5),
        "own answer": task.test.margin.to_numpy()
        if task.target != "lie"
        else -task.test.margin.abs().to_numpy(),
        "instruction only": learned(onehot, lambda rows: rows[["instruction"]], 1.0),
        "metadata": learned(onehot, lambda rows: rows[["instruction", "template", "dataset"]], 1.0),
        "length": Logistic(C=1.0).fit(length(task.train), y).decision_function(length(task.test)),
        "TF-IDF": learned(words, lambda rows: rows.prompt, 0.01),
        "TF-IDF, question only": learned(words, lambda rows: rows.text, 0.01),
    }
    return {name: np.sign(s) * turn if pair else s for name, s in score.items()}


def _with_lift(table: pd.DataFrame, boots: dict[int, np.ndarray]) -> pd.DataFrame:
    controls = table[table.kind == "control"]
    best = controls.estimate.idxmax()
    lift = {
        i: boots[i] - boots[best] for i in table.index[(table.kind == "probe") & table.selected]
    }
    out = table.assign(best_control="", lift=np.nan, lift_low=np.nan, lift_high=np.nan)
    for i, boot in lift.items():
        low, high = np.nanpercentile(boot, [2.5, 97.5])
        out.loc[i, ["best_control", "lift", "lift_low", "lift_high"]] = [
            table.probe[best],
            table.estimate[i] - table.estimate[best],
            low,
            high,
        ]
    return out.reindex(columns=RESULT_COLUMNS)
