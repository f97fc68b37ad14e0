"""Adam for a batch of probes at once, for what has no closed form and is no sum over rows: each probe's loss is its own, and Adam looks at one number at a time, so that none sees the others.

Source: Kingma and Ba, arXiv 1412.6980.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def descend(
    start: Sequence[Tensor], loss: Callable[..., Float[Tensor, " b"]], *, steps: int, rate: float
) -> list[Tensor]:
    """Parameters, each [b, ...], after `steps` steps of Adam on `loss(*parameters)`, one number for each of the batch. The rate falls to zero along half a cosine."""
    parameters = [x.clone().requires_grad_() for x in start]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss(*parameters).sum().backward()
            optimizer.step()
            schedule.step()
    return [x.detach() for x in parameters]
