"""A chat on a page: its words are text whatever they hold, and numbers say what colours show."""

import re

import pandas as pd
import pytest
from hostile import HOSTILE
from test_escaping import Page

from dlk_utils.evaluation.chats import ANSWER, THOUGHT, ChatScores
from dlk_utils.lab.chat_view import MOST_OPAQUE, show_chat

MESSAGES = [
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "<think>Hm.</think>It is."},
]


def scored(words: dict[str, list[str]], scores: list[float], **options) -> ChatScores:
    """Scores of the tokens of message 1, by the part that they are of."""
    rows = [
        {"turn": 1, "part": part, "token": token}
        for part, tokens in words.items()
        for token in tokens
    ]
    tokens = pd.DataFrame(rows).assign(score=scores, position=range(len(rows)))
    by_part = tokens.groupby(["turn", "part"], sort=False).score
    turns = by_part.agg(n="size", mean="mean", highest="max", lowest="min").reset_index()
    return ChatScores(tokens, turns, [], options.get("left_out", []))


CHAT = scored({THOUGHT: ["Hm."], ANSWER: ["It", " is", "."]}, [0.0, 3.0, -1.5, 0.5])


@pytest.mark.parametrize("text", HOSTILE)
def test_the_words_are_shown_as_they_are(text):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text * 2}]
    shown = show_chat(scored({ANSWER: [text, text]}, [1.0, -1.0]), messages, caption=text)
    page = Page(shown._repr_html_())
    assert page.elements == {"div", "p", "b", "span"}
    assert page.attributes == {"class", "style", "title"}
    assert page.text.count(text) >= 4 and text * 2 in page.text


def test_a_sentence_for_each_part_says_in_numbers_what_the_colours_show():
    shown = show_chat(CHAT, MESSAGES, caption="A chat")
    assert shown.lines == [
        "Message 2, thought: 1 tokens, mean score +0.00, highest +0.00 at 'Hm.', lowest +0.00 at "
        "'Hm.'.",
        "Message 2, answer: 3 tokens, mean score +0.67, highest +3.00 at 'It', lowest -1.50 at "
        "'is'.",
    ]
    assert repr(shown) == "\n".join(shown.lines)
    text = Page(shown._repr_html_()).text
    assert all(line in text for line in shown.lines)
    assert "(thought)\nHm." in text and "assistant\nIt is." in text


def test_above_and_below_zero_differ_by_more_than_colour_and_the_ground_stays_pale():
    html = show_chat(CHAT, MESSAGES, caption="A chat")._repr_html_()
    found = re.findall(r'style="([^"]*)" title="([^"]*)"', html)
    by_score = {score: style for style, score in found}
    assert "solid" in by_score["+3.00"] and "dotted" in by_score["-1.50"]
    opacities = [float(value) for value in re.findall(r"background: rgba\([^)]*, ([\d.]+)\)", html)]
    assert max(opacities) == MOST_OPAQUE and min(opacities) == 0
    # The words have the colour of the page, which its theme chooses.
    assert not re.search(r"[\s;\"]color:", html)


def test_a_thought_that_was_left_out_is_named():
    scores = scored({ANSWER: ["It is."]}, [1.0], left_out=[1])
    html = show_chat(scores, MESSAGES, caption="A chat")._repr_html_()
    assert "leaves the thought of this turn out" in html
