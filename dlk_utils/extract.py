"""The forward passes: answers, states with and without dropout, gradients. Everything is read at the last token of a prompt."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlk_utils.choices import choice_logprobs
from dlk_utils.dropout import DeadDropout, draw_seed, mc_dropout
from dlk_utils.sites import SITES, on_output
from dlk_utils.store import Plan, fill, read, row_ids

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` and `position_ids`, each [b, t]."""


def extract_activations(
    model: nn.Module, prompts: pd.DataFrame, out: Path, *, record: Mapping[str, Any],
    sites: Sequence[str] = ("resid_post",), draws: int = 2, p: float = 0.1, seed: int = 0, batch_tokens: int = 2048,
) -> None:  # fmt: skip
    """Store `activation.site.layer.draw` [n, d] and `choice_logprobs.draw` [n, 2] for `draws` dropout draws of each prompt.

    Dropout acts on the whole prompt; the masks depend on (row, draw) alone. Raises `DeadDropout` if two draws of a row are equal.
    """
    if draws < 2:
        raise ValueError(f"draws: expected at least 2, got {draws}")

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        batch, found = pad(rows.input_ids, device=model.device), {}
        for draw in range(draws):
            seeds = [draw_seed(r, draw, seed) for r in rows.row_id]
            with mc_dropout(model, p, seeds=seeds, positions=batch["position_ids"]):
                states, logits = forward_states(model, batch, sites)
            found |= _named(states, "activation", draw)
            found[f"choice_logprobs.{draw}"] = choice_logprobs(logits, list(rows.choice_ids))
        last = max(int(k.split(".")[2]) for k in found if k.startswith("activation"))
        for site in sites:
            for draw in range(1, draws):
                _refuse_equal(found[f"activation.{site}.{last}.0"], found[f"activation.{site}.{last}.{draw}"], rows.row_id)
        return found

    parts = {**record, "sites": list(sites), "draws": draws, "p": p, "scope": "sequence", "seed": seed}
    fill_rows(out, prompts, parts, plan_batches(prompts, batch_tokens), compute, "dropout draws", batch_tokens)


def extract_gradients(
    model: nn.Module, prompts: pd.DataFrame, out: Path, *, record: Mapping[str, Any], sites: Sequence[str] = SITES, batch_tokens: int = 2048
) -> None:
    """Store `activation.site.layer.0` and `gradient.site.layer.0` [n, d] of one clean pass: d margin / d activation at the last token."""

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        states, grads, logp = states_and_gradients(model, pad(rows.input_ids, device=model.device), list(rows.choice_ids), sites)
        return _named(states, "activation", 0) | _named(grads, "gradient", 0) | {"choice_logprobs": logp}

    parts = {**record, "sites": list(sites), "gradient of": "margin"}
    fill_rows(out, prompts, parts, plan_batches(prompts, batch_tokens), compute, "gradients", batch_tokens)


def pad(prompts: Sequence[Sequence[int]] | pd.Series, *, side: str = "left", token: int = 0, device: Any = "cpu") -> Batch:
    """A batch with mask and positions; what a padded place holds makes no difference to the prompts."""
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), token), torch.zeros((len(prompts), width), dtype=torch.long)
    for i, p in enumerate(prompts):
        where = slice(width - len(p), None) if side == "left" else slice(None, len(p))
        ids[i, where], mask[i, where] = torch.tensor(list(p)), 1
    return {k: v.to(device) for k, v in {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}.items()}


