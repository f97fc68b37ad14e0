"""Where activations are read, by architecture. The layer convention, stated here once:

*layer* `l` counts blocks from 0. `resid_post[l]` is the residual stream after block `l`, so it equals
`output_hidden_states[l + 1]`, except after the last block, where transformers applies the final norm and we do not.
`attn_out[l]` and `mlp_out[l]` are what block `l` adds to it: where the block is sequential or parallel alike,
`resid_post[l] = resid_post[l-1] + attn_out[l] + mlp_out[l]`. `head_out[l]` is the input of `W_O`: the outputs of the heads, side by
side (head `h` of width `w` at `[h*w : (h+1)*w]`). Names are TransformerLens's.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dlk_utils.errors import UnknownArchitecture

SITES = ("resid_post", "attn_out", "mlp_out", "head_out")


@dataclass(frozen=True)
class Architecture:
    """Paths of the blocks in a `...ForCausalLM`, and in a block: whose output attention adds, whose output the MLP adds, and `W_O`.

    `dropout`: the places of the family's own dropout, where the names of its settings do not say them: one setting for several places (GPT-NeoX, MPT), for fewer (StableLM), for none (Phi-3's embedding).
    """

    blocks: str
    attn: str
    mlp: str
    w_o: str
    dropout: tuple[str, ...] | None = None


_LLAMA = Architecture("model.layers", "self_attn", "mlp", "self_attn.o_proj")


_GEMMA2 = Architecture(
    "model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "self_attn.o_proj"
)  # adds what its second norms put out


_GPT2 = Architecture("transformer.h", "attn", "mlp", "attn.c_proj")


_PHI = Architecture("model.layers", "self_attn", "mlp", "self_attn.dense")


ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "starcoder2": _LLAMA,
    "phi3": replace(_LLAMA, dropout=("attn_out", "mlp_out", "attention")),
    "stablelm": replace(_LLAMA, dropout=("mlp_out", "attention")),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "olmo2": _GEMMA2,
    "phi": _PHI,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        "attention",
        "mlp",
        "attention.dense",
        ("attn_out", "mlp_out", "embedding", "attention"),
    ),
    "falcon": Architecture(
        "transformer.h", "self_attention", "mlp", "self_attention.dense", ("attn_out", "mlp_out")
    ),
    "mpt": Architecture(
        "transformer.blocks", "attn", "ffn.down_proj", "attn.out_proj", ("attn_out", "mlp_out")
    ),  # the FFN module itself adds the residual
    "opt": Architecture("model.decoder.layers", "self_attn", "fc2", "self_attn.out_proj"),
}


def architecture(model: nn.Module) -> Architecture:
    """The entry for a model; an unknown family is refused by name."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise UnknownArchitecture(
            f"architecture {kind!r} is not known: expected one of {', '.join(ARCHITECTURES)}; add it to dlk_utils/sites.py"
        )
    return ARCHITECTURES[kind]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks, in order."""
    return list(model.get_submodule(architecture(model).blocks))


def site_modules(model: nn.Module, site: str) -> list[nn.Module]:
    """For each layer, the module whose output is the site (of `head_out`: whose input)."""
    if site not in SITES:
        raise ValueError(f"site: expected one of {', '.join(SITES)}, got {site!r}")
    arch = architecture(model)
    path = {"attn_out": arch.attn, "mlp_out": arch.mlp, "head_out": arch.w_o}.get(site)
    return [b.get_submodule(path) if path else b for b in blocks(model)]


def layer_numbers(layers: str | int | Sequence[int], n_layers: int) -> list[int]:
    """`"all"`, an index (from the end if negative), a list of them, or a slice as text, such as `"::3"`; in the order in which they run, each once, whatever the order asked for."""
    every = list(range(n_layers))
    try:
        if isinstance(layers, str):
            named = (
                every
                if layers == "all"
                else every[slice(*(int(x) if x else None for x in layers.split(":")))]
                if ":" in layers
                else [every[int(x)] for x in layers.split(",")]
            )
        else:
            named = [every[i] for i in ([layers] if isinstance(layers, int) else layers)]
        return sorted(set(named))
    except (IndexError, ValueError):
        raise ValueError(
            f"layers: expected 'all', an index below {n_layers}, a list of them, or a slice such as '::3', got {layers!r}"
        ) from None


@contextlib.contextmanager
def at_sites(
    model: nn.Module,
    sites: Sequence[str],
    act: Callable[[str, int, Tensor], Tensor | None],
    layers: str | int | Sequence[int] = "all",
) -> Iterator[None]:
    """Call `act(site, layer, hidden [b, t, d])` at each site; a tensor that it returns takes the place of `hidden`. Hooks go away at the end."""
    handles, shape = [], {}

    def replaced(site, layer, hidden):
        if hidden.dim() == 3:
            return act(site, layer, hidden)
        rows = hidden.view(
            shape["b"], -1, hidden.shape[-1]
        )  # OPT lays the tokens of all rows in one line
        new = act(site, layer, rows)
        return (rows if new is None else new).view(hidden.shape)

    def before(site, layer):
        def run(module, args):
            new = replaced(site, layer, args[0])
            return None if new is None else (new, *args[1:])

        return run

    def after(site, layer):
        def run(module, args, output):
            new = replaced(
                site, layer, output if isinstance(output, Tensor) else output[0]
            )  # a tensor or a tuple, by version and family
            return new if new is None or isinstance(output, Tensor) else (new, *output[1:])

        return run

    try:
        handles.append(
            blocks(model)[0].register_forward_pre_hook(
                lambda module, args, kwargs: shape.update(
                    b=(args or (kwargs.get("hidden_states"),))[0].shape[0]
                ),
                with_kwargs=True,
            )
        )
        for site in sites:
            modules = site_modules(model, site)
            for layer in layer_numbers(layers, len(modules)):
                hook = (
                    modules[layer].register_forward_pre_hook(before(site, layer))
                    if site == "head_out"
                    else modules[layer].register_forward_hook(after(site, layer))
                )
                handles.append(hook)
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check_sites(model: nn.Module) -> None:
    """Run a few tokens and refuse, by name, a model in which the conventions above do not hold, at each token (to 1 % of the norms of what is added up in 16 bits, 0.01 % else)."""
    architecture(model)
    ids = torch.arange(3, 9, device=model.device)[None] % model.config.vocab_size
    found: dict[str, list[Tensor]] = {site: [] for site in SITES}
    with at_sites(
        model,
        SITES,
        lambda site, layer, hidden: found[site].append(
            hidden[0].to(torch.float64, copy=True).cpu()
        ),
    ):
        hidden = [
            h[0].double().cpu()
            for h in model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        ]
    loose = 1e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4

    def same(a: Tensor, b: Tensor, what: str, *parts: Tensor) -> None:
        size = sum(
            (x.norm(dim=-1) for x in parts), b.norm(dim=-1)
        )  # rounding goes by the parts, which may be far larger than their sum
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise UnknownArchitecture(
                f"{model.config.model_type}: expected {what}, got states that are not finite in {model.dtype}; the weights are damaged, or need a wider dtype (float32)"
            )
        if a.shape != b.shape or not ((a - b).norm(dim=-1) <= loose * size).all():
            raise UnknownArchitecture(
                f"{model.config.model_type}: expected {what}; this variant of the architecture is not understood"
            )

    arch = architecture(model)
    for layer, (block, heads) in enumerate(zip(blocks(model), found["head_out"], strict=True)):
        w_o = block.get_submodule(arch.w_o)
        where = next(
            w_o.parameters()
        ).device  # "meta": kept off the GPU until it is run, when its hook moves what it is given
        put_out = w_o(
            heads.to(device=model.device if where.type == "meta" else where, dtype=model.dtype)
        )
        if "norm" in arch.attn:  # it stands between W_O and what is added
            put_out = block.get_submodule(arch.attn)(put_out)
        same(
            put_out.double().cpu(),
            found["attn_out"][layer],
            f"W_O of head_out[{layer}] to be attn_out[{layer}]",
        )
    for layer, after in enumerate(found["resid_post"]):
        if layer + 1 < len(found["resid_post"]):
            same(
                after,
                hidden[layer + 1],
                f"resid_post[{layer}] to be output_hidden_states[{layer + 1}]",
            )
        parts = hidden[layer], found["attn_out"][layer], found["mlp_out"][layer]
        same(
            sum(parts),
            after,
            f"resid_post[{layer}] to be the state before block {layer} plus attn_out[{layer}] and mlp_out[{layer}]",
            *parts,
        )
