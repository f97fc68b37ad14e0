"""Tables of notebook 13: can dropout draws be ranked by truth, in a model trained with dropout?

A *ranker* scores every two draws of a row: which of them is nearer to the truth? Its *concordance*
is the share of pairs of draws that it puts in the right order. Intervals resample rows, with all
their draws. Rankers are fitted on honest rows, and the criterion of success was fixed at the start:
the lower end of the 95 % interval of a ranker's concordance minus that of the better of two
controls is above 0.

Each control guesses once for each row which choice is right, and ranks that draw as the truer one
which gives this choice the higher probability. (Of two draws, the one with the higher probability
of choice 1 *leans* to choice 1.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import norm

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation import tasks
from dlk_utils.evaluation.controls import TURNED
from dlk_utils.evaluation.selection import fit_layers, fit_task, stack_layers, twin_rows
from dlk_utils.evaluation.stats import (
    bootstrap_weights,
    mean_interval,
    percentile_interval,
    smaller_class,
)
from dlk_utils.evaluation.tasks import make_task, memory_features, require_rows, select_rows
from dlk_utils.extract.stages import store_draws
from dlk_utils.extract.store import read_rows
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import empty_if_too_few, estimate_with_interval, lying_task
from dlk_utils.lab.tables.dropout_damage import (
    HONEST_ROWS,
    LYING_ROWS,
    damage_table,
    share_of_choice_1,
)
from dlk_utils.probes import Listwise, Logistic, PairRanking
from dlk_utils.probes.bilinear import PairBilinear

LINEAR, BILINEAR, LISTWISE = "linear", "bilinear", "list-wise"
SHUFFLED = "bilinear, shuffled labels"
TRUTH_PROBE = "probe of truth"
GUESSES = (TURNED, TRUTH_PROBE)
"""Names of guesses which choice is right, made from a row without its draws.

A control ranks the draws of a row by such a guess times which draw leans to choice 1.
"""

BIG_MOVE = 0.1
"""How far the probability of choice 1 moves between the two draws of a big move."""
FEWEST_PAIRS = 10
"""With fewer pairs of training draws nothing is fitted."""
Z95 = float(norm.ppf(0.975))
SE_TO_SEE = Z95 + float(norm.ppf(0.8))
"""An effect of so many standard errors (2.8) is found four times out of five at the 95 % level."""

RANKING_COLUMNS = [
    *("scope", "rows", "least_move", "ranker", "layer"),
    *("estimate", "low", "high", "n", "n_smaller", "n_pairs", "visible"),
    *("best_control", "lift", "lift_low", "lift_high", "visible_lift"),
]
DAMAGE_COLUMNS = [
    *("scope", "p", "rows", "n", "as_told", "as_told_in_a_draw"),
    *("lost", "lost_low", "lost_high", "flips", "flips_low", "flips_high", "big_moves"),
]
VOTE_COLUMNS = ["scope", "rows", "method", "layer", "estimate", "low", "high", "n", "n_smaller"]
DROPPED_COLUMNS = ["scope", "p", "rows", "layer", "estimate", "low", "high", "n", "n_smaller"]

Scopes = Mapping[str, Mapping[str, Any]]
"""For each scope of draws, `p`, and how many draws the rows have to fit on and to test on.

