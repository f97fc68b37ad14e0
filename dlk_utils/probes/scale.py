"""How states are scaled before a probe sees them."""

import torch
from jaxtyping import Float
from torch import Tensor

from dlk_utils.errors import ParameterError

SCALES = ("none", "neuron", "row", "whiten")
"""The ways of scaling that `Scale` knows."""


class Scale:
    """Scale the states of each of b feature matrices, as learned on training rows.

    Parameters
    ----------
    how : str
        ``"none"``: leave the states as they are. ``"neuron"``: give each neuron mean 0 and standard
        deviation 1. ``"row"``: give each row length 1. ``"whiten"``: decorrelate the neurons, as
        far as the number of rows allows.

    Attributes
    ----------
    mean : Tensor, [b, 1, d]
        Mean of each neuron, where it is taken away: with ``"neuron"`` and ``"whiten"``.
    deviation : Tensor, [b, 1, d]
        With ``"neuron"``: standard deviation of each neuron, or 1 if the neuron is constant.
    """

    def __init__(self, how: str):
        if how not in SCALES:
            raise ParameterError(f"scale: expected one of {', '.join(SCALES)}, got {how!r}")
        self.how = how

    def fit(self, X: Float[Tensor, "b n d"]) -> "Scale":
        """Learn the scale from training rows."""
        if self.how in ("none", "row"):
            return self
        self.mean = X.mean(1, keepdim=True)
        if self.how == "neuron":
            deviation = X.std(1, correction=0, keepdim=True)
            self.deviation = torch.where(deviation > 1e-12, deviation, 1.0)
        else:
            _, singular, self._directions = torch.linalg.svd(X - self.mean, full_matrices=False)
            variance = singular**2 / X.shape[1]
            # The mean variance of a neuron is added, so that no direction that only a few rows span
            # is blown up.
            mean_variance = variance.sum(1, keepdim=True) / X.shape[2]
            self._stretch = (variance + mean_variance).rsqrt()
        return self

    def transform(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "b n k"]:
        """Return the rows scaled; k is d, or with ``"whiten"`` at most the number of train rows."""
        if self.how == "none":
            return X
        if self.how == "row":
            return X / X.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        if self.how == "whiten":
            return (X - self.mean) @ self._directions.transpose(1, 2) * self._stretch[:, None]
        return (X - self.mean) / self.deviation

    def to_raw(
        self, coef: Float[Tensor, "b k"], intercept: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        """Return weights and intercepts that score raw states as these score scaled ones."""
        if self.how == "none":
            return coef, intercept
        if self.how == "row":
            raise ParameterError(
                "scale 'row' is not linear: no weights of raw states give its scores"
            )
        if self.how == "whiten":
            weight = torch.einsum("bk,bkd->bd", coef * self._stretch, self._directions)
        else:
            weight = coef / self.deviation[:, 0]
        return weight, intercept - (weight * self.mean[:, 0]).sum(1)
