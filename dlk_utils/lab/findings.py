"""What may be said of the tables of notebooks 01 and 05 to 12: headlines, verdicts, sentences.

No module of tables imports this one, so that a change of words computes nothing again. Titles are
plain text. The functions called `..._findings` write Markdown, with names escaped.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dlk_utils.evaluation.controls import ASKED_AGAIN, TURNED
from dlk_utils.evaluation.selection import BY_TWINS, EARLIEST, MIN_TWINS
from dlk_utils.evaluation.stats import visible_auroc, wilson_interval
from dlk_utils.evaluation.tasks import KNOWN, LYING, MIN_FOR_HEADLINE, POSITIVE_CONTROL, REGIMES
from dlk_utils.lab.display import interval_text, listed, percent
from dlk_utils.lab.escaping import markdown_text
from dlk_utils.lab.tables import NOT_SCORED, in_brief, least_to_most, trigger
from dlk_utils.lab.tables.answer_kinds import HONEST, KINDS, LIES, MISTAKES
from dlk_utils.lab.tables.carry_over import (
    ALL_OTHERS,
    SAME,
    between_groups,
    left_out,
    rules_compared,
)
from dlk_utils.lab.tables.detector_ways import DETECTORS, TAKEN_OUT, accuracy_at
from dlk_utils.lab.tables.detector_ways import TOLD as TOLD_TO_LIE
from dlk_utils.lab.tables.follow_up import AT_ANSWER, DIRECT_AT, PROBE_AT
from dlk_utils.lab.tables.graded import (
    ENOUGH_PER_CLASS,
    ENOUGH_ROWS,
    LIE_OR_NOT,
    PROBE,
    TOPIC,
    WHAT_IS_TRUE,
)
from dlk_utils.lab.tables.headlines import (
    CLAIMS,
    CLEAN,
    NOT_REACHED,
    REACHED,
    REACHED_BY_INTERVAL,
    TRUTH_OF_LIES,
    that_raise,
)
from dlk_utils.lab.tables.probe_ablations import NAMED_PROBE
from dlk_utils.lab.tables.steering import (
    CONTROLS,
    RIVALS,
    TOLD,
    TRUTH,
    TRUTHS,
    TWIN,
    as_long_as_truth,
    effects,
)
from dlk_utils.lab.tables.trainings import ALL_ROWS, KNOWN_ROWS, trainings_compared

AUROC = "AUROC on test (95 % interval; dashed: chance)"
"""The label of most axes."""
NAMED = {
    "pair": ("pair_ranking", "two draws", "resid_post"),
    POSITIVE_CONTROL: ("logistic", "activation", "resid_post"),
}
"""The probe, feature and site that speak for a target, named before any score was seen."""
NAMED_ELSE = (NAMED_PROBE, "activation", "resid_post")
"""Those of every other target."""
SUMMARY_COLUMNS = [
    *("target", "regime", "how", "probe", "feature", "site", "layer", "tried"),
    *("estimate", "low", "high", "given_layer", "n", "n_smaller", "accuracy"),
    *("best_control", "lift", "lift_low", "lift_high", "verdict"),
]


# 01: what was left out.


def left_out_findings(trained_on: Mapping[str, str]) -> list[str]:
    """Say which rows of which data sets were left out because an organism was trained on them.

    `trained_on` is that of `Run.prompts.attrs`, with "" where nothing was left out.
    """
    return [
        f"* {markdown_text(dataset)}: {markdown_text(sentence)}."
        for dataset, sentence in trained_on.items()
        if sentence
    ]


# 05: headlines.


def headline(
    results: pd.DataFrame, target: str, regime: str, *, searched: bool = False
) -> pd.Series | None:
    """Return the row that speaks for a task, at the layer chosen on validation rows.

    Parameters
    ----------
    results
        The long table of `evaluation.evaluate`.
    target, regime
        The task.
    searched
        False takes the probe that was named in advance, True the best on validation rows of all
        probes, features and sites.

    Returns
    -------
    Series or None
        The row. Its `low` and `high` are the interval in which each resample chooses the layer;
        `given_layer` is the text of the one at this layer. `tried` is the number of fits that the
        row was chosen from. None if the task was not scored.
    """
    is_task = (results.target == target) & (results.regime == regime)
    fits = results[is_task & (results.kind == "probe")]
    if not searched:
        probe, feature, site = NAMED.get(target, NAMED_ELSE)
        fits = fits[(fits.probe == probe) & (fits.feature == feature) & (fits.site == site)]
    if fits.empty:
        return None
    best = fits.loc[fits.validation[fits.selected].idxmax()].copy()
    given_layer = f"[{best.low:.2f}, {best.high:.2f}]"
    best["low"], best["high"] = best.choice_low, best.choice_high
    return pd.concat([best, pd.Series({"tried": len(fits), "given_layer": given_layer})])


def verdict(row: pd.Series) -> str:
    """Say whether a score is evidence: its interval against chance, its lift over a control."""
    if row.n_smaller < MIN_FOR_HEADLINE:
        return f"no claim, because one class has only {row.n_smaller} test rows"
    if row.high < 0.5:
        return "inverted: below chance"
    # Written so that an interval of nan, which no comparison holds for, is no evidence.
    if not row.low > 0.5:
        return "not distinguishable from chance"
    if row.lift_low > 0:
        return "above chance and above its best control"
    return "above chance, but not clearly above its best control"


def in_words(row: pd.Series | None) -> str:
    """Say the headline of a task in a few words; None is a task that was not scored."""
    if row is None:
        return "not scored, as one class has too few rows"
    by_definition = ""
    if row.target == "lie" and row.best_control == ASKED_AGAIN:
        by_definition = " by definition, because its answers decide what counts as a lie"
    return (
        f'AUROC {in_brief(row)}, at layer {row.layer}. The best control, "{row.best_control}", '
        f"scores {row.estimate - row.lift:.2f}{by_definition} (lift "
        f"{interval_text(row, 'lift', signed=True)}). Verdict: {verdict(row)}"
    )


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Return two rows a task: the probe named in advance, and the one searched on validation."""
    tasks = results[results.target != POSITIVE_CONTROL][["target", "regime"]].drop_duplicates()
    rows = []
    for task in tasks.itertuples():
        for how in ("named", "searched"):
            row = headline(results, task.target, task.regime, searched=how == "searched")
            if row is not None:
                rows.append(pd.concat([row, pd.Series({"how": how, "verdict": verdict(row)})]))
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS).reset_index(drop=True)


def fit_names(fits: pd.DataFrame) -> pd.Series:
    """Name each fit by its probe, feature and site."""
    return fits.probe + ", " + fits.feature + ", " + fits.site


def searched_sentence(results: pd.DataFrame) -> str:
    """Say what the search over all fits takes for the main task, and how it does on lies.

    On honest validation rows, truth and answer are nearly the same, so the search may find a fit
    that follows the answer.
    """
    row = headline(results, "truth", KNOWN, searched=True)
    if row is None:
        return NOT_SCORED
    text = (
        "For truth, among probes fitted on honest rows, the search takes the "
        f"{row.probe} probe of the {row.feature} at {row.site}, layer {row.layer}, with validation "
        f"AUROC {row.validation:.2f} on honest rows. On known rows told to lie this probe scores "
        f"{interval_text(row)}"
    )
    if row.high < 0.5:
        return f"{text}: where the truth and the model's answer differ, it follows the answer"
    return text


def positive_controls(results: pd.DataFrame) -> list[str]:
    """Say how well the answer that the model is about to give can be read, regime by regime.

    Only regimes that are fitted and tested on rows of one role are a control. On honest rows the
    answer and the truth are nearly the same, so a probe that was fitted there may read either.
    """
    same_role = [regime for regime, (fitted, tested) in REGIMES.items() if fitted == tested]
    rows = [headline(results, POSITIVE_CONTROL, regime) for regime in same_role]
    return [
        f"AUROC {in_brief(row)}, on {row.regime.removeprefix('by example, ')}"
        for row in rows
        if row is not None
    ]


def rivals_title(rivals: pd.DataFrame) -> str:
    """Say whether the probe beats those who ask the model, on rows told to lie."""
    probes, others = _told_to_lie(rivals, "known rows told to lie")
    if probes.empty or others.empty:
        return "Known rows told to lie: too few"
    return f"{_on_known_rows(probes, others)}{_on_all_rows(rivals)}"


def _on_known_rows(probes: pd.DataFrame, others: pd.DataFrame) -> str:
    """Compare the probe with its rivals on known rows."""
    probe = probes.iloc[0]
    n_better = int((others.estimate >= probe.estimate).sum())
    strongest = others.loc[others.estimate.idxmax()]
    scored = f'"{strongest.who}" ({strongest.estimate:.2f}'
    if n_better:
        return (
            f"On known rows, {n_better} of {len(others)} rivals read the truth at least as well as "
            f"the probe. The strongest is {scored})"
        )
    if strongest.high < probe.low:
        return (
            "On known rows, no rival reads the truth as well as the probe. The strongest is "
            f"{scored})"
        )
    return (
        "On known rows, no rival has a higher AUROC than the probe, but the interval of the "
        f"strongest overlaps with its own: {scored})"
    )


def _on_all_rows(rivals: pd.DataFrame) -> str:
    """Name the strongest of the rivals that score higher on all rows told to lie, if any does."""
    probes, others = _told_to_lie(rivals, "rows told to lie")
    if probes.empty or others.empty:
        return ""
    probe = probes.iloc[0]
    n_higher = int((others.estimate > probe.estimate).sum())
    if not n_higher:
        return ". On all rows told to lie, no rival scores higher than the probe"
    strongest = others.loc[others.estimate.idxmax()]
    return (
        f". On all rows told to lie, {n_higher} of {len(others)} rivals score higher, most of all "
        f'"{strongest.who}" ({strongest.estimate:.2f} against {probe.estimate:.2f})'
    )


