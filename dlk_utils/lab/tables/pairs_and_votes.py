"""Tables of notebook 09: which of two dropout draws is the truer, and the votes of many draws."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.special import expit
from torch import Tensor

from dlk_utils.evaluation.evaluate import evaluate_tasks, possible_tasks
from dlk_utils.evaluation.selection import FittingRows, in_memory, stack_layers
from dlk_utils.evaluation.tasks import Features, Task, pair_features, pair_rows, regimes_of
from dlk_utils.extract.store import read_rows
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import empty_if_too_few, estimate_with_interval, lying_task
from dlk_utils.probes import Listwise, PairRanking
from dlk_utils.probes.base import Probe, TrainingStates

# Pairs.

PairKinds = Mapping[str, tuple[pd.DataFrame, Features]]
"""The rows and the features of each kind of pair."""
LEAST_MOVES = (0.0, 0.01, 0.05, 0.1)
"""How far the probability of choice 1 has to move for a pair to count."""
PAIR_REGIMES = regimes_of("pair")
PAIR_COLUMNS = [
    *("pairs", "regime", "least_move", "probe", "layer", "estimate", "low", "high"),
    *("n", "n_smaller"),
    *("best_control", "lift", "lift_low", "lift_high"),
]


@kept("09-pairs")
def pairs(run: Run, *, p: float, p_last: float, n_draws: int, layers: list[int]) -> pd.DataFrame:
    """Tell the truer pass of two by every pair probe; see `pair_kinds` and `pair_table`."""
    kinds = pair_kinds(run, p=p, p_last=p_last, n_draws=n_draws, layers=layers)
    return pair_table(kinds, LEAST_MOVES, seed=run.seed)


def pair_kinds(run: Run, *, p: float, p_last: float, n_draws: int, layers: list[int]) -> PairKinds:
    """Return the rows and features of each kind of pair.

    Draws of the complete prompt have dropout probability `p`, those of the last token `p_last`. In
    a counterfactual pair the second pass is moved at the middle layer; its features begin there.
    """
    of_prompt = run.draws(p=p)
    of_last_token = run.draws(p=p_last, n_draws=n_draws, scope="last_token", layers=layers)
    clean_and_moved = run.gradients()
    from_there_on = [layer for layer in layers if layer >= run.middle_layer]

    rows = run.truth_rows[run.truth_rows.row_id.isin(run.dropout_rows.row_id)]
    prompt_rows = pair_rows(rows, of_prompt)
    last_rows = pair_rows(rows, of_last_token)
    moved_rows = pair_rows(rows, clean_and_moved, plain=True)
    moved_features = pair_features("counterfactual", clean_and_moved, from_there_on)
    return {
        "draws, sequence": (prompt_rows, pair_features("two draws", of_prompt, layers)),
        "draws, by their move": (prompt_rows, pair_features("two draws / move", of_prompt, layers)),
        "draws, last token": (last_rows, pair_features("two draws", of_last_token, layers)),
        "counterfactual": (moved_rows, moved_features),
    }


def move_counts(kinds: PairKinds) -> pd.DataFrame:
    """Count by kind and role the pairs that moved at least so far, and towards the truth."""
    counts = {}
    for kind, (all_rows, _) in kinds.items():
        for role, rows in all_rows.groupby("role"):
            counts[kind, role] = {
                f"rows that moved {least:.0%}": (rows.move.abs() >= least).sum()
                for least in LEAST_MOVES
            }
            counts[kind, role]["towards the truth"] = (rows.move > 0).mean()
    index = pd.MultiIndex.from_tuples(list(counts), names=["pairs", "asks for"])
    return pd.DataFrame(list(counts.values()), index=index)


def pair_table(kinds: PairKinds, least_moves: Sequence[float], *, seed: int = 0) -> pd.DataFrame:
    """Score every pair probe on every kind of pair, each with its best control.

    A row counts, in training and test, if its |`move`| is at least that of `least_moves`.
    Combinations with too few rows are left out.
    """
    tables = []
    for kind, (rows, stored_features) in kinds.items():
        features = in_memory(stored_features, rows)
        by_regime: dict[str, list[pd.DataFrame]] = {regime: [] for regime in PAIR_REGIMES}
        for least_move in least_moves:
            tasks = possible_tasks(rows[rows.move.abs() >= least_move], "pair")
            for task, table in zip(tasks, evaluate_tasks(tasks, features, seed=seed), strict=True):
                table = table[(table.kind == "probe") & table.selected]
                table = table.assign(pairs=kind, least_move=least_move)[PAIR_COLUMNS]
                by_regime[task.regime].append(table)
        tables += itertools.chain(*by_regime.values())
    return pd.concat(tables or [pd.DataFrame(columns=PAIR_COLUMNS)], ignore_index=True)


# Votes of many draws.

VOTE_SIZES = (2, 4, 8, 16, 32)
"""How many draws vote."""
VOTE_COLUMNS = ["method", "draws", "layer", "estimate", "low", "high", "accuracy", "n", "n_smaller"]


@kept("09-votes")
@empty_if_too_few(VOTE_COLUMNS)
def votes(run: Run, *, layers: list[int], p: float, n_draws: int = 16) -> pd.DataFrame:
    """Read truth from the votes of many draws of the last token; see `vote_table`."""
    task = lying_task(run)
    # Draws are taken of twins, not of the further honest rows.
    twins = {
        split: rows[rows.role != "known"].reset_index(drop=True)
        for split, rows in vars(task).items()
        if split in ("train", "validation", "test")
    }
    folder = run.draws(p=p, n_draws=n_draws, scope="last_token", layers=layers)
    features = {
        ("draws", "resid_post", layer): partial(_read_draws, folder, layer, n_draws)
        for layer in layers
    }
    return vote_table(dataclasses.replace(task, **twins), features, seed=run.seed)


def _read_draws(
    folder: Path, layer: int, n_draws: int, rows: pd.DataFrame
) -> Float[np.ndarray, "n k width"]:
    """States of the draws of each row, and in the last column their probability of choice 1."""
    draws = []
    for k in range(n_draws):
        states = read_rows(folder, rows, f"activation.resid_post.{layer}.{k}")
        logprobs = read_rows(folder, rows, f"choice_logprobs.{k}").astype(float)
        draws.append(np.column_stack([states, expit(logprobs[:, 1] - logprobs[:, 0])]))
    return np.stack(draws, axis=1)


class DrawVotes(Probe):
    """A probe of truth in which the draws of each row vote: do the truer ones lean to choice 1?

    X is [n, k, d + 1] or [b, n, k, d + 1]: the states of k draws, and in the last column their
    probability of choice 1. A score above 0 speaks for choice 1.

    Parameters
    ----------
    fit_ranker
        Fits a probe with `coef_` [b, d] to states [b, n, k, d] and to how far each draw leans
        towards the truth [n, k].
    """

    _ndim = 4

    def __init__(self, fit_ranker: Callable[[Tensor, Tensor], Any]):
        self.fit_ranker = fit_ranker

    def _fit(self, states: TrainingStates, y: Float[Tensor, " n"]) -> None:
        X = states.X
        p1 = X[0, ..., -1]
        self.ranker_ = self.fit_ranker(X[..., :-1], p1 * (2 * y - 1)[:, None])

    def _score(self, X: Float[Tensor, "b n k d"]) -> Float[Tensor, "b n"]:
        truer = torch.einsum("bnkd,bd->bnk", X[..., :-1], self.ranker_.coef_)
        return vote(truer, X[..., -1])


def vote(truer: Float[Tensor, "... k"], p1: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """Return the covariance over k draws of how true each ranks and its probability of choice 1."""
    truer = truer - truer.mean(-1, keepdim=True)
    return (truer * (p1 - p1.mean(-1, keepdim=True))).mean(-1)


def _rank_all_draws(states: Tensor, towards_truth: Tensor) -> Listwise:
    return Listwise().fit(states, towards_truth)


def _rank_two_draws(states: Tensor, towards_truth: Tensor) -> PairRanking:
    return PairRanking().fit(states[:, :, :2], towards_truth[:, 1] - towards_truth[:, 0])


RANKERS = {"listwise": _rank_all_draws, "pair ranking": _rank_two_draws}


def vote_table(task: Task, features: Features, *, seed: int = 0) -> pd.DataFrame:
    """Score the votes of the first few draws of the test rows, and of more.

    The layer is the earliest good one with all draws: no draws are taken of the twins of validation
    rows that are told to lie. The control is the "mean answer" of the draws themselves.

    Parameters
    ----------
    task
        Its `y` is 1 where choice 1 is right.
    features
        By layer, the draws [n, k, d + 1] that `DrawVotes` takes.
    seed
        Of the bootstrap.
    """
    draws = stack_layers(features, task.test)
    sizes = [size for size in VOTE_SIZES if size <= draws.shape[2]]
    y = task.test.y.to_numpy()
    table = []

    def add(method: str, size: int, layer: int, scores: np.ndarray) -> None:
        row = {"method": method, "draws": size, "layer": layer}
        accuracy = float(np.mean((scores > 0) == y))
        estimate = estimate_with_interval(scores, task.test, seed=seed)
        table.append({**row, "accuracy": accuracy, **estimate})

    fitting_rows = FittingRows.read(features, task.train, task.validation)
    for method, fit_ranker in RANKERS.items():
        fitted = fitting_rows.fit(partial(DrawVotes, fit_ranker))
        for size in sizes:
            scores = fitted.probe.decision_function(draws[:, :, :size])[fitted.chosen]
            add(method, size, fitted.layer, scores)
    for size in (1, *sizes):
        mean_answer = draws[0, :, :size, -1].mean(axis=1)
        add("mean answer", size, -1, mean_answer - 0.5)
    return pd.DataFrame(table, columns=VOTE_COLUMNS)
