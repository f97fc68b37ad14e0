"""Still pictures of plotly figures, drawn by matplotlib, so that no browser is needed.

They show what `lab.figures` makes: points, lines, bars, error bars, and a heat map with text.
"""

import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlk_utils.errors import ParameterError

GREY = "#888"
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "x": "X"}
DASHES = {"solid": "-", "dash": "--", "dot": ":"}


def draw_png(fig: dict, *, width: float = 7.2, dpi: int = 80) -> bytes:
    """Draw what plotly's ``Figure.to_dict`` returns as a PNG; the same figure gives the same bytes.

    Parameters
    ----------
    fig
        The dictionary. The height goes by its layout.
    width, dpi
        Inches, and dots per inch.

    Raises
    ------
    ParameterError
        If a trace is not a scatter, bar or heat map.
    """
    # Imported here, for it takes half a second that a notebook need not wait for at its start.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = fig.get("layout", {})
    size = (width, layout.get("height", 420) / 100)
    picture = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    bars = [trace for trace in fig["data"] if trace["type"] == "bar"]
    for trace in fig["data"]:
        if trace["type"] == "scatter":
            _draw_scatter(axes, trace)
        elif trace["type"] == "heatmap":
            _draw_heatmap(axes, trace)
        elif trace["type"] != "bar":
            raise ParameterError(
                f"static picture: expected scatter, bar or heatmap traces, got {trace['type']!r}"
            )
    _draw_bars(axes, bars)
    for shape in layout.get("shapes", []):
        is_upright = shape["x0"] == shape["x1"]
        draw = axes.axvline if is_upright else axes.axhline
        draw(shape["x0"] if is_upright else shape["y0"], color=GREY, linestyle="--", linewidth=0.8)
    title = _lines(layout.get("title", {}).get("text", ""))
    axes.set_title(title, fontsize=9, loc="left")
    _set_axis(axes, "x", layout.get("xaxis", {}))
    _set_axis(axes, "y", layout.get("yaxis", {}))
    axes.tick_params(labelsize=7)
    if len(fig["data"]) > 1:
        n_columns = max(1, 90 // max(len(trace.get("name") or "") + 6 for trace in fig["data"]))
        picture.legend(loc="outside lower left", ncols=n_columns, fontsize=7, frameon=False)
    png = io.BytesIO()
    # Without the version of matplotlib, the same figure has the same bytes.
    picture.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _draw_scatter(axes: Any, trace: dict) -> None:
    marker, line = trace.get("marker", {}), trace.get("line", {})
    has_markers, has_line = "markers" in trace["mode"], "lines" in trace["mode"]
    axes.errorbar(
        list(trace["x"]),
        list(trace["y"]),
        xerr=_error(trace.get("error_x")),
        yerr=_error(trace.get("error_y")),
        label=trace.get("name"),
        color=line.get("color") or marker.get("color"),
        marker=MARKERS[marker.get("symbol", "circle")] if has_markers else "",
        linestyle=DASHES[line.get("dash", "solid")] if has_line else "",
        markersize=4,
        linewidth=1,
        elinewidth=0.8,
        capsize=1.5,
    )


def _error(error: dict | None) -> list[np.ndarray] | None:
    return [np.abs(error["arrayminus"]), np.abs(error["array"])] if error else None


def _draw_bars(axes: Any, bars: Sequence[dict]) -> None:
    """Draw bars side by side at the numbers where they stand."""
    values = sorted({x for trace in bars for x in trace["x"]})
    width = 0.8 * min(np.diff(values), default=1) / max(1, len(bars))
    for number, trace in enumerate(bars):
        marker = trace.get("marker", {})
        axes.bar(
            np.array(trace["x"]) + (number - (len(bars) - 1) / 2) * width,
            list(trace["y"]),
            width=width,
            label=trace.get("name"),
            color=marker.get("color"),
            hatch=2 * marker.get("pattern", {}).get("shape", ""),
            edgecolor="white",
            linewidth=0,
        )


def _draw_heatmap(axes: Any, trace: dict) -> None:
    values, low, high = np.array(trace["z"], float), trace["zmin"], trace["zmax"]
    axes.imshow(values, cmap="RdBu", vmin=low, vmax=high, aspect="auto", origin="lower")
    axes.set_xticks(range(len(trace["x"])), trace["x"], rotation=30, ha="right")
    axes.set_yticks(range(len(trace["y"])), trace["y"])
    for i, row in enumerate(trace["text"]):
        for j, text in enumerate(row):
            # Both ends of the colour map are dark.
            color = (
                "white" if abs(values[i, j] - (low + high) / 2) > 0.35 * (high - low) else "black"
            )
            axes.text(j, i, _lines(text), ha="center", va="center", color=color, fontsize=7)


def _set_axis(axes: Any, name: str, axis: dict) -> None:
    """Set label, scale, range and ticks of the axis ``"x"`` or ``"y"``."""
    options = {f"{name}label": axis.get("title", {}).get("text", "")}
    if axis.get("range"):
        options[f"{name}lim"] = axis["range"]
    if axis.get("type") == "log":
        options[f"{name}scale"] = "log"
    axes.set(**options)
    getattr(axes, f"{name}axis").label.set_size(8)
    if axis.get("tickvals") is not None:
        words = axis.get("ticktext") or [f"{value:g}" for value in axis["tickvals"]]
        turned = {"rotation": 60, "ha": "right"} if axis.get("tickangle") else {}
        set_ticks = axes.set_xticks if name == "x" else axes.set_yticks
        set_ticks(list(axis["tickvals"]), [_lines(word) for word in words], **turned)
        axes.minorticks_off()


def _lines(text: str) -> str:
    """Turn plotly's line breaks and entities into characters; a dollar begins no formula."""
    return html.unescape(text.replace("<br>", "\n")).replace("$", r"\$")
