"""What a run has too few rows for: said at the top of each page, where nothing is then claimed.

The least numbers of rows are those of `evaluation.tasks.least_rows`, which asks the probes. A score
on few test rows says little, so a page of scores takes `MIN_FOR_HEADLINE` of either class.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dlk_utils.evaluation.behaviour import MIN_MASS
from dlk_utils.evaluation.tasks import (
    LYING,
    MIN_FOR_HEADLINE,
    REGIMES,
    least_rows,
    select_rows,
    shortages,
)
from dlk_utils.lab.run import Run
from dlk_utils.probes.base import LeastRows
from dlk_utils.questions.ids import share_of

TOO_FEW = "too few rows for a claim"
SPLITS = ("train", "validation", "test")


def show_missing(
    run: Run, *, answered: bool = True, probes: bool = True, scored: bool = False
) -> list[str]:
    """Print what the run has too few rows for, at the top of a page, and return it.

    Parameters
    ----------
    run
        The run.
    answered
        Whether to ask the model. Without its answers the prompts alone are counted.
    probes
        Whether the page needs the rows of the main task.
    scored
        Whether the page scores probes on test rows.

    Returns
    -------
    list of str
        A sentence for each thing that keeps the run from a claim; empty if nothing does. Data sets
        without a row to show solved are printed, but keep nothing from being claimed.
    """
    missing = missing_rows(run, answered=answered, probes=probes, scored=scored)
    if missing:
        print("Too few rows for a claim: this page claims nothing.")
    for sentence in [*missing, *_without_shots(run.examples)]:
        print("-", sentence)
    return missing


def claim(text: str, missing: Sequence[str]) -> str:
    """Return a text that claims something, or `TOO_FEW` if the run is `missing` what it needs."""
    return TOO_FEW if missing else text


def conclusions(lines: Sequence[str], missing: Sequence[str]) -> str:
    """Write what a page found as Markdown, or that it claims nothing."""
    if missing:
        return (
            f"* **Nothing is claimed**: {TOO_FEW}. The first lines of this page say what it takes."
        )
    return "\n".join(lines) or "* Nothing was scored."


def missing_rows(
    run: Run, *, answered: bool = True, probes: bool = True, scored: bool = False
) -> list[str]:
    """Say in a sentence each what keeps a run from a claim; see `show_missing`."""
    sentences = _of_one_label(run.examples)
    rows = run.prompts
    if answered:
        if not run.answers.readable.any():
            return [*sentences, _nothing_readable(run.answers)]
        rows = run.truth_rows
    if not probes or len(sentences) == run.examples.dataset.nunique():
        # Of one label alone there can be any number of examples: none of them helps.
        return sentences
    fit_role, test_role = REGIMES[LYING]
    parts = {
        split: select_rows(rows, test_role if split == "test" else fit_role, split)
        for split in SPLITS
    }
    least = least_rows("truth")
    if scored:
        least["test"] = LeastRows(MIN_FOR_HEADLINE, 2 * MIN_FOR_HEADLINE)
    found = shortages(parts, least=least, column="label")
    if not found:
        return sentences
    what = "readable rows of the usable data sets" if answered else "rows"
    sentences.append(
        f"For the main task (truth, {LYING}) these {what} are missing: "
        + "; ".join(shortage.in_words for shortage in found)
        + "."
    )
    further = max(
        _further_examples(shortage.split, max(shortage.per_class.values()), parts[shortage.split])
        for shortage in found
    )
    sentences.append(_how_to_get(run, further))
    return sentences


def _shown(dataset: str) -> str:
    """The name of a data set; of a file without its folders."""
    path = Path(dataset)
    return path.name if path.is_file() else dataset


def _of_one_label(examples: pd.DataFrame) -> list[str]:
    """A sentence for each data set whose examples all have the same label."""
    sentences = []
    asked = examples[examples.split != "shot"]
    for name, labels in asked.groupby("dataset", sort=False).label:
        if labels.nunique() == 1:
            label = labels.iloc[0]
            sentences.append(
                f"{_shown(name)}: all {len(labels)} examples have the label {label}. Whether the "
                "model knows them, or a probe reads them, can only be told with as many of label "
                f"{1 - label}: add {len(labels)}."
            )
    return sentences


def _nothing_readable(answers: pd.DataFrame) -> str:
    return (
        f"None of {len(answers)} answers is readable: at least {MIN_MASS:.0%} of the probability "
        f"has to be on the two choices, in the row and on average over its form of question; here "
        f"a row has {answers['mass'].mean():.1%} in the mean. More rows do not help: take a model "
        "that answers in a chat, or data sets whose questions it answers."
    )


def _further_examples(split: str, n_missing: int, rows: pd.DataFrame) -> int:
    """How many further examples of a data set bring so many rows of each class into a split."""
    rows_of_example = max(1.0, len(rows) / max(1, rows.example_id.nunique()))
    return math.ceil(2 * n_missing / rows_of_example / share_of(split))


def _how_to_get(run: Run, further: int) -> str:
    """Say where further examples come from: a larger `n_examples`, or a longer data set."""
    asked = run.examples[run.examples.split != "shot"].groupby("dataset", sort=False).size()
    can_give_more = [name for name, n in asked.items() if n >= run.n_examples]
    sentence = f"About {further} more examples would do"
    if can_give_more:
        per_dataset = math.ceil(further / len(can_give_more))
        return (
            f"{sentence}: n_examples = {run.n_examples + per_dataset} instead of {run.n_examples}."
        )
    in_file = math.ceil(further / (1 - share_of("shot")))
    names = ", ".join(map(_shown, asked.index))
    return (
        f"{sentence}, and the data sets have no more ({names}): add about {in_file} rows, as one "
        "row in six is kept to be shown solved."
    )


def _without_shots(examples: pd.DataFrame) -> list[str]:
    """A sentence for each data set that has no example to be shown solved."""
    sentences = []
    for name, splits in examples.groupby("dataset", sort=False).split:
        if not (splits == "shot").any():
            sentences.append(
                f"{_shown(name)}: no row fell into the pool of shots, so that nothing of it is "
                "asked with solved examples. By hash one row in six does: of 17 more, one does 95 "
                "times in 100."
            )
    return sentences
