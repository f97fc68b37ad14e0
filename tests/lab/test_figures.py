"""Figures: what a notebook stores of one (HTML without the network, a picture without scripts) and the still picture itself."""

import base64
import re
import struct
import zlib

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from dlk_utils.lab import figures
from dlk_utils.lab.figures import BookRenderer, use_book_renderer
from dlk_utils.lab.static import draw_png

RESULTS = pd.DataFrame(
    {
        "kind": ["probe", "probe", "probe", "control"],
        "probe": ["logistic", "logistic", "mean_difference", "TF-IDF"],
        "feature": ["activation"] * 3 + [""],
        "site": ["resid_post"] * 3 + [""],
        "layer": [1, 2, 1, -1],
        "estimate": [0.6, 0.7, 0.65, 0.5],
        "low": [0.5, 0.6, 0.6, 0.4],
        "high": [0.7, 0.8, 0.7, 0.6],
    }
)
RATES = pd.DataFrame(
    {
        "dataset": ["a", "a", "b"],
        "instruction": ["spy", "guard", "spy"],
        "lie_above_error": [0.1, -0.1, 0.2],
        "lie_above_error_low": [0.0, -0.2, 0.1],
        "lie_above_error_high": [0.2, 0.1, 0.3],
    }
)
GATE = pd.DataFrame(
    {
        "dataset": ["a", "b"],
        "truth_accuracy": [0.8, 0.5],
        "low": [0.7, 0.4],
        "high": [0.9, 0.6],
        "chance": [0.5, 0.55],
    }
)
COUNTS = pd.DataFrame(
    {"bin": [0.1, 0.2, 0.1, 0.2], "n": [3, 4, 5, 6], "role": ["truth", "truth", "lie", "lie"]}
)
MADE = {
    "lie_rate": lambda: figures.lie_rate_figure(RATES, "Lies"),
    "gate": lambda: figures.gate_figure(GATE, "Gate"),
    "audit": lambda: figures.audit_figure(
        pd.DataFrame({"layer": [1, 2], "relative_move": [0.1, 0.2], "least": [0.05, 0.1]}), "Audit"
    ),
    "spread": lambda: figures.spread_figure(
        pd.DataFrame(
            {
                "scope": ["sequence", "sequence", "last_token"],
                "draws": [2, 4, 2],
                "range": [0.1, 0.2, 0.05],
                "mean_off_plain": [0.1, 0.05, 0.02],
                "range_low": [0.05, 0.1, 0.0],
                "range_high": [0.2, 0.3, 0.1],
            }
        ),
        "Spreads",
    ),
    "gain": lambda: figures.gain_figure(
        pd.DataFrame(
            {
                "feature": ["a", "b"],
                "site": ["x", "x"],
                "estimate": [0.9, 0.2],
                "estimate_low": [0.8, 0.1],
                "estimate_high": [1.0, 0.3],
            }
        ),
        "Gains",
    ),
    "starts": lambda: figures.starts_figure(
        pd.DataFrame(
            {
                "layer": [0, 0, 3],
                "start": [0, 1, 0],
                "loss": [0.1, 0.2, 0.1],
                "estimate": [0.4, 0.6, 0.9],
                "kept": [True, False, True],
            }
        ),
        "Starts",
    ),
    "style": lambda: figures.style_figure(
        pd.DataFrame(
            {
                "style": ["clean", "shouted"],
                "probe": ["p", "p"],
                "estimate": [0.9, 0.6],
                "low": [0.8, 0.5],
                "high": [1.0, 0.7],
            }
        ),
        "Styles",
    ),
    "pairs": lambda: figures.pairs_figure(
        pd.DataFrame(
            {
                "pairs": ["a", "a"],
                "least_move": [0.0, 0.1],
                "estimate": [0.5, 0.6],
                "low": [0.4, 0.5],
                "high": [0.6, 0.7],
            }
        ),
        "Pairs",
    ),
    "votes": lambda: figures.votes_figure(
        pd.DataFrame(
            {
                "method": ["m", "m"],
                "draws": [2, 4],
                "estimate": [0.5, 0.6],
                "low": [0.4, 0.5],
                "high": [0.6, 0.7],
            }
        ),
        "Votes",
    ),
    "matrix": lambda: figures.matrix_figure(
        pd.DataFrame(
            {
                "trained_on": ["a", "a", "b"],
                "tested_on": ["a", "b", "b"],
                "estimate": [0.9, 0.6, 0.2],
                "low": [0.8, 0.5, 0.1],
                "high": [1.0, 0.7, 0.3],
                "n": [10, 20, 20],
            }
        ),
        "Matrix",
    ),
    "curve": lambda: figures.curve_figure(
        pd.DataFrame(
            {
                "probe": ["x", "x", "y"],
                "n_train": [8, 16, 8],
                "estimate": [0.6, 0.8, 0.5],
                "least": [0.5, 0.7, 0.4],
                "most": [0.7, 0.9, 0.6],
            }
        ),
        "Curve",
    ),
    "tokens": lambda: figures.tokens_figure(
        pd.DataFrame(
            {"place": [-1, 0, 1], "token": ["is", " $it", "\n"], "score": [0.1, -1.0, 2.0]}
        ),
        "Tokens",
    ),
    "wrongly": lambda: figures.wrongly_figure(
        pd.DataFrame(
            {
                "mistake": ["none", "split", "sign"],
                "estimate": [0.5, 0.9, 0.7],
                "low": [0.4, 0.8, 0.6],
                "high": [0.6, 1.0, 0.8],
            }
        ),
        "Wrongly",
    ),
    "move": lambda: figures.move_figure(
        pd.DataFrame(
            {
                "scope": ["sequence", "sequence", "last_token"],
                "p": [0.1, 0.2, 0.1],
                "answer_move": [0.1, 0.2, 0.05],
                "answer_move_low": [0.05, 0.1, 0.0],
                "answer_move_high": [0.2, 0.3, 0.1],
            }
        ),
        "Moves",
    ),
    "training": lambda: figures.training_figure(
        pd.DataFrame(
            {
                "step": range(1, 7),
                "truth a": [0.5, None, 0.6, 0.7, 0.8, 0.9],
                "lie a": [None] * 4 + [0.6, 0.7],
                "loss": 1.0,
            }
        ),
        "Training",
        window=2,
    ),
    "shots": lambda: figures.shots_figure(
        pd.DataFrame(
            {
                "shots": ["none", "lie"],
                "instruction": ["truth", "lie"],
                "wrong_rate": [0.2, 0.5],
                "wrong_rate_low": [0.1, 0.4],
                "wrong_rate_high": [0.3, 0.6],
            }
        ),
        "Shots",
    ),
    "again": lambda: figures.again_figure(
        pd.DataFrame(
            {
                "answer": ["was true", "was false"],
                "instruction": ["truth", "lie"],
                "says_true": [0.2, 0.5],
                "says_true_low": [0.1, 0.4],
                "says_true_high": [0.3, 0.6],
            }
        ),
        "Again",
    ),
    "gradient": lambda: figures.gradient_figure(
        pd.DataFrame({"layer": [1, 2, 1, 2], "norm": [1.0, 10.0, 2.0, 3.0], "site": list("xxyy")}),
        "Gradients",
    ),
    "histogram": lambda: figures.histogram_figure(
        COUNTS, "bin", "n", "role", "Counts", "bin", "rows"
    ),
    "histogram of words": lambda: figures.histogram_figure(
        COUNTS.assign(bin=["p", "q", "p", "q"]), "bin", "n", "role", "Counts", "bin", "rows"
    ),
    "layer": lambda: figures.layer_figure(
        RESULTS[RESULTS.kind == "probe"], "probe", "Layers", RESULTS[RESULTS.kind == "control"]
    ),
    "forest": lambda: figures.forest_figure(RESULTS, "Forest"),
}


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose chunks all have the right checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, size = 8, [], None
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        size = struct.unpack(">II", body[:8]) if kind == b"IHDR" else size
        kinds.append(kind)
        at += 12 + length
    assert kinds[-1] == b"IEND"
    return size