For example {"last_token": {"p": 0.1, "fit_draws": 8, "test_draws": 16}}.
"""
PairScores = Callable[[Float[np.ndarray, "layer n k d"]], Float[np.ndarray, "layer n k k"]]
"""Scores of every two draws of a row: [..., i, j] is above 0 where j ranks as the truer."""


def scopes_of(
    *, p_dropout: float, n_prompt_draws: int, p_last: float, n_draws: int
) -> dict[str, dict[str, Any]]:
    """Return the `Scopes` of the notebook: draws of the complete prompt, and of its last token.

    `n_prompt_draws` and `n_draws` count the draws of a test row; rows to fit on have half as many.
    """
    drawn = {"sequence": (p_dropout, n_prompt_draws), "last_token": (p_last, n_draws)}
    return {
        scope: {"p": p, "fit_draws": max(2, n // 2), "test_draws": n}
        for scope, (p, n) in drawn.items()
    }


@dataclass(frozen=True)
class Draws:
    """Some rows with their dropout draws.

    Attributes
    ----------
    rows
        Rows with `example_id` and `label`.
    states
        States of the draws at some layers [layer, n, k, d].
    p1
        Probability of choice 1 in each draw [n, k].
    """

    rows: pd.DataFrame
    states: Float[np.ndarray, "layer n k d"]
    p1: Float[np.ndarray, "n k"]

    @property
    def towards_truth(self) -> Float[np.ndarray, "n k"]:
        """The probability of choice 1, with a minus where choice 0 is right."""
        return self.p1 * (2 * self.rows.label.to_numpy()[:, None] - 1)

    @property
    def moves(self) -> Float[np.ndarray, "n k k"]:
        """How much nearer to the truth draw j is than draw i, in [..., i, j]."""
        return _differences(self.towards_truth)

    @property
    def leans(self) -> Float[np.ndarray, "n k k"]:
        """How much further draw j leans to choice 1 than draw i, in [..., i, j]."""
        return _differences(self.p1)

    def shuffled(self, seed: int) -> "Draws":
        """Return the same draws of rows whose labels are shuffled."""
        labels = np.random.default_rng(seed).permutation(self.rows.label)
        return Draws(self.rows.assign(label=labels), self.states, self.p1)


def _differences(values: Float[np.ndarray, "... k"]) -> Float[np.ndarray, "... k k"]:
    return values[..., None, :] - values[..., :, None]


# Rankers.


def fit_linear(train: Draws, least_move: float) -> PairScores:
    """Fit `PairRanking` to pairs of neighbouring draws that moved at least so far."""
    pairs, moves, _ = _neighbours(train, least_move)
    return _scores_of_linear(PairRanking().fit(pairs, moves))


def fit_bilinear(train: Draws, least_move: float) -> PairScores:
    """Fit `PairBilinear` to pairs of neighbouring draws that moved at least so far."""
    probe = PairBilinear().fit(*_neighbours(train, least_move))

    def score(X: Float[np.ndarray, "layer n k d"]) -> Float[np.ndarray, "layer n k k"]:
        return probe.score_all_pairs(torch.from_numpy(X).double()).numpy()

    return score


def fit_listwise(train: Draws, least_move: float) -> PairScores:
    """Fit `Listwise` to all draws of each row; `least_move` has to be 0."""
    return _scores_of_linear(Listwise().fit(train.states, train.towards_truth))


RANKERS = {LINEAR: fit_linear, BILINEAR: fit_bilinear, LISTWISE: fit_listwise}


def _scores_of_linear(probe: PairRanking | Listwise) -> PairScores:
    def score(X: Float[np.ndarray, "layer n k d"]) -> Float[np.ndarray, "layer n k k"]:
        return _differences(np.einsum("lnkd,ld->lnk", X.astype(float), probe.coef_.numpy()))

    return score


def _neighbours(
    draws: Draws, least_move: float
) -> tuple[Float[np.ndarray, "layer m 2 d"], Float[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Return pairs of each draw with the next one; how much truer the second is; and the labels.

    The difference of any two draws of a row is a sum of differences of neighbours. With a
    `least_move`, the neighbours that moved less are left out, and so may be parts of such sums.
    """
    states = np.stack([draws.states[:, :, :-1], draws.states[:, :, 1:]], axis=3)
    pairs = states.reshape(len(states), -1, *states.shape[3:])
    moves = np.diff(draws.towards_truth, axis=1).ravel()
    labels = draws.rows.label.to_numpy().repeat(states.shape[2])
    is_counted = (np.abs(moves) >= least_move) & (moves != 0)
    if is_counted.sum() < FEWEST_PAIRS or len(set(labels[is_counted])) < 2:
        raise TooFewRows(
            f"pairs of draws: expected at least {FEWEST_PAIRS} training pairs that moved by "
            f"{least_move}, of rows of both classes, got {int(is_counted.sum())}; ask for more "
            "examples (n_examples) or draws."
        )
    return pairs[:, is_counted], moves[is_counted], labels[is_counted]


@dataclass(frozen=True)
class FittedRanker:
    """A ranker at the layer that validation rows chose.

    Attributes
    ----------
    place, layer
        The place of the layer among those of the draws, and its number.
    score
        See `PairScores`.
    """

    place: int
    layer: int
    score: PairScores

    def score_pairs(self, draws: Draws) -> Float[np.ndarray, "n k k"]:
        """Score every two draws of each row; see `PairScores`."""
        return self.score(draws.states)[self.place]


