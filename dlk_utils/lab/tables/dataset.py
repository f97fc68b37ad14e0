"""Tables of notebook 01: how varied and how balanced the prompts are."""

import numpy as np
import pandas as pd
from scipy.stats import entropy
from scipy.stats.contingency import association

from dlk_utils.questions.templates import KINDS, prompt_library


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
            rows.append(
                {
                    "dataset": dataset,
                    "of": column,
                    "used": len(counts),
                    "in the library": _in_library(t, column),
                    "rarest": int(counts.min()),
                    "entropy (bits)": bits,
                    "of the most": bits / np.log2(len(counts)) if len(counts) > 1 else 0.0,
                    "Cramér's V": v,
                }
            )
    return pd.DataFrame(rows).set_index(["dataset", "of"])


def _in_library(twins: pd.DataFrame, column: str) -> int:
    """How many templates of a data set's kind there are, or instructions (families of them) that ask for the truth or for a lie."""
    if column == "template":
        return next(
            (
                len(prompt_library(k))
                for k in KINDS
                if twins.template.iloc[0] in prompt_library(k).index
            ),
            0,
        )
    said = prompt_library("instructions")[lambda t: t.asks.isin(twins.asks)]
    return said["name" if column == "instruction" else column].nunique()


def balance(prompts: pd.DataFrame) -> pd.DataFrame:
    """Share of label 1 in each stratum (data set, split, template) of the scored examples, with its size: far from a half in a large stratum is a leak."""
    one = prompts[prompts.role == "truth"]
    return (
        one.groupby(["dataset", "split", "template"])
        .agg(examples=("label", "size"), label_1=("label", "mean"))
        .reset_index()
    )
