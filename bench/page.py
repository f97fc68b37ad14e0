"""Write the book's page on speed from what `make bench` kept."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from results import PAGE, RESULTS, markdown, page

INTRO = """# How fast is it?

`make bench` measures each way of computing against the others in one run: the same model (`smollm2`), the same token ids, fp32, in turns, so that whatever else the machine does
disturbs all alike, and in an order drawn anew each round. Seconds are medians over three rounds (over two, where they take long: 1,024 tokens, and probes whose strength is chosen; the intervals were timed once), with the fastest and the slowest. Beside each speed stands how far the values are from the reference: where states, gradients, draws or answers are not the same, the command fails (a cosine under 0.99999, or 1e-4 in log-probability).
This page is written by that command; no figure on it is typed. All of it was measured on the processor that each table names: it says nothing of how fast anything is on a GPU.

## What we wanted to reach

{goals}

*Possible* is the best that could be measured if all that is not needed were free: every way runs the bare forward pass once, and gradients use each weight of the blocks once more. *Where the gradients' time goes* and
*Where the batched fits spend their time*, below, say why the goals of theirs were not reached.

## Last-token states

```{{image}} static/speed.svg
:alt: Share of the bare forward pass's speed that each way of taking last-token states reaches
:width: 100%
```"""
NOTES = {
    "peers_plain": "Last-token states of all layers. *Bare forward* takes no states: it is the limit for whatever runs every token of every prompt, so that nothing can be faster than the fastest of the others by more than that one is slower than the limit. nnsight is stopped after the last layer and transformer-lens keeps the logits of one position, as ours does; asked in the plainest way, they run the LM head on every token, as lmprobe does here.",
    "peers_one": "With two solved examples before each question. What the prompts of a batch begin with is run once, so that *shared prefixes* can pass the limit of those that run every token.",
    "states_plain": "Our ways, and the plain ones; the one padded to 512, which takes long, was timed once. Values are compared with those of one prompt at a time, of all layers but the last, which that way gives after the final norm.",
    "states_one": "With two solved examples before each question.",
    "gradients": "A batch is so many prompts of so many tokens. Gradients of the margin with respect to the last token's activations, four sites, all layers; values are compared with full backprop's. Full backprop *with the head at the last token* is full backprop at its best: a model asked plainly computes the logits of every token.",
    "gradients_profile": """Seconds of the model's forward passes, without a graph for the gradients and with one, and of all that follows them, which is the backward pass and little else; the shares are of the processor's time, by torch's profiler.
*The last token's products alone* are one matrix product with each weight of the blocks forward, and one backward.

Why ours is not cheaper in a small batch (4 x 64): its passes are that of the prefix, {prefix:.2f} s, and that of the last token, {token:.2f} s and {back:.2f} s backward, together {added:.0%} of a bare forward. The products alone take {least:.2f} s, {share:.0%} of a bare forward:
the weights are read from memory once forward and once backward, {weights:,.0f} MB each time, and that takes no less time for {rows} tokens than for many. So {bound:.2f} bare forwards are the least for a pass of the last token by itself, were all else in it free. A way that took the last token along with the prefix,
and kept what its backward pass needs, would save the forward products and could not come below {bound_back:.2f}; ours does not do so. Of a larger batch the same cost is a smaller part.

