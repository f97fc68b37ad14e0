"""Monte-Carlo dropout with seeded masks (Gal and Ghahramani, arXiv 1506.02142).

Most chat models ship with dropout 0 and no dropout modules, and fused attention ignores what a config says, so switching to train mode changes
nothing. Here masks are laid on in eval mode, at the places where families have dropout of their own. A mask value is a hash of (seed of the
row's draw, place, layer, token position, channel), so it does not depend on batch, order, padding, worker or device.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dlk_utils.errors import DeadDropout
from dlk_utils.models.sites import architecture, at_sites, blocks

DROPOUT_SITES = ("attn_out", "mlp_out", "embedding", "attention")
"""`attn_out` and `mlp_out`: what a block adds (GPT-2's residual dropout); `embedding`: what the first block reads; `attention`: the probabilities."""


DEFAULT_P = 0.02
"""Share of channels that a draw drops, unless told otherwise."""
INJECTED = ("attn_out", "mlp_out")


_NATIVE = {
    "resid_pdrop": INJECTED,
    "hidden_dropout": INJECTED,
    "residual_dropout": INJECTED,
    "dropout": INJECTED,
    "embd_pdrop": ("embedding",),
    "embedding_dropout": ("embedding",),
    "attn_pdrop": ("attention",),
    "attention_dropout": ("attention",),
}


def native_sites(model: nn.Module) -> list[str]:
    """The places where the family has dropout of its own, whatever the config sets it to; but not Falcon's and MPT's on the probabilities of attention, which cannot be laid on here."""
    if (own := architecture(model).dropout) is not None:
        return [s for s in DROPOUT_SITES if s in own]
    return [
        s
        for s in DROPOUT_SITES
        if any(s in where and hasattr(model.config, name) for name, where in _NATIVE.items())
    ]


def draw_seed(row_id: str, draw: int, seed: int = 0) -> int:
    """The 32-bit seed of one draw of one row."""
    return int.from_bytes(
        hashlib.sha256(f"dropout:{seed}:{row_id}:{draw}".encode()).digest()[:4],
        "little",
        signed=True,
    )


@contextlib.contextmanager
def mc_dropout(
    model: nn.Module,
    p: float = 0.1,
    *,
    seeds: Sequence[int] | Int[Tensor, "b k"],
    positions: Int[Tensor, "b t"],
    sites: str | Sequence[str] = INJECTED,
) -> Iterator[None]:
    """Within it, a forward pass of the batch drops channels with probability `p` and scales the rest by 1/(1-p).

    `seeds` holds one `draw_seed` a row, or one for each of the row's tokens that are run; `positions` each token's place in its own prompt, cached tokens included (values under padding do not
    matter). `sites` are some of `DROPOUT_SITES`, or "native": `native_sites`. Raises `DeadDropout`, `ValueError`.
    """
    sites = (
        native_sites(model)
        if sites == "native"
        else [sites]
        if isinstance(sites, str)
        else list(sites)
    )
    if not 0 < p < 1:
        raise ValueError(f"dropout p: expected 0 < p < 1, got {p}")
    if not sites or not set(sites) <= set(DROPOUT_SITES):
        raise ValueError(
            f"dropout sites: expected some of {', '.join(DROPOUT_SITES)}, or 'native', got {sites}"
        )
    base = (
        torch.as_tensor(seeds if isinstance(seeds, Tensor) else list(seeds))
        .to(positions.device, torch.int32)
        .view(len(seeds), -1)
    )

    def place(site: str, layer: int) -> Int[Tensor, "b k"]:
        return _mix(base.clone() ^ (1 + layer * len(DROPOUT_SITES) + DROPOUT_SITES.index(site)))

    def drop(site: str, layer: int, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        keep = keep_mask(
            place(site, layer).to(hidden.device),
            positions[:, -hidden.shape[1] :].to(hidden.device),
            hidden.shape[-1],
            p,
        )
        return (hidden * (1 / (1 - p))).mul_(
            keep
        )  # by a number, not by a mask that holds it: in bfloat16 that would be 1.0234 for 1.0204

    def drop_attention(layer: int, weights: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h q k"]:
        keep = keep_pairs(
            place("attention", layer).to(weights.device),
            positions.to(weights.device),
            weights.shape[1],
            weights.shape[2],
            p,
        )
        return (weights * (1 / (1 - p))).mul_(keep[..., -weights.shape[3] :])

    with contextlib.ExitStack() as stack:
        stack.enter_context(at_sites(model, [s for s in sites if s in INJECTED], drop))
        if "embedding" in sites:
            stack.enter_context(
                _first_block_reads(model, lambda hidden: drop("embedding", 0, hidden))
            )
        if "attention" in sites:
            stack.enter_context(_attention_through(model, drop_attention))
        yield


def keep_mask(
    seeds: Int[Tensor, "b k"], positions: Int[Tensor, "b t"], d: int, p: float
) -> Bool[Tensor, "b t d"]:
    """Which channels stay: a counter-based generator (murmur3's finaliser) on the row's seed (k = 1) or each token's, 16 bits a channel, so `p` is exact to 1/65536."""
    tokens = _mix(seeds ^ _mix(positions.to(torch.int32) + 1))
    channels = (
        torch.arange(1, (d + 1) // 2 + 1, dtype=torch.int32, device=seeds.device) * -1640531535
    )  # spread by the golden ratio
    bits = _mix(tokens[:, :, None] ^ channels).view(torch.int16)[..., :d]
    return bits >= round(p * 65536) - 32768


def keep_pairs(
    seeds: Int[Tensor, "b k"], positions: Int[Tensor, "b t"], heads: int, queries: int, p: float
) -> Bool[Tensor, "b h q t"]:
    """Which attention probabilities stay, by head, place of the query (the last `queries` positions) and place of the key."""
    tokens = _mix(seeds ^ _mix(positions[:, -queries:].to(torch.int32) + 1))
    head = torch.arange(1, heads + 1, dtype=torch.int32, device=seeds.device) * -1640531535
    keys = _mix((positions.to(torch.int32) + 1)[:, None] ^ head[:, None])
    return (_mix(tokens[:, None, :, None] ^ keys[:, :, None, :]) & 0xFFFF) >= round(p * 65536)


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    for shift, mask, factor in (
        (16, 0xFFFF, -2048144789),
        (13, 0x7FFFF, -1028477387),
        (16, 0xFFFF, 1),
    ):
        x = x ^ ((x >> shift) & mask)  # the mask makes the arithmetic shift a logical one
        if factor != 1:
            x = x * factor
    return x


@contextlib.contextmanager
def _first_block_reads(model: nn.Module, act: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def before(module, args, kwargs):
        return (
            ((act(args[0]), *args[1:]), kwargs)
            if args
            else (args, kwargs | {"hidden_states": act(kwargs["hidden_states"])})
        )

    handle = blocks(model)[0].register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _attention_through(model: nn.Module, act: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Attention written out, with `act(layer, probabilities)`: fused kernels and functional dropout have no place for a seeded mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if not getattr(model, "_supports_attention_backend", False) and "attention" not in (
        architecture(model).dropout or ()
    ):  # StableLM goes through the interface without saying so
        raise DeadDropout(
            f"{model.config.model_type}: attention dropout cannot be laid on in this family; expected places: {', '.join(s for s in DROPOUT_SITES if s != 'attention')}"
        )

    def attention(module, query, key, value, attention_mask, scaling=None, **options):
        if options.get("s_aux") is not None:
            raise DeadDropout(
                f"{model.config.model_type}: attention dropout is not written for attention with sinks"
            )
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = (
            query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        )
        if cap := options.get("softcap"):  # Gemma 2
            scores = cap * torch.tanh(scores / cap)
        scores = scores if attention_mask is None else scores + attention_mask[..., : key.shape[2]]
        weights = act(
            module.layer_idx,
            torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
                query.dtype
            ),
        )
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("dlk_seeded_dropout", attention)
    AttentionMaskInterface.register("dlk_seeded_dropout", eager_mask)
    before, model.config._attn_implementation = (
        model.config._attn_implementation,
        "dlk_seeded_dropout",
    )
    try:
        yield
    finally:
        model.config._attn_implementation = before
