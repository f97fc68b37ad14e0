"""What may be said of the tables of notebook 13, the trial of dropout."""

from collections.abc import Collection

import pandas as pd

from dlk_utils.evaluation.controls import TURNED
from dlk_utils.evaluation.tasks import MIN_FOR_HEADLINE
from dlk_utils.lab.display import interval_text, listed, percent
from dlk_utils.lab.tables.dropout_damage import (
    ALL_ROWS,
    HONEST_ROWS,
    INTERVALS,
    LYING_ROWS,
    MOST_FLIPS,
    MOST_LOST,
    within_limits,
)
from dlk_utils.lab.tables.dropout_trial import (
    BIG_MOVE,
    GUESSES,
    LISTWISE,
    RANKERS,
    TRUTH_PROBE,
    control_name,
)

SCOPE_WORDS = {"sequence": "whole prompt", "last_token": "last token"}
RANKER_WORDS = {
    LISTWISE: "listwise",
    f"votes, {LISTWISE}": "votes, listwise",
    **{control_name(guess): f"({guess}) × (which draw leans to choice 1)" for guess in GUESSES},
}
"""What rankers, votes and controls are called on a page, where it is not the name in the table."""
TAKEN_AS_TRUE = {
    control_name(TURNED): "the model's own answer (reversed if told to lie)",
    control_name(TRUTH_PROBE): "what the probe of truth reads",
}
"""What each control takes as the truth, in a sentence."""
FIRST_P = {"sequence": 0.02, "last_token": 0.1}
"""The shares of dropped channels that were fixed before any draws were looked at."""


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of notebook 13 that names scopes, rankers and controls as a page does."""
    names = {
        column: table[column].replace(RANKER_WORDS)
        for column in ("ranker", "best_control", "method")
        if column in table
    }
    return table.assign(scope=table.scope.map(SCOPE_WORDS), **names)


def tried(
    rankings: pd.DataFrame, rows: str = LYING_ROWS, *, rankers: Collection[str] = RANKERS
) -> pd.DataFrame:
    """Select what the trial is about: each ranker on all pairs of draws of such test rows."""
    is_tried = rankings.ranker.isin(rankers) & (rankings.least_move == 0)
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
            lines.append(f"{_verdict(rankers, rows)}{_why_below_chance(rankings, rows)}")
    rankers = tried(rankings)
    for scope, some in rankers.groupby("scope", sort=False):
        best = some.loc[some.estimate.idxmax()]
        ranker = RANKER_WORDS.get(best.ranker, best.ranker)
        lines.append(
            f"* On rows told to lie, with {_with_dropout(scope)}, the best ranker ({ranker}) puts "
            f"{percent(best.estimate)} [{100 * best.low:.0f}, {100 * best.high:.0f}] of the pairs "
            f"in the right order. The better control takes {TAKEN_AS_TRUE[best.best_control]} as "
            "the truth, and gives the higher rank to the draw that leans towards it. It puts "
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
        "The model tolerates" if within_limits(damage) else "**The model does not tolerate**"
    )
    lost, low, high = (f"{100 * share:.1f}" for share in (row.lost, row.lost_low, row.lost_high))
    before, after = percent(row.as_told), percent(row.as_told_in_a_draw)
    fall = f"honest accuracy falls from {before} to {after}, by {lost} [{low}, {high}] points"
    if row.lost <= 0:
        fall = (
            f"honest accuracy does not fall ({before} and {after}, a loss of {lost} "
            f"[{low}, {high}] points)"
        )
    # One decimal, so that a share can be told from the limit.
    flips = f"{100 * _all_flips(damage):.1f} %"
    text = (
        f"{tolerates} {_with_dropout(scope)} at p = {row.p:g}. By the criterion, which was "
        f"fixed in advance, at most {percent(MOST_FLIPS)} of the pairs of draws may differ in "
        f"their answer, and honest accuracy may fall by less than {100 * MOST_LOST:g} points. Here "
        f"{flips} of the pairs differ (honest and lying rows together), and {fall}."
    )
    if not within_limits(damage):
        text += f" {_limits_not_met(damage)}"
    elif not within_limits(damage, INTERVALS):
        text += (
            " This holds for the estimates: their intervals also allow values beyond the limits."
        )
    if row.p != FIRST_P[scope]:
        text += f" This p was not fixed in advance: it was {FIRST_P[scope]:g} at first."
    return text


def _all_flips(damage: pd.DataFrame) -> float:
    """The share of pairs of draws with different answers, over honest and lying rows together."""
    return damage.set_index("rows").flips[ALL_ROWS]


def _limits_not_met(damage: pd.DataFrame) -> str:
    """Say which of the two limits is not met, and whether the interval of the fall crosses it."""
    [row] = damage[damage.rows == HONEST_ROWS].itertuples()
    has_flips, has_fall = _all_flips(damage) > MOST_FLIPS, row.lost >= MOST_LOST
    if has_flips and has_fall:
        text = "So neither limit is met."
    else:
        text = f"So the {'first' if has_flips else 'second'} limit is not met."
    if has_fall and row.lost_low < MOST_LOST:
        text += (
            f" The interval of the fall reaches below {100 * MOST_LOST:g} points, so the limit may "
            "be met after all."
        )
    return text


def _verdict(rankers: pd.DataFrame, rows: str) -> str:
    succeed = rankers[rankers.lift_low > 0]
    chance = _against_chance(rankers)
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


def _against_chance(rankers: pd.DataFrame) -> str:
    """Say how many rankings are above chance and, if there are any, how many are below it."""
    n_above, n_below = int((rankers.low > 0.5).sum()), int((rankers.high < 0.5).sum())
    is_above = "is" if n_above < 2 else "are"
    text = f"{n_above or 'None'} of the {len(rankers)} rankings {is_above} above chance"
    if not n_below:
        return f"{text}."
    return f"{text}, and {n_below} {'is' if n_below == 1 else 'are'} below it."


def _why_below_chance(rankings: pd.DataFrame, rows: str) -> str:
    """Say what a ranker that is below chance on rows told to lie may do; elsewhere, nothing.

    The reason holds only if most of the model's answers to these rows are wrong: then the control
    that takes the opposite of the answer as the truth is above chance.
    """
    if rows != LYING_ROWS or not (tried(rankings).high < 0.5).any():
        return ""
    reversed_answer = tried(rankings, rows, rankers=(control_name(TURNED),))
    if not (reversed_answer.low > 0.5).any():
        return ""
    return (
        " A ranker that simply followed the model's own answers would be below chance here too, "
        "because most of them are wrong."
    )


def _visible(best: pd.Series) -> str:
    """Say which share in order, and which lead over the better control, would be detected."""
    room = 1 - (best.estimate - best.lift)
    digits = 0 if f"{room:.2f}" != f"{best.visible_lift:.2f}" else 1
    lead = (
        "With standard errors as observed, a trial of this size detects a lead of "
        f"{100 * best.visible_lift:.{digits}f} points four times out of five"
    )
    against_chance = f"tell a share of {percent(best.visible)} from chance four times out of five"
    if best.visible_lift > room:
        return (
            f"{lead}, but a lead over this control cannot exceed {100 * room:.{digits}f} points. "
            "So the comparison with it could not have succeeded that reliably. The trial would "
            f"{against_chance}."
        )
    return f"{lead}. It would {against_chance}."


def _with_dropout(scope: str) -> str:
    return f"dropout on the {SCOPE_WORDS[scope]}"


def _count(which: pd.Series) -> str:
    return f"{int(which.sum())} of {len(which)}"


def big_moves_sentence(rankings: pd.DataFrame) -> str:
    """Say whether rankers succeed on pairs of draws whose answer moved far.

    Nothing is claimed about a ranking unless `MIN_FOR_HEADLINE` rows of either class have such a
    pair.
    """
    big = rankings[(rankings.least_move == BIG_MOVE) & rankings.ranker.isin(RANKERS)]
    if big.empty:
        return "Too few pairs have a big move to fit a ranker to them."
    is_judged = big.n_smaller >= MIN_FOR_HEADLINE
    sentences = [
        f"When rankers are fitted to and tested on big moves only, {_count(judged.low > 0.5)} "
        f"rankings are above chance on rows {rows}, and {_count(judged.lift_low > 0)} beat both "
        "controls."
        for rows, judged in big[is_judged].groupby("rows", sort=False)
    ]
    others = big[~is_judged]
    if len(others):
        counts = listed(
            f"{some.n_smaller.min()} on rows {rows} with {_with_dropout(scope)}"
            for (rows, scope), some in others.groupby(["rows", "scope"], sort=False)
        )
        sentences.append(
            f"A claim needs {MIN_FOR_HEADLINE} rows of the smaller class that have a pair with a "
            f"big move. There are only {counts}, so nothing is claimed about these rankings."
        )
    return " ".join(sentences)