def fit_ranker(
    fit: Callable[[Draws, float], PairScores],
    train: Draws,
    validation: Draws,
    layers: Sequence[int],
    *,
    least_move: float = 0.0,
) -> FittedRanker:
    """Fit a ranker at every layer, and choose the one with the best concordance on validation rows.

    (The earliest layer within one standard error of it, as in `stats.earliest_good_layer`, would
    often be the first: concordances of few rows differ little.)

    Raises `TooFewRows` if there are too few pairs of training draws, or if no pair of validation
    draws counts.
    """
    score = fit(train, least_move)
    in_order, n_pairs = pairs_in_order(score(validation.states), validation.moves, least_move)
    if not n_pairs.any():
        raise TooFewRows(
            f"pairs of draws: expected validation pairs that moved by {least_move}, to choose a "
            "layer by, got none; ask for more examples (n_examples) or draws."
        )
    concordance = _shares(in_order, n_pairs, np.ones((1, len(n_pairs))))[:, 0]
    place = int(concordance.argmax())
    return FittedRanker(place, layers[place], score)


# Concordance.


def pairs_in_order(
    scores: Float[np.ndarray, "... n k k"], moves: Float[np.ndarray, "n k k"], least_move: float
) -> tuple[Float[np.ndarray, "... n"], Float[np.ndarray, " n"]]:
    """Count for each row the pairs of draws that are scored in the right order, and all its pairs.

    Only pairs that moved by at least `least_move` count. Equal scores are half in order.
    """
    first, second = np.triu_indices(moves.shape[-1], k=1)
    move, score = moves[..., first, second], scores[..., first, second]
    is_counted = (np.abs(move) >= least_move) & (move != 0)
    in_order = (np.sign(score) * np.sign(move) + 1) / 2
    return (in_order * is_counted).sum(-1), is_counted.sum(-1).astype(float)


def _shares(
    in_order: Float[np.ndarray, "... n"],
    n_pairs: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "b n"],
) -> Float[np.ndarray, "... b"]:
    """The concordance under each of `b` weightings of the rows; nan where no pair counts."""
    pairs = weights @ n_pairs
    return in_order @ weights.T / np.where(pairs > 0, pairs, np.nan)


def _interval_and_error(
    resampled: Float[np.ndarray, " b"], n_rows: int, bounds: tuple[float, float]
) -> tuple[float, float, float]:
    """The ends of the 95 % interval, and the standard error, of a share or a difference of shares.

    Where resampling shows no spread, however few rows there are, the interval is that of
    `stats.mean_interval`: as wide as Wilson's interval of "all of them", out to the `bounds` of
    possible values. The standard error is then as large as such an interval would have it.
    """
    low, high = percentile_interval(resampled)
    if high - low > 1e-12:
        return low, high, float(np.nanstd(resampled))
    same = np.full(n_rows, low)
    low, high = mean_interval(same, np.arange(n_rows), bounds=bounds)
    return low, high, (high - low) / (2 * Z95)


def lean_scores(guess: Float[np.ndarray, " n"], draws: Draws) -> Float[np.ndarray, "n k k"]:
    """Rank that draw as the truer one which leans to the guess; a guess above 0 is choice 1."""
    return np.sign(guess)[:, None, None] * draws.leans


def control_name(guess: str) -> str:
    """Name the control that ranks draws by one of `GUESSES`."""
    return f"{guess} x which draw leans to choice 1"


