"""Try every model family of transformers that writes text, and note what works with it.

``python -m dlk_utils.extract.families book/families_table.txt`` makes a tiny model of random
weights of each family in turn, and tries on it what this package does with a model: read the sites,
alone, padded and packed; compute gradients; draw dropout at each place. The table is part of the
page *Model families* of the book. It takes some minutes, and needs no network.

A family is tried with the kinds of layers that its own configuration has, in six layers. What a
real model's size or settings change is checked when that model is loaded (`sites.check_sites`).
"""

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from dlk_utils.errors import DlkError
from dlk_utils.extract.batches import pad
from dlk_utils.extract.draws import draw_states
from dlk_utils.extract.dropout import PLACES, native_sites
from dlk_utils.extract.gradients import full_backprop, states_and_gradients
from dlk_utils.extract.prefixes import WINDOWS, takes_trees, why_not_packed, window
from dlk_utils.extract.states import States, clean_states, forward_states
from dlk_utils.models.architectures import ARCHITECTURES
from dlk_utils.models.configuration import model_class, text_config
from dlk_utils.models.sites import SITES, architecture, check_sites

N_LAYERS = 6
VOCABULARY = 128

_SIZES_BY_NAMES = {
    "hidden_size n_embd d_model word_embed_proj_dim embedding_size dim embed_dim dim_model": 64,
    "decoder_hidden_size projection_dim output_dim": 64,
    "num_attention_heads n_head n_heads num_heads linear_num_value_heads": 4,
    "decoder_attention_heads encoder_attention_heads": 4,
    "num_key_value_heads num_kv_heads linear_num_key_heads": 2,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers": N_LAYERS,
    "encoder_layers depth": 1,
    "intermediate_size ffn_dim n_inner d_inner ffn_hidden_size dim_ff mlp_hidden_size": 96,
    "decoder_ffn_dim encoder_ffn_dim shared_expert_intermediate_size": 96,
    "shared_intermediate_size dense_intermediate_size intermediate_size_mlp": 96,
    "moe_intermediate_size expert_hidden_size q_lora_rank kv_lora_rank": 32,
    "head_dim v_head_dim global_head_dim swa_head_dim swa_v_head_dim d_kv": 16,
    "qk_nope_head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "rotary_dim": 8,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok moe_topk moe_k top_k_experts": 2,
    "n_group topk_group": 1,
    "vocab_size vocab_size_per_layer_input": VOCABULARY,
    "max_position_embeddings n_positions max_seq_len": 512,
}
_SIZES = {name: size for names, size in _SIZES_BY_NAMES.items() for name in names.split()}
"""Small sizes, under the names that families have for them."""

_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

_ROTARY_PARTS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_CONV_THEN_ATTENTION = ["conv", "conv", "full_attention"] * 2

