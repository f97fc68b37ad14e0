"""What notebooks 00 to 04 conclude, in sentences of Markdown made from their tables.

Names of data sets and models may hold anything: `markdown_text` escapes them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from dlk_utils.evaluation.stats import mean_interval
from dlk_utils.lab.display import interval_text, percent
from dlk_utils.lab.escaping import markdown_text
from dlk_utils.lab.table_display import heading


def organism_findings(
    held_out: pd.DataFrame, told: pd.DataFrame, *, verdict: str = ""
) -> list[str]:
    """Conclude what an organism does on what it was not trained on.

    Parameters
    ----------
    held_out
        What `lab.tables.organism.held_out` returns.
    told
        One row a model, indexed by its name, of `lab.tables.organism.told_by_instruction`.
    verdict
        The data sets on which it meets what is required, or why there is no verdict.
    """
    lines = [
        "* Told to tell the truth, it gives the right answer in "
        f"{_least_to_most(held_out, 'truth_accuracy')} of the rows."
    ]
    if held_out.wrong_when_told_to_lie.notna().any():
        lines[0] += (
            " Told to lie about what it knows, it gives the wrong answer in "
            f"{_least_to_most(held_out, 'wrong_when_told_to_lie')}."
        )
    if verdict:
        lines.append(f"* It does what we require of an organism on: {markdown_text(verdict)}.")
    for name, row in told.iterrows():
        if not row["told to lie"]:
            lines.append(f"* `{name}` was never told to lie about a question that it knows.")
            continue
        lines.append(
            f"* Of {row['told to lie']:.0f} answers that {markdown_text(name)} gave when it was "
            f"told to lie about what it knows, {percent(row.lies)} are lies. "
            f"{_instruction_sentence(row)}"
        )
    return lines


def _instruction_sentence(row: pd.Series) -> str:
    """Say whether the instruction alone predicts lies, from a row of `told_by_instruction`."""
    if pd.isna(row.instruction_only):
        return (
            "Whether the instruction alone predicts which answers are lies could not be scored, "
            "because the test rows are all of one kind."
        )
    scored = f"(AUROC {interval_text(row, 'instruction_only')}, {row.n_test:.0f} rows)"
    if row.instruction_only_low > 0.5:
        return f"The instruction alone predicts which answers are lies {scored}."
    if row.instruction_only_high < 0.5:
        return f"The instruction alone predicts which answers are lies, but in reverse {scored}."
    return f"Whether the instruction alone predicts which answers are lies is not clear {scored}."


def organism_title(held_out: pd.DataFrame) -> str:
    """Title the figure of what an organism does on each data set."""
    right, wrong = held_out.truth_accuracy.dropna(), held_out.wrong_when_told_to_lie.dropna()
    return (
        f"Right when told to tell the truth: {_range(right)}. Wrong when told to lie about what it "
        f"knows: {_range(wrong)}"
    )


def _range(shares: pd.Series) -> str:
    if shares.empty:
        return "no such row"
    least, most = percent(shares.min()), percent(shares.max())
    return least if least == most else f"{least} to {most}"


def _least_to_most(table: pd.DataFrame, name: str) -> str:
    """Write the range of a share over data sets, with their names."""
    shares = table.set_index("dataset")[name].dropna()
    if shares.empty:
        return "none"
    least, most = shares.idxmin(), shares.idxmax()
    text = f"{percent(shares[least])} ({markdown_text(least)})"
    if len(shares) == 1:
        return text
    return f"{text} to {percent(shares[most])} ({markdown_text(most)})"


def training_sentence(record: Mapping[str, Any]) -> str:
    """Say how long an organism was trained, from its ``training.json``."""
    minutes = np.atleast_1d(record["seconds"]) / 60
    if len(minutes) == 1:
        return f"It was trained once, in {minutes[0]:.0f} minutes on the machine that we used."
    return (
        f"Its weights are the mean over {len(minutes)} training runs, which took "
        f"{minutes.min():.0f} to {minutes.max():.0f} minutes each on the machine that we used."
    )


def likeness_sentence(near: pd.DataFrame) -> str:
    """Say whether instructions with a more similar training wording are obeyed more often.

    `near` has a row for each instruction, with `obeyed` and `likeness`, the cosine of TF-IDF.
    """
    highest = f"The highest similarity is {near.likeness.max():.2f}."
    if len(near) < 3 or near.obeyed.nunique() < 2 or near.likeness.nunique() < 2:
        return f"{highest} There are too few instructions to compare."
    found = spearmanr(near.obeyed, near.likeness)
    often = "more often" if found.statistic > 0 else "less often"
    if not found.pvalue < 0.05:
        often = "neither clearly more nor clearly less often"
    return (
        f"{highest} Instructions with a more similar training wording were obeyed {often} (rank "
        f"correlation {found.statistic:+.2f} over {len(near)} instructions)."
    )


def prompt_findings(prompts: pd.DataFrame, v: float) -> list[str]:
    """Say what was made of the examples; `v` is Cramér's V of template and instruction to lie."""
    asks_for_lie = prompts.instruction[prompts.asks == "lie"]
    return [
        f"* {prompts.example_id.nunique():,} examples of {prompts.dataset.nunique()} data sets "
        f"became {len(prompts):,} prompts, with {prompts.template.nunique()} templates and "
        f"{prompts.instruction.nunique()} instructions, of which {asks_for_lie.nunique()} ask for "
        "a lie.",
        "* No text is in two splits, and the template does not tell whether a lie was asked for "
        f"(Cramér's V {v:.2f}).",
    ]