def concordance_table(
    rankers: Mapping[str, Float[np.ndarray, "n k k"]],
    guesses: Mapping[str, Float[np.ndarray, " n"]],
    draws: Draws,
    *,
    least_move: float = 0.0,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Tabulate the concordance of rankers and controls on the same test rows.

    Parameters
    ----------
    rankers
        The scores of every two draws of each row, by the name of the ranker.
    guesses
        Which choice is right according to each of `GUESSES`: above 0 for choice 1.

    Returns
    -------
    DataFrame
        By `ranker`: the concordance `estimate` with its 95 % interval (`low`, `high`), the number
        `n` of rows with a pair that counts, how many of them are of the smaller class
        (`n_smaller`), and `n_pairs`; `best_control`, the better of the controls, and `lift`, how
        far the ranker lies above it, with its interval, paired by row. `visible` and
        `visible_lift` are the least concordance above one half, and the least lift above 0, that
        would be found four times out of five: `SE_TO_SEE` times the standard error at the observed
        score. A `visible_lift` may be more than the room that the control leaves (1 minus its
        concordance). The table is empty if no pair counts.
    """
    controls = {control_name(name): lean_scores(guess, draws) for name, guess in guesses.items()}
    weights = bootstrap_weights(draws.rows.example_id, n_boot, seed)
    once = np.ones((1, len(draws.rows)))
    _, n_pairs = pairs_in_order(draws.moves, draws.moves, least_move)
    if not n_pairs.any():
        return pd.DataFrame()
    has_pair = n_pairs > 0
    n_rows, labels = int(has_pair.sum()), draws.rows.label.to_numpy()[has_pair]
    sizes = {"n": n_rows, "n_smaller": smaller_class(labels), "n_pairs": int(n_pairs.sum())}
    estimates, resampled = {}, {}
    for name, scores in {**rankers, **controls}.items():
        in_order, _ = pairs_in_order(scores, draws.moves, least_move)
        estimates[name] = float(_shares(in_order, n_pairs, once)[0])
        resampled[name] = _shares(in_order, n_pairs, weights)
    best = max(controls, key=lambda name: estimates[name])
    table = []
    for name, estimate in estimates.items():
        low, high, error = _interval_and_error(resampled[name], n_rows, (0.0, 1.0))
        row = {"ranker": name, "estimate": estimate, "low": low, "high": high} | sizes
        row["visible"] = min(1.0, 0.5 + SE_TO_SEE * error)
        if name in rankers:
            differences = resampled[name] - resampled[best]
            lift_low, lift_high, error = _interval_and_error(differences, n_rows, (-1.0, 1.0))
            row |= {"best_control": best, "lift": estimate - estimates[best]}
            row |= {"lift_low": lift_low, "lift_high": lift_high}
            row["visible_lift"] = SE_TO_SEE * error
        table.append(row)
    return pd.DataFrame(table)


def rank_table(
    train: Draws,
    validation: Draws,
    tests: Mapping[str, Draws],
    guesses: Mapping[str, Mapping[str, Float[np.ndarray, " n"]]],
    layers: Sequence[int],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit every ranker on the training draws, and score it on the test draws.

    All rankers are fitted to all pairs, and the bilinear one also to shuffled labels (shuffled
    once; those of the test rows stay as they are). The linear and the bilinear one are fitted again
    to big moves only, where there are enough of them.

    Parameters
    ----------
    tests, guesses
        For each kind of test rows, their draws, and which choice is right according to each of
        `GUESSES`: above 0 for choice 1.
    layers
        The numbers of the layers of the draws.

    Returns
    -------
    DataFrame
        The columns of `concordance_table`, and `rows` (the kind of test rows), `least_move` and
        `layer` (nan for controls).

    Raises
    ------
    TooFewRows
        If there are too few pairs of draws to fit rankers to, or to score them on.
    """
    tables = []
    for least_move in (0.0, BIG_MOVE):
        fitted: dict[str, FittedRanker] = {}
        rankers = RANKERS if least_move == 0 else {LINEAR: fit_linear, BILINEAR: fit_bilinear}
        try:
            for name, fit in rankers.items():
                fitted[name] = fit_ranker(fit, train, validation, layers, least_move=least_move)
            if least_move == 0:
                shuffled = train.shuffled(seed), validation.shuffled(seed + 1)
                fitted[SHUFFLED] = fit_ranker(fit_bilinear, *shuffled, layers)
        except TooFewRows:
            if least_move == 0:
                raise
            continue
        for kind, draws in tests.items():
            scores = {name: ranker.score_pairs(draws) for name, ranker in fitted.items()}
            options = {"least_move": least_move, "seed": seed}
            table = concordance_table(scores, guesses[kind], draws, **options)
            if len(table):
                layer = [fitted[k].layer if k in fitted else np.nan for k in table.ranker]
                tables.append(table.assign(rows=kind, least_move=least_move, layer=layer))
    if not tables:
        raise TooFewRows(
            "pairs of draws: expected test pairs whose answer moved, got none; ask for more "
            "examples (n_examples) or draws."
        )
    return pd.concat(tables, ignore_index=True)


# The tables of a run.


@dataclass(frozen=True)
class Trial:
    """The draws of one scope: of honest rows to fit on, and of both kinds of test rows."""

    train: Draws
    validation: Draws
    tests: dict[str, Draws]


def read_trial(run: Run, scope: str, how: Mapping[str, Any], layers: list[int]) -> Trial:
    """Make the draws of a scope, or read them; `how` is an entry of `Scopes`.

    Raises `TooFewRows` if a split has too few rows of a class.
    """
    drawn = run.truth_rows[run.truth_rows.row_id.isin(run.dropout_rows.row_id)]
    task = make_task(drawn, "truth", tasks.LYING)
    options = {"p": how["p"], "scope": scope, "layers": layers, "seed": run.seed}
    honest_test = select_rows(drawn, "truth", "test")
    require_rows({"test": honest_test}, f"truth, {HONEST_ROWS}")

    def draws_of(parts: Mapping[str, pd.DataFrame], n_draws: int, name: str) -> dict[str, Draws]:
        rows = pd.concat(parts.values())
        folder = run.stored(store_draws, rows, name, n_draws=n_draws, **options)
        return {part: _read_draws(folder, some, layers, n_draws) for part, some in parts.items()}

    to_fit_on = {"train": task.train, "validation": task.validation}
    fitting = draws_of(to_fit_on, how["fit_draws"], "13-fit-draws")
    tests = {HONEST_ROWS: honest_test, LYING_ROWS: task.test}
    return Trial(**fitting, tests=draws_of(tests, how["test_draws"], "13-test-draws"))


def _read_draws(folder: Path, rows: pd.DataFrame, layers: list[int], n_draws: int) -> Draws:
    numbers = range(n_draws)
    logprobs = [read_rows(folder, rows, f"choice_logprobs.{draw}") for draw in numbers]
    states = [
        np.stack([read_rows(folder, rows, f"activation.resid_post.{i}.{k}") for k in numbers], 1)
        for i in layers
    ]
    return Draws(rows, np.stack(states), share_of_choice_1(np.stack(logprobs, 1)))


def _guess(run: Run, layers: list[int]) -> Callable[[pd.DataFrame], dict[str, np.ndarray]]:
    """Return a function that guesses which choice is right in rows, by each of `GUESSES`.

    The probe of truth is the book's: it is fitted on honest states without dropout. Its scores of
    rows told to lie are shifted by as much as those of validation rows differ from their twins',
    which needs no label.
    """
    task = lying_task(run)
    probe = fit_task(Logistic, run.states(layers), task)
    honest, lying = twin_rows(pd.concat([task.validation, task.twins]))
    shift = probe.score(lying).mean() - probe.score(honest).mean() if len(lying) else 0.0

    def guess(rows: pd.DataFrame) -> dict[str, np.ndarray]:
        told_to_lie = (rows.role == "lie").to_numpy()
        margin = rows.margin.to_numpy(float)
        return {
            TURNED: np.where(told_to_lie, -margin, margin),
            TRUTH_PROBE: probe.score(rows) - shift * told_to_lie,
        }

    return guess


@kept("13-rankings")
@empty_if_too_few(RANKING_COLUMNS)
def rankings(run: Run, *, scopes: Scopes, layers: list[int]) -> pd.DataFrame:
    """Rank the draws of each scope; see `rank_table`."""
    guess = _guess(run, layers)
    tables = []
    for scope, how in scopes.items():
        trial = read_trial(run, scope, how, layers)
        guesses = {kind: guess(draws.rows) for kind, draws in trial.tests.items()}
        parts = (trial.train, trial.validation, trial.tests, guesses, layers)
        tables.append(rank_table(*parts, seed=run.seed).assign(scope=scope))
    return pd.concat(tables, ignore_index=True)[RANKING_COLUMNS]


@kept("13-damage")
@empty_if_too_few(DAMAGE_COLUMNS)
def damage(run: Run, *, scopes: Scopes, layers: list[int]) -> pd.DataFrame:
    """Tabulate what dropout does to the answers of test rows; see `damage_table`.

    `big_moves` is the share of pairs of draws that moved by at least `BIG_MOVE`.
    """
    tables = []
    for scope, how in scopes.items():
        tests = list(read_trial(run, scope, how, layers).tests.values())
        rows = pd.concat([draws.rows for draws in tests])
        table = damage_table(rows, np.concatenate([draws.p1 for draws in tests]))
        first, second = np.triu_indices(how["test_draws"], k=1)
        moves = [np.abs(draws.moves[:, first, second]) for draws in tests]
        big_moves = [(move >= BIG_MOVE).mean() for move in (*moves, np.concatenate(moves))]
        tables.append(table.assign(scope=scope, p=how["p"], big_moves=big_moves))
    return pd.concat(tables, ignore_index=True)[DAMAGE_COLUMNS]


@kept("13-votes")
@empty_if_too_few(VOTE_COLUMNS)
def votes(run: Run, *, scopes: Scopes, layers: list[int]) -> pd.DataFrame:
    """Read the truth of test rows from the votes of their draws; see `vote_table`."""
    guess = _guess(run, layers)
    tables = []
    for scope, how in scopes.items():
        trial = read_trial(run, scope, how, layers)
        rankers = {
            name: fit_ranker(fit, trial.train, trial.validation, layers)
            for name, fit in RANKERS.items()
        }
        for kind, draws in trial.tests.items():
            table = vote_table(rankers, draws, guess(draws.rows), seed=run.seed)
            tables.append(table.assign(scope=scope, rows=kind))
    return pd.concat(tables, ignore_index=True)[VOTE_COLUMNS]


def vote_table(
    rankers: Mapping[str, FittedRanker],
    draws: Draws,
    guesses: Mapping[str, Float[np.ndarray, " n"]],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Score whether the draws that rank as truer lean to choice 1, as a guess of what is true.

    The vote of a row is the mean over its pairs of draws of the ranker's score times how much
    further the second draw leans to choice 1. The rivals are the guesses of the controls, which
    need no draw.
    """
    rows = draws.rows.assign(y=draws.rows.label)
    first, second = np.triu_indices(draws.p1.shape[1], k=1)
    table = []
    for name, ranker in rankers.items():
        of_pairs = (ranker.score_pairs(draws) * draws.leans)[:, first, second]
        found = estimate_with_interval(of_pairs.mean(1), rows, seed=seed)
        table.append({"method": f"votes, {name}", "layer": ranker.layer} | found)
    for name, guess in guesses.items():
        found = estimate_with_interval(guess, rows, seed=seed)
        table.append({"method": name, "layer": np.nan} | found)
    return pd.DataFrame(table)


@kept("13-dropped")
@empty_if_too_few(DROPPED_COLUMNS)
def dropped_or_not(run: Run, *, scopes: Scopes, layers: list[int]) -> pd.DataFrame:
    """Tell states of draws from states without dropout, on unseen rows; see `dropped_table`."""
    states = run.states(layers)
    tables = []
    for scope, how in scopes.items():
        trial = read_trial(run, scope, how, layers)
        parts = {"train": trial.train, "validation": trial.validation, **trial.tests}
        clean = {name: stack_layers(states, draws.rows) for name, draws in parts.items()}
        table = dropped_table(parts, clean, layers, seed=run.seed)
        tables.append(table.assign(scope=scope, p=how["p"]))
    return pd.concat(tables, ignore_index=True)[DROPPED_COLUMNS]


def dropped_table(
    parts: Mapping[str, Draws],
    clean: Mapping[str, Float[np.ndarray, "layer n d"]],
    layers: Sequence[int],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit a probe for "is this state one with dropout?", and score it on unseen rows.

    Each row gives its clean state and its first draw. The probe is fitted on the part "train", its
    layer is chosen on "validation", and it is scored on the other parts.
    """
    rows_of, states = {}, []
    for name, draws in parts.items():
        with_dropout = draws.rows.assign(row_id=draws.rows.row_id + " dropped", y=1)
        rows_of[name] = pd.concat([draws.rows.assign(y=0), with_dropout], ignore_index=True)
        states += [clean[name], draws.states[:, :, 0]]
    all_states = {"resid_post": np.concatenate(states, axis=1)}
    features = memory_features(pd.concat(rows_of.values()), all_states, layers=layers)
    probe = fit_layers(Logistic, features, rows_of.pop("train"), rows_of.pop("validation"))
    table = []
    for name, some in rows_of.items():
        found = estimate_with_interval(probe.score(some), some, seed=seed)
        table.append({"rows": name, "layer": probe.layer} | found)
    return pd.DataFrame(table)
