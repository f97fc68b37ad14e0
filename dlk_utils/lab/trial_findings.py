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
    surely_bears_dropout,
)
from dlk_utils.lab.tables.dropout_trial import (
    BIG_MOVE,
    GUESSES,
    LISTWISE,
    RANKERS,
    control_name,
)

SCOPE_WORDS = {"sequence": "whole prompt", "last_token": "last token"}
RANKER_WORDS = {
    LISTWISE: "listwise",
    f"votes, {LISTWISE}": "votes, listwise",
    **{control_name(guess): f"({guess}) × (which draw leans to choice 1)" for guess in GUESSES},
}
"""What rankers, votes and controls are called on a page, where it is not the name in the table."""
FIRST_P_LAST = 0.1
"""The dropout at the last token that was fixed before any draws were looked at."""


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of notebook 13 that names scopes, rankers and controls as a page does."""
    names = {
        column: table[column].replace(RANKER_WORDS)
        for column in ("ranker", "best_control", "method")
        if column in table
    }
    return table.assign(scope=table.scope.map(SCOPE_WORDS), **names)


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
        f"On rows told to lie, {_count(rankers.lift_low > 0)} rankings of draws beat both "
        f"controls. The best one ({_with_dropout(best.scope)}) puts {percent(best.estimate)} of "
        f"the pairs in order, and the better control {percent(best.estimate - best.lift)}"
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
        ranker, control = (RANKER_WORDS.get(x, x) for x in (best.ranker, best.best_control))
        lines.append(
            f"* On rows told to lie, with {_with_dropout(scope)}, the best ranker ({ranker}) puts "
            f"{percent(best.estimate)} [{100 * best.low:.0f}, {100 * best.high:.0f}] of the pairs "
            f"in the right order. The better control, *{control}*, puts "
            f"{percent(best.estimate - best.lift)} in order. {_visible(best)}"
        )
    for scope, some in damage.groupby("scope", sort=False):
        lines.append(f"* {_tolerance(scope, some)}")
    for scope, some in dropped[dropped.rows == HONEST_ROWS].groupby("scope", sort=False):
        lines.append(
            "* On unseen honest rows, a probe tells whether a state had "
            f"{_with_dropout(scope)} with an AUROC of {interval_text(some.iloc[0])}."
        )
    return lines


def _tolerance(scope: str, damage: pd.DataFrame) -> str:
    """Say whether the answers keep within the limits that were fixed, and how much they lose."""
    [row] = damage[damage.rows == HONEST_ROWS].itertuples()
    tolerates = (
        "The model tolerates" if bears_dropout(damage) else "**The model does not tolerate**"
    )
    lost, low, high = (f"{100 * share:.1f}" for share in (row.lost, row.lost_low, row.lost_high))
    text = (
        f"{tolerates} {_with_dropout(scope)} at p = {row.p:g}. By the criterion, which was "
        f"fixed in advance, at most {percent(MOST_FLIPS)} of the pairs of draws may differ in "
        f"their answer, and honest accuracy may fall by less than {100 * MOST_LOST:g} points. Here "
        f"{percent(all_flips(damage))} of the pairs differ, and honest accuracy falls from "
        f"{percent(row.as_told)} to {percent(row.as_told_in_a_draw)}, by {lost} [{low}, {high}] "
        "points."
    )
    if bears_dropout(damage) and not surely_bears_dropout(damage):
        text += (
            " This holds for the estimates: their intervals also allow values beyond the limits."
        )
    if scope == "last_token" and row.p != FIRST_P_LAST:
        text += f" This p was not fixed in advance: it was {FIRST_P_LAST:g} at first."
    return text


def _verdict(rankers: pd.DataFrame, rows: str) -> str:
    succeed = rankers[rankers.lift_low > 0]
    chance = _against_chance(rankers, rows)
    if succeed.empty:
        return (
            f"* **No ranking succeeds** on rows {rows}. A success would be a lead over the better "
            "of two controls, with the whole 95 % interval of the lead above 0. "
            f"{chance}"
        )
    names = ", ".join(
        f"{RANKER_WORDS.get(row.ranker, row.ranker)} with {_with_dropout(row.scope)}"
        for row in succeed.itertuples()
    )
    return (
        f"* **{_count(rankers.lift_low > 0)} rankings succeed** on rows {rows} ({names}). A "
        "success is a lead over the better of two controls, with the whole 95 % interval of the "
        "lead above 0. "
        f"{chance}"
    )


def _against_chance(rankers: pd.DataFrame, rows: str) -> str:
    """Say how many rankings are above chance and, if there are any, below it."""
    text = f"{_count(rankers.low > 0.5)} rankings are above chance."
    if (rankers.high < 0.5).any():
        text += f" {_count(rankers.high < 0.5)} are below it."
        if rows == LYING_ROWS:
            text += " So would be a ranker that follows the model's answer, as that is a lie."
    return text


def _visible(best: pd.Series) -> str:
    """Say which share in order, and which lead over the better control, would be detected."""
    room = 1 - (best.estimate - best.lift)
    digits = 0 if f"{room:.2f}" != f"{best.visible_lift:.2f}" else 1
    lead = (
        "With standard errors as observed, a trial of this size detects a lead of "
        f"{100 * best.visible_lift:.{digits}f} points four times out of five."
    )
    if best.visible_lift > room:
        return (
            f"{lead} No lead over this control can exceed {100 * room:.{digits}f} points, so none "
            "could be detected that often. Against chance, a share of "
            f"{percent(best.visible)} could."
        )
    return f"{lead} Against chance, it detects a share of {percent(best.visible)} that often."


def _with_dropout(scope: str) -> str:
    return f"dropout on the {SCOPE_WORDS[scope]}"


def _count(which: pd.Series) -> str:
    return f"{int(which.sum())} of {len(which)}"


def big_moves_sentence(rankings: pd.DataFrame) -> str:
    """Say whether rankers succeed on pairs of draws whose answer moved far.

    Nothing is claimed about a ranking unless `MIN_FOR_HEADLINE` rows of either class have such a
    pair.
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
            f"When rankers are fitted to and tested on only the pairs that moved by {BIG_MOVE} or "
            f"more, {_count(judged.low > 0.5)} rankings are above chance on rows told to lie, and "
            f"{_count(judged.lift_low > 0)} beat both controls."
        )
    for scope, some in others.groupby("scope", sort=False):
        sentences.append(
            f"With {_with_dropout(scope)}, rankers of only the pairs that moved by {BIG_MOVE} or "
            f"more are not judged on rows told to lie, because only {some.n_smaller.min()} rows of "
            f"the smaller class have such a pair, and {MIN_FOR_HEADLINE} are needed."
        )
    return " ".join(sentences)
