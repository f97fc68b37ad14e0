"""Probes, side by side in one run: every layer, site and fold of the default sweep by one scikit-learn fit after another, and in batches."""

import time

import numpy as np
import pandas as pd
from results import save
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dlk_utils.metrics import auroc, resamples, weighted_auroc
from dlk_utils.probes import Logistic


def main(n: int = 225, d: int = 576, layers: int = 30, sites: int = 4, folds: int = 5, rounds: int = 3) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, n)
    strength = rng.uniform(0, 1.5, (sites, layers, 1, 1))
    X = (rng.normal(size=(sites, layers, n, d)) * np.exp(rng.normal(size=d)) + strength * (2 * y - 1)[:, None] * rng.normal(size=d) / np.sqrt(d) * 8).astype(np.float32)
    parts = list(StratifiedKFold(folds, shuffle=True, random_state=0).split(X[0, 0], y))

    def batched() -> list:
        return [[Logistic().fit(x[:, train], y[train]).decision_function(x[:, test]) for x in X] for train, test in parts]

    def looped() -> list:
        make = lambda: make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        return [[[make().fit(x[train], y[train]).decision_function(x[test]) for x in site] for site in X] for train, test in parts]

    seconds, gave = {"scikit-learn, one after another": [], "batched": []}, {}
    for _ in range(rounds):
        for way, run in (("scikit-learn, one after another", looped), ("batched", batched)):
            start = time.perf_counter()
            gave[way] = run()
            seconds[way].append(time.perf_counter() - start)
    scores = lambda way: np.array([[[auroc(np.asarray(gave[way][f][s][k], float), y[parts[f][1]]) for k in range(layers)] for s in range(sites)] for f in range(folds)])
    reference = scores("scikit-learn, one after another")
    fits = layers * sites * folds
    rows = {way: {"seconds": np.median(s), "fastest": min(s), "slowest": max(s), "fits/s": fits / np.median(s), "times as fast": np.median(seconds["scikit-learn, one after another"]) / np.median(s), "largest AUROC difference": np.abs(scores(way) - reference).max()} for way, s in seconds.items()}
    save("probes", f"Probes: {fits} logistic regressions, {layers} layers, {sites} sites, {folds} folds, {n} rows of {d} neurons", pd.DataFrame(rows).T)

    label, some = rng.integers(0, 2, 134), rng.normal(size=(500, 134))
    weights = resamples([f"e{i}" for i in range(134)], 1000, 0)
    start = time.perf_counter()
    found = np.stack([weighted_auroc(s, label, weights) for s in some])
    ours = time.perf_counter() - start
    start = time.perf_counter()
    check = np.array([roc_auc_score(label, some[0], sample_weight=w) for w in weights])
    one = time.perf_counter() - start
    table = pd.DataFrame({"scikit-learn, one resample after another (one probe measured, times 500)": {"seconds": 500 * one, "largest difference": 0.0}, "all resamples of a probe at once": {"seconds": ours, "largest difference": np.abs(found[0] - check).max()}}).T
    save("bootstrap", "Intervals: AUROC of 1,000 resamples of 500 probes, 134 test rows", table)


if __name__ == "__main__":
    main()
