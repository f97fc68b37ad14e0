"""How states are scaled before a probe sees them; what is learned is learned on train."""

import torch
from jaxtyping import Float
from torch import Tensor

SCALES = ("none", "neuron", "row", "whiten")
"""As they are; each neuron by its mean and standard deviation; each row to length 1; neurons decorrelated (as far as the number of rows carries)."""


class Scale:
    """For each of a batch of feature matrices; `fit` on train rows, then call it on any."""

    def __init__(self, how: str):
        if how not in SCALES:
            raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {how!r}")
        self.how = how

    def fit(self, X: Float[Tensor, "b n d"]) -> "Scale":
        """Learn mean, deviation and directions of the rows."""
        self.mean, self.deviation = X.mean(1, keepdim=True), X.std(1, correction=0, keepdim=True)
        if self.how == "whiten":
            _, s, self.directions = torch.linalg.svd(X - self.mean, full_matrices=False)
            variance = s**2 / X.shape[1]
            self.stretch = (
                variance + variance.sum(1, keepdim=True) / X.shape[2]
            ).rsqrt()  # the mean variance of a neuron is added, so that no direction counts for what two rows do
        return self

    def __call__(self, X: Float[Tensor, "b n d"]) -> Float[Tensor, "b n k"]:
        """The rows, scaled."""
        if self.how == "none":
            return X
        if self.how == "row":
            return X / X.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        if self.how == "whiten":
            return (X - self.mean) @ self.directions.transpose(1, 2) * self.stretch[:, None]
        return (X - self.mean) / torch.where(
            self.deviation > 1e-12, self.deviation, torch.ones_like(self.deviation)
        )
