"""Tables of notebook 01: how choices are read, and how varied and balanced the prompts are."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import entropy
from scipy.stats.contingency import association

from dlk_utils.questions.choices import spellings
from dlk_utils.questions.templates import KINDS, prompt_library


def variety(prompts: pd.DataFrame) -> pd.DataFrame:
    """Tabulate how varied templates, instructions and families are over the scored rows.

    Returns
    -------
    DataFrame
        For each `dataset` and column (`of`): how many values are used, how many there are in the
        library (some instructions are for prompts with shots alone), how often the rarest is used,
        the entropy in bits and as a share of the most that is possible, and Cramér's V with being
        told to lie. That is 0 for the template, which twins share, and 1 for the instruction,
        which is what tells them apart.
    """
    twins = prompts[prompts.role.isin(["truth", "lie"])]
    rows = []
    for dataset, part in twins.groupby("dataset", sort=False):
        for column in ("template", "instruction", "family"):
            counts = part[column].value_counts()
            bits = float(entropy(counts, base=2))
            rows.append(
                {
                    "dataset": dataset,
                    "of": column,
                    "used": len(counts),
                    "in the library": _library_size(part, column),
                    "rarest": int(counts.min()),
                    "entropy (bits)": bits,
                    "of the most": bits / np.log2(len(counts)) if len(counts) > 1 else 0.0,
                    "Cramér's V": cramers_v(part[column], part.asks),
                }
            )
    return pd.DataFrame(rows)


def _library_size(twins: pd.DataFrame, column: str) -> int:
    """How many templates of a data set's kind, or instructions or families, could be used."""
    if column == "template":
        libraries = [prompt_library(kind) for kind in KINDS]
        template = twins.template.iloc[0]
        return next((len(library) for library in libraries if template in library.index), 0)
    instructions = prompt_library("instructions")
    instructions = instructions[instructions.asks.isin(twins.asks)]
    return instructions["name" if column == "instruction" else column].nunique()


def balance(prompts: pd.DataFrame) -> pd.DataFrame:
    """Tabulate size and share of label 1 by data set, split and template, over scored examples.

    A share far from a half in a large stratum is a leak.
    """
    examples = prompts[prompts.role == "truth"]
    strata = examples.groupby(["dataset", "split", "template"])
    return strata.agg(examples=("label", "size"), label_1=("label", "mean")).reset_index()


def cramers_v(one: pd.Series, other: pd.Series) -> float:
    """Measure how far one column tells another: 0 not at all (or if it has one value), 1 fully."""
    table = pd.crosstab(one, other)
    return association(table, method="cramer") if min(table.shape) > 1 else 0.0


def choice_readings(prompts: pd.DataFrame, tokenizer: Any) -> pd.DataFrame:
    """Tabulate, by template, which tokens count as each choice, and why each of them does."""
    rows = []
    for row in prompts.sort_values("template").drop_duplicates("template").itertuples():
        reading = {"template": row.template}
        for number in (0, 1):
            reading[f"choice {number}"] = row.choices[number]
            reading[f"counts as {number}"] = _reading(row, number, tokenizer)
        rows.append(reading)
    return pd.DataFrame(rows)


def _reading(row: Any, number: int, tokenizer: Any) -> str:
    """The tokens that count as one choice of a prompt row."""
    if row.choice_tokens is not None:
        whole = [repr(tokenizer.decode(ids)) for ids in row.choice_tokens[number]]
        return ", ".join(f"{text} (all its tokens)" for text in whole)
    written = {token: "as written here" for token in row.choice_ids[number]}
    reasons = written | spellings(tokenizer, row.choices[number])
    tokens = row.choice_ids[number]
    return ", ".join(f"{tokenizer.decode([token])!r} ({reasons[token]})" for token in tokens)


def first_prompts_of_top_instructions(
    prompts: pd.DataFrame, *, n_instructions: int = 2, n_prompts: int = 3
) -> pd.DataFrame:
    """Select the first prompts of the instructions that are used most."""
    counts = prompts.instruction.value_counts().sort_index()
    most_used = counts.sort_values(ascending=False, kind="stable").index[:n_instructions]
    return pd.concat(
        prompts[prompts.instruction == instruction].head(n_prompts) for instruction in most_used
    )
