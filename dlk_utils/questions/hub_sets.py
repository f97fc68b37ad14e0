"""Data sets of the Hugging Face hub as binary questions, by the rules of `hub_sets.yaml`."""

import functools
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml

from dlk_utils.errors import DataError
from dlk_utils.models import hub
from dlk_utils.provenance import hash_files
from dlk_utils.questions.ids import near_duplicate_key
from dlk_utils.questions.own_files import SUFFIXES, listed, shortened
from dlk_utils.questions.templates import render

_UNKNOWN = "unknown"


@functools.cache
def hub_sets() -> dict[str, dict[str, Any]]:
    """Return the rules of `hub_sets.yaml`: what is loaded, and how its rows become questions."""
    path = files("dlk_utils.questions").joinpath("hub_sets.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        # A name that is too long for a path.
        return False


def _rule_of(name: str, embedded_names: Sequence[str]) -> dict[str, Any]:
    """Return the rule of a data set; raises `DataError` if there is none of that name."""
    rule = hub_sets().get(Path(name).name if _is_folder(name) else name)
    if rule is None:
        kind = ", which is a folder" if _is_folder(name) else ""
        hint = " (to use the files of a folder, name each file)" if kind else ""
        raise DataError(
            f"unknown data set {shortened(name)}{kind}{hint}; {_alternatives(embedded_names)}"
        )
    return rule


def _alternatives(embedded_names: Sequence[str]) -> str:
    return (
        f"offline there are {', '.join(embedded_names)} and your own {', '.join(SUFFIXES)}; from "
        f"the hub, or from a local folder so named, {', '.join(hub_sets())}"
    )


def hub_source(name: str, *, embedded_names: Sequence[str]) -> dict[str, str]:
    """Say where the rows come from, and by which rule they become questions.

    That is a hub id and commit, or a hash of a local folder's files. Raises `DataError`, which
    offers `embedded_names` instead, if there is no data set of that name.
    """
    rule = _rule_of(name, embedded_names)
    record = {"rule": json.dumps(rule, sort_keys=True)}
    if _is_folder(name):
        # Not `.git` and `.cache`, which change without the rows.
        paths = [path for path in Path(name).glob("[!.]*") if path.is_file()]
        paths += [path for path in Path(name).glob("[!.]*/**/*") if path.is_file()]
        digest = hash_files(Path(name), paths)
        return {"folder": Path(name).name, "xxh3_128": digest} | record
    try:
        return {"hub": rule["hub_id"], "commit": hub.commit(rule["hub_id"], "dataset")} | record
    except Exception:
        # What cannot be reached cannot be read either, and `read_hub_set` says so.
        return {"hub": rule["hub_id"], "commit": _UNKNOWN} | record


def read_hub_set(name: str, *, embedded_names: Sequence[str]) -> pd.DataFrame:
    """Read a data set of `hub_sets.yaml`, by its name or from a local folder of that name.

    Returns rows with `kind`, `text`, `label`, `choice_0` and `choice_1`; `attrs["source"]` is what
    `hub_source` says of what was read. Raises `DataError` if it cannot be read (the error offers
    `embedded_names` instead), or if a local folder changed meanwhile.
    """
    rule = _rule_of(name, embedded_names)
    source = hub_source(name, embedded_names=embedded_names)
    try:
        records = _load(name, rule, source)
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else ""
        if _is_folder(name) and _has_lfs_pointers(Path(name)):
            reason = "its files are pointers of Git LFS; run `git lfs pull` in the folder"
        raise DataError(
            f"{Path(name).name}: could not be read ({type(error).__name__}: {reason}); "
            f"{_alternatives(embedded_names)}"
        ) from None
    rows = pd.DataFrame([_make_row(name, rule, dict(record)) for record in records])
    if _is_folder(name) and hub_source(name, embedded_names=embedded_names) != source:
        raise DataError(f"{Path(name).name}: the folder changed while it was read; start again")
    # A test set without labels has label -1.
    rows = rows[rows.label >= 0].reset_index(drop=True)
    rows.attrs["source"] = source
    return rows


def _load(name: str, rule: dict[str, Any], source: dict[str, str]) -> Any:
    # Heavy, and needed for these data sets only.
    import datasets

    config = rule.get("config")
    if not _is_folder(name):
        commit = source["commit"]
        if commit == _UNKNOWN:
            # This says why.
            commit = hub.commit(rule["hub_id"], "dataset")
        return datasets.load_dataset(rule["hub_id"], config, revision=commit, split=rule["split"])
    # A clone may hold an old loading script of the folder's name, which `datasets` refuses to run,
    # beside the data. By the path "folder/." it looks for the data alone. Nothing is checked
    # against the numbers of rows that an old clone may state.
    folder = str(Path(name)) + "/."
    # A folder may be a clone of a repository with several configurations, or hold one set alone.
    if config not in datasets.get_dataset_config_names(folder):
        config = None
    return datasets.load_dataset(folder, config, split=rule["split"], verification_mode="no_checks")


def _has_lfs_pointers(folder: Path) -> bool:
    pointer = b"version https://git-lfs"
    for path in folder.rglob("*.parquet"):
        with open(path, "rb") as file:
            if file.read(len(pointer)) == pointer:
                return True
    return False


def _make_row(name: str, rule: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Turn a record into a question. Its label and targets are taken out before it is rendered."""
    label = record.pop(rule["label"], None) if "label" in rule else None
    targets = record.pop(rule["targets"], None) if "targets" in rule else None
    choices = ("", "")
    try:
        text = render(rule["text"], record).strip()
        if targets is not None:
            right, wrong = (
                targets["choices"][list(targets["labels"]).index(value)] for value in (1, 0)
            )
            # The right choice comes first in the data: a hash decides which of the two is choice 1.
            label = int(near_duplicate_key(text, *sorted((right, wrong))), 16) % 2
            choices = (wrong, right) if label else (right, wrong)
        elif int(label) >= 0:
            label = int(label == rule.get("label_1", 1))
    except (KeyError, TypeError, ValueError, jinja2.UndefinedError) as error:
        raise DataError(
            f"{Path(name).name}: expected columns for {rule['text']!r} and "
            f"{rule.get('label') or rule.get('targets')!r}, got {listed(sorted(record))} "
            f"({shortened(error, 120)})"
        ) from None
    choice_0, choice_1 = choices
    return {
        "kind": rule["kind"],
        "text": text,
        "choice_0": choice_0,
        "choice_1": choice_1,
        "label": int(label),
    }
