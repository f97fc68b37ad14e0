"""Write the book's page on speed from the tables that `make bench` keeps in `bench/results`.

The page holds one picture, the goals, what limits those that were missed, and links to the tables.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from extraction import BARE, OURS
from growth import PACKED, SIZES
from peers import LIBRARIES
from results import RESULTS, TOP, TRIAL

PICTURED = {
    "peers_default": "default run",
    "peers_unshared": "nothing shared",
    "peers_two_shots": "two shots",
}
"""table -> the title of its panel in the picture."""

TABLES = (
    *PICTURED,
    "default_two_shots",
    "together",
    "draws",
    "growth",
    "packing_memory",
    "bf16",
    "gradients",
    "gradients_memory",
    "store",
    "probes",
    "probes_profile",
    "bootstrap",
)
"""All tables, in the order of the page's links."""

FASTER = "times as fast as the bare pass"

PAGE = """\
# How fast is it?

{answer}

```{{image}} static/speed.svg
:alt: {alt}
:width: 100%
```

This page is for developers. `make bench` measures everything in one run, and writes this page. No
number on it is typed by hand.

## Goals

{goals}

The *bare pass* is the model's forward pass over all tokens of the prompts. These are in padded
batches, sorted by length, and the LM head runs at the last tokens alone. The bare pass reads no
states, so a library that runs complete prompts in padded batches can hardly be faster.
{faster}

{limits}

## How it is measured

The model is `smollm2` in fp32 on a CPU. Every method gets the same token ids. The methods take
turns, in a new random order each round, because a processor runs faster after a lighter load. The
tables show the median of three rounds, with the fastest and the slowest. Where nothing is shared
there are five rounds, as those goals are near 1. Slow measurements have fewer: two rounds for two
shots in the default run and for probes with a tuned penalty; one round for full backprop of
the default run's prompts or of 32 prompts, for the intervals, for the runs with growing numbers of
prompts, and for memory.

If the values of two methods differ (cosine under 0.99999, or log-probabilities that are 1e-4
apart), the command fails. nnsight and transformer-lens are used at their best, without the LM head
on every token. The runs with growing numbers of prompts, and memory, are measured in a separate
process for each size and method.

Measured on:

{machines}

## Raw results

The numbers of tokens "as a tree" are those that run after shared prefixes are merged, padding
included. Where prompts share little, there can be more padding than is saved.

{links}
"""


@dataclass(frozen=True)
class Goal:
    """What was to be reached, and what was measured.

    Attributes
    ----------
    what : str
        The quantity.
    bound : float
        The least or the most that it may be.
    measured : float
        Its value.
    is_least : bool
        Whether the bound is the least value.
    limit : str
        Why it cannot be reached, where that is known. The page says so if it was missed.
    """

    what: str
    bound: float
    measured: float
    is_least: bool
    limit: str = ""

    @property
    def is_reached(self) -> bool:
        return self.measured >= self.bound if self.is_least else self.measured <= self.bound

    def row(self) -> dict[str, str]:
        """Return the goal's row in the page's table."""
        return {
            "What": self.what,
            "Goal": f"at {'least' if self.is_least else 'most'} {self.bound:,}",
            "Measured": three_digits(self.measured),
            "Reached": "yes" if self.is_reached else "**no**",
        }


def main() -> None:
    """Draw the picture, print the goals, and write the page."""
    missing = [name for name in TABLES if not (RESULTS / f"{name}.csv").is_file()]
    if missing:
        raise SystemExit(f"page: expected a table of each benchmark, got none of {missing}")
    tables = {name: pd.read_csv(RESULTS / f"{name}.csv", index_col=0) for name in TABLES}
    book = RESULTS if TRIAL else TOP / "book"
    speed = {title: tables[name] for name, title in PICTURED.items()}
    (book / "static").mkdir(exist_ok=True)
    draw_speed(speed, book / "static" / "speed.svg")
    goals = list_goals(tables)
    table = pd.DataFrame([goal.row() for goal in goals])
    print("\nGoals\n" + table.to_string(index=False))
    page = PAGE.format(
        answer=summarise(tables),
        goals=as_markdown(table),
        limits=describe_limits(goals),
        faster=describe_faster(speed),
        alt=describe_speed(speed),
        links="\n".join(link_to(name) for name in TABLES),
        machines="\n".join(list_machines(TABLES)),
    )
    (book / "speed.md").write_text(page, encoding="utf-8")


# What was found.


