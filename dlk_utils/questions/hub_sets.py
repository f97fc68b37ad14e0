"""Data sets of the Hugging Face hub (or of a local folder in the hub's layout) as binary questions, by `hub_sets.yaml`."""

import functools
import json
from importlib.resources import files
from pathlib import Path

import jinja2
import pandas as pd
import xxhash
import yaml

from dlk_utils.errors import DataError
from dlk_utils.models import hub
from dlk_utils.questions.ids import example_id
from dlk_utils.questions.templates import render


@functools.cache
def hub_sets() -> dict[str, dict]:
    """name -> hub id, configuration, split, kind, how text and label are made."""
    return yaml.safe_load(
        files("dlk_utils.questions").joinpath("hub_sets.yaml").read_text(encoding="utf-8")
    )


def hub_source(name: str) -> dict[str, str]:
    """Where the rows come from: hub id and commit, or a hash of the local folder's files; and by what rule of `hub_sets.yaml` they become questions."""
    entry = _entry(name) or {}
    rule = {"rule": json.dumps(entry, sort_keys=True)}
    if Path(name).is_dir():
        digest = xxhash.xxh3_128()
        for path in sorted(p for p in Path(name).rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(name)).encode() + path.read_bytes())
        return {"folder": Path(name).name, "xxh3_128": digest.hexdigest()} | rule
    try:
        return {"hub": entry["hub_id"], "commit": hub.commit(entry["hub_id"], "dataset")} | rule
    except Exception:  # what cannot be reached cannot be read either, and `read_hub` says so
        return {"hub": entry.get("hub_id", name), "commit": "unknown"} | rule


def _entry(name: str) -> dict | None:
    return hub_sets().get(Path(name).name if Path(name).is_dir() else name)


def read_hub(name: str, embedded: list[str]) -> pd.DataFrame:
    """Rows `kind, text, choice_0, choice_1, label` of a set of `hub_sets.yaml`, given by name or as a local folder of that name."""
    import datasets

    entry = _entry(name)
    offline = f"offline there are {', '.join(embedded)} and your own .csv or .jsonl; from the hub, or from a local folder so named, {', '.join(hub_sets())}"
    if entry is None:
        raise DataError(f"unknown data set {name!r}; {offline}")
    try:
        folder = Path(name).is_dir()
        where = (
            {"path": name, "name": _config(name, entry)}
            if folder
            else {
                "path": entry["hub_id"],
                "name": entry.get("config"),
                "revision": hub.commit(entry["hub_id"], "dataset"),
            }
        )
        table = datasets.load_dataset(**where, split=entry["split"])
    except Exception as e:
        raise DataError(
            f"{name}: could not be read ({type(e).__name__}: {str(e).splitlines()[0][:120] if str(e) else ''}); {offline}"
        ) from None
    return (
        pd.DataFrame([_row(name, entry, dict(r)) for r in table])
        .query("label >= 0")
        .reset_index(drop=True)
    )


def _config(folder: str, entry: dict) -> str | None:
    """The set's own configuration, where the folder (a clone of a repository with several) has it."""
    import datasets

    return (
        entry["config"]
        if entry.get("config") in datasets.get_dataset_config_names(folder)
        else None
    )


def _row(name: str, entry: dict, row: dict) -> dict:
    label = row.pop(entry["label"], None) if "label" in entry else None
    choices, targets = ("", ""), row.pop(entry["targets"], None) if "targets" in entry else None
    try:
        text = render(entry["text"], row).strip()
        if (
            targets is not None
        ):  # the right choice is listed first there: which of the two is shown as choice 1 is decided by hash
            right = targets["choices"][list(targets["labels"]).index(1)]
            wrong = targets["choices"][list(targets["labels"]).index(0)]
            label = int(example_id(text, *sorted((right, wrong))), 16) % 2
            choices = (wrong, right) if label else (right, wrong)
        elif int(label) >= 0:  # -1: a test set without labels
            label = int(label == entry.get("label_1", 1))
    except (KeyError, TypeError, ValueError, jinja2.UndefinedError) as e:
        raise DataError(
            f"{name}: expected columns for {entry['text']!r} and {entry.get('label') or entry.get('targets')!r}, got {sorted(row)} ({e})"
        ) from None
    return {
        "kind": entry["kind"],
        "text": text,
        "label": int(label),
        "choice_0": choices[0],
        "choice_1": choices[1],
    }
