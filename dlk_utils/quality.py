"""A sanity check of each data set before anyone believes a number: what was dropped, how varied the prompts are, what the model really says."""

import numpy as np
import pandas as pd
import torch
from scipy.stats import entropy
from scipy.stats.contingency import association
from torch import nn

from dlk_utils.behaviour import FORM, MIN_MASS
from dlk_utils.extract import pad
from dlk_utils.library import KINDS, library

SAID = 20
"""Tokens of a free continuation."""


def kept_and_dropped(examples: pd.DataFrame, behaviour: pd.DataFrame, dropped: dict) -> pd.DataFrame:
    """Per data set, how many examples (and, from *low mass* on, scored rows) each rule leaves out, one rule after the other. `dropped` is `Run.dropped`."""
    rows = []
    for dataset, t in examples[examples.split != "shot"].groupby("dataset", sort=False):
        scored = behaviour[(behaviour.dataset == dataset) & behaviour.role.isin(["truth", "lie"])]
        read = scored[scored.readable]
        rows.append({
            "dataset": dataset, "duplicates in the source": dropped["duplicates"].get(dataset, 0), "in a data set before it": dropped["in_another"].get(dataset, 0), "an organism was trained on it": dropped["trained_on"].get(dataset, 0), "examples taken": len(t),
            "too long": sum(i in set(dropped["too_long"]) for i in t.example_id), "control tokens": sum(i in set(dropped["control_tokens"]) for i in t.example_id),
            "choices begin alike in some template": sum(i in set(dropped["choices_alike"]) for i in t.example_id),
            "scored rows": len(scored), "low mass": int((scored["mass"] < MIN_MASS).sum()), "form of low mass": int((~scored.readable & (scored["mass"] >= MIN_MASS)).sum()),
            **{f"unknown: {rule}": int((read.unknown_by == rule).sum()) for rule in ("data set refused", "wrong elsewhere", "margin")}, "kept as known": int(read.knows.sum()),
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("dataset")


def forms(answers: pd.DataFrame) -> pd.DataFrame:
    """Choice mass by form of question (data set, template, instruction), the lowest first, and whether it passes the floor."""
    table = answers.groupby(list(FORM)).agg(rows=("mass", "size"), mass=("mass", "mean"), lowest=("mass", "min")).sort_values("mass")
    return table.assign(passes=table["mass"] >= MIN_MASS)


def variety(prompts: pd.DataFrame) -> pd.DataFrame:
    """Of template, instruction and family, over the scored rows: how many are used and how many there are (some instructions are for prompts with shots alone), entropy (bits; and as a share of the most that is possible), and
    Cramér's V with being told to lie: 0 for the template, which twins share; 1 for the instruction, which is what tells it."""
    twins, rows = prompts[prompts.role.isin(["truth", "lie"])], []
    for dataset, t in twins.groupby("dataset", sort=False):
        for column in ("template", "instruction", "family"):
            counts = t[column].value_counts()
            bits = float(entropy(counts, base=2))
            table = pd.crosstab(t[column], t.asks)
            v = association(table, method="cramer") if min(table.shape) > 1 else 0.0
            rows.append({"dataset": dataset, "of": column, "used": len(counts), "in the library": _in_library(t, column), "rarest": int(counts.min()), "entropy (bits)": bits, "of the most": bits / np.log2(len(counts)) if len(counts) > 1 else 0.0, "Cramér's V": v})  # fmt: skip
    return pd.DataFrame(rows).set_index(["dataset", "of"])


def _in_library(twins: pd.DataFrame, column: str) -> int:
    """How many templates of a data set's kind there are, or instructions (families of them) that ask for the truth or for a lie."""
    if column == "template":
        return next((len(library(k)) for k in KINDS if twins.template.iloc[0] in library(k).index), 0)
    said = library("instructions")[lambda t: t.asks.isin(twins.asks)]
    return said["name" if column == "instruction" else column].nunique()


def balance(prompts: pd.DataFrame) -> pd.DataFrame:
    """Share of label 1 in each stratum (data set, split, template) of the scored examples, with its size: far from a half in a large stratum is a leak."""
    one = prompts[prompts.role == "truth"]
    return one.groupby(["dataset", "split", "template"]).agg(examples=("label", "size"), label_1=("label", "mean")).reset_index()


def first_words(answers: pd.DataFrame, n: int = 6) -> pd.DataFrame:
    """The most common tokens that the model would really have said, by data set and by what was asked for."""
    counts = answers.groupby(["dataset", "asks"]).top_token.value_counts(normalize=True).groupby(level=[0, 1]).head(n)
    listed = [(d, a, f"{token!r} {share:.0%}") for (d, a, token), share in counts.items()]
    return pd.DataFrame(listed, columns=["dataset", "asks", "says"]).groupby(["dataset", "asks"]).says.agg(", ".join).to_frame()


@torch.no_grad()
def continuations(model: nn.Module, tokenizer, prompts: pd.DataFrame, n_tokens: int = SAID) -> list[str]:
    """What the model goes on to say, freely and greedily, after each prompt."""
    batch = pad(prompts.input_ids, token=tokenizer.pad_token_id or 0, device=model.device)
    said = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=n_tokens, do_sample=False,
        temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )  # fmt: skip
    return [tokenizer.decode(s[batch["input_ids"].shape[1] :], skip_special_tokens=True) for s in said]
