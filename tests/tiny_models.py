"""Tiny models of many families: real architectures with random weights and odd sizes."""

import functools
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dlk_utils.models.loading import load_tokenizer, resolve
from dlk_utils.models.sites import ARCHITECTURES
from dlk_utils.questions.choices import spellings
from dlk_utils.questions.templates import prompt_library

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
_MPT = dict(d_model=WIDTH, n_heads=6, n_layers=LAYERS, max_seq_len=64)
_OPT = dict(
    hidden_size=WIDTH,
    ffn_dim=40,
    num_attention_heads=6,
    num_hidden_layers=LAYERS,
    max_position_embeddings=64,
    word_embed_proj_dim=WIDTH,
)
_GEMMA3_WINDOW = {
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_FALCON_ALIBI = {"alibi": True, "parallel_attn": False, "multi_query": False}

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
    "gemma3_text window": ("gemma3_text", _LLAMA | _GEMMA3_WINDOW),
    "falcon": ("falcon", _FALCON),
    "falcon grouped": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon alibi": ("falcon", _FALCON | _FALCON_ALIBI),
    "mpt": ("mpt", _MPT),
    "opt": ("opt", _OPT),
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
    """Make options with which a model of any family is small."""
    config = AutoConfig.for_model(kind)
    return {name: size for name, size in _SIZES.items() if hasattr(config, name)}


# An architecture that is new in `models.sites` is tested without an entry above, unless a model of
# its kind cannot have these sizes.
_configured = {kind for kind, _ in CONFIGS.values()}
CONFIGS |= {kind: (kind, _small(kind)) for kind in ARCHITECTURES if kind not in _configured}
FAMILIES = list(CONFIGS)

SINGLE = ("mpt", "gemma2")
"""Families that are tested in single precision, in which their written-out attention takes the
softmax: a double's mask is minus infinity there."""

PRECISE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""How near two ways of computing the same have to be, relative to the vector's length."""


def new_model(family: str, **options):
    """Make a model in evaluation mode; the same weights each time. `options` are of its config."""
    torch.manual_seed(0)
    kind, config = CONFIGS[family]
    tokens = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    made = AutoConfig.for_model(kind, **tokens | config | options)
    return AutoModelForCausalLM.from_config(made).eval()


@functools.cache
def tiny(family: str, dtype: torch.dtype | None = None):
    """Return the model of a family, shared by all tests, in double precision where it can be."""
    dtype = dtype or (torch.float32 if family in SINGLE else torch.float64)
    return new_model(family).to(dtype)


def tiny_checkpoint(folder: Path, family: str = "llama", *, tokenizer=None, **options) -> Path:
    """Save a model with random weights in float32, and a tokenizer, for `from_pretrained`.

    Parameters
    ----------
    folder
        Where to save both; it is returned.
    family
        One of `FAMILIES`.
    tokenizer
        None is `byte_tokenizer()`.
    **options
        Settings of the model's config, for instance ``max_position_embeddings``.
    """
    tokenizer = tokenizer or byte_tokenizer()
    new_model(family, vocab_size=len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def checkpoint_that_knows_nothing(folder: Path) -> Path:
    """Save a tiny model that answers every claim, rightly by chance, with SmolLM2's tokenizer.

    So it goes through every notebook like a real model, in seconds.
    """
    tokenizer = load_tokenizer(resolve("smollm2"))
    model = new_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    # One channel is on for every token, and says that the words of the choices come next.
    words = {word for pair in prompt_library("claim").choices for word in pair}
    choices = [token for word in words for token in spellings(tokenizer, word)]
    model.model.embed_tokens.weight.data[:, 0] = 5
    model.lm_head.weight.data[choices, 0] = 5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_prompts(n: int = 7, seed: int = 0) -> pd.DataFrame:
    """Prompts of random tokens, 2 to 11 of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for _ in range(n):
        length = int(torch.randint(2, 12, (1,), generator=generator))
        ids.append(torch.randint(1, VOCAB, (length,), generator=generator).tolist())
    return pd.DataFrame(
        {
            "row_id": [f"row{i}" for i in range(n)],
            "example_id": [f"example{i}" for i in range(n)],
            "input_ids": ids,
            "question_start": [len(prompt) // 2 for prompt in ids],
            "choice_ids": [[[1, 2], [3]] if i % 2 else [[4], [5, 6]] for i in range(n)],
            "strict_ids": [[[1], [3]] if i % 2 else [[4], [5]] for i in range(n)],
            "label": [i % 2 for i in range(n)],
        }
    )


def prompts_that_begin_alike(n: int = 7, length: int = 20) -> pd.DataFrame:
    """`tiny_prompts` behind the same `length` random tokens."""
    start = torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(9)).tolist()
    rows = tiny_prompts(n)
    input_ids = [start + ids for ids in rows.input_ids]
    return rows.assign(input_ids=input_ids, question_start=length)


TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(
    *, bos: bool = False, chat_template: str | None = TURNS
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of single bytes: small, and without the network."""
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template
    return made


def close(model) -> dict[str, float]:
    """Tolerances for `assert_close` between two ways of computing the same in a model's precision.

    A value that is nearly zero has the error of the others, hence the absolute tolerance.
    """
    atol = 1e-13 if model.dtype == torch.float64 else 5e-6
    return {"rtol": PRECISE[model.dtype], "atol": atol}


def close_in_single(model) -> dict[str, float]:
    """The same where some part is computed in single precision, whatever the model's."""
    return close(model) if model.dtype == torch.float32 else {"rtol": 1e-5, "atol": 1e-6}
