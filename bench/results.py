"""What the benchmarks share: threads, prompts, timing, comparing, and where results are kept."""

import json
import platform
import random
import time
from collections.abc import Callable, Collection, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dlk_utils.extract.batches import plan_batches
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.prompts import make_prompts

THREADS = 2
torch.set_num_threads(THREADS)

BATCH_TOKENS = 2048
LEAST_COSINE = 0.99999
"""Below this cosine two ways do not compute the same values, so their speeds do not compare."""

RESULTS = Path(__file__).parent / "results"

PROMPT_KINDS = {
    "plain": ("no shots", {}),
    "mixed": ("two shots, all instructions and templates", {"n_shots": 2}),
    "one": (
        "two shots, one template and a pair of instructions",
        {
            "n_shots": 2,
            "n_known": 0,
            "templates": ["review_sentiment"],
            "families": ["charity"],
        },
    ),
}
"""kind of prompts -> (what they are, for a title; the options of `make_prompts`)."""


def prompt_rows(tokenizer: Any, kind: str, n_examples: int) -> tuple[pd.DataFrame, str]:
    """Make prompts about short reviews, and describe them for a title.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    kind
        A key of `PROMPT_KINDS`.
    n_examples
        How many reviews are asked about.

    Returns
    -------
    tuple of DataFrame and str
        The prompts, with `row_id` as index and as column, and their description.
    """
    description, options = PROMPT_KINDS[kind]
    examples = load_examples("rotten_tomatoes", n_examples)
    rows = make_prompts(examples, tokenizer, **options).set_index("row_id", drop=False)
    mean_tokens = rows.input_ids.map(len).mean()
    return rows, f"{len(rows)} prompts of {mean_tokens:.0f} tokens, {description}"


def batches_of(rows: pd.DataFrame, plan: Callable = plan_batches) -> list[list[str]]:
    """Plan batches with `plan_batches` or `plan_shared`; give the row ids of each."""
    return [batch for shard in plan(rows, BATCH_TOKENS) for batch in shard]


def token_ids(rows: pd.DataFrame, row_ids: Iterable[str]) -> list[list[int]]:
    """Look up the token ids of prompts."""
    return [list(rows.input_ids[row_id]) for row_id in row_ids]


def time_ways(
    ways: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    once: Collection[str] = (),
    rest: float = 0.0,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Time ways of computing the same thing against each other.

    They take turns, so that whatever else the machine does disturbs all of them alike, in an order
    that is drawn anew each round: a processor runs faster after a light load, and in a fixed order
    the same way would always profit.

    Parameters
    ----------
    ways
        Name of each way -> a function without arguments.
    rounds
        How often each way is run.
    once
        Ways that take long, and are run in the first round only.
    rest
        Seconds to wait before each way.

    Returns
    -------
    tuple of DataFrame and dict
        For each way the median, the fastest and the slowest of its seconds; and what it returned
        in its last round.
    """
    seconds = {way: [] for way in ways}
    values = {}
    for i in range(rounds):
        turn = [way for way in ways if i == 0 or way not in once]
        for way in random.Random(i).sample(turn, len(turn)):
            time.sleep(rest)
            start = time.perf_counter()
            values[way] = ways[way]()
            seconds[way].append(time.perf_counter() - start)
    table = pd.DataFrame(
        {
            "seconds": {way: np.median(s) for way, s in seconds.items()},
            "fastest": {way: min(s) for way, s in seconds.items()},
            "slowest": {way: max(s) for way, s in seconds.items()},
        }
    )
    return table, values


def add_parity(table: pd.DataFrame, way: str, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write how far the values of a way are from the reference into its row of a table.

    That is the largest difference, and the least cosine over the last axis, of all pairs of
    tensors.
    """
    differences = [float((a - b).abs().max()) for a, b in pairs]
    cosines = [torch.cosine_similarity(a.double(), b.double(), dim=-1).min() for a, b in pairs]
    table.loc[way, "largest difference"] = max(differences)
    table.loc[way, "least cosine"] = float(min(cosines))


def machine() -> str:
    """Name the processor and the threads that torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def save(name: str, title: str, table: pd.DataFrame, **libraries: str) -> None:
    """Print a table, and keep it in `bench/results` with the machine it was measured on.

    Parameters
    ----------
    name
        Name of the files.
    title
        What was measured.
    table
        The measurements.
    **libraries
        Versions of other libraries that took part.

    Raises
    ------
    ValueError
        If a way did not compute the values of the reference: then its speed does not count.
    """
    if "least cosine" in table:
        differs = table["least cosine"] < LEAST_COSINE
        if differs.any():
            raise ValueError(
                f"{title}: expected every way to give the same values (cosine at least "
                f"{LEAST_COSINE}), got {table['least cosine'][differs].to_dict()}"
            )
    print(f"\n{title}\n{machine()}\n{table.round(4).to_string()}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"{name}.csv")
    record = {
        "title": title,
        "machine": machine(),
        "transformers": version("transformers"),
        **libraries,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