def summarise(tables: dict[str, pd.DataFrame]) -> str:
    """Say the main findings in a paragraph."""
    default = tables["peers_default"][FASTER]
    together = tables["together"]["bare passes"]
    unshared = tables["peers_unshared"][FASTER]
    with_shots = tables["default_two_shots"][FASTER]
    one_template = tables["peers_two_shots"][FASTER]
    return (
        f"Reading the last-token states of the default run's prompts is {default[OURS]:.2f} times "
        "as fast as a bare forward pass over all their tokens. Prefixes that prompts share run "
        "only once; where nothing is shared, reading states is "
        f"{unshared[OURS]:.2f} times as fast. The fastest other library is "
        f"{default[list(LIBRARIES)].max():.2f} times as fast on the default run. With two shots "
        f"before each question, reading the default run's prompts is {with_shots[OURS]:.2f} times "
        'as fast as the bare pass. (The figure\'s "two shots" is another set of prompts, with one '
        "template and one pair of instructions. They share far more, and reading them is "
        f"{one_template[OURS]:.2f} times as fast.) "
        "Answers, states and gradients of all four sites together take "
        f"{together['ours, one pass for all three']:.2f} bare passes."
    )


def describe_faster(speed: dict[str, pd.DataFrame]) -> str:
    """Name the other libraries that came out faster than the bare pass, and say by how much."""
    faster = [
        f"{library} {table.loc[library, FASTER]:.2f} ({title})"
        for title, table in speed.items()
        for library in LIBRARIES
        if table.loc[library, FASTER] > 1
    ]
    if not faster:
        return ""
    return f"In the figure, these are faster: {', '.join(faster)}. We do not know why."


def list_goals(tables: dict[str, pd.DataFrame]) -> list[Goal]:
    """Compare what was measured with each goal."""
    return [
        *state_goals(tables),
        *together_goals(tables["together"]),
        *gradient_goals(tables["gradients"].seconds, tables["gradients_memory"]),
        *draw_goals(tables["draws"]),
        *growth_goals(tables["growth"], tables["packing_memory"]),
        *other_goals(tables),
    ]


def state_goals(tables: dict[str, pd.DataFrame]) -> list[Goal]:
    """Compare the speed of last-token states with the bare pass and the other libraries."""
    libraries = list(LIBRARIES)
    goals = []
    for name, bare_bound, library_bound, limit in (
        (
            "peers_default",
            1.9,
            1.9,
            "**Default run.** Shared prefixes form a tree, of which every token has to run once "
            "(the raw table's title says how many there are). In addition, the branches attend to "
            "the trunk, and the trunk takes a short pass of its own.",
        ),
        (
            "peers_unshared",
            0.98,
            1.0,
            "**Nothing shared.** Ours then runs as many tokens as the bare pass, "
            "and reads states as well.",
        ),
        (
            "peers_two_shots",
            None,
            3.0,
            "**Two shots.** Every token of the tree has to run once, and the more prompts there "
            "are for an instruction, the more they share.",
        ),
    ):
        seconds, title = tables[name].seconds, PICTURED[name]
        if bare_bound is not None:
            ratio = seconds[BARE] / seconds[OURS]
            goals.append(at_least(f"states, {title}: {FASTER}", bare_bound, ratio, limit))
        ratio = seconds[libraries].min() / seconds[OURS]
        what = f"states, {title}: times as fast as the fastest other library"
        goals.append(at_least(what, library_bound, ratio, limit))
    return goals


def together_goals(table: pd.DataFrame) -> list[Goal]:
    """Compare what answers, states and gradients of four sites take together."""
    passes = table["bare passes"]
    alone, together = passes["ours, states alone"], passes["ours, one pass for all three"]
    limit = (
        f"**One pass for all three.** States alone take {alone:.2f} bare passes. The rest "
        f"({together - alone:.2f}) is the backward pass of the last tokens, the LM head, and "
        "copying the gradients."
    )
    what = "answers, states and gradients of four sites, default run: bare passes"
    return [at_most(what, 0.65, together, limit)]


def gradient_goals(seconds: pd.Series, memory: pd.DataFrame) -> list[Goal]:
    """Compare the time and memory of the gradients with those of full backprop."""
    goals = []
    for name, way in (
        ("full backprop to activations", "full backprop, 4 x 256"),
        ("full backprop by `backward()`", "full backprop, weights too, 4 x 256"),
    ):
        ratio = seconds[way] / seconds["ours, 4 x 256"]
        possible = seconds[way] / seconds["bare pass, 4 x 256"]
        limit = (
            f"**{name[0].upper()}{name[1:]}.** It takes {possible:.2f} bare passes itself. Even if "
            "gradients cost nothing beyond a forward pass, they could not be faster by more than "
            "that factor."
        )
        goals.append(at_least(f"gradients, 4 x 256: times as fast as {name}", 2.5, ratio, limit))
    for shape, share in memory["ours / full backprop"].items():
        what = f"gradients, {shape}: extra peak memory as a share of full backprop's"
        goals.append(at_most(what, 0.25, share))
    return goals


def draw_goals(table: pd.DataFrame) -> list[Goal]:
    """Compare what dropout draws cost, in clean padded passes over the same prompts."""
    per_draw = table["passes per draw"]
    return [
        at_most("a draw of the sequence: passes", 1.1, per_draw["2 draws, sequence"]),
        at_most("32 draws of the last token: passes", 1.4, table.passes["32 draws, last_token"]),
    ]


