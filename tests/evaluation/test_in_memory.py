"""From questions to a table of results in memory: no run, no folder."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import CONFIGS, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from dlk_utils.evaluation.behaviour import answer_prompts, label_behaviour
from dlk_utils.evaluation.evaluate import evaluate
from dlk_utils.evaluation.tasks import LYING, make_task, memory_features, truth_rows
from dlk_utils.questions.ids import example_id
from dlk_utils.questions.prompts import make_prompts

N_EXAMPLES = 90
LAYERS = [0, 2]

pytestmark = pytest.mark.slow


def make_examples() -> pd.DataFrame:
    """Claims of which nothing tells whether they are true."""
    texts = [f"Box {i} holds item {i * 7 % 11}." for i in range(N_EXAMPLES)]
    return pd.DataFrame(
        {
            "example_id": [example_id(text) for text in texts],
            "dataset": "boxes",
            "kind": "claim",
            "text": texts,
            "choice_0": "",
            "choice_1": "",
            "label": np.arange(N_EXAMPLES) // 3 % 2,
            "split": [("train", "validation", "test")[i % 3] for i in range(N_EXAMPLES)],
        }
    )


def model_that_answers(prompts: pd.DataFrame, tokenizer) -> torch.nn.Module:
    """A tiny random model that nearly always gives one of the choices, and knows nothing."""
    kind, options = CONFIGS["llama"]
    sizes = options | {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    choice_tokens = {t for choices in prompts.choice_ids for ids in choices for t in ids}
    head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
    head.weight = torch.nn.Parameter(5 * model.lm_head.weight.detach())
    head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    head.bias.data[sorted(choice_tokens)] = 12.0
    model.lm_head = head
    return model


@pytest.fixture(scope="module")
def behaviour() -> pd.DataFrame:
    tokenizer = byte_tokenizer()
    prompts = make_prompts(make_examples(), tokenizer, context=4096)
    model = model_that_answers(prompts, tokenizer)
    return label_behaviour(answer_prompts(model, tokenizer, prompts))


@pytest.mark.slow
def test_a_model_that_knows_nothing_is_read_and_tells_no_lies(behaviour):
    assert set(behaviour.role) == {"truth", "lie", "known"}
    assert behaviour.readable.mean() > 0.9
    assert not behaviour.lied.any() and set(behaviour.unknown_by) == {"data set refused"}


def test_planted_states_are_found_by_a_probe_on_rows_told_to_lie(behaviour, monkeypatch):
    for slow in ("MORE_STATE_PROBES", "STACK_PROBES"):
        monkeypatch.setattr(f"dlk_utils.evaluation.evaluate.{slow}", {})
    rng = np.random.default_rng(0)
    states = rng.normal(size=(len(LAYERS), len(behaviour), 12))
    states[1] += 2 * np.outer(2 * behaviour.label - 1, rng.normal(size=12))
    features = memory_features(behaviour, {"resid_post": states}, layers=LAYERS)
    task = make_task(truth_rows(behaviour), "truth", LYING)
    table = evaluate(task, features, n_boot=200)
    found = table[(table.probe == "logistic") & table.selected].iloc[0]
    assert found.layer == 2 and found.estimate > 0.95 and found.lift_low > 0
