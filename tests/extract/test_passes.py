"""The functions in memory: what those of a batch compute, whatever the batches and the order."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import (
    FAMILIES,
    LAYERS,
    new_model,
    prompts_that_begin_alike,
    tiny,
    tiny_checkpoint,
    tiny_prompts,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

from dlk_utils.errors import (
    ChoiceError,
    DataError,
    DeadDropout,
    ParameterError,
    UnknownArchitecture,
)
from dlk_utils.evaluation.stats import auroc
from dlk_utils.extract import passes
from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.draws import draw_states
from dlk_utils.extract.dropout import draw_seed
from dlk_utils.extract.gradients import full_backprop
from dlk_utils.extract.passes import (
    activations,
    answer_logprobs,
    dropout_draws,
    margin_gradients,
)
from dlk_utils.extract.stages import store_draws
from dlk_utils.extract.store import read_rows
from dlk_utils.models.loading import load_model
from dlk_utils.models.sites import SITES
from dlk_utils.probes import Logistic

FIVE = ["llama", "gpt2", "gpt_neox", "qwen2", "opt"]
SINGLE_PRECISION = {"rtol": 1e-5, "atol": 5e-6}
QUIET = {"progress": False}


def assert_close(found: np.ndarray, expected) -> None:
    np.testing.assert_allclose(found, expected, **SINGLE_PRECISION)


# What they return


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_activations_are_the_hidden_states_of_transformers(family):
    model, prompts = tiny(family), list(tiny_prompts().input_ids)
    states = activations(model, prompts, **QUIET)["resid_post"]
    assert states.dtype == np.float32
    assert states.shape == (LAYERS, len(prompts), model.config.hidden_size)
    for i, ids in enumerate(prompts):
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        # transformers applies the final norm to the last one.
        for layer in range(LAYERS - 1):
            assert_close(states[layer, i], hidden[layer + 1][0, -1])


@pytest.mark.parametrize("family", FIVE)
def test_the_last_few_tokens_are_those_of_each_prompt(family):
    model, rows = tiny(family), tiny_prompts()
    prompts = [ids for ids in rows.input_ids if len(ids) >= 3]
    few = activations(model, prompts, sites=["mlp_out"], positions=3, **QUIET)["mlp_out"]
    assert few.shape == (LAYERS, len(prompts), 3, model.config.hidden_size)
    for back in range(3):
        shorter = [ids[: len(ids) - back] for ids in prompts]
        alone = activations(model, shorter, sites=["mlp_out"], **QUIET)["mlp_out"]
        assert_close(few[:, :, 2 - back], alone)


@pytest.mark.slow
@pytest.mark.parametrize("family", FIVE)
@pytest.mark.parametrize("scope", ["sequence", "last_token"])
def test_dropout_draws_are_those_of_each_prompt_alone(family, scope):
    model, rows = tiny(family), tiny_prompts()
    options = {"p": 0.2, "scope": scope, "places": ["mlp_out"]}
    keys = list(rows.row_id)
    draws = dropout_draws(
        model, list(rows.input_ids), n_draws=3, seed=5, keys=keys, **options, **QUIET
    )["resid_post"]
    assert draws.shape == (3, LAYERS, len(rows), model.config.hidden_size)
    for i, ids in enumerate(rows.input_ids):
        seeds = [[draw_seed(keys[i], k, 5)] for k in range(3)]
        alone = draw_states(model, [ids], ["resid_post"], seeds=seeds, **options)
        for k, (states, _) in enumerate(alone):
            assert_close(draws[k, :, i], states["resid_post"][:, 0])


@pytest.mark.parametrize("family", FIVE)
def test_margin_gradients_are_those_of_full_backprop(family):
    model, rows = tiny(family), tiny_prompts()
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    gradients = margin_gradients(model, prompts, choices, sites=SITES, layers=[0, 2], **QUIET)
    expected = full_backprop(model, pad(prompts), choices, SITES, [0, 2])
    for site in SITES:
        assert gradients[site].shape[:2] == (2, len(prompts))
        assert_close(gradients[site], expected[site])


@pytest.mark.parametrize("family", FIVE)
@pytest.mark.parametrize("make_prompts", [tiny_prompts, prompts_that_begin_alike])
def test_answers_are_those_of_each_prompt_alone(family, make_prompts):
    model, rows = tiny(family), make_prompts()
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    logprobs, top_token = answer_logprobs(model, prompts, choices, **QUIET)
    logits = torch.cat([last_logits(model, pad([ids])) for ids in prompts])
    assert_close(logprobs, choice_logprobs(logits, choices))
    assert top_token.tolist() == logits.argmax(-1).tolist()


def test_a_pair_for_all_prompts_is_that_pair_for_each():
    model, prompts = tiny("llama"), list(tiny_prompts().input_ids)
    for pair in ([[3], [7, 9]], ([3], [7, 9]), (np.array([3]), np.array([7, 9]))):
        one, _ = answer_logprobs(model, prompts, pair, **QUIET)
        each, _ = answer_logprobs(model, prompts, [([3], [7, 9])] * len(prompts), **QUIET)
        assert (one == each).all()


def test_arrays_are_in_single_precision_whatever_the_model_computes_in():
    for dtype in (torch.bfloat16, torch.float64):
        model, prompts = tiny("llama", dtype), list(tiny_prompts().input_ids)
        assert activations(model, prompts, **QUIET)["resid_post"].dtype == np.float32
        assert answer_logprobs(model, prompts, ([3], [4]), **QUIET)[0].dtype == np.float32


# What does not matter


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mpt", "gemma3_text window"])
def test_order_batches_and_shared_beginnings_do_not_matter(family):
    model, rows = tiny(family), prompts_that_begin_alike(12)
    rows.loc[::3, "input_ids"] = tiny_prompts(12).input_ids[::3]
    order = np.random.default_rng(0).permutation(len(rows))
    results = []
    for table, batch_tokens in ((rows, 2048), (rows, 30), (rows.iloc[order], 100)):
        prompts, choices = list(table.input_ids), list(table.choice_ids)
        options = {"batch_tokens": batch_tokens, "progress": False}
        results.append(
            [
                activations(model, prompts, sites=["head_out"], **options)["head_out"],
                activations(model, prompts, positions=2, **options)["resid_post"].swapaxes(2, 0),
                dropout_draws(model, prompts, p=0.2, **options)["resid_post"][0],
                margin_gradients(model, prompts, choices, **options)["resid_post"],
                answer_logprobs(model, prompts, choices, **options)[0][None],
            ]
        )
    in_one_batch, in_many, in_other_order = results
    for one, many, other in zip(in_one_batch, in_many, in_other_order, strict=True):
        assert_close(many, one)
        assert_close(other, one[:, order])


def test_a_batch_that_does_not_fit_into_memory_changes_nothing(monkeypatch):
    model, prompts = tiny("llama"), list(tiny_prompts(20).input_ids)
    expected = activations(model, prompts, **QUIET)["resid_post"]
    real, sizes = passes.clean_states, []

    def short_of_memory(model, prompts, *args, **options):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("planted")
        return real(model, prompts, *args, **options)

    monkeypatch.setattr(passes, "clean_states", short_of_memory)
    assert_close(activations(model, prompts, **QUIET)["resid_post"], expected)
    assert max(sizes) > 3


def test_identical_prompts_get_identical_masks_unless_their_keys_differ():
    model, prompts = tiny("llama"), [[5, 6, 7], [5, 6, 7]]
    options = {"p": 0.2, **QUIET}
    by_tokens = dropout_draws(model, prompts, **options)["resid_post"]
    assert_close(by_tokens[:, :, 0], by_tokens[:, :, 1])
    assert (by_tokens[0] != by_tokens[1]).any()
    by_key = dropout_draws(model, prompts, keys=["a", "b"], **options)["resid_post"]
    assert not np.allclose(by_key[:, :, 0], by_key[:, :, 1])
    other_seed = dropout_draws(model, prompts, seed=1, **options)["resid_post"]
    assert not np.allclose(by_tokens, other_seed)


def test_draws_with_the_rows_ids_as_keys_are_those_of_the_store(tmp_path):
    model, rows = tiny("llama"), tiny_prompts()
    store_draws(model, rows, tmp_path, p=0.1, seed=3)
    options = {"p": 0.1, "seed": 3, "keys": list(rows.row_id), **QUIET}
    draws = dropout_draws(model, list(rows.input_ids), **options)["resid_post"]
    for k in (0, 1):
        assert_close(draws[k, 1], read_rows(tmp_path, rows, f"activation.resid_post.1.{k}"))


def test_prompts_of_one_token_work_where_nothing_needs_two():
    model, prompts = tiny("gpt2"), [[5], [6, 7, 8], [9]]
    states = activations(model, prompts, **QUIET)["resid_post"]
    draws = dropout_draws(model, prompts, p=0.2, **QUIET)["resid_post"]
    logprobs, _ = answer_logprobs(model, prompts, ([3], [4]), **QUIET)
    alone = activations(model, [[5]], **QUIET)["resid_post"]
    assert_close(states[:, :1], alone)
    assert np.isfinite(draws).all() and np.isfinite(logprobs).all()


def test_a_model_s_sites_are_checked_once(monkeypatch):
    checked = []
    monkeypatch.setattr(passes, "check_sites", checked.append)
    model, prompts = new_model("llama"), [[5, 6, 7]]
    activations(model, prompts, **QUIET)
    answer_logprobs(model, prompts, ([3], [4]), **QUIET)
    assert checked == [model]


def test_the_progress_bar_can_be_switched_off(capsys):
    model, prompts = tiny("llama"), [[5, 6, 7]]
    activations(model, prompts, progress=False)
    assert capsys.readouterr() == ("", "")


# What is refused


def test_prompts_that_cannot_be_run_are_refused():
    model = tiny("llama")
    with pytest.raises(DataError, match="at least one prompt, got none"):
        activations(model, [])
    with pytest.raises(DataError, match="at least 1 tokens in each prompt, got 0 in prompt 1"):
        activations(model, [[5], []])
    with pytest.raises(DataError, match="at least 3 tokens in each prompt, got 2 in prompt 1"):
        activations(model, [[5, 6, 7], [5, 6]], positions=3)
    with pytest.raises(DataError, match="at least 2 tokens in each prompt, got 1 in prompt 0"):
        margin_gradients(model, [[5], [6, 7]], ([3], [4]))
    with pytest.raises(DataError, match="at least 2 tokens in each prompt, got 1 in prompt 0"):
        dropout_draws(model, [[5], [6, 7]], scope="last_token")
    message = "ids from 0 to 96, for which the model has embeddings, got 5 to 97 in prompt 1"
    with pytest.raises(DataError, match=message):
        answer_logprobs(model, [[5, 6], [5, 97]], ([3], [4]))


@pytest.mark.parametrize(
    ("choice_ids", "message"),
    [
        (([3], [3, 4]), r"without a token in common, got \(\[3\], \[3, 4\]\) for prompt 0"),
        (([3], []), "without a token in common"),
        ((3, 4), "without a token in common, got 3 for prompt 0"),
        ([([3], [4])] * 3, r"one pair, or one per prompt \(2\), got 3"),
        ([([3], [4]), ([3], [4], [5])], "for prompt 1"),
    ],
)
def test_choices_that_are_not_pairs_of_different_tokens_are_refused(choice_ids, message):
    with pytest.raises(ChoiceError, match=message):
        answer_logprobs(tiny("llama"), [[5, 6], [7, 8]], choice_ids)


@pytest.mark.trap(19)
def test_a_model_in_training_mode_is_refused():
    model = new_model("gpt2").train()
    with pytest.raises(ValueError, match="evaluation mode"):
        activations(model, [[5, 6, 7]])


def test_an_unknown_family_is_refused_by_its_name():
    model = new_model("opt", do_layer_norm_before=False)
    model.config.model_type = "opt of the future"
    with pytest.raises(UnknownArchitecture, match="opt of the future"):
        activations(model, [[5, 6, 7]])


def test_draws_that_cannot_be_made_are_refused():
    model, prompts = tiny("llama"), [[5, 6, 7], [8, 9]]
    with pytest.raises(ValueError, match="n_draws: expected a whole number of at least 1, got 0"):
        dropout_draws(model, prompts, n_draws=0)
    with pytest.raises(DataError, match=r"keys: expected one per prompt \(2\), got 1"):
        dropout_draws(model, prompts, keys=["a"])
    with pytest.raises(DeadDropout, match="cannot be laid on in this family"):
        dropout_draws(tiny("falcon"), prompts, places="attention", **QUIET)


def test_a_value_that_overflows_is_refused(monkeypatch):
    real = passes.clean_states

    def overflowing(*args, **options):
        states, logits = real(*args, **options)
        return {site: x * float("inf") for site, x in states.items()}, logits

    monkeypatch.setattr(passes, "clean_states", overflowing)
    with pytest.raises(
        DataError,
        match=r"states: resid_post: expected finite numbers, got nan or inf in torch.float64",
    ):
        activations(tiny("llama"), [[5, 6, 7]], **QUIET)


# The script of the README


@pytest.mark.parametrize("family", FIVE)
@pytest.mark.parametrize("loader", ["transformers", "load_model"])
def test_ten_lines_on_a_checkpoint_that_no_run_has_ever_seen(
    family, loader, tmp_path, monkeypatch, capsys
):
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", family)
    saved = sorted(checkpoint.iterdir())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if loader == "load_model":
        model, tokenizer = load_model(str(checkpoint), dtype="float32", device="cpu")
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    texts = [f"{i} is {'even' if i % 2 == 0 else 'odd'}" for i in range(24)]
    y = np.array([i % 2 for i in range(24)])
    train, test = np.arange(16), np.arange(16, 24)
    choice_ids = ([5, 6], [7])
    ids = tokenizer(texts).input_ids
    X = activations(model, ids, sites=["resid_post"], layers="all")["resid_post"]
    pairs = dropout_draws(model, ids, n_draws=2, p=0.1)["resid_post"]
    g = margin_gradients(model, ids, choice_ids, sites=["resid_post"])["resid_post"]
    probe = Logistic().fit(X[2][train], y[train])
    score = auroc(probe.decision_function(X[2][test]), y[test])

    assert X.shape == g.shape == (LAYERS, 24, 36) and pairs.shape == (2, LAYERS, 24, 36)
    assert 0 <= score <= 1
    assert not list((tmp_path / "empty").iterdir()) and sorted(checkpoint.iterdir()) == saved
    assert "prompt/s" in capsys.readouterr().err


def unwrapped(monkeypatch, function):
    """A function of `passes` without the type checks of the tests, which would answer first."""
    for name in ("_checked", "_in_batches", "check_model"):
        monkeypatch.setattr(passes, name, inspect.unwrap(getattr(passes, name)))
    return inspect.unwrap(function)


@pytest.mark.parametrize(
    "input_ids", [[[5.9, 7.9]], torch.ones(2, 3), ["some text"], [1, 2, 3], None, {"text": [1]}]
)
def test_what_is_no_list_of_token_ids_is_refused(monkeypatch, input_ids):
    with pytest.raises(DataError, match="expected a list of prompts, each a list of whole numbers"):
        unwrapped(monkeypatch, activations)(tiny("llama"), input_ids, **QUIET)


def test_what_a_tokenizer_returns_is_taken_without_its_padding():
    encoding = BatchEncoding(
        {"input_ids": [[0, 5, 6, 7], [8, 9, 10, 11]], "attention_mask": [[0, 1, 1, 1], [1] * 4]}
    )
    expected = activations(tiny("llama"), [[5, 6, 7], [8, 9, 10, 11]], **QUIET)["resid_post"]
    for taken in (encoding, encoding.convert_to_tensors("pt")):
        found = activations(tiny("llama"), taken, **QUIET)["resid_post"]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("mask", "got"),
    [([[1, 1], [1]], "got 1 for 2 token ids in prompt 1"), ([[1, 1]], "got 1 masks for 2 prompts")],
)
def test_a_mask_of_another_shape_is_refused(mask, got):
    encoding = {"input_ids": [[5, 6], [7, 8]], "attention_mask": mask}
    with pytest.raises(DataError, match=f"attention_mask: expected as many values .*{got}"):
        activations(tiny("llama"), encoding, **QUIET)


def test_starts_of_questions_go_by_their_order_whatever_the_labels_of_a_column():
    prompts, options = [[5, 6, 7, 8], [9, 10, 11, 12, 13]], {"scope": "question", "p": 0.5, **QUIET}
    expected = dropout_draws(tiny("llama"), prompts, question_starts=[1, 4], **options)
    column = pd.Series([1, 4], index=[1, 0])
    found = dropout_draws(tiny("llama"), prompts, question_starts=column, **options)
    np.testing.assert_array_equal(found["resid_post"], expected["resid_post"])
    with pytest.raises(ParameterError, match=r"question_starts: expected one per prompt \(2\)"):
        dropout_draws(tiny("llama"), prompts, question_starts=[1, 4, 2], **options)


def test_swapped_arguments_and_draws_that_are_no_number_are_refused(monkeypatch):
    with pytest.raises(ParameterError, match="the model comes first"):
        unwrapped(monkeypatch, activations)([[5, 6]], tiny("llama"), **QUIET)
    with pytest.raises(ParameterError, match="n_draws: expected a whole number"):
        unwrapped(monkeypatch, dropout_draws)(tiny("llama"), [[5, 6]], n_draws="2", **QUIET)
