"""Write the book's page on speed from what `make bench` and `make bench-peers` kept."""

import matplotlib.pyplot as plt
import pandas as pd
from results import PAGE, RESULTS, page

INTRO = """# How fast is it?

`make bench` and `make bench-peers` measure each way of computing against the others in one run: the same model (`smollm2`), the same token ids, fp32, in turns, so that whatever else the machine does
disturbs all alike. Seconds are medians over the rounds, with the fastest and the slowest. Beside each speed stands how far the values are from the reference: a speed counts only if they are the same.
This page is written by those commands; nothing on it is typed.

```{image} static/speed.svg
:alt: Share of the bare forward pass's speed that each way of taking last-token states reaches
:width: 100%
```"""
NOTES = {
    "peers_plain": "Last-token states of all layers. *Bare forward* takes no states: it is the limit for whatever runs every token of every prompt.",
    "peers_one": "With two solved examples before each question. What the prompts of a batch begin with is run once, so that *shared prefixes* can pass the limit of those that run every token.",
    "states_plain": "Our ways, and the plain ones.",
    "states_one": "With two solved examples before each question.",
    "gradients": "Gradients of the margin with respect to the last token's activations, four sites, all layers. *Extra peak* is how much the process's peak memory rises over that of a short pass.",
    "draws": "Dropout draws, in passes: 1 is one plain pass over the same prompts.",
    "store": "What is stored is read back by memory map, one layer at a time.",
    "probes": "The same logistic regressions by scikit-learn, one after another, and all layers of a site and fold in one batch; the differences are from scikit-learn run further, in double precision. A fit of a fixed strength costs scikit-learn little more than the products of rows that ours begins with; what is gained is gained where one set of products serves many fits.",
    "bootstrap": "Intervals by resampling whole examples.",
    "answers_plain": "Answering alone: log-probabilities of the choices, no states.",
    "answers_mixed": "Answering with two solved examples before each question, where templates and instructions vary from row to row: few rows of so small a set begin alike.",
    "answers_one": "Answering with two solved examples before each question.",
}


def figure() -> None:
    """A bar for each way of taking states, one panel for prompts that share little and one for two-shot prompts."""
    tables = {title: pd.read_csv(RESULTS / f"{name}.csv", index_col=0) for name, title in (("peers_plain", "no shots"), ("peers_one", "two shots")) if (RESULTS / f"{name}.csv").is_file()}
    fig, axes = plt.subplots(1, max(1, len(tables)), figsize=(9, 2.8), sharey=True, squeeze=False)
    for ax, (title, t) in zip(axes[0], tables.items(), strict=False):
        ax.barh(t.index[::-1], t["share of the limit"][::-1], color=["#4C72B0" if w.startswith("ours") else "#999999" for w in t.index[::-1]])
        ax.axvline(1, color="black", linestyle="--", linewidth=1)
        ax.set(title=title, xlabel="speed, as a share of the bare forward pass")
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(PAGE.parent / "static" / "speed.svg", metadata={"Date": None})


if __name__ == "__main__":
    figure()
    page(INTRO, NOTES)
