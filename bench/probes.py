"""Time probes: one scikit-learn fit after another, and our fits of all layers in one batch.

They are fitted on the states of real prompts, for whether the review is positive. Also timed: the
parts of the batched fits, and the intervals of many AUROCs.
"""

from itertools import chain

import numpy as np
import pandas as pd
import torch
from results import ROUNDS, THREADS, TRIAL, padded_batches, padded_plan, save, time_ways
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from dlk_utils.evaluation.stats import auroc, bootstrap_weights, weighted_auroc
from dlk_utils.extract.states import forward_states
from dlk_utils.models.loading import load_model
from dlk_utils.models.sites import SITES
from dlk_utils.probes.linear import STRENGTHS, Logistic
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.prompts import make_prompts

# The libraries below scikit-learn and numpy have thread pools of their own.
threadpool_limits(THREADS)

FIXED, TUNED = "fixed penalty", "penalty tuned inside train"
C = 0.01
REST = 0.5
"""Seconds between two ways: threads of one linear-algebra library spin for a while after use, and
would slow the other library down."""

Fold = tuple[np.ndarray, np.ndarray]


def load_features() -> tuple[list[np.ndarray], np.ndarray, list[Fold]]:
    """Take the states [layer, n, d] of each site; also return labels and five folds.

    A fold is its train rows and its test rows; the rows of an example stay together.
    """
    model, tokenizer = load_model("smollm2-liar", dtype="float32", device="cpu")
    examples = load_examples("rotten_tomatoes", 12 if TRIAL else 60)
    rows = make_prompts(examples, tokenizer).set_index("row_id", drop=False)
    plan = padded_plan(rows)
    states = [forward_states(model, batch, SITES)[0] for batch in padded_batches(rows, plan)]
    X = [torch.cat([s[site].flatten(2) for s in states], 1).numpy() for site in SITES]
    in_order = rows.loc[list(chain(*plan))]
    y = in_order.label.to_numpy()
    return X, y, make_folds(y, in_order.example_id.to_numpy())


def make_folds(y: np.ndarray, groups: np.ndarray) -> list[Fold]:
    """Split rows into five folds, groups kept together."""
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    return list(folds.split(y, y, groups))


def time_fits(
    kind: str, X: list[np.ndarray], y: np.ndarray, folds: list[Fold], rounds: int
) -> list[dict]:
    """Time the AUROCs on the test rows of each fold, at every site and layer, by either way.

    They are compared with those of scikit-learn run further, in double precision and to a gradient
    of 1e-8. Returns two rows of a table.
    """
    sequential, batched = "scikit-learn, one after another", "batched"
    ways = {
        sequential: lambda: by_scikit_learn(kind, X, y, folds),
        batched: lambda: in_batches(kind, X, y, folds),
    }
    table, values = time_ways(ways, rounds, rest=REST)
    exact = by_scikit_learn(kind, [site.astype(float) for site in X], y, folds, tol=1e-8)
    rows = []
    for way, seconds in table.seconds.items():
        difference = np.abs(values[way] - exact)
        rows.append(
            {
                "way": f"{way}, {kind}",
                "fits": exact.size,
                "seconds": seconds,
                "fits/s": exact.size / seconds,
                "times as fast": table.seconds[sequential] / seconds,
                "mean AUROC difference": difference.mean(),
                "largest AUROC difference": difference.max(),
            }
        )
    return rows


