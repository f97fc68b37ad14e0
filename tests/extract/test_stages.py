"""The stages: what they store is what the functions of a batch compute, under its own name."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    FAMILIES,
    LAYERS,
    byte_tokenizer,
    new_model,
    prompts_that_begin_alike,
    tiny,
    tiny_prompts,
)

from dlk_utils.errors import ChoiceError, DataError, DeadDropout, StoreError
from dlk_utils.extract import draws, store
from dlk_utils.extract.answers import choice_logprobs, sequence_logprobs
from dlk_utils.extract.batches import forward, last_logits, pad
from dlk_utils.extract.gradients import counterfactual_states, full_backprop
from dlk_utils.extract.packing import plan_packed
from dlk_utils.extract.passes import dropout_draws
from dlk_utils.extract.stages import (
    fill_rows,
    store_answers,
    store_draws,
    store_gradients,
    store_states,
    store_weight_gradients,
)
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import describe, is_complete, read_rows
from dlk_utils.lab.tables.dropout_pairs import move_table, spread_table
from dlk_utils.models.sites import SITES, blocks
from dlk_utils.provenance import code_hash
from dlk_utils.questions.ids import example_id
from dlk_utils.questions.prompts import make_prompts
from dlk_utils.questions.templates import prompt_library, read_templates

STAGES = [
    (store_draws, {}),
    (store_gradients, {}),
    (store_gradients, {"contrast": True}),
    (store_gradients, {"moved_at": 1}),
    (store_states, {}),
    (store_weight_gradients, {}),
]
SINGLE_PRECISION = {"rtol": 1e-5, "atol": 1e-6}


# Answers


def test_choices_that_share_their_first_token_are_told_apart_by_the_rest(tmp_path):
    model, rows = tiny("llama"), prompts_that_begin_alike(4)
    choice_tokens = [[[[7, 9]], [[7, 2]]], None, None, None]
    store_answers(model, rows.assign(choice_tokens=choice_tokens), tmp_path)
    stored = read_rows(tmp_path, rows, "choice_logprobs")
    expected = torch.stack(sequence_logprobs(model, rows.input_ids[0], [[7, 9], [7, 2]]))
    np.testing.assert_allclose(stored[0], expected, rtol=1e-5)
    assert stored[0][0] != stored[0][1]
    by_first_token = choice_logprobs(last_logits(model, pad(rows.input_ids)), list(rows.choice_ids))
    np.testing.assert_allclose(stored[1:], by_first_token[1:], rtol=1e-5)


WHOLE = """dataset: mine
templates:
  1: !Template
    name: opinion
    answer_choices: They hated it ||| They loved it
    jinja: "{{ text }} What did they think? ||| {{ answer_choices[label] }}"
    scoring: whole
