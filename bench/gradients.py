"""Time and weigh the ways to the gradients of the margin: ours, and full backprop in three forms.

`bench/extraction.py` writes the tables. Run as a script, this file prints the extra peak memory of
one way, in a process of its own.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from memory import extra_peak, in_own_process
from results import TRIAL, add_parity, time_ways
from torch import Tensor

from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import forward, last_logits, pad
from dlk_utils.extract.gradients import full_backprop, states_and_gradients
from dlk_utils.extract.states import clean_states
from dlk_utils.models.loading import load_model
from dlk_utils.models.sites import SITES, at_sites

SHAPES = ((4, 64), (4, 256)) if TRIAL else ((4, 64), (32, 64), (4, 256))
"""Batches: number of prompts, and tokens of each."""

CHOICES = [[[5], [6]]]
BARE, STATES, OURS, FULL = "bare pass", "states alone", "ours", "full backprop"
HEAD_AT_LAST = "full backprop, head at the last token"
TO_WEIGHTS = "full backprop, weights too"


def time_gradients(model: Any, rounds: int) -> pd.DataFrame:
    """Time the gradients of the margin at all sites and layers, in batches of several shapes.

    The tokens are random, so the prompts share no prefix. Values are compared with full
    backprop's. On 32 prompts it takes long, and is timed in the first round only.
    """
    tables = []
    for n_prompts, length in SHAPES:
        ways = gradient_ways(model, n_prompts, length)
        once = (FULL, HEAD_AT_LAST, TO_WEIGHTS) if n_prompts == 32 else ()
        table, values = time_ways(ways, rounds, once=once)
        for way in (OURS, FULL, HEAD_AT_LAST, TO_WEIGHTS):
            pairs = [(values[way][site], values[FULL][site]) for site in SITES]
            add_parity(table, way, *pairs)
        table["bare passes"] = table.seconds / table.seconds[BARE]
        tables.append(table.set_index(table.index + shape_name(n_prompts, length)))
    return pd.concat(tables)


def gradient_ways(model: Any, n_prompts: int, length: int) -> dict[str, Callable[[], Any]]:
    """Return the ways that are compared, on one batch of random tokens."""
    generator = torch.Generator().manual_seed(length)
    prompts = torch.randint(10, 40_000, (n_prompts, length), generator=generator).tolist()
    batch = pad(prompts)
    choices = CHOICES * n_prompts
    return {
        BARE: lambda: last_logits(model, batch),
        STATES: lambda: clean_states(model, prompts, SITES),
        OURS: lambda: states_and_gradients(model, prompts, choices, SITES)[1],
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


# Memory.


def weigh_gradients(lengths: Sequence[int] = (256, 1024), n_prompts: int = 4) -> pd.DataFrame:
    """Measure the extra peak memory of ours and of full backprop, each in a process of its own."""
    rows = {}
    for length in lengths[:1] if TRIAL else lengths:
        ours, full = (
            in_own_process(__file__, way, length, n_prompts)["peak"] / 1e6 for way in (OURS, FULL)
        )
        rows[f"{n_prompts} x {length:,}"] = {
            f"{OURS}, MB": ours,
            f"{FULL}, MB": full,
            "ours / full backprop": ours / full,
        }
    return pd.DataFrame(rows).T.rename_axis("prompts x tokens")


def peak_of_way(way: str, length: int, n_prompts: int) -> int:
    """Measure the bytes by which memory rises, at its peak, over that after one short pass."""
    model, _ = load_model("smollm2", dtype="float32", device="cpu")
    run = gradient_ways(model, n_prompts, length)[way]
    gradient_ways(model, n_prompts, 8)[STATES]()
    return extra_peak(run)


if __name__ == "__main__":
    print(json.dumps({"peak": peak_of_way(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))}))
