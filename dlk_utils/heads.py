"""Attention heads one by one: which of them hold a class, and what the best of them say together.

Source: Li et al., *Inference-time intervention*, arXiv 2306.03341 (a probe a head at the input of W_O, the top 48 kept).
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from dlk_utils.evaluate import Task
from dlk_utils.metrics import auroc, interval
from dlk_utils.probes import Logistic

TOP = (1, 4, 16, 48)
COLUMNS = ["heads", "validation", "estimate", "low", "high", "n", "selected"]


def head_scores(task: Task, read: Callable[[pd.DataFrame, int], Float[np.ndarray, "n d"]], layers: Sequence[int], n_heads: int) -> pd.DataFrame:
    """A logistic probe a head, all in one batch: `layer`, `head`, AUROC on `validation` rows and on test rows (`estimate`), best on validation first.

    `read(rows, layer)` gives `head_out`, the heads side by side.
    """
    train, validation, test = (np.concatenate([_by_head(read(part, layer), n_heads) for layer in layers]) for part in (task.train, task.validation, task.test))
    fitted = Logistic().fit(train, task.train.y.to_numpy())
    names = [(layer, head) for layer in layers for head in range(n_heads)]
    table = pd.DataFrame(names, columns=["layer", "head"])
    for column, X, part in (("validation", validation, task.validation), ("estimate", test, task.test)):
        table[column] = [auroc(s, part.y.to_numpy()) for s in fitted.decision_function(X)]
    return table.sort_values(["validation", "layer", "head"], ascending=[False, True, True], ignore_index=True)


def top_heads(task: Task, read: Callable[[pd.DataFrame, int], Float[np.ndarray, "n d"]], ranked: pd.DataFrame, n_heads: int, *, sizes: Sequence[int] = TOP, seed: int = 0) -> pd.DataFrame:
    """One probe on the `heads` best heads of `head_scores` side by side: AUROC on validation, and on test with a 95 % interval over examples; `selected` is the best on validation."""
    rows = []
    for k in [k for k in sizes if k <= len(ranked)]:
        best = list(ranked.head(k)[["layer", "head"]].itertuples(index=False))
        some = lambda part, best=best: np.concatenate([_by_head(read(part, r.layer), n_heads)[r.head] for r in best], 1)
        fitted = Logistic().fit(some(task.train), task.train.y.to_numpy())
        score = fitted.decision_function(some(task.test))
        low, high = interval(score, task.test.y.to_numpy(), task.test.example_id, seed=seed)
        rows.append({"heads": k, "validation": auroc(fitted.decision_function(some(task.validation)), task.validation.y.to_numpy()), "estimate": auroc(score, task.test.y.to_numpy()), "low": low, "high": high, "n": len(task.test)})
    table = pd.DataFrame(rows, columns=COLUMNS[:-1])
    return table.assign(selected=table.index == (table.validation.idxmax() if len(table) else -1))


def _by_head(X: Float[np.ndarray, "n d"], n_heads: int) -> Float[np.ndarray, "head n w"]:
    return X.reshape(len(X), n_heads, -1).transpose(1, 0, 2)
