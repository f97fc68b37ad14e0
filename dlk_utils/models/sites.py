"""Where activations are read, for each model family.

A *layer* is a block of the transformer, counted from 0. In each layer there are four *sites*, named
as in TransformerLens:

``resid_post``
    The residual stream after the block. ``resid_post[l]`` is ``output_hidden_states[l + 1]``,
    except after the last block: there transformers applies the final norm, and we do not.
``attn_out``, ``mlp_out``
    What the block's attention and its MLP add to the residual stream. In blocks that run the two
    one after the other, and in blocks that run them in parallel,
    ``resid_post[l] = resid_post[l - 1] + attn_out[l] + mlp_out[l]``.
``head_out``
    The input of the output projection of attention, W_O. It holds the outputs of the heads side by
    side: head ``h`` of width ``w`` is at ``[h * w : (h + 1) * w]``.

A table of families (`architectures`) says where they are in a model; for other families they are
found by running the model (`finding`). `check_sites` runs a model and refuses it if it does not
keep these rules.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.errors import ModelError, ParameterError, UnknownArchitecture
from dlk_utils.models.architectures import ARCHITECTURES, Architecture
from dlk_utils.models.finding import RAISED_BY_A_MODEL, find_architecture, trial_tokens

SITES = ("resid_post", "attn_out", "mlp_out", "head_out")
ADDED = ("attn_out", "mlp_out")


_found: weakref.WeakKeyDictionary[nn.Module, Architecture] = weakref.WeakKeyDictionary()
"""Where the sites are of the models that were looked at because the table has no entry."""


def architecture(model: nn.Module) -> Architecture:
    """Return where a model's sites are: from the table of families, or found from the model.

    Raises
    ------
    UnknownArchitecture
        If the table has no entry for the model's ``config.model_type``, and the sites are not found
        from the model either (`finding`).
    """
    kind = model.config.model_type
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    if model not in _found:
        _found[model] = find_architecture(model)
    return _found[model]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model, in the order in which they run."""
    return list(model.get_submodule(architecture(model).blocks))


def site_modules(model: nn.Module, site: str) -> list[nn.Module]:
    """Return the module of each layer whose output is the site (for ``head_out``: whose input)."""
    if site not in SITES:
        raise ParameterError(f"site: expected one of {', '.join(SITES)}, got {site!r}")
    if site == "resid_post":
        return blocks(model)
    family = architecture(model)
    path = {"attn_out": family.attn, "mlp_out": family.mlp, "head_out": family.w_o}[site]
    return [block.get_submodule(path) for block in blocks(model)]


def layer_numbers(layers: str | int | Sequence[int], n_layers: int) -> list[int]:
    """Turn a choice of layers into their numbers, in the order in which they run, without repeats.

    Parameters
    ----------
    layers
        ``"all"``, a number (negative: from the end), a list of numbers, or numbers as text
        (``"3,7"``), or a slice as text (``"::3"``).
    n_layers
        The number of layers of the model.

    Raises
    ------
    ParameterError
        If `layers` is none of these, or a number is out of range.
    """
    every = range(n_layers)
    try:
        if not isinstance(layers, str):
            wanted = [layers] if isinstance(layers, Integral) else layers
        elif layers == "all":
            wanted = every
        elif ":" in layers:
            wanted = every[slice(*(int(bound) if bound else None for bound in layers.split(":")))]
        else:
            wanted = [int(number) for number in layers.split(",")]
        return sorted({every[number] for number in wanted})
    except (IndexError, TypeError, ValueError):
        raise ParameterError(
            f"layers: expected 'all', an index below {n_layers}, a list of them, "
            f"or a slice such as '::3', got {layers!r}"
        ) from None


