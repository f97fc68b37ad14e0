"""Rotary positions whose frequencies depend on the longest prompt of a batch.

LongRoPE (Phi-3, Phi-4-mini) has one set of frequencies for batches whose longest prompt fits the
original context, and another for longer ones. Dynamic NTK scaling has other frequencies for each
length above it, and may keep those of an earlier, longer batch. So a short prompt has other states
beside a long one than alone, and a cached prefix other keys than its complete prompt.

Here such a model is found by a trial (`depends_on_batch`). Its prompts are then grouped so that all
of a batch have the same frequencies (`same_positions`), and each pass over a part of them gets the
frequencies of the complete prompts (`frequencies_for`). So each prompt has the states that it has
alone. A token appended to a complete prompt gets those of one token more, as in generation.

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

_dependent: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = weakref.WeakKeyDictionary()
"""For each model, its modules that compute positions which depend on the batch."""

_keys: weakref.WeakKeyDictionary[nn.Module, dict[int, bytes]] = weakref.WeakKeyDictionary()
"""For each such model, what tells the frequencies of a length from others (`_key`)."""


def depends_on_batch(model: nn.Module) -> bool:
    """Whether a token's position means something else beside a long prompt than alone.

    Each model is tried once, on positions alone: no block runs.
    """
    return bool(_rotary_modules(model))


@torch.no_grad()
def _rotary_modules(model: nn.Module) -> list[nn.Module]:
    if model not in _dependent:
        far = 2 * context_length(model)
        dependent = []
        for module in model.modules():
            if any(kind == "longrope" or "dynamic" in kind for kind in _kinds(module).values()):
                alone = _at_first_positions(module, [0, 1])
                beside = _at_first_positions(module, [0, 1, far])
                if not torch.equal(alone, beside):
                    dependent.append(module)
        _dependent[model] = dependent
    return _dependent[model]


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """Return how a module makes rotary positions, for each kind of layer that it serves.

    The key is None if it serves all layers. The result is empty for other modules.
    """
    kinds = getattr(module, "rope_type", None) or {}
    return kinds if isinstance(kinds, dict) else {None: kinds}


def _at_first_positions(module: nn.Module, positions: Sequence[int]) -> Tensor:
    """Return what a module of rotary positions puts out at the first two of some positions."""
    _forget(module)
    found = [x[..., :2, :].flatten() for x in _put_out(module, positions)]
    _forget(module)
    return torch.cat(found).cpu()


def _forget(module: nn.Module) -> None:
    """Let dynamic scaling forget the longest length it has seen, by a pass over one position."""
    _put_out(module, [0])


def _put_out(module: nn.Module, positions: Sequence[int]) -> list[Tensor]:
    """Return cosines and sines at some positions, [1, t, width], for each kind of layer."""
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    position_ids = torch.tensor([positions], device=device)
    found = []
    for kind in _kinds(module):
        options = {} if kind is None else {"layer_type": kind}
        found += module.forward(torch.zeros(1, device=device), position_ids, **options)
    return found


@torch.no_grad()
def _key(model: nn.Module, n_tokens: int) -> bytes:
    """Return the same bytes for two lengths of prompts if positions mean the same in both."""
    keys = _keys.setdefault(model, {})
    if n_tokens not in keys:
        modules = _rotary_modules(model)
        found = [_at_first_positions(module, [0, 1, n_tokens - 1]) for module in modules]
        keys[n_tokens] = torch.cat(found).numpy().tobytes()
    return keys[n_tokens]


def same_positions(
    model: nn.Module, batches: Iterable[Sequence[Any]], ids_of: Callable[[Any], Sequence[int]]
) -> Iterator[list[Any]]:
    """Yield batches, divided so that positions mean the same for all prompts of each.

    `ids_of` gives the token ids of a batch's prompt. Most models need no division.
    """
    for batch in batches:
        if not depends_on_batch(model):
            yield list(batch)
            continue
        by_key: dict[bytes, list[Any]] = {}
        for prompt in batch:
            by_key.setdefault(_key(model, len(ids_of(prompt))), []).append(prompt)
        yield from by_key.values()


def require_same_positions(model: nn.Module, lengths: Iterable[int]) -> None:
    """Raise `ParameterError` if positions do not mean the same in prompts of these lengths."""
    if not depends_on_batch(model):
        return
    for length, other in itertools.pairwise(sorted(set(lengths))):
        if _key(model, length) != _key(model, other):
            raise ParameterError(
                f"{model.config.model_type}: expected prompts with the same rotary frequencies in "
                f"a batch, got lengths of {length} and {other} tokens; divide it (`same_positions`)"
            )


@contextlib.contextmanager
def frequencies_for(model: nn.Module, n_tokens: int) -> Iterator[None]:
    """Within it, positions mean what they mean in prompts of `n_tokens` tokens."""

    def add_last(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        _forget(module)
        positions = args[1] if len(args) > 1 else kwargs["position_ids"]
        last = positions.new_full((*positions.shape[:-1], 1), n_tokens - 1)
        longer = torch.cat([positions, last], -1)
        if len(args) > 1:
            return (args[0], longer, *args[2:]), kwargs
        return args, kwargs | {"position_ids": longer}

    def cut_last(module: nn.Module, args: tuple, cos_and_sin: tuple) -> tuple:
        return tuple(x[..., :-1, :] for x in cos_and_sin)

    with contextlib.ExitStack() as hooks:
        for module in _rotary_modules(model):
            hooks.enter_context(module.register_forward_pre_hook(add_last, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(cut_last))
        yield
