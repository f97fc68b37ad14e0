"""Tiny random-weight models of many families, with odd sizes: real architectures, seconds on a CPU."""

import functools

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
VOCAB, WIDTH, LAYERS = 97, 36, 3
_LLAMA = dict(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=LAYERS, max_position_embeddings=64)
_GPT2 = dict(n_embd=WIDTH, n_head=6, n_layer=LAYERS, n_positions=64)
_NEOX = _LLAMA | {"rotary_pct": 0.5}
CONFIGS = {
    "llama": ("llama", _LLAMA), "mistral": ("mistral", _LLAMA | {"sliding_window": None}), "qwen2": ("qwen2", _LLAMA), "qwen3": ("qwen3", _LLAMA | {"head_dim": 6}),
    "gemma": ("gemma", _LLAMA | {"head_dim": 8}), "phi": ("phi", _LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 3}), "stablelm": ("stablelm", _LLAMA), "starcoder2": ("starcoder2", _LLAMA),
    "gpt2": ("gpt2", _GPT2), "gpt_bigcode": ("gpt_bigcode", _GPT2 | {"multi_query": True}),
    "gpt_neox": ("gpt_neox", _NEOX), "gpt_neox sequential": ("gpt_neox", _NEOX | {"use_parallel_residual": False}),
}  # fmt: skip
FAMILIES = list(CONFIGS)


@functools.cache
def tiny(family: str, dtype: torch.dtype = torch.float64):
    """A model in eval mode; its config's dropout stays as the family ships it."""
    torch.manual_seed(0)
    kind, options = CONFIGS[family]
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, pad_token_id=0, **options)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def tiny_prompts(n: int = 7, seed: int = 0) -> pd.DataFrame:
    """Prompts of random tokens and different lengths."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, VOCAB, (int(torch.randint(2, 12, (1,), generator=g)),), generator=g).tolist() for _ in range(n)]
    return pd.DataFrame({
        "row_id": [f"row{i}" for i in range(n)], "example_id": [f"example{i}" for i in range(n)], "input_ids": ids,
        "choice_ids": [[[1, 2], [3]] if i % 2 else [[4], [5, 6]] for i in range(n)], "label": [i % 2 for i in range(n)],
    })  # fmt: skip


TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def byte_tokenizer(*, bos: bool = False, chat_template: str | None = TURNS) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: small, and without the network."""
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(symbols)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template
    return made
