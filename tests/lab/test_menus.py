"""Figures with a menu or a slider: each choice shows one figure, and the first is a picture."""

import pandas as pd
import pytest
from hostile import HOSTILE
from test_escaping import Page

from dlk_utils.lab.figures import (
    as_html,
    belief_figure,
    lines_figure,
    menu_figure,
    scatter_figure,
    slider_figure,
)
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


def test_another_choice_may_be_shown_first():
    first, second = lines("first", [0.0, 1.0]), lines("second", [5.0, -4.0])
    fig = menu_figure({"one": first, "two": second}, title="Both", first="two")
    assert [trace.visible for trace in fig.data] == [False, True]
    assert fig.layout.updatemenus[0].active == 1
    alone = menu_figure({"two": second}, title="Both").to_dict()
    assert draw_png(fig.to_dict()) == draw_png(alone)


POINTS = pd.DataFrame(
    {"layer": [0, 0, 9, 9], "x": [1.0, 2.0, 3.0, 4.0], "y": 0.5, "kind": ["lies", "truth"] * 2}
)


def plane(layer: int):
    words = {"title": "", "xlabel": f"component 1 of layer {layer}", "ylabel": "component 2"}
    rows = POINTS[POINTS.layer == layer]
    return scatter_figure(rows, x="x", y="y", color="kind", **words)


def test_a_slider_shows_the_points_of_one_layer_with_its_own_axes():
    planes = {"0": plane(0), "9": plane(9)}
    fig = slider_figure(planes, title="Planes", slides_over="layer", first="9")
    [slider] = fig.layout.sliders
    assert [step.label for step in slider.steps] == ["0", "9"] and slider.active == 1
    assert slider.currentvalue.prefix == "layer "
    assert [trace.visible for trace in fig.data] == [False, False, True, True]
    shown, axes = slider.steps[0].args
    assert shown == {"visible": [True, True, False, False]}
    assert axes["xaxis.title.text"] == "component 1 of layer 0"
    assert fig.layout.xaxis.title.text == "component 1 of layer 9"
    assert fig.layout.showlegend


def test_a_slider_is_named_for_those_who_do_not_see_it_and_each_series_once():
    fig = slider_figure({"0": plane(0), "9": plane(9)}, title="Planes", slides_over="layer")
    html = as_html(fig).data
    assert 'role="group" aria-label="Planes. ' in html
    assert "Series: lies, truth. To choose from: 0, 9" in html


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_tokens_are_text(text):
    fig = menu_figure({text: belief_figure(BELIEFS.assign(token=text), title=text)}, title=text)
    [menu], [trace] = fig.layout.updatemenus, fig.data
    texts = [menu.buttons[0].label, *fig.layout.xaxis.ticktext, trace.hovertext[0][0]]
    for shown in texts:
        assert Page(shown).elements <= {"br"}
    assert Page(fig.layout.xaxis.ticktext[0]).text == text.replace("\n", "\\n")
