"""Layers, heads and context are those of the language model, also inside a model of images."""

import pytest
from tiny_models import byte_tokenizer, new_model
from transformers import AutoConfig

from dlk_utils.errors import ModelError
from dlk_utils.extract.families import N_LAYERS, tiny_model
from dlk_utils.extract.passes import activations
from dlk_utils.models.configuration import context_length, n_heads, n_layers
from dlk_utils.models.loading import load_config, load_model, resolve

TOKENIZER = byte_tokenizer()


@pytest.fixture(params=["gemma3", "llava"])
def checkpoint(request, tmp_path):
    """A model of images and text with random weights, and a tokenizer of bytes."""
    tiny_model(request.param, vocab_size=len(TOKENIZER)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_model_of_images_is_used_with_text_alone(checkpoint):
    model, tokenizer = load_model(str(checkpoint), dtype="float32", device="cpu")
    ids = tokenizer(["Two and two are four.", "Two"]).input_ids
    states = activations(model, ids, progress=False)["resid_post"]
    assert states.shape == (N_LAYERS, 2, 64)


def test_layers_heads_and_context_are_those_of_the_language_model(checkpoint):
    config = load_config(resolve(str(checkpoint)))
    assert not hasattr(config, "num_hidden_layers")
    assert (n_layers(config), n_heads(config), context_length(config)) == (N_LAYERS, 4, 512)


@pytest.mark.parametrize(
    ("family", "limit"), [("llama", 64), ("gpt2", 64), ("mpt", 64), ("opt", 64)]
)
def test_the_context_is_read_under_each_family_s_name_for_it(family, limit):
    model = new_model(family)
    assert context_length(model) == context_length(model.config) == limit


def test_a_family_without_a_limit_gets_a_stated_one():
    assert context_length(AutoConfig.for_model("bloom")) == 2048


def test_a_configuration_of_something_else_is_refused_by_name():
    config = AutoConfig.for_model("timm_wrapper")
    with pytest.raises(ModelError, match=r"timm_wrapper: expected .* num_hidden_layers, got None"):
        n_layers(config)
