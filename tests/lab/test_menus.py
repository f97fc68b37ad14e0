"""Figures with a menu: each choice shows one figure, names are text, the first is a picture."""

import pandas as pd
import pytest
from hostile import HOSTILE
from test_escaping import Page

from dlk_utils.lab.figures import as_html, belief_figure, lines_figure, menu_figure
from dlk_utils.lab.static import draw_png

BELIEFS = pd.DataFrame(
    {
        "layer": [0, 0, 10, 10],
        "place": [-1, 0, -1, 0],
        "token": ["Is", "\n", "Is", "\n"],
        "score": [0.5, -2.0, 3.0, 1.0],
    }
)


def lines(name: str, values: list[float]):
    table = pd.DataFrame({"layer": range(len(values)), "score": values})
    return lines_figure(
        table, x="layer", y="score", title=name, xlabel="layer", ylabel="belief", reference=0
    )


def test_a_heat_map_has_a_row_for_each_layer_and_a_column_for_each_token():
    [trace] = belief_figure(BELIEFS, title="Beliefs").data
    assert [list(row) for row in trace.z] == [[0.5, -2.0], [3.0, 1.0]]
    assert trace.hovertext[1][1] == "\\n, layer 10: +1.0"
    assert trace.zmin == -trace.zmax and trace.zmax >= 2.9
    layout = belief_figure(BELIEFS, title="Beliefs").layout
    assert layout.yaxis.ticktext == ("0", "10") and layout.xaxis.ticktext == ("Is", "\\n")


def test_each_choice_shows_its_own_figure_with_its_own_ticks():
    wide = pd.concat([BELIEFS, BELIEFS.query("place == 0").assign(place=1, token="so")])
    figures = {
        "one": belief_figure(BELIEFS, title="first"),
        "two": belief_figure(wide, title="second"),
    }
    fig = menu_figure(figures, title="Both")
    [menu] = fig.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["one", "two"]
    assert [trace.visible for trace in fig.data] == [True, False]
    shown, axes = menu.buttons[1].args
    assert shown == {"visible": [False, True]}
    assert list(axes["xaxis.ticktext"]) == ["Is", "\\n", "so"]
    assert fig.layout.title.text == "Both"
    assert [trace.visible for figure in figures.values() for trace in figure.data] == [None, None]


def test_without_scripts_the_first_choice_is_shown():
    first, second = lines("first", [0.0, 1.0]), lines("second", [5.0, -4.0])
    joined = menu_figure({"one": first, "two": second}, title="Both").to_dict()
    alone = menu_figure({"one": first}, title="Both").to_dict()
    assert draw_png(joined) == draw_png(alone)


def test_a_page_says_what_there_is_to_choose_from_and_lets_one_choose():
    fig = menu_figure({"one": lines("a", [0.0]), "two": lines("b", [1.0])}, title="Both")
    html = as_html(fig).data
    assert "<figcaption>Both</figcaption>" in html
    assert 'role="group" aria-label="Both. ' in html and "To choose from: one, two" in html


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_tokens_are_text(text):
    fig = menu_figure({text: belief_figure(BELIEFS.assign(token=text), title=text)}, title=text)
    [menu], [trace] = fig.layout.updatemenus, fig.data
    texts = [menu.buttons[0].label, *fig.layout.xaxis.ticktext, trace.hovertext[0][0]]
    for shown in texts:
        assert Page(shown).elements <= {"br"}
    assert Page(fig.layout.xaxis.ticktext[0]).text == text.replace("\n", "\\n")
