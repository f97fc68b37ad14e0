"""Run all tokens but the last of each prompt once; then run all last tokens together.

Everything that is read of a prompt (answer, state, gradient, draw) is read at its last token. The
tokens before it, its *prefix*, run without a graph and go into a key-value cache. Then the last
tokens of all prompts run in one pass, each seeing its own prefix and itself. Only that pass has
gradients or dropout. See `Prefixes`.

If the model accepts an arbitrary attention mask (`takes_trees`), prefixes are packed as trees
(`packing`), so that shared beginnings run only once. Otherwise each prompt has a padded row of its
own.
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

from dlk_utils.errors import ParameterError
from dlk_utils.extract.batches import (
    EnoughComputed,
    Readout,
    cut,
    forward,
    pad,
    require_evaluation_mode,
    takes_positions,
)
from dlk_utils.extract.packing import Packed, pack
from dlk_utils.extract.positions import divide_batches, require_same_frequencies
from dlk_utils.models.configuration import text_config
from dlk_utils.models.finding import trial_tokens
from dlk_utils.models.sites import blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prefixes:
    """Beginnings of prompts in a key-value cache; made by `run_prefixes`.

    Attributes
    ----------
    next_ids : Tensor [n], or None
        The token that follows each prefix: the last one of its prompt. None once it has been
        appended (`extended`).
    cache : Cache
        Keys and values of the tokens at all places of each row.
    position_ids : Tensor [r, places]
        The position of each cached token in its own prompt.
    sees : Tensor [r, places, places], or None
        Which cached tokens each cached token sees. None if every prompt has a row of its own, whose
        last token is at the last place.
    mask : Tensor [r, places], or None
        If `sees` is None, 0 at padding and 1 elsewhere.
    row, place : Tensor [n]
        Where each prefix ends.
    n_tokens : int
        Number of tokens in the longest of the complete prompts.
    """

    next_ids: Int[Tensor, " n"] | None
    cache: Cache
    position_ids: Int[Tensor, "r t"]
    sees: Bool[Tensor, "r t t"] | None
    mask: Int[Tensor, "r t"] | None
    row: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    n_tokens: int

    def append(self, tokens: Int[Tensor, "copy n"] | None = None) -> Readout:
        """Put a token behind each prefix, or several copies; by default the prompts' last tokens.

        No appended token sees another. `Prefixes` stays as it is, and can be appended to again.

        Raises
        ------
        ParameterError
            If there is more than one copy, and each prompt has a row of its own (`rounds`).
        """
        tokens = self.next_ids[None] if tokens is None else tokens.to(self.row.device)
        n_copies, device = len(tokens), self.row.device
        if n_copies > 1 and self.sees is None:
            raise ParameterError(f"append: expected one copy in a padded batch, got {n_copies}")
        row = self.row.expand(n_copies, -1)
        place = _number_within(row)
        width = int(place.max()) + 1
        n_rows = len(self.position_ids)

        # Rows with fewer prompts are padded with tokens that see only themselves.
        input_ids = torch.zeros(n_rows, width, dtype=torch.long, device=device)
        position_ids = torch.zeros_like(input_ids)
        input_ids[row, place] = tokens
        position_ids[row, place] = (self.position_ids[self.row, self.place] + 1).expand_as(row)
        batch = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "past_key_values": fork_cache(self.cache),
            "n_tokens": self.n_tokens,
        }
        if self.sees is None:
            batch["attention_mask"] = torch.cat([self.mask, self.mask.new_ones(n_rows, 1)], 1)
            return Readout(batch, row, place)
        n_cached = self.position_ids.shape[1]
        sees = torch.zeros(n_rows, width, n_cached + width, dtype=torch.bool, device=device)
        sees[row, place, :n_cached] = self.sees[self.row, self.place].expand(n_copies, -1, -1)
        sees[:, range(width), range(n_cached, n_cached + width)] = True
        batch["attention_mask"] = sees
        return Readout(batch, row, place)

    def extended(self, appended: Readout) -> "Prefixes":
        """Return prefixes that include appended tokens, one for each. Call it after these have run.

        Raises
        ------
        ParameterError
            If several copies were appended.
        """
        if len(appended.row) > 1:
            raise ParameterError(f"extended: expected one copy, got {len(appended.row)}")
        batch, n_cached = appended.batch, self.position_ids.shape[1]
        sees, mask = None, batch["attention_mask"]
        if self.sees is not None:
            earlier = torch.nn.functional.pad(self.sees, (0, batch["input_ids"].shape[1]))
            sees, mask = torch.cat([earlier, batch["attention_mask"]], 1), None
        return Prefixes(
            next_ids=None,
            cache=batch["past_key_values"],
            position_ids=torch.cat([self.position_ids, batch["position_ids"]], 1),
            sees=sees,
            mask=mask,
            row=self.row,
            place=n_cached + appended.place[0],
            n_tokens=self.n_tokens,
        )

    def rounds(self, n_copies: int, at_once: int | None = None) -> Iterator[range]:
        """Split copies into groups that run together.

        By default a group has about as many tokens as the cached prefixes. Where each prompt has a
        row of its own, a group is a single copy.
        """
        if self.sees is None:
            at_once = 1
        elif at_once is None:
            at_once = max(1, self.position_ids.numel() // len(self.row))
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
        The highest layer that will be read, by default the last. Packed prefixes run up to its keys
        and values, for later tokens see nothing else.

    Raises
    ------
    ParameterError
        If a prompt has fewer than two tokens, or the model is in training mode.
    """
    if min(map(len, prompts)) < 2:
        raise ParameterError("prefixes: expected prompts of at least two tokens")
    if _complete_only.get(model):
        raise ParameterError(
            "prefixes: expected a model that may run prompts in parts, got one whose last tokens "
            "are changed in passes over complete prompts (`complete_prompts`); gradients and "
            "dropout of the last token, for instance, cannot be had at the same time"
        )
    require_same_frequencies(model, map(len, prompts))
    if takes_trees(model, max(map(len, prompts))):
        return _packed_prefixes(model, prompts, _last_layer(model) if highest is None else highest)
    return _padded_prefixes(model, prompts)


