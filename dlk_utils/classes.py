"""Three classes at once, truth, deception and unknown, as the work that this grows from asked for them."""

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import classification_report
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from dlk_utils.targets import Features

CLASSES = ("truth", "deception", "unknown")
MIN_ROWS = 4
"""Of each class, on either side of the split."""
_NAMES = {"correct": "truth", "lie": "deception", "unknown": "unknown"}


def class_rows(scored: pd.DataFrame) -> pd.DataFrame:
    """Rows with `y` in `CLASSES`: truth (right, and it knows), deception (told to lie, wrong, knows better), unknown. Confused rows (told the truth, wrong, knows better) belong to none."""
    return scored[scored.three_class.isin(_NAMES)].assign(y=lambda t: t.three_class.map(_NAMES)).reset_index(drop=True)


def class_report(rows: pd.DataFrame, features: Features, *, C: float = 0.01) -> pd.DataFrame:
    """Softmax regression on states (the layer chosen by macro F1 on validation) beside the majority and the instruction alone: precision, recall, F1 and rows per class, on test; empty with too few rows.

    Rows of a class count by the inverse of its frequency in training.
    """
    parts = {s: rows[rows.split == s].reset_index(drop=True) for s in ("train", "validation", "test")}
    columns = ["method", "layer", "class", "precision", "recall", "f1", "rows", "accuracy"]
    if any(parts[s].y.value_counts().reindex(list(CLASSES), fill_value=0).min() < MIN_ROWS for s in ("train", "test")):
        return pd.DataFrame(columns=columns)
    y = {s: p.y.to_numpy(str) for s, p in parts.items()}
    softmax = lambda: LogisticRegression(C=C, class_weight="balanced", max_iter=500)
    fitted = {key: make_pipeline(StandardScaler(), softmax()).fit(read(parts["train"]), y["train"]) for key, read in features.items()}
    best = max(features, key=lambda key: _report(y["validation"], fitted[key].predict(features[key](parts["validation"])))["macro avg"]["f1-score"])
    instruction = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression(class_weight="balanced")).fit(parts["train"][["instruction"]], y["train"])
    common = pd.Series(y["train"]).mode()[0]
    said = {("softmax regression", best[2]): fitted[best].predict(features[best](parts["test"])), ("instruction only", -1): instruction.predict(parts["test"][["instruction"]]), ("majority", -1): np.full(len(y["test"]), common)}
    found = []
    for (method, layer), answer in said.items():
        report = _report(y["test"], answer)
        for name in (*CLASSES, "macro avg"):
            found.append({"method": method, "layer": layer, "class": name, "precision": report[name]["precision"], "recall": report[name]["recall"], "f1": report[name]["f1-score"], "rows": int(report[name]["support"]), "accuracy": float(np.mean(answer == y["test"]))})
    return pd.DataFrame(found, columns=columns)


def _report(y: np.ndarray, answer: np.ndarray) -> dict:
    return classification_report(y, answer, labels=list(CLASSES), output_dict=True, zero_division=0)
