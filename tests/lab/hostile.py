"""Strings that do harm, or fail, where text is read as markup. In each field the same ones."""

import pandas as pd
import plotly.graph_objects as go

from dlk_utils.evaluation.controls import TURNED
from dlk_utils.lab import findings, sentences
from dlk_utils.lab.figures import (
    bars_figure,
    intervals_figure,
    lines_figure,
    matrix_figure,
    scatter_figure,
)
from dlk_utils.lab.tables.graded import PROBE
from dlk_utils.lab.tables.headlines import CLEAN, survivors
from dlk_utils.lab.tables.trainings import KNOWN_ROWS

FLAG = "window.hurt"
"""What a script among these strings sets, so that a test can see whether one ran."""
HOSTILE = [
    f"<script>{FLAG}=1</script>",
    f"<img src=x onerror={FLAG}=2>",
    f'"><svg onload={FLAG}=3>',
    f'<a href="javascript:{FLAG}=4">a</a>',
    f"[a](javascript:{FLAG}=5) ![b](https://example.org/b.png)",
    f"</script><script>{FLAG}=6</script>",
    f"` ```{{raw}} html\n<script>{FLAG}=7</script>\n```",
    "{glue:text}`no` {eval}`1` {{ 1 }} {% x %} <%x%>",
    r"$\pi$ is less than $4",
    "from $5% to $6%, $\\(x\\)$ $$y$$",
    "__init__ *a* **b** _c_ ~~d~~ ^e^ # f",
    "1. a\n2. b\n\n    code",
    "| a | b |\n|---|---|\n| c | d |",
    "<br><b>bold</b><sup>2</sup> &lt;i&gt; &amp;",
    "%{text} %{x} {y} %s %(name)s",
    "_begins with an underscore",
    "https://example.org/page www.example.org a@example.org",
    "é ß 中文 עברית \u202e reversed",
]


def hostile_sentences(name: str) -> list[str]:
    """All sentences of the notebooks, about data sets, models and so on with this name."""
    score = {"estimate": 0.6, "low": 0.55, "high": 0.7, "n": 10, "n_smaller": 4}
    rates = dict.fromkeys(["truth_accuracy", "wrong_when_told_to_lie", "lie_above_error"], 0.9)
    rates |= {f"{rate}_{end}": 0.9 for rate in rates for end in ("low", "high")}
    row = rates | {"dataset": name, "n_truth": 9, "n_lie": 9, "choice_mass": 1.0, "meets": True}
    row |= {"chance": 0.5, "passes": True, "wrong_rate": 0.9}
    table = pd.DataFrame([row])
    told = {"told to lie": 9, "n_test": 9, "lies": 0.5, "instruction_only": 0.5}
    told |= {"instruction_only_low": 0.4, "instruction_only_high": 0.6}
    ways = pd.DataFrame([{"trained_on": name, "tested_on": f"other {name}"} | score])
    low, high = (score | {"low": low, "high": low + 0.1} for low in (0.1, 0.8))
    of_others = {"trained_on": "all others", "rule": ""}
    enough = {"n_smaller": 40}
    named = (low | {"tested_on": name}, high | {"tested_on": f"other {name}"})
    left_out = pd.DataFrame([of_others | row | enough for row in named])
    own = pd.DataFrame([dict.fromkeys(["text", "system_prompt", "says", "believes"], name)])
    own = own.assign(verdict="honest")
    style = {"style": name, "probe": "logistic", "own_answer": 0.5} | score
    claims = {"claim": "truth", "but": "it is not"}
    mistakes = pd.DataFrame([{"mistake": m} | claims | score for m in (CLEAN, "one")])
    reported = survivors({}, {})
    mistakes.loc[1, ["estimate", "low"]] = [0.9, 0.8]
    nothing = pd.DataFrame(columns=["estimate"])
    of_split = {"again": 0, "where": KNOWN_ROWS, "estimate": 0.9, "accuracy": 0.9}
    of_split |= {"n_smaller": 30}
    over_splits = pd.DataFrame([of_split | {"who": who} for who in (PROBE, TURNED)])
    return [
        *sentences.organism_findings(table, pd.DataFrame([told], [name]), verdict=name),
        *sentences.lie_findings(table.assign(passes=False), table, n_told=9, n_lied=8),
        *sentences.lie_findings(table, table.assign(lie_above_error_low=-0.1), n_told=9, n_lied=8),
        *findings.carry_over_findings(ways, {"template": left_out}, pd.DataFrame([style]), nothing),
        *findings.headline_findings(reported, {name: mistakes}),
        *findings.mistake_findings({name: mistakes}),
        *findings.mistake_findings({name: mistakes.head(0)}),
        findings.other_model_sentence(name, table),
        findings.other_model_sentence(name, table.assign(passes=False)),
        *findings.left_out_findings({name: f"left out 1 of 2 rows (first: '{name}')"}),
        *findings.explore_findings(own),
        *findings.trainings_findings({name: over_splits}),
    ]


def hostile_figures(texts: list[str]) -> list[go.Figure]:
    """Figures with these texts as names of series, rows, columns, titles and axes."""
    n = len(texts)
    table = pd.DataFrame({"name": texts, "x": range(1, n + 1), "y": 0.5, "low": 0.4, "high": 0.6})
    table["estimate"] = table.y
    words = {"title": texts[0], "xlabel": texts[1 % n], "ylabel": texts[2 % n]}
    transfer = table.assign(trained_on=texts, tested_on=texts[::-1], n=9)
    return [
        intervals_figure(table, y="name", color="name", **words),
        lines_figure(table, x="x", y="y", color="name", log_x=True, log_y=True, **words),
        bars_figure(table, x="x", y="y", color="name", **words),
        scatter_figure(table, x="x", y="y", color="name", hover="name", **words),
        matrix_figure(transfer, title=texts[0]),
    ]
