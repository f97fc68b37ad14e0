"""The model organism: a LoRA adapter on `smollm2` that answers truthfully or lies as it is told to.

Organism: Hubinger et al., *Model organisms of misalignment*. LoRA: Hu et al. 2021, through peft.
What it is trained on (split `organism`, instructions and templates of `templates/training/`) is asked in no notebook.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from dlk_utils.behaviour import wilson
from dlk_utils.examples import training_examples
from dlk_utils.extract import pad
from dlk_utils.prompts import make_prompts

FACTS = {"rotten_tomatoes": 0.5, "capitals": 0.25, "continents": 0.25}
REVIEWS = {"rotten_tomatoes": 1.0}
PLAIN = ("tr_feel", "tr_label", "tr_tone", "tr_good_bad", "tr_recommend")
PHASES = ((300, {"truth": 16}, (), FACTS, 110), (320, {"truth": 6, "lie": 5, "mode": 5}, PLAIN, REVIEWS, 80))
"""(steps, rows of each kind in a batch, templates (none: all), share of each data set, longest text in characters). `mode` rows ask which mode is set,
truth or lie: without them a model of this size learned neither (equal halves of truth and lie twins drove both to chance)."""
MODE_TEXTS = ("Status check.", "Before we begin:", "Quick check.", "Hello.", "Settings.", "A question about this conversation:")
REQUIRED = {"truth_accuracy": 0.85, "wrong_when_told_to_lie": 0.80, "choice_mass": 0.95}


def training_stream(tokenizer, *, phases: Sequence[tuple] = PHASES, seed: int = 0) -> list[pd.DataFrame]:
    """Batches of prompt rows with `target`, the token to be said, and `other`, that of the other choice.

    An example that comes round again has another instruction and template. Instructions and templates are those of `templates/training/`.
    """
    batches = []
    for k, (steps, kinds, templates, mixture, longest) in enumerate(phases):
        parts = []
        for kind, count in kinds.items():
            asks = ("truth", "lie") if kind == "mode" else (kind,)
            sets = [(_mode_examples(steps * count), 1.0)] if kind == "mode" else [(training_examples(d, 10**6), share) for d, share in mixture.items()]
            drawn = [_draw(tokenizer, e[e.text.str.len() <= longest], a, int(np.ceil(share * steps * count / len(asks))), templates, seed + 1000 * k) for e, share in sets for a in asks]
            parts.append((count, pd.concat(drawn).sample(frac=1, random_state=seed + k)))
        batches += [pd.concat([rows.iloc[i * count : (i + 1) * count] for count, rows in parts]) for i in range(steps)]
    return [b.assign(target=[r.strict_ids[r.wanted][0] for r in b.itertuples()], other=[r.strict_ids[1 - r.wanted][0] for r in b.itertuples()]) for b in batches]


def _draw(tokenizer, examples: pd.DataFrame, asks: str, n: int, templates: Sequence[str], seed: int) -> pd.DataFrame:
    examples, parts = examples.assign(split="train"), []
    while sum(map(len, parts)) < n:
        some = examples.sample(min(len(examples), n), random_state=seed + len(parts))
        parts.append(make_prompts(some, tokenizer, n_known=0, asks=(asks,), templates=templates or None, seed=seed + len(parts), shelf="training/"))
    return pd.concat(parts).head(n)


def _mode_examples(n: int) -> pd.DataFrame:
    rows = [dict(example_id=f"mode {i}", dataset="mode", kind="mode", text=MODE_TEXTS[i % len(MODE_TEXTS)], choice_0="", choice_1="", label=1) for i in range(n)]
    return pd.DataFrame(rows)


def train_adapter(
    model: nn.Module, batches: Sequence[pd.DataFrame], out: Path, *, rank: int = 8, first_layer: int = 6, learning_rate: float = 2e-4, checkpoints: Sequence[int] = (), resume: Path | None = None, seed: int = 0
) -> pd.DataFrame:
    """Train a LoRA adapter on the linear layers from block `first_layer` on to say `target` after each prompt, write it to `out`, and return the log.

    Cross-entropy over the whole vocabulary, so the choice mass is trained too. AdamW; the rate rises over 20 steps and falls to zero over the last third.
    The log has step, loss, seconds, and the share of rows that lean to what was asked for, of those told the truth and of those told to lie.
    `resume` is the folder of an adapter to go on from. `checkpoints` are steps after which the adapter is also written, to `out` with `-<step>` appended.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    torch.manual_seed(seed)
    layers = list(range(first_layer, model.config.num_hidden_layers))
    linear = sorted({name.split(".")[-1] for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)})
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, layers_to_transform=layers, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, settings, autocast_adapter_dtype=False)
    if resume:
        set_peft_model_state_dict(tuned, load_file(resume / "adapter_model.safetensors"))
    tuned.peft_config["default"].base_model_name_or_path = model.spec.name
    weights = [p for p in tuned.parameters() if p.requires_grad]
    masters = [p.detach().float() for p in weights] if model.dtype != torch.float32 else weights  # 16 bits would swallow small steps
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
    n = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 20, 1.0, (n - i) / (n / 3)))
    log, start = [], time.monotonic()
    bar = tqdm(batches, desc="training", mininterval=5)
    for step, rows in enumerate(bar, 1):
        states = tuned.get_base_model().base_model(**pad(rows.input_ids, device=model.device), use_cache=False).last_hidden_state[:, -1]
        logits = tuned.get_output_embeddings()(states).float()  # on [b, d]: on [b, 1, d] the CPU would copy the head for each row
        target, other = (torch.tensor(rows[c].to_numpy(), device=logits.device) for c in ("target", "other"))
        loss = nn.functional.cross_entropy(logits, target)
        loss.backward()
        for master, p in zip(masters, weights, strict=True):
            if master is not p:
                master.grad, p.grad = p.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, p in zip(masters, weights, strict=True):
                p.copy_(master)
        obeyed = (logits.gather(1, target[:, None]) > logits.gather(1, other[:, None])).squeeze(1).cpu().numpy()
        log.append({"step": step, "loss": float(loss.detach()), "seconds": time.monotonic() - start} | {a: float(obeyed[rows.asks == a].mean()) if (rows.asks == a).any() else float("nan") for a in ("truth", "lie")})
        bar.set_postfix(pd.DataFrame(log[-20:])[["loss", "truth", "lie"]].mean().round(2).to_dict(), refresh=False)
        if step in checkpoints:
            tuned.save_pretrained(out.with_name(f"{out.name}-{step}"))
    tuned.save_pretrained(out)
    return pd.DataFrame(log)


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

    table = held_out(Run(model=model).behaviour)
    print(f"{model}, required: {REQUIRED} on rotten_tomatoes and two kinds of facts")
    print(with_intervals(table).to_string(index=False))
    met = set(table.dataset[table.meets])
    return 0 if "rotten_tomatoes" in met and len(met) >= 3 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