SETTINGS: dict[str, dict[str, Any]] = {
    # The factors of real models, which are 1 in the default configuration.
    "granite": {"residual_multiplier": 0.22},
    "granitemoe": {"residual_multiplier": 0.22},
    "granitemoeshared": {"residual_multiplier": 0.22},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "mistral4": {"num_key_value_heads": 4},
    "glm46v": {"rope_parameters": _ROTARY_PARTS},
    "glm_ocr": {"rope_parameters": _ROTARY_PARTS},
    "paddleocr_vl": {"rope_parameters": _ROTARY_PARTS},
    "glm4v": {"rope_parameters": _ROTARY_PARTS},
    "qwen2_vl": {"rope_parameters": _ROTARY_PARTS},
    "qwen2_5_vl": {"rope_parameters": _ROTARY_PARTS},
    "gpt_neo": {"attention_types": [[["global", "local"], N_LAYERS // 2]]},
    "lfm2": {"layer_types": _CONV_THEN_ATTENTION},
    "lfm2_moe": {"layer_types": _CONV_THEN_ATTENTION},
    "lfm2_vl": {"layer_types": _CONV_THEN_ATTENTION},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True},
    "zamba2": {"layer_types": None},
}
"""What the configuration of a family needs besides small sizes."""


def tiny_model(kind: str, **settings: Any) -> nn.Module:
    """Make a model of a family with random weights, small sizes and six layers.

    Parameters
    ----------
    kind
        The family's name, `model_type` in its configuration.
    **settings
        Further settings of its configuration.

    Raises
    ------
    Exception
        Whatever the family raises, if these sizes do not fit it.
    """
    torch.manual_seed(0)
    settings = SETTINGS.get(kind, {}) | settings
    try:
        return _model(kind, settings, fills_gaps=False)
    except (TypeError, AttributeError):
        # Sizes that the default configuration leaves open.
        return _model(kind, settings, fills_gaps=True)


def _model(kind: str, settings: Mapping[str, Any], *, fills_gaps: bool) -> nn.Module:
    config = _tiny_config(CONFIG_MAPPING[kind], settings, fills_gaps=fills_gaps)
    return model_class(config).from_config(config).eval()


def _tiny_config(
    config_class: type, settings: Mapping[str, Any], *, fills_gaps: bool
) -> PreTrainedConfig:
    default = config_class()
    values = default.to_dict()
    sizes = {}
    for name, size in _SIZES.items():
        value = values.get(name, 0)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            sizes[name] = min(value, size)
        elif fills_gaps and name in values and value is None:
            sizes[name] = size
    # Latent attention has as many heads of keys as of queries.
    if (
        "num_key_value_heads" in sizes
        and default.num_key_value_heads == default.num_attention_heads
    ):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    inner = {}
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            inner[name] = _tiny_config(type(part), {}, fills_gaps=fills_gaps).to_dict()
            if name == "text_config":
                inner[name] |= settings
    return config_class(**(sizes | _TOKENS | inner | ({} if "text_config" in inner else settings)))


# Prompts that begin alike, one that is the beginning of another, and one of its own.
_PROMPTS = (
    [5, 6, 7, 8, 9],
    [5, 6, 9],
    [5, 6, 7, 14, 9, 13, 12, 17, 11, 10, 8],
    [18, 13],
    [5, 6, 7],
)
_CHOICES = [([11, 12], [13])] * len(_PROMPTS)
_TOLERANCE = 1e-4


def try_family(kind: str) -> dict[str, str]:
    """Try everything on a tiny model of a family; return a row of the table.

    Returns
    -------
    dict
        `family`. `sites`: "known" (from the table of this package), "found" (from the model), "no",
        or "not tried". `attn_out`, `mlp_out` and `head_out`: which modules of a block are read.
        `padded`, `packed`, `window` (prompts longer than it) and `gradients`: "yes", or what is
        wrong; "-" without a window. `own dropout`: where the family
        has dropout of its own. `dropout`: where it can be drawn. `why not`: what failed.
    """
    row = dict.fromkeys(COLUMNS, "") | {"family": kind}
    try:
        model = tiny_model(kind)
    except Exception as error:  # Whatever a family says of sizes that do not fit it.
        reason = f"no tiny model could be made ({type(error).__name__}: {_first_line(error)})"
        return row | {"sites": "not tried", "why not": reason}
    try:
        check_sites(model)
    except DlkError as error:
        reason = str(error).rpartition("were not found from the model: ")[2]
        return row | {"sites": "no", "why not": reason}

    family = architecture(model)
    factor = "" if family.scale == 1 else f" x {family.scale:.3g}"
    row["sites"] = "known" if kind in ARCHITECTURES else "found"
    row["attn_out"], row["mlp_out"] = family.attn + factor, family.mlp + factor
    row["head_out"] = family.w_o
    row["padded"] = _outcome(lambda: _try_padded(model))
    row["packed"] = _outcome(lambda: _try_packed(model))
    row["window"] = _outcome(lambda: _try_windows(kind, model))
    row["gradients"] = _outcome(lambda: _try_gradients(model))
    row["own dropout"] = ", ".join(native_sites(model))
    drawn = [place for place in PLACES if _outcome(lambda p=place: _try_draws(model, p)) == "yes"]
    row["dropout"] = ", ".join(drawn)
    return row


COLUMNS = (
    "family",
    "sites",
    "attn_out",
    "mlp_out",
    "head_out",
    "padded",
    "packed",
    "window",
    "gradients",
    "own dropout",
    "dropout",
    "why not",
)


def _outcome(attempt: Callable[[], str | None]) -> str:
    """Return "yes", or what an attempt returns or raises."""
    try:
        return attempt() or "yes"
    except Exception as error:  # Whatever a family raises: it is what the table shows.
        return f"no: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:120]


def _try_padded(model: nn.Module) -> str | None:
    states, _ = forward_states(model, pad(_PROMPTS), SITES)
    return _difference(states, _states_alone(model))


def _try_packed(model: nn.Module) -> str | None:
    if not takes_trees(model, max(map(len, _PROMPTS))):
        return f"no: {why_not_packed(model)}"
    states, _ = clean_states(model, _PROMPTS, SITES)
    return _difference(states, _states_alone(model))


def _try_windows(kind: str, model: nn.Module) -> str | None:
    """Try prompts that are longer than what a token sees, in a model where this is eight tokens."""
    names = [name for name in WINDOWS if getattr(text_config(model), name, None)]
    if not names or window(model) == math.inf:
        return "-"
    narrow = tiny_model(kind, **dict.fromkeys(names, 8))
    states, _ = clean_states(narrow, _PROMPTS, SITES)
    return _difference(states, _states_alone(narrow))


def _states_alone(model: nn.Module) -> States:
    """Return the states of each prompt in a batch of its own."""
    alone = [forward_states(model, pad([ids]), SITES)[0] for ids in _PROMPTS]
    return {site: torch.cat([states[site] for states in alone], 1) for site in SITES}


def _try_gradients(model: nn.Module) -> str | None:
    _, gradients, _ = states_and_gradients(model, _PROMPTS, _CHOICES, SITES)
    alone = [
        full_backprop(model, pad([ids]), [pair], SITES)
        for ids, pair in zip(_PROMPTS, _CHOICES, strict=True)
    ]
    expected = {site: torch.cat([some[site] for some in alone], 1) for site in SITES}
    return _difference(gradients, expected)


def _try_draws(model: nn.Module, place: str) -> str | None:
    """Draw dropout in a batch and alone, and expect the same draws, and two that differ."""
    options = {"p": 0.2, "places": place, "sites": ["resid_post"]}
    seeds = [list(range(len(_PROMPTS))), list(range(100, 100 + len(_PROMPTS)))]
    first, second = (states for states, _ in draw_states(model, _PROMPTS, seeds=seeds, **options))
    last, next_last = first["resid_post"][-1], second["resid_post"][-1]
    if (last == next_last).all(-1).any():
        return "no: draws are equal"
    [(alone, _)] = draw_states(model, _PROMPTS[:1], seeds=[seeds[0][:1]], **options)
    return _difference({"resid_post": first["resid_post"][:, :1]}, alone)


def _difference(states: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Return None if states [layer, n, d] are equal up to rounding, else how much they differ."""
    most = 0.0
    for site in expected:
        # A gradient may be zero: the last block's MLP is not seen by its attention.
        size = expected[site].norm(dim=-1).clamp(min=1e-6)
        most = max(most, float(((states[site] - expected[site]).norm(dim=-1) / size).max()))
    return None if most <= _TOLERANCE else f"no: differs by {most:.1g} of the norm"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of `try_family` as Markdown, and how many there are of each kind."""
    usable = [row for row in rows if row["sites"] in ("known", "found")]
    refused = [row for row in rows if row["sites"] == "no"]
    others = [row for row in rows if row["sites"] == "not tried"]
    parts = [
        f"With transformers {transformers.__version__} and torch "
        f"{torch.__version__.partition('+')[0]}, {len(usable) + len(refused)} of {len(rows)} "
        f"families were tried: {len(usable)} can be used and {len(refused)} are refused. For the "
        f"other {len(others)} no tiny model could be made.",
        "## Families that can be used",
        _grid(usable, [column for column in COLUMNS if column != "why not"]),
        "## Families that are refused",
        _grid(refused, ["family", "why not"]),
        "## Families that were not tried",
        _grid(others, ["family", "why not"]),
    ]
    return "\n\n".join(parts) + "\n"


def _grid(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row[column].replace("|", "/").replace("<", "&lt;") for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Write the table of all families to a file, or of those that are named to the screen."""
    if not arguments:
        raise SystemExit("usage: python -m dlk_utils.extract.families FILE, or family names")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    every = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    kinds = [name for name in arguments if name in every]
    rows = []
    for kind in tqdm(kinds or sorted(every), unit="family"):
        rows.append(try_family(kind))
    if kinds:
        print(markdown_table(rows))
    else:
        Path(arguments[0]).write_text(markdown_table(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