@contextlib.contextmanager
def at_sites(
    model: nn.Module,
    sites: Sequence[str],
    act: Callable[[str, int, Tensor], Tensor | None],
    layers: str | int | Sequence[int] = "all",
) -> Iterator[None]:
    """Within the ``with`` block, call a function at each site of each forward pass.

    Everything that reads or changes activations goes through this. The hooks are removed at the
    end of the block, also after an error.

    Parameters
    ----------
    model
        A model of a known architecture.
    sites
        Some of `SITES`.
    act
        Called as ``act(site, layer, hidden)``, with `hidden` of shape [batch, tokens, width]. If it
        returns a tensor of that shape, the model continues with it instead of `hidden`.
    layers
        A choice of layers: see `layer_numbers`.

    Examples
    --------
    >>> states = {}
    >>> def keep_last_token(site, layer, hidden):
    ...     states[site, layer] = hidden[:, -1]
    >>> with at_sites(model, ["resid_post"], keep_last_token):
    ...     model(**batch)
    """
    scale = architecture(model).scale
    # Needed by `call_act` alone.
    batch_size = 0

    def note_batch_size(block: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal batch_size
        hidden = args[0] if args else kwargs["hidden_states"]
        batch_size = hidden.shape[0]

    def call_act(site: str, layer: int, hidden: Tensor) -> Tensor | None:
        if hidden.dim() == 3:
            return act(site, layer, hidden)
        # OPT's MLP gets the tokens of all prompts in one row, [batch * tokens, width].
        by_prompt = hidden.view(batch_size, -1, hidden.shape[-1])
        new = act(site, layer, by_prompt)
        # The model goes on with the view itself: if `act` kept it, it must be part of the graph.
        return (by_prompt if new is None else new).view(hidden.shape)

    def on_input(site: str, layer: int, module: nn.Module, args: tuple) -> tuple | None:
        new = call_act(site, layer, args[0])
        return None if new is None else (new, *args[1:])

    def on_output(site: str, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        # Whether a block returns a tensor or a tuple goes by the family and the version.
        hidden = output if isinstance(output, Tensor) else output[0]
        if site in ADDED and scale != 1:
            # The model goes on with what `act` saw, so that this is part of the graph.
            seen = hidden * scale
            new = call_act(site, layer, seen)
            new = (seen if new is None else new) / scale
        else:
            new = call_act(site, layer, hidden)
        if new is None or isinstance(output, Tensor):
            return new
        return (new, *output[1:])

    with contextlib.ExitStack() as hooks:
        first_block = blocks(model)[0]
        hooks.enter_context(
            first_block.register_forward_pre_hook(note_batch_size, with_kwargs=True)
        )
        for site in sites:
            modules = site_modules(model, site)
            for layer in layer_numbers(layers, len(modules)):
                if site == "head_out":
                    hook = functools.partial(on_input, site, layer)
                    handle = modules[layer].register_forward_pre_hook(hook)
                else:
                    hook = functools.partial(on_output, site, layer)
                    handle = modules[layer].register_forward_hook(hook)
                hooks.enter_context(handle)
        yield


@torch.no_grad()
def check_sites(model: nn.Module) -> None:
    """Run a model on a few tokens, and refuse it if its sites do not keep this module's rules.

    Each rule is checked at each token, to 1 % of the norms of what is added up in 16 bits, and to
    0.01 % otherwise.

    Raises
    ------
    UnknownArchitecture
        If it is not a causal language model as transformers loads it, the family is not known, or
        its sites do not add up.
    ModelError
        If its states are not finite.
    """
    _refuse_other_classes(model)
    try:
        _check_each_layer(model)
    except (UnknownArchitecture, ModelError, torch.OutOfMemoryError):
        raise
    except RAISED_BY_A_MODEL as error:
        kind = model.config.model_type
        raise UnknownArchitecture(
            f"{kind}: expected a model whose sites can be read on a few tokens, got "
            f"{type(error).__name__}: {error}; this variant of the architecture is not understood"
        ) from error


def _check_each_layer(model: nn.Module) -> None:
    sites, hidden_states = _run_on_a_few_tokens(model)
    expect = functools.partial(_expect_equal, model)

    for layer, block in enumerate(blocks(model)):
        attn_out, mlp_out = sites["attn_out"][layer], sites["mlp_out"][layer]
        expect(
            _project_heads(model, block, sites["head_out"][layer]),
            attn_out,
            f"W_O of head_out[{layer}] to be attn_out[{layer}]",
        )
        before, after = hidden_states[layer], sites["resid_post"][layer]
        if layer + 1 < len(blocks(model)):
            expect(
                after,
                hidden_states[layer + 1],
                f"resid_post[{layer}] to be output_hidden_states[{layer + 1}]",
            )
        expect(
            before + attn_out + mlp_out,
            after,
            f"resid_post[{layer}] to be the state before block {layer} "
            f"plus attn_out[{layer}] and mlp_out[{layer}]",
            parts=(before, attn_out, mlp_out),
        )


def _refuse_other_classes(model: nn.Module) -> None:
    """Raise `UnknownArchitecture` for a model in the wrapper of peft, or without a head."""
    expected = "expected a causal language model of transformers, got"
    kind = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise UnknownArchitecture(
            f"{expected} one wrapped by peft ({kind}): give model.get_base_model(), which has the "
            "adapter in its layers, or model.merge_and_unload()"
        )
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise UnknownArchitecture(f"{expected} {kind}: load it with AutoModelForCausalLM")
    if model.get_output_embeddings() is None:
        raise UnknownArchitecture(
            f"{expected} {kind}, which has no head: load it with AutoModelForCausalLM"
        )


def _run_on_a_few_tokens(model: nn.Module) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Return each site by layer, and transformers' own hidden states: each [tokens, d], float64."""
    sites: dict[str, list[Tensor]] = {site: [] for site in SITES}

    def record(site: str, layer: int, hidden: Tensor) -> None:
        sites[site].append(hidden[0].to("cpu", copy=True).double())

    token_ids = torch.tensor([trial_tokens(model)], device=model.device)
    with at_sites(model, SITES, record):
        output = model(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            output_hidden_states=True,
            use_cache=False,
        )
    return sites, [hidden[0].cpu().double() for hidden in output.hidden_states]


def _project_heads(
    model: nn.Module, block: nn.Module, head_out: Float[Tensor, "t d_heads"]
) -> Float[Tensor, "t d"]:
    """Compute what attention should output, given the outputs of its heads."""
    family = architecture(model)
    w_o = block.get_submodule(family.w_o)
    device = next(w_o.parameters()).device
    if device.type == "meta":
        # Weights that are kept off the GPU are on "meta" until they are used. The hook that brings
        # them also moves their input.
        device = model.device
    attn_out = w_o(head_out.to(device=device, dtype=model.dtype))
    last_part = block.get_submodule(family.attn)
    if not family.w_o.startswith(family.attn) and not list(last_part.children()):
        # A norm comes between W_O and the residual stream.
        attn_out = last_part(attn_out)
    return (attn_out * family.scale).cpu().double()


def _expect_equal(
    model: nn.Module, got: Tensor, expected: Tensor, what: str, *, parts: Sequence[Tensor] = ()
) -> None:
    """Raise `UnknownArchitecture` if two states differ at a token by more than rounding."""
    kind = model.config.model_type
    if not (torch.isfinite(got).all() and torch.isfinite(expected).all()):
        raise ModelError(
            f"{kind}: expected finite states, got nan or inf in {model.dtype} (where {what}); "
            "the weights are damaged, or need a wider dtype (float32)"
        )
    # Rounding errors go by the size of the parts, which may be far larger than their sum.
    size = sum((part.norm(dim=-1) for part in parts), expected.norm(dim=-1))
    tolerance = 1e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4
    same_shape = got.shape == expected.shape
    if not same_shape or not ((got - expected).norm(dim=-1) <= tolerance * size).all():
        raise UnknownArchitecture(
            f"{kind}: expected {what}; this variant of the architecture is not understood"
        )
