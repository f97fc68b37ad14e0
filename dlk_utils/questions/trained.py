"""What the shipped organisms were trained on, and the guard that keeps it out of every question."""

import functools
import json
from importlib.resources import files
from pathlib import Path

import pandas as pd

from dlk_utils.errors import DataError


@functools.cache
def trained_example_ids() -> frozenset[str]:
    """What the organisms of this package were trained on."""
    records = [p for p in files("dlk_utils").joinpath("organisms").rglob("training.json")]
    return frozenset(
        i for p in records for i in json.loads(p.read_text(encoding="utf-8"))["example_ids"]
    )


def refuse_trained_rows(prompts: pd.DataFrame, adapter: str | Path | None) -> None:
    """Raises `DataError` if a model whose adapter folder holds a `training.json` is asked, or shown, an example that it was trained on, or asked by such an instruction or template."""
    path = Path(adapter or "") / "training.json"
    if not adapter or not path.is_file():
        return
    record = json.loads(path.read_text())
    used = {
        "example_ids": {*prompts.example_id, *(s for shots in prompts.shots for s in shots)},
        "instructions": set(prompts.instruction),
        "templates": set(prompts.template),
    }
    for key, names in used.items():
        if seen := sorted(names & set(record[key])):
            texts = (
                list(prompts.text[prompts.example_id.isin(seen)].unique())
                if key == "example_ids"
                else []
            )
            said = (
                f"; take these out of the data, or ask another model: {', '.join(map(repr, texts[:20]))}{', ...' if len(texts) > 20 else ''}"
                if texts
                else ""
            )
            raise DataError(
                f"{Path(adapter).name}: expected only rows that it was not trained on, got {len(seen)} trained {key} (first: {seen[0]}){said}"
            )
