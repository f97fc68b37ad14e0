"""What may be said of the tables of notebook 13, the trial of dropout."""

import pandas as pd

from dlk_utils.evaluation.tasks import MIN_FOR_HEADLINE
from dlk_utils.lab.display import interval_text, percent
from dlk_utils.lab.tables.dropout_damage import (
    HONEST_ROWS,
    LYING_ROWS,
    MOST_FLIPS,
    MOST_LOST,
    all_flips,
    bears_dropout,
)
from dlk_utils.lab.tables.dropout_trial import BIG_MOVE, RANKERS

SCOPE_WORDS = {"sequence": "whole prompt", "last_token": "last token"}


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of notebook 13 that names each scope as a page does."""
    return table.assign(scope=table.scope.map(SCOPE_WORDS))


def tried(rankings: pd.DataFrame, rows: str = LYING_ROWS) -> pd.DataFrame:
    """Select what the trial is about: each ranker on all pairs of draws of such test rows."""
    is_tried = rankings.ranker.isin(RANKERS) & (rankings.least_move == 0)
    return rankings[is_tried & (rankings.rows == rows)]


def trial_title(rankings: pd.DataFrame) -> str:
    """Say whether dropout draws could be ranked by truth on rows told to lie."""
    rankers = tried(rankings)
    if rankers.empty:
        return "Ranking of dropout draws by truth: not scored"
    best = rankers.loc[rankers.estimate.idxmax()]
    return (
        f"Told to lie, {_count(rankers.lift_low > 0)} rankings of draws beat both controls. The "
        f"best one ({_with_dropout(best.scope)}) puts {percent(best.estimate)} of the pairs in "
        f"order, and the better control {percent(best.estimate - best.lift)}"
    )


def trial_findings(
    rankings: pd.DataFrame, damage: pd.DataFrame, dropped: pd.DataFrame
) -> list[str]:
    """Say what notebook 13 found: the verdict, what could have been seen, and the damage."""
    lines = []
    for rows in (LYING_ROWS, HONEST_ROWS):
        rankers = tried(rankings, rows)
        if len(rankers):
            lines.append(_verdict(rankers, rows))
    rankers = tried(rankings)
    for scope, some in rankers.groupby("scope", sort=False):
        best = some.loc[some.estimate.idxmax()]
        lines.append(
            f"* Told to lie, {_with_dropout(scope)}: the best ranker ({best.ranker}) puts "
            f"{interval_text(best)} of the pairs in the right order; the better control "
            f"({best.best_control}) puts {best.estimate - best.lift:.2f}. {_visible(best)}"
        )
    for scope, some in damage.groupby("scope", sort=False):
        [row] = some[some.rows == HONEST_ROWS].itertuples()
        bears = "The model bears" if bears_dropout(some) else "**The model does not bear**"
        lines.append(
            f"* {bears} {_with_dropout(scope)} at p = {row.p:g}, by the bar that was fixed in "
            f"advance (answers differ between at most {percent(MOST_FLIPS)} of draws, and less "
            f"than {percent(MOST_LOST)} of the honest ones are lost): {percent(all_flips(some))} "
            f"differ, and {percent(row.as_told)} of the honest ones are right without dropout, "
            f"{percent(row.as_told_in_a_draw)} in a draw."
        )
    for scope, some in dropped[dropped.rows == HONEST_ROWS].groupby("scope", sort=False):
        lines.append(
            f"* Whether a state had {_with_dropout(scope)}, a probe can tell on unseen honest rows "
            f"with an AUROC of {interval_text(some.iloc[0])}."
        )
    return lines


def _verdict(rankers: pd.DataFrame, rows: str) -> str:
    succeed = rankers[rankers.lift_low > 0]
    above_chance = _count(rankers.low > 0.5)
    if succeed.empty:
        verdict = f"**No ranking succeeds** on rows {rows}"
    else:
        names = ", ".join(
            f"{row.ranker} ({_with_dropout(row.scope)})" for row in succeed.itertuples()
        )
        verdict = f"**{_count(rankers.lift_low > 0)} rankings succeed** on rows {rows}: {names}"
    return (
        f"* {verdict}. A success was to beat the better of two controls with the whole 95 % "
        f"interval; {above_chance} are above chance."
    )


def _visible(best: pd.Series) -> str:
    """Say which share in order, and which lead over the better control, would have been found."""
    room = 1 - (best.estimate - best.lift)
    least_lead = f"With errors as observed, a lead of {best.visible_lift:.2f}"
    if best.visible_lift > room:
        lead = (
            f"{least_lead} would be needed to be found four times out of five, and this control "
            f"leaves room for {room:.2f}: no lead that fits above it would be found so often."
        )
    else:
        lead = f"{least_lead} would be found four times out of five."
    return f"{lead} Against chance, a share of {best.visible:.2f} would be found so often."


def _with_dropout(scope: str) -> str:
    return f"dropout on the {SCOPE_WORDS[scope]}"


def _count(which: pd.Series) -> str:
    return f"{int(which.sum())} of {len(which)}"


def big_moves_sentence(rankings: pd.DataFrame) -> str:
    """Say whether rankers succeed on pairs of draws whose answer moved far.

    Nothing is claimed of a ranking unless `MIN_FOR_HEADLINE` rows of either class have such a pair.
    """
    big = rankings[(rankings.least_move == BIG_MOVE) & (rankings.rows == LYING_ROWS)]
    big = big[big.ranker.isin(RANKERS)]
    if big.empty:
        return f"Too few pairs moved by {BIG_MOVE} to fit a ranker to them."
    is_judged = big.n_smaller >= MIN_FOR_HEADLINE
    judged, others = big[is_judged], big[~is_judged]
    sentences = []
    if len(judged):
        sentences.append(
            f"Of pairs that moved by {BIG_MOVE} or more, fitted to and tested on alone, "
            f"{_count(judged.low > 0.5)} rankings are above chance on rows told to lie, and "
            f"{_count(judged.lift_low > 0)} beat both controls."
        )
    for scope, some in others.groupby("scope", sort=False):
        sentences.append(
            f"Rankings of pairs that moved by {BIG_MOVE} or more are not judged with "
            f"{_with_dropout(scope)}: {some.n_smaller.min()} rows of the smaller class have such a "
            f"pair, and {MIN_FOR_HEADLINE} are needed."
        )
    return " ".join(sentences)
