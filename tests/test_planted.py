"""A planted truth direction goes from the model's states to the table of results.

Its AUROC is known in advance; where nothing is planted, nothing may be found.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from tiny_models import tiny

from dlk_utils.evaluation.behaviour import read_answers
from dlk_utils.evaluation.evaluate import evaluate
from dlk_utils.evaluation.tasks import make_task
from dlk_utils.extract.stages import store_gradients
from dlk_utils.extract.store import read_rows
from dlk_utils.models.sites import at_sites

N = 1200
D_PRIME = 1.5
LAYER, NEURON = 1, 7
LOUD = 100
"""The planted values are so much larger than the model's own states that these do not count."""


def prompt_rows() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    ids = [f"e{i}" for i in range(N)]
    return pd.DataFrame(
        {
            "row_id": [f"r{i}" for i in range(N)],
            "example_id": ids,
            "label": np.arange(N) % 2,
            "input_ids": [rng.integers(1, 97, 6).tolist() for _ in ids],
            "choice_ids": [[[1], [2]]] * N,
            "role": "truth",
            "instruction": "i",
            "template": "t",
            "dataset": "d",
            "asks": "truth",
            "choices": [["no", "yes"]] * N,
            "split": np.array(["train", "train", "validation", "test"])[(np.arange(N) // 2) % 4],
            "text": [f"word{i % 7}" for i in range(N)],
            "prompt": [f"word{i}" for i in rng.integers(0, 50, N)],
        }
    )


def planted_values(rows: pd.DataFrame, strength: float) -> dict[tuple[int, ...], float]:
    """Give each prompt, by all its tokens but the last, its label times `strength` plus noise."""
    noise = np.random.default_rng(1).standard_normal(len(rows))
    values = LOUD * (strength * (rows.label.to_numpy() - 0.5) + noise)
    return {tuple(ids[:-1]): v for ids, v in zip(rows.input_ids, values, strict=True)}


def planting(model: torch.nn.Module, values: dict[tuple[int, ...], float]) -> tuple[Callable, ...]:
    """Return two hooks: one finds out which prompts run, the other plants their values.

    The tokens before the last run first, and the last ones then with a graph, for gradients. What a
    last token sees of the tokens before says which prompt it belongs to.
    """
    cached = torch.empty(1, 0, dtype=torch.long)
    running: list[list[tuple[int, ...]]] = []

    def remember(module, args, kwargs):
        nonlocal cached
        running.clear()
        mask, ids = kwargs["attention_mask"], kwargs["input_ids"]
        if mask.dim() != 4:
            return
        if not torch.is_grad_enabled():
            is_first_pass = mask.shape[-1] == ids.shape[1]
            before = ids[:, :0] if is_first_pass else cached.expand(len(ids), -1)
            cached = torch.cat([before, ids], 1)
            return
        sees = mask[:, 0, :, : cached.shape[1]] == 0
        for row, of_tokens in zip(cached, sees, strict=True):
            running.append([tuple(row[seen].tolist()) for seen in of_tokens])

    def plant(site, layer, hidden):
        if layer != LAYER or not running:
            return None
        hidden = hidden.clone()
        # Places that no prompt fills see nothing before them.
        hidden[:, :, NEURON] = torch.tensor(
            [[values[seen] if seen else 0.0 for seen in row] for row in running]
        )
        return hidden

    return remember, plant


@pytest.mark.slow
@pytest.mark.parametrize("strength", [D_PRIME, 0.0])
def test_a_planted_direction_is_found_at_its_strength(tmp_path, strength):
    model, rows = tiny("llama", torch.float32), prompt_rows()
    remember, plant = planting(model, planted_values(rows, strength))
    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with at_sites(model, ["resid_post"], plant):
            store_gradients(model, rows, tmp_path / "s", sites=["resid_post"])
    finally:
        handle.remove()

    def read_states(part: pd.DataFrame) -> np.ndarray:
        return read_rows(tmp_path / "s", part, f"activation.resid_post.{LAYER}.0")

    logprobs = read_rows(tmp_path / "s", rows, "choice_logprobs")
    answers = read_answers(rows, logprobs, np.zeros(N, int), str).assign(y=rows.label)
    task = make_task(answers, "truth", "by example, truth rows")
    results = evaluate(task, {("activation", "resid_post", LAYER): read_states}, n_boot=200)
    probe = results[results.probe == "mean_difference"].iloc[0]
    known_auroc = norm.cdf(strength / np.sqrt(2))
    assert probe.low - 0.02 <= known_auroc <= probe.high + 0.02
    shuffled = results[results.probe == "shuffled labels"].iloc[0]
    assert abs(shuffled.estimate - 0.5) < 0.12
    if strength:
        assert probe.low > 0.7 and probe.lift_low > 0
