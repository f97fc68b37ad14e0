"""The quality report of notebooks 01 and 02, and what the model goes on to say."""

import pandas as pd
import pytest
from tiny_models import byte_tokenizer, new_model

from dlk_utils.lab.tables.dataset import balance, choice_readings, variety
from dlk_utils.lab.tables.lie_rate import (
    continue_prompts,
    first_words,
    forms,
    kept_and_dropped,
)
from dlk_utils.questions.templates import prompt_library


def twins(template_of) -> pd.DataFrame:
    """Prompt rows of 30 examples with two roles; `template_of(i, role)` names the template."""
    rows = [
        {
            "dataset": "d",
            "role": role,
            "asks": role,
            "example_id": i,
            "template": template_of(i, role),
            "instruction": f"{role}{i % 3}",
            "family": f"f{i % 3}",
            "label": i % 2,
            "split": "train",
        }
        for i in range(30)
        for role in ("truth", "lie")
    ]
    return pd.DataFrame(rows)


def variety_of(column: str, template_of) -> pd.Series:
    return variety(twins(template_of)).set_index("of").loc[column]


@pytest.mark.trap(2)
def test_a_template_that_twins_share_says_nothing_and_one_of_its_own_for_lies_says_all():
    def tells(column: str, template_of) -> float:
        return variety_of(column, template_of)["Cramér's V"]

    assert tells("template", lambda i, role: f"t{i % 4}") == pytest.approx(0)
    assert tells("template", lambda i, role: role) == pytest.approx(1)
    assert tells("instruction", lambda i, role: "t") == pytest.approx(1)
    assert tells("family", lambda i, role: "t") == pytest.approx(0)


def test_entropy_is_greatest_when_all_templates_are_used_equally_often():
    equal = variety_of("template", lambda i, role: f"t{i % 3}")
    assert equal["used"] == 3 and equal["of the most"] == pytest.approx(1)
    assert variety_of("template", lambda i, role: "t0" if i else "t1")["of the most"] < 0.3


def test_what_is_used_is_compared_with_the_library():
    def in_library(column: str, templates: list[str]) -> int:
        return variety_of(column, lambda i, role: templates[i % 2])["in the library"]

    claims = ["claim_true", "claim_wrong"]
    assert in_library("template", claims) == len(prompt_library("claim"))
    assert in_library("template", ["mine", "yours"]) == 0
    asks = prompt_library("instructions").asks
    assert in_library("instruction", claims) == asks.isin(["truth", "lie"]).sum()


def test_a_stratum_of_one_class_is_seen():
    table = balance(twins(lambda i, role: "even" if i % 2 == 0 else "odd")).set_index("template")
    assert table.label_1.to_dict() == {"even": 0.0, "odd": 1.0} and table.examples.sum() == 30


def test_the_tokens_that_count_as_a_choice_are_listed_with_the_reason():
    tokenizer = byte_tokenizer()
    n, y = (tokenizer(letter).input_ids[0] for letter in "ny")
    row = {"template": "t", "choices": ["no", "yes"], "choice_ids": [[n], [y]]}
    prompts = pd.DataFrame([row | {"choice_tokens": None}] * 2)
    [reading] = choice_readings(prompts, tokenizer).to_dict("records")
    assert reading["choice 0"] == "no" and reading["counts as 0"].startswith("'n' (")
    whole = pd.DataFrame([row | {"choice_tokens": [[[n, n]], [[y, y]]]}])
    [reading] = choice_readings(whole, tokenizer).to_dict("records")
    assert reading["counts as 1"] == "'yy' (all its tokens)"


def test_every_rule_counts_what_it_left_out():
    examples = pd.DataFrame(
        {"dataset": "d", "example_id": list("abcd"), "split": ["train", "test", "test", "shot"]}
    )
    unknown_by = ["", "", "margin", "wrong elsewhere", "", ""]
    behaviour = pd.DataFrame(
        {
            "dataset": "d",
            "role": ["truth", "lie"] * 3,
            "readable": [True, False, True, True, True, False],
            "knows": [rule == "" for rule in unknown_by],
            "unknown_by": unknown_by,
            "mass": [0.9, 0.01, 0.9, 0.9, 0.9, 0.06],
        }
    )
    dropped = {
        "duplicates": {"d": 7},
        "in_another": {"d": 2},
        "trained_on": {"d": 5},
        "too_long": ["a"],
        "control_tokens": ["b", "elsewhere"],
        "choices_alike": ["b"],
    }
    [row] = kept_and_dropped(examples, behaviour, dropped).to_dict("records")
    assert row == {
        "dataset": "d",
        "duplicates in the source": 7,
        "in a data set before it": 2,
        "an organism was trained on it": 5,
        "examples taken": 3,
        "too long": 1,
        "control tokens": 1,
        "choices begin alike in some template": 1,
        "scored rows": 6,
        "low choice mass": 1,
        "question form with low choice mass": 1,
        "not known: data set refused": 0,
        "not known: wrong in another prompt": 1,
        "not known: small margin in another prompt": 1,
        "kept as known": 2,
    }


def test_the_form_of_question_with_the_least_mass_comes_first_and_does_not_pass():
    answers = pd.DataFrame(
        {
            "dataset": "d",
            "template": ["a", "a", "b"],
            "instruction": "i",
            "mass": [0.9, 0.7, 0.01],
        }
    )
    table = forms(answers)
    assert list(table.template) == ["b", "a"] and list(table.passes) == [False, True]
    assert list(table["mass"]) == pytest.approx([0.01, 0.8])


def test_the_words_the_model_would_say_are_listed_by_what_was_asked():
    words = [" no", " no", " no", " yes"]
    answers = pd.DataFrame({"dataset": "d", "asks": ["lie"] * 4, "top_token": words})
    [row] = first_words(answers).itertuples()
    assert (row.dataset, row.asks, row.says) == ("d", "lie", "' no' 75%, ' yes' 25%")


def test_a_continuation_in_a_batch_is_what_the_prompt_gives_alone():
    tokenizer = byte_tokenizer()
    model = new_model("llama", vocab_size=len(tokenizer)).double()
    prompts = pd.DataFrame({"input_ids": [[5, 9, 30], [7, 8, 9, 10, 11, 12]]})
    together = continue_prompts(model, tokenizer, prompts, 8)
    alone = [continue_prompts(model, tokenizer, prompts.iloc[[i]], 8)[0] for i in (0, 1)]
    assert together == alone and any(together)