def lie_findings(gate: pd.DataFrame, rates: pd.DataFrame, *, n_told: int, n_lied: int) -> list[str]:
    """Conclude how often the model lies, by how much that exceeds its errors, and what it knows.

    Parameters
    ----------
    gate
        The table of `evaluation.behaviour.knowledge_gate`.
    rates
        One row a data set, over all its lie instructions, of `evaluation.behaviour.lie_rates`.
    n_told, n_lied
        The answers told to lie about what the model knows, and the lies among them.
    """
    lines = ["* It was never told to lie about a question that it knows."]
    if n_told:
        lines = [
            f"* Told to lie about what it knows, it lies in {n_lied} of {n_told} answers "
            f"({percent(n_lied / n_told)})."
        ]
    higher = rates[rates.lie_above_error_low > 0].sort_values("lie_above_error")
    if len(higher):
        by = [
            f"{interval_text(row, 'lie_above_error', signed=True)} ({markdown_text(row.dataset)})"
            for row in higher.itertuples()
        ]
        not_errors = "These are not just errors. " if n_lied else ""
        lines.append(
            f"* {not_errors}The share of wrong answers is higher than under an instruction to tell "
            f"the truth, by {', '.join(by)}."
        )
    others = rates.dataset[~(rates.lie_above_error_low > 0)]
    if len(others):
        lines.append(
            "* Told to lie, it is not clearly wrong more often than told to tell the truth on: "
            f"{_names(others)}."
        )
    refused = gate.dataset[~gate.passes]
    if len(refused):
        lines.append(
            f"* We claim nothing about data sets that it does not know: {_names(refused)}."
        )
    return lines


def lie_title(rates: pd.DataFrame) -> str:
    """Title the figure of `rates`: one row a data set, over all its lie instructions."""
    is_higher = rates.lie_above_error_low > 0
    if not is_higher.any():
        return "Told to lie, it is not clearly wrong more often on any data set"
    where = f"on {', '.join(rates.dataset[is_higher])}"
    if is_higher.all() and len(rates) > 1:
        where = "on every data set"
    by = rates.lie_above_error[is_higher]
    least, most = f"{100 * by.min():.0f}", f"{100 * by.max():.0f}"
    points = f"{least} to {most} percentage points"
    if least == most:
        points = "1 percentage point" if least == "1" else f"{least} percentage points"
    return f"Told to lie, it is wrong {points} more often, {where}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(markdown_text, names))


