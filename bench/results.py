"""What the benchmarks share: threads, prompts, timing, comparing, and where results are kept.

With the environment variable `BENCH_TRIAL=1` every benchmark runs one round on a few prompts, and
writes to `build/bench-trial`. That tries out the code; the numbers mean nothing.
"""

import json
import os
import platform
import random
import time
from collections.abc import Callable, Collection, Iterable
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from dlk_utils.extract.batches import Batch, pad, plan_batches
from dlk_utils.extract.packing import pack, plan_packed
from dlk_utils.lab.run import Run
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.prompts import make_prompts

TRIAL = os.environ.get("BENCH_TRIAL") == "1"

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
torch.set_num_threads(THREADS)

ROUNDS = 1 if TRIAL else 3
BATCH_TOKENS = 2048
LEAST_COSINE = 0.99999
"""Below this cosine two ways do not compute the same values, so their speeds do not compare."""

LARGEST_LOGPROB_DIFFERENCE = 1e-4
"""Nor do they if log-probabilities differ by more than this."""

TOP = Path(__file__).parent.parent
RESULTS = TOP / "build" / "bench-trial" if TRIAL else TOP / "bench" / "results"

INSTRUCTION_STRIDE = 9
"""Of the default run's instructions, sorted by name, each ninth is taken, with all its prompts.

As a tree they have 46 % of their tokens; all prompts of the default run have 44 %.
"""


# Prompts.


def default_prompts(tokenizer: Any, n_shots: int = 0) -> pd.DataFrame:
    """Return all prompts of a run with default parameters, or with shots besides.

    The rows are sorted by instruction, and have `row_id` as index and as column.
    """
    n_examples = 8 if TRIAL else Run.n_examples
    examples = load_examples(Run.datasets, n_examples, seed=Run.seed)
    rows = make_prompts(examples, tokenizer, n_shots=n_shots, seed=Run.seed)
    rows = rows.sort_values(["instruction", "row_id"])
    return rows.set_index("row_id", drop=False)


def some_instructions(rows: pd.DataFrame) -> pd.DataFrame:
    """Return all prompts of every ninth instruction.

    Prompts share most with others of their instruction, so a few complete instructions have about
    as large a part of their tokens in common as all of them.
    """
    chosen = sorted(rows.instruction.unique())[::INSTRUCTION_STRIDE]
    return rows[rows.instruction.isin(chosen)]


def unshared_reviews(tokenizer: Any, n: int) -> pd.DataFrame:
    """Return `n` reviews without instruction or chat format, no two with the same first token."""
    reviews = load_examples("rotten_tomatoes", 200 if TRIAL else 3000)
    ids = [tokenizer(text).input_ids for text in reviews.text]
    rows = pd.DataFrame({"row_id": reviews.example_id, "prompt": reviews.text, "input_ids": ids})
    is_first = ~rows.input_ids.map(lambda ids: ids[0]).duplicated()
    return rows[is_first][:n].set_index("row_id", drop=False)


def two_shot_prompts(tokenizer: Any, n_examples: int) -> pd.DataFrame:
    """Return prompts with two shots, by one template, each asked under a pair of instructions."""
    rows = make_prompts(
        load_examples("rotten_tomatoes", n_examples),
        tokenizer,
        n_shots=2,
        n_known=0,
        templates=["review_sentiment"],
        families=["charity"],
    )
    return rows.set_index("row_id", drop=False)


def prompt_rows(tokenizer: Any, kind: str) -> tuple[pd.DataFrame, str]:
    """Make the prompts of a kind, and describe them for a title.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    kind
        * "default": the default run's prompts of some complete instructions;
        * "default_two_shots": the same with two shots before each question;
        * "unshared": reviews without instruction, which share no prefix;
        * "two_shots": two shots, one template and a pair of instructions.

    Returns
    -------
    tuple of DataFrame and str
        The prompts, with `row_id` as index and as column, and their description.
    """
    if kind == "default":
        rows = some_instructions(default_prompts(tokenizer))
        about = "the default run's prompts of every ninth instruction"
    elif kind == "default_two_shots":
        rows = some_instructions(default_prompts(tokenizer, 2))
        about = "the default run's prompts with two shots, of every ninth instruction"
    elif kind == "unshared":
        rows = unshared_reviews(tokenizer, 12 if TRIAL else 120)
        about = "only reviews, which share no prefix"
    elif kind == "two_shots":
        rows = two_shot_prompts(tokenizer, 4 if TRIAL else 20)
        about = "prompts with two shots, one template and a pair of instructions"
    else:
        raise ValueError(f"kind: expected one that `prompt_rows` describes, got {kind!r}")
    if TRIAL:
        rows = rows[:12]
    return rows, f"{about} ({describe_size(rows)})"


