import pandas as pd
import pytest
import torch
from conftest import CONFIGS, byte_tokenizer, prompts_that_begin_alike, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from dlk_utils.errors import ChoiceError
from dlk_utils.extract.answers import choice_logprobs, sequence_logprobs
from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.stages import (
    store_answers,
    store_counterfactual,
    store_draws,
    store_gradients,
    store_weight_gradients,
)
from dlk_utils.extract.store import read_rows
from dlk_utils.lab.tables.dropout_pairs import move_table, spread_table
from dlk_utils.questions.ids import example_id
from dlk_utils.questions.prompts import make_prompts
from dlk_utils.questions.templates import prompt_library, read_templates

WHOLE = """dataset: mine
templates:
  1: !Template
    name: opinion
    answer_choices: They hated it ||| They loved it
    jinja: "{{ text }} What did they think? ||| {{ answer_choices[label] }}"
    scoring: whole
"""


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
def test_the_log_probability_of_a_sequence_is_the_sum_over_its_tokens(family):
    model, prompt, sequences = tiny(family), [3, 8, 4, 6], [[5], [7, 9], [7, 2, 11]]
    found = sequence_logprobs(model, prompt, sequences)
    for s, logp in zip(sequences, found, strict=True):
        logits = model(torch.tensor([prompt + s])).logits[0].log_softmax(-1)
        expected = sum(logits[len(prompt) - 1 + k, token] for k, token in enumerate(s))
        assert float(logp) == pytest.approx(float(expected), rel=1e-5)


def test_choices_that_share_a_token_are_told_apart_by_the_rest(tmp_path):
    model, rows = tiny("llama"), prompts_that_begin_alike(4)
    whole = [[[7, 9], [7, 2]] if i == 0 else None for i in range(4)]
    rows = rows.assign(
        strict_ids=rows.choice_ids,
        choice_tokens=[[[list(s)] for s in w] if w else None for w in whole],
    )
    store_answers(model, rows, tmp_path / "a", record={})
    logp = read_rows(tmp_path / "a", rows, "choice_logprobs")
    expected = [float(x) for x in sequence_logprobs(model, rows.input_ids[0], whole[0])]
    assert list(logp[0]) == pytest.approx(expected, rel=1e-5) and logp[0][0] != logp[0][1]
    plain = choice_logprobs(last_logits(model, pad(rows.input_ids)), list(rows.choice_ids)).numpy()
    assert logp[1:] == pytest.approx(plain[1:], rel=1e-6)


@pytest.fixture
def whole_rows(tmp_path, monkeypatch) -> pd.DataFrame:
    """Prompts of a template file whose choices begin alike."""
    path = tmp_path / "mine.yaml"
    path.write_text(WHOLE)
    mine = read_templates(path)
    monkeypatch.setattr(
        "dlk_utils.questions.prompts.library",
        lambda name: prompt_library(name) if name.endswith("instructions") else mine,
    )
    examples = [
        dict(
            example_id=example_id(t),
            dataset="own",
            kind="review",
            text=t,
            choice_0="",
            choice_1="",
            label=i,
            split="test",
        )
        for i, t in enumerate(["A bore.", "A joy."])
    ]
    return make_prompts(pd.DataFrame(examples), byte_tokenizer(), context=10**4)


def a_model_of_bytes():
    kind, options = CONFIGS["llama"]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            kind, vocab_size=len(byte_tokenizer()), **options | {"max_position_embeddings": 2048}
        )
    ).eval()


@torch.no_grad()
def said_token_by_token(model, prompt: list[int], text: str) -> float:
    ids, total = list(prompt), 0.0
    for token in byte_tokenizer()(text, add_special_tokens=False).input_ids:
        total += float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
        ids.append(token)
    return total


def test_a_template_scored_whole_gets_the_probability_of_all_its_tokens_from_the_file_to_the_store(
    whole_rows, tmp_path
):
    model, rows = a_model_of_bytes(), whole_rows
    assert len(rows) == 8 and rows.choice_tokens.map(len).eq(2).all()
    store_answers(model, rows, tmp_path / "a", record={})
    logp, strict = (
        read_rows(tmp_path / "a", rows, name) for name in ("choice_logprobs", "strict_logprobs")
    )
    for i, row in enumerate(rows.head(3).itertuples()):
        for k, choice in enumerate(row.choices):
            spellings = [
                said_token_by_token(model, row.input_ids, f" {c}") for c in (choice, choice.lower())
            ]
            assert strict[i, k] == pytest.approx(spellings[0], rel=1e-4)
            assert logp[i, k] == pytest.approx(
                float(torch.tensor(spellings).logsumexp(0)), rel=1e-4
            )
    assert (logp[:, 0] != logp[:, 1]).all()


@pytest.mark.trap(1)
@pytest.mark.parametrize(
    "extract, options",
    [
        (store_draws, {}),
        (store_gradients, {}),
        (store_gradients, {"contrast": True}),
        (store_counterfactual, {"at": 1}),
        (store_weight_gradients, {}),
    ],
)
def test_choices_scored_whole_have_no_draws_and_no_gradients_and_the_template_is_named(
    whole_rows, tmp_path, extract, options
):
    plain = whole_rows.head(1).assign(choice_tokens=None, template="fine")
    with pytest.raises(
        ChoiceError, match=r"8 of 9 rows .*templates: opinion\).*choices begin differently"
    ):
        extract(
            a_model_of_bytes(),
            pd.concat([plain.assign(row_id="plain"), whole_rows]),
            tmp_path / "out",
            record={},
            **options,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", [move_table, spread_table])
def test_tables_of_draws_refuse_choices_scored_whole(whole_rows, table):
    with pytest.raises(ChoiceError, match="dropout draws"):
        table(a_model_of_bytes(), whole_rows)


def test_both_choices_that_are_scored_whole_share_one_pass_over_the_prompt(
    whole_rows, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        "dlk_utils.extract.answers.sequence_logprobs",
        lambda model, prompt, sequences: (
            seen.append(list(prompt)) or sequence_logprobs(model, prompt, sequences)
        ),
    )
    rows = whole_rows.head(2)
    store_answers(a_model_of_bytes(), rows, tmp_path / "a", record={})
    assert sorted(seen) == sorted(map(list, rows.input_ids))
