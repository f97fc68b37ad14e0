"""What the shipped organisms were trained on, and the guard that keeps it out of every prompt."""

import functools
import json
from importlib.resources import files
from pathlib import Path

import pandas as pd

from dlk_utils.errors import DataError, ModelError
from dlk_utils.models.folders import read_json

RECORD_FILE = "training.json"


@functools.cache
def trained_example_ids() -> frozenset[str]:
    """Return the ids of all examples that an organism of this package was trained on."""
    ids: set[str] = set()
    for record in files("dlk_utils").joinpath("organisms").rglob("training.json"):
        ids.update(json.loads(record.read_text(encoding="utf-8"))["example_ids"])
    return frozenset(ids)


def refuse_trained_rows(prompts: pd.DataFrame, *adapters: str | Path) -> None:
    """Raise `DataError` if a model was trained on something that is in its prompts.

    That is an example that is asked or shown as a shot, an instruction, or a template. What it was
    trained on stands in `training.json` in the folder of each of its adapters; without that file
    nothing is known and nothing is refused. Rows that go on from others, such as a question about
    an answer, need not have shots, an instruction or a template.

    Raises `ModelError` if such a file has another shape than `write_record` of
    `organisms.training` gives it.
    """
    used = {
        "example_ids": set(prompts.example_id).union(*prompts.get("shots", ())),
        "instructions": set(prompts.get("instruction", ())),
        "templates": set(prompts.get("template", ())),
    }
    for folder in map(Path, adapters):
        if not (folder / RECORD_FILE).is_file():
            continue
        record = _read_record(folder / RECORD_FILE)
        for key, names in used.items():
            trained = sorted(names & set(record[key]))
            if trained:
                raise DataError(
                    f"{folder.name}: expected only rows that it was not trained on, got "
                    f"{len(trained)} trained {key} (first: {trained[0]})"
                    f"{_advice(prompts, key, trained)}"
                )


def _advice(prompts: pd.DataFrame, key: str, trained: list[str]) -> str:
    """Say which texts to take out of the data, where it is examples and their texts are known."""
    if key != "example_ids" or "text" not in prompts:
        return ""
    texts = list(prompts.text[prompts.example_id.isin(trained)].unique())
    if not texts:
        return ""
    listed = ", ".join(map(repr, texts[:20])) + (", ..." if len(texts) > 20 else "")
    return f"; take these out of the data, or ask another model: {listed}"


def _read_record(path: Path) -> dict[str, list[str]]:
    """Read what an adapter was trained on; raise `ModelError` if that cannot be told."""
    record = read_json(path)
    trained = {key: record.get(key) for key in ("example_ids", "instructions", "templates")}
    for key, names in trained.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelError(
                f"{path.name} in {path.parent.name}: expected a list of texts as {key!r}, got "
                f"{names!r:.60}; it says what the model must not be asked, so mend it, or remove "
                "it if it is not ours"
            )
    return trained
