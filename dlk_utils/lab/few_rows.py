"""Say at the top of a notebook page what its run has too few rows for.

A page with too few rows makes no claim: `show_missing` prints what is missing, and `claim` and
`conclusions` replace the findings of the page. `evaluation.tasks.least_rows` says how many rows the
probes need. A page of scores also needs `MIN_FOR_HEADLINE` test rows of either class, because a
score on few rows says little.
"""

import math
from collections.abc import Iterable, Sequence
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
ONE_LABEL = "a data set has examples of one label only"
NOTHING_READABLE = "no answer of the model is readable"


class Missing(list[str]):
    """Sentences that say what keeps a run from a claim; empty if nothing does.

    Attributes
    ----------
    reason
        The same in a few words: `TOO_FEW`, or one that more rows of the same kind do not change,
        `ONE_LABEL` or `NOTHING_READABLE`.
    """

    def __init__(self, sentences: Iterable[str] = (), reason: str = TOO_FEW):
        super().__init__(sentences)
        self.reason = reason


def show_missing(
    run: Run, *, answered: bool = True, probes: bool = True, scored: bool = False
) -> Missing:
    """Print what keeps a run from a claim, and return it.

    Parameters
    ----------
    run
        The run that the page shows.
    answered
        Whether to count the rows with a readable answer, for which the model has to run. Otherwise
        all prompts are counted.
    probes
        Whether the page fits probes, and so needs enough rows for the main task.
    scored
        Whether the page scores probes, and so needs enough test rows for a headline.

    Returns
    -------
    Missing
        The sentences that say what is missing; empty if the page can make its claims. Data sets
        without an example for the shots are printed too, but are not returned: they do not keep the
        page from a claim.
    """
    missing = missing_rows(run, answered=answered, probes=probes, scored=scored)
    if missing:
        print(f"{missing.reason[0].upper()}{missing.reason[1:]}: this page claims nothing.")
    for sentence in [*missing, *_sentences_without_shots(run.examples)]:
        print("-", sentence)
    return missing


def claim(text: str, missing: Sequence[str]) -> str:
    """Return the text of a claim, or the reason why something is `missing` (see `show_missing`)."""
    return _reason(missing) if missing else text


def conclusions(lines: Sequence[str], missing: Sequence[str]) -> str:
    """Return the findings of a page as Markdown, or a line that it claims nothing.

    Parameters
    ----------
    lines
        The findings, each an item of a Markdown list.
    missing
        What `show_missing` returned.
    """
    if missing:
        return (
            f"* **Nothing is claimed**: {_reason(missing)}. The first lines of this page say what "
            "it takes."
        )
    return "\n".join(lines) or "* Nothing was scored."


def skipped_lines(skipped: Sequence[str], missing: Sequence[str]) -> list[str]:
    """Return the sentences about skipped tasks to print.

    Where more rows do not help, all tasks are skipped for the same reason. It is given once.
    """
    reason = _reason(missing)
    if not missing or reason == TOO_FEW or not skipped:
        return [f"skipped: {sentence}" for sentence in skipped]
    return [f"skipped: {len(skipped)} tasks, as {reason}"]


def _reason(missing: Sequence[str]) -> str:
    return missing.reason if isinstance(missing, Missing) else TOO_FEW


def missing_rows(
    run: Run, *, answered: bool = True, probes: bool = True, scored: bool = False
) -> Missing:
    """Return a sentence for each thing that keeps a run from a claim.

    The arguments are those of `show_missing`.
    """
    sentences = Missing(_sentences_of_one_label(run.examples), ONE_LABEL)
    rows = run.prompts
    if answered:
        if not run.answers.readable.any():
            nothing = _sentence_if_nothing_is_readable(run.answers)
            return Missing([*sentences, nothing], NOTHING_READABLE)
        rows = run.truth_rows
    if not probes:
        return sentences
    if len(sentences) == run.examples.dataset.nunique():
        # Every data set has one label only. More examples of the same label would not help.
        return sentences

    rows_by_split = _rows_of_main_task(rows)
    least = least_rows("truth")
    if scored:
        least["test"] = LeastRows(MIN_FOR_HEADLINE, 2 * MIN_FOR_HEADLINE)
    too_small = shortages(rows_by_split, least=least, column="label")
    if not too_small:
        return sentences
    what = "readable rows of the usable data sets" if answered else "rows"
    in_words = "; ".join(shortage.in_words for shortage in too_small)
    sentences.reason = TOO_FEW
    sentences.append(f"For the main task (truth, {LYING}) these {what} are missing: {in_words}.")
    n_further = max(
        _n_further_examples(
            shortage.split, max(shortage.per_class.values()), rows_by_split[shortage.split]
        )
        for shortage in too_small
    )
    sentences.append(_remedy(run, n_further))
    return sentences