def simple(title="Title") -> go.Figure:
    return go.Figure(
        go.Scatter(x=[1, 2], y=[3, 4], mode="lines"), layout={"title": {"text": title}}
    )


@pytest.fixture(scope="module")
def bundle() -> dict[str, str]:
    return BookRenderer().to_mimebundle(MADE["layer"]().to_dict())


@pytest.mark.parametrize("name", MADE)
def test_every_figure_becomes_a_picture(name):
    fig = MADE[name]().to_dict()
    width, height = png_size(draw_png(fig))
    assert width == 576 and abs(height - fig["layout"]["height"] * 0.8) <= 1
    assert draw_png(fig) == draw_png(fig)


def test_the_html_asks_nothing_of_the_network(bundle):
    html = bundle["text/html"]
    assert "http" not in html and "//cdn" not in html and "<link" not in html
    assert not re.search(r"<script[^>]+src", html)
    assert "Plotly.newPlot" in html


def test_without_scripts_there_is_the_same_picture_with_its_title(bundle):
    [image] = re.findall(
        r'<noscript><img alt="(.*?)" src="data:image/png;base64,(.*?)"></noscript>$',
        bundle["text/html"],
    )
    assert image == ("Layers", bundle["image/png"])
    assert png_size(base64.b64decode(bundle["image/png"], validate=True)) == (576, 336)


