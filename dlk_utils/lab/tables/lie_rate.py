"""Tables of notebook 02: instruction or shots, what is known, what the model says."""

import numpy as np
import pandas as pd
import torch
from torch import nn

from dlk_utils.evaluation.behaviour import FORM, MIN_MASS
from dlk_utils.evaluation.stats import bootstrap_weights, mean_interval, wilson_interval
from dlk_utils.extract.batches import pad
from dlk_utils.questions.elicit import ASKS, SHOTS

LEVELS = ["always", "in another form", "only with shots", "never"]


def shots_table(answers: pd.DataFrame) -> pd.DataFrame:
    """Wrong rate (Wilson 95 %) per data set, instruction and shots; data set "all" pools them. Unreadable answers are left out and counted."""
    rows = []
    for dataset, t in [*answers.groupby("dataset", sort=False), ("all", answers)]:
        for asks in ASKS:
            for shots in SHOTS:
                cell = t[(t.asks == asks) & (t.shots_say == shots)]
                ok = cell[cell.readable]
                if len(ok):
                    wrong = int((~ok.correct).sum())
                    low, high = wilson_interval(wrong, len(ok))
                    rows.append(
                        dict(
                            dataset=dataset,
                            instruction=asks,
                            shots=shots,
                            n=len(ok),
                            unreadable=len(cell) - len(ok),
                            wrong_rate=wrong / len(ok),
                            wrong_rate_low=low,
                            wrong_rate_high=high,
                        )
                    )
    return pd.DataFrame(rows)


def shots_effects(answers: pd.DataFrame) -> pd.DataFrame:
    """How much of the lying comes from the instruction and how much from the shots: differences in wrong rate within examples, 95 % bootstrap over templates (whose examples share their shots).

    instruction: lie minus truth instruction without shots. instruction, with shots: the same with shots, over those that tell the truth and those that lie. shots: lying minus truthful ones, over the three
    instructions. any shots: told the truth, shots of either kind minus none (above 0: being shown solved questions makes it worse).
    together: told to lie with lying shots minus told the truth with truthful ones. An example counts where all answers of the difference are readable; with none, the estimate is NaN.
    """
    rows = []
    for dataset, t in [*answers.groupby("dataset", sort=False), ("all", answers)]:
        wrong = (
            (~t.correct)
            .astype(float)
            .where(t.readable)
            .groupby([t.example_id, t.asks, t.shots_say])
            .mean()
            .unstack(["asks", "shots_say"])
        )
        form = t.drop_duplicates("example_id").set_index("example_id").loc[wrong.index]
        cube = np.stack(
            [wrong[a][list(SHOTS)].to_numpy() for a in ASKS], 1
        )  # example, instruction, shots
        truth, lie = ASKS.index("truth"), ASKS.index("lie")
        none, honest, lying = (SHOTS.index(s) for s in SHOTS)
        effects = {
            "instruction": cube[:, lie, none] - cube[:, truth, none],
            "instruction, with shots": (cube[:, lie, honest:] - cube[:, truth, honest:]).mean(1),
            "shots": cube[:, :, lying].mean(1) - cube[:, :, honest].mean(1),
            "any shots": cube[:, truth, honest:].mean(1) - cube[:, truth, none],
            "together": cube[:, lie, lying] - cube[:, truth, honest],
        }
        for name, x in effects.items():
            ok = ~np.isnan(x)
            low, high = (
                mean_interval(
                    x[ok],
                    (form.dataset + " " + form.template).to_numpy(str)[ok],
                    bounds=(-1.0, 1.0),
                )
                if ok.any()
                else (np.nan, np.nan)
            )
            rows.append(
                dict(
                    dataset=dataset,
                    effect=name,
                    n=int(ok.sum()),
                    estimate=x[ok].mean() if ok.any() else np.nan,
                    estimate_low=low,
                    estimate_high=high,
                )
            )
    return pd.DataFrame(rows)


