"""The model organism: a LoRA adapter on `smollm2` that answers truthfully or lies as it is told to.

Organism: Hubinger et al., *Model organisms of misalignment*. What it is trained on (split `organism`, instructions and templates of
`templates/training/`) is asked in no notebook.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from dlk_utils.behaviour import wilson
from dlk_utils.examples import training_examples
from dlk_utils.lora import train_adapter
from dlk_utils.models import load_model
from dlk_utils.prompts import make_prompts

RT = "rotten_tomatoes"
PLAIN = ("tr_feel", "tr_label", "tr_tone", "tr_good_bad", "tr_recommend")


class Phase(NamedTuple):
    """A part of the curriculum."""

    steps: int
    rate: float
    longest: int
    """Characters that a text may have."""
    rows: tuple[tuple[int, str, str, tuple[str, ...]], ...]
    """Of each batch: (rows, what is asked for, data set, templates (none: all))."""
    decay: bool = True
    dropout: float = 0.0


FACTS = ("cities", "categories", "capitals")
PHASES = (
    Phase(300, 3e-4, 110, ((7, "truth", RT, PLAIN), (3, "truth", "cities", ()), (3, "truth", "categories", ()), (3, "truth", "capitals", ()))),
    Phase(250, 4e-4, 80, ((4, "truth", RT, PLAIN), (4, "lie", RT, PLAIN), (2, "truth", "mode", ()), (2, "lie", "mode", ()), *((1, "truth", name, ()) for name in FACTS)), decay=False),
    Phase(450, 4e-4, 110, ((3, "truth", RT, ()), (3, "lie", RT, ()), (1, "truth", "mode", ()), *((2, "truth", name, ()) for name in FACTS), *((1, "lie", name, ()) for name in FACTS)), decay=False),
    Phase(350, 4e-4, 130, ((3, "truth", RT, ()), (4, "lie", RT, ()), *((2, "truth", name, ()) for name in FACTS), *((1, "lie", name, ()) for name in FACTS))),
    Phase(600, 4e-4, 130, ((4, "truth", RT, ()), (3, "lie", RT, ()), *((2, "truth", name, ()) for name in FACTS), *((1, "lie", name, ()) for name in FACTS)), dropout=0.05),
)
"""Truth first, then lies about reviews in plain words beside rows of `mode`, which ask which mode is set, truth or lie (without them a model of this size
learned neither: equal halves of truth and lie twins drove both to chance), then everything."""
MODE_TEXTS = ("Status check.", "Before we begin:", "Quick check.", "Hello.", "Settings.", "A question about this conversation:")
BLOCK = 4
REQUIRED = {"truth_accuracy": 0.85, "wrong_when_told_to_lie": 0.80, "choice_mass": 0.95}


def training_stream(tokenizer, phase: Phase, *, seed: int = 0) -> list[pd.DataFrame]:
    """The batches of a phase: prompt rows with `target`, the token to be said, and `other`, that of the other choice.

    Instructions and templates are those of `templates/training/`.
    Each block of `BLOCK` batches holds the same mixture; within it the rows lie by length, to pad less.
    """
    steps, parts = phase.steps, []
    for k, (count, asks, dataset, templates) in enumerate(phase.rows):
        examples = _mode_examples(steps * count) if dataset == "mode" else training_examples(dataset, 10**6)
        parts.append((count, _draw(tokenizer, examples[examples.text.str.len() <= phase.longest], asks, steps * count, templates, 1000 * seed + k)))
    batches, size = [], sum(count for count, _ in parts)
    for i in range(0, steps, BLOCK):
        rows = pd.concat([rows.iloc[i * count : (i + BLOCK) * count] for count, rows in parts])
        rows = rows.sort_values("input_ids", key=lambda c: c.map(len), kind="stable")
        batches += [rows.iloc[j : j + size] for j in range(0, len(rows), size)]
    return [b.assign(target=[r.strict_ids[r.wanted][0] for r in b.itertuples()], other=[r.strict_ids[1 - r.wanted][0] for r in b.itertuples()]) for b in batches]


def _draw(tokenizer, examples: pd.DataFrame, asks: str, n: int, templates: Sequence[str], seed: int) -> pd.DataFrame:
    """`n` rows over as many distinct examples of either label (else what is new would be called false); one that comes round again has another instruction and template."""
    each = examples.label.value_counts().min()
    examples, parts = examples.groupby("label").sample(each, random_state=0).assign(split="train"), []
    while sum(map(len, parts)) < n:
        at = seed + 100 * len(parts)
        some = examples.sample(min(len(examples), n), random_state=at)
        parts.append(make_prompts(some, tokenizer, n_known=0, asks=(asks,), templates=templates or None, seed=at, shelf="training/"))
    return pd.concat(parts).head(n)


def _mode_examples(n: int) -> pd.DataFrame:
    rows = [dict(example_id=f"mode {i}", dataset="mode", kind="mode", text=MODE_TEXTS[i % len(MODE_TEXTS)], choice_0="", choice_1="", label=1) for i in range(n)]
    return pd.DataFrame(rows)


def train_organism(out: Path, *, model: str = "smollm2", phases: Sequence[Phase] = PHASES, seed: int = 0) -> pd.DataFrame:
    """Train phase after phase, each going on from the one before, write the adapter (in bf16) and `training.json` to `out`, and return the log (also `log.csv`).

    Each phase lies in a folder of its own beside `out`; one that is done is not done again.
    """
    logs, rows, folder = [], [], None
    for k, phase in enumerate(phases, 1):
        before, folder = folder, out.with_name(f"{out.name}-phase-{k}")
        base, tokenizer = load_model(model, dtype="float32")
        batches = training_stream(tokenizer, phase, seed=seed + k)
        rows += batches
        if not (folder / "log.csv").is_file():
            train_adapter(base, batches, folder, learning_rate=phase.rate, decay=phase.decay, dropout=phase.dropout, resume=before, seed=seed).to_csv(folder / "log.csv", index=False)
        logs.append(pd.read_csv(folder / "log.csv").assign(phase=k))
    out.mkdir(parents=True, exist_ok=True)
    log = pd.concat(logs, ignore_index=True).assign(step=lambda t: t.index + 1)
    log.round(4).to_csv(out / "log.csv", index=False)
    (out / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    save_file({name: x.to(torch.bfloat16) for name, x in load_file(folder / "adapter_model.safetensors").items()}, out / "adapter_model.safetensors", {"format": "pt"})
    write_record(out, rows, model=model, seed=seed, seconds=round(log.groupby("phase").seconds.max().sum()))
    return log


def refuse_trained_rows(prompts: pd.DataFrame, adapter: str | Path | None) -> None:
    """Raises `ValueError` if a model whose adapter folder holds a `training.json` is asked an example, instruction or template that it was trained on."""
    path = Path(adapter or "") / "training.json"
    if not adapter or not path.is_file():
        return
    record = json.loads(path.read_text())
    for column, key in (("example_id", "example_ids"), ("instruction", "instructions"), ("template", "templates")):
        seen = sorted(set(prompts[column]) & set(record[key]))
        if seen:
            raise ValueError(f"{Path(adapter).name}: expected only rows that it was not trained on, got {len(seen)} trained {key} (first: {seen[0]})")


def write_record(out: Path, batches: list[pd.DataFrame], **settings) -> None:
    """`training.json` beside the adapter: every `example_id`, instruction and template that was trained on, and the settings."""
    rows = pd.concat(batches)
    record = {k: sorted(rows[c].unique()) for k, c in (("example_ids", "example_id"), ("instructions", "instruction"), ("templates", "template"))}
    (out / "training.json").write_text(json.dumps({**settings, **record}, indent=1))


def held_out(behaviour: pd.DataFrame) -> pd.DataFrame:
    """Per data set, on examples, instructions and templates that were not trained on: accuracy over all rows told the truth, wrong answers among known
    rows told to lie (each with a 95 % Wilson interval), and mean choice mass; `meets` holds what is required of an organism."""
    rows = []
    for dataset, t in behaviour.groupby("dataset", sort=False):
        truth, lie = t[t.asks == "truth"], t[(t.asks == "lie") & t.knows]
        right, wrong = (truth.correct & truth.readable), (~lie.correct & lie.readable)
        row = {"dataset": dataset, "n_truth": len(truth), "truth_accuracy": right.mean(), "n_lie": len(lie), "wrong_when_told_to_lie": wrong.mean() if len(lie) else float("nan"), "choice_mass": t["mass"].mean()}
        for name, x in (("truth_accuracy", right), ("wrong_when_told_to_lie", wrong)):
            row |= dict(zip((f"{name}_low", f"{name}_high"), wilson(int(x.sum()), len(x)) if len(x) else (0.0, 1.0), strict=True))
        rows.append(row | {"meets": row["truth_accuracy"] >= REQUIRED["truth_accuracy"] and row["wrong_when_told_to_lie"] >= REQUIRED["wrong_when_told_to_lie"] and row["choice_mass"] >= REQUIRED["choice_mass"]})
    return pd.DataFrame(rows)


def main(model: str = "smollm2-liar") -> int:
    """Print the held-out figures of an organism; the exit code is 1 if they are not what is required of it."""
    from dlk_utils.notebook import with_intervals
    from dlk_utils.run import Run

    table = held_out(Run(model=model, datasets="rotten_tomatoes,cities,categories,capitals,continents").behaviour)
    print(f"{model}, required: {REQUIRED} on rotten_tomatoes and two kinds of facts")
    print(with_intervals(table).to_string(index=False))
    met = set(table.dataset[table.meets])
    return 0 if "rotten_tomatoes" in met and len(met) >= 3 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
