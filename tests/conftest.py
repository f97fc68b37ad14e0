"""Tiny random-weight models of many families, with odd sizes: real architectures, seconds on a CPU."""

import functools

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dlk_utils.models.sites import ARCHITECTURES

torch.set_num_threads(1)
VOCAB, WIDTH, LAYERS = 97, 36, 3
_LLAMA = dict(
    hidden_size=WIDTH,
    intermediate_size=40,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_hidden_layers=LAYERS,
    max_position_embeddings=64,
)
_GPT2 = dict(n_embd=WIDTH, n_head=6, n_layer=LAYERS, n_positions=64)
_NEOX = _LLAMA | {"rotary_pct": 0.5}
_FALCON = dict(
    hidden_size=WIDTH, num_attention_heads=6, num_hidden_layers=LAYERS, alibi=False, bias=False
)
CONFIGS = {
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", _LLAMA | {"sliding_window": None}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 6}),
    "gemma": ("gemma", _LLAMA | {"head_dim": 8}),
    "phi": ("phi", _LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "stablelm": ("stablelm", _LLAMA),
    "starcoder2": ("starcoder2", _LLAMA),
    "phi3": ("phi3", _LLAMA),
    "smollm3": ("smollm3", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
    "gemma2": ("gemma2", _LLAMA | {"head_dim": 8, "attn_logit_softcapping": 0.5}),
    "gemma3_text": ("gemma3_text", _LLAMA | {"head_dim": 8}),
    "mistral window": ("mistral", _LLAMA | {"sliding_window": 8}),
    "gemma3_text window": (
        "gemma3_text",
        _LLAMA
        | {
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "falcon": ("falcon", _FALCON),
    "falcon grouped": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon alibi": (
        "falcon",
        _FALCON | {"alibi": True, "parallel_attn": False, "multi_query": False},
    ),
    "mpt": ("mpt", dict(d_model=WIDTH, n_heads=6, n_layers=LAYERS, max_seq_len=64)),
    "opt": (
        "opt",
        dict(
            hidden_size=WIDTH,
            ffn_dim=40,
            num_attention_heads=6,
            num_hidden_layers=LAYERS,
            max_position_embeddings=64,
            word_embed_proj_dim=WIDTH,
        ),
    ),
    "gpt2": ("gpt2", _GPT2),
    "gpt_bigcode": ("gpt_bigcode", _GPT2 | {"multi_query": True}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox sequential": ("gpt_neox", _NEOX | {"use_parallel_residual": False}),
}
# Sizes, under the names that families have for them.
_SIZES = (
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), WIDTH)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 6)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), LAYERS)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64)
    | dict.fromkeys(("intermediate_size", "ffn_dim"), 40)
    | {"num_key_value_heads": 2}
)


def _small(kind: str) -> dict[str, int]:
    """Options that make a model of any family small."""
    config = AutoConfig.for_model(kind)
    return {name: size for name, size in _SIZES.items() if hasattr(config, name)}


# An architecture that is new in `models.sites` is tested without an entry above, unless a model of
# its kind cannot have these sizes.
_configured = {kind for kind, _ in CONFIGS.values()}
CONFIGS |= {kind: (kind, _small(kind)) for kind in ARCHITECTURES if kind not in _configured}
FAMILIES = list(CONFIGS)


SINGLE = ("mpt", "gemma2")
"""Their written-out attention takes the softmax in single precision, where the mask of a double is minus infinity: tested in single precision."""


@functools.cache
def tiny(family: str, dtype: torch.dtype | None = None):
    """A model in eval mode, in double precision where the family can; its config's dropout stays as the family ships it."""
    torch.manual_seed(0)
    kind, options = CONFIGS[family]
    dtype = dtype or (torch.float32 if family in SINGLE else torch.float64)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, pad_token_id=0, **options
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def tiny_prompts(n: int = 7, seed: int = 0) -> pd.DataFrame:
    """Prompts of random tokens and different lengths."""
    g = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(
            1, VOCAB, (int(torch.randint(2, 12, (1,), generator=g)),), generator=g
        ).tolist()
        for _ in range(n)
    ]
    return pd.DataFrame(
        {
            "row_id": [f"row{i}" for i in range(n)],
            "example_id": [f"example{i}" for i in range(n)],
            "input_ids": ids,
            "choice_ids": [[[1, 2], [3]] if i % 2 else [[4], [5, 6]] for i in range(n)],
            "label": [i % 2 for i in range(n)],
        }
    )


TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def byte_tokenizer(
    *, bos: bool = False, chat_template: str | None = TURNS
) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: small, and without the network."""
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(symbols)}, []))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template
    return made


PRECISE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""How near two ways of computing the same have to be, relative to the vector's length."""


def close(model) -> dict[str, float]:
    """The same for `assert_close`, value by value: one that is nearly zero has the error of the others, so in single precision it is allowed that of values of about one half."""
    return dict(rtol=PRECISE[model.dtype], atol=1e-13 if model.dtype == torch.float64 else 5e-6)


def prompts_that_begin_alike(n: int = 7, length: int = 20) -> pd.DataFrame:
    start = torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(9)).tolist()
    return tiny_prompts(n).assign(input_ids=lambda t: [start + list(i) for i in t.input_ids])


def pytest_collection_modifyitems(items):
    """The long files first, so that no worker is left with one of them at the end (needs `--no-loadscope-reorder`)."""
    long = ["test_ways.py", "test_survival.py", "test_on_ray.py", "test_organism_check.py"]
    items.sort(key=lambda item: long.index(item.path.name) if item.path.name in long else len(long))
