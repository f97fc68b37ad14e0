"""Figures show the numbers they are given, in the book without a network and as still pictures."""

import base64
import re
import struct
import zlib

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from dlk_utils.lab.figures import (
    COLORS,
    GREY,
    NARROW,
    as_html,
    bars_figure,
    intervals_figure,
    lines_figure,
    matrix_figure,
    mime_bundle,
    scatter_figure,
    show_figures,
    tokens_figure,
)
from dlk_utils.lab.static import PAGE_WIDTH, draw_png

SCORES = pd.DataFrame(
    {
        "probe": ["logistic", "logistic", "mean_difference", "TF-IDF", "TF-IDF"],
        "layer": [2, 1, 1, 1, 2],
        "estimate": [0.7, 0.6, 0.65, 0.5, 0.5],
        "low": [0.6, 0.5, 0.6, np.nan, np.nan],
        "high": [0.8, 0.75, 0.7, np.nan, np.nan],
    }
)
RATES = pd.DataFrame(
    {
        "dataset": ["cities", "cities", "reviews"],
        "instruction": ["spy", "guard", "spy"],
        "rate": [0.1, -0.1, 0.2],
        "rate_low": [0.0, -0.2, 0.1],
        "rate_high": [0.2, 0.1, 0.4],
    }
)
COUNTS = pd.DataFrame(
    {"bin": [10, 20, 10, 20], "n": [3, 4, 5, 6], "role": ["truth", "truth", "lie", "lie"]}
)
TRANSFER = pd.DataFrame(
    {
        "trained_on": ["cities", "cities", "reviews"],
        "tested_on": ["cities", "reviews", "reviews"],
        "estimate": [0.9, 0.6, 0.2],
        "low": [0.8, 0.5, 0.1],
        "high": [1.0, 0.7, 0.3],
        "n": [10, 20, 20],
    }
)
TRACK = pd.DataFrame(
    {"place": [-1, 0, 1], "token": ["<b>it</b>", " $it$", "\n"], "score": [0.1, -1.0, 2.0]}
)


def intervals(**options) -> go.Figure:
    columns = {"x": "rate", "y": "instruction", "color": "dataset"}
    return intervals_figure(RATES, title="Rates", xlabel="rate", **columns | options)


def lines(**options) -> go.Figure:
    columns = {"x": "layer", "y": "estimate", "color": "probe", "interval": ("low", "high")}
    labels = {"title": "Layers", "xlabel": "layer", "ylabel": "AUROC"}
    return lines_figure(SCORES, **columns | labels | options)


def bars(table: pd.DataFrame = COUNTS, **options) -> go.Figure:
    columns = {"x": "bin", "y": "n", "color": "role"}
    return bars_figure(table, title="Counts", xlabel="bin", ylabel="rows", **columns | options)


def scatter(**options) -> go.Figure:
    columns = {"x": "estimate", "y": "low", "color": "probe"}
    labels = {"title": "Points", "xlabel": "estimate", "ylabel": "low"}
    return scatter_figure(SCORES, **columns | labels | options)


FIGURES = {
    "intervals": intervals(reference=0),
    "intervals of one colour": intervals(color=None, x_range=(-1, 1)),
    "lines": lines(reference=0.5, y_range=(0, 1), dashed=["TF-IDF"]),
    "lines on logarithmic axes": lines(log_x=True, log_y=True),
    "points": lines(points=["logistic"]),
    "bars": bars(),
    "bars with a line": bars(reference=15),
    "scatter": scatter(),
    "matrix": matrix_figure(TRANSFER, title="Matrix"),
    "tokens": tokens_figure(TRACK, title="Tokens"),
}


def trace(fig: go.Figure, name: str) -> go.Scatter:
    return next(t for t in fig.data if t.name == name)


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose chunks all have the right checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, size = 8, [], None
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        [checksum] = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(kind + body)
        size = struct.unpack(">II", body[:8]) if kind == b"IHDR" else size
        kinds.append(kind)
        at += 12 + length
    assert kinds[-1] == b"IEND"
    return size


def simple(title: str = "Title") -> go.Figure:
    line = go.Scatter(x=[1, 2], y=[3, 4], mode="lines")
    return go.Figure(line, layout={"title": {"text": title}})


