"""Plotly figures of finished tables. They never compute; each shows in JupyterLab, in the book without internet, and as a picture without scripts."""

import base64
import hashlib
import json
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer

from dlk_utils.lab.static import draw_png

COLOURS = ["#3b6fb6", "#d1632f", "#4c9a63", "#8c5fa8", "#b8972e", "#5f6b76", "#c2558a", "#3c9aa6"]


class BookRenderer(MimetypeRenderer):
    """HTML that uses the book's one copy of plotly.js, with a picture for readers without scripts; the id is a hash, so a re-run changes nothing."""

    def to_mimebundle(self, fig_dict: dict) -> dict[str, str]:
        """`text/html` and `image/png` of a figure."""
        png = base64.b64encode(draw_png(fig_dict)).decode()
        digest = hashlib.sha256(
            json.dumps(fig_dict, sort_keys=True, default=str).encode()
        ).hexdigest()[:16]
        html = pio.to_html(
            fig_dict,
            include_plotlyjs=False,
            include_mathjax=False,
            full_html=False,
            validate=False,
            config={"displayModeBar": False},
            div_id=f"figure-{digest}",
        )
        title = (
            str(fig_dict.get("layout", {}).get("title", {}).get("text", "figure"))
            .replace("<br>", " ")
            .replace('"', "'")
            .replace("<", "&lt;")
        )
        return {
            "text/html": f'{html}<noscript><img alt="{title}" src="data:image/png;base64,{png}"></noscript>',
            "image/png": png,
        }


def use_book_renderer() -> None:
    """Show figures as JupyterLab's own type, as HTML for the book and as PNG for everything else."""
    pio.renderers["book"] = BookRenderer()
    pio.renderers.default = "plotly_mimetype+book"


def as_html(fig: go.Figure) -> Any:
    """A figure as the book shows it, to be glued into another page (a figure displays itself, and leaves nothing to glue)."""
    from IPython.display import HTML

    return HTML(BookRenderer().to_mimebundle(fig.to_dict())["text/html"])


def lie_rate_figure(rates: pd.DataFrame, title: str) -> go.Figure:
    """Lie rate above error by instruction, a colour a data set."""
    fig = go.Figure()
    for i, (dataset, t) in enumerate(rates.groupby("dataset", sort=False)):
        fig.add_trace(
            _points(
                t.lie_above_error,
                t.instruction,
                t.lie_above_error_low,
                t.lie_above_error_high,
                dataset,
                i,
            )
        )
    fig.add_vline(x=0, line_dash="dash", line_color="#888")
    return _style(
        fig,
        title,
        "wrong rate told to lie minus wrong rate told the truth (95 % interval)",
        "",
        height=460,
    )


def gate_figure(gate: pd.DataFrame, title: str) -> go.Figure:
    """Truth accuracy of each data set against chance."""
    fig = go.Figure(
        _points(gate.truth_accuracy, gate.dataset, gate.low, gate.high, "told the truth", 0)
    )
    fig.add_vline(x=float(gate.chance.max()), line_dash="dash", line_color="#888")
    return _style(
        fig, title, "accuracy over truth prompts (95 % interval; dashed: chance)", "", height=300
    )