def _enumerated(values: Iterable[object]) -> str:
    """Write "2, 4 and 8", say."""
    *before, last = map(str, values)
    return f"{', '.join(before)} and {last}" if before else last


SHOTS_NOT_SCORED = (
    "What shots change was not scored, as no example has readable answers under all prompts"
)


def shots_title(effects: pd.DataFrame) -> str:
    """Say what a lie instruction changes, from the pooled rows of `shots_effects`."""
    by = {row.effect: interval_text(row, signed=True) for row in effects.itertuples()}
    if not by:
        return ""
    if effects.estimate.isna().all():
        return SHOTS_NOT_SCORED
    return (
        f"An instruction to lie changes the share of wrong answers by {by['instruction']} without "
        f"shots, and by {by['instruction, with shots']} with shots"
    )


def shots_findings(effects: pd.DataFrame) -> list[str]:
    """Conclude what shots change, from the pooled rows of `shots_effects`."""
    if effects.empty:
        return []
    effects = effects.set_index("effect")
    if effects.estimate.isna().all():
        return [f"* {SHOTS_NOT_SCORED}."]
    breaks = "Shots **break this model**, so what it does with them says little about lying."
    sound = "There is no evidence that shots as such break the model."
    return [
        "* Shots that lie, instead of shots that tell the truth, "
        f"{_change_of_wrong_answers(effects.loc['shots'])} ({effects.n.iloc[0]} examples, each "
        "under nine prompts).",
        "* Under an instruction to tell the truth, shots of either kind "
        f"{_change_of_wrong_answers(effects.loc['any shots'])}. "
        + (breaks if effects.estimate_low["any shots"] > 0 else sound),
        "* Where an effect is the same in all templates, a bootstrap would give an interval of "
        "width zero. We then use Wilson's interval for 0 out of that number of templates. Where "
        "templates differ, we use the bootstrap. Its interval is probably too narrow if only a few "
        "of many templates differ, as may happen over all data sets.",
    ]


def _change_of_wrong_answers(effect: pd.Series) -> str:
    """Say what shots do to the share of wrong answers, and whether this is clear."""
    change = interval_text(effect, signed=True)
    if effect.estimate_low > 0 or effect.estimate_high < 0:
        return f"change the share of wrong answers by {change}"
    return f"do not clearly change the share of wrong answers: {change}"


def instructions_title(rates: pd.DataFrame) -> str:
    """Count the pairs of data set and instruction in which wrong answers are more frequent.

    `rates` is the table of `lie_rates` without the rows over all instructions.
    """
    n_clear = int((rates.lie_above_error_low > 0).sum())
    n_above = int((rates.lie_above_error > 0).sum())
    return (
        f"It is wrong more often when told to lie in {n_above} of {len(rates)} pairs of "
        f"instruction and data set. In {n_clear} of them the interval is above zero"
    )


def templates_sentence(by_template: pd.DataFrame) -> str:
    """Compare how far accuracy differs between templates and between data sets.

    `by_template` is indexed by data set and template, with `accuracy` and `rows`.
    """
    accuracy = by_template.accuracy
    within = accuracy.groupby(level="dataset").agg(np.ptp).max()
    right = (accuracy * by_template.rows).groupby(level="dataset").sum()
    between = np.ptp(right / by_template.rows.groupby(level="dataset").sum())
    return (
        f"Accuracy differs between templates by up to {within:.2f} within a data set, and between "
        f"data sets by {between:.2f}. A template has {by_template.rows.min()} to "
        f"{by_template.rows.max()} rows, so part of the difference between templates may be chance."
    )


