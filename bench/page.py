"""Write the book's page on speed from what `make bench` and `make bench-peers` kept."""

import matplotlib.pyplot as plt
import pandas as pd
from results import PAGE, RESULTS, markdown, page

INTRO = """# How fast is it?

`make bench` and `make bench-peers` measure each way of computing against the others in one run: the same model (`smollm2`), the same token ids, fp32, in turns, so that whatever else the machine does
disturbs all alike, and in an order drawn anew each round. Seconds are medians over the rounds, with the fastest and the slowest. Beside each speed stands how far the values are from the reference: a speed counts only if they are the same.
This page is written by those commands; no figure on it is typed.

## What we wanted to reach

{goals}

## Last-token states

```{{image}} static/speed.svg
:alt: Share of the bare forward pass's speed that each way of taking last-token states reaches
:width: 100%
```"""
NOTES = {
    "peers_plain": "Last-token states of all layers. *Bare forward* takes no states: it is the limit for whatever runs every token of every prompt.",
    "peers_one": "With two solved examples before each question. What the prompts of a batch begin with is run once, so that *shared prefixes* can pass the limit of those that run every token.",
    "states_plain": "Our ways, and the plain ones.",
    "states_one": "With two solved examples before each question.",
    "gradients": "A batch is so many prompts of so many tokens. Gradients of the margin with respect to the last token's activations, four sites, all layers. *Extra peak* is how much the process's peak memory rises over that of a short pass. Backprop to the activations alone uses each weight once more, which costs about one more pass: whatever runs every token of a short prompt cannot be much more than twice as fast.",
    "draws": "Dropout draws, in passes: 1 is one plain pass over the same prompts.",
    "store": "What is stored is read back by memory map, one layer at a time.",
    "probes": "The same logistic regressions by scikit-learn, one after another, and all layers of a site and fold in one batch; the differences are from scikit-learn run further, in double precision. What is gained is gained where one set of products of rows serves many fits.",
    "probes_profile": "By torch's profiler, of one fold: Newton's steps (a Cholesky decomposition of each probe's system), and the products of rows that they begin from.",
    "bootstrap": "Intervals by resampling whole examples.",
    "answers_plain": "Answering alone: log-probabilities of the choices, no states.",
    "answers_mixed": "Answering with two solved examples before each question, where templates and instructions vary from row to row: few rows of so small a set begin alike.",
    "answers_one": "Answering with two solved examples before each question.",
}


def goals() -> pd.DataFrame:
    """Each ratio that the design asks for, and what was measured; also printed."""
    t = {p.stem: pd.read_csv(p, index_col=0) for p in RESULTS.glob("*.csv")}
    peers = ["nnsight", "transformer-lens", "lmprobe"]
    seconds, peak, passes = t["gradients"].seconds, t["gradients"]["extra peak MB"], t["draws"].passes
    beside = lambda name, way: t[name].seconds[peers].min() / t[name].seconds[way]
    rows = [
        ("states, all four sites: share of the bare pass, no shots", 0.95, t["states_plain"]["share of the limit"]["ours, all four sites"]),
        ("states, all four sites: share of the bare pass, two shots", 0.95, t["states_one"]["share of the limit"]["ours, all four sites"]),
        ("times as fast as the fastest other library, no shots", 1.2, beside("peers_plain", "ours")),
        ("times as fast as the fastest other library, two shots", 2, beside("peers_one", "ours, shared prefixes")),
        ("gradients of all sites, in times of the states alone, 4 x 64", -1.25, seconds["ours, 4 x 64"] / seconds["states alone, 4 x 64"]),
        ("gradients of all sites, in times of the states alone, 32 x 64", -1.25, seconds["ours, 32 x 64"] / seconds["states alone, 32 x 64"]),
        ("gradients of all sites, in times of the states alone, 4 x 256", -1.25, seconds["ours, 4 x 256"] / seconds["states alone, 4 x 256"]),
        ("times as fast as full backprop to the activations alone, 4 x 256", 2.5, seconds["full backprop, 4 x 256"] / seconds["ours, 4 x 256"]),
        ("times as fast as full backprop by `backward()`, 4 x 256", 2.5, seconds["full backprop, weights too, 4 x 256"] / seconds["ours, 4 x 256"]),
        ("extra peak memory, in times of full backprop's, 4 x 256", -0.25, peak["ours, 4 x 256"] / peak["full backprop, 4 x 256"]),
        ("extra peak memory, in times of full backprop's, 4 x 1,024", -0.25, peak["ours, 4 x 1,024"] / peak["full backprop, 4 x 1,024"]),
        ("32 draws of the last token, in passes", -2, passes["32 draws, last_token"]),
        ("8 draws of the whole prompt, in times of 8 passes", -1.1, passes["8 draws, sequence"] / 8),
        ("one layer of 10,000 rows, MB/s", 1000, t["store"]["MB/s"]["read one layer"]),
        ("bytes on disk, in times of the values'", -1.02, t["store"]["bytes on disk / bytes of values"]["write all"]),
        ("probes: times as fast as scikit-learn, strength chosen inside train", 10, t["probes"]["times as fast"]["batched, strength chosen inside train"]),
        ("probes: times as fast as scikit-learn, fixed strength", 10, t["probes"]["times as fast"]["batched, fixed strength"]),
        ("intervals of 500 probes by 1,000 resamples, seconds", -10, t["bootstrap"].seconds["all resamples of a probe at once"]),
    ]  # a goal below zero: at most
    reached = lambda goal, found: found <= -goal if goal < 0 else found >= goal
    table = pd.DataFrame([(what, f"at {'most' if goal < 0 else 'least'} {abs(goal):,}", found, "yes" if reached(goal, found) else "**no**") for what, goal, found in rows], columns=["what", "to reach", "measured", "reached"])
    print(table.to_string(index=False))
    return table.set_index("what")


def figure() -> None:
    """A bar for each way of taking states, one panel for prompts that share little and one for two-shot prompts."""
    tables = {title: pd.read_csv(RESULTS / f"{name}.csv", index_col=0) for name, title in (("peers_plain", "no shots"), ("peers_one", "two shots")) if (RESULTS / f"{name}.csv").is_file()}
    fig, axes = plt.subplots(1, max(1, len(tables)), figsize=(9, 2.8), sharey=True, squeeze=False)
    for ax, (title, t) in zip(axes[0], tables.items(), strict=False):
        ax.barh(t.index[::-1], t["share of the limit"][::-1], color=["#4C72B0" if w.startswith("ours") else "#999999" for w in t.index[::-1]])
        ax.axvline(1, color="black", linestyle="--", linewidth=1)
        ax.set(title=title, xlabel="speed, as a share of the bare forward pass")
        ax.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "speed"  # the same picture has the same bytes
    fig.tight_layout()
    fig.savefig(PAGE.parent / "static" / "speed.svg", metadata={"Date": None})


if __name__ == "__main__":
    figure()
    page(INTRO.format(goals=markdown(goals())), NOTES)
