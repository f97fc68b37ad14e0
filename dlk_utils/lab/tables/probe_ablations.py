"""Tables of notebook 05: site and feature, scale, attention heads, starts of CCS, three classes."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import classification_report
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from dlk_utils.evaluation.stats import (
    auroc,
    auroc_interval,
    bootstrap_weights,
    earliest_good_layer,
    weighted_auroc,
)
from dlk_utils.evaluation.tasks import Features, Task
from dlk_utils.probes import CCS, Logistic
from dlk_utils.probes.scale import SCALES

SCALE_COLUMNS = ["scale", "layer", "validation", "estimate", "low", "high", "n"]


GAIN_COLUMNS = [
    "feature",
    "site",
    "layer",
    "validation",
    "estimate",
    "estimate_low",
    "estimate_high",
    "n",
    "gain",
    "gain_low",
    "gain_high",
    "over_residual",
    "over_residual_low",
    "over_residual_high",
]


def gain_table(
    task: Task, features: Features, *, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Logistic regression on each (feature, site) at the layer chosen on validation; `gain` is its AUROC minus that of the activation at the same site, `over_residual` minus that of the
    activation at `resid_post`, each with a 95 % interval, paired by resample of whole examples."""
    groups: dict[tuple[str, str], list] = {}
    for key in features:
        groups.setdefault(key[:2], []).append(key)
    weights, y = bootstrap_weights(task.test.example_id, n_boot, seed), task.test.y.to_numpy()
    rows, boots = {}, {}
    for group, keys in groups.items():
        X = [
            np.stack([features[k](part) for k in keys])
            for part in (task.train, task.validation, task.test)
        ]
        probe = Logistic().fit(X[0], task.train.y.to_numpy())
        checked, best = _best_layer(probe.decision_function(X[1]), task)
        score = probe.decision_function(X[2])[best]
        boots[group] = weighted_auroc(score, y, weights)
        low, high = np.nanpercentile(boots[group], [2.5, 97.5])
        rows[group] = {
            "feature": group[0],
            "site": group[1],
            "layer": keys[best][2],
            "validation": checked[best],
            "estimate": auroc(score, y),
            "estimate_low": low,
            "estimate_high": high,
            "n": len(y),
        }
    for group, row in rows.items():
        for name, other in (
            ("gain", ("activation", group[1])),
            ("over_residual", ("activation", "resid_post")),
        ):
            low, high = np.nanpercentile(boots[group] - boots[other], [2.5, 97.5])
            row |= {
                name: row["estimate"] - rows[other]["estimate"],
                f"{name}_low": low,
                f"{name}_high": high,
            }
    return pd.DataFrame(list(rows.values()), columns=GAIN_COLUMNS)


def scale_table(task: Task, features: Features, *, seed: int = 0) -> pd.DataFrame:
    """Logistic regression under each of `SCALES`, at the layer chosen on validation: test AUROC with a 95 % interval over examples."""
    keys, rows = list(features), []
    X = [
        np.stack([features[k](part) for k in keys])
        for part in (task.train, task.validation, task.test)
    ]
    for scale in SCALES:
        probe = Logistic("auto", scale=scale).fit(
            X[0], task.train.y.to_numpy(), task.train.example_id
        )
        checked, best = _best_layer(probe.decision_function(X[1]), task)
        score, y = probe.decision_function(X[2])[best], task.test.y.to_numpy()
        low, high = auroc_interval(score, y, task.test.example_id, seed=seed)
        rows.append(
            dict(
                zip(
                    SCALE_COLUMNS,
                    [scale, keys[best][2], checked[best], auroc(score, y), low, high, len(y)],
                    strict=True,
                )
            )
        )
    return pd.DataFrame(rows, columns=SCALE_COLUMNS)


def restart_table(task: Task, features: Features) -> pd.DataFrame:
    """Every start of CCS by layer: its loss without labels, its test AUROC (`estimate`), and whether it was `kept`."""
    keys = list(features)
    train, test = (np.stack([features[k](part) for k in keys]) for part in (task.train, task.test))
    probe = CCS().fit(train, task.train.y.to_numpy())
    rows = []
    for (_, _, layer), losses, scores in zip(
        keys, probe.losses_, probe.score_starts(test), strict=True
    ):
        rows += [
            {
                "layer": layer,
                "start": r,
                "loss": float(losses[r]),
                "estimate": auroc(s, task.test.y.to_numpy()),
                "kept": r == int(losses.argmin()),
            }
            for r, s in enumerate(scores)
        ]
    return pd.DataFrame(rows)


def _best_layer(on_validation: Float[np.ndarray, "b n"], task: Task) -> tuple[list[float], int]:
    y = task.validation.y.to_numpy()
    return [auroc(s, y) for s in on_validation], earliest_good_layer(
        on_validation, y, task.validation.example_id
    )


TOP_HEADS = (1, 4, 16, 48)


TOP_HEADS_COLUMNS = ["heads", "validation", "estimate", "low", "high", "n", "selected"]