def test_the_same_figure_has_the_same_id_and_another_one_another(bundle):
    again = BookRenderer().to_mimebundle(MADE["layer"]().to_dict())
    assert again == bundle
    ids = [
        set(
            re.findall(
                r"figure-[0-9a-f]{16}",
                BookRenderer().to_mimebundle(MADE[n]().to_dict())["text/html"],
            )
        )
        for n in ("layer", "gate", "forest")
    ]
    assert all(len(i) == 1 for i in ids) and len(set.union(*ids)) == 3


def test_a_title_cannot_leave_its_attribute():
    html = BookRenderer().to_mimebundle(
        simple('a "b" onload="x" <script>alert(1)</script>').to_dict()
    )["text/html"]
    alt = re.search(r'<img alt="([^"]*)" src=', html)[1]
    assert "<" not in alt and "onload='x'" in alt
    assert "<script>alert" not in html


@pytest.mark.parametrize(
    "trace",
    [
        go.Contour(z=[[1, 2], [3, 4]]),
        go.Pie(values=[1, 2], labels=["a", "b"]),
        go.Violin(x=[1], y=[2]),
    ],
)
def test_a_trace_that_cannot_be_drawn_is_refused_by_its_type(trace):
    with pytest.raises(
        ValueError, match=f"expected scatter, bar or heatmap traces, got '{trace.type}'"
    ):
        draw_png(go.Figure(trace).to_dict())


def test_the_picture_shows_what_the_figure_holds():
    low, high = (draw_png(go.Figure(go.Bar(x=[0, 1], y=[1, y])).to_dict()) for y in (1, 5))
    assert low != high
    assert draw_png(simple("one").to_dict()) != draw_png(simple("two").to_dict())


def test_figures_show_the_numbers_that_they_were_given():
    fig = MADE["layer"]()
    logistic = next(t for t in fig.data if t.name == "logistic")
    assert list(logistic.x) == [1, 2] and list(logistic.y) == [0.6, 0.7]
    np.testing.assert_allclose(logistic.error_y.array, [0.1, 0.1])
    np.testing.assert_allclose(logistic.error_y.arrayminus, [0.1, 0.1])
    control = next(t for t in fig.data if t.name == "TF-IDF")
    assert list(control.y) == [0.5, 0.5] and list(control.x) == [1, 2]
    assert tuple(fig.layout.yaxis.range) == (0, 1)
    forest = MADE["forest"]()
    order = list(forest.layout.yaxis.categoryarray)
    assert order == [
        "TF-IDF",
        "mean_difference, activation, resid_post 1",
        "logistic, activation, resid_post 2",
        "logistic, activation, resid_post 1",
    ]


def test_the_forest_s_picture_has_its_order_of_rows_from_the_figure():
    fig = MADE["forest"]().to_dict()
    turned = (
        MADE["forest"]()
        .update_yaxes(categoryarray=fig["layout"]["yaxis"]["categoryarray"][::-1])
        .to_dict()
    )
    assert draw_png(fig) != draw_png(turned)


def test_the_book_renderer_is_shown_beside_jupyterlab_s(monkeypatch):
    before = pio.renderers.default
    try:
        use_book_renderer()
        assert pio.renderers.default == "plotly_mimetype+book"
        bundle = pio.renderers._build_mime_bundle(simple().to_dict())
        assert {"application/vnd.plotly.v1+json", "text/html", "image/png"} <= set(bundle)
    finally:
        pio.renderers.default = before
