"""Monte-Carlo dropout with masks that depend on nothing but their seed (Gal and Ghahramani, 2016).

Most chat models ship with dropout 0 and without dropout modules, and fused attention ignores what a
config says, so switching to training mode changes nothing. Here the masks are applied in evaluation
mode, at the places where families have dropout of their own. Which tokens have dropout is decided
in `draws` (`SCOPES`).

Whether a value is kept is a hash of the seed of the row's draw, the place, the layer, the token's
position and the channel. So a mask is the same whatever the batch, order, padding, worker or
device. Such a generator, which computes the i-th number from i and not from the number before it,
is called counter-based.

References
----------
Y. Gal and Z. Ghahramani, *Dropout as a Bayesian Approximation*, ICML 2016, arXiv:1506.02142.
J. K. Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.
A. Appleby, *MurmurHash3*, 2011 (`fmix32`, the hash that is used here).
"""

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dlk_utils.errors import DeadDropout, DlkError, ParameterError
from dlk_utils.extract.batches import forward, pad
from dlk_utils.models.architectures import ARCHITECTURES
from dlk_utils.models.configuration import text_config
from dlk_utils.models.finding import trial_tokens
from dlk_utils.models.sites import architecture, at_sites, blocks

DEFAULT_P = 0.02
"""Share of the channels that a draw drops. Much more damages a model trained without dropout."""

PLACES = ("attn_out", "mlp_out", "embedding", "attention")
"""Where dropout can act: on what attention or the MLP adds to the residual stream (GPT-2's residual
dropout), on what the first block reads, or on the probabilities of attention."""

INJECTED = ("attn_out", "mlp_out")
"""The places that are used unless others are asked for."""

# The constants of the hash, as signed 32-bit integers (torch has no arithmetic on unsigned ones).
_MURMUR_1 = 0x85EBCA6B - 2**32
_MURMUR_2 = 0xC2B2AE35 - 2**32
# 2^32 divided by the golden ratio: multiples of it lie far apart (Knuth's multiplicative hashing).
_GOLDEN = 0x9E3779B1 - 2**32


def native_sites(model: nn.Module) -> list[str]:
    """List the places where the model's family has dropout of its own, whatever its config sets.

    Falcon's and MPT's dropout of attention probabilities is left out: it cannot be applied here.
    """
    own = architecture(model).dropout
    return [place for place in PLACES if place in own]


def draw_seed(key: str, draw: int, seed: int = 0) -> int:
    """Return the 32-bit seed of one draw of the prompt with this key (in a table, its `row_id`)."""
    digest = hashlib.sha256(f"dropout:{seed}:{key}:{draw}".encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True)


