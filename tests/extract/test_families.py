"""What works with a family that is found from the model, and the table of all families."""

import functools
import re
from pathlib import Path

import pytest
import torch
import transformers

from dlk_utils.errors import UnknownArchitecture
from dlk_utils.extract import families
from dlk_utils.extract.families import COLUMNS, main, markdown_table, tiny_model, try_family
from dlk_utils.extract.gradients import last_linear
from dlk_utils.models.sites import site_modules

BOOK = Path(__file__).parents[2] / "book"
FOUND = ["qwen3_moe"]
ALSO_FOUND = [
    "glm4",
    "gemma3",
    "olmo",
    "granite",
    "cohere",
    "cohere2",
    "olmo3",
    "mixtral",
    "exaone4",
    "ministral",
    "gpt_oss",
    "nemotron",
]
ALSO_FOUND += ["seed_oss", "helium", "hunyuan_v1_dense", "apertus", "qwen2_5_vl", "llava"]


@functools.cache
def tried(kind: str) -> dict:
    return try_family(kind)


def kinds_of(some: list[str], others: list[str]) -> list:
    return [*some, *(pytest.param(kind, marks=pytest.mark.slow) for kind in others)]


@pytest.mark.parametrize("kind", kinds_of(FOUND, ALSO_FOUND))
def test_states_are_those_of_each_prompt_alone_and_gradients_those_of_backprop(kind):
    row = tried(kind)
    assert row["sites"] == "found"
    assert (row["padded"], row["packed"], row["gradients"]) == ("yes", "yes", "yes")
    assert row["window"] in ("yes", "-")
    assert row["dropout"].startswith("attn_out, mlp_out, embedding")


@pytest.mark.slow
def test_a_family_that_does_something_else_is_seen(monkeypatch):
    """The table would show it: one prompt's states are compared with those of another."""
    monkeypatch.setattr(families, "_states_alone", lambda model: _states_of_others(model))
    row = try_family("olmo")
    assert re.match(r"no: differs by \d", row["padded"])
    assert re.match(r"no: differs by \d", row["packed"])


def _states_of_others(model: torch.nn.Module) -> families.States:
    states, _ = families.forward_states(model, families.pad(families._PROMPTS), families.SITES)
    return {site: x.flip(1) for site, x in states.items()}


def test_attention_that_does_more_than_the_usual_one_is_not_replaced():
    assert try_family("diffllama")["dropout"] == "attn_out, mlp_out, embedding"


def test_the_last_linear_layer_of_the_mlp_is_found_too():
    model = tiny_model("glm4")
    assert last_linear(model) == [block.mlp.down_proj for block in model.model.layers]


def test_weight_gradients_of_a_mixture_of_experts_are_refused():
    with pytest.raises(UnknownArchitecture, match="qwen3_moe: expected an MLP with a last linear"):
        last_linear(tiny_model("qwen3_moe"))


def test_a_tower_of_text_is_found_inside_a_model_of_images():
    model = tiny_model("gemma3")
    layers = model.model.language_model.layers
    assert site_modules(model, "resid_post") == list(layers)
    assert site_modules(model, "mlp_out") == [x.post_feedforward_layernorm for x in layers]


def test_a_cell_of_the_table_holds_no_markup():
    row = dict.fromkeys(COLUMNS, "") | {"family": "x", "sites": "no", "why not": "a|b <c>"}
    assert "| x | a/b &lt;c> |" in markdown_table([row])


@pytest.mark.slow
def test_families_can_be_tried_by_name(capsys):
    main(["olmo"])
    assert "| olmo | found | self_attn | mlp |" in capsys.readouterr().out


def test_the_book_shows_the_table_with_the_version_that_it_was_made_with():
    table = (BOOK / "families_table.txt").read_text(encoding="utf-8")
    assert re.match(r"With transformers \d+\.\d+\.\d+ and torch \d", table)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    for kind in ("llama", "gemma3", "qwen3_moe", "llava", "qwen3_5"):
        assert kind in rows, kind
    made_with_this = f"transformers {transformers.__version__} " in table
    row = markdown_table([tried("qwen3_moe")]).splitlines()[6]
    assert row.startswith("| qwen3_moe |")
    assert not made_with_this or rows["qwen3_moe"] == row
