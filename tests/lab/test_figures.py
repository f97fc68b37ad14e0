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
    as_html,
    bars_figure,
    intervals_figure,
    lines_figure,
    matrix_figure,
    mime_bundle,
    show_figures,
    tokens_figure,
)
from dlk_utils.lab.static import draw_png

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


def bars(table: pd.DataFrame = COUNTS) -> go.Figure:
    columns = {"x": "bin", "y": "n", "color": "role"}
    return bars_figure(table, title="Counts", xlabel="bin", ylabel="rows", **columns)


FIGURES = {
    "intervals": intervals(reference=0),
    "intervals of one colour": intervals(color=None, x_range=(-1, 1)),
    "lines": lines(reference=0.5, y_range=(0, 1), dashed=["TF-IDF"]),
    "lines on logarithmic axes": lines(log_x=True, log_y=True),
    "points": lines(points=["logistic"]),
    "bars": bars(),
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


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_becomes_a_picture_and_the_same_one_again(name):
    fig = FIGURES[name].to_dict()
    width, height = png_size(draw_png(fig))
    assert width == 576 and abs(height - fig["layout"]["height"] * 0.8) <= 1
    assert draw_png(fig) == draw_png(fig)


def test_the_html_asks_nothing_of_the_network(bundle):
    html = bundle["text/html"]
    assert "http" not in html and "//cdn" not in html and "<link" not in html
    assert not re.search(r"<script[^>]+src", html)
    assert "Plotly.newPlot" in html
    assert as_html(FIGURES["lines"]).data == html


def test_without_scripts_there_is_the_same_picture_with_its_title(bundle):
    pattern = r'<noscript><img alt="(.*?)" src="data:image/png;base64,(.*?)"></noscript>$'
    [image] = re.findall(pattern, bundle["text/html"])
    assert image == ("Layers", bundle["image/png"])
    assert png_size(base64.b64decode(bundle["image/png"], validate=True))[0] == 576


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
    alternative = re.search(r'<img alt="([^"]*)" src=', html)[1]
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


def test_a_logarithmic_axis_has_a_tick_at_every_value():
    assert list(lines(log_x=True).layout.xaxis.tickvals) == [1, 2]


def test_intervals_stand_in_the_row_of_their_name_one_below_the_other():
    fig = intervals(order=["guard", "spy"])
    assert list(fig.layout.yaxis.ticktext) == ["guard", "spy"]
    cities, reviews = trace(fig, "cities"), trace(fig, "reviews")
    assert [round(y) for y in cities.y] == [1, 0] and [round(y) for y in reviews.y] == [1]
    # The axis runs downwards.
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]
    assert cities.y[0] < reviews.y[0] and list(reviews.text) == ["spy"]
    np.testing.assert_allclose(reviews.error_x.array, [0.2])
    np.testing.assert_allclose(reviews.error_x.arrayminus, [0.1])


def test_the_ends_of_an_estimate_may_be_called_low_and_high():
    options = {"y": "probe", "title": "", "xlabel": ""}
    [short] = intervals_figure(SCORES, **options).data
    ends = {"low": "estimate_low", "high": "estimate_high"}
    [long] = intervals_figure(SCORES.rename(columns=ends), **options).data
    np.testing.assert_allclose(short.error_x.array, long.error_x.array)


def test_a_cell_of_the_matrix_that_was_not_scored_is_empty():
    [heatmap] = FIGURES["matrix"].data
    text = dict(zip(heatmap.y, heatmap.text, strict=True))
    values = dict(zip(heatmap.y, heatmap.z, strict=True))
    assert text["cities"][0] == "0.90<br>[0.80, 1.00]<br>n = 10" and text["reviews"][0] == ""
    assert np.isnan(values["reviews"][0]) and values["reviews"][1] == 0.2


def test_tokens_are_words_of_the_axis_whose_markup_is_text():
    fig = tokens_figure(TRACK, title="<i>mine</i>")
    assert list(fig.layout.xaxis.ticktext) == ["&lt;b&gt;it&lt;/b&gt;", " $it$", "\\n"]
    assert fig.layout.title.text == "&lt;i&gt;mine&lt;/i&gt;"
    assert 'alt="&lt;i&gt;mine&lt;/i&gt;"' in as_html(fig).data


@pytest.mark.parametrize("cell", ["figure", "display(figure)"])
def test_a_notebook_shows_a_figure_in_jupyterlab_in_the_book_and_as_a_picture(cell):
    shell = InteractiveShell.instance()
    try:
        show_figures(shell)
        shell.push({"figure": simple()})
        with capture_output() as captured:
            shell.run_cell(cell).raise_error()
    finally:
        InteractiveShell.clear_instance()
    [shown] = captured.outputs
    types = {"application/vnd.plotly.v1+json", "text/html", "image/png"}
    assert shown.data == mime_bundle(simple()) and set(shown.data) == types
    in_lab = shown.data["application/vnd.plotly.v1+json"]
    assert in_lab["data"] == simple().to_plotly_json()["data"]