def takes_trees(model: nn.Module, longest: int) -> bool:
    """Whether a mask and positions alone decide what each token sees, in prompts of some length.

    It is false for ALiBi, for sliding windows that are not longer than the prompts, for kernels
    that take no mask, and within `complete_prompts`. Each model is tried once per implementation of
    attention, on a few tokens. Raises `ParameterError` if it is in training mode.
    """
    if _complete_only.get(model):
        return False
    # One token more, for a choice that is appended to the prompt (`Prefixes.extended`).
    if window(model) < longest + 1:
        return False
    require_evaluation_mode(model)
    tried = _tried.setdefault(model, {})
    implementation = text_config(model)._attn_implementation
    if implementation not in tried:
        reason = why_not_packed(model)
        tried[implementation] = reason is None
        if reason:
            log.info("%s runs padded prompts: %s", model.config.model_type, reason)
    return tried[implementation]


@contextlib.contextmanager
def complete_prompts(model: nn.Module) -> Iterator[None]:
    """Within the ``with`` block, each prompt runs complete, in a padded row of its own.

    `takes_trees` is false, so nothing is packed, and `run_prefixes` raises `ParameterError`. This
    is for what has to know which token of a row is the last of its prompt.
    """
    _complete_only[model] = _complete_only.get(model, 0) + 1
    try:
        yield
    finally:
        _complete_only[model] -= 1


