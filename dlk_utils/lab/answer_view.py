"""An answer of the model as HTML: what was asked, what it says, what it believes, the verdict.

Everything that came from data is escaped. Beliefs are coloured as in `chat_view`, so that they can
be read in the light and in the dark theme; their numbers say the same.
"""

import pandas as pd

from dlk_utils.lab.chat_view import LEAST_UNIT, score_style
from dlk_utils.lab.escaping import html_text
from dlk_utils.lab.html_view import HtmlView


def show_answer(row: pd.Series, by_layer: pd.DataFrame, *, caption: str) -> HtmlView:
    """Show a row that a detector has judged.

    Parameters
    ----------
    row
        It has the `prompt`, its two `choices`, the `label` and the `answer` (each the number of a
        choice), the `margin`, and the `belief` and `verdict` of a detector.
    by_layer
        The columns `layer` and `for_truth`: how strongly the belief at each layer speaks for the
        right choice. With no rows, nothing is said of layers.
    caption
        What stands above it, as plain text.
    """
    said, right = row.choices[row.answer], row.choices[row.label]
    favoured = row.choices[int(row.belief > 0)]
    ending = "which is right" if row.answer == row.label else f"and {right!r} is right"
    sentences = [
        f"The model says {said!r} (by a margin of {abs(row.margin):.1f}), {ending}.",
        f"The probe favours {favoured!r} (by {abs(row.belief):.1f}). Verdict: {row.verdict}.",
    ]
    frame = "margin: 0 0 1.2em; padding: 0.3em 0.8em; border: 1px solid #808890"
    prompt = (
        "margin: 0.5em 0; padding-left: 0.6em; border-left: 3px solid #808890; "
        "white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.85em"
    )
    parts = [
        f"<p><b>{html_text(caption)}</b></p>",
        f'<div style="{prompt}">{html_text(row.prompt)}</div>',
        *(f'<p style="margin: 0.3em 0">{html_text(sentence)}</p>' for sentence in sentences),
    ]
    if len(by_layer):
        parts.append(_strip(by_layer))
    return HtmlView("answer-view", parts, [caption, row.prompt, *sentences], style=frame)


def _strip(by_layer: pd.DataFrame) -> str:
    """Write the belief at each layer on a ground of its colour."""
    unit = max(LEAST_UNIT, float(by_layer.for_truth.abs().max()))
    swatches = ", ".join(
        f'<span style="{score_style(row.for_truth, unit)}; padding: 0.1em 0.4em; '
        f'white-space: nowrap">layer {row.layer}: {row.for_truth:+.1f}</span>'
        for row in by_layer.itertuples()
    )
    return (
        '<p style="margin: 0.3em 0; line-height: 2">The belief at each layer, with its sign '
        "reversed where choice 0 is right, so it is above 0 if the probe favours what is true: "
        f"{swatches}</p>"
    )