def growth_goals(growth: pd.DataFrame, memory: pd.DataFrame) -> list[Goal]:
    """Compare time and memory per prompt of many prompts with those of few."""
    few, many = SIZES[0], SIZES[-1]
    seconds, peak = growth["ms per prompt"], growth["extra peak per prompt, kB"]
    sizes = f"with {many:,} prompts, relative to {few:,} prompts"
    return [
        at_most(f"seconds per prompt {sizes}", 1.15, seconds[many] / seconds[few]),
        at_most(f"extra peak memory per prompt {sizes}", 1.15, peak[many] / peak[few]),
        at_most(
            "extra peak memory of packed batches, relative to padded ones",
            1.2,
            memory["times padded"][PACKED],
            "**Memory of packed batches.** A row of branches needs the trunk's keys and values, "
            "and a mask over pairs of tokens.",
        ),
    ]


def other_goals(tables: dict[str, pd.DataFrame]) -> list[Goal]:
    """Compare the store, the probes and the intervals."""
    store, probes = tables["store"], tables["probes"]["times as fast"]
    on_disk = store["bytes on disk / bytes of values"]["write all"]
    at_once = tables["bootstrap"].seconds["all resamples of a probe at once"]
    limit = (
        "**Probes.** The fits of many penalties, folds and layers share one set of matrix "
        "products, so with one fixed penalty little is left to share. "
        f"{longest_operations(tables['probes_profile'])}"
    )
    return [
        at_least("store, one layer of 10,000 rows: MB/s", 1000, store["MB/s"]["read one layer"]),
        at_most("store, bytes on disk, relative to the values' bytes", 1.02, on_disk),
        at_least(
            "probes with a tuned penalty: times as fast as scikit-learn",
            10,
            probes["batched, penalty tuned inside train"],
            limit,
        ),
        at_least(
            "probes with a fixed penalty: times as fast as scikit-learn",
            10,
            probes["batched, fixed penalty"],
            limit,
        ),
        at_most("intervals of 500 probes, 1,000 resamples: seconds", 10, at_once),
    ]


def longest_operations(shares: pd.DataFrame) -> str:
    """Say which operation takes the largest share of the time of either way to fit."""
    (fixed, of_fixed), (tuned, of_tuned) = (
        (of_way.idxmax(), f"{100 * of_way.max():.0f} %") for _, of_way in shares.items()
    )
    if fixed == tuned:
        return (
            f"`{fixed}` takes the largest share of our time: {of_fixed} with a fixed penalty, and "
            f"{of_tuned} with a tuned one."
        )
    return (
        f"With a fixed penalty, `{fixed}` takes the largest share of our time ({of_fixed}). With a "
        f"tuned one, it is `{tuned}` ({of_tuned})."
    )


def at_least(what: str, bound: float, measured: float, limit: str = "") -> Goal:
    """Make a goal whose bound is the least value."""
    return Goal(what, bound, float(measured), True, limit)


def at_most(what: str, bound: float, measured: float, limit: str = "") -> Goal:
    """Make a goal whose bound is the most that it may be."""
    return Goal(what, bound, float(measured), False, limit)


def describe_limits(goals: Iterable[Goal]) -> str:
    """List what limits the goals that were missed, each limit once."""
    limits = dict.fromkeys(g.limit for g in goals if g.limit and not g.is_reached)
    if not limits:
        return ""
    return "What limits the goals that were missed:\n\n" + "\n".join(f"* {x}" for x in limits)


def as_markdown(table: pd.DataFrame) -> str:
    """Format a table of texts, all columns but the first aligned to the right."""
    alignment = ["left", *["right"] * (table.shape[1] - 1)]
    return table.to_markdown(index=False, disable_numparse=True, colalign=alignment)


def three_digits(value: float) -> str:
    """Format a number with three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# The picture.


def draw_speed(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Draw a panel for each table: a bar for each way of taking states, ours hatched."""
    # With this the same picture has the same bytes each time.
    plt.rcParams["svg.hashsalt"] = "speed"
    fig, axes = plt.subplots(1, len(tables), figsize=(9, 2.8), sharey=True)
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        shares = table[FASTER][::-1]
        is_ours = [way == OURS for way in shares.index]
        ax.barh(
            shares.index,
            shares,
            color=["#4C72B0" if ours else "#999999" for ours in is_ours],
            hatch=["//" if ours else "" for ours in is_ours],
            edgecolor="white",
        )
        ax.axvline(1, color="black", linestyle="--", linewidth=1)
        ax.set(title=title)
        ax.spines[["top", "right"]].set_visible(False)
    fig.supxlabel(f"last-token states: {FASTER}", fontsize="medium")
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})


def describe_speed(tables: dict[str, pd.DataFrame]) -> str:
    """Say in words what the picture shows."""
    panels = []
    for title, table in tables.items():
        panels.append(f"{title}: " + ", ".join(f"{k} {v:.2f}" for k, v in table[FASTER].items()))
    return f"Last-token states, {FASTER}. " + "; ".join(panels) + "."


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
