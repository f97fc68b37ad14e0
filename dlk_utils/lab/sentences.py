"""What notebooks 00 to 03 conclude, in sentences of Markdown made from their tables.

Names of data sets and models may hold anything: `markdown_text` escapes them.
"""

from collections.abc import Mapping

import pandas as pd

from dlk_utils.lab.display import interval_text
from dlk_utils.lab.escaping import markdown_text


def organism_findings(
    held_out: pd.DataFrame, by_instruction: pd.DataFrame, *, with_verdict: bool
) -> list[str]:
    """Conclude what an organism does on each data set, and how far the instruction tells lies.

    Parameters
    ----------
    held_out
        What `lab.tables.organism.held_out` returns.
    by_instruction
        One row a model, indexed by its name, of `lab.tables.organism.told_by_instruction`.
    with_verdict
        Say whether each data set meets what is required. Too few examples allow no verdict.
    """
    lines = []
    for row in held_out.itertuples():
        wrong = interval_text(row, "wrong_when_told_to_lie") if row.n_lie else "not scored"
        verdict = ""
        if with_verdict:
            meets = "**meets**" if row.meets else "**falls short** of"
            verdict = f": {meets} what is required"
        lines.append(
            f"* **{markdown_text(row.dataset)}**: right answers told to tell the truth "
            f"{interval_text(row, 'truth_accuracy')} (n = {row.n_truth}); wrong answers told to "
            f"lie where it knows better {wrong} (n = {row.n_lie}); choice mass "
            f"{row.choice_mass:.3f}{verdict}."
        )
    for name, row in by_instruction.iterrows():
        if not row["told to lie"]:
            lines.append(f"* `{name}`: no row told to lie whose answer it knows.")
            continue
        lines.append(
            f"* **{markdown_text(name)}**: of {row['told to lie']:.0f} known rows told to lie "
            f"{row.lies:.2f} are lies. The instruction alone tells which with an AUROC of "
            f"{interval_text(row, 'instruction_only')}."
        )
    return lines


def lie_findings(gate: pd.DataFrame, rates: pd.DataFrame) -> list[str]:
    """Conclude which data sets are known, and how far each of them is lied about.

    `rates` has one row a data set, over all its lie instructions.
    """
    lines = []
    for row in gate.itertuples():
        refused = "**refused**, the model does not know these answers in this form."
        lines.append(
            f"* **{markdown_text(row.dataset)}**: truth accuracy "
            f"{interval_text(row, 'truth_accuracy')} against chance {row.chance:.2f}: "
            f"{'known.' if row.passes else refused}"
        )
    for row in rates.itertuples():
        lines.append(
            f"* **{markdown_text(row.dataset)}**: told to lie it answers "
            f"{100 * row.wrong_rate:.0f} % wrongly, told to tell the truth "
            f"{100 * (1 - row.truth_accuracy):.0f} %; lie rate above error "
            f"{interval_text(row, 'lie_above_error', signed=True)}."
        )
    return lines


def shots_title(effects: pd.DataFrame) -> str:
    """Say what a lie instruction changes, from the pooled rows of `shots_effects`."""
    by = {row.effect: interval_text(row, signed=True) for row in effects.itertuples()}
    if not by:
        return ""
    return (
        f"Without shots a lie instruction changes the wrong rate by {by['instruction']}, with "
        f"shots by {by['instruction, with shots']}"
    )


def shots_findings(effects: pd.DataFrame) -> list[str]:
    """Conclude what instruction and shots change, from the pooled rows of `shots_effects`."""
    if effects.empty:
        return []
    effects = effects.set_index("effect")
    shots = interval_text(effects.loc["shots"], signed=True)
    any_shots = interval_text(effects.loc["any shots"], signed=True)
    breaks = "**shots break this model**, so what it does with them says little about lying."
    sound = "no evidence that shots as such break it."
    return [
        f"* {shots_title(effects.reset_index())}; shots that lie instead of telling the truth "
        f"change it by {shots} (of {effects.n.iloc[0]} examples, each under nine prompts).",
        f"* Told to tell the truth, shots of either kind change it by {any_shots}: "
        + (breaks if effects.estimate_low["any shots"] > 0 else sound),
    ]


def gap_sentence(gap: Mapping[str, float]) -> str:
    """Say how often the model calls its lies true, from `doubling_down_gap`."""
    if not gap:
        return "It gave no lie, or no true answer, that it could be asked about"
    return (
        f"It calls its lies true in {gap['lies']:.2f}, its true answers in {gap['truths']:.2f}: "
        f"{interval_text(gap, 'gap', signed=True)}"
    )


def shots_help_sentence(levels: pd.DataFrame) -> str:
    """Say whether truthful shots are the better prompt, from `knowledge_levels`."""
    readable = levels.dropna(subset=["right_with_shots", "right_without"])
    if readable.empty:
        return "no example has an answer that can be read both with truthful shots and without."
    with_shots, without = readable.right_with_shots.mean(), readable.right_without.mean()
    helps = "shots are the better prompt here."
    luck = "shots are no better prompt here, and what is right only with them is right by luck."
    return (
        f"told to tell the truth, right with truthful shots in {with_shots:.2f} of these "
        f"examples, without in {without:.2f}: {helps if with_shots > without else luck}"
    )


def dropout_findings(
    audit: pd.DataFrame, pairs: pd.DataFrame, moves: pd.DataFrame, spread: pd.DataFrame, p: float
) -> list[str]:
    """Conclude how far draws at probability `p` move states and answers, from the tables of 03."""
    flipped = (pairs.p1_draw0 > 0.5) != (pairs.p1_draw1 > 0.5)
    honest = pairs[(pairs.role == "truth") & pairs.readable]
    draws_right = [(honest[f"p1_draw{i}"] > 0.5) == (honest.label == 1) for i in (0, 1)]
    in_a_draw = sum(right.mean() for right in draws_right) / 2
    move = moves[moves.p == 0.1].set_index("scope").answer_move
    most = spread[spread.draws == spread.draws.max()].set_index("scope").range
    return [
        f"* Every row moves in every layer: the relative distance of two draws is "
        f"{audit.relative_move.min():.2f} to {audit.relative_move.max():.2f} over the layers "
        f"(p = {p}).",
        f"* The answer moves by {pairs.move.abs().median():.3f} in the median, and "
        f"{flipped.mean():.1%} of the {len(pairs)} pairs disagree about it.",
        f"* Of {len(honest)} honest rows whose answer moved, the model answers "
        f"{honest.correct.mean():.0%} rightly without dropout and {in_a_draw:.0%} in a draw.",
        f"* Over the shares and scopes tried, the answers of {moves['rows'].max()} rows move by "
        f"{moves.answer_move.min():.3f} to {moves.answer_move.max():.3f} on average. At p = 0.1 "
        f"the question alone gives {move['question'] / move['sequence']:.2f} of the move of the "
        f"whole prompt, and the last token alone {move['last_token'] / move['sequence']:.2f}.",
        f"* Over {spread.draws.max()} draws the answer ranges over {most['sequence']:.2f} (whole "
        f"prompt), {most['question']:.2f} (question) and {most['last_token']:.2f} (last token).",
        f"* On average draw 1 is {pairs.move.mean():+.4f} nearer to the truth than draw 0. It "
        "should be near 0: the draws are exchangeable.",
    ]
