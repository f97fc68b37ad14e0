"""Probes: estimators that read a label from hidden states.

A class is a probe, and its docstring says step by step what the method does. `fit(X, y)` learns
from training rows. `decision_function(X)` scores each row by itself, above 0 for class 1.

To add a probe, write its class in the module it belongs to, `register` it below the class, and
import a new module here. `evaluate` and the tests of all probes then run for it.
(`bilinear.PairBilinear` is not registered, as notebook 13 alone fits it.)
"""

from collections import ChainMap

from dlk_utils.probes.base import REGISTERED, fit_probe
from dlk_utils.probes.contrast import CCS, CRC, ContrastLogistic
from dlk_utils.probes.linear import LDA, TTPD, AllLayers, Logistic, MeanDifference, Principal
from dlk_utils.probes.nonlinear import MLP, ClassifierProbe, DepthConvolution, Dice
from dlk_utils.probes.pairs import Listwise, PairDirection, PairDistance, PairDual, PairRanking

STATE_PROBES = REGISTERED["state"]
"""Probes on one state per row, X [n, d] or [b, n, d]; they are fitted to every feature that has one
state per row."""

MORE_STATE_PROBES = REGISTERED["more state"]
"""Further probes on one state per row, which are fitted to the first feature and site only."""

STACK_PROBES = REGISTERED["stack"]
"""Probes on the states of all layers at once, X [b, n, d], with one score per row."""

CONTRAST_PROBES = REGISTERED["contrast"]
"""Probes on the states after either choice, X [n, 2, d] or [b, n, 2, d]."""

PAIR_PROBES = REGISTERED["pair"]
"""Probes on two draws per row, X [n, 2, d] or [b, n, 2, d], with y > 0 where draw 1 is truer."""

ALL_STATE_PROBES = ChainMap(STATE_PROBES, MORE_STATE_PROBES)
"""All probes on one state per row, also those that are registered later."""

__all__ = [
    "ALL_STATE_PROBES",
    "CCS",
    "CONTRAST_PROBES",
    "CRC",
    "LDA",
    "MLP",
    "MORE_STATE_PROBES",
    "PAIR_PROBES",
    "STACK_PROBES",
    "STATE_PROBES",
    "TTPD",
    "AllLayers",
    "ClassifierProbe",
    "ContrastLogistic",
    "DepthConvolution",
    "Dice",
    "Listwise",
    "Logistic",
    "MeanDifference",
    "PairDirection",
    "PairDistance",
    "PairDual",
    "PairRanking",
    "Principal",
    "fit_probe",
]
