"""Compare the values of every tiny model family on a GPU with those on the CPU.

`PYTHONPATH=tests python bench/devices.py` prints a row for each family: the largest difference of
states, gradients and draws, as a share of the largest value. It fails above `TOLERANCE`.
"""

import sys

import numpy as np
import torch
from tiny_models import FAMILIES, new_model, tiny_prompts
from torch import nn

from dlk_utils import activations, dropout_draws, margin_gradients
from dlk_utils.models.sites import SITES

TOLERANCE = 1e-5


def values(model: nn.Module, prompts: list[list[int]]) -> dict[str, dict[str, np.ndarray]]:
    """Return states, gradients and draws of a model, by site."""
    shown = {"sites": SITES, "progress": False}
    draws = {"n_draws": 2, "p": 0.1} | shown
    return {
        "states": activations(model, prompts, **shown),
        "gradients": margin_gradients(model, prompts, ([1], [2]), **shown),
        "draws, sequence": dropout_draws(model, prompts, scope="sequence", **draws),
        "draws, last token": dropout_draws(model, prompts, scope="last_token", **draws),
    }


def largest_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Return the largest difference of two sets of arrays, as a share of the largest value."""
    return max(np.abs(one[site] - other[site]).max() / np.abs(one[site]).max() for site in one)


def main(device: str = "cuda") -> int:
    """Print the table, and return an exit code."""
    prompts = list(tiny_prompts(12).input_ids)
    worst = 0.0
    for family in FAMILIES:
        model = new_model(family).float()
        on_cpu = values(model, prompts)
        on_device = values(model.to(device), prompts)
        row = {kind: largest_difference(on_cpu[kind], on_device[kind]) for kind in on_cpu}
        print(f"{family:22s}", "  ".join(f"{kind} {share:.1e}" for kind, share in row.items()))
        worst = max(worst, *row.values())
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{len(FAMILIES)} families on {name}: at most {worst:.1e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
