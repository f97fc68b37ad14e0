"""Write the book's page on speed from the tables that `make bench` keeps in `bench/results`.

The page holds the goals, one picture, and links to the tables.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from results import RESULTS

BOOK = Path(__file__).parent.parent / "book"
PEERS = ["nnsight", "transformer-lens", "lmprobe"]
COLUMNS = ["What", "Goal", "Measured", "Reached", "Possible"]

PICTURED = {"peers_plain": "no shots", "peers_one": "two shots"}
"""table -> the title of its panel in the picture."""

PAGE = """\
# How fast is it?

This page is for developers. `make bench` measures the ways of computing something against each
other, and writes this page. No number on it is typed.

## Goals

{goals}

*Possible* is the best value that could be measured if everything but the necessary work were free.
Every way runs the bare forward pass once, and gradients use each weight of the blocks once more.
What limits these speeds:

* **Other libraries, no shots.** The fastest of them is nearly as fast as the bare forward pass,
  which takes no states. Only prompts that begin alike leave more to gain.
* **Gradients, 4 x 64.** The last token goes through the model by itself. That reads each weight
  from memory once forward and once backward, which takes as long for 4 tokens as for many. In
  larger batches the same cost is a smaller part.
* **Full backprop to activations.** It takes so few bare forward passes itself that even free
  gradients could not be much faster.
* **Probes.** One set of matrix products serves the fits of many strengths, folds and layers. What
  remains is mostly Newton's steps, a Cholesky decomposition for each probe. With one fixed strength
  little is left to share.

## Last-token states

The picture shows the speed of each way, as a share of that of the bare forward pass. Prompts with
two shots begin alike, so *shared prefixes* runs their beginnings once, and passes the limit of all
ways that run every token.

```{{image}} static/speed.svg
:alt: {alt}
:width: 100%
```

## How it is measured

The model is `smollm2` in fp32 on a processor, with the same token ids for every way. The ways take
turns, in an order drawn anew each round, because a processor runs faster after a lighter load.
Seconds are medians of three rounds, with the fastest and the slowest. What takes long is timed
twice (1,024 tokens, probes whose strength is chosen) or once (padding to 512, intervals).

Ways whose values differ (cosine under 0.99999, or 1e-4 in log-probability) fail the command.
nnsight and transformer-lens are used at their best, without the LM head on every token.

Measured on:

{machines}

## Raw results

{links}
"""


def main() -> None:
    """Draw the picture, print the goals, and write the page."""
    tables = {path.stem: pd.read_csv(path, index_col=0) for path in RESULTS.glob("*.csv")}
    speed = {title: tables[name] for name, title in PICTURED.items()}
    draw_speed(speed, BOOK / "static" / "speed.svg")
    goals = pd.DataFrame(list_goals(tables), columns=COLUMNS)
    print("\nGoals\n" + goals.round(3).to_string(index=False, na_rep=""))
    page = PAGE.format(
        goals=as_markdown(goals),
        alt=describe_speed(speed),
        links="\n".join(link_to(name) for name in sorted(tables)),
        machines="\n".join(list_machines(sorted(tables))),
    )
    (BOOK / "speed.md").write_text(page, encoding="utf-8")


# The goals.


def list_goals(tables: dict[str, pd.DataFrame]) -> list[tuple]:
    """Compare what was measured with each goal, row by row of the page's first table."""
    return [
        *state_goals(tables),
        *gradient_goals(tables),
        *draw_goals(tables["draws"].passes),
        *other_goals(tables),
    ]


def state_goals(tables: dict[str, pd.DataFrame]) -> list[tuple]:
    """Compare the speed of last-token states."""
    all_sites = "ours, all four sites"
    goals = []
    for name, shots in (("states_plain", "no shots"), ("states_one", "two shots")):
        share = tables[name]["share of the limit"][all_sites]
        goals.append(at_least(f"states at all sites: share of the bare pass, {shots}", 0.95, share))

    plain, shots = tables["peers_plain"].seconds, tables["peers_one"].seconds
    fastest = plain[PEERS].min()
    faster = "times as fast as the fastest other library"
    possible = fastest / plain["bare forward (the limit)"]
    shared = shots[PEERS].min() / shots["ours, shared prefixes"]
    return [
        *goals,
        at_least(f"{faster}, no shots", 1.2, fastest / plain["ours"], possible),
        at_least(f"{faster}, two shots", 2, shared),
    ]


def gradient_goals(tables: dict[str, pd.DataFrame]) -> list[tuple]:
    """Compare the time and memory of the gradients at all sites."""
    seconds = tables["gradients"].seconds
    parts = tables["gradients_profile"]
    peak = tables["memory"]["ours / full backprop"]

    products = parts["backward and the rest"]["the last token's products alone, 4 x 64"]
    least = 1 + products / parts.seconds["bare forward, 4 x 64"]
    goals = []
    for shape, possible in (("4 x 64", least), ("32 x 64", np.nan), ("4 x 256", np.nan)):
        ratio = seconds[f"ours, {shape}"] / seconds[f"states alone, {shape}"]
        what = f"gradients at all sites: times the seconds of the states, {shape}"
        goals.append(at_most(what, 1.25, ratio, possible))
    for name, way in (
        ("full backprop to activations", "full backprop, 4 x 256"),
        ("full backprop by `backward()`", "full backprop, weights too, 4 x 256"),
    ):
        ratio = seconds[way] / seconds["ours, 4 x 256"]
        possible = seconds[way] / seconds["bare forward, 4 x 256"]
        goals.append(at_least(f"times as fast as {name}, 4 x 256", 2.5, ratio, possible))
    for shape in ("4 x 256", "4 x 1,024"):
        what = f"extra peak memory: share of full backprop's, {shape}"
        goals.append(at_most(what, 0.25, peak[shape]))
    return goals