def _rows_of_main_task(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of each split: probes are fitted on honest rows, and tested on lie rows."""
    fit_role, test_role = REGIMES[LYING]
    role_of_split = {"train": fit_role, "validation": fit_role, "test": test_role}
    return {split: select_rows(rows, role, split) for split, role in role_of_split.items()}


def _display_name(dataset: str) -> str:
    """Return the name of a data set, or the name of its file without the folders."""
    path = Path(dataset)
    return path.name if path.is_file() else dataset


def _asked_examples(examples: pd.DataFrame) -> pd.DataFrame:
    """Leave out the examples that are only shown as shots, with their answers."""
    return examples[examples.split != "shot"]


def _sentences_of_one_label(examples: pd.DataFrame) -> list[str]:
    """Write a sentence for each data set whose examples all have the same label."""
    sentences = []
    for name, labels in _asked_examples(examples).groupby("dataset", sort=False).label:
        if labels.nunique() == 1:
            label = labels.iloc[0]
            which = f"all {len(labels)} examples have"
            if len(labels) == 1:
                which = "the only example has"
            sentences.append(
                f"{_display_name(name)}: {which} the label {label}. "
                "To see whether the model knows them, or a probe reads them, add as many of label "
                f"{1 - label} ({len(labels)})."
            )
    return sentences


def _sentence_if_nothing_is_readable(answers: pd.DataFrame) -> str:
    return (
        f"None of {len(answers)} answers is readable: at least {MIN_MASS:.0%} of the probability "
        f"has to be on the two choices, in the row and on average over its form of question; here "
        f"the mean over the rows is {answers['mass'].mean():.1%}. More rows do not help: use a "
        "model that answers in a chat, or data sets whose questions it answers."
    )


def _n_further_examples(split: str, n_missing: int, rows: pd.DataFrame) -> int:
    """Estimate how many more examples a run needs, so that a split has enough rows.

    Parameters
    ----------
    split
        The split that has too few rows.
    n_missing
        How many rows are missing of the class that lacks most.
    rows
        The rows that the split has.
    """
    rows_per_example = max(1.0, len(rows) / max(1, rows.example_id.nunique()))
    # Half of the examples have the class that lacks most.
    return math.ceil(2 * n_missing / rows_per_example / share_of(split))


def _remedy(run: Run, n_further: int) -> str:
    """Say how to get more examples: by a larger `n_examples`, or by more rows in the data sets."""
    n_asked = _asked_examples(run.examples).groupby("dataset", sort=False).size()
    # A data set that gave fewer examples than it was asked for has no more.
    may_have_more = [name for name, n in n_asked.items() if n >= run.n_examples]
    sentence = f"About {n_further} more examples would do"
    if may_have_more:
        n_examples = run.n_examples + math.ceil(n_further / len(may_have_more))
        per_set = " (for each data set)" if len(n_asked) > 1 else ""
        return f"{sentence}: n_examples = {n_examples} instead of {run.n_examples}{per_set}."
    # Some of the added rows become shots, and are not asked.
    n_added = math.ceil(n_further / (1 - share_of("shot")))
    names = ", ".join(map(_display_name, n_asked.index))
    return (
        f"{sentence}, but the data sets have no more ({names}): add about {n_added} rows, as one "
        "row in six is kept to be shown as a solved example."
    )


def _sentences_without_shots(examples: pd.DataFrame) -> list[str]:
    """Write a sentence for each data set that has no example to be shown as a shot."""
    sentences = []
    for name, splits in examples.groupby("dataset", sort=False).split:
        if not (splits == "shot").any():
            sentences.append(
                f"{_display_name(name)}: no row fell into the pool of shots, so none of its "
                "questions is asked with solved examples. A hash puts one row in six there: of 17 "
                "more rows, at least one falls there with a probability of 95 %."
            )
    return sentences
