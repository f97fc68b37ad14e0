"""What may be said of the tables of notebooks 05 to 12: headlines, verdicts, titles, sentences.

No module of tables imports this one, so that a change of words computes nothing again. Titles are
plain text. The functions called `..._findings` write Markdown, with names escaped.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from dlk_utils.evaluation.detector import TruthDetector
from dlk_utils.evaluation.stats import visible_auroc
from dlk_utils.evaluation.tasks import KNOWN, MIN_FOR_HEADLINE, POSITIVE_CONTROL, REGIMES
from dlk_utils.lab.display import interval_text
from dlk_utils.lab.escaping import markdown_text
from dlk_utils.lab.tables import in_brief, least_to_most
from dlk_utils.lab.tables.carry_over import (
    BY_TWINS,
    EARLIEST,
    SAME,
    between_groups,
    left_out,
    rules_compared,
)
from dlk_utils.lab.tables.detector_ways import DETECTORS, accuracy_at
from dlk_utils.lab.tables.detector_ways import EARLIEST as EARLIEST_WAY
from dlk_utils.lab.tables.detector_ways import TOLD as TOLD_TO_LIE
from dlk_utils.lab.tables.probe_ablations import NAMED_PROBE
from dlk_utils.lab.tables.steering import (
    CONTROLS,
    RANDOM,
    RIVALS,
    TOLD,
    TRUTH,
    TRUTHS,
    TWIN,
    effects,
)

AUROC = "signed AUROC on test (95 % interval; dashed: chance)"
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
        return f"no headline, as one class has only {row.n_smaller} test rows"
    if row.high < 0.5:
        return "inverted: below chance"
    # Written so that an interval of nan, which no comparison holds for, is no evidence.
    if not row.low > 0.5:
        return "not distinguishable from chance"
    if row.lift_low > 0:
        return f"above chance and above {row.best_control}"
    return f"above chance, but not above {row.best_control}"


def in_words(row: pd.Series | None) -> str:
    """Say the headline of a task in one sentence; None is a task that was not scored."""
    if row is None:
        return "not scored, as one class has too few rows"
    control = f"{row.best_control} {row.estimate - row.lift:.2f}"
    lift = interval_text(row, "lift", signed=True)
    return (
        f"AUROC {in_brief(row)}; given the layer {row.given_layer}; "
        f"accuracy at its threshold {row.accuracy:.2f}; best control: {control}, lift {lift}: "
        f"{verdict(row)}"
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
    """Say whether the probe beats those who ask the model, on known rows told to lie."""
    known = rivals[rivals["where"] == "known rows told to lie"]
    probe = known[known.who.str.startswith("probe of truth")]
    others = known.drop(probe.index)
    if probe.empty or others.empty:
        return "Known rows told to lie: too few"
    better = others[others.estimate >= probe.estimate.iloc[0]]
    strongest = others.loc[others.estimate.idxmax()]
    return (
        f"{len(better)} of {len(others)} rivals read the truth as well as the probe or better; "
        f"the strongest: {strongest.who} ({strongest.estimate:.2f})"
    )


def turn_title(results: pd.DataFrame) -> str:
    """Title the figure of truth by layer, read on rows told to lie about what the model knows."""
    row = headline(results, "truth", KNOWN)
    found = "too few rows"
    if row is not None:
        found = f"layer {row.layer}, chosen on honest rows, has AUROC {interval_text(row)}"
    return f"Truth, read while told to lie about what it knows: {found}"


def gradient_adds(curves: pd.DataFrame) -> str:
    """Say what the gradient adds to the state, by what the probe was fitted on.

    `curves` is a table of `probe_ablations.curves`. The layer is the one chosen for the state.
    """
    found = [
        f"fitted on {row.fitted_on} it {_effect(row)} the score of the state by "
        f"{interval_text(row, 'gain', signed=True)} (layer {row.layer})"
        for row in _at_chosen_layer(curves, "both")
    ]
    return "; ".join(found) or "not scored"


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
            f"Fitted on {row.fitted_on}, at layer {row.layer}: {scores}. Beside the state the "
            f"gradient {_effect(both)} the score by {interval_text(both, 'gain', signed=True)}."
        )
        if len(own_answer):
            line += (
                " Alone, it orders the answers about to be given with AUROC "
                f"{row.own_answer:.2f} ({least_to_most(own_answer)} over the layers; 0 is their "
                "opposite)."
            )
        lines.append(line)
    return lines


def _at_chosen_layer(curves: pd.DataFrame, feature: str) -> list[Any]:
    """Return the rows of a feature at the layer chosen for the state, one a way of fitting."""
    return list(curves[curves.chosen.astype(bool) & (curves.feature == feature)].itertuples())


def _effect(row: Any) -> str:
    """Say whether a gain is above or below zero with its whole interval."""
    if row.gain_low > 0:
        return "raises"
    return "lowers" if row.gain_high < 0 else "does not clearly change"


def probe_findings(
    results: pd.DataFrame,
    skipped: Sequence[str],
    gains: pd.DataFrame,
    curves: pd.DataFrame,
    classes: pd.DataFrame,
    gate: pd.DataFrame,
) -> list[str]:
    """Say what notebook 05 found."""
    lines = []
    for _, row in summary(results).iterrows():
        fit = f"{row.how}: {row.probe}, {row.feature}, {row.site} {row.layer}"
        lines.append(f"* **{row.target}**, {row.regime} ({fit}): {in_words(row)}")
    for sentence in skipped:
        task, reason = sentence.split(": ", 1)
        lines.append(f"* **{task}** was not scored: {markdown_text(reason)}")
    lines += [f"* {sentence}" for sentence in gradient_lines(curves)]
    for row in gains[gains.feature == "both"].itertuples():
        gain, over = (interval_text(row, x, signed=True) for x in ("gain", "over_residual"))
        lines.append(
            f"* {row.site}: with the gradient the score changes by {gain}; the two together are "
            f"{over} from the residual stream's state."
        )
    for row in classes[classes["class"] == "macro avg"].itertuples():
        lines.append(f"* **{row.method}**: macro F1 {row.f1:.2f}")
    if not gate.passes.any():
        lines.append(
            "* No data set passed the gate, so **none of these numbers is a claim** about what the "
            "model believes."
        )
    return lines


# 06: the detector.


def flagged(rates: pd.DataFrame, detector: str, of: str) -> str:
    """Write the share of lies or of honest answers that a detector flags, over all data sets."""
    if (detector, of, "all") not in rates.index:
        return "not scored"
    row = rates.loc[(detector, of, "all")]
    if not row.n:
        return "not scored, as there are none"
    return f"{interval_text(row, 'flagged')}, n = {int(row.n)}"


def detector_findings(
    rates: pd.DataFrame,
    detectors: Mapping[str, TruthDetector],
    judges: Sequence[str],
    ways: pd.DataFrame,
) -> list[str]:
    """Say what notebook 06 found.

    `judges` are the detectors that judge every lie; `ways` is a table of
    `detector_ways.compare_ways`.
    """
    if not detectors:
        return []
    lines, met = [], []
    for name in dict.fromkeys([*judges, *detectors]):
        lies, honest = (flagged(rates, name, of) for of in ("lies", "honest answers"))
        if name in judges:
            lines.append(
                f"* **{name}**: of the lies it flags {lies}; of the honest answers {honest}."
            )
            shares = rates.flagged[name].xs("all", level="dataset")
            if shares["lies"] >= 0.9 and shares["honest answers"] <= 0.05:
                met.append(name)
        else:
            lines.append(
                f"* Each half alone: *{name}* flags {lies} of the lies under families that it has "
                f"not seen, and {honest} of the honest answers."
            )
    for name, detector in detectors.items():
        card = detector.card
        validation = f"on validation rows (AUROC {card['validation_auroc']:.2f})"
        lines.append(
            f"* The detector *{name}* reads {detector.site} after block {detector.layer}, chosen "
            f"from {card['compared']} layers {validation}."
        )
    goal = "The figures to reach are 0.90 of the lies at 0.05 of the honest answers."
    lines.append(f"* {goal} Met by: {', '.join(met) or '**none**'}.")
    return [*lines, *(f"* {sentence}" for sentence in way_lines(ways))]


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
    n_higher = int((test[best] > test[EARLIEST_WAY]).sum())
    test_rows = ways[ways.split == "test"]
    told = test_rows[test_rows.way == TOLD_TO_LIE]
    lines = [
        f"Of the ways to make a detector that need not know the instruction, the best on "
        f"validation rows is: {best}. At equal base rates its accuracy on test rows is "
        f"{_mean_and_range(test[best])} over {len(test)} splits, that of the card "
        f"({EARLIEST_WAY}) {_mean_and_range(test[EARLIEST_WAY])}; it is higher in {n_higher} of "
        f"{len(test)} splits.",
        f"A probe of *told to lie?*, which reads no truth, flags {told.lies.mean():.2f} of the "
        f"lies and {told.honest.mean():.2f} of the honest answers.",
    ]
    if told.n_truthful.any():
        shares = test_rows.groupby("way", sort=False).truthful.mean()
        lines.append(
            f"Of truthful answers under an instruction to lie (on average "
            f"{told.n_truthful.mean():.1f} rows a split), that probe flags "
            f"{shares[TOLD_TO_LIE]:.2f}, the best way {shares[best]:.2f}, and the card "
            f"{shares[EARLIEST_WAY]:.2f}."
        )
    return lines


def _mean_and_range(values: pd.Series) -> str:
    return f"{values.mean():.2f} ({least_to_most(values)})"


# 08: what carries over.


def split_spread(regrouped: pd.DataFrame) -> str:
    """Say how far the score on known rows moves from one split of the examples to another.

    `regrouped` is a table of `carry_over.split_again`. Both rules that choose a layer are named.
    """
    compared = rules_compared(regrouped[regrouped.tested_on == SAME]).dropna(subset="mean")
    found = [f"{_spread(row)} at the {row.rule}" for _, row in compared.iterrows()]
    return "; ".join(found) or "not scored"


def _spread(row: pd.Series) -> str:
    """Write the spread over splits of a row of `carry_over.rules_compared`."""
    return (
        f"mean {row['mean']:.2f} ({row.least:.2f} to {row.greatest:.2f} over {row.splits} splits, "
        f"accuracy {row.accuracy:.2f})"
    )


def rules_verdict(regrouped: pd.DataFrame) -> str:
    """Say which rule chooses the better layer for data that neither fit nor choice has seen."""
    compared = rules_compared(regrouped[regrouped.tested_on != SAME]).dropna(subset="mean")
    if compared.empty:
        return "On data that neither the fit nor the choice has seen, nothing was scored"
    means = compared.pivot(index="tested on", columns="rule", values="mean")
    n_better = int((means[BY_TWINS] > means[EARLIEST]).sum())
    n_worse = int((means[BY_TWINS] < means[EARLIEST]).sum())
    return (
        f"On what was left out, the {BY_TWINS} has the higher mean in {n_better} of {len(means)} "
        f"tests and the lower in {n_worse}; over all of them {means[BY_TWINS].mean():.2f} against "
        f"{means[EARLIEST].mean():.2f} for the {EARLIEST}"
    )


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
        best = apart.loc[apart.estimate.idxmax()]
        lines += [
            "* From one data set to another, truth is read on rows told to lie with AUROC "
            f"{least_to_most(apart.estimate)}; {(apart.low > 0.5).sum()} of {len(apart)} ways are "
            f"above chance, {(apart.high < 0.5).sum()} below.",
            f"* The best way goes from {markdown_text(best.trained_on)} to "
            f"{markdown_text(best.tested_on)}: {in_brief(best)}.",
        ]
    for what, table in by_other.items():
        others = left_out(table, what).estimate
        if len(others):
            lines.append(
                f"* Left out of training, the {what} read worst is "
                f"{markdown_text(others.idxmin())} with {others.min():.2f}, the one read best "
                f"{markdown_text(others.idxmax())} with {others.max():.2f}."
            )
    for _, row in styles[styles.probe == "logistic"].iterrows():
        lines.append(
            f"* In the style *{markdown_text(row['style'])}* the {row.probe} probe reads "
            f"{in_brief(row)} (the model's own answer {row.own_answer:.2f})."
        )
    if len(regrouped):
        lines += [
            f"* Other splits of the same examples, on rows that the model knows: "
            f"{split_spread(regrouped)}.",
            f"* {rules_verdict(regrouped)}. The {EARLIEST} is the rule of all other tables.",
        ]
    return lines


# 09: pairs and votes.


def votes_of_most_draws(votes: pd.DataFrame) -> str:
    """Write the score of each way to vote, with all draws."""
    is_vote = (votes.draws == votes.draws.max()) & (votes.method != "mean answer")
    found = [f"{row.method} {interval_text(row)}" for row in votes[is_vote].itertuples()]
    return "; ".join(found) or "not scored"


def pair_findings(pairs: pd.DataFrame, votes: pd.DataFrame, one_state: str) -> list[str]:
    """Say what notebook 09 found; `one_state` is the score of one clean state, for comparison."""
    lines = []
    all_moves = pairs[pairs.least_move == 0]
    for (kind, regime), table in all_moves.groupby(["pairs", "regime"], sort=False):
        best = table.loc[table.estimate.idxmax()]
        visible = visible_auroc(best.n, best.n_smaller)
        lines.append(
            f"* **{kind}**, {regime}: the best of {len(table)} losses on test is {best.probe} with "
            f"{in_brief(best)}; {(table.lift_low > 0).sum()} of {len(table)} beat their best "
            f"control, {best.best_control} ({best.estimate - best.lift:.2f}). With these rows an "
            f"AUROC of {visible:.2f} or more would be seen four times out of five."
        )
    if len(votes):
        voted = votes_of_most_draws(votes)
        lines.append(
            f"* Votes of {votes.draws.max()} draws: {voted}. One clean state, no draws at all: "
            f"{one_state}."
        )
    return lines


# 10: mistakes.


def mistakes_title(mistakes: pd.DataFrame) -> str:
    """Compare the score as it should be with the highest one."""
    if mistakes.empty:
        return "As it should be: not scored"
    top = mistakes.loc[mistakes.estimate.idxmax()]
    clean = mistakes.estimate.iloc[0]
    return f'As it should be: {clean:.2f}. With "{top.mistake}": {top.estimate:.2f}'


def raised_title(mistakes: pd.DataFrame) -> str:
    """Count the mistakes with which a score is above chance."""
    if mistakes.empty:
        return "not scored"
    n_above = (mistakes.low > 0.5).sum()
    return (
        f"as it should be {interval_text(mistakes.iloc[0])}. Above chance, wrongly: {n_above} of "
        f"{len(mistakes) - 1}"
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
    first = next(iter(mistakes.values()))
    if first.empty:
        lines = ["* Too few rows of one class: nothing was scored."]
    else:
        lines = [f"* As it should be: {in_brief(first)}."]
    for model, table in mistakes.items():
        clean = table.estimate.head(1).sum()
        for row in table.tail(-1).itertuples():
            if row.low > max(0.5, clean):
                lines.append(
                    f"* {markdown_text(model)}, with *{row.mistake}*: {interval_text(row)} "
                    f"instead of {clean:.2f}, which would be read as: {row.claim}."
                )
    return lines


# 11: steering.

NOTHING_MOVED = "moves no more than the controls do"


def steering_verdict(effect: pd.Series, direction: str) -> str:
    """Say what a direction moves, from its row of `tables.steering.effects`.

    A direction that means "choice 1" can move two things. If it is the answer, a push towards the
    right choice makes lies into right answers. If it is what the model takes to be true, a push
    away from it does: the model then lies about the opposite. Either way, honest rows that are
    pushed away from the right choice come to lie. A direction that also moves rows which should
    stay as they are is not one of these alone, and the verdict says so.
    """
    lie_plus, lie_minus = effect["lie +"] > 0, effect["lie -"] > 0
    honest_minus = effect["truth -"] > 0
    moved = NOTHING_MOVED
    stays = ("lie -", "truth +")
    if direction == TOLD:
        if lie_plus or honest_minus:
            moved = "moves whether it lies"
    elif lie_plus and lie_minus:
        return "disturbs lies, whichever way it is pushed"
    elif lie_plus:
        moved = "moves the answer" if honest_minus else "moves lies alone, as an answer would"
    elif lie_minus:
        moved = "moves what it takes to be true"
        if not honest_minus:
            moved = "moves lies alone, as a belief would"
        stays = ("lie +", "truth +")
    elif honest_minus:
        moved = "moves honest answers alone"
    if any(effect[f"some {cell}"] > 0 for cell in stays):
        in_no_way = "moves some rows, as neither a belief nor an answer would"
        return in_no_way if moved == NOTHING_MOVED else f"{moved}, but also rows that should stay"
    return moved


def steering_table(responses: pd.DataFrame, dose: float) -> pd.DataFrame:
    """Show what pushes by one dose do, a row for each direction, with a verdict.

    The four middle columns hold the shares of rows that answer other than they are told to.
    """
    if responses.empty:
        return pd.DataFrame()
    is_dose = responses.dose.abs().sub(dose).abs() < 1e-9
    pushes = responses[is_dose]
    effect_of = effects(pushes, dose)
    headings = {
        ("lie", 1): "told to lie, tells the truth: pushed by +",
        ("lie", -1): "by -",
        ("truth", 1): "told to tell the truth, lies: pushed by +",
        ("truth", -1): "by - ",
    }
    rows = {}
    for direction, cells in pushes.groupby("direction", sort=False):
        row = {}
        for (role, sign), heading in headings.items():
            cell = cells[(cells.role == role) & (cells.dose * sign > 0)]
            row[heading] = interval_text(cell.iloc[0], "disobeyed")
        row["unreadable, at most"] = f"{cells.unreadable.max():.2f}"
        if direction not in CONTROLS:
            row["verdict"] = steering_verdict(effect_of.loc[direction], direction)
        rows[direction] = row
    return pd.DataFrame(rows).T.fillna("control").rename_axis("direction")


def _push(responses: pd.DataFrame, direction: str, dose: float, role: str) -> pd.Series:
    """The row of one push."""
    is_push = (responses.direction == direction) & (responses.role == role)
    return responses[is_push & ((responses.dose - dose).abs() < 1e-9)].iloc[0]


def steering_title(responses: pd.DataFrame, dose: float, role: str) -> str:
    """Title the curve of one role: what the truth direction does at the dose, and a random one."""
    if responses.empty:
        return "not scored"
    told, does = ("lie", "tell the truth") if role == "lie" else ("tell the truth", "lie")
    shares = [
        f"{way} {_push(responses, TRUTH, signed, role).disobeyed:.2f}"
        for way, signed in (("towards the truth", dose), ("away from it", -dose))
    ]
    random = max(_push(responses, RANDOM, signed, role).disobeyed for signed in (dose, -dose))
    return (
        f"Told to {told}, pushed by {dose:g} deviations: these {does}: {', '.join(shares)}; "
        f"random directions, either way, at most {random:.2f}"
    )


def steering_in_brief(responses: pd.DataFrame, dose: float) -> str:
    """Say in one sentence what pushes along the direction of truth do to rows told to lie."""
    if responses.empty:
        return "not scored"
    towards, away = (_push(responses, TRUTH, signed, "lie") for signed in (dose, -dose))
    random = _push(responses, RANDOM, dose, "lie")
    effect = effects(responses, dose).loc[TRUTH]
    return (
        f"pushed by {dose:g} standard deviations along the direction of truth, a liar answers "
        f"truthfully in {interval_text(towards, 'disobeyed')} (towards the truth) and "
        f"{interval_text(away, 'disobeyed')} (away from it) of {towards.n} rows, along random "
        f"directions in {random.disobeyed:.2f}: the direction {steering_verdict(effect, TRUTH)}"
    )


def layers_title(responses: pd.DataFrame) -> str:
    """Say from which layer on the twin's state carries the answer with it."""
    if responses.empty:
        return "not scored"
    twin = responses[(responses.direction == TWIN) & (responses.role == "lie")]
    carried = twin.layer[twin.disobeyed >= 0.5]
    if carried.empty:
        return (
            "At no layer does the honest twin's state make half of the lies into truths "
            f"(at most {twin.disobeyed.max():.2f})"
        )
    return (
        f"From layer {carried.min()} on, the honest twin's last state makes half of the lies or "
        "more into truths"
    )


