"""The planted-signal test: a known truth direction goes the whole way, and comes out with the AUROC that is known in advance."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny
from scipy.stats import norm

from dlk_utils.evaluation.behaviour import read_answers
from dlk_utils.evaluation.evaluate import evaluate
from dlk_utils.evaluation.tasks import make_task
from dlk_utils.extract.stages import store_gradients
from dlk_utils.extract.store import read_rows
from dlk_utils.models.sites import at_sites

N, D_PRIME = 1200, 1.5


def rows() -> pd.DataFrame:
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


@pytest.mark.parametrize("strength", [D_PRIME, 0.0])
def test_a_planted_truth_direction_is_found_at_its_strength_and_nothing_where_nothing_is_planted(
    tmp_path, strength
):
    model, table = tiny("llama", torch.float32), rows()
    noise = dict(zip(table.row_id, np.random.default_rng(1).standard_normal(N), strict=True))
    signal = {
        tuple(r.input_ids): strength * (r.label - 0.5) + noise[r.row_id] for r in table.itertuples()
    }
    seen = {}

    def remember(module, args, kwargs):
        ids = kwargs.get("input_ids")
        if ids is not None:
            seen["ids"] = [tuple(i) for i in ids.tolist()]

    def plant(
        _, layer, hidden
    ):  # 100 times larger than the model's own states along one neuron, so that its noise does not count
        if layer == 1 and hidden.shape[1] == 1:
            hidden = hidden.clone()
            prefixes = {k[:-1]: v for k, v in signal.items()}
            hidden[:, -1, 7] = torch.tensor([100 * prefixes[k] for k in seen["ids"]])
            return hidden

    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with at_sites(model, ["resid_post"], plant):
            store_gradients(model, table, tmp_path / "s", record={}, sites=["resid_post"])
    finally:
        handle.remove()
    logp = read_rows(tmp_path / "s", table, "choice_logprobs")
    answers = read_answers(table, logp, np.zeros(N, int), str).assign(y=table.label)
    reader = lambda part: read_rows(tmp_path / "s", part, "activation.resid_post.1.0")
    results = evaluate(
        make_task(answers, "truth", "by example, truth rows"),
        {("activation", "resid_post", 1): reader},
        n_boot=200,
    )
    found = results[results.probe == "mean_difference"].iloc[0]
    known = norm.cdf(strength / np.sqrt(2))
    assert found.low - 0.02 <= known <= found.high + 0.02
    assert abs(results[results.probe == "shuffled labels"].estimate.iloc[0] - 0.5) < 0.12
    if strength:
        assert found.low > 0.7 and found.lift_low > 0
