"""Binary questions with known answers: balanced by label, without repeats, split by hash."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dlk_utils.errors import DataError
from dlk_utils.questions.ids import EXAMPLE_COLUMNS, example_id, near_duplicate_key, split_of
from dlk_utils.questions.own_files import shortened, with_home
from dlk_utils.questions.sources import EMBEDDED, dataset_names, read_source
from dlk_utils.questions.subjects import split_by_subject


def load_examples(
    datasets: str | os.PathLike | Sequence[str | os.PathLike],
    n_examples: int,
    *,
    seed: int = 0,
    n_pool: int = 32,
) -> pd.DataFrame:
    """Load examples, balanced by label.

    Parameters
    ----------
    datasets
        Names, in a list or separated by commas: embedded data sets (see `dataset_names`); paths of
        your own files (see `own_files.read_own_file`); data sets of `hub_sets.yaml`, by name or
        as a local folder of that name. A `~` at the start of a path is the home folder.
    n_examples
        Largest number of examples of a data set, at least 4.
    seed
        Decides which examples are taken.
    n_pool
        Largest number of further examples of a data set that are kept to be shown solved (split
        "shot").

    Returns
    -------
    pandas.DataFrame
        Columns `example_id`, `dataset`, `kind`, `text`, `choice_0`, `choice_1`, `label`, `split`,
        `near_duplicate_key`, `subject` (see `ids.Example`). `attrs["sources"]` says where the rows
        that were read come from. Further `attrs` count rows of each data set:

        * `dropped_duplicates`: they repeat or contradict another row (or, in an embedded data set,
          are near-duplicates of another row).
        * `dropped_in_another`: an earlier data set has them, or has a near-duplicate in another
          split.
        * `dropped_trained_on`: an organism of this package was trained on them, on a
          near-duplicate, or on claims about the same subject (see `subjects`). This is never so in
          an embedded data set. `trained_on` says it in words, with the first row of each reason.
        * `near_duplicates`: another row has the same words in another spelling or with other signs.
          These are kept, in one split.

    Warns
    -----
    UserWarning
        If there are near-duplicates.

    Raises
    ------
    DataError
        If a name is unknown, a file is malformed (the error names file, column and row), or a data
        set has no example outside the shot pool, or none of a label because the others were left
        out.
    """
    if isinstance(n_examples, bool) or not isinstance(n_examples, int) or n_examples < 4:
        raise DataError(f"n_examples: expected a whole number of at least 4, got {n_examples!r}")
    names = _read_names(datasets)
    parts: list[pd.DataFrame] = []
    n_repeated, n_trained, n_taken, n_near, sources = {}, {}, {}, {}, {}
    left_out: dict[str, str] = {}
    split_of_taken: dict[str, str] = {}
    for name in names:
        source_rows = read_source(name)
        if source_rows.attrs["notes"]:
            print(f"{Path(name).name}: read as {'; '.join(source_rows.attrs['notes'])}")
        sources[name] = source_rows.attrs["source"]
        rows = _identified(source_rows, name)
        is_trained = rows.trained_on != ""
        is_taken = rows.example_id.isin({id_ for part in parts for id_ in part.example_id})
        # Embedded data and other data are split in other shares.
        split_before = rows.near_duplicate_key.map(split_of_taken)
        is_taken |= split_before.notna() & (split_before != rows.split)
        n_near[name] = _report_near_duplicates(name, rows)
        n_repeated[name] = len(source_rows) - len(rows)
        n_trained[name] = int(is_trained.sum())
        left_out[name] = trained_rows_in_words(rows)
        if left_out[name]:
            print(f"{Path(name).name}: {left_out[name]}")
        n_taken[name] = int((is_taken & ~is_trained).sum())
        rows = _shuffled(rows.loc[~is_trained & ~is_taken, EXAMPLE_COLUMNS], seed)
        queries = rows[~rows.split.isin(["shot", "organism"])]
        is_thinned = n_trained[name] + n_taken[name] > 0
        lost_a_label = is_thinned and queries.label.nunique() < source_rows.label.nunique()
        if queries.empty or lost_a_label:
            reasons = {
                "an organism was trained on them": n_trained[name],
                "an earlier data set has them": n_taken[name],
            }
            reasons_in_words = "".join(
                f"; left out: {n}, because {reason}" for reason, n in reasons.items() if n
            )
            both = " of both labels" if source_rows.label.nunique() == 2 else ""
            counts = queries.label.value_counts()
            got = ", ".join(f"{n} of label {label}" for label, n in counts.items()) or "none"
            raise DataError(
                f"{Path(name).name}: expected examples{both} outside the shot pool, got "
                f"{got}{reasons_in_words}; add rows, or use another data set"
            )
        parts.append(_balanced(queries, n_examples))
        parts.append(_balanced(rows[rows.split == "shot"], n_pool))
        for part in parts[-2:]:
            split_of_taken.update(zip(part.near_duplicate_key, part.split, strict=True))
    examples = pd.concat(parts, ignore_index=True)
    examples.attrs = {
        "dropped_duplicates": n_repeated,
        "dropped_in_another": n_taken,
        "dropped_trained_on": n_trained,
        "trained_on": left_out,
        "near_duplicates": n_near,
        "sources": sources,
    }
    return examples


def _read_names(datasets: Any) -> list[str]:
    """Return the names of data sets; refuse what is not a name, and what occurs twice."""
    if isinstance(datasets, os.PathLike):
        datasets = [datasets]
    names = datasets.split(",") if isinstance(datasets, str) else datasets
    is_list = isinstance(names, Iterable) and not isinstance(names, bytes | Mapping)
    names = list(names) if is_list else []
    if not is_list or not all(isinstance(name, str | os.PathLike) for name in names):
        raise DataError(
            "datasets: expected names or paths, separated by commas or as a list, got "
            f"{shortened(repr(datasets), 200)}"
        )
    names = [with_home(os.fspath(name).strip()) for name in names]
    if not names or len(set(names)) != len(names) or "" in names:
        raise DataError(
            "datasets: expected different names, separated by commas, got "
            f"{shortened(repr(datasets), 200)}"
        )
    if same := names_of_same_file(names):
        raise DataError(f"datasets: expected each file once, got {same}; remove one of them")
    return names


def names_of_same_file(names: Sequence[str]) -> str:
    """Say which two paths are those of one file or folder, also through a link; "" if none are."""
    first_name: dict[str, str] = {}
    for name in names:
        if name in EMBEDDED or not os.path.exists(name):
            continue
        other = first_name.setdefault(os.path.realpath(name), name)
        if other != name:
            return f"one file under two names, {shortened(other)} and {shortened(name)}"
    return ""


def training_examples(name: str, n_examples: int, *, seed: int = 0) -> pd.DataFrame:
    """Return examples to train an organism on, which no run ever asks, balanced by label.

    They are at most `n_examples` of the split "organism" of an embedded data set, with the columns
    of `load_examples`. Where the data set makes claims about subjects (countries, cities, things),
    the split of a subject goes by its first claim, and more is claimed of those in that split.
    """
    if name not in EMBEDDED:
        raise DataError(f"dataset: expected one of {', '.join(dataset_names())}, got {name!r}")
    source = EMBEDDED[name]
    rows = _identified(source.rows(), name)
    rows = rows[rows.split == "organism"]
    if source.claims_per_subject > 1:
        rows = _identified(source.training_rows(rows.text), name).assign(split="organism")
    rows = _shuffled(_balanced(rows, n_examples), seed)
    return rows[EXAMPLE_COLUMNS].reset_index(drop=True)


def _identified(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Add ids and splits, and `trained_on` (see `split_by_subject`), which is "" if embedded.

    Repeated content is kept once, or not at all if its labels differ.
    """
    contents = list(zip(rows.text, rows.choice_0, rows.choice_1, strict=True))
    rows = rows.assign(
        example_id=[example_id(*content) for content in contents],
        near_duplicate_key=[near_duplicate_key(*content) for content in contents],
        dataset=name,
    )
    # Of embedded data we know that near-duplicates mean the same.
    identity = "near_duplicate_key" if name in EMBEDDED else "example_id"
    n_labels = rows.groupby(identity).label.transform("nunique")
    rows = rows[n_labels == 1].drop_duplicates(identity)
    if name in EMBEDDED:
        # These are split so that no training example is ever asked.
        keys = rows.near_duplicate_key
        rows = rows.assign(subject=keys, split=keys.map(split_of), trained_on="")
    else:
        rows = rows.assign(**split_by_subject(rows))
    return rows[[*EXAMPLE_COLUMNS, "trained_on"]]