def knowledge_levels(behaviour: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """Per example of the grid: `level`, by the prompts under which it tells the truth, and `wrong_when_told_to_lie` in the scored row.

    always: under every truth prompt without shots. in another form: under some of them (what goes wrong elsewhere may be confusion). only with shots: under none of them, but with truthful shots.
    never: it cannot lie about that. `right_with_shots` and `right_without` say whether truthful shots are a better prompt at all: same template and instruction, in the grid.
    """
    told = behaviour[
        (behaviour.asks == "truth")
        & (behaviour.shots.map(len) == 0)
        & behaviour.example_id.isin(grid.example_id)
    ]
    told = (
        told if len(told) else grid[(grid.asks == "truth") & (grid.shots_say == "none")]
    )  # a run with shots asks without them in the grid alone
    right = (told.correct & told.readable).groupby(told.example_id).mean()
    shown = {}
    for name, shots in (("right_with_shots", "truth"), ("right_without", "none")):
        t = grid[(grid.asks == "truth") & (grid.shots_say == shots)].set_index("example_id")
        shown[name] = (t.correct & t.readable).reindex(right.index, fill_value=False)
    lie = behaviour[behaviour.role == "lie"].set_index("example_id").reindex(right.index)
    level = np.select([right == 1, right > 0, shown["right_with_shots"]], LEVELS[:3], LEVELS[3])
    return pd.DataFrame(
        {
            "dataset": lie.dataset,
            "level": pd.Categorical(level, LEVELS),
            "wrong_when_told_to_lie": (~lie.correct.astype(bool) & lie.readable.astype(bool)),
            **shown,
        },
        index=right.index,
    )


def other_table(answers: pd.DataFrame) -> pd.DataFrame:
    """By what is asked for: share of wrong answers (Wilson 95 %), how sure the answer is (mean share of the two choices' probability), and choice mass."""
    kind = answers.asks.where(answers.shots.map(len) == 0, "riddle, shots reveal " + answers.asks)
    rows = []
    for name, t in answers.groupby(kind, sort=False):
        ok = t[t.readable]
        low, high = wilson_interval(int((~ok.correct).sum()), len(ok)) if len(ok) else (0.0, 1.0)
        rows.append(
            dict(
                asks=name,
                n=len(t),
                unreadable=len(t) - len(ok),
                wrong_rate=(~ok.correct).mean(),
                wrong_rate_low=low,
                wrong_rate_high=high,
                sure=np.maximum(ok.p1, 1 - ok.p1).mean(),
                mass=t["mass"].mean(),
            )
        )
    return pd.DataFrame(rows)


def doubling_down(again: pd.DataFrame) -> pd.DataFrame:
    """Share that says its answer was true, by instruction and by whether it was (known rows only; Wilson 95 %)."""
    rows = []
    ok = again[again.first_knows & again.readable]
    for (asks, correct), t in ok.groupby(["asks", "first_correct"]):
        low, high = wilson_interval(int(t.answer.sum()), len(t))
        rows.append(
            dict(
                instruction=asks,
                answer="was true" if correct else "was false",
                n=len(t),
                says_true=t.answer.mean(),
                says_true_low=low,
                says_true_high=high,
            )
        )
    return pd.DataFrame(
        rows, columns=["instruction", "answer", "n", "says_true", "says_true_low", "says_true_high"]
    )


def doubling_down_gap(again: pd.DataFrame) -> dict[str, float]:
    """How much more often it calls its false answer true where it was told to lie than a true answer where it was told the truth (known examples; 95 % bootstrap over examples). Standing by a lie as by the truth: 0; owning up: below 0."""
    ok = again[again.first_knows & again.readable]
    lies, truths = (
        (ok.asks == a) & (ok.first_correct == c) for a, c in (("lie", False), ("truth", True))
    )
    if not lies.any() or not truths.any():
        return {}
    says = ok.answer.to_numpy(float)
    weights = bootstrap_weights(ok.example_id, 2000, 0)
    share = lambda rows: (weights[:, rows] @ says[rows]) / np.maximum(weights[:, rows].sum(1), 1)
    low, high = np.percentile(share(lies.to_numpy()) - share(truths.to_numpy()), [2.5, 97.5])
    return {
        "lies": says[lies].mean(),
        "truths": says[truths].mean(),
        "gap": says[lies].mean() - says[truths].mean(),
        "low": float(low),
        "high": float(high),
    }


SAID = 20
"""Tokens of a free continuation."""


def kept_and_dropped(
    examples: pd.DataFrame, behaviour: pd.DataFrame, dropped: dict
) -> pd.DataFrame:
    """Per data set, how many examples (and, from *low mass* on, scored rows) each rule leaves out, one rule after the other. `dropped` is `Run.dropped`."""
    rows = []
    for dataset, t in examples[examples.split != "shot"].groupby("dataset", sort=False):
        scored = behaviour[(behaviour.dataset == dataset) & behaviour.role.isin(["truth", "lie"])]
        read = scored[scored.readable]
        rows.append(
            {
                "dataset": dataset,
                "duplicates in the source": dropped["duplicates"].get(dataset, 0),
                "in a data set before it": dropped["in_another"].get(dataset, 0),
                "an organism was trained on it": dropped["trained_on"].get(dataset, 0),
                "examples taken": len(t),
                "too long": sum(i in set(dropped["too_long"]) for i in t.example_id),
                "control tokens": sum(i in set(dropped["control_tokens"]) for i in t.example_id),
                "choices begin alike in some template": sum(
                    i in set(dropped["choices_alike"]) for i in t.example_id
                ),
                "scored rows": len(scored),
                "low mass": int((scored["mass"] < MIN_MASS).sum()),
                "form of low mass": int((~scored.readable & (scored["mass"] >= MIN_MASS)).sum()),
                **{
                    f"unknown: {rule}": int((read.unknown_by == rule).sum())
                    for rule in ("data set refused", "wrong elsewhere", "margin")
                },
                "kept as known": int(read.knows.sum()),
            }
        )
    return pd.DataFrame(rows).set_index("dataset")


def forms(answers: pd.DataFrame) -> pd.DataFrame:
    """Choice mass by form of question (data set, template, instruction), the lowest first, and whether it passes the floor."""
    table = (
        answers.groupby(list(FORM))
        .agg(rows=("mass", "size"), mass=("mass", "mean"), lowest=("mass", "min"))
        .sort_values("mass")
    )
    return table.assign(passes=table["mass"] >= MIN_MASS)


def first_words(answers: pd.DataFrame, n: int = 6) -> pd.DataFrame:
    """The most common tokens that the model would really have said, by data set and by what was asked for."""
    counts = (
        answers.groupby(["dataset", "asks"])
        .top_token.value_counts(normalize=True)
        .groupby(level=[0, 1])
        .head(n)
    )
    listed = [(d, a, f"{token!r} {share:.0%}") for (d, a, token), share in counts.items()]
    return (
        pd.DataFrame(listed, columns=["dataset", "asks", "says"])
        .groupby(["dataset", "asks"])
        .says.agg(", ".join)
        .to_frame()
    )


@torch.no_grad()
def continuations(
    model: nn.Module, tokenizer, prompts: pd.DataFrame, n_tokens: int = SAID
) -> list[str]:
    """What the model goes on to say, freely and greedily, after each prompt."""
    batch = pad(prompts.input_ids, token=tokenizer.pad_token_id or 0, device=model.device)
    said = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=n_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    return [
        tokenizer.decode(s[batch["input_ids"].shape[1] :], skip_special_tokens=True) for s in said
    ]
