"""Answering, side by side in one run: one prompt at a time, padded batches, and batches that share what their prompts begin with.

Prints tokens/s of each, in turns so that a noisy machine disturbs all alike, and the largest difference of their log-probabilities.
"""

import random
import time

import numpy as np
import pandas as pd
from results import prompt_rows, save

from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import last_logits, pad, plan_batches
from dlk_utils.extract.packing import plan_shared, shared_batch
from dlk_utils.models.loading import load_model


def main(
    model, tokenizer, kind: str, n_examples: int, rounds: int = 3, batch_tokens: int = 2048
) -> None:
    rows, title = prompt_rows(tokenizer, kind, n_examples)
    alone = lambda ids: last_logits(model, pad(ids))
    ways = {
        "one at a time": ([[r] for r in rows.index], alone),
        "padded batches": ([b for shard in plan_batches(rows, batch_tokens) for b in shard], alone),
        "shared prefixes": (
            [b for shard in plan_shared(rows, batch_tokens) for b in shard],
            lambda ids: last_logits(model, shared_batch(model, ids)),
        ),
    }
    tokens, seconds, logp = int(rows.input_ids.map(len).sum()), {w: [] for w in ways}, {}
    for i in range(rounds):
        for way, (plan, answer) in random.Random(i).sample(list(ways.items()), len(ways)):
            start, found = time.perf_counter(), {}
            for batch in plan:
                some = rows.loc[batch]
                found |= dict(
                    zip(
                        batch,
                        choice_logprobs(
                            answer([list(i) for i in some.input_ids]), list(some.choice_ids)
                        ).numpy(),
                        strict=True,
                    )
                )
            seconds[way].append(time.perf_counter() - start)
            logp[way] = np.stack([found[r] for r in rows.index])
    table = pd.DataFrame(
        [
            {
                "way": w,
                "batches": len(ways[w][0]),
                "tokens/s (median)": tokens / np.median(s),
                "slowest": tokens / max(s),
                "fastest": tokens / min(s),
                "largest difference": np.abs(logp[w] - logp["one at a time"]).max(),
            }
            for w, s in seconds.items()
        ]
    )
    save(f"answers_{kind}", f"Answers: {title}", table.set_index("way"))
    assert (table["largest difference"] < 1e-4).all(), "expected equal log-probabilities"


if __name__ == "__main__":
    loaded = load_model("smollm2", dtype="float32", device="cpu")
    for kind, n_examples in (("plain", 24), ("mixed", 12), ("one", 24)):
        main(*loaded, kind, n_examples)