_complete_only: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""For each model, in how many blocks of `complete_prompts` it is."""


def in_parts(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    ids_of: Callable[[Any], Sequence[int]],
    batch_tokens: int,
) -> Iterator[list[Any]]:
    """Yield batches of `plan_packed`, cut into padded ones if the model does not take trees.

    `ids_of` gives the token ids of a batch's prompt. A padded batch has at most `batch_tokens`
    tokens, or a single prompt.
    """
    for batch in divide_batches(model, batches, ids_of):
        lengths = {prompt: len(ids_of(prompt)) for prompt in batch}
        if takes_trees(model, max(lengths.values())):
            yield list(batch)
        else:
            by_length = sorted((length, prompt) for prompt, length in lengths.items())
            yield from cut(by_length, batch_tokens, len(by_length))


def window(model: nn.Module) -> float:
    """Return how many tokens a layer with a sliding window sees; infinite without a window."""
    config = text_config(model)
    sizes = {name: getattr(config, name, None) for name in WINDOWS}
    if not getattr(config, "use_sliding_window", True):
        del sizes["sliding_window"]
    return float(min((size for size in sizes.values() if size), default=math.inf))


WINDOWS = (
    "sliding_window",
    # GPT-Neo's local attention.
    "window_size",
    # Modern BERT's decoder.
    "local_attention",
    # Llama 4: a token sees those of its own chunk.
    "attention_chunk_size",
    # DeepSeek 3.2, and Doge: a token sees as many as it finds most worth looking at.
    "index_topk",
    "keep_window_size",
    "index_block_size",
)
"""Settings of a configuration that limit how many tokens a token sees."""


@torch.no_grad()
def run_trunk(
    model: nn.Module,
    packed: Packed,
    token_ids: Sequence[Sequence[int]],
    *,
    n_tokens: int,
    keeps_rows: bool = False,
    highest: int | None = None,
) -> Readout:
    """Run the trunk; return the rows of branches, not yet run, to be read where sequences end.

    Parameters
    ----------
    packed, token_ids
        The trees, and the token id at each place of each row.
    n_tokens
        Number of tokens in the longest of the complete prompts.
    keeps_rows
        Option of the batch's cache (`TreeCache`).
    highest
        The highest layer that will be read, by default the last one. The pass over the trunk ends
        there, as soon as it has the keys and values.
    """
    n_trunk, device = packed.n_trunk, model.device
    ids = torch.tensor(token_ids, device=device)
    depth = torch.from_numpy(packed.depth).to(device)
    sees = torch.from_numpy(packed.sees()).to(device)
    trunk_cache = None
    if n_trunk:
        # Later tokens need nothing but keys and values, so the last layer can stop there.
        trunk_cache = TreeCache(highest=_last_layer(model) if highest is None else highest)
        trunk = {
            "input_ids": ids[:1, :n_trunk],
            "attention_mask": sees[:1, :n_trunk, :n_trunk],
            "position_ids": depth[:1, :n_trunk],
            "past_key_values": trunk_cache,
            "n_tokens": n_tokens,
        }
        with contextlib.suppress(EnoughComputed):
            forward(model, trunk, use_cache=True)
    rows = {
        "input_ids": ids[:, n_trunk:],
        "attention_mask": sees[:, n_trunk:],
        "position_ids": depth[:, n_trunk:],
        "past_key_values": TreeCache(trunk_cache, keeps_rows=keeps_rows),
        "n_tokens": n_tokens,
    }
    row, place = torch.from_numpy(packed.row), torch.from_numpy(packed.place - n_trunk)
    return Readout(rows, row[None].to(device), place[None].to(device))


def tree_of(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, highest: int | None = None
) -> Readout:
    """Pack complete prompts, run their trunk, and return the rest, to be read at the last tokens.

    The model has to take trees (`takes_trees`). `highest` is the highest layer that will be read.
    """
    n_tokens = max(map(len, prompts))
    require_same_frequencies(model, map(len, prompts))
    packed = pack(prompts)
    token_ids = _padded_with_zeros(packed.keys)
    return run_trunk(model, packed, token_ids, n_tokens=n_tokens, highest=highest)


def _packed_prefixes(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    highest: int,
    *,
    branch_size: int | None = None,
) -> Prefixes:
    packed = pack([list(ids)[:-1] for ids in prompts], branch_size=branch_size)
    token_ids = _padded_with_zeros(packed.keys)
    n_tokens = max(map(len, prompts))
    rows = run_trunk(model, packed, token_ids, n_tokens=n_tokens, keeps_rows=True, highest=highest)
    cache = rows.batch["past_key_values"]
    cache.highest = highest
    with contextlib.suppress(EnoughComputed):
        forward(model, rows.batch, use_cache=True)
    # The passes over the tokens that will be appended go to their own end.
    cache.highest = None
    device = model.device
    return Prefixes(
        next_ids=torch.tensor([ids[-1] for ids in prompts], device=device),
        cache=cache,
        position_ids=torch.from_numpy(packed.depth).to(device),
        sees=torch.from_numpy(packed.sees()).to(device),
        mask=None,
        row=rows.row[0],
        place=rows.place[0] + packed.n_trunk,
        n_tokens=n_tokens,
    )


def _last_layer(model: nn.Module) -> int:
    return len(blocks(model)) - 1


def _padded_with_zeros(keys: Sequence[Sequence[int | None]]) -> list[list[int]]:
    return [[token or 0 for token in row] for row in keys]


def _padded_prefixes(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Prefixes:
    batch = pad([list(ids)[:-1] for ids in prompts], device=model.device)
    batch["n_tokens"] = max(map(len, prompts))
    # The model makes the cache itself: one with a sliding window has layers of another kind.
    cache = forward(model, batch, use_cache=True).past_key_values
    n, width = batch["input_ids"].shape
    device = batch["input_ids"].device
    return Prefixes(
        next_ids=torch.tensor([ids[-1] for ids in prompts], device=device),
        cache=cache,
        position_ids=batch["position_ids"],
        sees=None,
        mask=batch["attention_mask"],
        row=torch.arange(n, device=device),
        place=torch.full((n,), width - 1, device=device),
        n_tokens=batch["n_tokens"],
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


def fork_cache(cache: Cache) -> Cache:
    """Return a shallow copy of a cache. If it grows, the original stays as it is."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def _number_within(row: Int[Tensor, "copy n"]) -> Int[Tensor, "copy n"]:
    """For each entry, count the earlier entries with the same value."""
    flat = row.flatten().cpu().numpy()
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], flat[order])
    number = np.empty_like(flat)
    number[order] = np.arange(len(flat)) - starts
    return torch.from_numpy(number).view(row.shape).to(row.device)


