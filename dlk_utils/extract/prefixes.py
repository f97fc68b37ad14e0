"""All tokens but the last of some prompts, run once; then the last tokens, side by side.

What is read of a prompt (an answer, a state, a gradient, a draw) is read at its last token. The
tokens before it, its *prefix*, run without a graph and go into a key-value cache. Then the last
tokens of all prompts run in one pass, each seeing its own prefix and itself, and that pass alone
has gradients or dropout. See `Prefixes`.

Where the model can be told by a mask what each token sees (`takes_trees`), the prefixes are packed
as trees (`packing`), so beginnings that prompts share run only once. Elsewhere each prompt has a
padded row of its own.
"""

import contextlib
import copy
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from dlk_utils.extract.batches import (
    EnoughComputed,
    Readout,
    cut,
    forward,
    is_left_padded,
    pad,
    takes_positions,
)
from dlk_utils.extract.packing import Packed, pack
from dlk_utils.models.sites import blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prefixes:
    """Prompts whose tokens but the last are in a key-value cache; made by `run_prefixes`.

    Attributes
    ----------
    last_ids : Tensor [n]
        The last token of each prompt.
    cache : Cache
        Keys and values of `nodes` tokens in each row.
    position_ids : Tensor [r, nodes]
        The position of each cached token in its own prompt.
    sees : Tensor [r, nodes, nodes], or None
        Which cached tokens each cached token sees. None if every prompt has a row of its own,
        whose last token is the last place.
    mask : Tensor [r, nodes]
        0 at padding; used if `sees` is None.
    row, node : Tensor [n]
        Where each prompt's prefix ends.
    """

    last_ids: Int[Tensor, " n"]
    cache: Cache
    position_ids: Int[Tensor, "r t"]
    sees: Bool[Tensor, "r t t"] | None
    mask: Int[Tensor, "r t"]
    row: Int[Tensor, " n"]
    node: Int[Tensor, " n"]

    def append(self, tokens: Int[Tensor, "copy n"] | None = None) -> Readout:
        """Put tokens behind the prefixes: one for each copy and prompt, by default the last tokens.

        No token sees another of them. `Prefixes` stays as it is, and can be appended to again.

        Raises
        ------
        ValueError
            If there is more than one copy, and each prompt has a row of its own (`rounds`).
        """
        tokens = self.last_ids[None] if tokens is None else tokens.to(self.row.device)
        n_copies, device = len(tokens), self.row.device
        if n_copies > 1 and self.sees is None:
            raise ValueError(f"append: expected one copy in a padded batch, got {n_copies}")
        row = self.row.expand(n_copies, -1)
        place = _number_within(row)
        width = int(place.max()) + 1
        n_rows = len(self.position_ids)

        # Free places, in rows with fewer prompts than others, hold a token that sees itself alone.
        input_ids = torch.zeros(n_rows, width, dtype=torch.long, device=device)
        position_ids = torch.zeros_like(input_ids)
        input_ids[row, place] = tokens
        position_ids[row, place] = (self.position_ids[self.row, self.node] + 1).expand_as(row)
        batch = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "past_key_values": branch(self.cache),
        }
        if self.sees is None:
            batch["attention_mask"] = torch.cat([self.mask, self.mask.new_ones(n_rows, 1)], 1)
            return Readout(batch, row, place)
        n_nodes = self.position_ids.shape[1]
        sees = torch.zeros(n_rows, width, n_nodes + width, dtype=torch.bool, device=device)
        sees[row, place, :n_nodes] = self.sees[self.row, self.node].expand(n_copies, -1, -1)
        sees[:, range(width), range(n_nodes, n_nodes + width)] = True
        batch["attention_mask"] = sees
        return Readout(batch, row, place)

    def grown(self, appended: Readout) -> "Prefixes":
        """Return the prefixes with tokens that were appended, once these have run.

        The next tokens that are appended then stand behind those.
        """
        batch, n_nodes = appended.batch, self.position_ids.shape[1]
        position_ids = torch.cat([self.position_ids, batch["position_ids"]], 1)
        sees, mask = None, batch["attention_mask"]
        if self.sees is not None:
            width = batch["input_ids"].shape[1]
            earlier = torch.nn.functional.pad(self.sees, (0, width))
            sees = torch.cat([earlier, batch["attention_mask"]], 1)
            mask = torch.ones_like(position_ids)
        return Prefixes(
            last_ids=self.last_ids,
            cache=batch["past_key_values"],
            position_ids=position_ids,
            sees=sees,
            mask=mask,
            row=self.row,
            node=n_nodes + appended.place[0],
        )

    def rounds(self, n_copies: int, at_once: int | None = None) -> Iterator[range]:
        """Divide copies into those that run side by side, by default as many tokens as prefixes.

        One at a time where each prompt has a row of its own.
        """
        if self.sees is None:
            at_once = 1
        elif at_once is None:
            at_once = max(1, self.position_ids.numel() // len(self.last_ids))
        for start in range(0, n_copies, at_once):
            yield range(start, min(start + at_once, n_copies))


@torch.no_grad()
def run_prefixes(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, highest: int | None = None
) -> Prefixes:
    """Run all tokens but the last of each prompt, packed where the model takes it (`takes_trees`).

    Parameters
    ----------
    prompts
        Token ids, at least two for each prompt.
    highest
        The highest layer that will be read. No layer above it runs, and of this one only what later
        tokens see. By default the last layer.

    Raises
    ------
    ValueError
        If a prompt has fewer than two tokens, or the model is in training mode.
    """
    if min(map(len, prompts)) < 2:
        raise ValueError("prefixes: expected prompts of at least two tokens")
    if takes_trees(model, max(map(len, prompts))):
        return _packed_prefixes(model, prompts, highest)
    return _padded_prefixes(model, prompts)


def takes_trees(model: nn.Module, longest: int) -> bool:
    """Whether a mask and positions alone decide what a token sees, in prompts of `longest` tokens.

    They do not where a model counts distance in places, as ALiBi does, or where a sliding window is
    not longer than the prompts, or in a fused kernel that takes no mask. A model is tried out once,
    on a few tokens, and said to run padded prompts if the two ways do not agree.
    """
    # One token more, for a choice that is appended to the prompt (`Prefixes.grown`).
    if window(model) < longest + 1:
        return False
    tried = _tried.setdefault(model, {})
    implementation = model.config._attn_implementation
    if implementation not in tried:
        reason = _why_not_packed(model)
        tried[implementation] = reason is None
        if reason:
            log.info("%s runs padded prompts: %s", model.config.model_type, reason)
    return tried[implementation]


def in_parts(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    ids_of: Callable[[Any], Sequence[int]],
    batch_tokens: int,
) -> Iterator[list[Any]]:
    """Yield batches of `plan_packed`, cut into padded ones where the model does not take trees.

    `ids_of` gives the token ids of a row of a batch. A padded batch has at most `batch_tokens`
    tokens, or a single prompt.
    """
    for batch in batches:
        lengths = {row: len(ids_of(row)) for row in batch}
        if takes_trees(model, max(lengths.values())):
            yield list(batch)
        else:
            by_length = sorted((length, row) for row, length in lengths.items())
            yield from cut(by_length, batch_tokens, len(by_length))


def window(model: nn.Module) -> float:
    """Return how many tokens a layer with a sliding window sees; infinite without a window."""
    config = model.config.get_text_config()
    if not getattr(config, "use_sliding_window", True):
        return math.inf
    return float(getattr(config, "sliding_window", None) or math.inf)


@torch.no_grad()
def run_trunk(
    model: nn.Module,
    packed: Packed,
    token_ids: Sequence[Sequence[int]],
    *,
    keeps_rows: bool = False,
    highest: int | None = None,
) -> Readout:
    """Run the trunk of packed trees; return the rows of branches behind it, to be read at the ends.

    Parameters
    ----------
    packed, token_ids
        The trees, and the token id at each place of each row.
    keeps_rows
        Of the batch's cache (`TreeCache`).
    highest
        The highest layer that will be read. The pass over the trunk ends there, by default at the
        last layer, as soon as it has the keys and values.
    """
    n_trunk, device = packed.n_trunk, model.device
    ids = torch.tensor(token_ids, device=device)
    depth = torch.from_numpy(packed.depth).to(device)
    sees = torch.from_numpy(packed.sees()).to(device)
    trunk_cache = None
    if n_trunk:
        trunk_cache = TreeCache(highest=len(blocks(model)) - 1 if highest is None else highest)
        trunk = {
            "input_ids": ids[:1, :n_trunk],
            "attention_mask": sees[:1, :n_trunk, :n_trunk],
            "position_ids": depth[:1, :n_trunk],
            "past_key_values": trunk_cache,
        }
        with contextlib.suppress(EnoughComputed):
            forward(model, trunk, use_cache=True)
    rows = {
        "input_ids": ids[:, n_trunk:],
        "attention_mask": sees[:, n_trunk:],
        "position_ids": depth[:, n_trunk:],
        "past_key_values": TreeCache(trunk_cache, keeps_rows=keeps_rows),
    }
    row, place = torch.from_numpy(packed.row), torch.from_numpy(packed.place - n_trunk)
    return Readout(rows, row[None].to(device), place[None].to(device))


def tree_of(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, highest: int | None = None
) -> Readout:
    """Pack complete prompts, run their trunk, and return the rest, to be read at the last tokens.

    The model has to take trees (`takes_trees`). `highest` is the highest layer that will be read.
    """
    packed = pack(prompts)
    return run_trunk(model, packed, _padded_with_zeros(packed.keys), highest=highest)


def _packed_prefixes(
    model: nn.Module, prompts: Sequence[Sequence[int]], highest: int | None
) -> Prefixes:
    packed = pack([list(ids)[:-1] for ids in prompts])
    token_ids = _padded_with_zeros(packed.keys)
    rows = run_trunk(model, packed, token_ids, keeps_rows=True, highest=highest)
    cache = rows.batch["past_key_values"]
    cache.highest = highest
    with contextlib.suppress(EnoughComputed):
        forward(model, rows.batch, use_cache=True)
    cache.highest = None
    device = model.device
    depth = torch.from_numpy(packed.depth).to(device)
    return Prefixes(
        last_ids=torch.tensor([ids[-1] for ids in prompts], device=device),
        cache=cache,
        position_ids=depth,
        sees=torch.from_numpy(packed.sees()).to(device),
        mask=torch.ones_like(depth),
        row=rows.row[0],
        node=rows.place[0] + packed.n_trunk,
    )


def _padded_with_zeros(keys: Sequence[Sequence[int | None]]) -> list[list[int]]:
    return [[token or 0 for token in row] for row in keys]


def _padded_prefixes(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Prefixes:
    batch = pad([list(ids)[:-1] for ids in prompts], device=model.device)
    assert is_left_padded(batch)
    # The model makes the cache itself: one with a sliding window has layers of another kind.
    cache = forward(model, batch, use_cache=True).past_key_values
    n, width = batch["input_ids"].shape
    device = batch["input_ids"].device
    return Prefixes(
        last_ids=torch.tensor([ids[-1] for ids in prompts], device=device),
        cache=cache,
        position_ids=batch["position_ids"],
        sees=None,
        mask=batch["attention_mask"],
        row=torch.arange(n, device=device),
        node=torch.full((n,), width - 1, device=device),
    )


class TreeCache(DynamicCache):
    """A key-value cache of rows of branches, which all have the same trunk before them.

    The trunk's keys and values are kept once, not for each row. All tokens are kept, also where the
    model has a sliding window: the mask says what is seen.

    Parameters
    ----------
    trunk
        The cache of a pass over the trunk, in one row.
    keeps_rows
        Whether to keep the keys and values of the rows, for tokens that will be appended to them.
    highest
        The pass ends (`EnoughComputed`) as soon as this layer's keys and values are there. By
        default no pass ends early.
    """

    def __init__(
        self,
        trunk: DynamicCache | None = None,
        *,
        keeps_rows: bool = True,
        highest: int | None = None,
    ):
        super().__init__()
        self.trunk = [] if trunk is None else trunk.layers
        self.keeps_rows = keeps_rows
        self.highest = highest

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [r, head, t, d] of a layer; return all that its tokens may see."""
        keys, values = key_states, value_states
        if self.keeps_rows:
            keys, values = super().update(keys, values, layer_idx, *args, **kwargs)
        if layer_idx == self.highest:
            raise EnoughComputed
        if self.trunk:
            trunk, n_rows = self.trunk[layer_idx], len(keys)
            keys = torch.cat([trunk.keys.expand(n_rows, -1, -1, -1), keys], 2)
            values = torch.cat([trunk.values.expand(n_rows, -1, -1, -1), values], 2)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens of each row are in the cache, with the trunk."""
        n_trunk = self.trunk[0].keys.shape[2] if self.trunk else 0
        return n_trunk + super().get_seq_length(layer_idx)


def branch(cache: Cache) -> Cache:
    """Return a cache with the same tensors, which stay as they are when it grows."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch


def _number_within(row: Int[Tensor, "copy n"]) -> Int[Tensor, "copy n"]:
    """Number the entries of each row: 0 for the first that has this row, 1 for the next, ..."""
    flat = row.flatten().cpu().numpy()
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], flat[order])
    number = np.empty_like(flat)
    number[order] = np.arange(len(flat)) - starts
    return torch.from_numpy(number).view(row.shape).to(row.device)


_tried: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()
"""For each model, whether it takes trees under each implementation of attention."""

_TRIAL = ([5, 6, 7, 8, 9], [5, 6, 9], [5, 6, 7, 4, 9, 3], [8, 3], [5, 6, 7, 8, 4])


@torch.no_grad()
def _why_not_packed(model: nn.Module) -> str | None:
    """Run a few tokens packed and padded; say why the model cannot run trees, None if it can."""
    if not takes_positions(model):
        return "the family is not told positions"
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [[token % vocabulary for token in ids] for ids in _TRIAL]
    try:
        appended = _packed_prefixes(model, prompts, None).append()
        logits = forward(model, appended.batch, n_logits=None, use_cache=True).logits
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"it refuses a mask over pairs of tokens ({error})"
    packed = appended.take(logits)[0].double()
    padded = forward(model, pad(prompts, device=model.device), use_cache=False).logits[:, -1]
    size = padded.double().norm(dim=-1)
    tolerance = 2e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4
    difference = ((packed - padded).norm(dim=-1) / size).max()
    return (
        None if difference <= tolerance else f"the states differ by {difference:.2g} of their norm"
    )
