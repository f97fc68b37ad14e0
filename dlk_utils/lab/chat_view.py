"""A conversation as HTML, with the assistant's words coloured by their scores.

Everything that came from data is escaped. The words keep the colour of the page's own text, on a
pale ground of the score, so that they can be read in the light and in the dark theme. What is above
zero also has a solid line below it, and what is below zero a dotted one. A sentence for each turn
says in numbers what the colours show.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from dlk_utils.evaluation.chats import ANSWER, THOUGHT, ChatScores
from dlk_utils.lab.escaping import html_text
from dlk_utils.lab.html_view import HtmlView

ABOVE, BELOW = "47, 102, 176", "184, 74, 20"
"""Red, green and blue of the grounds of scores above and below zero."""

MOST_OPAQUE = 0.4
"""How opaque the ground of the greatest score is: more would hide the words in one theme."""

LEAST_UNIT = 1.0
"""The score of the strongest colour is at least this, so that noise around zero stays pale."""


def show_chat(
    scores: ChatScores, messages: Sequence[Mapping[str, Any]], *, caption: str
) -> HtmlView:
    """Show a conversation with the tokens of the assistant's turns coloured by their scores.

    A sentence for each part of each turn says what the colours show.

    Parameters
    ----------
    scores
        What `score_chat` found in the conversation.
    messages
        The conversation.
    caption
        What stands above it, as plain text.
    """
    unit = max(LEAST_UNIT, float(scores.tokens.score.abs().quantile(0.95)))
    sentences = [_sentence(row, scores.tokens) for row in scores.turns.itertuples()]
    parts = [f"<p><b>{html_text(caption)}</b></p>", _scale(unit)]
    numbers_by_turn = {turn: rows.index for turn, rows in scores.tokens.groupby("turn")}
    for number, message in enumerate(messages):
        head = f"<b>{html_text(str(message['role']))}</b>"
        if number not in numbers_by_turn:
            parts.append(_turn(head, html_text(message["content"])))
            continue
        tokens = scores.tokens.loc[numbers_by_turn[number]]
        for part in (THOUGHT, ANSWER):
            of_part = tokens[tokens.part == part]
            if len(of_part):
                name = f"{head} ({part})" if part == THOUGHT else head
                words = "".join(_token(row, unit) for row in of_part.itertuples())
                parts.append(_turn(name, words, is_thought=part == THOUGHT))
        if number in scores.left_out:
            parts.append("<p><i>The chat template leaves the thought of this turn out.</i></p>")
    parts.append("".join(f"<p>{html_text(sentence)}</p>" for sentence in sentences))
    return HtmlView("chat-view", parts, sentences)


def _sentence(row: Any, tokens: pd.DataFrame) -> str:
    """Say in words what the colours of a part of a turn show."""
    of_part = tokens[(tokens.turn == row.turn) & (tokens.part == row.part)]
    lowest = of_part.loc[of_part.score.idxmin()]
    highest = of_part.loc[of_part.score.idxmax()]
    return (
        f"Message {row.turn + 1}, {row.part}: {row.n} tokens, mean score {row.mean:+.2f}, highest "
        f"{highest.score:+.2f} at {highest.token.strip()!r}, lowest {lowest.score:+.2f} at "
        f"{lowest.token.strip()!r}."
    )


def _scale(unit: float) -> str:
    """Draw the colours of some scores, from low to high."""
    steps = [-unit, -unit / 2, 0.0, unit / 2, unit]
    swatches = " ".join(
        f'<span style="{score_style(step, unit)}; padding: 0.1em 0.4em">{step:+.1f}</span>'
        for step in steps
    )
    return f"<p>Score: {swatches}</p>"


def _turn(head: str, content: str, *, is_thought: bool = False) -> str:
    border = "dashed" if is_thought else "solid"
    style = (
        f"margin: 0.4em 0; padding: 0.2em 0.6em; border-left: 3px {border} #808890; "
        "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7"
    )
    return f'<div style="{style}">{head}\n{content}</div>'


def _token(row: Any, unit: float) -> str:
    """Write a token with its score, which a pointer on it shows."""
    if not row.token:
        return ""
    style, text = score_style(row.score, unit), html_text(row.token)
    return f'<span style="{style}" title="{row.score:+.2f}">{text}</span>'


def score_style(score: float, unit: float) -> str:
    """Write the CSS of a ground for a score; `unit` is the score of the strongest colour."""
    strength = min(1.0, abs(score) / unit)
    color = ABOVE if score > 0 else BELOW
    line = "solid" if score > 0 else "dotted"
    ground = f"background: rgba({color}, {MOST_OPAQUE * strength:.2f})"
    return f"{ground}; border-bottom: 2px {line} rgba({color}, {strength:.2f})"