def layer_verdicts(responses: pd.DataFrame, dose: float) -> str:
    """Say at which layers the direction of truth that was fitted there moves what."""
    layers_of: dict[str, list[str]] = {}
    for layer, of_layer in responses[responses.direction != TWIN].groupby("layer"):
        verdict_there = steering_verdict(effects(of_layer, dose).loc[TRUTH], TRUTH)
        layers_of.setdefault(verdict_there, []).append(str(layer))
    return "; ".join(f"at {', '.join(layers)} it {said}" for said, layers in layers_of.items())


def steering_findings(
    undisturbed: pd.DataFrame,
    pushed: pd.DataFrame,
    by_layer: pd.DataFrame,
    everywhere: pd.DataFrame,
    dose: float,
) -> list[str]:
    """Say what notebook 11 found, from the tables of `tables.steering.responses`."""
    if pushed.empty:
        return []
    of_role = undisturbed.set_index("role")
    lie, truth = of_role.loc["lie"], of_role.loc["truth"]
    lines = [
        f"* Undisturbed, {interval_text(lie, 'disobeyed')} of {lie.n} known rows told to lie are "
        f"answered truthfully, and {interval_text(truth, 'disobeyed')} of their twins, told to "
        "tell the truth, wrongly."
    ]
    effect_of = effects(pushed, dose)
    for direction in (*TRUTHS, *RIVALS):
        cells = {
            (role, sign): _push(pushed, direction, sign * dose, role)
            for role in ("lie", "truth")
            for sign in (1, -1)
        }
        texts = {key: interval_text(cell, "disobeyed") for key, cell in cells.items()}
        unreadable = max(cell.unreadable for cell in cells.values())
        lines.append(
            f"* **{direction}** {steering_verdict(effect_of.loc[direction], direction)}. Pushed by "
            f"{dose:+g} and {-dose:+g}, those told to lie tell the truth in {texts['lie', 1]} and "
            f"{texts['lie', -1]}, those told to tell the truth lie in {texts['truth', 1]} and "
            f"{texts['truth', -1]}; unreadable are at most {unreadable:.2f}."
        )
    controls = pushed[pushed.direction.isin(CONTROLS) & (pushed.dose.abs() - dose).abs().lt(1e-9)]
    lines.append(
        f"* Controls of the same length ({', '.join(CONTROLS)}) change these shares by "
        f"{controls.difference.min():+.2f} to {controls.difference.max():+.2f}; unreadable are at "
        f"most {controls.unreadable.max():.2f}."
    )
    lines.append(f"* {layers_title(by_layer)}.")
    lines.append(
        f"* Layer by layer, the direction of truth fitted there, pushed by {dose:g} either "
        f"way: {layer_verdicts(by_layer, dose)}."
    )
    return [*lines, *_everywhere_findings(everywhere)]


