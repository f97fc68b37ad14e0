"""Plotly figures of finished tables, by five builders.

They never compute. A figure shows in JupyterLab, in the book without internet, and as a still
picture where no scripts run. Titles, names and cells of the table are plain text: the builders
escape them, so that plotly reads no markup in them.
"""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import HTML, display
from plotly.io.base_renderers import PlotlyRenderer

from dlk_utils.lab.escaping import html_text, plotly_text
from dlk_utils.lab.static import draw_png

# Series differ by colour and by marker or pattern, so that they can be told apart in grey.
COLORS = ("#3b6fb6", "#d1632f", "#4c9a63", "#8c5fa8", "#b8972e", "#5f6b76", "#c2558a", "#3c9aa6")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
PATTERNS = ("", "/", ".", "x")
GREY = "#888"
# A dollar sign is a dollar sign, also where MathJax is there.
CONFIG = {"displayModeBar": False, "typesetMath": False}
Number = int | float


def mime_bundle(fig: go.Figure) -> dict[str, Any]:
    """Return a figure in every form that a notebook shows it in, by MIME type.

    These are JupyterLab's own type of plotly, ``text/html`` for the book, and ``image/png`` for
    readers that know neither. The HTML uses the book's one copy of plotly.js, and holds the still
    picture for readers without scripts. The id of the figure is a hash of its content, so running a
    notebook again changes nothing.
    """
    fig_dict = fig.to_dict()
    png = base64.b64encode(draw_png(fig_dict)).decode()
    content = json.dumps(fig_dict, sort_keys=True, default=str)
    interactive = pio.to_html(
        fig_dict,
        include_plotlyjs=False,
        include_mathjax=False,
        full_html=False,
        validate=False,
        config=CONFIG,
        div_id=f"figure-{hashlib.sha256(content.encode()).hexdigest()[:16]}",
    )
    title = fig_dict.get("layout", {}).get("title", {}).get("text", "figure")
    alternative = html_text(html.unescape(title.replace("<br>", " ")))
    picture = f'<img alt="{alternative}" src="data:image/png;base64,{png}">'
    shown = {"text/html": f"{interactive}<noscript>{picture}</noscript>", "image/png": png}
    return PlotlyRenderer(config=CONFIG).to_mimebundle(fig_dict) | shown


def show_figures(shell: InteractiveShell) -> None:
    """Make a shell show plotly figures by `mime_bundle`.

    That is how a figure is shown at the end of a cell or by ``display``. Its own method ``show``
    goes by ``plotly.io.renderers``, which stays as it is: importing that takes over a second.
    """

    def show(fig: go.Figure) -> None:
        display(mime_bundle(fig), raw=True)

    shell.display_formatter.ipython_display_formatter.for_type(go.Figure, show)


def as_html(fig: go.Figure) -> HTML:
    """Return a figure as the book shows it, to be glued into another page."""
    return HTML(mime_bundle(fig)["text/html"])


