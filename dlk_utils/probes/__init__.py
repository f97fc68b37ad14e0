"""Probes, one file a method, each with scikit-learn's estimator interface and opening with its method card."""

from dlk_utils.probes.logistic import logistic
from dlk_utils.probes.mean_difference import MeanDifference
from dlk_utils.probes.pair_distance import PairDistance
from dlk_utils.probes.pair_ranking import PairRanking

STATE_PROBES = {"logistic": logistic, "mean_difference": MeanDifference}
"""On one state per row: `fit(X [n, d], y in {0, 1})`, then `decision_function(X)`, above 0 for class 1."""
PAIR_PROBES = {"pair_ranking": PairRanking, "pair_distance": PairDistance}
"""On two draws per row: `fit(X [n, 2, d], y)` with y > 0 where draw 1 is the truer; `decision_function(X)` is above 0 there."""
