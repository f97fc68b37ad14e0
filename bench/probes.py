"""Probes, side by side in one run: every layer, site and fold of the default sweep by one scikit-learn fit after another, and in batches. On the states of real prompts, for whether the review is positive."""

import random
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from results import THREADS, prompt_rows, save
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from dlk_utils.evaluation.stats import auroc, bootstrap_weights, weighted_auroc
from dlk_utils.extract.batches import pad, plan_batches
from dlk_utils.extract.states import forward_states
from dlk_utils.models.loading import load_model
from dlk_utils.models.sites import SITES
from dlk_utils.probes import Logistic
from dlk_utils.probes.logistic import STRENGTHS

FIXED = "fixed strength"
threadpool_limits(THREADS)  # scikit-learn's and numpy's libraries too


def features() -> tuple[list[np.ndarray], np.ndarray, list]:
    """For each site the states [layer, n, d]; labels; and the train and test rows of five folds, examples kept together."""
    model, tokenizer = load_model("smollm2-liar", dtype="float32", device="cpu")
    rows = prompt_rows(tokenizer, "plain", 60)[0]
    order = [r for shard in plan_batches(rows, 2048) for batch in shard for r in batch]
    found = [
        forward_states(model, pad(list(rows.input_ids[batch])), SITES)[0]
        for shard in plan_batches(rows, 2048)
        for batch in shard
    ]
    y = rows.label[order].to_numpy()
    return (
        [np.concatenate([f[s].flatten(2).numpy() for f in found], axis=1) for s in SITES],
        y,
        folds(y, rows.example_id[order].to_numpy()),
    )


def folds(y: np.ndarray, groups: np.ndarray) -> list:
    return list(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(y, y, groups))


def turns(
    ways: dict[str, Callable[[], np.ndarray]], rounds: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Median seconds and scores of each way. They rest between turns: the threads of one linear-algebra library spin for a while, and would slow the other down."""
    seconds, gave = {w: [] for w in ways}, {}
    for i in range(rounds):
        for way, run in random.Random(i).sample(list(ways.items()), len(ways)):
            time.sleep(0.5)
            start = time.perf_counter()
            gave[way] = run()
            seconds[way].append(time.perf_counter() - start)
    return {w: float(np.median(s)) for w, s in seconds.items()}, gave


def sweep(kind: str, X: list, y: np.ndarray, parts: list, rounds: int) -> list[dict]:
    """AUROC on the test rows of each part, of every site and layer, by scikit-learn and in batches: two rows of the table. The differences are from scikit-learn run further, in double precision and to a gradient of 1e-8."""

    def one(train: np.ndarray, tol: float = 1e-4) -> object:
        if kind == FIXED:
            return LogisticRegression(C=0.01, max_iter=2000, tol=tol)
        inner = folds(y[train], np.arange(len(train)))
        return LogisticRegressionCV(
            Cs=STRENGTHS,
            cv=inner,
            scoring="neg_log_loss",
            max_iter=2000,
            tol=tol,
            l1_ratios=(0,),
            use_legacy_attributes=False,
        )

    def looped(X: list = X, tol: float = 1e-4) -> np.ndarray:
        return np.array(
            [
                [
                    [
                        auroc(
                            make_pipeline(StandardScaler(), one(train, tol))
                            .fit(x[train], y[train])
                            .decision_function(x[test]),
                            y[test],
                        )
                        for x in site
                    ]
                    for site in X
                ]
                for train, test in parts
            ]
        )

    def batched() -> np.ndarray:
        C = 0.01 if kind == FIXED else "auto"
        scores = [
            [
                Logistic(C=C).fit(site[:, train], y[train]).decision_function(site[:, test])
                for site in X
            ]
            for train, test in parts
        ]
        return np.array(
            [
                [[auroc(s, y[test]) for s in site] for site in some]
                for some, (_, test) in zip(scores, parts, strict=True)
            ]
        )

    seconds, gave = turns({"scikit-learn, one after another": looped, "batched": batched}, rounds)
    slow = seconds["scikit-learn, one after another"]
    exact = looped([site.astype(float) for site in X], tol=1e-8)
    off = {way: np.abs(found - exact) for way, found in gave.items()}
    return [
        {
            "way": f"{way}, {kind}",
            "fits": exact.size,
            "seconds": s,
            "fits/s": exact.size / s,
            "times as fast": slow / s,
            "mean AUROC difference": off[way].mean(),
            "largest AUROC difference": off[way].max(),
        }
        for way, s in seconds.items()
    ]


def profile(X: list, y: np.ndarray, train: np.ndarray) -> pd.DataFrame:
    """Shares of the batched fits' time by operation, for either way to have a strength."""
    shares = {}
    for kind, C in ((FIXED, 0.01), ("strength chosen inside train", "auto")):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            for site in X:
                Logistic(C=C).fit(site[:, train], y[train])
        spent = pd.Series(
            {e.key.removeprefix("aten::"): e.self_cpu_time_total for e in seen.key_averages()}
        )
        shares[f"share of the time, {kind}"] = spent / spent.sum()
    table = pd.DataFrame(shares).fillna(0)
    return (
        table[table.max(axis=1) > 0.03]
        .sort_values(table.columns[0], ascending=False)
        .rename_axis("operation")
    )


def intervals() -> pd.DataFrame:
    """AUROC of 1,000 resamples for 500 probes."""
    rng = np.random.default_rng(0)
    label, some = rng.integers(0, 2, 134), rng.normal(size=(500, 134))
    weights = bootstrap_weights([f"e{i}" for i in range(134)], 1000, 0)
    ways = {
        "scikit-learn, one resample after another (one probe measured, times 500)": lambda: (
            np.array([roc_auc_score(label, some[0], sample_weight=w) for w in weights])
        ),
        "all resamples of a probe at once": lambda: np.stack(
            [weighted_auroc(s, label, weights) for s in some]
        ),
    }
    seconds, gave = turns(ways, 1)
    alone, at_once = ways
    return pd.DataFrame(
        {
            alone: {"seconds": 500 * seconds[alone], "largest difference": 0.0},
            at_once: {
                "seconds": seconds[at_once],
                "largest difference": np.abs(gave[at_once][0] - gave[alone]).max(),
            },
        }
    ).T


if __name__ == "__main__":
    X, y, parts = features()
    table = pd.DataFrame(
        sweep(FIXED, X, y, parts, 3) + sweep("strength chosen inside train", X, y, parts[:1], 2)
    ).set_index("way")
    save(
        "probes",
        f"Probes: logistic regressions, {len(X[0])} layers, {len(X)} sites, {len(y)} rows; five folds, one where the strength is chosen",
        table,
    )
    save("probes_profile", "Where the batched fits spend their time", profile(X, y, parts[0][0]))
    save(
        "bootstrap", "Intervals: AUROC of 1,000 resamples of 500 probes, 134 test rows", intervals()
    )