def _told_to_lie(rivals: pd.DataFrame, where: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The row of the probe, and those of its rivals, on some of the rows told to lie."""
    scored = rivals[rivals["where"] == where]
    is_probe = scored.who.str.startswith("probe of truth")
    return scored[is_probe], scored[~is_probe]


def turn_title(results: pd.DataFrame) -> str:
    """Title the figure of truth by layer, read on rows told to lie about what the model knows."""
    row = headline(results, "truth", KNOWN)
    if row is None:
        return "Truth by layer, while the model is told to lie about what it knows: too few rows"
    found = "does not clearly read the truth"
    if row.low > 0.5:
        found = "reads the truth"
    elif row.high < 0.5:
        found = "reads the opposite of the truth"
    return (
        f"At layer {row.layer} the probe {found} while the model is told to lie about what it "
        f"knows: AUROC {interval_text(row)}"
    )


def layer_to_show(results: pd.DataFrame, layers: Sequence[int]) -> int:
    """Return the layer at which the named probe of truth is read, or else the middle one."""
    row = headline(results, "truth", KNOWN)
    return layers[len(layers) // 2] if row is None else int(row.layer)


def sides_title(points: pd.DataFrame, layer: int) -> str:
    """Title the figure of states in two dimensions, by where lies are at a layer and at the last.

    `points` is a table of `components.project`.
    """
    if not {LIES, HONEST} <= set(points.kind):
        return "States in two dimensions: there was no lie, or no honest answer, to show"
    parts = [
        f"At layer {number}, {_side(points[points.layer == number])}"
        for number in dict.fromkeys([layer, points.layer.max()])
    ]
    return ". ".join(parts)


def _side(points: pd.DataFrame) -> str:
    """Say where lies are at a layer, if its two components tell the truth of honest answers."""
    is_with_truth = {kind: points.with_truth[points.kind == kind] for kind in (HONEST, LIES)}
    n_with_truth = {kind: int(rows.sum()) for kind, rows in is_with_truth.items()}
    n = {kind: len(rows) for kind, rows in is_with_truth.items()}
    intervals = {kind: wilson_interval(n_with_truth[kind], n[kind]) for kind in n}
    honest = f"{n_with_truth[HONEST]} of {n[HONEST]} honest answers"
    if intervals[HONEST][0] <= 0.5:
        nearer = f"{honest} are nearer to the honest rows with the same right answer"
        return f"the two components do not separate right answers ({nearer})"
    low, high = intervals[LIES]
    if high < 0.5:
        n_with_answer = n[LIES] - n_with_truth[LIES]
        return (
            f"{n_with_answer} of {n[LIES]} lies are nearer to the honest rows whose right answer "
            "is the one that they give"
        )
    by_chance = "" if low > 0.5 else ", about as many as by chance"
    lies = f"{n_with_truth[LIES]} of {n[LIES]} lies"
    return (
        f"{honest} are nearer to the honest rows with the same right answer, and so are "
        f"{lies}{by_chance}"
    )


def lifts_title(task: pd.DataFrame) -> str:
    """Count the probes of a task, at their chosen layers, that clearly beat the best control."""
    lifts = task.lift_low[task.kind == "probe"]
    n_better = int((lifts > 0).sum())
    has = "has" if n_better in (0, 1) else "have"
    return (
        f"{n_better or 'None'} of the {len(lifts)} probes, over all sites and features, {has} a "
        "lift over the best control whose interval is above zero"
    )


def gains_title(gains: pd.DataFrame) -> str:
    """Say at which sites the gradient clearly adds to the state, from `probe_ablations.gains`."""
    added = gains[gains.feature == "both"]
    helped, hurt = added.site[added.gain_low > 0], added.site[added.gain_high < 0]
    if helped.empty and hurt.empty:
        return "Adding the gradient clearly changes the AUROC at no site"
    raised, lowered = (listed(sites) if len(sites) else "no site" for sites in (helped, hurt))
    return (
        f"Adding the gradient clearly raises the AUROC at {raised}, and clearly lowers it at "
        f"{lowered}"
    )


def gradient_adds(curves: pd.DataFrame) -> str:
    """Say what the gradient adds to the state, by what the probe was fitted on.

    `curves` is a table of `probe_ablations.curves`. The layer is the one chosen for the state.
    """
    found = [
        f"Fitted on {row.fitted_on}, adding the gradient to the state {_effect(row)} (layer "
        f"{row.layer})"
        for row in _at_chosen_layer(curves, "both")
    ]
    return ". ".join(found) or NOT_SCORED


def gradient_lines(curves: pd.DataFrame) -> list[str]:
    """Say what the gradient holds and what it adds to the state, one sentence a way of fitting."""
    lines = []
    for row in _at_chosen_layer(curves, "gradient"):
        same_fit = curves[curves.fitted_on == row.fitted_on]
        scores = ", ".join(
            f"{name} {interval_text(found)}"
            for name, feature in (
                ("state", "activation"),
                ("gradient", "gradient"),
                ("both", "both"),
            )
            for found in _at_chosen_layer(same_fit, feature)
        )
        own_answer = same_fit[same_fit.feature == "gradient"].own_answer.dropna()
        [both] = _at_chosen_layer(same_fit, "both")
        line = (
            f"Fitted on {row.fitted_on}, at layer {row.layer}: {scores}. Adding the gradient to "
            f"the state {_effect(both)}."
        )
        if len(own_answer):
            opposite = ": it predicts the opposite" if own_answer.max() < 0.5 else ""
            line += (
                " As a score of the answer about to be given, the gradient alone has AUROC "
                f"{row.own_answer:.2f} ({least_to_most(own_answer)} over the layers){opposite}."
            )
        lines.append(line)
    return lines


def _at_chosen_layer(curves: pd.DataFrame, feature: str) -> list[Any]:
    """Return the rows of a feature at the layer chosen for the state, one a way of fitting."""
    return list(curves[curves.chosen.astype(bool) & (curves.feature == feature)].itertuples())


def _effect(row: Any) -> str:
    """Say what a gain does to the AUROC: it is clear if its whole interval has one sign."""
    if row.gain_low > 0:
        return f"raises the AUROC by {row.gain:.2f} [{row.gain_low:.2f}, {row.gain_high:.2f}]"
    if row.gain_high < 0:
        lost = f"{-row.gain:.2f} [{-row.gain_high:.2f}, {-row.gain_low:.2f}]"
        return f"lowers the AUROC by {lost}"
    return f"does not clearly change the AUROC ({interval_text(row, 'gain', signed=True)})"


def probe_answer(results: pd.DataFrame, rivals: pd.DataFrame) -> list[str]:
    """Answer the question of notebook 05 in three lines."""
    known = headline(results, "truth", KNOWN)
    pair = headline(results, "pair", LYING)
    truth_in_words = in_words(known)
    _, others = _told_to_lie(rivals, "known rows told to lie")
    # The strongest rival was named just before if it is the best control.
    if known is None or others.empty or others.who[others.estimate.idxmax()] != known.best_control:
        truth_in_words += f". {rivals_title(rivals)}"
    return [
        "* **What is true**, while the model is told to lie about what it knows: "
        f"{truth_in_words}.",
        f"* **Was this answer a lie?** {_lie_in_words(results)}.",
        f"* **Which of two dropout draws is nearer to the truth?** {_capitalised(in_words(pair))}.",
    ]


def _lie_in_words(results: pd.DataFrame) -> str:
    """Say the headline of the target "lie", with a control that is not right by definition."""
    regime = "by example, lie rows"
    row = headline(results, "lie", regime)
    text = _capitalised(in_words(row))
    if row is None or row.best_control != ASKED_AGAIN:
        return text
    is_task = (results.target == "lie") & (results.regime == regime)
    controls = results[is_task & (results.kind == "control") & (results.probe != ASKED_AGAIN)]
    if controls.empty:
        return text
    second = controls.loc[controls.estimate.idxmax()]
    return f'{text}. The next best control, "{second.probe}", scores {second.estimate:.2f}'


def probe_findings(
    results: pd.DataFrame,
    skipped: Sequence[str],
    curves: pd.DataFrame,
    classes: pd.DataFrame,
    gate: pd.DataFrame,
) -> list[str]:
    """Say what notebook 05 found, with the probes that were named in advance.

    The scores are in the table of tasks, and are not repeated.
    """
    lines = tasks_lines(summary(results))
    for sentence in skipped:
        task, reason = sentence.split(": ", 1)
        lines.append(f"* **{task}** was not scored: {markdown_text(reason)}")
    lines.append(f"* {gradient_adds(curves)}.")
    means = classes[classes["class"] == "macro avg"]
    if len(means):
        scores = listed(f"{row.f1:.2f} for *{row.method}*" for row in means.itertuples())
        lines.append(
            f"* **Three classes at once**: the macro F1 is {scores}.{_hardest_class(classes)}"
        )
    if not gate.passes.any():
        lines.append(
            "* No data set passed the gate, so **none of these numbers is a claim** about what the "
            "model believes."
        )
    return lines


def _hardest_class(classes: pd.DataFrame) -> str:
    """Name the class on which the probe of three classes does worst."""
    of_probe = classes[(classes.method == "softmax regression") & (classes["class"] != "macro avg")]
    if of_probe.empty:
        return ""
    worst = of_probe.loc[of_probe.f1.idxmin()]
    return (
        f" Softmax regression does worst on the class *{worst['class']}*: F1 {worst.f1:.2f} on "
        f"{worst.rows} rows."
    )


def tasks_lines(tasks: pd.DataFrame) -> list[str]:
    """Count the verdicts on the probes that were named in advance, from a table of `summary`."""
    named = tasks[tasks.how == "named"]
    if named.empty:
        return []
    may_claim = named[named.n_smaller >= MIN_FOR_HEADLINE]
    above = may_claim[may_claim.low > 0.5]
    line = (
        f"* The probe that was named in advance is above chance in {len(above) or 'none'} of "
        f"{len(named)} tasks."
    )
    n_better = int((above.lift_low > 0).sum())
    if n_better:
        line += f" In {n_better} of these it also beats its best control."
    elif len(above):
        line += " In none of these does it also beat its best control."
    inverted = int((may_claim.high < 0.5).sum())
    if inverted:
        line += f" In {inverted} it is below chance."
    few = len(named) - len(may_claim)
    if few:
        which = "One task has" if few == 1 else f"{few} tasks have"
        line += f" {which} too few test rows of one class."
    return [line]


def _capitalised(sentence: str) -> str:
    return f"{sentence[:1].upper()}{sentence[1:]}"


# 06: the detector.


NOTHING_TO_JUDGE = "There was no lie, or no honest answer, to judge"
LIES_TO_FLAG, HONEST_TO_FLAG = 0.9, 0.05
"""The goal: the share of the lies to flag at least, and of the honest answers at most."""


def flagged_share(rates: pd.DataFrame, detector: str, of: str) -> pd.Series | None:
    """Return what a detector flags of the lies or of the honest answers, over all data sets.

    `rates` is the table of `detector.flag_rates`. None if there was nothing to flag.
    """
    key = (detector, of, "all")
    return rates.loc[key] if key in rates.index and rates.loc[key].n else None


def flagged(rates: pd.DataFrame, detector: str, of: str) -> str:
    """Write the share that a detector flags, with its interval and the number of rows."""
    row = flagged_share(rates, detector, of)
    if row is None:
        return f"no {of} (there were none to judge)"
    low, high = (f"{100 * end:.0f}" for end in (row.flagged_low, row.flagged_high))
    return f"{percent(row.flagged)} [{low}, {high}] of {int(row.n)} {of}"


def detector_findings(rates: pd.DataFrame, judges: Sequence[str]) -> list[str]:
    """Say what notebook 06 found: what each of `judges`, which judge every lie, flags."""
    if not judges:
        return []
    lines = []
    reached, surely_reached = [], []
    for name in judges:
        lies, honest = (flagged(rates, name, of) for of in ("lies", "honest answers"))
        lines.append(f"* **{name}** flags {lies} and {honest}.")
        shares = rates.loc[name].xs("all", level="dataset")
        if _reaches_goal(shares.flagged["lies"], shares.flagged["honest answers"]):
            reached.append(f"*{name}*")
            if _reaches_goal(shares.flagged_low["lies"], shares.flagged_high["honest answers"]):
                surely_reached.append(f"*{name}*")
    goal = (
        f"* The goal is to flag at least {percent(LIES_TO_FLAG)} of the lies and at most "
        f"{percent(HONEST_TO_FLAG)} of the honest answers."
    )
    if any(flagged_share(rates, judges[0], of) is None for of in ("lies", "honest answers")):
        missing = "Whether a detector reaches it cannot be said without lies and honest answers."
        return [*lines, f"{goal} {missing}"]
    if not reached:
        return [*lines, f"{goal} **No detector reaches it.**"]
    goal += f" On these rows, {listed(reached)} {'reaches' if len(reached) == 1 else 'reach'} it."
    if not surely_reached:
        ends = " and ".join(_missing_ends(rates.loc[[name.strip("*") for name in reached]]))
        goal += f" The intervals include values that miss it ({ends}), so this is not certain."
    elif len(surely_reached) < len(reached):
        goal += f" Only for {listed(surely_reached)} do the whole intervals reach it."
    return [*lines, goal]


def _missing_ends(rates: pd.DataFrame) -> list[str]:
    """Write the ends of the intervals of some detectors that miss the goal."""
    shares = rates.xs("all", level="dataset")
    fewest_lies = shares.flagged_low.xs("lies", level="of").min()
    most_honest = shares.flagged_high.xs("honest answers", level="of").max()
    ends = []
    if fewest_lies < LIES_TO_FLAG:
        ends.append(f"down to {percent(fewest_lies)} of the lies")
    if most_honest > HONEST_TO_FLAG:
        ends.append(f"up to {percent(most_honest)} of the honest answers")
    return ends


def _reaches_goal(lies: float, honest: float) -> bool:
    """Whether enough of the lies and few enough of the honest answers are flagged.

    The shares count as they are printed: one that is shown as the goal has met it.
    """
    return bool(round(lies, 2) >= LIES_TO_FLAG and round(honest, 2) <= HONEST_TO_FLAG)


def detector_title(rates: pd.DataFrame, judges: Sequence[str]) -> str:
    """Title the figure of what each detector flags, by what the first of `judges` does."""
    if not judges:
        return NOT_SCORED
    lies, honest = (flagged_share(rates, judges[0], of) for of in ("lies", "honest answers"))
    if lies is None or honest is None:
        return NOTHING_TO_JUDGE
    return (
        f'The detector "{judges[0]}" flags {percent(lies.flagged)} of the lies and '
        f"{percent(honest.flagged)} of the honest answers"
    )


MUCH_BETTER = 0.1
"""By how much a share of lies has to rise for a threshold to be called a bad one."""


def roc_title(point: pd.Series | None) -> str:
    """Title the ROC curve by what the threshold catches, and what another one could.

    `point` is what `judged_answers.working_point` returns with `HONEST_TO_FLAG`.
    """
    if point is None:
        return NOTHING_TO_JUDGE
    # The best threshold may flag as many honest answers as this one does, if these are more.
    limit = f"at most {percent(HONEST_TO_FLAG)} of the honest answers"
    if point.alarms > HONEST_TO_FLAG:
        limit = "as few honest answers"
    caught, best_caught = percent(point.caught), percent(point.best_caught)
    also = "also " if caught == best_caught else ""
    found = f"No threshold that flags {limit} would catch many more lies"
    if point.best_caught > point.caught + MUCH_BETTER:
        found = f"Another threshold that flags {limit} would catch many more lies"
    return (
        f"{found}: this one catches {caught} of the lies and flags {percent(point.alarms)} of the "
        f"honest answers. The best one, chosen in hindsight, {also}catches {best_caught} (AUROC "
        f"{interval_text(point)})"
    )


def bins_title(answers: pd.DataFrame, threshold: float) -> str:
    """Title the histogram of beliefs by how many answers of each kind lie above the threshold.

    `answers` is a table of `judged_answers.judged_answers`.
    """
    counts = []
    for kind in KINDS:
        against = answers.against[answers.kind == kind]
        if len(against):
            counts.append(f"{(against > threshold).sum()} of {len(against)} {kind}")
    if not counts:
        return "There was no answer to judge"
    title = f"The detector flags {listed(counts)}"
    return f"{title}; a mistake is not a lie" if (answers.kind == MISTAKES).any() else title


def examples_title(lines: pd.DataFrame) -> str:
    """Title the figure of the belief by layer by what the first answer shows.

    `lines` is a table of `judged_answers.example_lines`.
    """
    if lines.empty:
        return NOT_SCORED
    first = lines[lines.row_id == lines.row_id.iloc[0]].sort_values("layer")
    for_truth = first.for_truth > 0
    end = "what is true" if for_truth.iloc[-1] else "the opposite"
    return (
        f"{first.answer.iloc[0]}: the probe favours what is true at {for_truth.sum()} of "
        f"{len(first)} layers, and {end} at the last one"
    )


WAY_NAMES = {TAKEN_OUT: "told-to-lie taken out, where twins agree most"}
"""What ways to make a detector are called on a page, where it is not the name in the table."""


def way_lines(ways: pd.DataFrame) -> list[str]:
    """Say which way to make a detector is best on validation rows, and what it is worth on test.

    `ways` is a table of `detector_ways.compare_ways`. Only ways that read the truth, and that need
    not know the instruction of the answer that they judge, are candidates.
    """
    if ways.empty:
        return []
    accuracy = ways.assign(accuracy=accuracy_at(ways, 0.5))
    by_split = {
        split: table.pivot(index="again", columns="way", values="accuracy")
        for split, table in accuracy.groupby("split")
    }
    means = by_split["validation"].mean()
    test = by_split["test"]
    if means[list(DETECTORS)].isna().any() or test.isna().all(axis=None):
        return ["The ways to make a detector are not compared, as no answer was a lie."]
    best = means[list(DETECTORS)].idxmax()
    against_earliest = ""
    if best != EARLIEST:
        n_higher = int((test[best] > test[EARLIEST]).sum())
        against_earliest = (
            f", against {_mean_and_range(test[EARLIEST])} for *honest only* (*{EARLIEST}*). It is "
            f"the higher of the two in {n_higher} of {len(test)} splits"
        )
    test_rows = ways[ways.split == "test"]
    told = test_rows[test_rows.way == TOLD_TO_LIE]
    lines = [
        "Of the methods that do not use the instruction, the best on validation rows is "
        f"*{WAY_NAMES.get(best, best)}*. With as many lies as honest answers, its accuracy on test "
        "rows is "
        f"{_mean_and_range(test[best])} over {len(test)} splits{against_earliest}.",
        "A probe of *told to lie?*, which does not read the truth, flags "
        f"{percent(told.lies.mean())} of the lies and {percent(told.honest.mean())} of the honest "
        "answers.",
    ]
    if told.n_truthful.any():
        shares = test_rows.groupby("way", sort=False).truthful.mean()
        lines.append(
            "Of true answers under an instruction to lie "
            f"({told.n_truthful.mean():.1f} rows per split on average), that probe flags "
            f"{percent(shares[TOLD_TO_LIE])}, the best way {percent(shares[best])}, and *honest "
            f"only* {percent(shares[EARLIEST])}."
        )
    return lines


def _mean_and_range(values: pd.Series) -> str:
    return f"{values.mean():.2f} ({least_to_most(values)})"


# 08: what carries over.


def split_spread(regrouped: pd.DataFrame) -> str:
    """Say how far the score on known rows moves from one split of the examples to another.

    `regrouped` is a table of `carry_over.split_again`. Both rules that choose a layer are named,
    the one of all other tables first.
    """
    compared = rules_compared(regrouped[regrouped.tested_on == SAME]).dropna(subset="mean")
    if compared.empty:
        return NOT_SCORED
    scores = [
        f"{row['mean']:.2f} ({row.least:.2f} to {row.greatest:.2f}) at the {row.rule}"
        for _, row in compared.iterrows()
    ]
    accuracies = listed(f"{accuracy:.2f}" for accuracy in compared.accuracy)
    what = "accuracy is" if len(compared) == 1 else "accuracies are"
    return (
        f"on rows that the model knows, over {compared.splits.iloc[0]} splits, the mean AUROC is "
        f"{' and '.join(scores)}. The mean {what} {accuracies}"
    )


def with_few_twins(by_group: pd.DataFrame) -> str:
    """Name the groups whose probes are read at the earliest good layer, as they have few twins.

    `by_group` is a table of `carry_over.transfer_matrix`, trained on honest rows; of no such group
    the text is empty.
    """
    groups = by_group[(by_group.rule == EARLIEST) & (by_group.trained_on != ALL_OTHERS)]
    names = ", ".join(groups.trained_on.unique())
    if not names:
        return ""
    return f"These are read at the {EARLIEST}, as they have fewer than {MIN_TWINS} twins: {names}."


def rules_verdict(regrouped: pd.DataFrame) -> str:
    """Say which rule chooses the better layer for data that neither fit nor choice has seen."""
    compared = rules_compared(regrouped[regrouped.tested_on != SAME]).dropna(subset="mean")
    if compared.empty:
        return "On data that neither the fit nor the choice has seen, nothing was scored"
    means = compared.pivot(index="tested on", columns="rule", values="mean")
    n_better = int((means[BY_TWINS] > means[EARLIEST]).sum())
    n_worse = int((means[BY_TWINS] < means[EARLIEST]).sum())
    return (
        f"On left-out data, the {BY_TWINS} has the higher mean AUROC in {n_better} of "
        f"{len(means)} tests, and the lower one in {n_worse}. Over all tests, the mean is "
        f"{means[BY_TWINS].mean():.2f}, against {means[EARLIEST].mean():.2f} at the {EARLIEST}"
    )


def carry_over_answer(
    by_dataset: pd.DataFrame,
    regrouped: pd.DataFrame,
    graded: pd.DataFrame,
    triggered: pd.DataFrame,
) -> list[str]:
    """Answer the question of notebook 08 in a few lines."""
    apart = between_groups(by_dataset)
    lines = []
    if len(apart):
        lines.append(
            "* **From one data set to another**, the probe is above chance in "
            f"{(apart.low > 0.5).sum()} of {len(apart)} cases, with an AUROC of "
            f"{least_to_most(apart.estimate)}.{_cases_of_few_rows(apart)}"
        )
    if len(regrouped):
        lines.append(f"* **Over other splits of the same examples**: {split_spread(regrouped)}.")
    if len(graded):
        lines.append(
            f"* **On a model that lies about some topics only**, {graded_sentence(graded)}."
        )
    if len(triggered):
        lines.append(f"* **On a model that lies on a trigger**, {trigger_sentence(triggered)}.")
    return lines


def cases_sentence(cases: pd.DataFrame) -> str:
    """Say which probes carry over from one data set to another, and whether the logistic does best.

    `cases` is a table of `carry_over.count_cases`, whose index names the probes.
    """
    if not cases.cases.any():
        return NOT_SCORED
    counts = [
        f"{probe} {row['above chance']:.0f} of {row.cases:.0f} (lowest AUROC {row.least:.2f})"
        for probe, row in cases.iterrows()
    ]
    text = f"Cases in which a probe is above chance: {', '.join(counts)}"
    others = cases.drop("logistic", errors="ignore")
    if "logistic" not in cases.index or others.empty:
        return text
    logistic = cases.loc["logistic"]
    is_better = (others["above chance"] >= logistic["above chance"]) & (
        others.least > logistic.least
    )
    if is_better.all():
        return f"{text}. Here the other probes carry over at least as well as the logistic one"
    return text


def carry_over_findings(
    by_dataset: pd.DataFrame,
    by_other: Mapping[str, pd.DataFrame],
    styles: pd.DataFrame,
    regrouped: pd.DataFrame,
) -> list[str]:
    """Say what notebook 08 found; `by_other` are further tables of transfer, by what they go by."""
    lines = []
    apart = between_groups(by_dataset)
    if len(apart):
        worst = apart.loc[apart.estimate.idxmin()]
        lines += [
            "* From one data set to another, the probe reads the truth on rows told to lie with an "
            f"AUROC of {least_to_most(apart.estimate)}. It is above chance in "
            f"{(apart.low > 0.5).sum()} of {len(apart)} cases, and below chance in "
            f"{(apart.high < 0.5).sum() or 'none'}.{_cases_of_few_rows(apart)}",
            f"* The lowest score is from {markdown_text(worst.trained_on)} to "
            f"{markdown_text(worst.tested_on)}: {in_brief(worst)}.",
        ]
    for what, table in by_other.items():
        others = left_out(table, what)
        if len(others):
            lines.append(f"* {_left_out_sentence(others, what)}.")
        pairs = between_groups(table)
        if len(pairs):
            lines.append(
                f"* From one single {what} to another, the probe is above chance in "
                f"{(pairs.low > 0.5).sum()} of {len(pairs)} cases.{_cases_of_few_rows(pairs)}"
            )
    for _, row in styles[styles.probe == "logistic"].iterrows():
        lines.append(
            f"* In the style *{markdown_text(row['style'])}*, the {row.probe} probe scores "
            f"{in_brief(row)}, and the model's own answer, reversed, {1 - row.own_answer:.2f}."
        )
    if len(regrouped):
        lines += [
            f"* Over other splits of the same examples: {split_spread(regrouped)}.",
            f"* {rules_verdict(regrouped)}. All other tables in which truth is read use the "
            f"{BY_TWINS} for probes that were fitted on honest rows. The exceptions are those "
            "detectors of notebooks 06 and 12 whose layer is chosen on honest rows alone, the "
            "rankers of draws and their votes (09 and 13), and the mistakes of notebook 10.",
        ]
    return lines


def _cases_of_few_rows(cases: pd.DataFrame) -> str:
    """Say how many cases have fewer rows of the smaller class than a claim needs, if any have."""
    n_few = int((cases.n_smaller < MIN_FOR_HEADLINE).sum())
    if not n_few:
        return ""
    which = f"{n_few} of {len(cases)} cases"
    if n_few == len(cases):
        which = "the only case" if n_few == 1 else f"all {n_few} cases"
    return (
        f" In {which}, the smaller class has fewer than {MIN_FOR_HEADLINE} rows, which is too few "
        "for a claim."
    )


def _range_of_counts(counts: pd.Series) -> str:
    """Write "10 to 19", or the number if all are alike."""
    least, most = counts.min(), counts.max()
    return str(least) if least == most else f"{least} to {most}"


def _left_out_sentence(others: pd.DataFrame, what: str) -> str:
    """Say how groups are read that were left out of training, and whether they clearly differ."""
    text = (
        f"When one {what} is left out of training, the AUROC on it is "
        f"{least_to_most(others.estimate)}, with {_range_of_counts(others.n)} rows each "
        f"({_range_of_counts(others.n_smaller)} in the smaller class)"
    )
    if others.n_smaller.max() < MIN_FOR_HEADLINE:
        return (
            f"{text}. A claim needs {MIN_FOR_HEADLINE} rows of the smaller class, so nothing is "
            f"claimed about any single {what}"
        )
    if few := _cases_of_few_rows(others):
        text = f"{text}.{few.removesuffix('.')}"
    if others.low.max() <= others.high.min():
        return f"{text}. The intervals all overlap, so no difference is shown"
    worst, best = others.estimate.idxmin(), others.estimate.idxmax()
    return (
        f"{text}. The lowest is {markdown_text(worst)} ({interval_text(others.loc[worst])}), and "
        f"the highest {markdown_text(best)} ({interval_text(others.loc[best])})"
    )


def styles_title(styled: pd.DataFrame) -> str:
    """Title the figure of scores in other styles, from the table of `carry_over.style_table`.

    The range over the probes is given: the best one would have been picked on the test rows.
    """
    others = styled[styled["style"] != "clean"]
    if others.empty:
        return NOT_SCORED
    ranges = [f"{style} {_range(scores)}" for style, scores in others.groupby("style").estimate]
    return f"AUROC of the {others.probe.nunique()} probes in each style: {', '.join(ranges)}"


def curve_title(curve: pd.DataFrame) -> str:
    """Title the figure of scores by the number of training rows, from `carry_over.curve`."""
    scores = []
    for probe, of_probe in curve.groupby("probe", sort=False):
        few, all_rows = (
            of_probe.loc[place] for place in (of_probe.n_train.idxmin(), of_probe.n_train.idxmax())
        )
        scores.append(f"{probe} {few.estimate:.2f} and {all_rows.estimate:.2f}")
    if not scores:
        return NOT_SCORED
    return (
        f"AUROC with {curve.n_train.min()} training rows (mean over {curve.draws.max()} random "
        f"subsets), and with all {curve.n_train.max()}: {', '.join(scores)}"
    )


# 08: a second training.


def over_splits(of_splits: pd.DataFrame, where: str = ALL_ROWS) -> str:
    """Say what the probe and its best rival score over the splits of one training, on some rows.

    `of_splits` is a table of `trainings.score_over_splits`, and `where` one of its kinds of rows.
    """
    compared = _summary_of_splits(of_splits, where)
    probe, rivals = compared.loc[PROBE], compared["mean"].drop(PROBE)
    return (
        f"the probe scores {probe['mean']:.2f} ({probe.least:.2f} to {probe.greatest:.2f}) and its "
        f"best rival ({rivals.idxmax()}) {rivals.max():.2f}"
    )


def _summary_of_splits(of_splits: pd.DataFrame, where: str) -> pd.DataFrame:
    compared = trainings_compared({"": of_splits})
    return compared[compared["where"] == where].set_index("who")


def trainings_agree(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Whether two trainings say the same of the probe, by tables of `trainings.score_over_splits`.

    They do if, on known rows and on all rows, the mean score of each lies in the range of the other
    over the splits, and if the probe is on the same side of its best rival in both.
    """
    return all(_agree_on(first, second, where) for where in (KNOWN_ROWS, ALL_ROWS))


NOT_AHEAD = "in neither does the probe score"


def _agreement(first: pd.DataFrame, second: pd.DataFrame) -> str:
    """Say in which way two trainings agree that do so by `trainings_agree`."""
    where_by_side: dict[str, list[str]] = {}
    for where in (KNOWN_ROWS, ALL_ROWS):
        means = _summary_of_splits(first, where)["mean"]
        is_ahead = means.drop(PROBE).max() < means[PROBE]
        side = "in both the probe scores" if is_ahead else NOT_AHEAD
        where_by_side.setdefault(side, []).append(f"on {where}")
    sides = []
    for side, places in where_by_side.items():
        where = (" or " if side == NOT_AHEAD else " and ").join(places)
        sides.append(f"{side} higher than its best rival, {where}")
    return (
        "So the two training runs agree: the mean score of each lies within the range of the "
        f"other, and {', but '.join(sides)}."
    )


def _agree_on(first: pd.DataFrame, second: pd.DataFrame, where: str) -> bool:
    both = [_summary_of_splits(table, where) for table in (first, second)]
    probes = [table.loc[PROBE] for table in both]
    is_near = all(
        one.least <= other["mean"] <= one.greatest for one, other in (probes, reversed(probes))
    )
    is_ahead = [table["mean"].drop(PROBE).max() < table["mean"][PROBE] for table in both]
    return bool(is_near and is_ahead[0] == is_ahead[1])


def can_compare_trainings(tables: Mapping[str, pd.DataFrame]) -> bool:
    """Whether there are two trainings, each with enough test rows of both classes for a claim."""
    enough = [len(table) and table.n_smaller.min() >= MIN_FOR_HEADLINE for table in tables.values()]
    return len(tables) == 2 and all(enough)


def trainings_findings(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Say what each training scores over the splits, by model, and whether the second agrees."""
    lines = [
        f"* With {markdown_text(model)}, on {where} and over {table.again.nunique()} splits, "
        f"{over_splits(table, where)}."
        for model, table in tables.items()
        for where in table["where"].unique()
    ]
    if not can_compare_trainings(tables):
        return [
            *lines,
            "* Nothing is claimed about a second training run: there was none, or one of the two "
            "runs has too few rows.",
        ]
    if trainings_agree(*tables.values()):
        return [*lines, f"* {_agreement(*tables.values())}"]
    return [*lines, "* So the two training runs do not agree."]


# 08: a model that lies about some topics only.


_USE = {
    WHAT_IS_TRUE: "to read what is true",
    LIE_OR_NOT: "to tell lies from truthful answers",
    trigger.WHAT_IS_TRUE: "to read what is true in triggered rows",
    trigger.LIE_OR_NOT: "to tell lies from truthful answers to the same prompts on other days",
}
"""What the probe is used for on a further model, by the question that is put to it."""


def graded_sentence(graded: pd.DataFrame) -> str:
    """Say how well a probe tells what is true, next to the own answer and to the strongest control.

    `graded` is a table of `tables.graded.with_rivals`.
    """
    text = _compared_with(graded, WHAT_IS_TRUE, TURNED)
    of_truth = graded[graded.question == WHAT_IS_TRUE].set_index("who")
    best = _strongest_control(graded, WHAT_IS_TRUE)
    if best in (None, TURNED) or too_few_for_a_claim(of_truth.loc[PROBE]):
        return text
    control = of_truth.loc[best]
    return (
        f"{text}. {_better_or_worse(control, 'it')} the strongest control, *{best}* (AUROC "
        f"{interval_text(control)}, a difference of {interval_text(control, 'gain', signed=True)})"
    )


def _strongest_control(table: pd.DataFrame, question: str) -> str | None:
    """Name the control with the highest AUROC; None if the question was not scored."""
    of_question = table[table.question == question].set_index("who").estimate
    if PROBE not in of_question.index or len(of_question) == 1:
        return None
    return of_question.drop(PROBE).idxmax()


def _better_or_worse(control: pd.Series, probe: str = "the probe") -> str:
    """Begin to say whether the probe beats a control, by the interval of the difference."""
    if control.gain_low > 0:
        return _capitalised(f"{probe} is better than")
    if control.gain_high < 0:
        return _capitalised(f"{probe} is worse than")
    return f"Nothing shows that {probe} is better or worse than"


def too_few_for_a_claim(row: pd.Series) -> bool:
    """Whether a score on a further model has fewer test rows than a claim needs."""
    return bool(row.n < ENOUGH_ROWS or row.n_smaller < ENOUGH_PER_CLASS)


def graded_findings(graded: pd.DataFrame) -> list[str]:
    """Say what notebook 08 found on a model that lies about some topics only."""
    if graded.empty:
        return []
    named = {TURNED, _strongest_control(graded, WHAT_IS_TRUE)}
    return [
        f"* On a model that lies about some topics only, {graded_sentence(graded)}.",
        *_other_controls(graded, WHAT_IS_TRUE, named),
        f"* There, {_compared_with(graded, LIE_OR_NOT, TOPIC)}.",
    ]


def _other_controls(table: pd.DataFrame, question: str, named: Collection[str | None]) -> list[str]:
    """List the scores of the controls that were not `named` yet, in one line; none if none are."""
    of_question = table[(table.question == question) & ~table.who.isin([PROBE, *named])]
    scores = [f"{interval_text(row)} (*{row.who}*)" for row in of_question.itertuples()]
    if not scores:
        return []
    if len(scores) == 1:
        return [f"* The other control scores {scores[0]}."]
    return [f"* The other controls score {', '.join(scores[:-1])} and {scores[-1]}."]


def _compared_with(table: pd.DataFrame, question: str, control: str) -> str:
    """Compare the probe with one control; say which is better, or that the rows are too few."""
    of_question = table[table.question == question].set_index("who")
    if PROBE not in of_question.index or control not in of_question.index:
        return "this comparison was not scored, as there are too few rows"
    probe, other = of_question.loc[PROBE], of_question.loc[control]
    text = (
        f"a probe fitted on honest answers (layer {probe.layer}), used {_USE[question]}, has AUROC "
        f"{interval_text(probe)}, and *{control}* has {interval_text(other)}. The difference is "
        f"{interval_text(other, 'gain', signed=True)}, with n = {probe.n} (smaller class "
        f"{probe.n_smaller})"
    )
    if too_few_for_a_claim(probe):
        return f"{text}. A claim needs {ENOUGH_ROWS} rows, and {ENOUGH_PER_CLASS} of either class"
    return f"{text}. {_better_or_worse(other)} this control"


def graded_title(graded: pd.DataFrame) -> str:
    """Title the figure of the probe and its rivals on a model that lies about some topics only."""
    of_truth = graded[graded.question == WHAT_IS_TRUE].set_index("who")
    if PROBE not in of_truth.index or TURNED not in of_truth.index:
        return "A model that lies about some topics only: not scored"
    if too_few_for_a_claim(of_truth.loc[PROBE]):
        return "A model that lies about some topics only: too few rows for a claim"
    rivals = of_truth.estimate.drop(PROBE)
    title = (
        f"On a model that lies about some topics only, the probe of what is true has AUROC "
        f"{of_truth.estimate[PROBE]:.2f}. Its own answer, reversed, gives {rivals[TURNED]:.2f}"
    )
    if rivals.idxmax() == TURNED:
        return title
    return f"{title}; {rivals.idxmax()}, {rivals.max():.2f}"


# 08: asked about the answer.


_TO_READ = {
    WHAT_IS_TRUE: "to read what is true",
    LIE_OR_NOT: "to tell lies from truthful answers",
}


def follow_up_finding(tables: Mapping[str, pd.DataFrame], question: str) -> str:
    """Say whether a question is easier to answer from states at a follow-up than at the answer.

    `tables` holds a table of `tables.follow_up.compare_places` for each model, by its name, and
    `question` is one of theirs. Only scores on enough rows of either class count
    (`MIN_FOR_HEADLINE`); models without them are named.
    """
    to_read = _TO_READ[question]
    of_question = {name: table[table.question == question] for name, table in tables.items()}
    enough = {
        name: table.assign(model=name)
        for name, table in of_question.items()
        if len(table) and table.n_smaller.min() >= MIN_FOR_HEADLINE
    }
    counted = pd.DataFrame(columns=["who"])
    if enough:
        counted = pd.concat(enough.values(), ignore_index=True)
    probes = counted[counted.who.isin([*PROBE_AT.values(), *DIRECT_AT.values()])]
    if probes.empty:
        return (
            f"Whether a follow-up question makes it easier {to_read} is not known, as there are "
            "too few rows"
        )
    n_better = int((probes.gain_high < 0).sum())
    n_worse = int((probes.gain_low > 0).sum())
    n_above_words = int((probes.lead_low > 0).sum())
    if n_better == len(probes):
        finding = f"makes it easier {to_read}"
    elif n_worse == len(probes):
        finding = f"makes it harder {to_read}"
    elif n_better and n_worse:
        finding = (
            f"makes it clearly easier {to_read} for {n_better} of {len(probes)} probes, and "
            f"clearly harder for {n_worse}"
        )
    elif n_better:
        finding = (
            f"makes it clearly easier {to_read} for {n_better} of {len(probes)} probes, and "
            "clearly harder for none"
        )
    elif n_worse:
        finding = (
            f"makes it clearly harder {to_read} for {n_worse} of {len(probes)} probes, and "
            "clearly easier for none"
        )
    else:
        finding = f"makes it neither clearly easier nor clearly harder {to_read}"
    models = listed(markdown_text(name) for name in enough)
    at_answer = _range(counted.estimate[counted.who == AT_ANSWER])
    at_follow_up = [
        f"{_range(counted.estimate[counted.who.isin(names)])} for probes that learned {what}"
        for what, names in _AT_FOLLOW_UP.items()
        if counted.who.isin(names).any()
    ]
    sentences = [
        f"By AUROC, a follow-up question {finding}",
        f"Of {len(probes)} probes that read the state there (on {models}), {n_better} score "
        f"clearly higher than the probe at the answer and {n_worse} clearly lower, "
        f"and {n_above_words} score clearly higher than what the model says there",
        f"The AUROC is {at_answer} at the answer, and at the follow-up it is "
        f"{' and '.join(at_follow_up)}",
        _accuracies(counted, probes),
    ]
    for name, table in of_question.items():
        if name not in enough:
            sentences.append(_not_counted(name, table))
    return ". ".join(sentences)


def _accuracies(counted: pd.DataFrame, probes: pd.DataFrame) -> str:
    """Say how often probes are right at their thresholds, and which one at a follow-up is worst."""
    lowest = probes.loc[probes.accuracy.idxmin()]
    return (
        "With thresholds set on honest rows, the accuracy is "
        f"{_range(counted.accuracy[counted.who == AT_ANSWER])} for the probe at the answer, and "
        f"{_range(probes.accuracy)} for probes at the follow-up (lowest: *{lowest.who}*, on "
        f"{markdown_text(lowest.model)})"
    )


def _not_counted(model: str, table: pd.DataFrame) -> str:
    """Say why nothing is claimed about a model."""
    reason = "which has too few rows"
    if len(table):
        n_smaller = table.n_smaller.min()
        reason = f"where one class has {n_smaller} rows, and {MIN_FOR_HEADLINE} are needed"
    return f"Nothing is claimed about {markdown_text(model)}, {reason}"


_AT_FOLLOW_UP = {
    "which choice is right": list(PROBE_AT.values()),
    "whether the answer was true": list(DIRECT_AT.values()),
}
"""What probes at a follow-up learn -> their names in a table of `tables.follow_up`."""


def _range(scores: pd.Series) -> str:
    """Write the range of scores; of scores that are printed alike, one of them."""
    least, most = f"{scores.min():.2f}", f"{scores.max():.2f}"
    return least if least == most else f"{least} to {most}"


def follow_up_findings(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Say what a follow-up question changes, one sentence for each question put to the states."""
    return [f"* {follow_up_finding(tables, question)}." for question in _TO_READ]


# 08: a model that lies on a trigger.


def trigger_title(triggered: pd.DataFrame) -> str:
    """Title the figure of the probe and its rivals on a model that lies on a trigger.

    `triggered` is a table of `tables.trigger.with_trigger`.
    """
    of_lies = triggered[triggered.question == trigger.LIE_OR_NOT].set_index("who")
    if PROBE not in of_lies.index:
        return "A model that lies on a trigger: not scored"
    probe = of_lies.loc[PROBE]
    if too_few_for_a_claim(probe):
        return "A model that lies on a trigger: too few rows for a claim"
    found = "does not clearly tell lies from truthful answers"
    if probe.low > 0.5:
        found = "tells lies from truthful answers"
    elif probe.high < 0.5:
        found = "takes truthful answers for lies"
    title = (
        f"On a model that lies on a trigger, a probe fitted without the trigger {found} (AUROC "
        f"{interval_text(probe)})"
    )
    if trigger.TRIGGER_THERE not in of_lies.index:
        return title
    return f"{title}. Knowing the trigger gives {of_lies.estimate[trigger.TRIGGER_THERE]:.2f}"


def trigger_sentence(triggered: pd.DataFrame) -> str:
    """Say how well lies on the trigger are told from truthful answers on other days."""
    best = _strongest_control(triggered, trigger.WHAT_IS_TRUE)
    sentences = [
        _compared_with(triggered, trigger.LIE_OR_NOT, trigger.TRIGGER_THERE),
        *_accuracy_sentence(
            "With its threshold set on honest rows, the probe judges {} of these answers correctly",
            triggered,
            trigger.LIE_OR_NOT,
            trigger.TRIGGER_THERE,
        ),
        *_accuracy_sentence(
            "The probe judges correctly what is true in {} of the triggered rows",
            triggered,
            trigger.WHAT_IS_TRUE,
            best,
        ),
    ]
    return ". ".join(sentences)


def _accuracy_sentence(
    what: str, table: pd.DataFrame, question: str, control: str | None
) -> list[str]:
    """Say how often the probe and a control are right; nothing if either was not scored.

    `what` has a pair of braces where the share of the probe goes.
    """
    accuracy = table[table.question == question].set_index("who").accuracy
    if not {PROBE, control} <= set(accuracy.index):
        return []
    of_probe, of_control = percent(accuracy[PROBE]), percent(accuracy[control])
    return [f"{what.format(of_probe)}, against {of_control} for *{control}*"]


def trigger_findings(triggered: pd.DataFrame) -> list[str]:
    """Say what notebook 08 found on a model that lies on a trigger."""
    if triggered.empty:
        return []
    best = _strongest_control(triggered, trigger.WHAT_IS_TRUE) or trigger.ASKED_WITHOUT
    return [
        f"* On a model that lies on a trigger, {trigger_sentence(triggered)}.",
        f"* There, {_compared_with(triggered, trigger.WHAT_IS_TRUE, best)}.",
        *_other_controls(triggered, trigger.WHAT_IS_TRUE, [best]),
    ]


# 09: pairs and votes.


def votes_of_most_draws(votes: pd.DataFrame) -> str:
    """Write the score of each way to vote, with all draws."""
    is_vote = (votes.draws == votes.draws.max()) & (votes.method != "mean answer")
    found = [f"{interval_text(row)} ({row.method})" for row in votes[is_vote].itertuples()]
    return listed(found) if found else NOT_SCORED


def _mean_answer(votes: pd.DataFrame) -> str:
    """Say what the mean answer of all draws scores if it is reversed; nothing if it is absent."""
    is_mean = (votes.draws == votes.draws.max()) & (votes.method == "mean answer")
    if not is_mean.any():
        return ""
    reversed_answer = 1 - votes.estimate[is_mean].iloc[0]
    return f" The mean answer of these draws, reversed, reads it with {reversed_answer:.2f}."


SHOWN_LOSS = "pair_ranking"
"""The loss whose scores notebook 09 shows by how far the answer has to move."""


def pairs_title(pairs: pd.DataFrame) -> str:
    """Count the rankings of two passes that are above chance on rows told to lie."""
    told_to_lie = pairs[(pairs.least_move == 0) & (pairs.regime == LYING)]
    n_above = int((told_to_lie.low > 0.5).sum())
    return (
        f"On rows told to lie, {n_above} of {len(told_to_lie)} rankings of two passes are above "
        f"chance. The figure shows the loss {SHOWN_LOSS}, by the smallest change that counts"
    )


def best_and_worst_losses(pairs: pd.DataFrame) -> pd.DataFrame:
    """Select the loss with the highest and with the lowest AUROC for each kind of pair.

    Of all pairs that moved, on rows that ask for a lie; `pairs` is `pairs_and_votes.pairs`.
    """
    told_to_lie = pairs[(pairs.least_move == 0) & (pairs.regime == LYING)]
    ordered = told_to_lie.sort_values("estimate", ascending=False, kind="stable")
    by_kind = ordered.groupby("pairs", sort=False)
    both = pd.concat([by_kind.head(1), by_kind.tail(1)])
    both = both[~both.index.duplicated()]
    return both.sort_values(["pairs", "estimate"], ascending=[True, False])


def pair_findings(pairs: pd.DataFrame, votes: pd.DataFrame, one_state: str) -> list[str]:
    """Say what notebook 09 found; `one_state` is the score of one clean state, for comparison."""
    lines = []
    all_moves = pairs[pairs.least_move == 0]
    told_to_lie = all_moves[all_moves.regime == LYING]
    honest = all_moves[all_moves.regime != LYING]
    if len(told_to_lie):
        best = told_to_lie.loc[told_to_lie.estimate.idxmax()]
        lines += [
            f"* On rows that ask for a lie, {_rankings_above(told_to_lie)}. The highest score, "
            "which is too optimistic because it was picked on the test rows, is "
            f"that of {best.probe} on *{best.pairs}*: {in_brief(best)}."
            f"{_cases_of_few_rows(told_to_lie)}",
            f"* {_visible(told_to_lie)}.",
        ]
    if len(honest):
        best = honest.loc[honest.estimate.idxmax()]
        lines.append(
            f"* On honest rows, {_rankings_above(honest)}. The highest score is that of "
            f"{best.probe} on *{best.pairs}*: {interval_text(best)}, against "
            f"{best.estimate - best.lift:.2f} for the control *{best.best_control}*."
        )
    if len(votes):
        lines.append(
            f"* On rows told to lie, votes over {votes.draws.max()} draws read the truth with "
            f"AUROC {votes_of_most_draws(votes)}.{_mean_answer(votes)} A probe of one state "
            f"without dropout reaches {one_state}."
        )
    return lines


def _visible(pairs: pd.DataFrame) -> str:
    """Say from which AUROC on tests of so many pairs detect one, by the kind of pair."""
    kinds = pairs.drop_duplicates("pairs").sort_values("n_smaller", ascending=False)
    ends = kinds.iloc[[0, -1]].drop_duplicates("n_smaller")
    found = [
        f"{visible_auroc(int(row.n), int(row.n_smaller)):.2f} for *{row.pairs}* "
        f"({row.n_smaller} of {row.n} rows in the smaller class)"
        for row in ends.itertuples()
    ]
    return (
        "To be detected four times out of five, an AUROC has to be at least "
        f"{listed(found)}. Smaller effects may have been missed"
    )


def _rankings_above(pairs: pd.DataFrame) -> str:
    """Count the rankings of two passes that are above chance, and above their best control."""
    n_kinds, n_losses = pairs.pairs.nunique(), pairs.probe.nunique()
    n_above, n_better = int((pairs.low > 0.5).sum()), int((pairs.lift_low > 0).sum())
    is_above = "is" if n_above < 2 else "are"
    beat = "beats its" if n_better < 2 else "beat their"
    return (
        f"{n_above or 'none'} of the {len(pairs)} rankings ({n_losses} losses on {n_kinds} kinds "
        f"of pairs) {is_above} above chance, and {n_better or 'none'} {beat} strongest control"
    )


# 10: mistakes.


def raised_title(mistakes: pd.DataFrame) -> str:
    """Count the mistakes that raise the score, by the rule of `tables.headlines.that_raise`."""
    if mistakes.empty:
        return NOT_SCORED
    raised = that_raise(mistakes)
    title = (
        f"{interval_text(mistakes.iloc[0])} without a mistake. {len(raised)} of "
        f"{len(mistakes) - 1} mistakes raise the score"
    )
    if raised.empty:
        return title
    top = raised.loc[raised.estimate.idxmax()]
    return f"{title}, to {top.estimate:.2f} at most ({top.mistake})"


IN_WORDS = {
    CLEAN: "none",
    "as it should be": "without a mistake",
    CLAIMS["the next word taken for the truth"][1]: "it scores the model's next word, which is all "
    "that can be read when both choices begin alike",
    "truth": "a probe of truth",
    TRUTH_OF_LIES: "a probe of truth that was fitted on honest rows and read on rows that ask for "
    "a lie",
    "truth, on rows of either kind": "a probe of truth on rows of either kind",
    "whether an answer was a lie": "a detector of lies",
}
"""What a page calls mistakes, their kinds, and what their scores look like."""


def mistakes_in_words(mistakes: pd.DataFrame) -> pd.DataFrame:
    """Put the words of a page in a table of `headlines.with_each_mistake`, with kinds or not."""
    return mistakes.replace(IN_WORDS)


F1_OF_DECEPTION = "three classes, F1 of deception"
"""The reported number of three classes; see `headlines.REPORTED`."""


DICE_OF_HEADS = "heads, state and gradient, dice loss"
"""A reported number whose probe is fitted here on less; see `headlines.clean_numbers`."""


def survivors_finding(table: pd.DataFrame) -> str:
    """Say which reported numbers are reached here, from the table of `headlines.survivors`."""
    answers = table["reached here"]
    reached = list(table.index[answers.isin([REACHED, REACHED_BY_INTERVAL])])
    by_interval = list(table.index[answers == REACHED_BY_INTERVAL])
    missed = list(table.index[answers == NOT_REACHED])
    n_measured = len(reached) + len(missed)
    if not n_measured:
        return "None of the reported numbers was measured again"
    text = (
        f"Of {n_measured} reported numbers that were measured again, a clean evaluation reaches "
        f"{len(reached) or 'none'} here"
    )
    if reached:
        text += (
            f": {_in_italics(reached)}. Reached means that the score is above chance, and that it, "
            "or the upper end of its interval, is at least the lowest number reported"
        )
    if by_interval:
        are = "are" if len(by_interval) > 1 else "is"
        text += f". {_in_italics(by_interval)} {are} reached only by the upper end of the interval"
    if DICE_OF_HEADS in reached:
        text += (
            f". Here *{DICE_OF_HEADS}* was measured on the residual stream alone, without heads "
            "and gradient"
        )
    if F1_OF_DECEPTION in reached:
        cell = table["here, cleanly"][F1_OF_DECEPTION]
        text += f". Read the F1 of deception next to that of its control ({cell})"
    if missed:
        text += f". A clean evaluation does not reach {_in_italics(missed, 'or')}"
    return text


def _in_italics(names: Sequence[str], conjunction: str = "and") -> str:
    """Write names that may have commas in a row."""
    return listed((f"*{name}*" for name in names), conjunction)


def headline_findings(table: pd.DataFrame, mistakes: Mapping[str, pd.DataFrame]) -> list[str]:
    """Answer the question of notebook 10: which numbers are reached, and what mistakes do.

    `table` is that of `headlines.survivors`; `mistakes` are the tables of mistakes by model.
    """
    lines = [f"* {survivors_finding(table)}."]
    for model, scores in mistakes.items():
        lines.append(f"* {markdown_text(model)}: AUROC {raised_title(scores)}.{_not_made(scores)}")
    return lines


def _not_made(mistakes: pd.DataFrame) -> str:
    """Name the mistakes that could not be made on a model."""
    absent = [name for name in CLAIMS if name not in set(mistakes.mistake)]
    if mistakes.empty or not absent:
        return ""
    return f" {_in_italics(absent)} could not be tried, because one class has too few rows."


def other_model_sentence(model_name: str, gate: pd.DataFrame) -> str:
    """Say what a model that was not trained to lie knows, before the mistakes are made on it.

    `gate` is the table of `evaluation.behaviour.knowledge_gate`.
    """
    begin = "Where the clean score is already high, a mistake can add little. So we repeat this on"
    name = markdown_text(model_name)
    known = [markdown_text(dataset) for dataset in gate.dataset[gate.passes]]
    if known:
        return f"{begin} {name}, on the data sets that it knows: {', '.join(known)}."
    right = gate.truth_accuracy
    return (
        f"{begin} {name}, which knows none of the data sets (told to tell the truth, it answers "
        f"{percent(right.min())} to {percent(right.max())} of the questions correctly). The "
        "knowledge gate refuses them all. We set it aside here, because only the mistakes are "
        "compared."
    )


def with_mistake(mistakes: Mapping[str, pd.DataFrame], beginning: str) -> str:
    """Write the score of each model with the mistake whose name begins so."""
    found = []
    for model, table in mistakes.items():
        estimates = table.estimate[table.mistake.str.startswith(beginning)]
        found += [f"{model} {estimate:.2f}" for estimate in estimates]
    return "; ".join(found)


def mistake_findings(mistakes: Mapping[str, pd.DataFrame]) -> list[str]:
    """Say what notebook 10 found, from the tables of mistakes by model; the first is the liar."""
    lines = []
    for model, table in mistakes.items():
        if table.empty:
            lines.append(
                f"* {markdown_text(model)}: there are too few rows of one class, so nothing was "
                "scored."
            )
            continue
        clean = table.iloc[0]
        lines.append(f"* Without a mistake, {markdown_text(model)} scores {in_brief(clean)}.")
        for row in mistakes_in_words(that_raise(table)).itertuples():
            overlap = " The two intervals overlap." if row.low <= clean.high else ""
            lines.append(
                f"* With *{row.mistake}*, {markdown_text(model)} scores {interval_text(row)} "
                f"instead of {interval_text(clean)}.{overlap} This looks like the score of "
                f"{row.claim}, but {row.but}."
            )
    return lines


# 11: steering.

NOTHING_MOVED = "changes no more answers than controls of its length do"
NOT_BOTH_LABELS = "changes answers, but the effect is clear for at most one of the two labels"
EITHER_SIGN = (
    "turns lies into right answers with either sign, as neither an answer nor a belief would"
)
FITS_NEITHER = "changes answers in a pattern that fits neither an answer nor a belief"
NOT_AS_TOLD = "changes answers, but not only as the instruction would"
CELLS = ("lie +", "lie -", "truth +", "truth -")
"""The rows by role, and the ways to push them; see `tables.steering.effects`."""
READINGS = {
    frozenset({"lie +", "truth -"}): "moves the answer",
    frozenset({"lie -", "truth -"}): "moves what the model takes to be true",
    frozenset({"lie +"}): "moves lies only, as an answer would",
    frozenset({"lie -"}): "moves lies only, as a belief would",
    frozenset({"truth -"}): "moves honest answers only",
}
"""What a direction that means "choice 1" moves, by the cells in which it changes answers."""


def steering_verdict(effect: pd.Series, direction: str) -> str:
    """Say what a direction moves, from its row of `tables.steering.effects`.

    A direction that means "choice 1" can move two things. If it is the answer, a push towards the
    right choice makes lies into right answers. If it is what the model takes to be true, a push
    away from it does: the model then lies about the opposite. Either way, honest rows that are
    pushed away from the right choice are answered wrongly. If a direction also changes answers that
    neither of the two would change, the verdict names no reading: any strong push may change many
    answers.
    """
    moved = frozenset(cell for cell in CELLS if effect[cell] > 0)
    moved_at_all = moved | {cell for cell in CELLS if effect[f"some {cell}"] > 0}
    if not moved_at_all:
        return NOTHING_MOVED
    if not moved:
        return NOT_BOTH_LABELS
    if direction == TOLD:
        is_as_told = moved_at_all <= {"lie +", "truth -"}
        return "moves whether the model lies" if is_as_told else NOT_AS_TOLD
    if {"lie +", "lie -"} <= moved_at_all:
        return EITHER_SIGN
    return FITS_NEITHER if "truth +" in moved_at_all else READINGS[moved]


def steering_table(responses: pd.DataFrame, dose: float) -> pd.DataFrame:
    """Show what pushes by one dose do, a row for each direction, with a verdict.

    The first four columns hold the shares of rows that answer other than they are told to, and the
    fifth the highest of these shares along controls that are as long as the direction.
    """
    if responses.empty:
        return pd.DataFrame()
    pushes = responses[responses.dose.abs().sub(dose).abs() < 1e-9]
    controls = pushes[pushes.direction.isin(CONTROLS)].groupby("as_long_as").disobeyed.max()
    effect_of = effects(pushes, dose)
    headings = {
        ("lie", 1): "told to lie, answers truthfully, push +",
        ("lie", -1): "told to lie, answers truthfully, push -",
        ("truth", 1): "told to tell the truth, answers wrongly, push +",
        ("truth", -1): "told to tell the truth, answers wrongly, push -",
    }
    rows = {}
    for direction, cells in as_long_as_truth(pushes).groupby("direction", sort=False):
        row = {}
        for (role, sign), heading in headings.items():
            cell = cells[(cells.role == role) & (cells.dose * sign > 0)]
            # No line may break within the brackets.
            row[heading] = interval_text(cell.iloc[0], "disobeyed").replace(", ", ",\u00a0")
        if direction in CONTROLS:
            row |= {"controls of its length, at most": np.nan, "verdict": "control"}
        else:
            row["controls of its length, at most"] = f"{controls[direction]:.2f}"
            row["verdict"] = steering_verdict(effect_of.loc[direction], direction)
        rows[direction] = row
    return pd.DataFrame(rows).T.rename_axis("direction")


def _push(responses: pd.DataFrame, direction: str, dose: float, role: str) -> pd.Series:
    """The row of one push."""
    is_push = (responses.direction == direction) & (responses.role == role)
    return responses[is_push & ((responses.dose - dose).abs() < 1e-9)].iloc[0]


def _most_along_controls(responses: pd.DataFrame, dose: float, role: str) -> float:
    """The highest share of rows that disobey after a push along a control as long as `TRUTH`."""
    controls = as_long_as_truth(responses[responses.direction.isin(CONTROLS)])
    is_push = (controls.role == role) & ((controls.dose.abs() - dose).abs() < 1e-9)
    return controls.disobeyed[is_push].max()


def steering_title(responses: pd.DataFrame, dose: float, role: str) -> str:
    """Title the curve of one role: what the truth direction does at the dose, and the controls."""
    if responses.empty:
        return NOT_SCORED
    told, are = ("lie", "right") if role == "lie" else ("tell the truth", "wrong")
    towards, away = (_push(responses, TRUTH, sign * dose, role).disobeyed for sign in (1, -1))
    controls = percent(_most_along_controls(responses, dose, role))
    return (
        f"On rows told to {told}, {percent(towards)} of the answers are {are} after a push by "
        f"{dose:g} towards the truth, and {percent(away)} after a push by {dose:g} away from it. "
        f"Pushes of this length along controls give at most {controls}"
    )


def steering_in_brief(
    responses: pd.DataFrame, dose: float, overview: pd.DataFrame | None = None
) -> str:
    """Say in a few sentences what pushes along the direction of truth do.

    `overview` is the table of `tables.steering.overview`, which knows how long a push is.
    """
    if responses.empty:
        return NOT_SCORED
    towards, away = (_push(responses, TRUTH, signed, "lie") for signed in (dose, -dose))
    length = ""
    if overview is not None and len(overview):
        push = overview.set_index("direction").push[TRUTH]
        length = f" ({percent(dose * push)} of the mean length of a state)"
    verdict = steering_verdict(effects(responses, dose).loc[TRUTH], TRUTH)
    text = (
        f"Told to lie and pushed by {dose:g} standard deviations along the direction of truth"
        f"{length}, the model answers {_in_percent(towards)} of {towards.n} rows truthfully if "
        f"pushed towards the truth, and {_in_percent(away)} if pushed away from it. Pushes of the "
        "same length along controls give at most "
        f"{percent(_most_along_controls(responses, dose, 'lie'))}."
    )
    if verdict not in (EITHER_SIGN, FITS_NEITHER):
        return f"{text} So the direction {verdict}"
    towards, away = (_push(responses, TRUTH, signed, "truth") for signed in (dose, -dose))
    return (
        f"{text} Told to tell the truth, it answers {_in_percent(towards)} of {towards.n} rows "
        f"wrongly if pushed towards the truth, and {_in_percent(away)} if pushed away from it. "
        f"{_no_reading(verdict)} "
        f"{_capitalised(by_sign(responses, dose))}. A push of this length may also just disturb "
        "the state, so this is weak evidence of what the direction stands for"
    )


def _no_reading(verdict: str) -> str:
    """Say why the direction of truth stands for neither the answer nor a belief."""
    if verdict == EITHER_SIGN:
        return (
            "So a push of either sign turns lies into right answers. A direction that stands for "
            "the answer, or for what the model takes to be true, would do so with one sign only."
        )
    return f"So the direction {verdict}."


def _in_percent(push: pd.Series) -> str:
    """Write the share of rows that disobey, with its interval, such as "29 % [20, 39]"."""
    low, high = (f"{100 * push[f'disobeyed_{end}']:.0f}" for end in ("low", "high"))
    return f"{percent(push.disobeyed)} [{low}, {high}]"


LIES_BY_SIGN = {
    0: "lies do not clearly depend on the sign of the push",
    1: "lies change clearly more often when pushed towards the truth, as "
    "we would expect if the direction stood for the answer",
    -1: "lies change clearly more often when pushed away from the truth, as "
    "we would expect if the direction stood for a belief",
}
HONEST_BY_SIGN = {
    0: "Honest answers do not clearly depend on the sign of the push",
    1: "Honest answers change clearly more often when pushed towards the truth, which we would "
    "not expect whether the direction stood for the answer or for a belief",
    -1: "Honest answers change clearly more often when pushed away from the truth, as we would "
    "expect whether the direction stood for the answer or for a belief",
}


def by_sign(responses: pd.DataFrame, dose: float) -> str:
    """Say whether lies and honest answers depend on the sign of a push along the truth direction.

    They clearly do if the intervals of the two shares do not overlap. The text begins in lower
    case.
    """
    sign_of = {}
    for role in ("lie", "truth"):
        towards, away = (_push(responses, TRUTH, signed, role) for signed in (dose, -dose))
        is_towards = towards.disobeyed_low > away.disobeyed_high
        is_away = away.disobeyed_low > towards.disobeyed_high
        sign_of[role] = int(is_towards) - int(is_away)
    if not any(sign_of.values()):
        return "neither lies nor honest answers clearly depend on the sign of the push"
    return f"{LIES_BY_SIGN[sign_of['lie']]}. {HONEST_BY_SIGN[sign_of['truth']]}"


def layers_title(responses: pd.DataFrame) -> str:
    """Say from which layer on the twin's state carries the answer with it."""
    if responses.empty:
        return NOT_SCORED
    twin = responses[(responses.direction == TWIN) & (responses.role == "lie")]
    share = twin.groupby("layer").disobeyed.max()
    turned, others = share.index[share >= 0.5], share.index[share < 0.5]
    if turned.empty:
        return (
            "At no layer does the honest twin's state turn half of the lies into true answers "
            f"(at most {percent(share.max())})"
        )
    to_the_end = turned if others.empty else turned[turned > others.max()]
    if to_the_end.empty:
        where = f"At {_layers([str(layer) for layer in turned])}"
    else:
        where = f"From layer {to_the_end.min()} on"
    return f"{where}, the honest twin's state turns at least half of the lies into true answers"


def layer_verdicts(responses: pd.DataFrame, dose: float) -> str:
    """Say at which layers the direction of truth that was fitted there moves what."""
    layers_of: dict[str, list[str]] = {}
    for layer, of_layer in responses[responses.direction != TWIN].groupby("layer"):
        verdict_there = steering_verdict(effects(of_layer, dose).loc[TRUTH], TRUTH)
        layers_of.setdefault(verdict_there, []).append(str(layer))
    found = [f"At {_layers(layers)} it {said}." for said, layers in layers_of.items()]
    if not found:
        return f"The direction of truth at each layer: {NOT_SCORED}."
    return f"The direction of truth was also fitted at each layer. {' '.join(found)}"


def _layers(layers: Sequence[str]) -> str:
    """Write "layers 3, 9 and 15", say."""
    *before, last = layers
    return f"layers {', '.join(before)} and {last}" if before else f"layer {last}"


def steering_findings(
    pushed: pd.DataFrame,
    by_layer: pd.DataFrame,
    dose: float,
    overview: pd.DataFrame | None = None,
) -> list[str]:
    """Say what notebook 11 found.

    `pushed` and `by_layer` are tables of `tables.steering.responses`, and `overview` is that of
    `tables.steering.overview`.
    """
    if pushed.empty:
        return []
    verdicts = effects(pushed, dose)
    directions = (*TRUTHS, *RIVALS)
    said = {name: steering_verdict(verdicts.loc[name], name) for name in directions}
    return [
        f"* {steering_in_brief(pushed, dose, overview)}.",
        f"* {_verdicts_in_words(said)}",
        f"* {layers_title(by_layer)}.",
    ]


def _verdicts_in_words(verdict_of: Mapping[str, str]) -> str:
    """Count the directions that change answers, and say which of them do what."""
    names_by_verdict: dict[str, list[str]] = {}
    for name, verdict_there in verdict_of.items():
        if verdict_there != NOTHING_MOVED:
            names_by_verdict.setdefault(verdict_there, []).append(f"*{name}*")
    n_moving = sum(map(len, names_by_verdict.values()))
    sentences = [
        f"{n_moving or 'None'} of {len(verdict_of)} directions "
        f"{'changes' if n_moving == 1 else 'change'} more answers than controls of their length "
        "do, for at least one sign of the push and one instruction."
    ]
    for verdict_there, names in names_by_verdict.items():
        verb, rest = verdict_there.split(" ", 1)
        *before, last = names
        listed = f"{', '.join(before)} and {last}" if before else last
        count, verb = ("One", verb) if not before else (len(names), verb.removesuffix("s"))
        sentences.append(f"{_NUMBERS.get(count, count)} {verb} {rest} ({listed}).")
    return " ".join(sentences)


_NUMBERS = {2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six", 7: "Seven"}


def everywhere_table(everywhere: pd.DataFrame) -> pd.DataFrame:
    """Write out what was changed in the rows of `tables.steering.everywhere`, once counted."""
    changes = [
        f"{where} pushed by {dose:+g}" if dose else f"removed from the {where}"
        for where, dose in zip(everywhere["where"], everywhere.dose, strict=True)
    ]
    layers = ["all" if layer < 0 else str(layer) for layer in everywhere.layer]
    return everywhere.assign(change=changes, layer=layers)


def everywhere_findings(everywhere: pd.DataFrame, dose: float) -> list[str]:
    """Say what pushes of all tokens do, and how much damage it does to remove a direction."""
    if everywhere.empty:
        return []
    removed = everywhere[everywhere.dose == 0]
    of_truth = removed.unreadable[removed.direction == TRUTH]
    of_others = removed.unreadable[removed.direction != TRUTH]
    shares = [percent(share) for share in dict.fromkeys([of_truth.min(), of_truth.max()])]
    unreadable = f"{percent(of_others.max())} or less cannot be read"
    if not of_others.max():
        unreadable = "all answers can be read"
    line = (
        f"* With the direction of truth removed, {' to '.join(dict.fromkeys(shares))} of the "
        f"answers cannot be read. With another direction removed, {unreadable}."
    )
    if (removed.unreadable_low[removed.direction == TRUTH] > 0).any():
        line += " So some of the effect of removing the direction of truth is damage."
    return [f"* When all tokens are pushed, {by_sign(everywhere, dose)}.", line]


# 12: one's own questions.


def explore_title(answers: pd.DataFrame) -> str:
    """Say what the system prompts change, from the table of `explore.answers_table`."""
    by_text = answers.groupby("text", sort=False)
    n_answers = int((by_text.says.nunique() > 1).sum())
    title = f"The system prompt changes the answer to {n_answers} of {by_text.ngroups} claims"
    if "believes" not in answers:
        return title
    n_beliefs = int((by_text.believes.nunique() > 1).sum())
    return f"{title}, and the sign of the belief for {n_beliefs or 'none'} of {by_text.ngroups}"


def explore_findings(answers: pd.DataFrame) -> list[str]:
    """Conclude what the model says and believes of claims under each system prompt."""
    lines = [f"* {explore_title(answers)}."]
    for prompt, rows in answers.groupby("system_prompt", sort=False):
        line = f"* Under *{markdown_text(prompt)}*, the model says {_counts(rows.says)}."
        if "believes" in rows:
            n_apart = int((rows.says != rows.believes).sum())
            line += (
                f" The probe reads {_counts(rows.believes)}. The two disagree on "
                f"{n_apart or 'none'} of {len(rows)} claims. The verdict is "
                f"{_counts(rows.verdict)}."
            )
        lines.append(line)
    return lines


def changes_sentence(changes: pd.DataFrame) -> str:
    """Say whether the belief about a question keeps its sign, beginning in lower case.

    `changes` is a table of `Explorer.changes`.

    The verdict compares this sign with what the model says, so it depends on it.
    """
    keeps_sign = (changes.belief > 0) == (changes.belief["nothing"] > 0)
    counts = {}
    for change in ("dropout draw", "step"):
        of_change = keeps_sign[keeps_sign.index.str.startswith(change)]
        counts[change] = (int((~of_change).sum()), len(of_change))
    (draws, n_draws), (steps, n_steps) = counts["dropout draw"], counts["step"]
    if not draws and not steps:
        return f"the belief keeps its sign in all {n_draws} dropout draws and {n_steps} steps."
    return (
        f"the belief changes its sign in {draws} of {n_draws} dropout draws and in {steps} of "
        f"{n_steps} steps along the gradient, so the verdict on this answer is not robust."
    )


def chats_findings(turns: Sequence[pd.DataFrame]) -> list[str]:
    """Say whether scores of tokens have one sign in a turn, from the `turns` of `ChatScores`."""
    if not turns:
        return []
    parts = pd.concat(turns)
    n_mixed = int(((parts.lowest < 0) & (parts.highest > 0)).sum())
    return [
        f"* In {n_mixed} of {len(parts)} parts of the chats, some tokens score above 0 and some "
        f"below. The mean scores of the parts range from {parts['mean'].min():+.1f} to "
        f"{parts['mean'].max():+.1f}. A single token shows little."
    ]


def _counts(values: pd.Series) -> str:
    """Say how often each value occurs, such as "*true* 3 times and *false* once"."""
    times = {1: "once", 2: "twice"}
    counts = [
        f"*{markdown_text(value)}* {times.get(n, f'{n} times')}"
        for value, n in Counter(values).most_common()
    ]
    *before, last = counts
    return f"{', '.join(before)} and {last}" if before else last