def describe_size(rows: pd.DataFrame) -> str:
    """Say how many prompts and tokens there are, and how many tokens are left as a tree."""
    n_tokens = rows.input_ids.map(len).sum()
    return f"{len(rows):,} prompts, {n_tokens:,} tokens, {tree_size(rows):,} as a tree"


def tree_size(rows: pd.DataFrame) -> int:
    """Count the places of the tree that all prompts make up, padding included."""
    packed = pack(list(rows.input_ids))
    in_rows = sum(len(keys) - packed.n_trunk for keys in packed.keys)
    return packed.n_trunk + in_rows


def padded_plan(rows: pd.DataFrame) -> list[list[str]]:
    """Plan padded batches of prompts sorted by length; give the row ids of each."""
    return list(chain.from_iterable(plan_batches(rows, BATCH_TOKENS)))


def packed_plan(rows: pd.DataFrame) -> list[list[str]]:
    """Plan batches of prompts that begin alike; give the row ids of each."""
    return list(chain.from_iterable(plan_packed(rows, BATCH_TOKENS)))


def padded_batches(rows: pd.DataFrame, plan: Iterable[Iterable[str]]) -> list[Batch]:
    """Lay out the prompts of a plan as padded batches."""
    return [pad(token_ids(rows, batch)) for batch in plan]


def token_ids(rows: pd.DataFrame, row_ids: Iterable[str]) -> list[list[int]]:
    """Look up the token ids of prompts."""
    return [list(rows.input_ids[row_id]) for row_id in row_ids]


def in_order_of(plan: Iterable[Iterable[str]], rows: pd.DataFrame) -> list[int]:
    """Return the index that brings the results of a plan's batches into the order of the rows."""
    place = {row_id: i for i, row_id in enumerate(chain.from_iterable(plan))}
    return [place[row_id] for row_id in rows.index]


# Timing.


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
            if seconds[way][-1] > 1:
                print(f"  round {i + 1}/{rounds}  {seconds[way][-1]:6.1f} s  {way}", flush=True)
    table = pd.DataFrame(
        {
            "seconds": {way: np.median(s) for way, s in seconds.items()},
            "fastest": {way: min(s) for way, s in seconds.items()},
            "slowest": {way: max(s) for way, s in seconds.items()},
        }
    )
    return table.rename_axis("way"), values


# Comparing.


def add_parity(table: pd.DataFrame, way: str, *pairs: tuple[ArrayLike, ArrayLike]) -> None:
    """Write how far the values of a way are from the reference into its row of a table.

    That is the largest difference, and the least cosine over the last axis, of all pairs of
    arrays.
    """
    differences, cosines = [], []
    for a, b in pairs:
        a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
        if a.shape != b.shape:
            raise ValueError(f"{way}: expected values {tuple(b.shape)}, got {tuple(a.shape)}")
        differences.append(float((a - b).abs().max()))
        cosines.append(float(torch.cosine_similarity(a, b, dim=-1).min()))
    table.loc[way, "largest difference"] = finite(way, max(differences))
    table.loc[way, "least cosine"] = finite(way, min(cosines))


def add_logprob_parity(table: pd.DataFrame, way: str, a: ArrayLike, b: ArrayLike) -> None:
    """Write how far the log-probabilities of a way are from the reference into its row."""
    difference = float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max())
    table.loc[way, "log-probability difference"] = finite(way, difference)


def finite(way: str, value: float) -> float:
    """Return a value; raise `ValueError` if it is not finite."""
    if not np.isfinite(value):
        raise ValueError(f"{way}: expected values that can be compared, got {value}")
    return value


def refuse_other_values(title: str, table: pd.DataFrame) -> None:
    """Raise `ValueError` if a way did not compute the values of the reference.

    Ways that were not compared have no entry in these columns.
    """
    differs = {}
    if "least cosine" in table:
        cosine = table["least cosine"]
        differs |= cosine[cosine < LEAST_COSINE].to_dict()
    if "log-probability difference" in table:
        difference = table["log-probability difference"]
        differs |= difference[difference > LARGEST_LOGPROB_DIFFERENCE].to_dict()
    if differs:
        raise ValueError(
            f"{title}: expected every way to give the same values (cosine at least {LEAST_COSINE}, "
            f"log-probabilities within {LARGEST_LOGPROB_DIFFERENCE}), got {differs}"
        )


# Keeping.


def machine() -> str:
    """Name the processor and the threads that torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def save(name: str, title: str, table: pd.DataFrame, **libraries: str) -> None:
    """Print a table, and keep it in `RESULTS` with the machine it was measured on.

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
    print(f"\n{title}\n{machine()}\n{table.round(4).to_string()}\n", flush=True)
    refuse_other_values(title, table)
    RESULTS.mkdir(exist_ok=True, parents=True)
    table.to_csv(RESULTS / f"{name}.csv")
    record = {
        "title": title,
        "machine": machine(),
        "transformers": version("transformers"),
        **libraries,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
