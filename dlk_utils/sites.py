"""Where activations are read, by architecture. The layer convention, stated here once:

*layer* `l` counts blocks from 0. `resid_post[l]` is the residual stream after block `l`, so it equals
`output_hidden_states[l + 1]`, except after the last block, where transformers applies the final norm and we do not.
`attn_out[l]` and `mlp_out[l]` are what block `l` adds to it: where the block is sequential or parallel alike,
`resid_post[l] = resid_post[l-1] + attn_out[l] + mlp_out[l]`. Names are TransformerLens's.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

SITES = ("resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True)
class Architecture:
    """Attribute paths inside a `...ForCausalLM`."""

    blocks: str
    attn: str
    mlp: str


_LLAMA = Architecture("model.layers", "self_attn", "mlp")
ARCHITECTURES = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "smollm3": _LLAMA, "phi3": _LLAMA, "gemma": _LLAMA, "phi": _LLAMA,
    "starcoder2": _LLAMA, "stablelm": _LLAMA,
    "gpt2": Architecture("transformer.h", "attn", "mlp"),
    "gpt_bigcode": Architecture("transformer.h", "attn", "mlp"),
    "gpt_neox": Architecture("gpt_neox.layers", "attention", "mlp"),
}  # fmt: skip


def architecture(model: nn.Module) -> Architecture:
    """The entry for a model; an unknown family is refused by name."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"architecture {kind!r} is not known: expected one of {', '.join(ARCHITECTURES)}; add it to dlk_utils/sites.py")
    return ARCHITECTURES[kind]


def site_modules(model: nn.Module, site: str) -> list[nn.Module]:
    """The module whose output is the site, for each layer."""
    if site not in SITES:
        raise ValueError(f"site: expected one of {', '.join(SITES)}, got {site!r}")
    arch = architecture(model)
    blocks = list(model.get_submodule(arch.blocks))
    return blocks if site == "resid_post" else [b.get_submodule(arch.attn if site == "attn_out" else arch.mlp) for b in blocks]


@contextlib.contextmanager
def on_output(model: nn.Module, sites: Sequence[str], act: Callable[[str, int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `act(site, layer, hidden [b, t, d])` at each site; a tensor that it returns replaces the output. Hooks go away at the end."""
    handles = []

    def hook(site, layer):
        def run(module, args, output):
            hidden = output if isinstance(output, Tensor) else output[0]  # blocks give a tensor or a tuple, by version and family
            new = act(site, layer, hidden)
            if new is not None:
                return new if isinstance(output, Tensor) else (new, *output[1:])

        return run

    try:
        for site in sites:
            for layer, module in enumerate(site_modules(model, site)):
                handles.append(module.register_forward_hook(hook(site, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()
