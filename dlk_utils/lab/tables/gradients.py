"""Tables of notebook 04: how large gradients are, whether they are exact, and where they point."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import nn

from dlk_utils.extract.batches import pad
from dlk_utils.extract.gradients import counterfactual_states, full_backprop, states_and_gradients
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import read_rows
from dlk_utils.models.sites import SITES


def feature_norms(
    folder: Path, rows: pd.DataFrame, kind: str, n_layers: int
) -> dict[str, Float[np.ndarray, "layer n"]]:
    """Measure the norm of every ``"activation"`` or ``"gradient"`` of some rows, by site."""
    norms = {}
    for site in SITES:
        names = [f"{kind}.{site}.{layer}.0" for layer in range(n_layers)]
        norms[site] = np.stack(
            [np.linalg.norm(read_rows(folder, rows, name), axis=1) for name in names]
        )
    return norms


def distance_alone(model: nn.Module, folder: Path, rows: pd.DataFrame) -> pd.Series:
    """Run each row alone, and measure how far its stored states lie from the states it has then.

    Returns
    -------
    Series
        By layer, the largest distance at `resid_post` relative to the state's norm.
    """
    distances = {}
    alone = [
        forward_states(model, pad([ids], device=model.device), ["resid_post"])[0]["resid_post"]
        for ids in rows.input_ids
    ]
    for layer, expected in enumerate(torch.cat(alone, 1).float()):
        stored = torch.from_numpy(read_rows(folder, rows, f"activation.resid_post.{layer}.0"))
        distance = (stored - expected).norm(dim=-1) / expected.norm(dim=-1)
        distances[layer] = float(distance.max())
    return pd.Series(distances)


def least_cosines(model: nn.Module, rows: pd.DataFrame) -> pd.DataFrame:
    """Compare the gradients from a cached prefix with those of full backprop.

    Returns
    -------
    DataFrame
        The least cosine over the rows, by layer (rows) and site (columns).
    """
    prompts, choice_ids = list(rows.input_ids), list(rows.choice_ids)
    _, cached, _ = states_and_gradients(model, prompts, choice_ids, SITES)
    full = full_backprop(model, pad(prompts, device=model.device), choice_ids, SITES)
    least = {}
    for site in SITES:
        cosine = torch.cosine_similarity(cached[site].float(), full[site].float(), dim=-1)
        least[site] = cosine.min(dim=1).values.numpy()
    return pd.DataFrame(least)


def moved_margins(
    model: nn.Module, rows: pd.DataFrame, *, layer: int, steps: Sequence[float]
) -> pd.DataFrame:
    """Push the states of one layer towards the other answer, and read the margins that follow.

    A step is the share of the state's norm by which it is moved along the gradient.
    """
    prompts, choice_ids = list(rows.input_ids), list(rows.choice_ids)
    margins = {}
    for step in steps:
        _, logp = counterfactual_states(
            model, prompts, choice_ids, ["resid_post"], layer=layer, step=step
        )
        logp = logp.float().numpy()
        margins[f"moved by {step}"] = logp[:, 1] - logp[:, 0]
    return pd.DataFrame(margins).assign(clean=rows.margin.to_numpy())
