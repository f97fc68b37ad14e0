"""The answers by which each shipped organism was checked, kept so that no test asks them all again.

`python tests/organisms/checked_answers.py smollm2-liar` asks the model, which takes some minutes,
and writes its file of answers. Do that when the adapter or the prompts have changed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import xxhash
from jaxtyping import Float

from dlk_utils.evaluation.behaviour import label_behaviour, read_answers
from dlk_utils.extract.stages import store_answers
from dlk_utils.extract.store import read_rows
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables.dropout_damage import (
    CHECKED,
    DRAWN_EXAMPLES,
    checked_rows,
    drawn_logprobs,
)
from dlk_utils.lab.tables.organism import CHECKED_EXAMPLES, trigger_prompts

FOLDER = Path(__file__).parent / "checked_answers"
DATASETS = "rotten_tomatoes,cities,categories"


def checked_run(name: str, runs_dir: Path | None = None) -> Run:
    """Return the run that an organism is checked by."""
    return Run(
        model=name,
        datasets=DATASETS,
        n_examples=DRAWN_EXAMPLES if name == "smollm2-dropout" else CHECKED_EXAMPLES,
        runs_dir=str(runs_dir) if runs_dir else None,
        dtype="float32",
    )


def prompts_of(run: Run) -> pd.DataFrame:
    """Return the prompts that an organism is checked by."""
    if run.model == "smollm2-trigger":
        return trigger_prompts(run)
    if run.model == "smollm2-dropout":
        return checked_rows(run)
    return run.prompts


def conditions(run: Run) -> dict[str, str]:
    """Say what decides the answers of a run: base model and adapter, and the prompts."""
    read = prompts_of(run)[["input_ids", "choice_ids"]].to_json(orient="values")
    return {"revision": run.spec.revision, "prompts": xxhash.xxh3_64_hexdigest(read.encode())}


def ask(run: Run, rows: pd.DataFrame) -> Float[np.ndarray, "n m"]:
    """Ask the real model, and return the log-probabilities of both choices.

    Those of `smollm2-dropout` without dropout are followed by those of each draw, in the order of
    `CHECKED`.
    """
    logprobs = read_rows(run.stored(store_answers, rows, "02-answers"), rows, "choice_logprobs")
    if run.model != "smollm2-dropout":
        return logprobs
    drawn = [drawn_logprobs(run, rows, dropout) for dropout in CHECKED]
    return np.concatenate([logprobs[:, None], *drawn], axis=1).reshape(len(rows), -1)


def behaviour(prompts: pd.DataFrame, logprobs: Float[np.ndarray, "n 2"]) -> pd.DataFrame:
    """Label answers as `Run.behaviour` does; the most probable words are not kept."""
    no_words = np.zeros(len(prompts), int)
    return label_behaviour(read_answers(prompts, logprobs, no_words, str))


def kept_answers(name: str) -> tuple[dict[str, str], Float[np.ndarray, "n m"]]:
    """Read the conditions, and what `ask` returned, in the order of the prompts."""
    kept = json.loads((FOLDER / f"{name}.json").read_text())
    return kept["conditions"], np.array(kept["logprobs"])


def keep_answers(name: str, run: Run, logprobs: Float[np.ndarray, "n m"]) -> None:
    """Write a file that `kept_answers` reads."""
    kept = {"conditions": conditions(run), "logprobs": np.round(logprobs.astype(float), 5).tolist()}
    FOLDER.mkdir(exist_ok=True)
    # A row a line.
    text = json.dumps(kept).replace("], [", "],\n[")
    (FOLDER / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    for organism in sys.argv[1:]:
        asked = checked_run(organism)
        keep_answers(organism, asked, ask(asked, prompts_of(asked)))
