"""Still pictures of plotly figures, drawn by matplotlib, so that no browser is needed.

They show what `lab.figures` makes: points, lines, bars, error bars, and heat maps. Of a figure with
a menu or a slider they show what is chosen first.
"""

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlk_utils.errors import ParameterError

GREY = "#6b6b6b"
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "x": "X"}
DASHES = {
    "solid": "-",
    "dash": "--",
    "dot": ":",
    "dashdot": "-.",
    "longdash": (0, (8, 3)),
    "longdashdot": (0, (8, 3, 2, 3)),
}
PAGE_WIDTH = 692
"""Pixels that a plot has in the book, by which its height is scaled."""


def draw_png(fig: dict, *, width: float = 5.0, dpi: int = 140) -> bytes:
    """Draw what plotly's ``Figure.to_dict`` returns as a PNG; the same figure gives the same bytes.

    Parameters
    ----------
    fig
        The dictionary. The height goes by its layout.
    width, dpi
        Inches, and dots per inch. They make the letters large enough for a phone.

    Raises
    ------
    ParameterError
        If a trace is not a scatter, bar or heat map.
    """
    # Imported here, for it takes half a second that a notebook need not wait for at its start.
    import matplotlib

    # All text is taken literally: with dollar signs in it, matplotlib would read formulas.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        return _draw(fig, width, dpi)


def _draw(fig: dict, width: float, dpi: int) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = fig.get("layout", {})
    size = (width, width * layout.get("height", 420) / PAGE_WIDTH)
    picture = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    bars = {}
    # The texts of a heat map are drawn with it.
    traces = [
        trace
        for trace in fig["data"]
        if trace.get("visible", True) is True and trace.get("mode") != "text"
    ]
    for number, trace in enumerate(traces):
        if trace["type"] == "scatter":
            _draw_scatter(axes, trace, str(number))
        elif trace["type"] == "heatmap":
            _draw_heatmap(axes, trace)
        elif trace["type"] == "bar":
            bars[str(number)] = trace
        else:
            raise ParameterError(
                f"static picture: expected scatter, bar or heatmap traces, got {trace['type']!r}"
            )
    _draw_bars(axes, bars)
    for shape in layout.get("shapes", []):
        _draw_dashed_line(axes, shape)
    for note in layout.get("annotations", []):
        _draw_row_name(axes, note)
    title = _lines(layout.get("title", {}).get("text", ""))
    if title:
        axes.set_title(title, fontsize=9, loc="left")
    _set_axis(axes, "x", layout.get("xaxis", {}))
    _set_axis(axes, "y", layout.get("yaxis", {}))
    axes.tick_params(labelsize=7)
    if len(traces) > 1:
        _draw_legend(picture, axes, traces)
    png = io.BytesIO()
    # Without the version of matplotlib, the same figure has the same bytes.
    # The page shows through: it may be dark.
    picture.savefig(png, format="png", metadata={"Software": None}, transparent=True)
    return png.getvalue()


def _draw_dashed_line(axes: Any, shape: dict) -> None:
    """Draw a line across the plot, or from one point of it to another."""
    style = {"color": GREY, "linestyle": "--", "linewidth": 0.8}
    if "domain" in shape.get("yref", ""):
        axes.axvline(shape["x0"], **style)
    elif "domain" in shape.get("xref", ""):
        axes.axhline(shape["y0"], **style)
    else:
        axes.plot([shape["x0"], shape["x1"]], [shape["y0"], shape["y1"]], label="_", **style)


def _draw_row_name(axes: Any, note: dict) -> None:
    """Write the name of a row at the left edge of the plot."""
    axes.text(
        *(note["x"], note["y"], _lines(note["text"])),
        transform=axes.get_yaxis_transform(),
        va="top",
        fontsize=7,
    )


