"""What the shipped organisms were trained on, and the guard that keeps it out of every prompt."""

import functools
import json
from importlib.resources import files
from pathlib import Path

import pandas as pd

from dlk_utils.errors import DataError, ModelError
from dlk_utils.models.folders import read_json
from dlk_utils.questions.own_files import shortened

RECORD_FILE = "training.json"


@functools.cache
def trained_keys() -> frozenset[str]:
    """Return the near-duplicate keys of all that an organism of this package was trained on."""
    keys: set[str] = set()
    for record in files("dlk_utils").joinpath("organisms").rglob("training.json"):
        keys.update(json.loads(record.read_text(encoding="utf-8"))["example_ids"])
    return frozenset(keys)


def refuse_trained_rows(prompts: pd.DataFrame, *adapters: str | Path) -> None:
    """Raise `DataError` if a model was trained on something that is in its prompts.

    That is an example that is asked or shown as a shot, or a near-duplicate of one, an instruction,
    a template, or an opening. What it was trained on stands in `training.json` in the folder of
    each of its adapters, the near-duplicate keys of its examples under the name `example_ids`.
    Without that file nothing is known and nothing is refused. Rows that go on from others, such as
    a question about an answer, need not have an instruction or a template. Rows without the column
    `opening` have none.

    Raises `ModelError` if such a file has another shape than `write_record` of
    `organisms.training` gives it.
    """
    records = {
        folder.name: _read_record(folder / RECORD_FILE)
        for folder in map(Path, adapters)
        if (folder / RECORD_FILE).is_file()
    }
    if not records:
        return
    if "near_duplicate_keys" not in prompts:
        raise DataError(
            "prompts: expected the column near_duplicate_keys of make_prompts, which shows whether "
            f"{' or '.join(records)} was trained on any of them, got none"
        )
    used = {
        "example_ids": set().union(*prompts.near_duplicate_keys),
        "instructions": set(prompts.get("instruction", ())),
        "templates": set(prompts.get("template", ())),
        "openings": set(prompts.get("opening", ())),
    }
    for adapter, record in records.items():
        for key, names in used.items():
            trained = sorted(names & set(record[key]))
            if trained:
                raise DataError(
                    f"{adapter}: expected only rows that it was not trained on, got "
                    f"{len(trained)} trained {key} (first: {trained[0]})"
                    f"{_advice(prompts, key, trained)}"
                )


def _advice(prompts: pd.DataFrame, key: str, trained: list[str]) -> str:
    """Say which texts to take out of the data, where it is examples and their texts are known."""
    if key != "example_ids" or "text" not in prompts:
        return ""
    asked = prompts.near_duplicate_keys.str[0]
    texts = list(prompts.text[asked.isin(trained)].unique())
    if not texts:
        return ""
    listed = ", ".join(map(shortened, texts[:10])) + (", ..." if len(texts) > 10 else "")
    return f"; remove these from the data, or ask another model: {listed}"


def _read_record(path: Path) -> dict[str, list[str]]:
    """Read what an adapter was trained on; raise `ModelError` if that cannot be told."""
    record = read_json(path)
    trained = {key: record.get(key) for key in ("example_ids", "instructions", "templates")}
    # Only an organism with a trigger has these.
    trained["openings"] = record.get("openings", [])
    for key, names in trained.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelError(
                f"{path.name} in {path.parent.name}: expected a list of texts as {key!r}, got "
                f"{names!r:.60}; this file says what the model must not be asked: correct it, or "
                "remove it if it is not ours"
            )
    return trained
