"""What notebooks 00 to 04 conclude, in sentences of Markdown made from their tables.

Names of data sets and models may hold anything: `markdown_text` escapes them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from dlk_utils.lab.display import interval_text, percent
from dlk_utils.lab.escaping import markdown_text


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
        f"{_least_to_most(held_out, 'truth_accuracy')} of the rows. Told to lie about what it "
        "knows, it gives the wrong answer in "
        f"{_least_to_most(held_out, 'wrong_when_told_to_lie')}."
    ]
    if verdict:
        lines.append(f"* It does what we require of an organism on: {markdown_text(verdict)}.")
    for name, row in told.iterrows():
        if not row["told to lie"]:
            lines.append(f"* `{name}` was told to lie about no question that it knows.")
            continue
        lines.append(
            f"* Of {row['told to lie']:.0f} answers of {markdown_text(name)}, told to lie about "
            f"what it knows, {percent(row.lies)} are lies. The instruction alone predicts which "
            f"with an AUROC of {interval_text(row, 'instruction_only')}."
        )
    return lines


def organism_title(held_out: pd.DataFrame) -> str:
    """Title the figure of what an organism does on each data set."""
    right, wrong = held_out.truth_accuracy.dropna(), held_out.wrong_when_told_to_lie.dropna()
    return (
        f"Right when told to tell the truth: {_range(right)}. Wrong when told to lie about what it "
        f"knows: {_range(wrong)}"
    )


def _range(shares: pd.Series) -> str:
    if shares.empty:
        return "no readable answer"
    least, most = percent(shares.min()), percent(shares.max())
    return least if least == most else f"{least} to {most}"


def _least_to_most(table: pd.DataFrame, name: str) -> str:
    """Write the range of a share over data sets, with their names."""
    shares = table.set_index("dataset")[name].dropna()
    if shares.empty:
        return "no readable share"
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
        f"It is the mean of {len(minutes)} training runs, which took {minutes.min():.0f} to "
        f"{minutes.max():.0f} minutes each on the machine that we used."
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
    lines = ["* It was told to lie about no question that it knows."]
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
        lines.append(
            "* These are not just errors. The share of wrong answers is higher than under an "
            f"instruction to tell the truth, by {', '.join(by)}."
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
        return "On no data set is it clearly wrong more often when told to lie"
    where = f"on {', '.join(rates.dataset[is_higher])}"
    if is_higher.all() and len(rates) > 1:
        where = "on every data set"
    by = rates.lie_above_error[is_higher]
    least, most = f"{100 * by.min():.0f}", f"{100 * by.max():.0f}"
    points = least if least == most else f"{least} to {most}"
    return f"Told to lie, it is wrong {points} percentage points more often, {where}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(markdown_text, names))


def shots_title(effects: pd.DataFrame) -> str:
    """Say what a lie instruction changes, from the pooled rows of `shots_effects`."""
    by = {row.effect: interval_text(row, signed=True) for row in effects.itertuples()}
    if not by:
        return ""
    return (
        f"A lie instruction changes the share of wrong answers by {by['instruction']} without "
        f"shots, by {by['instruction, with shots']} with shots"
    )


def shots_findings(effects: pd.DataFrame) -> list[str]:
    """Conclude what shots change, from the pooled rows of `shots_effects`."""
    if effects.empty:
        return []
    effects = effects.set_index("effect")
    shots = interval_text(effects.loc["shots"], signed=True)
    any_shots = interval_text(effects.loc["any shots"], signed=True)
    breaks = "Shots **break this model**, so what it does with them says little about lying."
    sound = "There is no evidence that shots as such break the model."
    return [
        f"* Shots that lie, instead of shots that tell the truth, change the share of wrong "
        f"answers by {shots} ({effects.n.iloc[0]} examples, each under nine prompts).",
        f"* Where the truth is asked for, shots of either kind change it by {any_shots}. "
        + (breaks if effects.estimate_low["any shots"] > 0 else sound),
    ]


def gap_sentence(gap: Mapping[str, float]) -> str:
    """Say how often the model calls its lies true, from `doubling_down_gap`."""
    if not gap:
        return "There was no lie, or no true answer, that it could be asked about"
    return (
        f"Asked afterwards, it calls {percent(gap['lies'])} of its lies true, and "
        f"{percent(gap['truths'])} of its true answers: a difference of "
        f"{interval_text(gap, 'gap', signed=True)}"
    )


def shots_help_sentence(levels: pd.DataFrame) -> str:
    """Say whether truthful shots are the better prompt, from `knowledge_levels`."""
    readable = levels.dropna(subset=["right_with_shots", "right_without"])
    if readable.empty:
        return "No example has a readable answer both with truthful shots and without."
    with_shots, without = readable.right_with_shots.mean(), readable.right_without.mean()
    helps = "Shots are the better prompt here."
    luck = "Shots are not the better prompt here: what is right only with them is right by luck."
    return (
        f"Told to tell the truth, the model answers {percent(with_shots)} of these examples "
        f"correctly with truthful shots, and {percent(without)} without shots. "
        f"{helps if with_shots > without else luck}"
    )


def dropout_findings(audit: pd.DataFrame, pairs: pd.DataFrame, p: float) -> list[str]:
    """Conclude how far draws at probability `p` move states and answers.

    `audit` is the table of `dropout_audit`, `pairs` that of `pair_rows`.
    """
    flipped = (pairs.p1_draw0 > 0.5) != (pairs.p1_draw1 > 0.5)
    honest = pairs[(pairs.role == "truth") & pairs.readable]
    draws_right = [(honest[f"p1_draw{i}"] > 0.5) == (honest.label == 1) for i in (0, 1)]
    in_a_draw = sum(right.mean() for right in draws_right) / 2
    lines = [
        f"* Two draws of a prompt differ in every layer, by {percent(audit.relative_move.min())} "
        f"to {percent(audit.relative_move.max())} of the state's norm (p = {p}).",
        f"* The probability of the answer moves by {pairs.move.abs().median():.3f} (median), and "
        f"in {percent(flipped.mean())} of the {len(pairs)} pairs the two draws give different "
        "answers.",
    ]
    if len(honest):
        is_worse = in_a_draw < honest.correct.mean()
        lines.append(
            f"* Dropout {'has a price' if is_worse else 'does no damage'}: of {len(honest)} honest "
            f"rows the model answers {percent(honest.correct.mean())} correctly without dropout, "
            f"and {percent(in_a_draw)} in a draw."
        )
    return lines


def push_findings(margins: pd.DataFrame, *, layer: int) -> list[str]:
    """Conclude what a push along the gradient does, from `lab.tables.gradients.moved_margins`."""
    step = max(float(name.removeprefix("moved by ")) for name in margins.drop(columns="clean"))
    moved = margins[f"moved by {step}"]
    towards_other = (margins.clean - moved) * np.sign(margins.clean)
    n_flipped = int((np.sign(moved) != np.sign(margins.clean)).sum())
    way = "towards" if towards_other.mean() > 0 else "away from"
    return [
        f"* Pushed along its gradient at layer {layer}, by {percent(step)} of its norm, the state "
        f"moves the margin by {abs(towards_other.mean()):.1f} nats {way} the other answer (mean of "
        f"{len(margins)} rows). {n_flipped} of {len(margins)} rows then give the other answer."
    ]