@contextlib.contextmanager
def mc_dropout(
    model: nn.Module,
    p: float = DEFAULT_P,
    *,
    seeds: Sequence[int] | Int[Tensor, "b k"],
    position_ids: Int[Tensor, "b t"],
    drop_at: Bool[Tensor, "b k"] | None = None,
    places: str | Sequence[str] = INJECTED,
) -> Iterator[None]:
    """Drop channels with probability `p` in every forward pass within, and scale the others.

    Those are multiplied by 1/(1-p), so that the mean stays.

    Parameters
    ----------
    seeds
        One `draw_seed` a row, or [b, k] for k tokens that run with a seed each.
    position_ids
        Each token's place in its own prompt, cached tokens included. Values at padding do not
        matter.
    drop_at
        Which of the tokens that run have dropout; by default all of them.
    places
        Some of `PLACES`, or "native" for those of the family (`native_sites`).

    Raises
    ------
    ParameterError
        If `p` is not between 0 and 1, or a place is unknown.
    DeadDropout
        If this family's attention does not let one change its probabilities.
    """
    if places == "native":
        places = native_sites(model)
    places = [places] if isinstance(places, str) else list(places)
    if not 0 < p < 1:
        raise ParameterError(f"dropout p: expected 0 < p < 1, got {p}")
    if not places or not set(places) <= set(PLACES):
        raise ParameterError(
            f"dropout places: expected some of {', '.join(PLACES)}, or 'native', got {places}"
        )
    row_seeds = torch.as_tensor(seeds if isinstance(seeds, Tensor) else list(seeds))
    row_seeds = row_seeds.to(position_ids.device, torch.int32).view(len(seeds), -1)
    scale = 1 / (1 - p)

    def place_seeds(place: str, layer: int, device: torch.device) -> Int[Tensor, "b k"]:
        number = 1 + layer * len(PLACES) + PLACES.index(place)
        return _mix(row_seeds ^ number).to(device)

    def drop(place: str, layer: int, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        own_positions = position_ids[:, -hidden.shape[1] :].to(hidden.device)
        keep = keep_mask(
            place_seeds(place, layer, hidden.device), own_positions, hidden.shape[-1], p
        )
        # Multiply by the number, not by a scaled mask: bfloat16 would round 1.0204 to 1.0234.
        dropped = (hidden * scale).mul_(keep)
        if drop_at is None:
            return dropped
        return torch.where(drop_at.to(hidden.device)[..., None], dropped, hidden)

    def drop_attention(layer: int, weights: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h q k"]:
        heads, queries, n_keys = weights.shape[1:]
        seeds_here = place_seeds("attention", layer, weights.device)
        keep = keep_pairs(seeds_here, position_ids.to(weights.device), heads, queries, p)
        dropped = (weights * scale).mul_(keep[..., -n_keys:])
        if drop_at is None:
            return dropped
        return torch.where(drop_at.to(weights.device)[:, None, :, None], dropped, weights)

    with contextlib.ExitStack() as stack:
        stack.enter_context(at_sites(model, [x for x in places if x in INJECTED], drop))
        if "embedding" in places:
            stack.enter_context(_at_first_block(model, lambda x: drop("embedding", 0, x)))
        if "attention" in places:
            stack.enter_context(_at_attention_probabilities(model, drop_attention))
        yield


def keep_mask(
    seeds: Int[Tensor, "b k"], positions: Int[Tensor, "b t"], d: int, p: float
) -> Bool[Tensor, "b t d"]:
    """Say which of `d` channels stay at each token.

    There is one seed per row (k = 1) or per token (k = t).
    Each (seed, position, channel) gets 16 random bits, and stays if they are at least p * 2^16. One
    hash of 32 bits serves two neighbouring channels.
    """
    by_token = _mix(seeds ^ _mix(positions.to(torch.int32) + 1))
    pair = torch.arange(1, (d + 1) // 2 + 1, dtype=torch.int32, device=seeds.device)
    bits = _mix(by_token[:, :, None] ^ (pair * _GOLDEN))
    # Read as two signed 16-bit numbers each, from -2^15 on.
    return bits.view(torch.int16)[..., :d] >= round(p * 2**16) - 2**15


def keep_pairs(
    seeds: Int[Tensor, "b k"], positions: Int[Tensor, "b t"], heads: int, queries: int, p: float
) -> Bool[Tensor, "b h q t"]:
    """Say which attention probabilities stay. The queries are at the last `queries` positions."""
    by_query = _mix(seeds ^ _mix(positions[:, -queries:].to(torch.int32) + 1))
    head = torch.arange(1, heads + 1, dtype=torch.int32, device=seeds.device) * _GOLDEN
    by_key = _mix((positions.to(torch.int32) + 1)[:, None] ^ head[:, None])
    bits = _mix(by_query[:, None, :, None] ^ by_key[:, :, None, :])
    return (bits & 0xFFFF) >= round(p * 2**16)


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Scramble 32-bit integers so that each input bit flips about half of the output bits.

    This is `fmix32`, the last step of MurmurHash3. Products wrap round at 32 bits, as in C.
    """
    # torch shifts copies of the sign bit in from the left, which the masks take out again.
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MURMUR_1
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _MURMUR_2
    return x ^ ((x >> 16) & 0xFFFF)


@contextlib.contextmanager
def _at_first_block(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, the first block reads `change(hidden)`."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    handle = blocks(model)[0].register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _at_attention_probabilities(
    model: nn.Module, change: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Within it, attention is written out, with `change(layer, probabilities)`.

    Fused kernels have no place for a mask of our own. Raises `DeadDropout` for a family whose
    attention is another.
    """
    # StableLM goes through the interface without saying so.
    listed = "attention" in architecture(model).dropout
    reason = None
    if not (getattr(model, "_supports_attention_backend", False) or listed):
        reason = "its attention cannot be replaced"
    elif model.config.model_type not in ARCHITECTURES:
        if model not in _tried:
            _tried[model] = _why_not_written_out(model)
        reason = _tried[model]
    if reason:
        others = ", ".join(place for place in PLACES if place != "attention")
        raise DeadDropout(
            f"{model.config.model_type}: attention dropout cannot be laid on in this family "
            f"({reason}); expected places: {others}"
        )
    with _attention_written_out(model, change):
        yield


_tried: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
"""For models of families that are not in the table, why their attention cannot be written out."""


@torch.no_grad()
def _why_not_written_out(model: nn.Module) -> str | None:
    """Run a few tokens with attention written out; say what is wrong, None if nothing is."""
    layers = []

    def note(layer: int, probabilities: Tensor) -> Tensor:
        layers.append(layer)
        return probabilities

    batch = pad([trial_tokens(model)], device=model.device)
    usual = forward(model, batch, use_cache=False).logits[:, -1].double()
    try:
        with _attention_written_out(model, note):
            logits = forward(model, batch, use_cache=False).logits[:, -1].double()
    except torch.OutOfMemoryError:
        raise
    except (DlkError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"it takes no other attention: {error}"
    if layers != list(range(len(blocks(model)))):
        return "not every block's attention can be replaced"
    coarse = model.dtype in (torch.bfloat16, torch.float16)
    if not (logits - usual).norm() <= (5e-2 if coarse else 1e-4) * usual.norm():
        return "its attention does more than the usual one"
    return None


@contextlib.contextmanager
def _attention_written_out(
    model: nn.Module, change: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    # Only here, because importing these takes longer than everything else in this module.
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def attention(module, query, key, value, attention_mask, scaling=None, **options):
        if options.get("s_aux") is not None:
            raise DeadDropout(
                f"{model.config.model_type}: attention dropout is not written for attention with "
                "sinks"
            )
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ key.transpose(2, 3) * scale
        # Gemma 2 caps its scores softly.
        if cap := options.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[2]]
        precision = torch.promote_types(scores.dtype, torch.float32)
        probabilities = torch.softmax(scores, -1, dtype=precision).to(query.dtype)
        weights = change(module.layer_idx, probabilities)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("dlk_seeded_dropout", attention)
    AttentionMaskInterface.register("dlk_seeded_dropout", eager_mask)
    config = text_config(model)
    usual = config._attn_implementation
    config._attn_implementation = "dlk_seeded_dropout"
    try:
        yield
    finally:
        config._attn_implementation = usual
