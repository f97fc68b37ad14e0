"""The table of model families: where the sites of each are, written down by hand.

A family that is not in it is looked at when a model of it is loaded (`finding`). So the table needs
only the families that were tested first, and those whose places cannot be found that way.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Architecture:
    """Where the sites of a model family are, and where the family has dropout of its own.

    `blocks` is the path of the list of blocks in a ``...ForCausalLM``. The other paths are relative
    to a block: `attn` and `mlp` are the modules whose output is added to the residual stream, `w_o`
    is the output projection of attention. `dropout` holds the places of the family's own dropout,
    whatever its rate: some of "attn_out", "mlp_out", "embedding" and "attention" (probabilities).
    The outputs of `attn` and `mlp` are multiplied by `scale` before they are added (Granite).
    `down` is the last linear layer of the MLP; None in the families of the table, where it is the
    last one in `mlp`, and in mixtures of experts, which have none.
    """

    blocks: str
    attn: str
    mlp: str
    w_o: str
    dropout: tuple[str, ...]
    scale: float = 1.0
    down: str | None = None


_ADDED = ("attn_out", "mlp_out")
_NOT_EMBEDDING = (*_ADDED, "attention")
_EVERYWHERE = (*_ADDED, "embedding", "attention")

_LLAMA = Architecture("model.layers", "self_attn", "mlp", "self_attn.o_proj", ("attention",))
# Here a second norm comes between attention, or the MLP, and the residual stream.
_GEMMA2 = replace(_LLAMA, attn="post_attention_layernorm", mlp="post_feedforward_layernorm")
_GPT2 = Architecture("transformer.h", "attn", "mlp", "attn.c_proj", _EVERYWHERE)

# The tests that run for all families (`FAMILIES` of tests/tiny_models.py) make a tiny model of
# each of these by themselves.
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "starcoder2": replace(_LLAMA, dropout=_EVERYWHERE),
    # The configuration of Phi-3 has a dropout of embeddings, which its code never uses.
    "phi3": replace(_LLAMA, dropout=_NOT_EMBEDDING),
    "stablelm": replace(_LLAMA, dropout=("mlp_out", "attention")),
    "phi": replace(_LLAMA, w_o="self_attn.dense", dropout=_EVERYWHERE),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "olmo2": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": Architecture("gpt_neox.layers", "attention", "mlp", "attention.dense", _EVERYWHERE),
    # Falcon and MPT also drop attention probabilities, in code that no mask of ours can reach.
    "falcon": replace(_GPT2, attn="self_attention", w_o="self_attention.dense", dropout=_ADDED),
    # The `ffn` module of MPT adds the residual stream itself, so its last part is read.
    "mpt": Architecture("transformer.blocks", "attn", "ffn.down_proj", "attn.out_proj", _ADDED),
    "opt": Architecture(
        "model.decoder.layers", "self_attn", "fc2", "self_attn.out_proj", _NOT_EMBEDDING
    ),
}
