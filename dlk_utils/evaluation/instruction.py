"""Remove the effect of the instruction to lie from a truth score, without labels of lying rows."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.evaluation.selection import LayerProbe, require_twins, twin_rows
from dlk_utils.probes import LDA


@dataclass(frozen=True)
class InstructionShift:
    """How far the instruction to lie moves a truth score, and how much of that a state shows.

    ``direction . x + offset`` places a state x between the mean of rows told to tell the truth (0)
    and the mean of their twins told to lie (1). Going all the way changes the score by `shift`.
    `fit_shift` makes it.

    Attributes
    ----------
    direction, offset : Tensor [d], float
        A linear discriminant of the two instructions.
    shift : float
        The mean change of the score from rows told to tell the truth to their twins.
    """

    direction: Float[Tensor, " d"]
    offset: float
    shift: float

    def of_states(self, states: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Return how far the instruction has moved the scores of states [n]."""
        share = states @ self.direction.numpy() + self.offset
        return self.shift * share

    def taken_out(
        self, weight: Float[Tensor, " d"], bias: float
    ) -> tuple[Float[Tensor, " d"], float]:
        """Return weight and bias of the score less what the instruction changes.

        It is linear too, and does not need to know the instruction of the row that it scores.
        """
        return weight - self.shift * self.direction, bias - self.shift * self.offset


def fit_shift(probe: LayerProbe, rows: pd.DataFrame) -> InstructionShift:
    """Fit how the instruction to lie moves the scores of a probe at its layer.

    No label of any row is used.

    Parameters
    ----------
    probe : LayerProbe
        Of truth, fitted on honest rows.
    rows : DataFrame
        Rows with `role`, `example_id` and `split`. Twins of the training and validation rows tell
        the instructions apart. The shift of the score is that of validation rows, which the probe
        was not fitted on.

    Raises
    ------
    TooFewRows
        If there are too few twins in validation.
    """
    read = list(probe.features.values())[probe.chosen]
    validation_twins = twin_rows(rows[rows.split == "validation"])
    require_twins(validation_twins)
    honest, lying = (probe.score(some) for some in validation_twins)
    shift = float((lying - honest).mean())

    honest, lying = (read(some) for some in twin_rows(rows[rows.split != "test"]))
    is_lying = np.repeat([0, 1], [len(honest), len(lying)])
    discriminant = LDA(scale="neuron").fit(np.concatenate([honest, lying]), is_lying)
    weights, biases = discriminant.raw_weights()
    direction, bias = weights[0].cpu().double(), float(biases[0])
    ends = [torch.as_tensor(some).double().mean(0) @ direction + bias for some in (honest, lying)]
    length = float(ends[1] - ends[0])
    return InstructionShift(direction / length, (bias - float(ends[0])) / length, shift)
