"""What may be said of the tables of notebook 13, the trial of dropout."""

import pandas as pd

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

IN_WORDS = {"sequence": "dropout on the whole prompt", "last_token": "dropout on the last token"}


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
        f"best one puts {percent(best.estimate)} of the pairs in order, and the better control "
        f"{percent(best.estimate - best.lift)}"
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
            f"* Told to lie, {IN_WORDS[scope]}: the best ranker ({best.ranker}) puts "
            f"{interval_text(best)} of the pairs in the right order; {best.best_control} puts "
            f"{best.estimate - best.lift:.2f}. A lead of {best.visible_lift:.2f} would have been "
            "found four times out of five, and of a ranking against chance one of "
            f"{best.visible:.2f}."
        )
    for scope, some in damage.groupby("scope", sort=False):
        [row] = some[some.rows == HONEST_ROWS].itertuples()
        bears = "The model bears" if bears_dropout(some) else "**The model does not bear**"
        lines.append(
            f"* {bears} {IN_WORDS[scope]} at p = {row.p:g}, by the bar that was fixed in advance "
            f"(answers differ between at most {percent(MOST_FLIPS)} of draws, and less than "
            f"{percent(MOST_LOST)} of the honest ones are lost): {percent(all_flips(some))} "
            f"differ, and {percent(row.as_told)} of the honest ones are right without dropout, "
            f"{percent(row.as_told_in_a_draw)} in a draw."
        )
    for scope, some in dropped[dropped.rows == HONEST_ROWS].groupby("scope", sort=False):
        lines.append(
            f"* Whether a state had {IN_WORDS[scope]}, a probe can tell on unseen honest rows with "
            f"an AUROC of {interval_text(some.iloc[0])}."
        )
    return lines


def _verdict(rankers: pd.DataFrame, rows: str) -> str:
    succeed = rankers[rankers.lift_low > 0]
    above_chance = _count(rankers.low > 0.5)
    if succeed.empty:
        verdict = f"**No ranking succeeds** on rows {rows}"
    else:
        names = ", ".join(f"{row.ranker} ({IN_WORDS[row.scope]})" for row in succeed.itertuples())
        verdict = f"**{_count(rankers.lift_low > 0)} rankings succeed** on rows {rows}: {names}"
    return (
        f"* {verdict}. A success was to beat the better of two controls with the whole 95 % "
        f"interval; {above_chance} are above chance."
    )


def _count(which: pd.Series) -> str:
    return f"{int(which.sum())} of {len(which)}"


def big_moves_sentence(rankings: pd.DataFrame) -> str:
    """Say whether rankers do better on pairs of draws whose answer moved far."""
    big = rankings[(rankings.least_move == BIG_MOVE) & (rankings.rows == LYING_ROWS)]
    big = big[big.ranker.isin(RANKERS)]
    if big.empty:
        return f"Too few pairs moved by {BIG_MOVE} to fit a ranker to them."
    return (
        f"Of pairs that moved by {BIG_MOVE} or more, fitted to and tested on alone, "
        f"{_count(big.low > 0.5)} rankings are above chance on rows told to lie, and "
        f"{_count(big.lift_low > 0)} beat both controls."
    )
