"""One choice at a time: which site and feature, how states are scaled, where CCS starts, which pairs count."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from dlk_utils.evaluate import Task, TooFewRows, evaluate, make_task
from dlk_utils.metrics import auroc, earliest, interval, resamples, weighted_auroc
from dlk_utils.probes import CCS, Logistic
from dlk_utils.probes.scale import SCALES
from dlk_utils.targets import Features

COLUMNS = ["scale", "layer", "validation", "estimate", "low", "high", "n"]
GAIN_COLUMNS = ["feature", "site", "layer", "validation", "estimate", "estimate_low", "estimate_high", "n", "gain", "gain_low", "gain_high", "over_residual", "over_residual_low", "over_residual_high"]
PAIR_COLUMNS = ["pairs", "regime", "least_move", "probe", "layer", "estimate", "low", "high", "n", "best_control", "lift", "lift_low", "lift_high"]


def gain_table(task: Task, features: Features, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Logistic regression on each (feature, site) at the layer chosen on validation; `gain` is its AUROC minus that of the activation at the same site, `over_residual` minus that of the
    activation at `resid_post`, each with a 95 % interval, paired by resample of whole examples."""
    groups: dict[tuple[str, str], list] = {}
    for key in features:
        groups.setdefault(key[:2], []).append(key)
    weights, y = resamples(task.test.example_id, n_boot, seed), task.test.y.to_numpy()
    rows, boots = {}, {}
    for group, keys in groups.items():
        X = [np.stack([features[k](part) for k in keys]) for part in (task.train, task.validation, task.test)]
        probe = Logistic().fit(X[0], task.train.y.to_numpy())
        checked, best = _chosen(probe.decision_function(X[1]), task)
        score = probe.decision_function(X[2])[best]
        boots[group] = weighted_auroc(score, y, weights)
        low, high = np.nanpercentile(boots[group], [2.5, 97.5])
        rows[group] = {"feature": group[0], "site": group[1], "layer": keys[best][2], "validation": checked[best], "estimate": auroc(score, y), "estimate_low": low, "estimate_high": high, "n": len(y)}
    for group, row in rows.items():
        for name, other in (("gain", ("activation", group[1])), ("over_residual", ("activation", "resid_post"))):
            low, high = np.nanpercentile(boots[group] - boots[other], [2.5, 97.5])
            row |= {name: row["estimate"] - rows[other]["estimate"], f"{name}_low": low, f"{name}_high": high}
    return pd.DataFrame(list(rows.values()), columns=GAIN_COLUMNS)


def scale_table(task: Task, features: Features, *, seed: int = 0) -> pd.DataFrame:
    """Logistic regression under each of `SCALES`, at the layer chosen on validation: test AUROC with a 95 % interval over examples."""
    keys, rows = list(features), []
    X = [np.stack([features[k](part) for k in keys]) for part in (task.train, task.validation, task.test)]
    for scale in SCALES:
        probe = Logistic("auto", scale=scale).fit(X[0], task.train.y.to_numpy(), task.train.example_id)
        checked, best = _chosen(probe.decision_function(X[1]), task)
        score, y = probe.decision_function(X[2])[best], task.test.y.to_numpy()
        low, high = interval(score, y, task.test.example_id, seed=seed)
        rows.append(dict(zip(COLUMNS, [scale, keys[best][2], checked[best], auroc(score, y), low, high, len(y)], strict=True)))
    return pd.DataFrame(rows, columns=COLUMNS)


def restart_table(task: Task, features: Features) -> pd.DataFrame:
    """Every start of CCS by layer: its loss without labels, its test AUROC (`estimate`), and whether it was `kept`."""
    keys = list(features)
    train, test = (np.stack([features[k](part) for k in keys]) for part in (task.train, task.test))
    probe = CCS().fit(train, task.train.y.to_numpy())
    rows = []
    for (_, _, layer), losses, scores in zip(keys, probe.losses_, probe.each_start(test), strict=True):
        rows += [{"layer": layer, "start": r, "loss": float(losses[r]), "estimate": auroc(s, task.test.y.to_numpy()), "kept": r == int(losses.argmin())} for r, s in enumerate(scores)]
    return pd.DataFrame(rows)


def pair_table(kinds: Mapping[str, tuple[pd.DataFrame, Features]], least: Sequence[float], *, regimes: Sequence[str] = ("by example, truth rows", "truth rows -> lie rows"), seed: int = 0) -> pd.DataFrame:
    """For each kind of pair (its rows with `move`, its features), regime and least |move| that counts, in training and test: every pair probe at the layer chosen on validation, beside the best control."""
    tables = [pd.DataFrame(columns=PAIR_COLUMNS)]
    for name, (rows, features) in kinds.items():
        for regime in regimes:
            for smallest in least:
                try:
                    table = evaluate(make_task(rows[rows.move.abs() >= smallest], "pair", regime), features, seed=seed)
                except TooFewRows:
                    continue
                tables.append(table[(table.kind == "probe") & table.selected].assign(pairs=name, least_move=smallest)[PAIR_COLUMNS])
    return pd.concat([t for t in tables if len(t)] or tables, ignore_index=True)


def _chosen(on_validation: Float[np.ndarray, "b n"], task: Task) -> tuple[list[float], int]:
    y = task.validation.y.to_numpy()
    return [auroc(s, y) for s in on_validation], earliest(on_validation, y, task.validation.example_id)