def _everywhere_findings(everywhere: pd.DataFrame) -> list[str]:
    lines = []
    for (direction, dose), cells in everywhere.groupby(["direction", "dose"], sort=False):
        cell = cells.set_index("role")
        change = f"pushed by {dose:+g} at all tokens"
        if dose == 0:
            change = "taken out of the last token at all layers"
        lines.append(
            f"* *{direction}*, {change}: told to lie, "
            f"{interval_text(cell.loc['lie'], 'disobeyed')} tell the truth; told to tell the "
            f"truth, {interval_text(cell.loc['truth'], 'disobeyed')} lie; unreadable are "
            f"{cell.unreadable['lie']:.2f} and {cell.unreadable['truth']:.2f}."
        )
    return lines


# 12: one's own questions.


def explore_title(answers: pd.DataFrame) -> str:
    """Say what the system prompts change, from the table of `explore.answers_table`."""
    by_text = answers.groupby("text", sort=False)
    n_answers = int((by_text.says.nunique() > 1).sum())
    title = f"The system prompt changes the answer to {n_answers} of {by_text.ngroups} claims"
    if "believes" not in answers:
        return title
    n_beliefs = int((by_text.believes.nunique() > 1).sum())
    return f"{title}, and the belief about {n_beliefs}"


def explore_findings(answers: pd.DataFrame) -> list[str]:
    """Conclude what the model says and believes of claims under each system prompt."""
    lines = [f"* {explore_title(answers)}."]
    for prompt, rows in answers.groupby("system_prompt", sort=False):
        line = f"* Told *{markdown_text(prompt)}*: {_counts(rows.says)} said"
        if "believes" in rows:
            line += f"; {_counts(rows.believes)} believed; verdicts: {_counts(rows.verdict)}"
        lines.append(f"{line}.")
    return lines


def _counts(values: pd.Series) -> str:
    """Say how often each value occurs, such as "3 true, 1 false"."""
    counts = Counter(values).most_common()
    return ", ".join(f"{n} {markdown_text(value)}" for value, n in counts)
