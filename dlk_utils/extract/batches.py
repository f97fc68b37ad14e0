"""Padded batches of prompts, and the forward pass over them."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlk_utils.errors import ParameterError
from dlk_utils.extract.positions import (
    depends_on_batch,
    frequencies_for,
    require_same_frequencies,
)
from dlk_utils.extract.store import Plan, shard_rows_of
from dlk_utils.models.sites import blocks

Batch = dict[str, Any]
"""`input_ids`, `attention_mask` and `position_ids`, each [b, t], as transformers takes them.

With `past_key_values`, the first tokens of each row are in that cache: `input_ids` holds the
others, and the mask covers all of them. A mask of booleans [b, queries, keys] says of each token
which tokens it sees. `n_tokens` is the length of the longest complete prompt of which these are
tokens (needed where `positions.depends_on_batch`, and not for complete prompts).
"""

Layers = str | int | Sequence[int]
"""Which layers: "all", an index, a list of them, or a slice such as "::3" (`layer_numbers`)."""


def pad(
    prompts: Sequence[Sequence[int]] | pd.Series,
    *,
    side: str = "left",
    token: int = 0,
    device: Any = "cpu",
) -> Batch:
    """Lay prompts of different lengths side by side, with padding on the left or right.

    The padding is masked, so which `token` fills it makes no difference to the prompts. Position
    ids count from the first token of each prompt.
    """
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), token)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, ids in enumerate(prompts):
        place = slice(width - len(ids), None) if side == "left" else slice(None, len(ids))
        input_ids[row, place] = torch.tensor(list(ids))
        mask[row, place] = 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    return {name: x.to(device) for name, x in batch.items()}


def forward(model: nn.Module, batch: Batch, *, n_logits: int | None = 1, **options: Any) -> Any:
    """Run a model on a batch, without the inputs that its family does not take.

    The LM head runs on the last `n_logits` places of each row, in the families that can do so; with
    None, on all of them. Raises `ParameterError` if the model is in training mode.
    """
    require_evaluation_mode(model)
    if depends_on_batch(model) and "n_tokens" not in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        require_same_frequencies(model, lengths)
        batch = batch | {"n_tokens": max(lengths)}
    accepted = _forward_parameters(type(model))
    inputs = {name: x for name, x in batch.items() if name in accepted}
    mask = inputs["attention_mask"]
    if mask.dim() == 3:
        # Added to the scores of attention: 0 where a token is seen, else the least number.
        least = torch.finfo(model.dtype).min
        added = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
        inputs["attention_mask"] = added.masked_fill(~mask, least)[:, None]
    if n_logits and "logits_to_keep" in accepted:
        options["logits_to_keep"] = n_logits
    if not depends_on_batch(model):
        return model(**inputs, **options)
    with frequencies_for(model, batch["n_tokens"]):
        return model(**inputs, **options)


def require_evaluation_mode(model: nn.Module) -> None:
    """Raise `ParameterError` if a model is in training mode, in which its own dropout is on."""
    if model.training:
        raise ParameterError(
            f"{model.config.model_type}: expected a model in evaluation mode (`model.eval()`), got "
            "one in training mode, whose own dropout would be in every state"
        )


def takes_positions(model: nn.Module) -> bool:
    """Whether the family is told each token's position. MPT counts places, with the padding."""
    return "position_ids" in _forward_parameters(type(model))


