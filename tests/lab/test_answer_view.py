"""An answer on a page: what was asked is text, and its sentences say what is believed."""

import re

import pandas as pd
import pytest
from hostile import HOSTILE
from test_escaping import Page

from dlk_utils.lab.answer_view import show_answer

LIE = {"prompt": "Is it?", "choices": ["no", "yes"], "label": 1, "answer": 0, "margin": -2.0}
LIE |= {"belief": 1.5, "verdict": "lie"}
BY_LAYER = pd.DataFrame({"layer": [0, 9], "for_truth": [-0.5, 2.0]})


def shown(**columns):
    return show_answer(pd.Series(LIE | columns), BY_LAYER, caption=columns.get("caption", "A lie"))


def test_it_says_what_the_model_says_what_is_right_what_it_believes_and_the_verdict():
    assert shown().lines[2:] == [
        "The model says 'no' (by a margin of 2.0), and 'yes' is right.",
        "The probe favours 'yes' (by 1.5). Verdict: lie.",
    ]
    right = shown(answer=1, margin=2.0, verdict="honest")
    assert "says 'yes' (by a margin of 2.0), which is right." in repr(right)
    text = Page(shown()._repr_html_()).text
    assert all(sentence in text for sentence in ["A lie", "Is it?", *shown().lines])


def test_each_layer_has_its_number_and_its_sides_differ_by_more_than_colour():
    html = shown()._repr_html_()
    spans = re.findall(r'<span style="([^"]*)">([^<]*)</span>', html)
    by_text = {text: style for style, text in spans}
    assert "dotted" in by_text["layer 0: -0.5"] and "solid" in by_text["layer 9: +2.0"]
    # The words have the colour of the page, which its theme chooses.
    assert not re.search(r"[\s;\"]color:", html)


def test_of_a_card_that_reads_one_layer_no_layers_are_shown():
    html = show_answer(pd.Series(LIE), BY_LAYER.head(0), caption="A lie")._repr_html_()
    assert "each layer" not in html and "Verdict: lie." in html


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_the_data_holds_is_shown_as_it_is(text):
    columns = {"prompt": text, "choices": ["no", text], "verdict": text, "caption": text}
    page = Page(shown(**columns)._repr_html_())
    assert page.elements == {"div", "p", "b", "span"} and page.attributes == {"class", "style"}
    assert page.text.count(text) >= 3
