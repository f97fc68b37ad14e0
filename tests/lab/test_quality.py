import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from dlk_utils.lab.tables.dataset import balance, variety
from dlk_utils.lab.tables.lie_rate import continuations, first_words, forms, kept_and_dropped
from dlk_utils.questions.templates import prompt_library


def twins(template_of) -> pd.DataFrame:
    rows = [
        dict(
            dataset="d",
            role=a,
            asks=a,
            example_id=i,
            template=template_of(i, a),
            instruction=f"{a}{i % 3}",
            family=f"f{i % 3}",
            label=i % 2,
            split="train",
        )
        for i in range(30)
        for a in ("truth", "lie")
    ]
    return pd.DataFrame(rows)


@pytest.mark.trap(2)
def test_a_template_that_twins_share_says_nothing_and_one_of_its_own_for_lies_says_all():
    shared, own = variety(twins(lambda i, a: f"t{i % 4}")), variety(twins(lambda i, a: a))
    assert shared.loc[("d", "template"), "Cramér's V"] == pytest.approx(0) and own.loc[
        ("d", "template"), "Cramér's V"
    ] == pytest.approx(1)
    assert shared.loc[("d", "instruction"), "Cramér's V"] == pytest.approx(1) and shared.loc[
        ("d", "family"), "Cramér's V"
    ] == pytest.approx(0)


def test_entropy_is_greatest_when_all_are_used_alike():
    found = variety(twins(lambda i, a: f"t{i % 3}")).loc[("d", "template")]
    assert found["in the library"] == 0  # of templates that are not of the library
    named = variety(twins(lambda i, a: ["claim_true", "claim_wrong"][i % 2]))[
        "in the library"
    ].to_dict()
    assert (
        named[("d", "template")] == len(prompt_library("claim"))
        and named[("d", "instruction")]
        == prompt_library("instructions").asks.isin(["truth", "lie"]).sum()
    )
    assert found["used"] == 3 and found["of the most"] == pytest.approx(1)
    assert (
        variety(twins(lambda i, a: "t0" if i else "t1")).loc[("d", "template"), "of the most"] < 0.3
    )


def test_a_stratum_of_one_class_is_seen():
    table = balance(twins(lambda i, a: "even" if i % 2 == 0 else "odd")).set_index("template")
    assert table.label_1.to_dict() == {"even": 0.0, "odd": 1.0} and table.examples.sum() == 30


def test_every_rule_counts_what_it_left_out():
    examples = pd.DataFrame(
        dict(dataset="d", example_id=list("abcd"), split=["train", "test", "test", "shot"])
    )
    unknown = ["", "", "margin", "wrong elsewhere", "", ""]
    behaviour = pd.DataFrame(
        dict(
            dataset="d",
            role=["truth", "lie"] * 3,
            readable=[True, False, True, True, True, False],
            knows=[u == "" for u in unknown],
            unknown_by=unknown,
            mass=[0.9, 0.01, 0.9, 0.9, 0.9, 0.06],
        )
    )
    found = kept_and_dropped(
        examples,
        behaviour,
        {
            "duplicates": {"d": 7},
            "in_another": {"d": 2},
            "trained_on": {"d": 5},
            "too_long": ["a"],
            "control_tokens": ["b", "elsewhere"],
            "choices_alike": ["b"],
        },
    ).loc["d"]
    assert found.to_dict() == {
        "duplicates in the source": 7,
        "in a data set before it": 2,
        "an organism was trained on it": 5,
        "examples taken": 3,
        "too long": 1,
        "control tokens": 1,
        "choices begin alike in some template": 1,
        "scored rows": 6,
        "low mass": 1,
        "form of low mass": 1,
        "unknown: data set refused": 0,
        "unknown: wrong elsewhere": 1,
        "unknown: margin": 1,
        "kept as known": 2,
    }


def test_the_form_of_question_with_the_least_mass_comes_first_and_does_not_pass():
    answers = pd.DataFrame(
        dict(dataset="d", template=["a", "a", "b"], instruction="i", mass=[0.9, 0.7, 0.01])
    )
    assert (
        forms(answers).passes.to_dict() == {("d", "b", "i"): False, ("d", "a", "i"): True}
        and forms(answers)["mass"].iloc[0] == 0.01
    )


def test_the_words_it_really_says_are_listed_by_what_was_asked():
    answers = pd.DataFrame(
        dict(dataset="d", asks=["lie"] * 4, top_token=[" no", " no", " no", " yes"])
    )
    assert first_words(answers).loc[("d", "lie"), "says"] == "' no' 75%, ' yes' 25%"


def test_a_continuation_in_a_batch_is_what_the_prompt_gives_alone():
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
        .double()
        .eval()
    )
    prompts = pd.DataFrame({"input_ids": [[5, 9, 30], [7, 8, 9, 10, 11, 12]]})
    both = continuations(model, tokenizer, prompts, 8)
    assert both == [
        continuations(model, tokenizer, prompts.iloc[[i]], 8)[0] for i in (0, 1)
    ] and any(both)