"""


@pytest.fixture
def whole_rows(tmp_path, monkeypatch) -> pd.DataFrame:
    """Prompts of a template file whose choices begin with the same word."""
    path = tmp_path / "mine.yaml"
    path.write_text(WHOLE)
    mine = read_templates(path)

    def library(name: str) -> pd.DataFrame:
        return prompt_library(name) if name.endswith("instructions") else mine

    monkeypatch.setattr("dlk_utils.questions.prompts.prompt_library", library)
    texts = ["A bore.", "A joy."]
    examples = pd.DataFrame({"text": texts, "label": [0, 1], "choice_0": "", "choice_1": ""})
    examples["example_id"] = [example_id(text) for text in texts]
    examples = examples.assign(dataset="own", kind="review", split="test")
    return make_prompts(examples, byte_tokenizer(), context=10**4)


def a_model_of_bytes():
    return new_model("llama", vocab_size=len(byte_tokenizer()), max_position_embeddings=2048)


@torch.no_grad()
def logprob_token_by_token(model, prompt: list[int], text: str) -> float:
    ids, total = list(prompt), 0.0
    for token in byte_tokenizer()(text, add_special_tokens=False).input_ids:
        total += float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
        ids.append(token)
    return total


@pytest.mark.slow
def test_a_template_scored_whole_gets_the_probability_of_all_its_tokens_from_the_file_to_the_store(
    whole_rows, tmp_path
):
    model, rows = a_model_of_bytes(), whole_rows
    assert len(rows) == 8 and rows.choice_tokens.map(len).eq(2).all()
    store_answers(model, rows, tmp_path / "answers")
    logprobs = read_rows(tmp_path / "answers", rows, "choice_logprobs")
    strict = read_rows(tmp_path / "answers", rows, "strict_logprobs")
    for i, row in enumerate(rows.head(2).itertuples()):
        for k, choice in enumerate(row.choices):
            as_written, lower_case = (
                logprob_token_by_token(model, row.input_ids, f" {spelling}")
                for spelling in (choice, choice.lower())
            )
            assert strict[i, k] == pytest.approx(as_written, rel=1e-4)
            both = float(np.logaddexp(as_written, lower_case))
            assert logprobs[i, k] == pytest.approx(both, rel=1e-4)
    assert (logprobs[:, 0] != logprobs[:, 1]).all()


def test_both_choices_that_are_scored_whole_share_one_pass_over_the_prompt(
    whole_rows, tmp_path, monkeypatch
):
    prompts = []

    def counted(model, prompt, sequences):
        prompts.append(list(prompt))
        return sequence_logprobs(model, prompt, sequences)

    monkeypatch.setattr("dlk_utils.extract.answers.sequence_logprobs", counted)
    rows = whole_rows.head(2)
    store_answers(a_model_of_bytes(), rows, tmp_path / "answers")
    assert sorted(prompts) == sorted(map(list, rows.input_ids))


@pytest.mark.trap(1)
@pytest.mark.parametrize(("stage", "options"), STAGES)
def test_choices_scored_whole_have_no_draws_and_no_gradients_and_the_template_is_named(
    whole_rows, tmp_path, stage, options
):
    fine = whole_rows.head(1).assign(choice_tokens=None, template="fine", row_id="fine")
    rows = pd.concat([fine, whole_rows])
    with pytest.raises(ChoiceError, match=r"8 of 9 rows .*templates: opinion\)"):
        stage(a_model_of_bytes(), rows, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", [move_table, spread_table])
def test_tables_of_draws_refuse_choices_scored_whole(whole_rows, table):
    with pytest.raises(ChoiceError, match="dropout draws"):
        table(a_model_of_bytes(), whole_rows)


# States


@pytest.mark.parametrize("family", ["llama", "mpt", "mistral window"])
def test_stored_states_and_answers_are_those_of_the_plain_pass(family, tmp_path):
    model, rows = tiny(family), prompts_that_begin_alike()
    store_states(model, rows, tmp_path, sites=["resid_post", "head_out"], layers=[0, 2])
    sites = ["resid_post", "head_out"]
    states, logits = forward_states(model, pad(rows.input_ids), sites)
    for site in sites:
        for layer in (0, 2):
            stored = read_rows(tmp_path, rows, f"activation.{site}.{layer}.0")
            np.testing.assert_allclose(stored, states[site][layer], **SINGLE_PRECISION)
    stored = read_rows(tmp_path, rows, "choice_logprobs")
    expected = choice_logprobs(logits, list(rows.choice_ids))
    np.testing.assert_allclose(stored, expected, rtol=1e-5)


# Draws


@pytest.mark.parametrize(("n_draws", "p"), [(1, 0.1), (2, 0.0)])
def test_one_draw_and_draws_without_dropout_are_refused(tmp_path, n_draws, p):
    with pytest.raises(ValueError, match=r"n_draws: expected at least 2|dropout p: expected"):
        store_draws(tiny("llama"), tiny_prompts(), tmp_path, n_draws=n_draws, p=p)


@pytest.mark.trap(20)
def test_two_draws_with_one_mask_are_refused_with_the_row(tmp_path, monkeypatch):
    monkeypatch.setattr(draws, "draw_seed", lambda key, draw, seed: 7)
    with pytest.raises(DeadDropout, match=r"two equal draws \(first: row"):
        store_draws(tiny("llama"), tiny_prompts(), tmp_path)
    assert not is_complete(tmp_path)


@pytest.mark.trap(20)
def test_the_states_of_one_draw_stored_for_both_are_refused_though_the_answers_differ(
    tmp_path, monkeypatch
):
    real = draws.draw_states

    def planted(*args, **options):
        (states, logits), (_, other_logits) = real(*args, **options)
        return [(states, logits), (states, other_logits)]

    monkeypatch.setattr(draws, "draw_states", planted)
    with pytest.raises(DeadDropout, match="two equal draws"):
        store_draws(tiny("llama"), tiny_prompts(), tmp_path, p=0.1)


def test_a_site_that_comes_before_anything_dropped_is_no_dead_dropout(tmp_path):
    model, rows = tiny("llama"), tiny_prompts()
    store_draws(model, rows, tmp_path, sites=["head_out"], layers=[0], p=0.3)
    one, other = (read_rows(tmp_path, rows, f"choice_logprobs.{k}") for k in (0, 1))
    assert (one != other).any(1).all()


def test_a_store_of_many_draws_of_the_last_token_at_some_layers(tmp_path):
    model, rows = tiny("llama", torch.float32), tiny_prompts()
    options = {"n_draws": 4, "p": 0.1, "scope": "last_token"}
    store_draws(model, rows, tmp_path, layers="::2", sites=["resid_post", "head_out"], **options)
    assert describe(tmp_path)["tensors"] == 4 * (2 * 2 + 1)


def test_a_store_of_the_last_few_tokens_holds_each_of_them(tmp_path):
    model, rows = tiny("llama", torch.float32), tiny_prompts()
    rows = rows[rows.input_ids.map(len) >= 3]
    for n in (1, 3):
        store_draws(model, rows, tmp_path / str(n), positions=n, p=0.1)
    one, few = (read_rows(tmp_path / str(n), rows, "activation.resid_post.1.0") for n in (1, 3))
    assert few.shape == (len(rows), 3, 36)
    assert (few[:, -1] == one).all() and (few[:, 0] != one).any(1).all()


# Gradients and what is made of them


@pytest.mark.trap(24)
def test_a_stored_gradient_is_that_of_the_site_and_layer_in_its_name(tmp_path):
    model, rows = tiny("llama"), tiny_prompts()
    store_gradients(model, rows, tmp_path, layers=[0, 2])
    full = full_backprop(model, pad(rows.input_ids), list(rows.choice_ids), SITES)
    for site in SITES:
        for layer in (0, 2):
            stored = read_rows(tmp_path, rows, f"gradient.{site}.{layer}.0")
            np.testing.assert_allclose(stored, full[site][layer], rtol=1e-5, atol=1e-8)


@pytest.mark.trap(22, 25)
def test_features_are_the_same_bits_whatever_the_labels_and_no_weight_is_touched(tmp_path):
    model, rows = tiny("llama", torch.float32), tiny_prompts()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for name, table in (("as it is", rows), ("turned", rows.assign(label=1 - rows.label))):
        store_draws(model, table, tmp_path / name / "draws", p=0.1)
        store_gradients(model, table, tmp_path / name / "gradients")
    for stage in ("draws", "gradients"):
        shards = sorted((tmp_path / "as it is" / stage).glob("shard-*.safetensors"))
        turned = sorted((tmp_path / "turned" / stage).glob("shard-*.safetensors"))
        assert shards
        assert [path.read_bytes() for path in shards] == [path.read_bytes() for path in turned]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3_text window", "mpt"])
def test_contrast_pairs_are_stored_beside_everything_else_which_stays_as_it_is(family, tmp_path):
    model, rows = tiny(family), prompts_that_begin_alike()
    store_gradients(model, rows, tmp_path / "with", contrast=True, batch_tokens=64)
    store_gradients(model, rows, tmp_path / "without", batch_tokens=64)
    for k in (0, 1):
        pairs = zip(rows.input_ids, rows.strict_ids, strict=True)
        longer = [[*ids, choices[k][0]] for ids, choices in pairs]
        expected, _ = forward_states(model, pad(longer), ["resid_post"])
        for layer in range(LAYERS):
            stored = read_rows(tmp_path / "with", rows, f"after_choice.resid_post.{layer}.{k}")
            np.testing.assert_allclose(stored, expected["resid_post"][layer], **SINGLE_PRECISION)
    for name in ("activation.head_out.1.0", "gradient.mlp_out.2.0", "choice_logprobs"):
        stored, other = (read_rows(tmp_path / which, rows, name) for which in ("with", "without"))
        np.testing.assert_array_equal(stored, other)


def test_choices_that_begin_with_the_same_token_have_no_contrast_pair(tmp_path):
    rows = tiny_prompts().assign(strict_ids=[[[1, 2], [1, 3]]] * 7)
    with pytest.raises(ChoiceError, match="differ in their first token"):
        store_gradients(tiny("llama"), rows, tmp_path, contrast=True)


@pytest.mark.parametrize("family", ["llama", "mpt", "gemma3_text window"])
def test_the_second_pass_of_a_counterfactual_pair_is_stored_from_the_layer_of_the_move_on(
    family, tmp_path
):
    model, rows = tiny(family), prompts_that_begin_alike()
    store_gradients(model, rows, tmp_path, moved_at=1, step=0.2)
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    states, logprobs = counterfactual_states(
        model, prompts, choices, ["resid_post"], layer=1, step=0.2
    )
    stored = read_rows(tmp_path, rows, "choice_logprobs.1")
    np.testing.assert_allclose(stored, logprobs, rtol=1e-5)
    for layer in (1, 2):
        stored = read_rows(tmp_path, rows, f"activation.resid_post.{layer}.1")
        np.testing.assert_allclose(stored, states["resid_post"][layer], rtol=1e-4, atol=2e-6)
    assert describe(tmp_path)["tensors"] == 2 * len(SITES) * LAYERS + 3 + 2 + 1


def test_a_counterfactual_pass_leaves_the_other_tensors_as_they_are(tmp_path):
    model, rows = tiny("llama"), prompts_that_begin_alike()
    store_gradients(model, rows, tmp_path / "with", moved_at=1, contrast=True)
    store_gradients(model, rows, tmp_path / "without")
    for name in ("activation.head_out.1.0", "gradient.mlp_out.2.0", "choice_logprobs"):
        stored, other = (read_rows(tmp_path / which, rows, name) for which in ("with", "without"))
        np.testing.assert_array_equal(stored, other)


LAST_LINEAR = {
    "gpt2": "mlp.c_proj",
    "gpt_bigcode": "mlp.c_proj",
    "starcoder2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
    "phi": "mlp.fc2",
    "opt": "fc2",
    "mpt": "ffn.down_proj",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_weight_gradients_are_those_of_the_last_linear_layer_of_the_mlp(family, tmp_path):
    model, rows = tiny(family), tiny_prompts(2)
    store_weight_gradients(model, rows, tmp_path, layers=[0, 2])
    stored = read_rows(tmp_path, rows, "weight_gradient.mlp_out.2.0")
    path = LAST_LINEAR.get(model.config.model_type, "mlp.down_proj")
    weight = blocks(model)[2].get_submodule(path).weight
    for i, row in enumerate(rows.itertuples()):
        logits = forward(model, pad([row.input_ids]), use_cache=False).logits[:, -1]
        margin = torch.diff(choice_logprobs(logits, [row.choice_ids])).sum()
        [full] = torch.autograd.grad(margin, [weight])
        # GPT-2's layers hold [in, out].
        full = full.mT if family == "gpt2" else full
        expected = torch.cat([full.mean(1), full.mean(0)])
        atol = 1e-6 * float(full.abs().max())
        np.testing.assert_allclose(stored[i], expected, rtol=1e-4, atol=atol)


# What a store goes by


def test_a_store_goes_by_the_code_of_the_stage_and_by_the_libraries(tmp_path):
    store_gradients(tiny("llama"), tiny_prompts(), tmp_path)
    parts = json.loads((tmp_path / "manifest.json").read_text())["parts"]
    assert parts["code"] == code_hash(store_gradients)
    assert {"torch", "transformers", "numpy"} <= set(parts["versions"])


@pytest.mark.trap(31)
@pytest.mark.parametrize(
    ("name", "planted", "part"),
    [
        ("code_hash", lambda function: "of other code", "code"),
        ("library_versions", lambda: {"torch": "0.1"}, "versions"),
    ],
)
def test_what_other_code_or_another_library_made_is_refused(
    tmp_path, monkeypatch, name, planted, part
):
    model, rows = tiny("llama"), tiny_prompts()
    store_gradients(model, rows, tmp_path)
    monkeypatch.setattr(store, name, planted)
    with pytest.raises(StoreError, match=rf"which differs in parts \({part}\); delete the"):
        store_gradients(model, rows, tmp_path)


def test_two_stages_do_not_share_a_store(tmp_path):
    model, rows = tiny("llama"), tiny_prompts()
    store_answers(model, rows, tmp_path)
    with pytest.raises(StoreError, match=r"which differs in parts .*stage"):
        store_gradients(model, rows, tmp_path)


@pytest.mark.parametrize("batch_tokens", [100, 2048])
@pytest.mark.parametrize("family", ["llama", "mpt", "falcon alibi"])
def test_a_shard_has_its_rows_in_planned_order_also_where_batches_are_cut(
    family, batch_tokens, tmp_path
):
    """A model that takes no trees computes a batch in padded parts, in another order."""
    model, rows = tiny(family), prompts_that_begin_alike(30)
    number = {row_id: float(i) for i, row_id in enumerate(rows.row_id)}
    n_parts = 0

    def compute(some: pd.DataFrame) -> dict[str, torch.Tensor]:
        nonlocal n_parts
        n_parts += 1
        return {"number": torch.tensor([[number[row_id]] for row_id in some.row_id])}

    fill_rows(
        model, tmp_path, rows, compute, plan_packed, {}, desc="order", batch_tokens=batch_tokens
    )
    plan = plan_packed(rows, batch_tokens)
    n_batches = sum(map(len, plan))
    assert (n_parts > n_batches) == (family != "llama" and batch_tokens == 100)
    shards = sorted(tmp_path.glob("shard-*.safetensors"))
    for path, batches in zip(shards, plan, strict=True):
        planned = [number[row_id] for batch in batches for row_id in batch]
        assert load_file(path)["number"][:, 0].tolist() == planned
    assert read_rows(tmp_path, rows, "number")[:, 0].tolist() == list(range(30))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mpt", "falcon alibi", "mistral window"])
@pytest.mark.parametrize("batch_tokens", [32, 2048])
def test_what_is_stored_of_a_row_does_not_depend_on_the_batches(family, batch_tokens, tmp_path):
    model, rows = tiny(family), prompts_that_begin_alike(12)
    store_gradients(model, rows, tmp_path, batch_tokens=batch_tokens)
    full = full_backprop(model, pad(rows.input_ids), list(rows.choice_ids), ["resid_post"])
    stored = read_rows(tmp_path, rows, "gradient.resid_post.1.0")
    np.testing.assert_allclose(stored, full["resid_post"][1], rtol=1e-4, atol=1e-6)


def test_draws_of_the_question_are_stored_as_they_are_computed(tmp_path):
    model, rows = tiny("llama"), prompts_that_begin_alike()
    store_draws(model, rows, tmp_path, scope="question", p=0.2, seed=3)
    starts = list(rows.question_start)
    options = {"scope": "question", "p": 0.2, "seed": 3, "question_starts": starts}
    expected = dropout_draws(
        model, list(rows.input_ids), keys=list(rows.row_id), progress=False, **options
    )["resid_post"]
    for draw in (0, 1):
        stored = read_rows(tmp_path, rows, f"activation.resid_post.1.{draw}")
        np.testing.assert_allclose(stored, expected[draw, 1], **SINGLE_PRECISION)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_into_memory_loses_nothing(tmp_path):
    rows = tiny_prompts(30)

    def compute(some: pd.DataFrame) -> dict[str, torch.Tensor]:
        if len(some) > 4:
            raise torch.OutOfMemoryError("planted: more than four rows do not fit")
        return {"x": torch.tensor([[float(i) for i in ids[:2]] for ids in some.input_ids])}

    def one_batch(prompts: pd.DataFrame, batch_tokens: int) -> list[list[list[str]]]:
        return [[list(prompts.row_id)]]

    fill_rows(tiny("llama"), tmp_path, rows, compute, one_batch, {}, desc="halves")
    expected = [[float(i) for i in ids[:2]] for ids in rows.input_ids]
    assert read_rows(tmp_path, rows, "x").tolist() == expected


@pytest.mark.parametrize(("stage", "options"), [(store_answers, {}), *STAGES])
def test_a_table_without_rows_is_refused(tmp_path, stage, options):
    with pytest.raises(DataError, match="at least one prompt"):
        stage(tiny("llama"), tiny_prompts().head(0), tmp_path, **options)


@pytest.mark.parametrize("options", [{"layers": [0, 2]}, {"sites": ["mlp_out"]}])
def test_a_move_at_a_state_that_is_not_stored_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="moved_at: expected one of the layers"):
        store_gradients(tiny("llama"), tiny_prompts(), tmp_path, moved_at=1, **options)