@pytest.fixture(scope="module")
def bundle() -> dict[str, str]:
    return mime_bundle(FIGURES["lines"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_becomes_a_picture_and_the_same_one_again(name):
    fig = FIGURES[name].to_dict()
    width, height = png_size(draw_png(fig))
    assert width == 700 and abs(height - 700 * fig["layout"]["height"] / PAGE_WIDTH) <= 1
    assert draw_png(fig) == draw_png(fig)


def test_the_html_asks_nothing_of_the_network(bundle):
    html = bundle["text/html"]
    assert "http" not in html and "//cdn" not in html and "<link" not in html
    assert not re.search(r"<script[^>]+src", html)
    assert "Plotly.newPlot" in html
    assert as_html(FIGURES["lines"]).data == html


def test_without_scripts_there_is_a_picture_instead_of_an_empty_plot(bundle):
    [hidden] = re.findall(r"<noscript>(.*?)</noscript>", bundle["text/html"])
    assert ".plot {display: none}" in hidden
    [png] = re.findall(r'src="data:image/png;base64,(.*?)"', hidden)
    assert png_size(base64.b64decode(png, validate=True))[0] == 700


def test_the_live_plot_and_the_picture_have_the_same_text_alternative(bundle):
    html = bundle["text/html"]
    [live] = re.findall(r'<div class="plot" role="img" aria-label="(.*?)">', html)
    [still] = re.findall(r'<img class="still-figure" alt="(.*?)"', html)
    assert live == still
    assert live == (
        "Layers. Horizontal axis: layer. Vertical axis: AUROC. "
        "Series: logistic, mean_difference, TF-IDF"
    )


def test_the_title_is_text_of_the_page_and_stands_nowhere_else(bundle):
    html = bundle["text/html"]
    assert "<figcaption>Layers</figcaption>" in html
    assert "Layers" not in html.split("Plotly.newPlot")[1].split("</script>")[0]
    assert "Layers" in str(bundle["application/vnd.plotly.v1+json"]["layout"]["title"])


def test_a_line_of_the_page_that_a_phone_cuts_off_is_broken():
    label = "wrong rate told to lie minus told to tell the truth (95 % interval)"
    fig = lines(xlabel=label, ylabel=label)
    for axis in (fig.layout.xaxis, fig.layout.yaxis):
        assert all(len(line) <= NARROW for line in axis.title.text.split("<br>"))
        shown = axis.title.text.replace("<br>", " ").replace("\N{NO-BREAK SPACE}", " ")
        assert shown == label


@pytest.mark.slow
def test_the_same_figure_has_the_same_id_and_another_one_another(bundle):
    assert mime_bundle(FIGURES["lines"]) == bundle
    ids = set()
    for fig in FIGURES.values():
        [one] = set(re.findall(r"figure-[0-9a-f]{16}", as_html(fig).data))
        ids.add(one)
    assert len(ids) == len(FIGURES)


def test_a_title_cannot_leave_its_attribute():
    title = 'a "b" onload="x" <script>alert(1)</script>'
    html = mime_bundle(simple(title))["text/html"]
    alternative = re.search(r'<img class="still-figure" alt="([^"]*)" src=', html)[1]
    assert "<" not in alternative and "onload=&quot;x&quot;" in alternative
    assert "<script>alert" not in html


@pytest.mark.parametrize("kind", ["contour", "pie", "violin"])
def test_a_trace_that_cannot_be_drawn_is_refused_by_its_type(kind):
    fig = {"data": [{"type": kind}]}
    with pytest.raises(ValueError, match=f"expected scatter, bar or heatmap traces, got '{kind}'"):
        draw_png(fig)


def test_the_picture_shows_what_the_figure_holds():
    assert draw_png(bars().to_dict()) != draw_png(bars(COUNTS.assign(n=7)).to_dict())
    assert draw_png(simple("one").to_dict()) != draw_png(simple("two").to_dict())
    turned = intervals(order=["guard", "spy"])
    assert draw_png(intervals().to_dict()) != draw_png(turned.to_dict())


def test_lines_show_the_numbers_in_order_with_their_intervals():
    logistic = trace(lines(), "logistic")
    assert list(logistic.x) == [1, 2] and list(logistic.y) == [0.6, 0.7]
    np.testing.assert_allclose(logistic.error_y.array, [0.15, 0.1])
    np.testing.assert_allclose(logistic.error_y.arrayminus, [0.1, 0.1])


def test_lines_differ_by_marker_and_dash_as_they_are_told():
    fig = lines(dashed=["TF-IDF"], points=["mean_difference"])
    assert trace(fig, "TF-IDF").line.dash == "dash" and trace(fig, "logistic").line.dash == "solid"
    assert trace(fig, "mean_difference").mode == "markers"
    assert len({t.marker.symbol for t in fig.data}) == len({t.line.color for t in fig.data}) == 3


def test_a_line_that_lies_over_another_leaves_it_to_be_seen():
    table = pd.DataFrame({"x": [0, 1] * 3, "y": 0.5, "site": [*"aabbcc"]})
    fig = lines_figure(table, x="x", y="y", color="site", title="", xlabel="", ylabel="")
    widths = [line.line.width for line in fig.data]
    sizes = [line.marker.size for line in fig.data]
    assert widths == sorted(set(widths), reverse=True)
    assert sizes == sorted(set(sizes), reverse=True)
    assert len({line.line.dash for line in fig.data}) == 3


def test_two_columns_may_give_colour_and_dash():
    table = pd.DataFrame({"x": 0, "y": 0.5, "set": [*"aabb"], "asks": ["truth", "lie"] * 2})
    labels = dict.fromkeys(("title", "xlabel", "ylabel"), "")
    fig = lines_figure(table, x="x", y="y", color="set", dash="asks", **labels)
    looks = {line.name: (line.line.color, line.line.dash) for line in fig.data}
    assert list(looks) == ["a, truth", "a, lie", "b, truth", "b, lie"]
    assert looks["a, truth"][0] == looks["a, lie"][0] != looks["b, lie"][0]
    assert looks["a, truth"][1] == looks["b, truth"][1] != looks["b, lie"][1]


def luminance(rgb: np.ndarray) -> float:
    """Relative luminance, as the guidelines for accessible web pages define it."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def from_hex(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def in_dark_theme(color: np.ndarray) -> np.ndarray:
    """What the filter of the style sheet makes: inverted, with the hue turned by half a circle."""
    weights = np.array([0.213, 0.715, 0.072])
    inverted = 1 - color
    return np.clip(2 * weights @ inverted - inverted, 0, 1)


@pytest.mark.parametrize("color", [*COLORS, GREY])
def test_every_colour_can_be_seen_on_a_light_and_on_a_dark_page(color):
    white, dark = np.ones(3), from_hex("#14181e")
    assert contrast(from_hex(color), white) >= 4.5
    assert contrast(in_dark_theme(from_hex(color)), dark) >= 4.5


def test_points_differ_by_colour_and_marker_and_say_what_they_are():
    fig = scatter(hover="probe")
    assert len({t.marker.symbol for t in fig.data}) == len({t.marker.color for t in fig.data}) == 3
    assert list(trace(fig, "logistic").x) == [0.7, 0.6]
    assert list(trace(fig, "logistic").text) == ["logistic"] * 2
    assert {t.mode for t in fig.data} == {"markers"} and fig.layout.showlegend


def test_hollow_points_are_a_series_of_their_own_also_in_the_picture():
    table = SCORES.assign(right=["1 right", "0 right", "1 right", "0 right", "0 right"])
    labels = {"title": "", "xlabel": "", "ylabel": ""}
    columns = {"x": "estimate", "y": "layer", "color": "probe", "fill": "right"}
    columns["hollow"] = "0 right"
    fig = scatter_figure(table, **columns, **labels)
    looks = {t.name: (t.marker.symbol, t.marker.color) for t in fig.data}
    assert list(looks)[:2] == ["logistic, 1 right", "logistic, 0 right"]
    assert looks["logistic, 1 right"] == ("circle", COLORS[0])
    assert looks["logistic, 0 right"] == ("circle-open", COLORS[0])
    filled = fig.to_dict() | {
        "data": [t | {"marker": t["marker"] | {"symbol": "circle"}} for t in fig.to_dict()["data"]]
    }
    assert draw_png(fig.to_dict()) != draw_png(filled)
    # A table with one of the two values does not turn it hollow.
    one_value = scatter_figure(table[table.right == "1 right"], **columns, **labels)
    assert not any("open" in t.marker.symbol for t in one_value.data)


def test_a_line_stands_where_the_bars_are_to_be_compared_with_it():
    [line] = bars(reference=15).layout.shapes
    assert line.x0 == line.x1 == 15 and line.line.dash == "dash"
    assert draw_png(bars(reference=15).to_dict()) != draw_png(bars().to_dict())


def test_a_logarithmic_axis_has_a_tick_at_every_value():
    assert list(lines(log_x=True).layout.xaxis.tickvals) == [1, 2]


def test_intervals_stand_in_the_row_of_their_name_one_below_the_other():
    fig = intervals(order=["guard", "spy"])
    names = [(note.text, note.y) for note in fig.layout.annotations]
    assert names == [("guard", -0.5), ("spy", 0.5)]
    cities, reviews = trace(fig, "cities"), trace(fig, "reviews")
    # Each point lies between the name of its row and the next one.
    assert 0.5 < cities.y[0] < reviews.y[0] < 1.5 and -0.5 < cities.y[1] < 0.5
    # The axis runs downwards.
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]
    assert list(reviews.text) == ["spy"]
    np.testing.assert_allclose(reviews.error_x.array, [0.2])
    np.testing.assert_allclose(reviews.error_x.arrayminus, [0.1])


def test_the_names_of_rows_take_no_room_from_the_points():
    fig = intervals()
    assert not any(fig.layout.yaxis.ticktext)
    assert {(note.x, note.xref, note.xanchor) for note in fig.layout.annotations} == {
        (0, "paper", "left")
    }


def test_the_ends_of_an_estimate_may_be_called_low_and_high():
    options = {"y": "probe", "title": "", "xlabel": ""}
    [short] = intervals_figure(SCORES, **options).data
    ends = {"low": "estimate_low", "high": "estimate_high"}
    [long] = intervals_figure(SCORES.rename(columns=ends), **options).data
    np.testing.assert_allclose(short.error_x.array, long.error_x.array)


def test_a_cell_of_the_matrix_that_was_not_scored_is_empty():
    fig = FIGURES["matrix"]
    heatmap, cells = fig.data
    rows = fig.layout.yaxis.ticktext
    assert set(rows) == set(fig.layout.xaxis.ticktext) == {"cities", "reviews"}
    text = {(rows[y], x): words for y, x, words in zip(cells.y, cells.x, cells.text, strict=True)}
    assert [list(row) for row in heatmap.text] == [
        [text.get((row, column), "") for column in range(2)] for row in rows
    ]
    values = dict(zip(rows, heatmap.z, strict=True))
    assert text["cities", 0] == "0.90<br>[0.80, 1.00]<br>n = 10" and ("reviews", 0) not in text
    colors = dict(zip(cells.text, cells.textfont.color, strict=True))
    assert colors["0.90<br>[0.80, 1.00]<br>n = 10"] == "white" and "black" in colors.values()
    assert np.isnan(values["reviews"][0]) and values["reviews"][1] == 0.2


def test_a_matrix_of_many_columns_shows_one_number_a_cell():
    names = [f"family {i}" for i in range(6)]
    table = pd.DataFrame({"trained_on": "one", "tested_on": names, "estimate": 0.5})
    heatmap, cells = matrix_figure(table.assign(low=0.4, high=0.6, n=9), title="").data
    assert list(cells.text) == ["0.50"] * 6
    assert heatmap.hovertext[0][0] == "0.50<br>[0.40, 0.60]<br>n = 9"


def test_tokens_are_words_of_the_axis_whose_markup_is_text():
    fig = tokens_figure(TRACK, title="<i>mine</i>")
    assert list(fig.layout.xaxis.ticktext) == ["&lt;b&gt;it&lt;/b&gt;", " $it$", "\\n"]
    assert fig.layout.title.text == "&lt;i&gt;mine&lt;/i&gt;"
    assert "<figcaption>&lt;i&gt;mine&lt;/i&gt;</figcaption>" in as_html(fig).data


@pytest.mark.parametrize("cell", ["figure", "display(figure)"])
def test_a_notebook_shows_a_figure_in_jupyterlab_and_in_the_book(cell):
    shell = InteractiveShell.instance()
    try:
        show_figures(shell)
        shell.push({"figure": simple()})
        with capture_output() as captured:
            shell.run_cell(cell).raise_error()
    finally:
        InteractiveShell.clear_instance()
    [shown] = captured.outputs
    # With a picture beside them, JupyterLab would draw the figure only when one points at it.
    types = {"application/vnd.plotly.v1+json", "text/html"}
    assert shown.data == mime_bundle(simple()) and set(shown.data) == types
    in_lab = shown.data["application/vnd.plotly.v1+json"]
    assert in_lab["data"] == simple().to_plotly_json()["data"]


def test_a_reference_line_does_not_cross_the_names_of_the_rows():
    table = pd.DataFrame({"who": ["a", "b"], "estimate": 0.5, "low": 0.4, "high": 0.6})
    fig = intervals_figure(table, y="who", title="", xlabel="", reference=0)
    tops = [annotation.y for annotation in fig.layout.annotations if annotation.text in ("a", "b")]
    lines = fig.layout.shapes
    assert len(lines) == len(tops) == 2 and {line.x0 for line in lines} == {0}
    for line, top in zip(lines, tops, strict=True):
        # The axis points down.
        assert top + 0.3 < line.y0 < line.y1 == top + 1
