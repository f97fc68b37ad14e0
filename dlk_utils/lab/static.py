"""A still picture of a simple plotly figure (lines, points, bars, error bars, a heat map with text), drawn by matplotlib: needs no browser."""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_png(fig: dict, *, width: float = 7.2, dpi: int = 80) -> bytes:
    """PNG bytes of a figure's dictionary. Raises `ValueError` for a trace of another kind."""
    layout = fig.get("layout", {})
    picture = Figure(
        figsize=(width, layout.get("height", 420) / 100), dpi=dpi, layout="constrained"
    )
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    order = list(layout.get("yaxis", {}).get("categoryarray") or [])
    if order:
        axes.plot([np.nan] * len(order), order)  # fixes the order of the categories
    bars = [t for t in fig["data"] if t["type"] == "bar"]
    for trace in fig["data"]:
        _draw(axes, trace, bars)
    for shape in layout.get("shapes", []):
        upright = shape["x0"] == shape["x1"]
        (axes.axvline if upright else axes.axhline)(
            shape["x0"] if upright else shape["y0"], color="#888", linestyle="--", linewidth=0.8
        )
    axes.set_title(
        layout.get("title", {}).get("text", "").replace("<br>", "\n"), fontsize=9, wrap=True
    )
    axes.set_xlabel(layout.get("xaxis", {}).get("title", {}).get("text", ""), fontsize=8)
    axes.set_ylabel(layout.get("yaxis", {}).get("title", {}).get("text", ""), fontsize=8)
    axes.set_yscale(layout.get("yaxis", {}).get("type", "linear"))
    if layout.get("xaxis", {}).get("type") == "log":
        axes.set_xscale("log")
        axes.set_xticks(ticks := layout["xaxis"].get("tickvals", []), [str(t) for t in ticks])
    if words := layout.get("xaxis", {}).get("ticktext"):
        axes.set_xticks(
            layout["xaxis"]["tickvals"],
            [w.replace("$", r"\$") for w in words],
            rotation=60,
            ha="right",
        )
    axes.tick_params(labelsize=7)
    if len(fig["data"]) > 1:
        axes.legend(fontsize=7)
    out = io.BytesIO()
    picture.savefig(
        out, format="png", metadata={"Software": None}
    )  # no date, no version: the same figure, the same bytes
    return out.getvalue()


def _draw(axes, trace: dict, bars: list[dict]) -> None:
    if trace["type"] == "heatmap":
        axes.imshow(
            np.array(trace["z"], float),
            vmin=trace["zmin"],
            vmax=trace["zmax"],
            cmap="RdBu",
            aspect="auto",
            origin="lower",
        )
        axes.set_xticks(range(len(trace["x"])), trace["x"], rotation=30, ha="right")
        axes.set_yticks(range(len(trace["y"])), trace["y"])
        for i, row in enumerate(trace["text"]):
            for j, text in enumerate(row):
                axes.text(j, i, text.replace("<br>", "\n"), ha="center", va="center", fontsize=6)
        return
    if trace["type"] not in ("bar", "scatter"):
        raise ValueError(
            f"static picture: expected scatter, bar or heatmap traces, got {trace['type']!r}"
        )
    x, y, name = list(trace["x"]), list(trace["y"]), trace.get("name")
    colour = trace.get("line", {}).get("color") or trace.get("marker", {}).get("color")
    if trace["type"] == "bar":
        place = (
            np.arange(len(x)) + bars.index(trace) * 0.8 / len(bars) if isinstance(x[0], str) else x
        )
        axes.bar(
            place,
            y,
            width=0.8 / len(bars) if isinstance(x[0], str) else 0.9 * _step(x),
            label=name,
            color=colour,
            alpha=0.8,
        )
        if isinstance(x[0], str):
            axes.set_xticks(np.arange(len(x)) + 0.4 - 0.4 / len(bars), x)
    else:
        error = {
            k: [np.abs(e["arrayminus"]), np.abs(e["array"])]
            for k, e in (("xerr", trace.get("error_x")), ("yerr", trace.get("error_y")))
            if e
        }
        style = ("o" if "markers" in trace["mode"] else "") + (
            {"dot": ":", "dash": "--"}.get(trace.get("line", {}).get("dash"), "-")
            if "lines" in trace["mode"]
            else ""
        )
        axes.errorbar(
            x,
            y,
            fmt=style,
            label=name,
            color=colour,
            markersize=4,
            linewidth=1,
            elinewidth=0.7,
            **error,
        )


def _step(x: list) -> float:
    return float(np.min(np.diff(sorted(set(x))))) if len(set(x)) > 1 else 1.0
