"""Time ways of answering: one prompt at a time, padded batches, and batches that share prefixes.

Writes `bench/results/answers_*.csv`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from results import batches_of, prompt_rows, save, time_ways, token_ids

from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.packing import plan_shared, shared_batch
from dlk_utils.models.loading import load_model

LARGEST_DIFFERENCE = 1e-4
"""Log-probabilities that differ by more are not the same."""


def main(model: Any, tokenizer: Any, kind: str, n_examples: int, rounds: int = 3) -> None:
    """Time the ways on one kind of prompts (see `results.PROMPT_KINDS`)."""
    rows, description = prompt_rows(tokenizer, kind, n_examples)

    def answer(plan: list[list[str]], make_batch: Callable) -> np.ndarray:
        logprobs = {}
        for batch in plan:
            logits = last_logits(model, make_batch(token_ids(rows, batch)))
            of_batch = choice_logprobs(logits, list(rows.choice_ids[batch])).numpy()
            logprobs |= dict(zip(batch, of_batch, strict=True))
        return np.stack([logprobs[row_id] for row_id in rows.index])

    plans = {
        "one at a time": ([[row_id] for row_id in rows.index], pad),
        "padded batches": (batches_of(rows), pad),
        "shared prefixes": (batches_of(rows, plan_shared), lambda ids: shared_batch(model, ids)),
    }
    ways = {way: lambda plan=plan: answer(*plan) for way, plan in plans.items()}
    table, values = time_ways(ways, rounds)

    n_tokens = rows.input_ids.map(len).sum()
    table["batches"] = [len(plan) for plan, _ in plans.values()]
    table["tokens/s (median)"] = n_tokens / table.seconds
    table["largest difference"] = [
        np.abs(values[way] - values["one at a time"]).max() for way in ways
    ]
    save(f"answers_{kind}", f"Answers: {description}", table.rename_axis("way"))
    if table["largest difference"].max() > LARGEST_DIFFERENCE:
        raise ValueError(
            f"{kind}: expected log-probabilities that differ by at most {LARGEST_DIFFERENCE}, got "
            f"{table['largest difference'].to_dict()}"
        )


if __name__ == "__main__":
    loaded = load_model("smollm2", dtype="float32", device="cpu")
    main(*loaded, "plain", 24)
    main(*loaded, "mixed", 12)
    main(*loaded, "one", 24)
