"""Keep each prompt's rotary frequencies independent of the other prompts in its batch.

Some models choose the frequencies of their rotary position embedding (RoPE) by the longest prompt
of a batch:

* LongRoPE (Phi-3, Phi-4-mini) has one set of frequencies for batches whose longest prompt fits the
  original context, and another set for longer batches.
* Dynamic NTK scaling has other frequencies for each length beyond the original context. It may also
  keep the frequencies of an earlier, longer batch.

In such a model a short prompt has other states next to a long prompt than alone, and a prefix that
is run and cached by itself has other keys than within its complete prompt.

This module gives each prompt the states that it has alone:

1. `depends_on_batch` tests whether a model is of this kind.
2. `divide_batches` divides batches, so that all prompts of one batch have the same frequencies.
3. `frequencies_for` sets the frequencies of the complete prompts while only a part of their tokens
   runs. A token that is appended to a complete prompt gets the frequencies of a prompt that is one
   token longer, as in generation.

References
----------
Y. Ding et al., *LongRoPE: extending LLM context window beyond 2 million tokens*, ICML 2024.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlk_utils.errors import ParameterError
from dlk_utils.models.configuration import context_length

_dependent_modules: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = (
    weakref.WeakKeyDictionary()
)
"""For each model that was tested, its rotary modules whose frequencies depend on the batch."""

_frequency_keys: weakref.WeakKeyDictionary[nn.Module, dict[int, bytes]] = (
    weakref.WeakKeyDictionary()
)
"""For each such model, the `_frequency_key` of each prompt length that was needed so far."""


def depends_on_batch(model: nn.Module) -> bool:
    """Return whether a model's rotary frequencies depend on the longest prompt of the batch.

    Each model is tested once. Only its rotary modules run, and no block.
    """
    return bool(_modules_that_depend_on_batch(model))


@torch.no_grad()
def _modules_that_depend_on_batch(model: nn.Module) -> list[nn.Module]:
    if model in _dependent_modules:
        return _dependent_modules[model]
    beyond_context = 2 * context_length(model)
    dependent = []
    for module in model.modules():
        rope_types = _rope_types(module).values()
        if not any(kind == "longrope" or "dynamic" in kind for kind in rope_types):
            continue
        alone = _first_two_positions(module, [0, 1])
        with_long_prompt = _first_two_positions(module, [0, 1, beyond_context])
        if not torch.equal(alone, with_long_prompt):
            dependent.append(module)
    _dependent_modules[model] = dependent
    return dependent


def _rope_types(module: nn.Module) -> dict[str | None, str]:
    """Return the kind of RoPE, such as "longrope", by the type of layer that a module serves it to.

    The key is None if a module serves all layers alike. Modules without RoPE give an empty dict.
    """
    rope_types = getattr(module, "rope_type", None) or {}
    return rope_types if isinstance(rope_types, dict) else {None: rope_types}


def _first_two_positions(module: nn.Module, positions: Sequence[int]) -> Tensor:
    """Run a rotary module on some positions, and return its cosines and sines at the first two.

    They are concatenated to one vector, on the CPU. The frequencies depend on the largest position.
    """
    _reset_frequencies(module)
    first_two = [values[..., :2, :].flatten() for values in _cosines_and_sines(module, positions)]
    _reset_frequencies(module)
    return torch.cat(first_two).cpu()


def _reset_frequencies(module: nn.Module) -> None:
    """Set a rotary module back to the frequencies of short prompts, by running one position.

    Dynamic scaling would otherwise keep those of the longest prompt so far.
    """
    _cosines_and_sines(module, [0])


def _cosines_and_sines(module: nn.Module, positions: Sequence[int]) -> list[Tensor]:
    """Return the cosines and the sines at some positions, each [1, t, width].

    A module that distinguishes types of layers gives two such tensors for each.
    """
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    position_ids = torch.tensor([positions], device=device)
    # The module takes only the data type and the device from its first argument.
    hidden = torch.zeros(1, device=device)
    cosines_and_sines = []
    for layer_type in _rope_types(module):
        options = {} if layer_type is None else {"layer_type": layer_type}
        # `forward` is called by name so that the hooks of `frequencies_for` do not run.
        cosines_and_sines += module.forward(hidden, position_ids, **options)
    return cosines_and_sines


@torch.no_grad()
def _frequency_key(model: nn.Module, n_tokens: int) -> bytes:
    """Return bytes that are equal for two prompt lengths if both have the same frequencies."""
    keys = _frequency_keys.setdefault(model, {})
    if n_tokens not in keys:
        positions = [0, 1, n_tokens - 1]
        modules = _modules_that_depend_on_batch(model)
        values = [_first_two_positions(module, positions) for module in modules]
        keys[n_tokens] = torch.cat(values).numpy().tobytes()
    return keys[n_tokens]


def divide_batches(
    model: nn.Module, batches: Iterable[Sequence[Any]], ids_of: Callable[[Any], Sequence[int]]
) -> Iterator[list[Any]]:
    """Divide batches, so that all prompts of a batch have the same rotary frequencies.

    Parameters
    ----------
    model
        The model that will run them. Most models need no division.
    batches
        Prompts, or whatever identifies them, such as row ids.
    ids_of
        Returns the token ids of an entry of `batches`.

    Yields
    ------
    list
        The entries of a whole batch, or of a part of one.
    """
    for batch in batches:
        if not depends_on_batch(model):
            yield list(batch)
            continue
        by_frequencies: dict[bytes, list[Any]] = {}
        for prompt in batch:
            key = _frequency_key(model, len(ids_of(prompt)))
            by_frequencies.setdefault(key, []).append(prompt)
        yield from by_frequencies.values()


def require_same_frequencies(model: nn.Module, lengths: Iterable[int]) -> None:
    """Raise `ParameterError` if prompts of these lengths differ in their rotary frequencies."""
    if not depends_on_batch(model):
        return
    for length, other in itertools.pairwise(sorted(set(lengths))):
        if _frequency_key(model, length) != _frequency_key(model, other):
            raise ParameterError(
                f"{model.config.model_type}: expected prompts with the same rotary frequencies in "
                f"a batch, got lengths of {length} and {other} tokens; use `divide_batches`"
            )


@contextlib.contextmanager
def frequencies_for(model: nn.Module, n_tokens: int) -> Iterator[None]:
    """Within the ``with`` block, run the model with the frequencies of `n_tokens`-token prompts.

    A rotary module takes the length of the longest prompt from its largest position. So each one is
    given the last position of such a prompt in addition, and what it returns for it is cut off.
    """

    def append_last_position(
        module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict[str, Any]]:
        _reset_frequencies(module)
        positions = args[1] if len(args) > 1 else kwargs["position_ids"]
        last_position = positions.new_full((*positions.shape[:-1], 1), n_tokens - 1)
        extended = torch.cat([positions, last_position], -1)
        if len(args) > 1:
            return (args[0], extended, *args[2:]), kwargs
        return args, kwargs | {"position_ids": extended}

    def cut_last_position(module: nn.Module, args: tuple, cosines_and_sines: tuple) -> tuple:
        return tuple(values[..., :-1, :] for values in cosines_and_sines)

    with contextlib.ExitStack() as hooks:
        for module in _modules_that_depend_on_batch(model):
            hooks.enter_context(
                module.register_forward_pre_hook(append_last_position, with_kwargs=True)
            )
            hooks.enter_context(module.register_forward_hook(cut_last_position))
        yield