Why full backprop is not slower (4 x 256): it is a forward pass of {forward:.2f} s and a backward pass of {backward:.2f} s, {r:.2f} bare forwards together, {r_head:.2f} with the head at the last token. Every way to the states and gradients runs the forward pass; so {r:.2f} times as fast is all that could be had if the gradients were free,
and ours, at {ours:.2f} bare forwards, is {measured:.2f} times as fast here. (These rounds are apart from those of the table above, in which it is {r_above:.2f} bare forwards; what the two differ by is the noise of the machine.)""",
    "memory": "How much the process's peak memory rises over that of a short pass. Full backprop keeps what every token's backward pass needs, so that what ours saves grows with the prompt: {saved}. The ratio of the two does not fall with it, for both rise with the number of tokens: full backprop by the graph, ours by the key-value cache and the forward pass itself.",
    "draws": "Dropout draws, in passes: 1 is one plain pass over the same prompts. The differences are from the same draws of two of the prompts, each alone. Draws of the last token are tokens side by side in one pass, each at the last token's place, which see the prompt and themselves alone: what each costs more than that is its row in the products with the weights, those of the LM head among them, which a plain pass multiplies by the last token only. Here 32 of them take {many:.2f} passes with 24 prompts, and {few:.2f} with 12.",
    "store": "In bf16. One layer is read by itself: of each shard the header and that tensor's own bytes, straight into place. On disk there is a row for each prompt; here an example has one. The bytes on disk are those of all files, manifest and checksums included.",
    "probes": "The same logistic regressions by scikit-learn, one after another, and all layers of a site and fold in one batch; the differences are from scikit-learn run further, in double precision. What is gained is gained where one set of products of rows serves many fits.",
    "probes_profile": "By torch's profiler, of one fold: Newton's steps (a Cholesky decomposition of each probe's system), and the products of rows that they begin from.",
    "bootstrap": "Intervals by resampling whole examples.",
    "answers_plain": "Answering alone: log-probabilities of the choices, no states.",
    "answers_mixed": "Answering with two solved examples before each question, where templates and instructions vary from row to row: few rows of so small a set begin alike, and the further passes cost as much as sharing saves, or more.",
    "answers_one": "Answering with two solved examples before each question. What a batch begins with is run once for that batch, so several times where a template's rows do not fit into one.",
}


def goals() -> pd.DataFrame:
    """Each ratio that the design asks for, and what was measured; also printed."""
    t = {p.stem: pd.read_csv(p, index_col=0) for p in RESULTS.glob("*.csv")}
    peers = ["nnsight", "transformer-lens", "lmprobe"]
    seconds, peak, passes = (
        t["gradients"].seconds,
        t["memory"]["ours / full backprop"],
        t["draws"].passes,
    )
    parts = t["gradients_profile"]
    free = lambda way: seconds[f"{way}, 4 x 256"] / seconds["bare forward, 4 x 256"]
    beside = lambda name, way: t[name].seconds[peers].min() / t[name].seconds[way]
    rows = [
        (
            "states, all four sites: share of the bare pass, no shots",
            0.95,
            t["states_plain"]["share of the limit"]["ours, all four sites"],
        ),
        (
            "states, all four sites: share of the bare pass, two shots",
            0.95,
            t["states_one"]["share of the limit"]["ours, all four sites"],
        ),
        (
            "times as fast as the fastest other library, no shots",
            1.2,
            beside("peers_plain", "ours"),
            beside("peers_plain", "bare forward (the limit)"),
        ),
        (
            "times as fast as the fastest other library, two shots",
            2,
            beside("peers_one", "ours, shared prefixes"),
        ),
        (
            "gradients of all sites, in times of the states alone, 4 x 64",
            -1.25,
            seconds["ours, 4 x 64"] / seconds["states alone, 4 x 64"],
            1
            + parts["backward and the rest"]["the last token's products alone, 4 x 64"]
            / parts.seconds["bare forward, 4 x 64"],
        ),
        (
            "gradients of all sites, in times of the states alone, 32 x 64",
            -1.25,
            seconds["ours, 32 x 64"] / seconds["states alone, 32 x 64"],
        ),
        (
            "gradients of all sites, in times of the states alone, 4 x 256",
            -1.25,
            seconds["ours, 4 x 256"] / seconds["states alone, 4 x 256"],
        ),
        (
            "times as fast as full backprop to the activations alone, 4 x 256",
            2.5,
            seconds["full backprop, 4 x 256"] / seconds["ours, 4 x 256"],
            free("full backprop"),
        ),
        (
            "times as fast as full backprop by `backward()`, 4 x 256",
            2.5,
            seconds["full backprop, weights too, 4 x 256"] / seconds["ours, 4 x 256"],
            free("full backprop, weights too"),
        ),
        ("extra peak memory, in times of full backprop's, 4 x 256", -0.25, peak["4 x 256"]),
        ("extra peak memory, in times of full backprop's, 4 x 1,024", -0.25, peak["4 x 1,024"]),
        (
            "32 draws of the last token, in passes, 24 prompts",
            -2,
            passes["32 draws, last_token, 24 prompts"],
        ),
        (
            "8 draws of the whole prompt, in times of 8 passes",
            -1.1,
            passes["8 draws, sequence, 24 prompts"] / 8,
        ),
        (
            "32 draws of the whole prompt, in times of 32 passes",
            -1.1,
            passes["32 draws, sequence, 24 prompts"] / 32,
        ),
        ("one layer of 10,000 rows, MB/s", 1000, t["store"]["MB/s"]["read one layer"]),
        (
            "bytes on disk, in times of the values'",
            -1.02,
            t["store"]["bytes on disk / bytes of values"]["write all"],
        ),
        (
            "probes: times as fast as scikit-learn, strength chosen inside train",
            10,
            t["probes"]["times as fast"]["batched, strength chosen inside train"],
        ),
        (
            "probes: times as fast as scikit-learn, fixed strength",
            10,
            t["probes"]["times as fast"]["batched, fixed strength"],
        ),
        (
            "intervals of 500 probes by 1,000 resamples, seconds",
            -10,
            t["bootstrap"].seconds["all resamples of a probe at once"],
        ),
    ]  # a goal below zero: at most
    reached = lambda goal, found: found <= -goal if goal < 0 else found >= goal
    table = pd.DataFrame(
        [
            (
                what,
                f"at {'most' if goal < 0 else 'least'} {abs(goal):,}",
                found,
                "yes" if reached(goal, found) else "**no**",
                *(possible or [np.nan]),
            )
            for what, goal, found, *possible in rows
        ],
        columns=["what", "to reach", "measured", "reached", "possible"],
    )
    print("\nWhat we wanted to reach\n" + table.round(3).to_string(index=False, na_rep=""))
    return table.set_index("what")


def notes() -> dict[str, str]:
    """`NOTES`, with the figures that some of them explain."""
    t, peak, passes = (
        pd.read_csv(RESULTS / f"{name}.csv", index_col=0)
        for name in ("gradients_profile", "memory", "draws")
    )
    passes, above = passes.passes, pd.read_csv(RESULTS / "gradients.csv", index_col=0).seconds
    at = lambda way, column="seconds", shape="4 x 64": t[column][f"{way}, {shape}"]
    wide = lambda way, column="seconds": at(way, column, "4 x 256")
    token, back, least, bare = (
        at("ours", "with a graph"),
        at("ours", "backward and the rest"),
        at("the last token's products alone"),
        wide("bare forward"),
    )
    small = {
        "rows": 4,
        "prefix": at("ours", "without a graph"),
        "token": token,
        "back": back,
        "added": (token + back) / at("bare forward"),
        "least": least,
        "share": least / at("bare forward"),
        "bound": 1 + least / at("bare forward"),
        "bound_back": 1
        + at("the last token's products alone", "backward and the rest") / at("bare forward"),
        "weights": at("the last token's products alone", "MB of weights"),
    }
    large = {
        "r_above": above["full backprop, 4 x 256"] / above["bare forward, 4 x 256"],
        "forward": wide("full backprop", "with a graph"),
        "backward": wide("full backprop", "backward and the rest"),
        "r": wide("full backprop") / bare,
        "r_head": wide("full backprop, head at the last token") / bare,
        "ours": wide("ours") / bare,
        "measured": wide("full backprop") / wide("ours"),
    }
    saved = ", ".join(f"{mb:,.0f} MB at {shape}" for shape, mb in peak["saved by ours, MB"].items())
    return NOTES | {
        "gradients_profile": NOTES["gradients_profile"].format(**small, **large),
        "memory": NOTES["memory"].format(saved=saved),
        "draws": NOTES["draws"].format(
            many=passes["32 draws, last_token, 24 prompts"],
            few=passes["32 draws, last_token, 12 prompts"],
        ),
    }


def figure() -> None:
    """A bar for each way of taking states, one panel for prompts that share little and one for two-shot prompts."""
    tables = {
        title: pd.read_csv(RESULTS / f"{name}.csv", index_col=0)
        for name, title in (("peers_plain", "no shots"), ("peers_one", "two shots"))
        if (RESULTS / f"{name}.csv").is_file()
    }
    fig, axes = plt.subplots(1, max(1, len(tables)), figsize=(9, 2.8), sharey=True, squeeze=False)
    for ax, (title, t) in zip(axes[0], tables.items(), strict=False):
        ax.barh(
            t.index[::-1],
            t["share of the limit"][::-1],
            color=["#4C72B0" if w.startswith("ours") else "#999999" for w in t.index[::-1]],
        )
        ax.axvline(1, color="black", linestyle="--", linewidth=1)
        ax.set(title=title, xlabel="speed, as a share of the bare forward pass")
        ax.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "speed"  # the same picture has the same bytes
    fig.tight_layout()
    fig.savefig(PAGE.parent / "static" / "speed.svg", metadata={"Date": None})


if __name__ == "__main__":
    figure()
    page(INTRO.format(goals=markdown(goals())), notes())