def intervals_figure(
    table: pd.DataFrame,
    *,
    y: str,
    title: str,
    xlabel: str,
    x: str = "estimate",
    color: str | None = None,
    ylabel: str = "",
    reference: Number | None = None,
    x_range: tuple[Number, Number] | None = None,
    order: Sequence[str] | None = None,
    height: int | None = None,
) -> go.Figure:
    """Draw points with horizontal intervals, a row of the picture for each value of `y`.

    Parameters
    ----------
    table
        One row a point. The ends of its interval are in the columns ``{x}_low`` and ``{x}_high``,
        or else ``low`` and ``high``.
    x, y
        Columns of the values, and of the names of the picture's rows.
    color
        Column that gives each of its values a colour and a marker. Points of one row stand one
        below the other.
    reference
        Where to draw a dashed vertical line.
    x_range, height
        Ends of the axis, and pixels; None goes by the points.
    order
        Names of the rows from top to bottom; None takes them as they come.
    """
    names = list(dict.fromkeys(table[y])) if order is None else list(order)
    series = _series(table, color)
    in_row = {name: [label for label, part in series if name in set(part[y])] for name in names}
    low, high = (f"{x}_{end}" if f"{x}_{end}" in table else end for end in ("low", "high"))
    fig = go.Figure()
    for number, (label, part) in enumerate(series):
        places = []
        for name in part[y]:
            shift = (in_row[name].index(label) + 0.5) / len(in_row[name]) - 0.5
            places.append(names.index(name) + 0.7 * shift)
        fig.add_scatter(
            x=list(part[x]),
            y=places,
            name=plotly_text(label),
            text=[plotly_text(str(name)) for name in part[y]],
            hoverinfo="text+x+name",
            mode="markers",
            marker=_marker(number, 8),
            error_x=_error(part, x, low, high),
        )
    fig.update_xaxes(range=x_range)
    fig.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[plotly_text(str(name), 44) for name in names],
        range=[len(names) - 0.5, -0.5],
        zeroline=False,
    )
    if reference is not None:
        fig.add_vline(x=reference, line_dash="dash", line_color=GREY)
    row_height = max(30, 14 * max(map(len, in_row.values()), default=0))
    return _finish(fig, title, xlabel, ylabel, height or 170 + row_height * len(names))


def lines_figure(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    title: str,
    xlabel: str,
    ylabel: str,
    color: str | None = None,
    interval: tuple[str, str] | None = None,
    reference: Number | None = None,
    log_x: bool = False,
    log_y: bool = False,
    y_range: tuple[Number, Number] | None = None,
    dashed: Sequence[str] = (),
    points: Sequence[str] = (),
) -> go.Figure:
    """Draw lines with markers, for the columns `x` and `y` of a table with one row a point.

    Parameters
    ----------
    color
        Column that gives each of its values a line with a colour and a marker.
    interval
        Columns of the ends of each point's vertical interval; NaN where a point has none.
    reference
        Where to draw a dashed horizontal line.
    log_x, log_y
        Whether an axis is logarithmic. On the horizontal one every value of `x` has a tick.
    y_range
        Ends of the vertical axis; None goes by the points.
    dashed
        Values of `color` that are drawn as dashed lines, such as controls.
    points
        Values of `color` that are drawn as points, without a line.
    """
    fig = go.Figure()
    for number, (label, part) in enumerate(_series(table, color)):
        part = part.sort_values(x, kind="stable")
        fig.add_scatter(
            x=list(part[x]),
            y=list(part[y]),
            name=plotly_text(label),
            mode="markers" if label in points else "lines+markers",
            marker=_marker(number, 7),
            line={"color": _pick(COLORS, number), "dash": "dash" if label in dashed else "solid"},
            error_y=_error(part, y, *interval) if interval else None,
        )
    if log_x:
        fig.update_xaxes(type="log", tickvals=sorted(set(table[x])))
    if log_y:
        fig.update_yaxes(type="log")
    fig.update_yaxes(range=y_range)
    if reference is not None:
        fig.add_hline(y=reference, line_dash="dash", line_color=GREY)
    return _finish(fig, title, xlabel, ylabel)


def bars_figure(
    table: pd.DataFrame, *, x: str, y: str, color: str, title: str, xlabel: str, ylabel: str
) -> go.Figure:
    """Draw bars of height `y` at `x`, side by side for the values of `color`."""
    fig = go.Figure()
    for number, (label, part) in enumerate(_series(table, color)):
        pattern = {"shape": _pick(PATTERNS, number)}
        marker = {"color": _pick(COLORS, number), "pattern": pattern}
        name = plotly_text(label)
        fig.add_bar(x=list(part[x]), y=list(part[y]), name=name, marker=marker)
    return _finish(fig, title, xlabel, ylabel)