@functools.cache
def _forward_parameters(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


@dataclass(frozen=True)
class Readout:
    """A batch, and the tokens in it that are read: one of each prompt, or several copies of it.

    Attributes
    ----------
    batch : dict
        Rows that may hold tokens of many prompts, with a mask that says what each token sees.
    row, place : Tensor [copy, n]
        Where the token of each copy and prompt is in `batch["input_ids"]`.
    """

    batch: Batch
    row: Int[Tensor, "copy n"]
    place: Int[Tensor, "copy n"]

    def take(self, hidden: Float[Tensor, "r t ..."]) -> Float[Tensor, "copy n ..."]:
        """Return what a tensor over the batch's tokens holds at those that are read."""
        return hidden[self.row.to(hidden.device), self.place.to(hidden.device)]

    def spread(self, values: Tensor) -> Tensor:
        """Do the reverse of `take`: lay values [copy, n, ...] out over the tokens, 0 elsewhere."""
        shape = self.batch["input_ids"].shape
        laid_out = values.new_zeros((*shape, *values.shape[2:]))
        laid_out[self.row.to(values.device), self.place.to(values.device)] = values
        return laid_out

    def logits(self, model: nn.Module) -> Float[Tensor, "copy n vocab"]:
        """Run the batch, and return the logits at the tokens to be read.

        The LM head runs on no place before the first that is read.
        """
        width = self.batch["input_ids"].shape[1]
        n_logits = width - int(self.place.min())
        logits = forward(model, self.batch, n_logits=n_logits, use_cache=True).logits
        # A family that cannot leave places out has logits for all of them.
        place = self.place - (width - logits.shape[1])
        return logits[self.row.to(logits.device), place.to(logits.device)]


class EnoughComputed(Exception):
    """Raised within a forward pass, to end it once it has computed what is read."""


def forward_to_layer(model: nn.Module, batch: Batch, layer: int, **options: Any) -> None:
    """Run the blocks up to a layer: no later block, and no LM head.

    What is wanted of the pass is read by hooks (`at_sites`), which have to be set before.
    """

    def stop(*_: Any) -> None:
        raise EnoughComputed

    handle = blocks(model)[layer].register_forward_hook(stop)
    try:
        forward(model, batch, **options)
    except EnoughComputed:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def last_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "b vocab"]:
    """Return the logits of the token after each prompt of a padded batch.

    Where the padding is on the left, the LM head runs on one position only.
    """
    left = is_left_padded(batch)
    logits = forward(model, batch, n_logits=1 if left else None, use_cache=False).logits
    if left:
        return logits[:, -1]
    return logits[torch.arange(len(logits)), last_positions(batch).cpu()]


def last_positions(batch: Batch) -> Int[Tensor, " b"]:
    """Return the place of each prompt's last token in `input_ids`."""
    mask = batch["attention_mask"]
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)


def is_left_padded(batch: Batch) -> bool:
    """Whether every prompt ends at the last place."""
    return bool(batch["attention_mask"][:, -1].all())


def plan_batches(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int | None = None) -> Plan:
    """Plan batches of prompts of about equal length, in shards of `shard_rows` prompts.

    By default these are as many as `shard_rows_of` says. A batch has at most `batch_tokens` tokens,
    padding included, or a single prompt. The plan follows from the lengths and keys (`row_id`)
    alone, so that it is the same after a restart.
    """
    shard_rows = shard_rows or shard_rows_of(len(prompts))
    by_length = sorted(zip(prompts.input_ids.map(len), prompts.row_id, strict=True))
    starts = range(0, len(by_length), shard_rows)
    return [cut(by_length[i : i + shard_rows], batch_tokens, shard_rows) for i in starts]


def cut(rows: Iterable[tuple[int, Any]], batch_tokens: int, max_rows: int) -> list[list[Any]]:
    """Cut rows, given as (length, row id) with the shortest first, into batches."""
    batches: list[list[Any]] = []
    for length, row_id in rows:
        n = len(batches[-1]) if batches else 0
        if n in (0, max_rows) or (n + 1) * length > batch_tokens:
            batches.append([])
        batches[-1].append(row_id)
    return batches


def in_halves(compute: Callable, rows: Sequence) -> Iterator[tuple[Sequence, Any]]:
    """Yield (rows, compute(rows)), in smaller and smaller parts if the device's memory is short."""
    try:
        result = compute(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    else:
        yield rows, result
        return
    # Outside the except clause, in which the error holds on to the tensors of the failed attempt.
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    yield from in_halves(compute, rows[:middle])
    yield from in_halves(compute, rows[middle:])
