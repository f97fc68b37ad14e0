"""Steer a model while it runs: add a direction to its states, or remove one from them.

A probe shows what can be read from a state. Whether the model itself uses it is another
question, which an intervention answers: change the state along the probe's direction, and see
whether the answer changes::

    with steer(model, direction, layer=12, scale=2.0):
        logprobs, _ = answer_logprobs(model, input_ids, choice_ids)

Within the ``with`` block every forward pass of the model is changed: those of this package,
``model(...)`` and ``model.generate(...)``. States that are read within it are those after the
change. Blocks can be nested; the changes then follow one another in the order of the blocks. The
hooks are removed at the end of the block, also after an error, and no weight is touched.

References
----------
K. Li et al., *Inference-Time Intervention: Eliciting Truthful Answers from a Language Model*,
arXiv:2306.03341: directions are added in units of the standard deviation along them.
S. Marks and M. Tegmark, *The Geometry of Truth*, arXiv:2310.06824: the difference of class means
moves answers more than the weights of a classifier do.
A. Arditi et al., *Refusal in Language Models Is Mediated by a Single Direction*, arXiv:2406.11717:
one direction is removed at all layers.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dlk_utils.errors import ParameterError
from dlk_utils.extract.batches import Layers
from dlk_utils.extract.passes import check_model
from dlk_utils.extract.prefixes import complete_prompts
from dlk_utils.models import configuration
from dlk_utils.models.sites import at_sites, blocks, layer_numbers

Vectors = Any
"""A vector [d], or one for each of k layers [k, d]: an array, a tensor or a list."""

Positions = str | int
"""At which tokens states are changed: "all", or how many from the end."""


@contextlib.contextmanager
def steer(
    model: nn.Module,
    direction: Vectors,
    layer: Layers,
    scale: float | int,
    *,
    positions: Positions = "all",
) -> Iterator[None]:
    """Within the ``with`` block, add ``scale * direction`` to the residual stream after a layer.

    The unit of `scale` is the length of `direction`, which is not normalised. With the difference
    of two class means, a scale of 1 moves states from one mean to the other. With a direction of
    `scaled_to_spread`, the scale counts standard deviations of the states along it.

    Parameters
    ----------
    model
        A causal model of transformers, in evaluation mode.
    direction
        A vector [d] in the units of the states, such as ``probe.raw_weights()[0][0]`` of a
        linear probe. With several layers, one for all of them, or one for each [k, d], in order of
        depth.
    layer
        A number (from the end if negative), or several: see `models.sites.layer_numbers`. The
        states are changed at `resid_post`.
    scale
        How many times `direction` is added; it may be negative. 0 changes nothing.
    positions
        "all": at every token, generated ones as well. A number n: at the last n tokens of
        each row of a pass, so of each prompt, and in generation at each new token. Each prompt then
        runs whole in its own padded row, which is slower than packing. Functions that run prompts
        in parts (gradients, and dropout of the last token) raise `ParameterError`.

    Raises
    ------
    ParameterError
        If the model is in training mode, or has no such layer; if `direction` has another shape, is
        zero or not finite; or if another argument is out of range.
    UnknownArchitecture
        If the model's sites are not known.
    """
    vectors, layers = _vectors_by_layer(model, direction, layer)
    if not _is_number(scale):
        raise ParameterError(f"scale: expected a finite number, got {scale!r}")
    shifts = {number: scale * vector for number, vector in zip(layers, vectors, strict=True)}

    def add(number: int, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return hidden + shifts[number].to(hidden)

    with _changed_states(model, layers, add, positions):
        yield


@contextlib.contextmanager
def ablate(
    model: nn.Module,
    direction: Vectors,
    layers: Layers = "all",
    *,
    center: Vectors | None = None,
    positions: Positions = "all",
) -> Iterator[None]:
    """Within the ``with`` block, remove a direction from the residual stream.

    After each of the layers, states lose their component along `direction`, whose length does not
    matter: ``h - ((h - center) . u) u`` with the unit vector u. It is computed in single precision
    or wider.

    Parameters
    ----------
    model, direction, positions
        As for `steer`.
    layers
        After which layers: see `models.sites.layer_numbers`.
    center
        A vector [d], or one for each layer [k, d]. Each state's component along `direction` is
        replaced by that of `center` (by default zero). Pass a mean of states to keep their average
        component.

    Raises
    ------
    ParameterError
        As for `steer`, and if `center` has another shape or is not finite.
    UnknownArchitecture
        If the model's sites are not known.
    """
    vectors, numbers = _vectors_by_layer(model, direction, layers)
    centers = torch.zeros_like(vectors)
    if center is not None:
        centers = _as_vectors("center", center, len(numbers), vectors.shape[1])
    units = vectors / vectors.norm(dim=1, keepdim=True)
    unit_of = dict(zip(numbers, units, strict=True))
    center_of = dict(zip(numbers, centers, strict=True))

    def project_out(number: int, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        precision = torch.promote_types(hidden.dtype, torch.float32)
        states = hidden.to(precision)
        unit, middle = unit_of[number].to(states), center_of[number].to(states)
        component = (states - middle) @ unit
        return (states - component[..., None] * unit).to(hidden.dtype)

    with _changed_states(model, numbers, project_out, positions):
        yield


def scaled_to_spread(direction: Any, states: Any) -> Float[np.ndarray, " d"]:
    """Give a direction the length of one standard deviation of some states along it.

    Parameters
    ----------
    direction
        A vector [d] other than zero.
    states
        States [n, d] of one layer, such as those of training prompts.

    Raises
    ------
    ParameterError
        If the shapes do not fit, or a value is not finite; if `direction` is zero, or the states
        do not vary along it.
    """
    states = np.asarray(states, dtype=float)
    if states.ndim != 2 or len(states) < 2 or not np.isfinite(states).all():
        raise ParameterError(
            f"states: expected finite states [n, d] of two rows or more, got the shape "
            f"{list(states.shape)}"
        )
    [vector] = _as_vectors("direction", direction, 1, states.shape[1])
    _require_lengths(vector[None], [""])
    unit = (vector / vector.norm()).numpy()
    spread = np.std(states @ unit)
    if not spread > 0:
        raise ParameterError(
            "states: expected states that differ along the direction, got states that do not"
        )
    return spread * unit


def _vectors_by_layer(
    model: nn.Module, direction: Vectors, layers: Layers
) -> tuple[Float[Tensor, "k d"], list[int]]:
    """Check the model, the layers and the direction; return a vector for each layer, and them."""
    check_model(model)
    numbers = layer_numbers(layers, len(blocks(model)))
    if not numbers:
        raise ParameterError(f"layers: expected at least one layer, got {layers!r}")
    vectors = _as_vectors("direction", direction, len(numbers), configuration.width(model))
    _require_lengths(vectors, [f" at layer {number}" for number in numbers])
    return vectors, numbers


def _as_vectors(name: str, values: Vectors, n: int, width: int) -> Float[Tensor, "n width"]:
    """Return `n` vectors in double precision, given one for all of them or `n` of them."""
    try:
        vectors = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ParameterError(f"{name}: expected numbers, got {repr(values)[:60]}") from None
    if vectors.shape not in ((width,), (n, width)):
        several = f", or one for each of {n} layers [{n}, {width}]" if n > 1 else ""
        raise ParameterError(
            f"{name}: expected a vector [{width}]{several}, got the shape {list(vectors.shape)}"
        )
    if not vectors.isfinite().all():
        raise ParameterError(f"{name}: expected finite numbers, got nan or inf among them")
    return vectors.expand(n, width)


def _require_lengths(vectors: Float[Tensor, "n d"], places: list[str]) -> None:
    for vector, place in zip(vectors, places, strict=True):
        if not vector.any():
            raise ParameterError(f"direction: expected a vector other than zero, got zeros{place}")


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and bool(np.isfinite(float(value)))


@contextlib.contextmanager
def _changed_states(
    model: nn.Module,
    layers: list[int],
    change: Callable[[int, Tensor], Tensor],
    positions: Positions,
) -> Iterator[None]:
    """Within it, `resid_post` of some layers is ``change(layer, hidden)`` at some positions."""

    def change_all(site: str, layer: int, hidden: Tensor) -> Tensor:
        return change(layer, hidden)

    if positions == "all":
        with at_sites(model, ["resid_post"], change_all, layers):
            yield
        return
    if isinstance(positions, bool) or not isinstance(positions, Integral) or positions < 1:
        raise ParameterError(
            f"positions: expected 'all' or a number of tokens from the end (at least 1), got "
            f"{positions!r}"
        )
    signature = inspect.signature(type(model).forward)
    attention_mask: Any = None

    def note_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal attention_mask
        arguments = signature.bind_partial(module, *args, **kwargs).arguments
        attention_mask = arguments.get("attention_mask")

    def change_last(site: str, layer: int, hidden: Tensor) -> Tensor:
        is_last = _last_tokens(attention_mask, hidden, int(positions))
        return torch.where(is_last[..., None], change(layer, hidden), hidden)

    with contextlib.ExitStack() as stack:
        stack.enter_context(complete_prompts(model))
        stack.enter_context(model.register_forward_pre_hook(note_mask, with_kwargs=True))
        stack.enter_context(at_sites(model, ["resid_post"], change_last, layers))
        yield


def _last_tokens(
    attention_mask: Any, hidden: Float[Tensor, "b t d"], n: int
) -> Bool[Tensor, "b t"]:
    """Say which tokens of a pass are among the last `n` of their row, padding left out."""
    n_rows, n_tokens = hidden.shape[:2]
    if attention_mask is None:
        is_token = torch.ones(n_rows, n_tokens, dtype=torch.bool, device=hidden.device)
    elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        # The mask also covers tokens in a cache, which come before those that run.
        is_token = attention_mask[:, -n_tokens:].to(hidden.device, torch.bool)
    else:
        raise ParameterError(
            "positions: expected a mask over tokens, which shows the last ones of each prompt, got "
            "a mask over pairs of tokens; use positions='all'"
        )
    from_the_end = is_token.flip(1).cumsum(1).flip(1)
    return is_token & (from_the_end <= n)
