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
from dlk_utils.questions.ids import example_id
from dlk_utils.questions.templates import render


@functools.cache
def hub_sets() -> dict[str, dict[str, Any]]:
    """Return the rules of `hub_sets.yaml`: what is loaded, and how its rows become questions."""
    path = files("dlk_utils.questions").joinpath("hub_sets.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _rule_of(name: str) -> dict[str, Any] | None:
    return hub_sets().get(Path(name).name if Path(name).is_dir() else name)


def hub_source(name: str) -> dict[str, str]:
    """Say where the rows come from, and by which rule they become questions.

    That is a hub id and commit, or a hash of a local folder's files.
    """
    rule = _rule_of(name) or {}
    record = {"rule": json.dumps(rule, sort_keys=True)}
    if Path(name).is_dir():
        # Not `.git` and `.cache`, which change without the rows.
        paths = [path for path in Path(name).glob("[!.]*") if path.is_file()]
        paths += [path for path in Path(name).glob("[!.]*/**/*") if path.is_file()]
        digest = hash_files(Path(name), paths)
        return {"folder": Path(name).name, "xxh3_128": digest} | record
    try:
        return {"hub": rule["hub_id"], "commit": hub.commit(rule["hub_id"], "dataset")} | record
    except Exception:
        # What cannot be reached cannot be read either, and `read_hub_set` says so.
        return {"hub": rule.get("hub_id", name), "commit": "unknown"} | record


def read_hub_set(name: str, *, embedded_names: Sequence[str]) -> pd.DataFrame:
    """Read a data set of `hub_sets.yaml`, by its name or from a local folder of that name.

    Returns rows with `kind`, `text`, `label`, `choice_0` and `choice_1`. Raises `DataError` if it
    cannot be read; the error offers `embedded_names` instead.
    """
    rule = _rule_of(name)
    alternatives = (
        f"offline there are {', '.join(embedded_names)} and your own .csv or .jsonl; from the hub, "
        f"or from a local folder so named, {', '.join(hub_sets())}"
    )
    if rule is None:
        raise DataError(f"unknown data set {name!r}; {alternatives}")
    try:
        records = _load(name, rule)
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else ""
        raise DataError(
            f"{name}: could not be read ({type(error).__name__}: {reason}); {alternatives}"
        ) from None
    rows = pd.DataFrame([_make_row(name, rule, dict(record)) for record in records])
    # A test set without labels has label -1.
    return rows[rows.label >= 0].reset_index(drop=True)


def _load(name: str, rule: dict[str, Any]) -> Any:
    # Heavy, and needed for these data sets only.
    import datasets

    config = rule.get("config")
    if not Path(name).is_dir():
        commit = hub.commit(rule["hub_id"], "dataset")
        return datasets.load_dataset(rule["hub_id"], config, revision=commit, split=rule["split"])
    # A folder may be a clone of a repository with several configurations, or hold one set alone.
    if config not in datasets.get_dataset_config_names(name):
        config = None
    return datasets.load_dataset(name, config, split=rule["split"])


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
            label = int(example_id(text, *sorted((right, wrong))), 16) % 2
            choices = (wrong, right) if label else (right, wrong)
        elif int(label) >= 0:
            label = int(label == rule.get("label_1", 1))
    except (KeyError, TypeError, ValueError, jinja2.UndefinedError) as error:
        raise DataError(
            f"{name}: expected columns for {rule['text']!r} and "
            f"{rule.get('label') or rule.get('targets')!r}, got {sorted(record)} ({error})"
        ) from None
    choice_0, choice_1 = choices
    return {
        "kind": rule["kind"],
        "text": text,
        "choice_0": choice_0,
        "choice_1": choice_1,
        "label": int(label),
    }