def draw_goals(passes: pd.Series) -> list[tuple]:
    """Compare what dropout draws cost, in plain passes over the same 24 prompts."""
    of_prompt = "draws of the whole prompt: times as many passes"
    return [
        at_most(
            "32 draws of the last token: passes", 2, passes["32 draws, last_token, 24 prompts"]
        ),
        at_most(f"8 {of_prompt}", 1.1, passes["8 draws, sequence, 24 prompts"] / 8),
        at_most(f"32 {of_prompt}", 1.1, passes["32 draws, sequence, 24 prompts"] / 32),
    ]


def other_goals(tables: dict[str, pd.DataFrame]) -> list[tuple]:
    """Compare the store, the probes and the intervals."""
    store, probes = tables["store"], tables["probes"]["times as fast"]
    on_disk = store["bytes on disk / bytes of values"]["write all"]
    at_once = tables["bootstrap"].seconds["all resamples of a probe at once"]
    by = "probes: times as fast as scikit-learn"
    return [
        at_least("store, one layer of 10,000 rows: MB/s", 1000, store["MB/s"]["read one layer"]),
        at_most("store, bytes on disk: times the bytes of the values", 1.02, on_disk),
        at_least(f"{by}, strength chosen", 10, probes["batched, strength chosen inside train"]),
        at_least(f"{by}, fixed strength", 10, probes["batched, fixed strength"]),
        at_most("intervals of 500 probes, 1,000 resamples: seconds", 10, at_once),
    ]


def at_least(what: str, goal: float, measured: float, possible: float = np.nan) -> tuple:
    """Make the row of a goal that is a lower bound."""
    return what, f"at least {goal:,}", measured, yes_or_no(measured >= goal), possible


def at_most(what: str, goal: float, measured: float, possible: float = np.nan) -> tuple:
    """Make the row of a goal that is an upper bound."""
    return what, f"at most {goal:,}", measured, yes_or_no(measured <= goal), possible


def yes_or_no(is_reached: bool) -> str:
    """Say whether a goal is reached; a missed one is bold."""
    return "yes" if is_reached else "**no**"


def as_markdown(table: pd.DataFrame) -> str:
    """Format a table, numbers with three digits."""
    alignment = ["left", *["right"] * (table.shape[1] - 1)]
    texts = table.map(three_digits)
    return texts.to_markdown(index=False, disable_numparse=True, colalign=alignment)


def three_digits(value: object) -> object:
    """Format a number; leave a text as it is, and a missing value empty."""
    if not isinstance(value, float):
        return value
    if np.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# The picture.


def draw_speed(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Draw a panel for each table: a bar for each way of taking states, ours hatched."""
    # With this the same picture has the same bytes each time.
    plt.rcParams["svg.hashsalt"] = "speed"
    fig, axes = plt.subplots(1, len(tables), figsize=(9, 2.8), sharey=True)
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        shares = table["share of the limit"][::-1]
        is_ours = [way.startswith("ours") for way in shares.index]
        ax.barh(
            shares.index,
            shares,
            color=["#4C72B0" if ours else "#999999" for ours in is_ours],
            hatch=["//" if ours else "" for ours in is_ours],
            edgecolor="white",
        )
        ax.axvline(1, color="black", linestyle="--", linewidth=1)
        ax.set(title=title, xlabel="speed, as a share of the bare forward pass")
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})


def describe_speed(tables: dict[str, pd.DataFrame]) -> str:
    """Say in words what the picture shows."""
    panels = []
    for title, table in tables.items():
        shares = table["share of the limit"].items()
        panels.append(f"{title}: " + ", ".join(f"{way} {share:.2f}" for way, share in shares))
    return "Speed as a share of the bare forward pass. " + "; ".join(panels) + "."


# The raw results.


def link_to(name: str) -> str:
    """Link to the table of a benchmark."""
    return f"* [{record_of(name)['title']}](../bench/results/{name}.csv)"


def list_machines(names: Iterable[str]) -> list[str]:
    """List the machines of benchmarks, with the versions of the libraries that took part."""
    versions: dict[str, dict[str, str]] = {}
    for name in names:
        record = record_of(name)
        del record["title"]
        versions.setdefault(record.pop("machine"), {}).update(record)
    lines = []
    for machine, of_libraries in versions.items():
        libraries = [f"{library} {version}" for library, version in of_libraries.items()]
        lines.append(f"* {', '.join([machine, *libraries])}")
    return lines


def record_of(name: str) -> dict[str, str]:
    """Read what was kept beside the table of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


if __name__ == "__main__":
    main()
