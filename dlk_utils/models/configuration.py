"""What a model's configuration says, also where that of the language model is inside another."""

from typing import Any

from dlk_utils.errors import ModelError

UNLIMITED_CONTEXT = 2048
"""Tokens that a prompt may have where a family states no limit (ALiBi, recurrent models)."""

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


def text_config(model_or_config: Any) -> Any:
    """Return the configuration of the language model, also where it is inside another.

    Models for images and text, such as Gemma 3, keep it inside theirs.
    """
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)


def model_class(config: Any) -> Any:
    """Return the class of transformers that loads a model: of text, or of images and text.

    A model of the second kind is used with text alone. Its vision tower is loaded too, and never
    runs.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    of_text = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    of_images = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if of_images and not of_text else AutoModelForCausalLM


def n_layers(model_or_config: Any) -> int:
    """Return the number of blocks of the language model.

    Raises
    ------
    ModelError
        If the configuration does not state it.
    """
    return _stated(model_or_config, "num_hidden_layers")


def n_heads(model_or_config: Any) -> int:
    """Return the number of attention heads in a block of the language model.

    Raises
    ------
    ModelError
        If the configuration does not state it.
    """
    return _stated(model_or_config, "num_attention_heads")


def width(model_or_config: Any) -> int:
    """Return the width of the residual stream of the language model.

    Raises
    ------
    ModelError
        If the configuration does not state it.
    """
    return _stated(model_or_config, "hidden_size")


def context_length(model_or_config: Any) -> int:
    """Return how many tokens a prompt may have: `UNLIMITED_CONTEXT` if there is no limit."""
    config = text_config(model_or_config)
    limits = [getattr(config, name, None) for name in _LIMITS]
    return next((limit for limit in limits if limit), UNLIMITED_CONTEXT)


def _stated(model_or_config: Any, name: str) -> int:
    config = text_config(model_or_config)
    number = getattr(config, name, None)
    if not isinstance(number, int):
        raise ModelError(
            f"{config.model_type}: expected a configuration of a language model with {name}, got "
            f"{number!r} in {type(config).__name__}"
        )
    return number
