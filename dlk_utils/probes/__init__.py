"""Probes, one file a method, each with scikit-learn's estimator interface and opening with its method card."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from dlk_utils.probes.contrast import CCS, CRC, ContrastLogistic
from dlk_utils.probes.dice import Dice
from dlk_utils.probes.each import nearest
from dlk_utils.probes.listwise import Listwise
from dlk_utils.probes.logistic import Logistic
from dlk_utils.probes.mean_difference import MeanDifference
from dlk_utils.probes.network import MLP, DepthConvolution
from dlk_utils.probes.pair_direction import PairDirection
from dlk_utils.probes.pair_distance import PairDistance
from dlk_utils.probes.pair_dual import PairDual
from dlk_utils.probes.pair_ranking import PairRanking
from dlk_utils.probes.principal import Principal
from dlk_utils.probes.stacked import AllLayers
from dlk_utils.probes.ttpd import TTPD

STATE_PROBES = {
    "logistic": Logistic,
    "mean_difference": MeanDifference,
    "lda": partial(MeanDifference, covariance=True),
}
"""On one state per row: `fit(X [n, d], y in {0, 1})`, then `decision_function(X)`, above 0 for class 1. Fitted on every feature."""
MORE_STATE_PROBES = {
    "logistic_tuned": partial(Logistic, C="auto"),
    "ttpd": TTPD,
    "principal": Principal,
    "nearest": nearest,
    "mlp": MLP,
    "dice": Dice,
}
"""The same, fitted on the states of one site only."""
STACK_PROBES = {"all_layers": AllLayers, "convolution": DepthConvolution}
"""On the states of all layers [b, n, d] at once: one score a row."""
CONTRAST_PROBES = {"ccs": CCS, "crc": CRC, "contrast_logistic": ContrastLogistic}
"""On the state after either choice is said: `fit(X [n, 2, d], y in {0, 1})`."""
PAIR_PROBES = {
    "pair_ranking": PairRanking,
    "pair_direction": PairDirection,
    "pair_distance": PairDistance,
    "pair_distance_mse": partial(PairDistance, kind="mse"),
    "pair_distance_margin": partial(PairDistance, kind="margin"),
    "pair_dual": PairDual,
}
"""On two draws per row: `fit(X [n, 2, d], y)` with y > 0 where draw 1 is the truer; `decision_function(X)` is above 0 there."""
ALL_STATE_PROBES = STATE_PROBES | MORE_STATE_PROBES


def fitted(
    make: Callable[[], Any], X: np.ndarray, rows: pd.DataFrame, y: np.ndarray | None = None
) -> Any:
    """A new probe, fitted on `rows` for their class `y` (their column, if not given), with the further columns that the method `needs` (TTPD: polarity)."""
    probe = make()
    return probe.fit(
        X,
        rows.y.to_numpy() if y is None else y,
        **{name: rows[name].to_numpy() for name in getattr(probe, "needs", ()) if name in rows},
    )


__all__ = [
    "ALL_STATE_PROBES",
    "CONTRAST_PROBES",
    "MORE_STATE_PROBES",
    "PAIR_PROBES",
    "STACK_PROBES",
    "STATE_PROBES",
    "Listwise",
    "Logistic",
    "MeanDifference",
    "PairDirection",
    "PairDistance",
    "PairRanking",
    "Principal",
    "fitted",
    "nearest",
]