def by_scikit_learn(
    kind: str, X: list[np.ndarray], y: np.ndarray, folds: list[Fold], tol: float = 1e-4
) -> np.ndarray:
    """Fit one scikit-learn pipeline after another; return the AUROCs [fold, site, layer]."""

    def score(states: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
        probe = make_pipeline(StandardScaler(), scikit_learn_probe(kind, y[train], tol))
        probe.fit(states[train], y[train])
        return auroc(probe.decision_function(states[test]), y[test])

    return np.array(
        [[[score(states, train, test) for states in site] for site in X] for train, test in folds]
    )


def scikit_learn_probe(
    kind: str, y: np.ndarray, tol: float
) -> LogisticRegression | LogisticRegressionCV:
    """Make the logistic regression that is compared, for labels `y` of the train rows."""
    if kind == FIXED:
        return LogisticRegression(C=C, max_iter=2000, tol=tol)
    return LogisticRegressionCV(
        Cs=STRENGTHS,
        cv=make_folds(y, np.arange(len(y))),
        scoring="neg_log_loss",
        max_iter=2000,
        tol=tol,
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )


def in_batches(kind: str, X: list[np.ndarray], y: np.ndarray, folds: list[Fold]) -> np.ndarray:
    """Fit all layers of a site and fold at once; return the AUROCs [fold, site, layer]."""

    def scores(site: np.ndarray, train: np.ndarray, test: np.ndarray) -> list[float]:
        probe = Logistic(C=C if kind == FIXED else "auto").fit(site[:, train], y[train])
        of_layers = probe.decision_function(site[:, test])
        return [auroc(of_layer, y[test]) for of_layer in of_layers]

    return np.array([[scores(site, train, test) for site in X] for train, test in folds])


def time_fits_by_operation(X: list[np.ndarray], y: np.ndarray, train: np.ndarray) -> pd.DataFrame:
    """Share out the time of the batched fits by operation; shares above 3 % are kept."""
    columns = {}
    for kind, strength in ((FIXED, C), (TUNED, "auto")):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for site in X:
                Logistic(C=strength).fit(site[:, train], y[train])
        events = profile.key_averages()
        spent = pd.Series({e.key.removeprefix("aten::"): e.self_cpu_time_total for e in events})
        columns[f"share of the time, {kind}"] = spent / spent.sum()
    table = pd.DataFrame(columns).fillna(0).rename_axis("operation")
    table = table[table.max(axis=1) > 0.03]
    return table.sort_values(table.columns[0], ascending=False)


def time_intervals(n_probes: int = 500, n_rows: int = 134) -> pd.DataFrame:
    """Time the AUROCs of 1,000 resamples for many probes.

    scikit-learn is timed on one probe, and its seconds are multiplied.
    """
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, n_rows)
    scores = rng.normal(size=(n_probes, n_rows))
    weights = bootstrap_weights([f"e{i}" for i in range(n_rows)], 1000, 0)
    sequential = f"scikit-learn, one resample after another (one probe measured, times {n_probes})"
    at_once = "all resamples of a probe at once"

    def one_probe_sequential() -> np.ndarray:
        return np.array([roc_auc_score(y, scores[0], sample_weight=w) for w in weights])

    def all_probes_at_once() -> np.ndarray:
        return np.stack([weighted_auroc(s, y, weights) for s in scores])

    ways = {sequential: one_probe_sequential, at_once: all_probes_at_once}
    table, values = time_ways(ways, 1, rest=REST)
    table.loc[sequential] *= n_probes
    difference = np.abs(values[at_once][0] - values[sequential]).max()
    table["largest difference"] = pd.Series({sequential: 0.0, at_once: difference})
    return table[["seconds", "largest difference"]]


def main() -> None:
    """Write all tables."""
    X, y, folds = load_features()
    rows = time_fits(FIXED, X, y, folds, ROUNDS)
    rows += time_fits(TUNED, X, y, folds[:1], min(2, ROUNDS))
    save(
        "probes",
        f"Probes: logistic regressions, {len(X[0])} layers, {len(X)} sites, {len(y)} rows; "
        "five folds with a fixed penalty, one with a tuned one",
        pd.DataFrame(rows).set_index("way"),
    )
    train, _ = folds[0]
    by_operation = time_fits_by_operation(X, y, train)
    save("probes_profile", "Where the batched fits spend their time", by_operation)
    title = "Intervals: AUROC of 1,000 resamples of 500 probes, 134 test rows"
    save("bootstrap", title, time_intervals())


if __name__ == "__main__":
    main()