def head_scores(
    task: Task,
    read: Callable[[pd.DataFrame, int], Float[np.ndarray, "n d"]],
    layers: Sequence[int],
    n_heads: int,
) -> pd.DataFrame:
    """A logistic probe a head, all in one batch: `layer`, `head`, AUROC on `validation` rows and on test rows (`estimate`), best on validation first.

    `read(rows, layer)` gives `head_out`, the heads side by side.
    """
    train, validation, test = (
        np.concatenate([_by_head(read(part, layer), n_heads) for layer in layers])
        for part in (task.train, task.validation, task.test)
    )
    fitted = Logistic().fit(train, task.train.y.to_numpy())
    names = [(layer, head) for layer in layers for head in range(n_heads)]
    table = pd.DataFrame(names, columns=["layer", "head"])
    for column, X, part in (
        ("validation", validation, task.validation),
        ("estimate", test, task.test),
    ):
        table[column] = [auroc(s, part.y.to_numpy()) for s in fitted.decision_function(X)]
    return table.sort_values(
        ["validation", "layer", "head"], ascending=[False, True, True], ignore_index=True
    )


def top_heads(
    task: Task,
    read: Callable[[pd.DataFrame, int], Float[np.ndarray, "n d"]],
    ranked: pd.DataFrame,
    n_heads: int,
    *,
    sizes: Sequence[int] = TOP_HEADS,
    seed: int = 0,
) -> pd.DataFrame:
    """One probe on the `heads` best heads of `head_scores` side by side: AUROC on validation, and on test with a 95 % interval over examples; `selected` is the best on validation."""
    rows = []
    for k in [k for k in sizes if k <= len(ranked)]:
        best = list(ranked.head(k)[["layer", "head"]].itertuples(index=False))
        some = lambda part, best=best: np.concatenate(
            [_by_head(read(part, r.layer), n_heads)[r.head] for r in best], 1
        )
        fitted = Logistic().fit(some(task.train), task.train.y.to_numpy())
        score = fitted.decision_function(some(task.test))
        low, high = auroc_interval(score, task.test.y.to_numpy(), task.test.example_id, seed=seed)
        rows.append(
            {
                "heads": k,
                "validation": auroc(
                    fitted.decision_function(some(task.validation)), task.validation.y.to_numpy()
                ),
                "estimate": auroc(score, task.test.y.to_numpy()),
                "low": low,
                "high": high,
                "n": len(task.test),
            }
        )
    table = pd.DataFrame(rows, columns=TOP_HEADS_COLUMNS[:-1])
    return table.assign(selected=table.index == (table.validation.idxmax() if len(table) else -1))


def _by_head(X: Float[np.ndarray, "n d"], n_heads: int) -> Float[np.ndarray, "head n w"]:
    return X.reshape(len(X), n_heads, -1).transpose(1, 0, 2)


CLASSES = ("truth", "deception", "unknown")


MIN_ROWS = 4
"""Of each class, on either side of the split."""


_NAMES = {"correct": "truth", "lie": "deception", "unknown": "unknown"}


def class_rows(scored: pd.DataFrame) -> pd.DataFrame:
    """Rows with `y` in `CLASSES`: truth (right, and it knows), deception (told to lie, wrong, knows better), unknown. Confused rows (told the truth, wrong, knows better) belong to none."""
    return (
        scored[scored.three_class.isin(_NAMES)]
        .assign(y=lambda t: t.three_class.map(_NAMES))
        .reset_index(drop=True)
    )


def class_report(rows: pd.DataFrame, features: Features, *, C: float = 0.01) -> pd.DataFrame:
    """Softmax regression on states (the layer chosen by macro F1 on validation) beside the majority and the instruction alone: precision, recall, F1 and rows per class, on test; empty with too few rows.

    Rows of a class count by the inverse of its frequency in training.
    """
    parts = {
        s: rows[rows.split == s].reset_index(drop=True) for s in ("train", "validation", "test")
    }
    columns = ["method", "layer", "class", "precision", "recall", "f1", "rows", "accuracy"]
    if any(
        parts[s].y.value_counts().reindex(list(CLASSES), fill_value=0).min() < MIN_ROWS
        for s in ("train", "test")
    ):
        return pd.DataFrame(columns=columns)
    y = {s: p.y.to_numpy(str) for s, p in parts.items()}
    softmax = lambda: LogisticRegression(C=C, class_weight="balanced", max_iter=500)
    fitted = {
        key: make_pipeline(StandardScaler(), softmax()).fit(read(parts["train"]), y["train"])
        for key, read in features.items()
    }
    best = max(
        features,
        key=lambda key: _class_scores(
            y["validation"], fitted[key].predict(features[key](parts["validation"]))
        )["macro avg"]["f1-score"],
    )
    instruction = make_pipeline(
        OneHotEncoder(handle_unknown="ignore"), LogisticRegression(class_weight="balanced")
    ).fit(parts["train"][["instruction"]], y["train"])
    common = pd.Series(y["train"]).mode()[0]
    said = {
        ("softmax regression", best[2]): fitted[best].predict(features[best](parts["test"])),
        ("instruction only", -1): instruction.predict(parts["test"][["instruction"]]),
        ("majority", -1): np.full(len(y["test"]), common),
    }
    found = []
    for (method, layer), answer in said.items():
        report = _class_scores(y["test"], answer)
        for name in (*CLASSES, "macro avg"):
            found.append(
                {
                    "method": method,
                    "layer": layer,
                    "class": name,
                    "precision": report[name]["precision"],
                    "recall": report[name]["recall"],
                    "f1": report[name]["f1-score"],
                    "rows": int(report[name]["support"]),
                    "accuracy": float(np.mean(answer == y["test"])),
                }
            )
    return pd.DataFrame(found, columns=columns)


def _class_scores(y: np.ndarray, answer: np.ndarray) -> dict:
    return classification_report(y, answer, labels=list(CLASSES), output_dict=True, zero_division=0)
