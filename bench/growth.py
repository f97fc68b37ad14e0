"""Measure how time and memory grow with the number of prompts, and the memory that packing takes.

`bench/extraction.py` writes the tables. Run as a script, this file prints the seconds and the
extra peak memory of one way, in a process of its own.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from memory import extra_peak, in_own_process
from results import (
    BATCH_TOKENS,
    TRIAL,
    default_prompts,
    packed_plan,
    padded_batches,
    padded_plan,
    prompt_rows,
)

from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.passes import activations
from dlk_utils.extract.states import forward_states
from dlk_utils.models.loading import load_model

SIZES = (8, 16, 32) if TRIAL else (250, 1000, 4000)
"""Numbers of prompts. Each is a multiple of the first."""

N_LAYERS = 10
"""Layers that run, of 30: a pass through all of them would hide what else takes time."""

PACKED, PADDED = "packed", "padded"


def measure_growth() -> pd.DataFrame:
    """Measure states of growing numbers of prompts: seconds and extra peak memory per prompt.

    Few prompts are run repeatedly, so that every size takes about as long as the second one.
    """
    rows = {}
    for n_prompts in SIZES:
        repeats = max(1, SIZES[1] // n_prompts)
        measured = in_own_process(__file__, "growth", n_prompts, repeats)
        seconds, peak = measured["seconds"], measured["peak"]
        print(f"  {n_prompts:,} prompts: {seconds:.1f} s", flush=True)
        rows[n_prompts] = {
            "seconds": seconds,
            "ms per prompt": 1e3 * seconds / n_prompts,
            "extra peak, MB": peak / 1e6,
            "extra peak per prompt, kB": peak / 1e3 / n_prompts,
            "states alone per prompt, kB": measured["states"] / 1e3 / n_prompts,
            "extra peak without states, MB": (peak - measured["states"]) / 1e6,
        }
    table = pd.DataFrame(rows).T.rename_axis("prompts")
    further_kb = 1e3 * table["extra peak, MB"].diff()
    table["extra peak per further prompt, kB"] = further_kb / np.diff([0, *table.index])
    return table


def weigh_packing() -> pd.DataFrame:
    """Measure the extra peak memory of packed and of padded batches, at one budget of tokens."""
    rows = {way: in_own_process(__file__, way) for way in (PADDED, PACKED)}
    table = pd.DataFrame(rows).T.rename_axis("way")
    table["extra peak, MB"] = table.pop("peak") / 1e6
    table["states alone, MB"] = table.pop("states") / 1e6
    table["times padded"] = table["extra peak, MB"] / table["extra peak, MB"][PADDED]
    return table


def run_growth(n_prompts: int, repeats: int) -> dict[str, float]:
    """Take states of `n_prompts` prompts; return seconds, extra peak memory, and their bytes."""
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    prompts = repeated_trees(tokenizer, n_prompts)
    results = []

    def run() -> None:
        results.append(activations(model, prompts, layers=range(N_LAYERS), progress=False))

    warm_up(model)
    peak = extra_peak(run)
    start = time.perf_counter()
    for _ in range(repeats):
        results.clear()
        run()
    seconds = (time.perf_counter() - start) / repeats
    return {"seconds": seconds, "peak": peak, "states": results[0]["resid_post"].nbytes}


def repeated_trees(tokenizer: Any, n_prompts: int) -> list[list[int]]:
    """Repeat the first `SIZES[0]` of the default run's prompts, each time behind another token.

    The repeats have no token in common, so that there is as much to compute for each prompt,
    however many there are.
    """
    first = [list(ids) for ids in default_prompts(tokenizer).input_ids.iloc[: SIZES[0]]]
    return [[1000 + i, *ids] for i in range(n_prompts // SIZES[0]) for ids in first]


def run_way(way: str) -> dict[str, float]:
    """Take states of the default run's prompts, packed or padded; return the extra peak memory."""
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    rows, _ = prompt_rows(tokenizer, "default")
    prompts = list(rows.input_ids)
    plan = {PACKED: packed_plan, PADDED: padded_plan}[way](rows)
    results = []

    def run() -> None:
        if way == PACKED:
            by_site = activations(model, prompts, batch_tokens=BATCH_TOKENS, progress=False)
            results.append(by_site["resid_post"])
        else:
            results.append(padded_states(model, rows, plan))

    warm_up(model)
    peak = extra_peak(run)
    return {"batches": len(plan), "peak": peak, "states": results[0].nbytes}


def padded_states(model: Any, rows: pd.DataFrame, plan: Sequence[Sequence[str]]) -> np.ndarray:
    """Take the last-token states [layer, n, d] of padded batches, into one array."""
    states: np.ndarray | None = None
    done = 0
    for batch_rows in plan:
        [batch] = padded_batches(rows, [batch_rows])
        by_site, _ = forward_states(model, batch, ["resid_post"], with_logits=False)
        of_batch = by_site["resid_post"].numpy()
        if states is None:
            states = np.empty((len(of_batch), len(rows), of_batch.shape[-1]), np.float32)
        states[:, done : done + len(batch_rows)] = of_batch
        done += len(batch_rows)
    return states


def warm_up(model: Any) -> None:
    """Run a few tokens, so that what is done once per model is not measured.

    The sites are checked then, and it is tried out whether the model takes trees. The first pass of
    a process is slow besides, and reads the weights into memory, of which the LM head's are large.
    """
    last_logits(model, pad([[1, 2, 3]]))
    activations(model, [[1, 2, 3], [1, 2, 4]], progress=False)


if __name__ == "__main__":
    if sys.argv[1] == "growth":
        print(json.dumps(run_growth(int(sys.argv[2]), int(sys.argv[3]))))
    else:
        print(json.dumps(run_way(sys.argv[1])))
