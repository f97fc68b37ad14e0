"""Tables and figures of every kind, as wide as those of the notebooks, with their longest names."""

import pandas as pd
import plotly.graph_objects as go

from dlk_utils.evaluation.chats import ANSWER, THOUGHT, ChatScores
from dlk_utils.lab.answer_view import show_answer
from dlk_utils.lab.chat_view import show_chat
from dlk_utils.lab.figures import (
    bars_figure,
    belief_figure,
    intervals_figure,
    lines_figure,
    matrix_figure,
    menu_figure,
    scatter_figure,
    slider_figure,
    tokens_figure,
)
from dlk_utils.lab.html_view import HtmlView
from dlk_utils.lab.table_display import ShownTable, show_table

WHO = [
    "own answer, reversed if told to lie",
    "asked again",
    "probe of truth: logistic_tuned, activation, resid_post 18",
    "review_definitely_not_a_positive_one",
]
SITES = ["resid_post", "attn_out", "mlp_out", "head_out"]
FAMILIES = ["charity", "exam", "game", "opposite day", "riddle", "uncensored", "none of these"]
LABELS = {
    "xlabel": "wrong rate told to lie minus told to tell the truth (95 % interval)",
    "ylabel": "signed AUROC on test (95 % interval; dashed: chance)",
    "title": "On known rows, no rival has a higher AUROC than the probe, but the "
    "interval of the strongest overlaps with its own: "
    '"own answer, reversed if told to lie" (0.99). On all rows told to lie, 2 of 8 rivals score '
    'higher, most of all "asked again" (0.99 against 0.95)',
}


def scores(names: list[str]) -> pd.DataFrame:
    """A row of scores for each name, twice: of lies and of honest answers."""
    rows = [
        {"where": where, "who": who, "layer": 18, "estimate": 0.99, "low": 0.905, "high": 1.0}
        for where in ("known rows told to lie", "rows told to lie")
        for who in names
    ]
    lift = {"lift": -0.01, "lift_low": -0.125, "lift_high": 0.01}
    return pd.DataFrame(rows).assign(n=104, n_smaller=47, best_control=WHO[0], **lift)


def tables() -> list[ShownTable]:
    table = scores(WHO)
    columns = ["estimate", "best_control", "lift", "n_smaller", "verdict"]
    verdicts = table.assign(verdict="above chance, but not clearly above its best control")
    hashes = pd.DataFrame({"sha256": ["d4acac55fe7f38d0" * 4] * 2, "rows": [1, None]}, WHO[:2])
    review = "we learn a lot about dying coral and see a lot of life on the reef . " * 8
    texts = pd.DataFrame({"text": [review] * 2, "belief": [0.5, -4.7], "verdict": "honest"})
    sites = pd.DataFrame(
        {(kind, site): [33.3, 0.18] for kind in ("activation", "gradient") for site in SITES[:3]}
    )
    return [
        show_table(table.set_index(["where", "who"]), LABELS["title"]),
        show_table(
            verdicts.set_index(["where", "who"]), "Verdicts", columns=columns, whole=verdicts
        ),
        show_table(hashes.rename_axis("dataset"), "Sources"),
        show_table(texts.set_index("text"), "Texts"),
        show_table(texts.iloc[0], "One row"),
        show_table(sites.rename_axis("layer"), "Norms"),
    ]


def figures() -> list[go.Figure]:
    table = scores(WHO)
    steps = pd.concat([table.assign(step=step, estimate=0.9 - step / 10) for step in range(5)])
    layers = steps.assign(line=steps["where"] + ", " + steps.who)
    matrices = []
    for names in (FAMILIES[:3], FAMILIES):
        cells = [{"trained_on": one, "tested_on": other} for one in names for other in names]
        matrices.append(pd.DataFrame(cells).assign(estimate=0.75, low=0.6, high=0.9, n=104))
    words = ["<|im_start|>", "system", " Answer", " truthfully", "\n"] * 16
    track = pd.DataFrame({"place": range(-70, 10), "token": words, "score": 0.5})
    by_layer = [track.assign(layer=layer, score=layer - 9.5) for layer in range(0, 30, 3)]
    beliefs = belief_figure(pd.concat(by_layer), title=LABELS["title"])
    one_line = lines_figure(track, x="place", y="score", **LABELS)
    names = {"x": "step", "y": "estimate", "color": "who", "fill": "where", "hover": "where"}
    points = scatter_figure(steps, hollow=min(steps["where"]), **names, **LABELS)
    layers_of_points = {str(layer): points for layer in range(0, 90, 3)}
    return [
        intervals_figure(table, y="who", color="where", reference=0.5, x_range=(0, 1), **LABELS),
        lines_figure(layers, x="step", y="estimate", color="line", **LABELS),
        lines_figure(
            steps, x="step", y="estimate", color="who", dash="where", reference=0.5, **LABELS
        ),
        bars_figure(steps.query("step < 2"), x="step", y="n", color="who", reference=0.5, **LABELS),
        *(matrix_figure(matrix, title=LABELS["title"]) for matrix in matrices),
        tokens_figure(track, title=LABELS["title"]),
        menu_figure(dict.fromkeys(WHO, beliefs), title=LABELS["title"]),
        menu_figure(dict.fromkeys(WHO, one_line), title=LABELS["title"]),
        slider_figure(layers_of_points, title=LABELS["title"], slides_over="layer", first="45"),
    ]


def chats() -> list[HtmlView]:
    words = {THOUGHT: ["Hm", "."], ANSWER: ["word"] * 300 + ["x" * 200]}
    rows = [{"turn": 1, "part": part, "token": token} for part in words for token in words[part]]
    tokens = pd.DataFrame(rows)
    tokens["score"] = [(number % 21) - 10.0 for number in range(len(tokens))]
    by_part = tokens.groupby(["turn", "part"], sort=False).score
    turns = by_part.agg(n="size", mean="mean", highest="max", lowest="min").reset_index()
    messages = [
        {"role": "user", "content": "Is it? " * 80},
        {"role": "assistant", "content": "<think>Hm.</think>" + "".join(words[ANSWER])},
    ]
    return [show_chat(ChatScores(tokens, turns, [], []), messages, caption=LABELS["title"])]


def answers() -> list[HtmlView]:
    row = {"prompt": "<|im_start|>system\nAnswer. " + "word " * 90 + "x" * 200, "label": 1}
    row |= {"choices": [WHO[0], "no"], "answer": 0, "margin": -2.5, "belief": 3.1}
    by_layer = pd.DataFrame({"layer": range(0, 90, 3), "for_truth": 2.5})
    judged = pd.Series(row | {"verdict": "lie"})
    return [show_answer(judged, by_layer, caption=LABELS["title"])]
