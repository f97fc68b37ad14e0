"""Time and weigh the ways to the gradients of the margin: ours, and full backprop in four forms.

`bench/extraction.py` writes the tables. Run as a script, this file prints the extra peak memory of
one way, in a process of its own.
"""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from results import add_parity, time_ways
from torch import Tensor, nn

from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import forward, last_logits, pad
from dlk_utils.extract.gradients import full_backprop, states_and_gradients
from dlk_utils.extract.states import forward_states
from dlk_utils.models.loading import load_model
from dlk_utils.models.sites import SITES, at_sites, blocks

SHAPES = ((4, 64), (32, 64), (4, 256), (4, 1024))
"""Batches: number of prompts, and tokens of each."""

CHOICES = [[[5], [6]]]
BARE, STATES, OURS, FULL = "bare forward", "states alone", "ours", "full backprop"
HEAD_AT_LAST = "full backprop, head at the last token"
TO_WEIGHTS = "full backprop, weights too"
PRODUCTS_ALONE = "the last token's products alone"

MATRIX_PRODUCTS = {"aten::mm", "aten::addmm"}
ATTENTION = (
    "aten::bmm",
    "aten::_flash_attention",
    "aten::_scaled_dot_product",
    "aten::_softmax",
    "aten::_safe_softmax",
)


def time_gradients(model: Any, rounds: int) -> pd.DataFrame:
    """Time the gradients of the margin at all sites and layers, in batches of several shapes.

    Values are compared with full backprop's. Batches of 1,024 tokens are timed in two rounds.
    """
    tables = []
    for n_prompts, length in SHAPES:
        ways = gradient_ways(model, n_prompts, length)
        table, values = time_ways(ways, rounds if length < 1000 else 2)
        for way in (OURS, FULL, HEAD_AT_LAST, TO_WEIGHTS):
            pairs = [(values[way][site], values[FULL][site]) for site in SITES]
            add_parity(table, way, *pairs)
        table["times the states alone"] = table.seconds / table.seconds[STATES]
        tables.append(table.set_index(table.index + shape_name(n_prompts, length)))
    return pd.concat(tables)


def gradient_ways(model: Any, n_prompts: int, length: int) -> dict[str, Callable[[], Any]]:
    """Return the ways that are compared, on one batch of random tokens."""
    generator = torch.Generator().manual_seed(length)
    batch = pad(torch.randint(10, 40_000, (n_prompts, length), generator=generator).tolist())
    choices = CHOICES * n_prompts
    return {
        BARE: lambda: last_logits(model, batch),
        STATES: lambda: forward_states(model, batch, SITES),
        OURS: lambda: states_and_gradients(model, batch, choices, SITES)[1],
        FULL: lambda: full_backprop(model, batch, choices, SITES),
        HEAD_AT_LAST: lambda: backprop_head_at_last(model, batch, choices),
        TO_WEIGHTS: lambda: backprop_to_weights(model, batch, choices),
    }


def backprop_head_at_last(model: Any, batch: dict, choices: Sequence) -> dict[str, Tensor]:
    """Run full backprop at its best: to activations alone, with logits of the last token only.

    Left padding allows that; a model that is called plainly computes logits of every token.
    """
    hidden = {site: [] for site in SITES}

    def keep(site: str, layer: int, state: Tensor) -> None:
        hidden[site].append(state)

    with torch.enable_grad(), at_sites(model, SITES, keep):
        margin = sum_of_margins(forward(model, batch, use_cache=False).logits, choices)
        states = [state for site in SITES for state in hidden[site]]
        gradients = iter(torch.autograd.grad(margin, states))
    return {site: torch.stack([next(gradients)[:, -1] for _ in hidden[site]]) for site in SITES}


def backprop_to_weights(model: Any, batch: dict, choices: Sequence) -> dict[str, Tensor]:
    """Run full backprop as it is commonly written: `retain_grad` at each site, and `backward()`.

    That computes the gradients of all weights too.
    """
    hidden = {site: [] for site in SITES}

    def keep(site: str, layer: int, state: Tensor) -> None:
        state.retain_grad()
        hidden[site].append(state)

    with torch.enable_grad(), at_sites(model, SITES, keep):
        output = forward(model, batch, last_only=False, use_cache=False)
        sum_of_margins(output.logits, choices).backward()
    model.zero_grad()
    return {site: torch.stack([state.grad[:, -1] for state in hidden[site]]) for site in SITES}


def sum_of_margins(logits: Tensor, choices: Sequence) -> Tensor:
    """Sum the margins of all prompts: the gradient of each is that of its own margin."""
    logprobs = choice_logprobs(logits[:, -1], choices)
    return (logprobs[:, 1] - logprobs[:, 0]).sum()


def shape_name(n_prompts: int, length: int) -> str:
    """Name a batch in the index of a table."""
    return f", {n_prompts} x {length:,}"


# Where the time goes.


