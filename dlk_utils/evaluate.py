"""Splits, controls, metrics and intervals: one long table in which every probe stands beside its controls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import OneHotEncoder

from dlk_utils.probes import PAIR_PROBES, STATE_PROBES, logistic

REGIMES = {"by example, truth rows": ("truth", "truth"), "by example, lie rows": ("lie", "lie"), "truth rows -> lie rows": ("truth", "lie")}
"""name -> (role of the rows trained on and selected on, role of the rows tested on); the examples never overlap."""
MIN_PER_CLASS = {"train": 5, "validation": 2, "test": 4}
COLUMNS = [
    "target", "regime", "kind", "probe", "feature", "site", "layer", "selected", "compared", "validation", "estimate", "low", "high", "accuracy",
    "n", "n_train", "best_control", "lift", "lift_low", "lift_high",
]  # fmt: skip


class TooFewRows(ValueError):
    """A target without enough rows of each class to be scored; the message has the counts."""


@dataclass(frozen=True)
class Task:
    """Rows of one target in one regime, split by example."""

    target: str
    regime: str
    train: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame
    """Rows with `row_id`, `example_id`, `y` (0 or 1), and the columns that the controls read."""


def make_task(rows: pd.DataFrame, target: str, regime: str) -> Task:
    """The rows of a target (`rows` has a column `y`) in a regime. Raises `TooFewRows`; asserts that no example is on two sides."""
    fit_role, test_role = REGIMES[regime]
    pick = lambda role, split: rows[(rows.role == role) & (rows.split == split)].reset_index(drop=True)
    parts = {"train": pick(fit_role, "train"), "validation": pick(fit_role, "validation"), "test": pick(test_role, "test")}
    ids = [set(p.example_id) for p in parts.values()]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2]), "an example straddles the split"
    counts = {k: (int((p.y == 0).sum()), int((p.y == 1).sum())) for k, p in parts.items()}
    if any(min(counts[k]) < MIN_PER_CLASS[k] for k in parts):
        raise TooFewRows(f"{target}, {regime}: rows of class (0, 1) are {counts}; each class needs at least {MIN_PER_CLASS}")
    return Task(target, regime, **parts)


def evaluate(task: Task, features: dict[tuple[str, str, int], Callable[[pd.DataFrame], np.ndarray]], *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Every probe on every feature, and the controls, on one task: a long table.

    `features` maps (feature, site, layer) to a function from rows to X ([n, d], or [n, 2, d] for the target `pair`). The layer is chosen by AUROC
    on validation (`selected`); the test AUROC is signed, with a 95 % interval by bootstrap over examples, and for selected rows the
    `lift` over the best control of the task, paired by resample. `compared` counts the layers that the choice was made from.
    """
    pair = task.target == "pair"
    weights = _resamples(task.test.example_id, n_boot, seed)
    label = task.test.y.to_numpy()
    rows, boots = [], {}

    def add(kind: str, probe: str, scores: list[Float[np.ndarray, " n"]], **more) -> None:
        boot = np.mean([_auroc(s, label, weights) for s in scores], 0)
        estimate = float(np.mean([auroc(s, label) for s in scores]))
        boots[len(rows)] = boot
        low, high = np.nanpercentile(boot, [2.5, 97.5])
        accuracy = float(np.mean([np.mean((s > 0) == label) for s in scores]))
        rows.append({"target": task.target, "regime": task.regime, "kind": kind, "probe": probe, "feature": "", "site": "", "layer": -1, "selected": True, "compared": 1, "validation": np.nan, "estimate": estimate, "low": low, "high": high, "accuracy": accuracy, "n": len(label), "n_train": len(task.train), **more})  # fmt: skip

    groups: dict[tuple[str, str], list[int]] = {}
    for feature, site, layer in features:
        groups.setdefault((feature, site), []).append(layer)
    for (feature, site), layers in groups.items():
        X = {layer: [features[feature, site, layer](part) for part in (task.train, task.validation, task.test)] for layer in layers}
        for name, make in (PAIR_PROBES if pair else STATE_PROBES).items():
            fitted = {layer: make().fit(X[layer][0], _goal(task.train, pair)) for layer in layers}
            chosen_by = {layer: auroc(fitted[layer].decision_function(X[layer][1]), task.validation.y.to_numpy()) for layer in layers}
            best = max(layers, key=lambda layer: (chosen_by[layer], -layer))
            for layer in layers:
                where = {"feature": feature, "site": site, "layer": layer, "selected": layer == best, "compared": len(layers)}
                add("probe", name, [fitted[layer].decision_function(X[layer][2])], validation=chosen_by[layer], **where)
        if (feature, site) == next(iter(groups)):
            make, where = next(iter((PAIR_PROBES if pair else STATE_PROBES).values())), {"feature": feature, "site": site, "compared": len(layers)}
            add("control", "shuffled labels", list(_shuffled(task, X, make, pair, seed)), **where)
            add("control", "random direction", list(_random(task, X[layers[len(layers) // 2]], pair, seed)), **where | {"compared": 1})
    for name, score in _controls(task, pair).items():
        add("control", name, [score])
    table = pd.DataFrame(rows)
    return _with_lift(table, boots)


def auroc(scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"]) -> float:
    """Signed AUROC: the share of (1, 0) pairs in which the 1 scores higher, ties half. Never flipped."""
    return float(_auroc(scores, y, np.ones((1, len(y))))[0])


def _auroc(scores, y, weights: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    one, zero = y == 1, y == 0
    wins = np.sign(scores[one][:, None] - scores[zero][None]) / 2 + 0.5
    total = weights[:, one].sum(1) * weights[:, zero].sum(1)
    return np.einsum("bj,bj->b", weights[:, one] @ wins, weights[:, zero]) / np.where(total > 0, total, np.nan)


def _resamples(groups: Sequence[str] | pd.Series, n_boot: int, seed: int) -> Float[np.ndarray, "b n"]:
    """How often each row is drawn when whole examples are resampled."""
    names, index = np.unique(groups, return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), n_boot)
    return counts[:, index].astype(float)


def _goal(rows: pd.DataFrame, pair: bool) -> np.ndarray:
    return rows.move.to_numpy(float) if pair else rows.y.to_numpy()


def _shuffled(task, X, make, pair, seed, repeats: int = 5):
    """The whole selection again with labels that say nothing."""
    for r in range(repeats):
        rng = np.random.default_rng([seed, r])
        goal, y = rng.permutation(_goal(task.train, pair)), rng.permutation(task.validation.y.to_numpy())
        if pair:
            goal = goal * rng.choice([-1, 1], len(goal))
        fitted = {layer: make().fit(x[0], goal) for layer, x in X.items()}
        best = max(X, key=lambda layer: (auroc(fitted[layer].decision_function(X[layer][1]), y), -layer))
        yield fitted[best].decision_function(X[best][2])


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
    y = task.train.label if pair else task.train.y
    turn = (task.test.p1_draw1 - task.test.p1_draw0).to_numpy() if pair else 1.0
    meta = ["instruction", "template", "dataset"]
    onehot = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(task.train[meta])
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(task.train.prompt)
    by_meta = logistic(C=1.0).fit(onehot.transform(task.train[meta]), y)
    by_text = logistic(C=0.01).fit(words.transform(task.train.prompt).toarray(), y)
    score = {
        "own answer": task.test.margin.to_numpy() if task.target != "lie" else -task.test.margin.abs().to_numpy(),
        "instruction only": by_meta.decision_function(onehot.transform(task.test[meta])),
        "TF-IDF": by_text.decision_function(words.transform(task.test.prompt).toarray()),
    }
    return {name: np.sign(s) * turn if pair else s for name, s in score.items()}


def _with_lift(table: pd.DataFrame, boots: dict[int, np.ndarray]) -> pd.DataFrame:
    controls = table[table.kind == "control"]
    best = controls.estimate.idxmax()
    lift = {i: boots[i] - boots[best] for i in table.index[(table.kind == "probe") & table.selected]}
    out = table.assign(best_control="", lift=np.nan, lift_low=np.nan, lift_high=np.nan)
    for i, boot in lift.items():
        low, high = np.nanpercentile(boot, [2.5, 97.5])
        out.loc[i, ["best_control", "lift", "lift_low", "lift_high"]] = [table.probe[best], table.estimate[i] - table.estimate[best], low, high]
    return out.reindex(columns=COLUMNS)
