"""Prompts as a tree: what they share is there once, and their words are text."""

import pandas as pd
import pytest
from hostile import HOSTILE
from test_escaping import Page

from dlk_utils.extract.packing import pack
from dlk_utils.lab.tables.dataset import first_prompts_of_top_instructions
from dlk_utils.lab.tree_view import MOST_CHARACTERS, count_nodes, show_tree

PROMPTS = [[1, 2, 3], [1, 2, 4, 5], [1, 6], [1, 2], [7], [7]]
WORDS = {1: "a", 2: "b", 3: "c", 4: "d", 5: "e", 6: "f", 7: "g"}


def decode(tokens) -> str:
    return " ".join(WORDS[token] for token in tokens)


def test_what_prompts_share_is_there_once():
    shown = show_tree(PROMPTS, decode, caption="Prompts")
    assert repr(shown).splitlines() == [
        "Prompts",
        "a (1 token, 4 prompts)",
        "  b (1 token, 3 prompts)",
        "    c (1 token)",
        "    d e (2 tokens)",
        "  f (1 token)",
        "g (1 token)",
    ]
    text = Page(shown._repr_html_()).text
    assert "b (1 token, 3 prompts)" in text and "d e (2 tokens)" in text


def test_prompts_of_no_tokens_are_not_in_the_tree():
    assert repr(show_tree([[], [1]], decode, caption="Prompts")) == "Prompts\na (1 token)"
    assert repr(show_tree([], decode, caption="Prompts")) == "Prompts"


def test_as_many_nodes_are_counted_as_the_model_runs():
    packed = pack(PROMPTS, branch_size=10)
    n_run = sum(key is not None for row in packed.keys for key in row)
    n_run -= packed.n_trunk * (len(packed.keys) - 1)
    assert count_nodes(PROMPTS) == n_run == 7
    assert count_nodes([]) == 0


@pytest.mark.parametrize("text", HOSTILE)
def test_the_words_of_a_prompt_are_shown_as_they_are(text):
    page = Page(show_tree([[1]], lambda tokens: text, caption=text)._repr_html_())
    assert page.elements == {"div", "p", "b", "i"} and page.attributes == {"class", "style"}
    assert text in page.text and text.replace("\n", "⏎")[: MOST_CHARACTERS // 2] in page.text


def test_a_long_piece_is_shown_without_its_middle():
    shown = show_tree([[1]], lambda tokens: "x" * 500 + "end", caption="Prompts")
    assert "… " in repr(shown) and "end (1 token)" in repr(shown) and len(repr(shown)) < 150


def test_the_prompts_of_the_instructions_used_most_are_shown():
    prompts = pd.DataFrame({"instruction": [*"cababcaab"], "row_id": range(9)})
    shown = first_prompts_of_top_instructions(prompts)
    assert list(shown.instruction) == [*"aaabbb"] and list(shown.row_id) == [1, 3, 6, 2, 4, 8]