def one_position(model: nn.Module) -> dict[str, int]:
    """The option that runs the LM head on the last position only, where the architecture has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()
def last_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "b vocab"]:
    """Next-token logits of each prompt; the LM head runs on one position where the padding is on the left."""
    last = _last(batch)
    left = bool((last == batch["input_ids"].shape[1] - 1).all())
    logits = model(**batch, use_cache=False, **(one_position(model) if left else {})).logits
    return logits[:, -1] if left else logits[torch.arange(len(last)), last]


@torch.no_grad()
def forward_states(model: nn.Module, batch: Batch, sites: Sequence[str]) -> tuple[dict[str, Float[Tensor, "b layer d"]], Float[Tensor, "b vocab"]]:
    """States at the last token, and the logits there. A hook slices before it copies."""
    last, found = _last(batch), {site: [] for site in sites}

    def keep(site: str, layer: int, hidden: Tensor) -> None:
        found[site].append(hidden[torch.arange(len(last), device=hidden.device), last.to(hidden.device)].cpu())

    with on_output(model, sites, keep):
        logits = last_logits(model, batch)
    return {site: torch.stack(v, 1) for site, v in found.items()}, logits


def states_and_gradients(
    model: nn.Module, batch: Batch, choice_ids: Sequence, sites: Sequence[str]
) -> tuple[dict[str, Float[Tensor, "b layer d"]], dict[str, Float[Tensor, "b layer d"]], Float[Tensor, "b 2"]]:
    """States, gradients of the margin, and choice log-probabilities, by the cached prefix (left padding only).

    No gradient path to a last-token activation passes through an earlier token, so the prefix runs without a graph and only the
    last token with one: the result equals full backprop. Gradients are asked of activations alone, so no weight gets one.
    """
    if batch["input_ids"].shape[1] < 2 or not bool((_last(batch) == batch["input_ids"].shape[1] - 1).all()):
        raise ValueError("gradients: expected left-padded prompts of at least two tokens")
    prefix = {k: v[:, :-1] for k, v in batch.items()}
    with torch.no_grad():
        cache = model(**prefix, use_cache=True, **one_position(model)).past_key_values
    embedded = model.get_input_embeddings()(batch["input_ids"][:, -1:]).detach().requires_grad_()
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    with torch.enable_grad(), on_output(model, sites, lambda site, layer, hidden: found[site].append(hidden)):
        options = {"attention_mask": batch["attention_mask"], "position_ids": batch["position_ids"][:, -1:], "past_key_values": cache}
        logits = model(inputs_embeds=embedded, **options).logits[:, -1]
        logp = choice_logprobs(logits, choice_ids)
        grads = iter(torch.autograd.grad((logp[:, 1] - logp[:, 0]).sum(), [h for site in sites for h in found[site]]))
    collect = lambda tensors: torch.stack([t.detach()[:, -1].cpu() for t in tensors], 1)
    return {s: collect(found[s]) for s in sites}, {s: collect([next(grads) for _ in found[s]]) for s in sites}, logp.detach().cpu()


def full_backprop(model: nn.Module, batch: Batch, choice_ids: Sequence, sites: Sequence[str]) -> dict[str, Float[Tensor, "b layer d"]]:
    """The same gradients by backprop through the whole prompt: slower, and the reference for `states_and_gradients`."""
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    last, rows = _last(batch), torch.arange(len(batch["input_ids"]))
    with torch.enable_grad(), on_output(model, sites, lambda site, layer, hidden: found[site].append(hidden)):
        logp = choice_logprobs(model(**batch, use_cache=False).logits[rows, last], choice_ids)
        grads = iter(torch.autograd.grad((logp[:, 1] - logp[:, 0]).sum(), [h for site in sites for h in found[site]]))
    return {site: torch.stack([next(grads)[rows, last].cpu() for _ in found[site]], 1) for site in sites}


def dropout_audit(model: nn.Module, prompts: pd.DataFrame, *, p: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """How far two draws lie apart by layer, relative to the state's norm, over a few prompts. Raises `DeadDropout` if nothing moves."""
    batch, states = pad(prompts.input_ids, device=model.device), []
    for draw in (0, 1):
        with mc_dropout(model, p, seeds=[draw_seed(r, draw, seed) for r in prompts.row_id], positions=batch["position_ids"]):
            states.append(forward_states(model, batch, ["resid_post"])[0]["resid_post"].float())
    move = (states[1] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)
    _refuse_equal(states[0][:, -1], states[1][:, -1], prompts.row_id)
    return pd.DataFrame({"layer": range(move.shape[1]), "relative_move": move.mean(0).numpy(), "least": move.min(0).values.numpy()})


def plan_batches(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int = 64) -> Plan:
    """Batches of about equal length, at most `batch_tokens` with padding, planned from all rows' lengths and keys: the same after a restart."""
    shards: Plan = [[[]]]
    for row_id, length in sorted(zip(prompts.row_id, prompts.input_ids.map(len), strict=True), key=lambda r: (r[1], r[0])):
        if sum(map(len, shards[-1])) == shard_rows:
            shards.append([[]])
        if shards[-1][-1] and (len(shards[-1][-1]) + 1) * length > batch_tokens:
            shards[-1].append([])
        shards[-1][-1].append(row_id)
    return shards


def fill_rows(out: Path, prompts: pd.DataFrame, parts: Mapping, plan: Plan, compute: Callable, desc: str, batch_tokens: int) -> None:
    """Fill a store with what `compute` gives for each batch of prompt rows."""
    by_id = prompts.set_index("row_id", drop=False)
    fill(out, {**parts, "batch_tokens": batch_tokens, "rows": sorted(by_id.index)}, plan, lambda ids: compute(by_id.loc[ids]), desc=desc)


def read_rows(folder: Path, prompts: pd.DataFrame, name: str) -> Float[np.ndarray, "n ..."] | Int[np.ndarray, "n ..."]:
    """A stored tensor in the order of `prompts`, joined one to one by `row_id`."""
    at = {r: i for i, r in enumerate(row_ids(folder))}
    missing = [r for r in prompts.row_id if r not in at]
    if missing or len(set(prompts.row_id)) != len(prompts):
        raise KeyError(f"{folder.name}: expected each of {len(prompts)} rows once, {len(missing)} are not stored")
    tensor = read(folder, name)[[at[r] for r in prompts.row_id]]
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _named(states: dict[str, Tensor], kind: str, draw: int) -> dict[str, Tensor]:
    return {f"{kind}.{site}.{layer}.{draw}": t[:, layer] for site, t in states.items() for layer in range(t.shape[1])}


def _refuse_equal(a: Tensor, b: Tensor, rows: Sequence[str] | pd.Series) -> None:
    same = (a == b).all(-1)
    if same.any():
        raise DeadDropout(f"{int(same.sum())} of {len(same)} rows have two equal draws (first: {list(rows)[int(same.nonzero()[0])]}): dropout has no effect")


def _last(batch: Batch) -> Int[Tensor, " b"]:
    width = batch["input_ids"].shape[1]
    return (batch["attention_mask"] * torch.arange(width, device=batch["attention_mask"].device)).argmax(1)
