"""Tables of notebook 09: pairs of dropout draws, and votes of many draws."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.evaluate import evaluate
from dlk_utils.evaluation.stats import auroc, auroc_interval, earliest_good_layer
from dlk_utils.evaluation.tasks import Features, make_task
from dlk_utils.probes import Listwise, PairRanking

PAIR_COLUMNS = [
    "pairs",
    "regime",
    "least_move",
    "probe",
    "layer",
    "estimate",
    "low",
    "high",
    "n",
    "best_control",
    "lift",
    "lift_low",
    "lift_high",
]


def pair_table(
    kinds: Mapping[str, tuple[pd.DataFrame, Features]],
    least: Sequence[float],
    *,
    regimes: Sequence[str] = ("by example, truth rows", "truth rows -> lie rows"),
    seed: int = 0,
) -> pd.DataFrame:
    """For each kind of pair (its rows with `move`, its features), regime and least |move| that counts, in training and test: every pair probe at the layer chosen on validation, beside the best control."""
    tables = [pd.DataFrame(columns=PAIR_COLUMNS)]
    for name, (rows, features) in kinds.items():
        for regime in regimes:
            for smallest in least:
                try:
                    table = evaluate(
                        make_task(rows[rows.move.abs() >= smallest], "pair", regime),
                        features,
                        seed=seed,
                    )
                except TooFewRows:
                    continue
                tables.append(
                    table[(table.kind == "probe") & table.selected].assign(
                        pairs=name, least_move=smallest
                    )[PAIR_COLUMNS]
                )
    return pd.concat([t for t in tables if len(t)] or tables, ignore_index=True)


VOTE_COLUMNS = ["method", "draws", "layer", "estimate", "low", "high", "accuracy", "n"]


def vote(truer: Float[np.ndarray, "n k"], p1: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Covariance over a prompt's draws of how true each ranks and its probability of choice 1: above 0, the truer draws lean to choice 1."""
    return ((truer - truer.mean(1, keepdims=True)) * (p1 - p1.mean(1, keepdims=True))).mean(1)


def votes_table(
    parts: dict[str, pd.DataFrame],
    X: dict[str, Float[np.ndarray, "b n k d"]],
    p1: dict[str, Float[np.ndarray, "n k"]],
    layers: Sequence[int],
    *,
    ks: Sequence[int] = (2, 4, 8, 16),
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC and accuracy of votes over the first K draws of test rows, by `method` and `draws`; the layer is chosen on validation with all draws.

    `parts`, `X` and `p1` have the keys train, validation and test: rows with `y` (whether choice 1 is right), their draws' states by layer, and their draws' probability of choice 1. `listwise` is fitted on all draws of train rows,
    `pair ranking` on the first two. The control, `mean answer`, is what the draws say themselves.
    """
    y, sign = (
        {s: t.y.to_numpy() for s, t in parts.items()},
        (2 * parts["train"].y.to_numpy() - 1)[:, None],
    )
    fitted = {
        "listwise": Listwise().fit(X["train"], p1["train"] * sign),
        "pair ranking": PairRanking().fit(
            X["train"][:, :, :2], ((p1["train"][:, 1] - p1["train"][:, 0]) * sign[:, 0])
        ),
    }
    found = []

    def add(method: str, k: int, layer: int, score: np.ndarray) -> None:
        low, high = auroc_interval(score, y["test"], parts["test"].example_id, seed=seed)
        found.append(
            {
                "method": method,
                "draws": k,
                "layer": layer,
                "estimate": auroc(score, y["test"]),
                "low": low,
                "high": high,
                "accuracy": float(np.mean((score > 0) == y["test"])),
                "n": len(score),
            }
        )

    for method, probe in fitted.items():
        rank = lambda split, probe=probe: np.einsum(
            "bnkd,bd->bnk", X[split], np.asarray(probe.coef_)
        )
        best = earliest_good_layer(
            np.stack([vote(f, p1["validation"]) for f in rank("validation")]),
            y["validation"],
            parts["validation"].example_id,
        )
        truer = rank("test")[best]
        for k in ks:
            add(method, k, layers[best], vote(truer[:, :k], p1["test"][:, :k]))
    for k in (1, *ks):
        add("mean answer", k, -1, p1["test"][:, :k].mean(1) - 0.5)
    return pd.DataFrame(found, columns=VOTE_COLUMNS)