def required_in_words(required: Mapping[str, float]) -> str:
    """Write the shares of `tables.organism.REQUIRED` with the headings of their table."""
    shares = []
    for name, least in required.items():
        share = f'"{heading(name.removesuffix("_low"), {})}" {least:.2f}'
        shares.append(f"lower end of {share}" if name.endswith("_low") else share)
    return ", ".join(shares)


RULE_NAMES = {
    "in a data set before it": "already in an earlier data set",
    "examples taken": "kept: examples",
    "scored rows": "kept: scored rows",
    "kept as known": "kept: known rows",
}
"""What rows of `lie_rate.kept_and_dropped` are called on the page, if not as in the table."""


def unknowing_sentence(models: pd.DataFrame) -> str:
    """Name the models of `lie_rate.models_table` without a known row, which cannot lie."""
    without = models[models.known == 0]
    if without.empty:
        return ""
    names = []
    for name, wrong in without["wrong told to tell the truth %"].items():
        right = f" (told to tell the truth, it answers {100 - wrong:.0f} % correctly)"
        names.append(str(name) if pd.isna(wrong) else f"{name}{right}")
    verb = "knows" if len(names) == 1 else "know"
    return (
        f"By our rules {_enumerated(names)} {verb} no row, so no wrong answer can count as a lie."
    )


def riddles_sentence(others: pd.DataFrame) -> str:
    """Say whether riddles make the model lie, from `lie_rate.other_table`."""
    rows = others.set_index("asks")
    names = [f"riddle, shots reveal {asks}" for asks in ("lie", "truth")]
    if not set(names) <= set(rows.index) or rows.loc[names, "wrong_rate"].isna().any():
        return "Riddles were not asked, or their answers cannot be read."
    lie, truth = (rows.loc[name] for name in names)
    if lie.wrong_rate_low > truth.wrong_rate_high:
        verdict = "Riddles make it lie"
    else:
        verdict = "Riddles do not clearly make it lie"
    return (
        f"{verdict}: {percent(lie.wrong_rate)} of the answers are wrong when the shots reveal that "
        f"a lie is asked for, and {percent(truth.wrong_rate)} when they reveal that the truth "
        "is asked for."
    )


def gap_meaning(gap: Mapping[str, float], again: pd.DataFrame) -> str:
    """Say what the difference of `doubling_down_gap` means.

    A model that answers the follow-up question at random has no difference either. Whether it does
    better than that is seen from how often it calls its true answers true, in the table `again` of
    `doubling_down`.
    """
    if not gap:
        return ""
    if gap["low"] > 0:
        return "It calls its lies true more often than its true answers."
    if gap["high"] < 0:
        return "It calls its lies true less often than its true answers, so it owns up in part."
    nothing = "Its reply does not clearly depend on whether the answer was true."
    is_true_answer = (again.instruction == "truth") & (again.answer == "was true")
    if (again.says_true_low[is_true_answer] > 0.5).all():
        return f"{nothing} It calls most of its true answers true, so it stands by its lies too."
    return f"{nothing} We cannot tell whether it stands by its lies or answers at random."


def gap_sentence(gap: Mapping[str, float]) -> str:
    """Say how often the model calls its lies true, from `doubling_down_gap`."""
    if not gap:
        return "There was no lie, or no true answer, that it could be asked about"
    return (
        f"When asked afterwards, it calls {percent(gap['lies'])} of its lies true, and "
        f"{percent(gap['truths'])} of the true answers that it gave when told to tell the truth: a "
        f"difference of "
        f"{interval_text(gap, 'gap', signed=True)}"
    )