_tried: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()
"""For each model, whether it takes trees under each implementation of attention."""

# Numbers of trial tokens.
_TRIAL = ([2, 3, 4, 5, 6], [2, 3, 6], [2, 3, 4, 1, 6, 0], [5, 0], [2, 3, 4, 5, 1])


@torch.no_grad()
def why_not_packed(model: nn.Module) -> str | None:
    """Run a few tokens packed and padded; say why the model cannot run trees, None if it can."""
    if not takes_positions(model):
        return "the family is not told positions"
    tokens = trial_tokens(model, 7)
    prompts = [[tokens[i] for i in ids] for ids in _TRIAL]
    padded = forward(model, pad(prompts, device=model.device), use_cache=False).logits[:, -1]
    try:
        # Small branches, so that there is a trunk and more than one row.
        prefixes = _packed_prefixes(model, prompts, _last_layer(model), branch_size=2)
        packed = prefixes.append().logits(model)[0]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # What a family raises that reads the mask in another way.
        return f"it refuses a mask over pairs of tokens ({error})"
    # Moved before they are widened, for not every device has doubles.
    packed, padded = packed.cpu().double(), padded.cpu().double()
    difference = (packed - padded).norm(dim=-1) / padded.norm(dim=-1)
    tolerance = 2e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4
    # Not ">", which is false for nan.
    if not difference.max() <= tolerance:
        return f"its logits differ by {difference.max():.2g} of their norm"
    return None
