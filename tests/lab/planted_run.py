"""A stand-in for a run, whose answers and states are planted: no model, no store.

As a script it prints the mean of the long table of results, and whether it was computed:
`python planted_run.py RUNS_FOLDER`.
"""

import functools
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from dlk_utils.evaluation import evaluate, tasks
from dlk_utils.evaluation.behaviour import label_behaviour
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import probe_ablations
from dlk_utils.probes import PAIR_PROBES


def planted_answers(n: int) -> pd.DataFrame:
    """Answers to four prompts of each example: both twins, and two further truth prompts.

    The model does as it is told. Its margins lie between 0.05 and 0.45, so that some answers count
    as known, and others do not.
    """
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        label = int(rng.integers(0, 2))
        for number, role in enumerate(("truth", "lie", "known", "known")):
            wanted = 1 - label if role == "lie" else label
            margin = (2 * wanted - 1) * float(rng.uniform(0.05, 0.45))
            rows.append(
                {
                    "row_id": f"{i} {number}",
                    "example_id": f"e{i}",
                    "dataset": "d",
                    "split": ("train", "validation", "test")[i % 3],
                    "role": role,
                    "asks": "lie" if role == "lie" else "truth",
                    "instruction": f"{role} {number}",
                    "family": role,
                    "template": "t",
                    "text": f"text {i}",
                    "prompt": f"{role}: text {i}",
                    "choices": ["no", "yes"],
                    "label": label,
                    "wanted": wanted,
                    "answer": wanted,
                    "correct": wanted == label,
                    "readable": True,
                    "mass": 1.0,
                    "margin": margin,
                    "p1": 1 / (1 + np.exp(-margin)),
                }
            )
    return pd.DataFrame(rows)


def planted_read_rows(folder: Path, rows: pd.DataFrame, name: str) -> np.ndarray:
    """Values in place of a stored tensor: noise, and a little of the label."""
    is_logprob = name.startswith("choice_logprobs")
    values = []
    for row in rows.itertuples():
        noise = np.random.default_rng(zlib.crc32(f"{row.row_id} {name}".encode()))
        values.append(noise.normal(size=2 if is_logprob else 6))
        values[-1][1] += 0.5 * (2 * row.label - 1)
    return np.array(values)


class PlantedRun(Run):
    """A run of `n_examples` planted examples; its tables are kept in `runs_dir`."""

    @property
    def record(self) -> dict:
        return {"n_examples": self.n_examples, "seed": self.seed}

    @functools.cached_property
    def probe_rows(self) -> pd.DataFrame:
        return label_behaviour(planted_answers(self.n_examples))

    @property
    def dropout_rows(self) -> pd.DataFrame:
        return self.probe_rows[self.probe_rows.role != "known"]

    def draws(self, **options) -> Path:
        return Path("draws")

    def gradients(self) -> Path:
        return Path("gradients")


def main() -> None:
    """Make the long table of results with few probes, or read it back."""
    tasks.read_rows = planted_read_rows
    evaluate.MORE_STATE_PROBES = evaluate.STACK_PROBES = evaluate.CONTRAST_PROBES = {}
    evaluate.PAIR_PROBES = {"pair_ranking": PAIR_PROBES["pair_ranking"]}
    computed = []
    make_targets = probe_ablations.make_targets
    probe_ablations.make_targets = lambda *args: computed.append(1) or make_targets(*args)
    run = PlantedRun(n_examples=60, runs_dir=sys.argv[1])
    table = probe_ablations.results(run, layers=[0, 1])
    print(json.dumps({"mean": table.estimate.mean(), "computed": bool(computed)}))


if __name__ == "__main__":
    main()
