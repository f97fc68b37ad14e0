"""Mistakes that notebook 07 plants, and what it measures of them."""

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn

from dlk_utils.evaluation.stats import auroc
from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.questions.templates import prompt_library, read_templates


def instruction_detector(behaviour: pd.DataFrame) -> dict[str, float | int]:
    """Score a detector of lies that sees the instruction alone.

    Its score is how often rows with that instruction were lies in one half of the examples; it is
    tested on the other half. An instruction that was not seen gets the rate of all that ask for
    the same.

    Returns
    -------
    dict
        The signed AUROC over all rows and among those told to lie (NaN where one class is
        missing), with the numbers of rows.
    """
    first_half = behaviour.example_id.isin(sorted(behaviour.example_id.unique())[::2])
    seen, rest = behaviour[first_half], behaviour[~first_half]
    by_instruction = rest.instruction.map(seen.groupby("instruction").lied.mean())
    by_role = rest.asks.map(seen.groupby("asks").lied.mean())
    rest = rest.assign(score=by_instruction.fillna(by_role))
    told_to_lie = rest[rest.asks == "lie"]
    return {
        "rows": len(rest),
        "AUROC over all": _auroc_of_lies(rest),
        "told to lie": len(told_to_lie),
        "of them lies": int(told_to_lie.lied.sum()),
        "AUROC among those": _auroc_of_lies(told_to_lie),
    }


def _auroc_of_lies(rows: pd.DataFrame) -> float:
    has_both = rows.lied.nunique() == 2
    return auroc(rows.score.to_numpy(), rows.lied.to_numpy(int)) if has_both else np.nan


def made_up_behaviour() -> pd.DataFrame:
    """Make up 400 examples under six lie instructions that are obeyed in 60 % to 95 % of rows."""
    rng = np.random.default_rng(0)
    instruction = rng.integers(6, size=400)
    lied = rng.random(400) < np.linspace(0.6, 0.95, 6)[instruction]
    lie = pd.DataFrame({"example_id": np.arange(400), "asks": "lie", "instruction": instruction})
    truth = lie.assign(asks="truth", instruction=6 + lie.instruction, lied=False)
    return pd.concat([lie.assign(lied=lied), truth])


def planted_template(question: str, answer: str) -> pd.DataFrame:
    """Read a file with one template whose choices are *no* and *yes*."""
    path = Path(tempfile.mkdtemp()) / "planted.yaml"
    path.write_text(
        "dataset: x\ntemplates:\n  1: !Template\n    name: planted\n"
        f"    answer_choices: no ||| yes\n    jinja: '{question} ||| {answer}'\n"
    )
    return read_templates(path)


def count_lying_shots(prompts: pd.DataFrame, examples: pd.DataFrame) -> str:
    """Count, over prompts told to lie, the shots whose answer is the wrong one, as "n of m"."""
    label = examples.set_index("example_id").label
    n_shots = n_lies = 0
    for row in prompts[prompts.role == "lie"].itertuples():
        turns = json.loads(row.messages)
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        wrong = [f"{row.prefix} {row.choices[1 - label[shot]]}".strip() for shot in row.shots]
        n_shots += len(answers)
        n_lies += sum(a == b for a, b in zip(answers, wrong, strict=True))
    return f"{n_lies} of {n_shots}"


def count_with_instruction(prompts: pd.DataFrame, texts: Sequence[str]) -> int:
    """Count the texts of prompts that still hold their instruction."""
    instructions = prompt_library("instructions").text[prompts.instruction]
    return sum(i in text for i, text in zip(instructions, texts, strict=True))


def padding_errors(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Measure how far padding in a batch moves next-token probabilities from those of one alone.

    Returns
    -------
    tuple
        The largest difference with a mask, over padding on either side, and that without a mask.
    """

    def probabilities(batch: dict) -> torch.Tensor:
        return last_logits(model, batch).softmax(-1)

    def error(batch: dict) -> float:
        return float((probabilities(batch) - alone).abs().max())

    alone = torch.cat([probabilities(pad([ids], device=model.device)) for ids in prompts])
    left = pad(prompts, device=model.device)
    right = pad(prompts, device=model.device, side="right")
    everything = torch.ones_like(left["attention_mask"])
    unmasked = {"attention_mask": everything, "position_ids": everything.cumsum(1) - 1}
    return max(error(left), error(right)), error(left | unmasked)


def with_second_beginning(tokenizer: Any) -> Any:
    """Copy a tokenizer so that it adds the token that begins a text, as a chat format does too."""
    planted = copy.deepcopy(tokenizer)
    planted.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{planted.bos_token} $A",
        special_tokens=[(planted.bos_token, planted.bos_token_id)],
    )
    return planted