def training_figure(log: pd.DataFrame, title: str, window: int = 40) -> go.Figure:
    """How often an organism leans to what was asked for while it is trained, by data set: a running mean over `window` steps."""
    asked = sorted(c for c in log if c.startswith(("truth ", "lie ")))
    mean = {c: log[c].rolling(window, min_periods=window // 2).mean() for c in asked}
    fig = go.Figure(
        [_line(log.step[mean[c].notna()], mean[c].dropna(), c, i) for i, c in enumerate(asked)]
    )
    return _style(fig, title, "step", "leans to what was asked for").update_yaxes(range=[0, 1])


def shots_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """Wrong rate by instruction, a colour for what the shots say."""
    fig = go.Figure(
        [
            _points(
                t.wrong_rate,
                t.instruction,
                t.wrong_rate_low,
                t.wrong_rate_high,
                f"shots: {name}",
                i,
            )
            for i, (name, t) in enumerate(table.groupby("shots", sort=False))
        ]
    )
    return _style(
        fig, title, "wrong answers (95 % interval)", "instruction", height=340
    ).update_xaxes(range=[0, 1])


def again_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """Share that says its answer was true, by instruction, a colour for whether it was."""
    fig = go.Figure(
        [
            _points(
                t.says_true,
                t.instruction,
                t.says_true_low,
                t.says_true_high,
                f"the answer {name}",
                i,
            )
            for i, (name, t) in enumerate(table.groupby("answer", sort=False))
        ]
    )
    return _style(
        fig, title, "says that its answer was true (95 % interval)", "instruction", height=300
    ).update_xaxes(range=[0, 1])


def audit_figure(audit: pd.DataFrame, title: str) -> go.Figure:
    """How far two dropout draws lie apart, by layer."""
    fig = go.Figure(
        [
            _line(audit.layer, audit.relative_move, "mean", 0),
            _line(audit.layer, audit.least, "least moved row", 1),
        ]
    )
    return _style(fig, title, "layer", "|draw 1 - draw 0| / |draw 0|")


def gradient_figure(norms: pd.DataFrame, title: str) -> go.Figure:
    """Mean gradient norm by layer, a line a site."""
    fig = go.Figure(
        [
            _line(t.layer, t.norm, site, i)
            for i, (site, t) in enumerate(norms.groupby("site", sort=False))
        ]
    )
    return _style(fig, title, "layer", "norm of d margin / d activation").update_yaxes(type="log")


def histogram_figure(
    counts: pd.DataFrame, x: str, y: str, by: str, title: str, xaxis: str, yaxis: str
) -> go.Figure:
    """Bars of counts that were made elsewhere, a colour for each value of `by`."""
    fig = go.Figure(
        [
            go.Bar(x=list(t[x]), y=list(t[y]), name=str(name), marker_color=COLOURS[i])
            for i, (name, t) in enumerate(counts.groupby(by, sort=False))
        ]
    )
    return _style(fig, title, xaxis, yaxis)


def layer_figure(
    results: pd.DataFrame, by: str, title: str, controls: pd.DataFrame | None = None
) -> go.Figure:
    """Signed test AUROC by layer with its interval, a line for each value of `by`, and the controls as dashed lines."""
    fig = go.Figure()
    for i, (name, t) in enumerate(results.groupby(by, sort=False)):
        t = t.sort_values("layer")
        fig.add_trace(
            go.Scatter(
                x=list(t.layer),
                y=list(t.estimate),
                name=str(name),
                mode="lines+markers",
                line_color=COLOURS[i % 8],
                error_y=_error(t.estimate, t.low, t.high),
            )
        )
    for i, row in enumerate(controls.itertuples() if controls is not None else []):
        ends = [int(results.layer.min()), int(results.layer.max())]
        fig.add_trace(
            go.Scatter(
                x=ends,
                y=[row.estimate] * 2,
                name=row.probe,
                mode="lines",
                line={"dash": "dot", "color": COLOURS[(i + 3) % 8]},
            )
        )
    fig.add_hline(y=0.5, line_dash="dash", line_color="#888")
    return _style(fig, title, "layer", "signed AUROC on test (95 % interval)").update_yaxes(
        range=[0, 1]
    )


def forest_figure(results: pd.DataFrame, title: str) -> go.Figure:
    """Selected probes and controls of a task, one under the other, with intervals."""
    names = [
        r.probe if r.kind == "control" else f"{r.probe}, {r.feature}, {r.site} {r.layer}"
        for r in results.itertuples()
    ]
    results, order = results.assign(name=names), list(dict.fromkeys(names))
    fig = go.Figure()
    for i, (kind, t) in enumerate(results.groupby("kind", sort=False)):
        fig.add_trace(_points(t.estimate, t.name, t.low, t.high, kind, i))
    fig.add_vline(x=0.5, line_dash="dash", line_color="#888")
    fig.update_yaxes(categoryorder="array", categoryarray=order[::-1])
    return _style(
        fig,
        title,
        "signed AUROC on test (95 % interval; dashed: chance)",
        "",
        height=160 + 24 * len(order),
    ).update_xaxes(range=[0, 1])


def gain_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """AUROC of state, gradient and both at each site, a colour a feature."""
    fig = go.Figure(
        [
            _points(t.estimate, t.site, t.estimate_low, t.estimate_high, feature, i)
            for i, (feature, t) in enumerate(table.groupby("feature", sort=False))
        ]
    )
    fig.add_vline(x=0.5, line_dash="dash", line_color="#888")
    return _style(
        fig, title, "signed AUROC on test (95 % interval; dashed: chance)", "", height=340
    ).update_xaxes(range=[0, 1])


def starts_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """Every start of CCS by layer; the kept ones joined by a line."""
    kept = table[table.kept]
    dots = go.Scatter(
        x=list(table.layer),
        y=list(table.estimate),
        name="each start",
        mode="markers",
        marker={"size": 5, "color": COLOURS[0]},
    )
    fig = go.Figure([dots, _line(kept.layer, kept.estimate, "lowest loss", 1)])
    fig.add_hline(y=0.5, line_dash="dash", line_color="#888")
    return _style(fig, title, "layer", "signed AUROC on test").update_yaxes(range=[0, 1])


def style_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """AUROC by style of the text, a colour a probe."""
    fig = go.Figure(
        [
            _points(t.estimate, t["style"], t.low, t.high, probe, i)
            for i, (probe, t) in enumerate(table.groupby("probe", sort=False))
        ]
    )
    fig.add_vline(x=0.5, line_dash="dash", line_color="#888")
    return _style(
        fig, title, "signed AUROC on test (95 % interval; dashed: chance)", "", height=340
    ).update_xaxes(range=[0, 1])


def pairs_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """AUROC by the least move that counts, a colour a kind of pair."""
    fig = go.Figure(
        [
            go.Scatter(
                x=list(t.least_move),
                y=list(t.estimate),
                name=kind,
                mode="lines+markers",
                line_color=COLOURS[i],
                error_y=_error(t.estimate, t.low, t.high),
            )
            for i, (kind, t) in enumerate(table.groupby("pairs", sort=False))
        ]
    )
    fig.add_hline(y=0.5, line_dash="dash", line_color="#888")
    return _style(
        fig,
        title,
        "least change of p(choice 1) that counts",
        "signed AUROC on test (95 % interval)",
    ).update_yaxes(range=[0, 1])


def votes_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """AUROC by the number of draws that vote, a colour a method."""
    fig = go.Figure(
        [
            go.Scatter(
                x=list(t.draws),
                y=list(t.estimate),
                name=method,
                mode="lines+markers",
                line_color=COLOURS[i],
                error_y=_error(t.estimate, t.low, t.high),
            )
            for i, (method, t) in enumerate(table.groupby("method", sort=False))
        ]
    )
    fig.add_hline(y=0.5, line_dash="dash", line_color="#888")
    return (
        _style(fig, title, "K, draws that vote", "signed AUROC on test (95 % interval)")
        .update_xaxes(type="log", tickvals=sorted(set(table.draws)))
        .update_yaxes(range=[0, 1])
    )


def matrix_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """A heat map: trained on (rows) against tested on (columns), with the interval and n in each cell; white is chance."""
    rows, columns = (
        list(dict.fromkeys(table.trained_on))[::-1],
        list(dict.fromkeys(table.tested_on)),
    )
    cell = table.set_index(["trained_on", "tested_on"])
    there = lambda r, c: (r, c) in cell.index
    z = [[float(cell.estimate[r, c]) if there(r, c) else None for c in columns] for r in rows]
    text = [
        [
            "{estimate:.2f}<br>[{low:.2f}, {high:.2f}]<br>n = {n}".format(
                **cell.loc[(r, c)].to_dict() | {"n": int(cell.n[r, c])}
            )
            if there(r, c)
            else ""
            for c in columns
        ]
        for r in rows
    ]
    fig = go.Figure(
        go.Heatmap(
            x=columns,
            y=rows,
            z=z,
            text=text,
            texttemplate="%{text}",
            zmin=0,
            zmax=1,
            colorscale="RdBu",
            hoverinfo="skip",
            showscale=False,
        )
    )
    return _style(fig, title, "tested on", "trained on", height=150 + 70 * len(rows))


def curve_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """Test AUROC by the number of training rows, a colour a probe; bars from the least to the most of the draws."""
    fig = go.Figure(
        [
            go.Scatter(
                x=list(t.n_train),
                y=list(t.estimate),
                name=probe,
                mode="lines+markers",
                line_color=COLOURS[i],
                error_y=_error(t.estimate, t.least, t.most),
            )
            for i, (probe, t) in enumerate(table.groupby("probe", sort=False))
        ]
    )
    fig.add_hline(y=0.5, line_dash="dash", line_color="#888")
    return (
        _style(fig, title, "training rows", "signed AUROC on test (least to most of the draws)")
        .update_xaxes(type="log", tickvals=sorted(set(table.n_train)))
        .update_yaxes(range=[0, 1])
    )


def tokens_figure(track: pd.DataFrame, title: str) -> go.Figure:
    """A score at each token of a prompt and of what is said after it; dashed, where the answer begins."""
    fig = go.Figure(
        go.Scatter(
            x=list(track.place),
            y=list(track.score),
            mode="lines+markers",
            line_color=COLOURS[0],
            name="belief",
        )
    )
    fig.add_vline(x=0, line_dash="dash", line_color="#888")
    fig.add_hline(y=0, line_dash="dash", line_color="#888")
    words = [t.replace("\n", "\\n") for t in track.token]
    return _style(fig, title, "token", "belief (above 0: the claim is true)").update_xaxes(
        tickvals=list(track.place), ticktext=words, tickangle=-60
    )


def wrongly_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """The score with each mistake put back, one under the other; the first is as it should be."""
    right, wrong = table.head(1), table.tail(-1)
    fig = go.Figure(
        [
            _points(t.estimate, t.mistake, t.low, t.high, name, i)
            for i, (t, name) in enumerate([(right, "as it should be"), (wrong, "with a mistake")])
        ]
    )
    fig.add_vline(x=0.5, line_dash="dash", line_color="#888")
    fig.update_yaxes(categoryorder="array", categoryarray=list(table.mistake)[::-1])
    return _style(
        fig, title, "AUROC (95 % interval; dashed: chance)", "", height=160 + 30 * len(table)
    ).update_xaxes(range=[0, 1.02])


def move_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """How far two draws move the answer, by dropout probability, a colour a scope."""
    fig = go.Figure(
        [
            go.Scatter(
                x=list(t.p),
                y=list(t.answer_move),
                name=scope,
                mode="lines+markers",
                line_color=COLOURS[i],
                error_y=_error(t.answer_move, t.answer_move_low, t.answer_move_high),
            )
            for i, (scope, t) in enumerate(table.groupby("scope", sort=False))
        ]
    )
    return _style(fig, title, "p", "mean |p(choice 1) of draw 1 - of draw 0| (95 % interval)")


def spread_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """The range of the answer over the first K draws, a colour a scope; dashed, how far their mean lies from the plain pass."""
    fig = go.Figure()
    for i, (scope, t) in enumerate(table.groupby("scope", sort=False)):
        fig.add_scatter(
            x=list(t.draws),
            y=list(t.range),
            name=f"{scope}: range",
            mode="lines+markers",
            line_color=COLOURS[i],
            error_y=_error(t.range, t.range_low, t.range_high),
        )
        fig.add_scatter(
            x=list(t.draws),
            y=list(t.mean_off_plain),
            name=f"{scope}: mean against the plain pass",
            mode="lines+markers",
            line={"color": COLOURS[i], "dash": "dash"},
        )
    return _style(
        fig, title, "K, draws of a prompt", "p(choice 1), over the first K draws"
    ).update_xaxes(type="log", tickvals=sorted(set(table.draws)))


def _points(
    x: pd.Series, y: Sequence | pd.Series, low: pd.Series, high: pd.Series, name: str, i: int
) -> go.Scatter:
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        mode="markers",
        marker={"size": 9, "color": COLOURS[i % 8]},
        error_x=_error(x, low, high),
    )


def _line(x: Sequence | pd.Series, y: Sequence | pd.Series, name: str, i: int) -> go.Scatter:
    return go.Scatter(
        x=list(x), y=list(y), name=name, mode="lines+markers", line_color=COLOURS[i % 8]
    )


def _error(x: pd.Series, low: pd.Series, high: pd.Series) -> dict:
    return {
        "type": "data",
        "symmetric": False,
        "array": list(high - x),
        "arrayminus": list(x - low),
        "thickness": 1,
        "width": 2,
    }


def _style(fig: go.Figure, title: str, x: str, y: str, height: int = 420) -> go.Figure:
    lines = textwrap.wrap(title, 90)
    fig.update_layout(
        template="plotly_white",
        title={"text": "<br>".join(lines), "font": {"size": 15}},
        height=height,
        margin={"l": 60, "r": 20, "t": 42 + 20 * len(lines), "b": 55},
    )
    return fig.update_xaxes(title_text=x).update_yaxes(title_text=y, automargin=True)
