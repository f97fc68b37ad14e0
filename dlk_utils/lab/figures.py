"""Plotly figures of finished tables, each by a builder of its kind.

They never compute. A figure shows in JupyterLab, in the book without internet, and as a still
picture where no scripts run. It can be read on a phone: in the book its title is text of the page,
and the names of rows stand above their points. Titles, names and cells of the table are plain text:
the builders escape them, so that plotly reads no markup in them.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import HTML, display
from plotly.io.base_renderers import PlotlyRenderer

from dlk_utils.lab.escaping import html_text, plotly_text
from dlk_utils.lab.static import draw_png

# Series differ by colour and by marker, dash or pattern, so that they can be told apart in grey.
# Each colour has a contrast of 4.5 or more on white, and in the dark theme of the book, whose style
# sheet turns the lightness of figures round.
COLORS = ("#2f66b0", "#b84a14", "#2e7a45", "#7b4b9a", "#8a6a00", "#55616c", "#b0357a", "#157580")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
DASHES = ("solid", "dot", "dashdot", "longdash", "longdashdot")
PATTERNS = ("", "/", ".", "x")
GREY = "#6b6b6b"
CLEAR = "rgba(0,0,0,0)"
# A dollar sign is a dollar sign, also where MathJax is there.
CONFIG = {"displayModeBar": False, "typesetMath": False, "responsive": True}
MOST_TICKS = 9
"""With so few whole numbers on the horizontal axis, each has a tick."""
MOST_MARKERS = 32
"""A line of more points has no markers."""
NARROW = 48
"""Characters of a line that fits on a phone."""
IN_MENU = 34
"""Characters of a menu that fits beside an axis on a phone."""
MENU_HEIGHT = 40
SLIDER_HEIGHT = 75
"""Pixels that the controls take above a plot."""
Number = int | float


def mime_bundle(fig: go.Figure) -> dict[str, Any]:
    """Return a figure in every form that a notebook shows it in, by MIME type.

    These are JupyterLab's own type of plotly, and ``text/html`` for the book. The HTML uses the
    book's one copy of plotly.js, and holds a still picture for readers without scripts. A picture
    by itself (``image/png``) is left out: JupyterLab would show it instead, until one points at it.
    The id of the figure is a hash of its content, so running a notebook again changes nothing.
    """
    fig_dict = fig.to_dict()
    content = json.dumps(fig_dict, sort_keys=True, default=str)
    figure_id = f"figure-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    page = {"text/html": _figure_html(fig_dict, figure_id)}
    return PlotlyRenderer(config=CONFIG).to_mimebundle(fig_dict) | page


def _figure_html(fig_dict: dict[str, Any], figure_id: str) -> str:
    """Write a figure for the book, with its title as a caption that no narrow page cuts off."""
    layout = dict(fig_dict.get("layout", {}))
    caption = html_text(_plain_text(layout.get("title", {}).get("text", "")))
    controls_height = MENU_HEIGHT if layout.get("updatemenus") else 0
    controls_height += SLIDER_HEIGHT if layout.get("sliders") else 0
    layout.pop("title", None)
    layout["margin"] = {**layout.get("margin", {}), "t": 20 + controls_height}
    untitled = {**fig_dict, "layout": layout}
    live = pio.to_html(
        untitled,
        include_plotlyjs=False,
        include_mathjax=False,
        full_html=False,
        validate=False,
        config=CONFIG,
        div_id=figure_id,
    )
    png = base64.b64encode(draw_png(untitled)).decode()
    alternative = html_text(text_alternative(fig_dict))
    plot_class = "plot wide" if layout.get("width") else "plot"
    # What is inside of a picture cannot be operated.
    role = "group" if controls_height else "img"
    return (
        f'<figure class="live-figure"><figcaption>{caption}</figcaption>'
        f'<div class="{plot_class}" role="{role}" aria-label="{alternative}">{live}</div>'
        # Without scripts the plot would be an empty box.
        "<noscript><style>.live-figure .plot {display: none}</style>"
        f'<img class="still-figure" alt="{alternative}" src="data:image/png;base64,{png}">'
        "</noscript></figure>"
    )


def text_alternative(fig_dict: dict[str, Any]) -> str:
    """Say in words what a figure shows: its title, axes, and the names of its series or rows."""
    layout = fig_dict.get("layout", {})
    sentences = [_plain_text(layout.get("title", {}).get("text", "")) or "Figure"]
    for name, side in (("xaxis", "Horizontal"), ("yaxis", "Vertical")):
        label = _plain_text(layout.get(name, {}).get("title", {}).get("text", ""))
        if label:
            sentences.append(f"{side} axis: {label}")
    # Every choice of a menu has traces of the same names.
    names = dict.fromkeys(_plain_text(trace.get("name") or "") for trace in fig_dict["data"])
    if any(names):
        sentences.append(f"Series: {', '.join(names)}")
    rows = [_plain_text(note.get("text") or "") for note in layout.get("annotations", ())]
    if rows:
        sentences.append(f"Rows: {', '.join(rows)}")
    choices = [button for menu in layout.get("updatemenus", ()) for button in menu["buttons"]]
    choices += [step for slider in layout.get("sliders", ()) for step in slider["steps"]]
    if choices:
        labels = [_plain_text(choice["label"]) for choice in choices]
        sentences.append(f"To choose from: {', '.join(labels)}")
    return ". ".join(sentences)


def _plain_text(text: str) -> str:
    return html.unescape(text.replace("<br>", " "))


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
        Where to draw a dashed vertical line. It leaves out the names of the rows.
    x_range, height
        Ends of the axis, and pixels; None goes by the points.
    order
        Names of the rows from top to bottom; None takes them as they come.
    """
    names = list(dict.fromkeys(table[y])) if order is None else list(order)
    labels = [plotly_text(str(name), NARROW) for name in names]
    series = _series(table, color)
    in_row = {name: [label for label, part in series if name in set(part[y])] for name in names}
    # Each row has its name at the top, and below it a line for each of its points.
    name_height = 18 * max((1 + label.count("<br>") for label in labels), default=1)
    row_height = name_height + 6 + 14 * max(map(len, in_row.values()), default=0)
    name_share = name_height / row_height
    low, high = (f"{x}_{end}" if f"{x}_{end}" in table else end for end in ("low", "high"))
    fig = go.Figure()
    for number, (label, part) in enumerate(series):
        places = []
        for name in part[y]:
            share = (in_row[name].index(label) + 0.5) / len(in_row[name])
            places.append(names.index(name) - 0.5 + name_share + (1 - name_share) * share)
        fig.add_scatter(
            x=list(part[x]),
            y=places,
            name=plotly_text(label, NARROW),
            text=[plotly_text(str(name)) for name in part[y]],
            hoverinfo="text+x+name",
            mode="markers",
            marker=_marker(number, 8),
            error_x=_error(part, x, low, high),
        )
    for place, label in enumerate(labels):
        fig.add_annotation(
            text=label,
            x=0,
            xref="paper",
            xanchor="left",
            y=place - 0.5,
            yanchor="top",
            align="left",
            showarrow=False,
        )
    fig.update_xaxes(range=_with_room(x_range))
    fig.update_yaxes(
        # The lines of the grid lie between the rows.
        tickvals=[place - 0.5 for place in range(len(names) + 1)],
        ticktext=[""] * (len(names) + 1),
        range=[len(names) - 0.5, -0.5],
        zeroline=False,
    )
    if reference is not None:
        # Beside the points of each row, but not through its name.
        for place in range(len(names)):
            fig.add_shape(
                type="line",
                x0=reference,
                x1=reference,
                y0=place - 0.5 + name_share,
                y1=place + 0.5,
                line={"dash": "dash", "color": GREY},
            )
    return _finish(fig, title, xlabel, ylabel, height or 150 + row_height * len(names))