def trained_rows_in_words(rows: pd.DataFrame) -> str:
    """Say how many rows are left out because of which training; "" if none are.

    `rows` has `text` and the `trained_on` of `split_by_subject`.
    """
    reasons = {
        "city": "name a city",
        "country": "name a country and its capital",
        "thing": "are about a thing",
        "near-duplicate": "are near-duplicates of a training row",
    }
    parts = []
    for trained_on, reason in reasons.items():
        texts = rows.text[rows.trained_on == trained_on]
        if len(texts):
            parts.append(f"{len(texts):,} that {reason} (first: {shortened(texts.iloc[0])})")
    if not parts:
        return ""
    n_trained = (rows.trained_on != "").sum()
    return (
        f"left out {n_trained:,} of {len(rows):,} rows because an organism of this package was "
        f"trained on what they are about: {', '.join(parts)}"
    )


def _report_near_duplicates(name: str, rows: pd.DataFrame) -> int:
    """Count the rows whose words are those of another row, and warn if there are some."""
    near = rows[rows.near_duplicate_key.duplicated(keep=False)]
    if near.empty:
        return 0
    by_key = near.groupby("near_duplicate_key", sort=False)
    n_labels = by_key.label.transform("nunique")
    # The two to show are those that most need a look.
    key = near.near_duplicate_key[n_labels.idxmax()]
    first, second = near.text[near.near_duplicate_key == key].head(2).map(shortened)
    n_also_in_label = (n_labels > 1).sum()
    warnings.warn(
        f"{Path(name).name}: {len(near)} rows differ from another row only in spelling, "
        f"punctuation or signs, {n_also_in_label} of them also in the label (such as {first} and "
        f"{second}); all are kept, near-duplicates in one split",
        stacklevel=3,
    )
    return len(near)


def _shuffled(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Order rows by a hash of the seed and the content, whatever the other rows are."""
    keys = rows.near_duplicate_key
    order = [hashlib.sha256(f"order:{seed}:{key}".encode()).hexdigest() for key in keys]
    return rows.assign(order=order).sort_values(["order", "example_id"]).drop(columns="order")


def _balanced(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """Take the first `n` rows, half of each label. With an odd `n`, label 1 has one row more.

    If all rows have the same label, the first `n` of them are taken.
    """
    labels = sorted(rows.label.unique())
    most = {label: (n + i) // len(labels) for i, label in enumerate(labels)}
    return rows[rows.groupby("label").cumcount() < rows.label.map(most)]
