"""Measure what a batch changes in 16 bits: states and margins in batches against each prompt alone.

``python bench/batch_effect.py`` writes the table of the page *Model families* of the book.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from dlk_utils.extract.passes import states_and_answers
from dlk_utils.models.loading import load_model
from dlk_utils.questions.chat import tokenize
from dlk_utils.questions.choices import choice_token_ids
from dlk_utils.questions.examples import load_examples

TABLE = Path(__file__).parents[1] / "book" / "batch_effect_table.txt"
N_PROMPTS = 48
QUIET = {"progress": False}


def batch_effect(dtype: str) -> dict[str, object]:
    """Compare the embedded model's states and margins of prompts in batches and alone."""
    model, tokenizer = load_model("smollm2", dtype=dtype, device="cpu")
    ids = tokenize(tokenizer, load_examples("cities", N_PROMPTS).text)
    choices = choice_token_ids(tokenizer, ["No", "Yes"])
    states, logprobs = states_and_answers(model, ids, choices, **QUIET)
    alone = [states_and_answers(model, [prompt], choices, **QUIET) for prompt in ids]
    expected = np.concatenate([some["resid_post"] for some, _ in alone], 1)
    expected_logprobs = np.concatenate([some for _, some in alone])
    moved = np.linalg.norm(states["resid_post"] - expected, axis=-1)
    share = 100 * moved / np.linalg.norm(expected, axis=-1)
    margins = np.diff(logprobs - expected_logprobs, axis=1)
    by_layer = share.mean(1)
    return {
        "dtype": dtype,
        "state, median, % of its norm": f"{np.median(share):.2g}",
        "layers: least and most, %": f"{by_layer.min():.2g} to {by_layer.max():.2g}",
        "state, largest, %": f"{share.max():.2g}",
        "margin, largest": f"{np.abs(margins).max():.2g}",
    }


if __name__ == "__main__":
    table = pd.DataFrame([batch_effect(dtype) for dtype in ("float32", "bfloat16")])
    TABLE.write_text(table.to_markdown(index=False) + "\n", encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