def _with_room(ends: tuple[Number, Number] | None) -> tuple[Number, Number] | None:
    """Widen the range of an axis a little, so that marks at its ends are not cut in half."""
    if ends is None:
        return None
    low, high = ends
    room = 0.02 * (high - low)
    return low - room, high + room


def lines_figure(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    title: str,
    xlabel: str,
    ylabel: str,
    color: str | None = None,
    dash: str | None = None,
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
    dash
        Column that gives each of its values a dash. Then there is a line for each pair of a colour
        and a dash. None gives each colour its own dash.
    interval
        Columns of the ends of each point's vertical interval; NaN where a point has none.
    reference
        Where to draw a dashed horizontal line.
    log_x, log_y
        Whether an axis is logarithmic. On the horizontal one every value of `x` has a tick, as it
        has where there are a few whole numbers.
    y_range
        Ends of the vertical axis; None goes by the points.
    dashed
        Values of `color` that are drawn as dashed lines, such as controls.
    points
        Values of `color` that are drawn as points, without a line.
    """
    fig = go.Figure()
    for number, (label, part) in enumerate(_series(table, color)):
        lines = [(label, _pick(DASHES, number), part)]
        if dash is not None:
            of_dash = enumerate(_series(part, dash))
            lines = [(f"{label}, {name}", _pick(DASHES, n), rows) for n, (name, rows) in of_dash]
        for name, dash_style, rows in lines:
            rows = rows.sort_values(x, kind="stable")
            # Later lines are thinner, so that one that lies over another hides nothing.
            width = max(1.5, 3.5 - 0.5 * number)
            style = "dash" if name in dashed else dash_style
            # Many markers would hide each other.
            mode = "lines+markers" if len(rows) <= MOST_MARKERS else "lines"
            fig.add_scatter(
                x=list(rows[x]),
                y=list(rows[y]),
                name=plotly_text(name, NARROW),
                mode="markers" if name in points else mode,
                marker=_marker(number, max(6, 11 - 2 * number)),
                line={"color": _pick(COLORS, number), "dash": style, "width": width},
                error_y=_error(rows, y, *interval) if interval else None,
            )
    places = sorted(set(table[x]))
    if log_x:
        fig.update_xaxes(type="log", tickvals=places)
    elif len(places) <= MOST_TICKS and all(float(place).is_integer() for place in places):
        fig.update_xaxes(tickvals=places)
    if log_y:
        fig.update_yaxes(type="log")
    fig.update_yaxes(range=_with_room(y_range))
    if reference is not None:
        fig.add_hline(y=reference, line_dash="dash", line_color=GREY)
    return _finish(fig, title, xlabel, ylabel)


def scatter_figure(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    color: str,
    title: str,
    xlabel: str,
    ylabel: str,
    fill: str | None = None,
    hollow: str = "",
    hover: str | None = None,
) -> go.Figure:
    """Draw a point for each row of a table, with a colour and a marker for each value of `color`.

    Parameters
    ----------
    fill
        Column of two values, one of which is drawn `hollow`.
    hollow
        The value of `fill` whose points are hollow.
    hover
        Column of what a pointer on the point shows.
    """
    fig = go.Figure()
    for number, (label, part) in enumerate(_series(table, color)):
        series = [(label, False, part)]
        if fill is not None:
            by_fill = sorted(part.groupby(fill), reverse=True, key=_name_of_group)
            series = [(f"{label}, {name}", name == hollow, rows) for name, rows in by_fill]
        for name, is_hollow, rows in series:
            marker = _marker(number, 8)
            if is_hollow:
                marker |= {"symbol": f"{marker['symbol']}-open", "line": {"width": 1.5}}
            else:
                # The edge keeps points apart that lie over each other.
                marker |= {"line": {"width": 0.7, "color": "#ffffff"}}
            texts = [plotly_text(str(text), NARROW) for text in rows[hover]] if hover else None
            fig.add_scatter(
                x=list(rows[x]),
                y=list(rows[y]),
                name=plotly_text(name, NARROW),
                text=texts,
                hoverinfo="text" if hover else "x+y+name",
                mode="markers",
                marker=marker,
            )
    return _finish(fig, title, xlabel, ylabel)


def bars_figure(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    color: str,
    title: str,
    xlabel: str,
    ylabel: str,
    reference: Number | None = None,
) -> go.Figure:
    """Draw bars of height `y` at `x`, side by side for the values of `color`.

    `reference` is where to draw a dashed vertical line.
    """
    fig = go.Figure()
    for number, (label, part) in enumerate(_series(table, color)):
        pattern = {"shape": _pick(PATTERNS, number)}
        marker = {"color": _pick(COLORS, number), "pattern": pattern}
        name = plotly_text(label, NARROW)
        fig.add_bar(x=list(part[x]), y=list(part[y]), name=name, marker=marker)
    if reference is not None:
        fig.add_vline(x=reference, line_dash="dash", line_color=GREY)
        # With few ticks plotly takes round numbers, not the middle of each bar.
        fig.update_xaxes(nticks=7)
    return _finish(fig, title, xlabel, ylabel)


def matrix_figure(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Draw what was trained on (rows) against what was tested on (columns) as a heat map.

    Each cell shows its estimate, interval and number of rows, from the columns `trained_on`,
    `tested_on`, `estimate`, `low`, `high` and `n`. White is one half, which is chance.
    """
    # A heat map begins at the bottom.
    rows = list(dict.fromkeys(table.trained_on))[::-1]
    columns = list(dict.fromkeys(table.tested_on))
    complete = [
        f"{cell.estimate:.2f}<br>[{cell.low:.2f}, {cell.high:.2f}]<br>n = {cell.n}"
        for cell in table.itertuples()
    ]
    # On a phone, more columns leave room for one number.
    is_wide = len(columns) > 4
    short = [f"{estimate:.2f}" for estimate in table.estimate]
    cells = table.assign(complete=complete, text=short if is_wide else complete)
    cells = cells.pivot(index="trained_on", columns="tested_on").loc[rows]
    fig = go.Figure()
    fig.add_heatmap(
        x=list(range(len(columns))),
        y=list(range(len(rows))),
        z=cells["estimate"][columns].to_numpy().tolist(),
        # Shown in the static picture only; below, each text has a colour of its own.
        text=cells["text"][columns].fillna("").to_numpy().tolist(),
        hovertext=cells["complete"][columns].fillna("").to_numpy().tolist(),
        zmin=0,
        zmax=1,
        colorscale="RdBu",
        hoverinfo="text" if is_wide else "skip",
        showscale=False,
    )
    present = cells["text"][columns].stack().dropna()
    estimates = cells["estimate"][columns].stack()[present.index]
    fig.add_scatter(
        x=[columns.index(column) for _, column in present.index],
        y=[rows.index(row) for row, _ in present.index],
        text=list(present),
        mode="text",
        # Black or white, whichever is easier to read on the colour of the cell.
        textfont={"color": ["white" if abs(e - 0.5) > 0.36 else "black" for e in estimates]},
        hoverinfo="skip",
        showlegend=False,
    )
    for names, update in ((columns, fig.update_xaxes), (rows, fig.update_yaxes)):
        words = [plotly_text(str(name), 18) for name in names]
        update(tickvals=list(range(len(names))), ticktext=words, showgrid=False, zeroline=False)
    row_height = 44 if is_wide else 70
    return _finish(fig, title, "tested on", "trained on", 190 + row_height * len(rows))


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
    fig.update_xaxes(tickvals=list(track.place), ticktext=words, tickangle=-60, zeroline=False)
    least_width = 60 + 14 * len(track)
    # A long prompt is wider than the page, and scrolls in its box.
    return fig.update_layout(width=least_width if least_width > 660 else None)


def belief_figure(beliefs: pd.DataFrame, *, title: str) -> go.Figure:
    """Draw what a probe of each layer reads at each token of a prompt, as a heat map.

    `beliefs` has a row for each token and layer, with the columns `place` of the token, `token`,
    `layer` and `score`. White is 0. Above it (blue) the claim is taken to be true.
    """
    scores = beliefs.pivot(index="layer", columns="place", values="score")
    tokens = beliefs.drop_duplicates("place").sort_values("place").token
    words = [plotly_text(token.replace("\n", "\\n")) for token in tokens]
    limit = max(1.0, float(beliefs.score.abs().quantile(0.98)))
    hover = [
        [f"{word}, layer {layer}: {score:+.1f}" for word, score in zip(words, row, strict=True)]
        for layer, row in zip(scores.index, scores.to_numpy(), strict=True)
    ]
    fig = go.Figure()
    fig.add_heatmap(
        x=list(range(len(words))),
        y=list(range(len(scores))),
        z=scores.to_numpy().tolist(),
        hovertext=hover,
        hoverinfo="text",
        zmin=-limit,
        zmax=limit,
        colorscale="RdBu",
        colorbar={"thickness": 10, "title": {"text": "belief", "font": {"size": 11}}},
    )
    layers = [str(layer) for layer in scores.index]
    fig = _finish(fig, title, "token", "layer", height=420)
    fig.update_yaxes(
        tickvals=list(range(len(layers))), ticktext=layers, showgrid=False, zeroline=False
    )
    fig.update_xaxes(
        tickvals=list(range(len(words))),
        ticktext=words,
        tickangle=-60,
        showgrid=False,
        zeroline=False,
    )
    least_width = 120 + 14 * len(words)
    return fig.update_layout(width=least_width if least_width > 660 else None)


def menu_figure(
    figures: Mapping[str, go.Figure], *, title: str, first: str | None = None
) -> go.Figure:
    """Join figures of one kind into one with a menu that shows one of them at a time.

    Parameters
    ----------
    figures
        The figures, by their name in the menu. Their own titles are left out.
    title
        The title of all of them.
    first
        The name of the figure that is shown first, and where no scripts run; None is the first one.
    """
    first = next(iter(figures)) if first is None else first
    joined, choices = _join(figures, first)
    menu = {"buttons": choices, "active": list(figures).index(first), "font": {"size": 12}}
    menu |= {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "bgcolor": "#ffffff"}
    joined.update_layout(showlegend=False, updatemenus=[menu])
    return _make_room(joined, title, MENU_HEIGHT)


def slider_figure(
    figures: Mapping[str, go.Figure], *, title: str, slides_over: str, first: str | None = None
) -> go.Figure:
    """Join figures of one kind, with the same series, into one with a slider over their names.

    The slider needs no server. The arguments are those of `menu_figure`; `slides_over` is the word
    that stands before the name of the figure that is shown, such as "layer".
    """
    first = next(iter(figures)) if first is None else first
    joined, steps = _join(figures, first)
    slider = {"steps": steps, "active": list(figures).index(first), "font": {"size": 12}}
    slider |= {"x": 0, "xanchor": "left", "len": 1, "y": 1.02, "yanchor": "bottom"}
    slider["pad"] = {"t": 0, "b": 0}
    slider["currentvalue"] = {"prefix": f"{plotly_text(slides_over)} ", "font": {"size": 13}}
    joined.update_layout(sliders=[slider])
    return _make_room(joined, title, SLIDER_HEIGHT)


def _join(figures: Mapping[str, go.Figure], first: str) -> tuple[go.Figure, list[dict]]:
    """Put the traces of figures into one, which shows those of the `first`.

    Also return, for each figure, the choice that shows its traces, its ticks, and the titles of its
    axes.
    """
    joined = go.Figure(layout=figures[first].layout)
    names = [name for name, fig in figures.items() for _ in fig.data]
    joined.add_traces([trace for fig in figures.values() for trace in fig.data])
    for trace, name in zip(joined.data, names, strict=True):
        trace.visible = name == first
    choices = []
    for name, fig in figures.items():
        axes = {
            f"{axis}.{key}": fig.layout[axis][key]
            for axis in ("xaxis", "yaxis")
            for key in ("tickvals", "ticktext", "title.text")
            if fig.layout[axis][key] is not None
        }
        visible = [other == name for other in names]
        label = plotly_text(name if len(name) <= IN_MENU else f"{name[: IN_MENU - 1]}…")
        choices.append({"label": label, "method": "update", "args": [{"visible": visible}, axes]})
    widths = [fig.layout.width for fig in figures.values() if fig.layout.width]
    joined.update_layout(width=max(widths, default=None))
    return joined, choices


def _make_room(fig: go.Figure, title: str, controls_height: int) -> go.Figure:
    """Set the title of a figure with controls, and make it higher by what these take."""
    title = plotly_text(title, 80)
    return fig.update_layout(
        title_text=title,
        margin_t=40 + controls_height + 20 * (1 + title.count("<br>")),
        height=fig.layout.height + controls_height + 10,
    )


def _series(table: pd.DataFrame, color: str | None) -> list[tuple[str, pd.DataFrame]]:
    """The parts of a table that are drawn alike, each with its name, as they come."""
    if color is None:
        return [("", table)]
    return [(str(value), part) for value, part in table.groupby(color, sort=False)]


def _name_of_group(group: tuple[str, pd.DataFrame]) -> str:
    return group[0]


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
    names = [_plain_text(trace.name or "") for trace in fig.data]
    fig.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 15}},
        margin={"l": 20, "r": 20, "t": top, "b": 60},
        height=height,
        showlegend=len(names) > 1,
    )
    if len(names) > 1:
        # How many lines of the page the legend takes, of about 90 characters.
        below = 24 * (1 + sum(len(name) + 6 for name in names) // 90)
        # Under the ticks and the label of the axis, in shares of the height of the plot.
        drop = 58 / max(1, height - top - 60)
        legend = {"orientation": "h", "x": 0, "y": -drop, "yanchor": "top", "bgcolor": CLEAR}
        fig.update_layout(height=height + below, margin_b=60 + below, legend=legend)
    fig.update_xaxes(title_text=plotly_text(xlabel, NARROW), automargin=True)
    # A plot is wider than high.
    return fig.update_yaxes(title_text=plotly_text(ylabel, 34), automargin=True)