def time_gradients_by_part(
    model: Any, rounds: int, shapes: Sequence = ((4, 64), (4, 256))
) -> pd.DataFrame:
    """Split the seconds of each way into forward passes and the rest, and by kind of operation.

    The rest is the backward pass and little else. `PRODUCTS_ALONE` is the least that a pass of the
    last token can cost.
    """
    tables = []
    for n_prompts, length in shapes:
        all_ways = gradient_ways(model, n_prompts, length)
        compared = {way: all_ways[way] for way in (BARE, OURS, FULL, HEAD_AT_LAST)}
        parts = {way: [] for way in (*compared, PRODUCTS_ALONE)}
        timed = {way: noting_parts(model, run, parts[way]) for way, run in compared.items()}
        timed[PRODUCTS_ALONE] = partial(
            last_token_products, model, n_prompts, parts[PRODUCTS_ALONE]
        )
        table, _ = time_ways(timed, rounds)
        for column, has_graph in (("without a graph", False), ("with a graph", True)):
            table[column] = [
                np.median([seconds[has_graph] for seconds in parts[way]]) for way in table.index
            ]
        forward_passes = table["without a graph"] + table["with a graph"]
        table["backward and the rest"] = table.seconds - forward_passes
        n_bytes = sum(weight.nbytes for weight in block_weights(model))
        table.loc[PRODUCTS_ALONE, "MB of weights"] = n_bytes / 1e6
        for way, run in compared.items():
            for kind, share in shares_by_operation(run).items():
                table.loc[way, f"share: {kind}"] = share
        tables.append(table.set_index(table.index + shape_name(n_prompts, length)))
    return pd.concat(tables)


def noting_parts(model: nn.Module, run: Callable[[], Any], notes: list[dict]) -> Callable[[], None]:
    """Make a call that appends the `forward_seconds` of `run` to `notes`."""

    def call() -> None:
        with forward_seconds(model) as seconds:
            run()
        notes.append(seconds)

    return call


@contextlib.contextmanager
def forward_seconds(model: nn.Module) -> Iterator[dict[bool, float]]:
    """Measure the model's forward passes: seconds of those without a graph, and of those with one.

    The keys are False and True.
    """
    seconds = {False: 0.0, True: 0.0}
    starts = []

    def begin(*_: Any) -> None:
        starts.append(time.perf_counter())

    def end(*_: Any) -> None:
        seconds[torch.is_grad_enabled()] += time.perf_counter() - starts.pop()

    handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def last_token_products(model: nn.Module, n_prompts: int, notes: list[dict]) -> None:
    """Multiply one token a prompt with each weight of the blocks, forward and backward.

    The seconds of the forward products are appended to `notes` under True, as by `noting_parts`.
    """
    weights = block_weights(model)
    widths = {width for weight in weights for width in weight.shape}
    inputs = {width: torch.randn(n_prompts, width) for width in widths}
    start = time.perf_counter()
    for weight in weights:
        inputs[weight.shape[1]] @ weight.T
    seconds = time.perf_counter() - start
    for weight in weights:
        inputs[weight.shape[0]] @ weight
    notes.append({False: 0.0, True: seconds})


def block_weights(model: nn.Module) -> list[Tensor]:
    """List the weights of the linear layers in the blocks.

    The LM head is not among them: the forward pass of the prompt multiplies by it already.
    """
    modules = [module for block in blocks(model) for module in block.modules()]
    return [module.weight for module in modules if isinstance(module, nn.Linear)]


def shares_by_operation(run: Callable[[], Any]) -> dict[str, float]:
    """Share out the processor's time of a call by kind of operation, with torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    spent = pd.Series({e.key: e.self_cpu_time_total for e in profile.key_averages()})
    return (spent.groupby(kind_of_operation).sum() / spent.sum()).to_dict()


def kind_of_operation(name: str) -> str:
    """Sort an operation of torch into one of three kinds."""
    if name in MATRIX_PRODUCTS:
        return "matrix products"
    return "attention" if name.startswith(ATTENTION) else "the rest"


# Memory.


def weigh_gradients(lengths: Sequence[int] = (64, 256, 1024), n_prompts: int = 4) -> pd.DataFrame:
    """Measure the extra peak memory of each way, each in a process of its own."""
    rows = {}
    for length in lengths:
        row = {
            f"{way}, MB": peak_in_own_process(way, length, n_prompts) / 1e6
            for way in (STATES, OURS, FULL, HEAD_AT_LAST, TO_WEIGHTS)
        }
        ours, full = row[f"{OURS}, MB"], row[f"{FULL}, MB"]
        row |= {"saved by ours, MB": full - ours, "ours / full backprop": ours / full}
        rows[f"{n_prompts} x {length:,}"] = row
    return pd.DataFrame(rows).T.rename_axis("prompts x tokens")


def peak_in_own_process(way: str, length: int, n_prompts: int) -> int:
    """Run this file for one way; return the bytes that it prints."""
    command = [sys.executable, __file__, way, str(length), str(n_prompts)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(output.split()[-1])


def extra_peak(way: str, length: int, n_prompts: int) -> int:
    """Measure the bytes by which memory rises, at its peak, over that after one short pass."""
    model, _ = load_model("smollm2", dtype="float32", device="cpu")
    run = gradient_ways(model, n_prompts, length)[way]
    gradient_ways(model, n_prompts, 8)[STATES]()
    process = psutil.Process()
    before = process.memory_info().rss
    samples = [before]
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.wait(0.001):
            samples.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    is_done.set()
    watcher.join()
    return max(samples) - before


if __name__ == "__main__":
    print(extra_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
