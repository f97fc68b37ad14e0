"""Probes, one file a method, each with scikit-learn's estimator interface and opening with its method card."""

from functools import partial

from dlk_utils.probes.each import nearest
from dlk_utils.probes.logistic import Logistic
from dlk_utils.probes.mean_difference import MeanDifference
from dlk_utils.probes.pair_direction import PairDirection
from dlk_utils.probes.pair_distance import PairDistance
from dlk_utils.probes.pair_ranking import PairRanking
from dlk_utils.probes.principal import Principal

STATE_PROBES = {"logistic": Logistic, "mean_difference": MeanDifference, "lda": partial(MeanDifference, covariance=True), "principal": Principal, "nearest": nearest}
"""On one state per row: `fit(X [n, d], y in {0, 1})`, then `decision_function(X)`, above 0 for class 1."""
PAIR_PROBES = {"pair_ranking": PairRanking, "pair_direction": PairDirection, "pair_distance": PairDistance}
"""On two draws per row: `fit(X [n, 2, d], y)` with y > 0 where draw 1 is the truer; `decision_function(X)` is above 0 there."""