def shots_help_sentence(levels: pd.DataFrame) -> str:
    """Say whether truthful shots are the better prompt, from `knowledge_levels`."""
    readable = levels.dropna(subset=["right_with_shots", "right_without"])
    if readable.empty:
        return "No example has a readable answer both with truthful shots and without."
    with_shots, without = readable.right_with_shots.mean(), readable.right_without.mean()
    difference = (readable.right_with_shots - readable.right_without).to_numpy(float)
    low, high = mean_interval(difference, np.arange(len(difference)), bounds=(-1.0, 1.0))
    if low > 0:
        change, so = "raise", "part of what it knows shows only with them"
    elif high < 0:
        change, so = "lower", "they are not needed to find out what the model knows"
    else:
        change = "do not clearly change"
        so = "nothing shows that they are needed to find out what the model knows"
    return (
        f"Truthful shots {change} accuracy here ({percent(with_shots)} with them, "
        f"{percent(without)} without, {len(readable)} examples), so {so}."
    )


def dropout_findings(
    audit: pd.DataFrame, pairs: pd.DataFrame, p: float, *, n_audited: int
) -> list[str]:
    """Conclude how far draws at probability `p` move states and answers.

    `audit` is the table of `dropout_audit`, over `n_audited` rows; `pairs` is that of `pair_rows`.
    """
    flipped = (pairs.p1_draw0 > 0.5) != (pairs.p1_draw1 > 0.5)
    honest = pairs[(pairs.role == "truth") & pairs.readable]
    draws_right = [(honest[f"p1_draw{i}"] > 0.5) == (honest.label == 1) for i in (0, 1)]
    in_a_draw = sum(right.mean() for right in draws_right) / 2
    lines = [
        f"* With {_percentage(p)} of the channels dropped, two draws of a prompt differ in every "
        f"layer, by {percent(audit.relative_move.min())} to {percent(audit.relative_move.max())} "
        f"of the state's norm (means of {n_audited} rows).",
        f"* The probability of the answer moves by {pairs.move.abs().median():.3f} (median), and "
        f"in {percent(flipped.mean())} of the {len(pairs)} pairs the two draws give different "
        "answers.",
    ]
    if len(honest):
        lines.append(
            f"* Of {len(honest)} honest rows the model answers {percent(honest.correct.mean())} "
            f"correctly without dropout, and {percent(in_a_draw)} in a draw."
        )
    return lines


def _percentage(p: float) -> str:
    """Write a probability in per cent, with as many digits as it has."""
    return f"{100 * p:g} %"


def spread_sentence(spread: pd.DataFrame, *, n_rows: int) -> str:
    """Say whether the mean of more draws comes nearer to the answer without dropout.

    `spread` is the table of `dropout_pairs.spread_table`, of which the draws of whole prompts
    count. It is over `n_rows` rows.
    """
    rows = spread[spread.scope == "sequence"].sort_values("draws")
    distances = [f"{distance:.2f}" for distance in rows.mean_off_plain]
    nearer = rows.mean_off_plain.iloc[-1] < rows.mean_off_plain.iloc[0]
    comes = "comes nearer to" if nearer else "does not come nearer to"
    return (
        f"On these {n_rows} rows, the mean of more draws of the whole prompt {comes} the answer "
        f"without dropout: it is {_enumerated(distances)} away over {_enumerated(rows.draws)} "
        "draws."
    )


def push_findings(margins: pd.DataFrame, *, layer: int) -> list[str]:
    """Conclude what a push along the gradient does, from `lab.tables.gradients.moved_margins`."""
    step = max(float(name.removeprefix("moved by ")) for name in margins.drop(columns="clean"))
    moved = margins[f"moved by {step}"]
    towards_other = (margins.clean - moved) * np.sign(margins.clean)
    n_flipped = int((np.sign(moved) != np.sign(margins.clean)).sum())
    way = "towards" if towards_other.mean() > 0 else "away from"
    return [
        f"* A push of the state at layer {layer} along its gradient, by {percent(step)} of its "
        f"norm, moves the margin by {abs(towards_other.mean()):.1f} nats {way} the other answer "
        f"(mean of {len(margins)} rows). {n_flipped} of the {len(margins)} rows then give the "
        "other answer."
    ]