def matrix_figure(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Draw what was trained on (rows) against what was tested on (columns) as a heat map.

    Each cell shows its estimate, interval and number of rows, from the columns `trained_on`,
    `tested_on`, `estimate`, `low`, `high` and `n`. White is one half, which is chance.
    """
    texts = [
        f"{cell.estimate:.2f}<br>[{cell.low:.2f}, {cell.high:.2f}]<br>n = {cell.n}"
        for cell in table.itertuples()
    ]
    # A heat map begins at the bottom.
    rows = list(dict.fromkeys(table.trained_on))[::-1]
    columns = list(dict.fromkeys(table.tested_on))
    cells = table.assign(text=texts).pivot(index="trained_on", columns="tested_on").loc[rows]
    fig = go.Figure()
    fig.add_heatmap(
        x=[plotly_text(str(name)) for name in columns],
        y=[plotly_text(str(name)) for name in rows],
        z=cells["estimate"][columns].to_numpy().tolist(),
        text=cells["text"][columns].fillna("").to_numpy().tolist(),
        texttemplate="%{text}",
        zmin=0,
        zmax=1,
        colorscale="RdBu",
        hoverinfo="skip",
        showscale=False,
    )
    # Plotly would take names that look like numbers or dates for places on a scale.
    fig.update_xaxes(type="category")
    fig.update_yaxes(type="category")
    return _finish(fig, title, "tested on", "trained on", 170 + 70 * len(rows))


def tokens_figure(track: pd.DataFrame, *, title: str) -> go.Figure:
    """Draw a probe's score at each token of a prompt and of the answer that follows.

    `track` has the columns `place` (0 is where the answer begins, which is dashed), `token` and
    `score`.
    """
    fig = lines_figure(
        track,
        x="place",
        y="score",
        title=title,
        xlabel="token",
        ylabel="belief (above 0: the claim is true)",
        reference=0,
    )
    fig.add_vline(x=0, line_dash="dash", line_color=GREY)
    words = [plotly_text(token.replace("\n", "\\n")) for token in track.token]
    return fig.update_xaxes(
        tickvals=list(track.place), ticktext=words, tickangle=-60, zeroline=False
    )


def _series(table: pd.DataFrame, color: str | None) -> list[tuple[str, pd.DataFrame]]:
    """The parts of a table that are drawn alike, each with its name, as they come."""
    if color is None:
        return [("", table)]
    return [(str(value), part) for value, part in table.groupby(color, sort=False)]


def _pick(choices: Sequence[str], number: int) -> str:
    return choices[number % len(choices)]


def _marker(number: int, size: int) -> dict:
    return {"size": size, "color": _pick(COLORS, number), "symbol": _pick(MARKERS, number)}


def _error(table: pd.DataFrame, value: str, low: str, high: str) -> dict:
    return {
        "type": "data",
        "symmetric": False,
        "array": list(table[high] - table[value]),
        "arrayminus": list(table[value] - table[low]),
        "thickness": 1.2,
        "width": 3,
    }


def _finish(fig: go.Figure, title: str, xlabel: str, ylabel: str, height: int = 420) -> go.Figure:
    """Set title, axes and size, and put a legend below the plot if there is more than one series.

    Beside the plot it would leave a phone no room for the points.
    """
    title = plotly_text(title, 80)
    top = 30 + 20 * (1 + title.count("<br>"))
    names = [html.unescape(trace.name or "") for trace in fig.data]
    fig.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 15}},
        margin={"l": 60, "r": 20, "t": top, "b": 60},
        height=height,
        showlegend=len(names) > 1,
    )
    if len(names) > 1:
        # How many lines of the page the legend takes, of about 90 characters.
        below = 24 * (1 + sum(len(name) + 6 for name in names) // 90)
        legend = {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"}
        fig.update_layout(height=height + below, margin_b=60 + below, legend=legend)
    fig.update_xaxes(title_text=plotly_text(xlabel))
    return fig.update_yaxes(title_text=plotly_text(ylabel), automargin=True)