def _draw_legend(picture: Any, axes: Any, traces: Sequence[dict]) -> None:
    """Draw a legend below the plot."""
    names = [_lines(trace.get("name") or "") for trace in traces]
    # The artists are labelled by the number of their trace: matplotlib would leave out a name that
    # begins with an underscore.
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    labels = [str(number) for number in range(len(traces))]
    legend = picture.legend(
        [by_label[label] for label in labels],
        labels,
        loc="outside lower left",
        ncols=max(1, 70 // max(len(name) + 6 for name in names)),
        fontsize=7,
        frameon=False,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _draw_scatter(axes: Any, trace: dict, label: str) -> None:
    marker, line = trace.get("marker", {}), trace.get("line", {})
    has_markers, has_line = "markers" in trace["mode"], "lines" in trace["mode"]
    symbol, color = marker.get("symbol", "circle"), line.get("color") or marker.get("color")
    axes.errorbar(
        list(trace["x"]),
        list(trace["y"]),
        xerr=_error(trace.get("error_x")),
        yerr=_error(trace.get("error_y")),
        label=label,
        color=color,
        marker=MARKERS[symbol.removesuffix("-open")] if has_markers else "",
        markerfacecolor="none" if symbol.endswith("-open") else color,
        linestyle=DASHES[line.get("dash", "solid")] if has_line else "",
        markersize=marker.get("size", 7) / 2,
        linewidth=line.get("width", 2) / 2,
        elinewidth=0.8,
        capsize=1.5,
    )


def _error(error: dict | None) -> list[np.ndarray] | None:
    return [np.abs(error["arrayminus"]), np.abs(error["array"])] if error else None


def _draw_bars(axes: Any, bars: Mapping[str, dict]) -> None:
    """Draw bars, by their label, side by side at the numbers where they stand."""
    values = sorted({x for trace in bars.values() for x in trace["x"]})
    width = 0.8 * min(np.diff(values), default=1) / max(1, len(bars))
    for number, (label, trace) in enumerate(bars.items()):
        marker = trace.get("marker", {})
        axes.bar(
            np.array(trace["x"]) + (number - (len(bars) - 1) / 2) * width,
            list(trace["y"]),
            width=width,
            label=label,
            color=marker.get("color"),
            hatch=2 * marker.get("pattern", {}).get("shape", ""),
            edgecolor="white",
            linewidth=0,
        )


def _draw_heatmap(axes: Any, trace: dict) -> None:
    values, low, high = np.array(trace["z"], float), trace["zmin"], trace["zmax"]
    axes.imshow(values, cmap="RdBu", vmin=low, vmax=high, aspect="auto", origin="lower")
    for i, row in enumerate(trace.get("text") or ()):
        for j, text in enumerate(row):
            # Both ends of the colour map are dark.
            color = (
                "white" if abs(values[i, j] - (low + high) / 2) > 0.35 * (high - low) else "black"
            )
            axes.text(j, i, _lines(text), ha="center", va="center", color=color, fontsize=6)


def _set_axis(axes: Any, name: str, axis: dict) -> None:
    """Set label, scale, range and ticks of the axis ``"x"`` or ``"y"``."""
    from matplotlib.ticker import LogFormatter

    options = {f"{name}label": _lines(axis.get("title", {}).get("text", ""))}
    if axis.get("range"):
        options[f"{name}lim"] = axis["range"]
    if axis.get("type") == "log":
        options[f"{name}scale"] = "log"
    axes.set(**options)
    lines = getattr(axes, f"{name}axis")
    lines.label.set_size(8)
    if axis.get("type") == "log":
        # By default these numbers are formulas.
        lines.set_major_formatter("{x:g}")
        lines.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    if axis.get("tickvals") is not None:
        words = axis.get("ticktext") or [f"{value:g}" for value in axis["tickvals"]]
        is_crowded = name == "x" and sum(map(len, words)) > 60
        is_turned = axis.get("tickangle") or is_crowded
        turned = {"rotation": 60, "ha": "right"} if is_turned else {}
        set_ticks = axes.set_xticks if name == "x" else axes.set_yticks
        set_ticks(list(axis["tickvals"]), [_lines(word) for word in words], **turned)
        axes.minorticks_off()


def _lines(text: str) -> str:
    """Turn plotly's line breaks and entities into characters."""
    return html.unescape(text.replace("<br>", "\n"))
