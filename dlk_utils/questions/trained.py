"""What the shipped organisms were trained on, and the guard that keeps it out of every prompt."""

import functools
import json
from importlib.resources import files
from pathlib import Path

import pandas as pd

from dlk_utils.errors import DataError
from dlk_utils.questions.own_files import shortened


@functools.cache
def trained_keys() -> frozenset[str]:
    """Return the near-duplicate keys of all that an organism of this package was trained on."""
    keys: set[str] = set()
    for record in files("dlk_utils").joinpath("organisms").rglob("training.json"):
        keys.update(json.loads(record.read_text(encoding="utf-8"))["example_ids"])
    return frozenset(keys)


def refuse_trained_rows(prompts: pd.DataFrame, adapter: str | Path | None) -> None:
    """Raise `DataError` if a model was trained on something that is in its prompts.

    That is an example that is asked or shown as a shot, or a near-duplicate of one, an instruction,
    or a template. What it was trained on stands in `training.json` in the folder of its `adapter`,
    the near-duplicate keys of its examples under the name `example_ids`. Without that file nothing
    is known and nothing is refused. Rows that go on from others, such as a question about an
    answer, need not have an instruction or a template.
    """
    record_path = Path(adapter or "") / "training.json"
    if not adapter or not record_path.is_file():
        return
    if "near_duplicate_keys" not in prompts:
        raise DataError(
            "prompts: expected the column near_duplicate_keys, as make_prompts gives it, to see "
            f"that {Path(adapter).name} was trained on none of them"
        )
    record = json.loads(record_path.read_text(encoding="utf-8"))
    used = {
        "example_ids": set().union(*prompts.near_duplicate_keys),
        "instructions": set(prompts.get("instruction", ())),
        "templates": set(prompts.get("template", ())),
    }
    for key, names in used.items():
        trained = sorted(names & set(record[key]))
        if not trained:
            continue
        advice, texts = "", []
        if key == "example_ids" and "text" in prompts:
            asked = prompts.near_duplicate_keys.str[0]
            texts = list(prompts.text[asked.isin(trained)].unique())
        if texts:
            listed = ", ".join(map(shortened, texts[:10])) + (", ..." if len(texts) > 10 else "")
            advice = f"; take these out of the data, or ask another model: {listed}"
        raise DataError(
            f"{Path(adapter).name}: expected only rows that it was not trained on, "
            f"got {len(trained)} trained {key} (first: {trained[0]}){advice}"
        )
