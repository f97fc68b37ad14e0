"""Training of an organism: LoRA adapters (Hu et al. 2021, through peft), phase after phase."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from dlk_utils.errors import ModelError
from dlk_utils.extract.batches import pad
from dlk_utils.models.loading import ORGANISMS, load_spec, load_tokenizer, resolve
from dlk_utils.organisms.curriculum import CURRICULA, PHASES, Phase, training_stream


def train_adapter(
    model: nn.Module,
    batches: Sequence[pd.DataFrame],
    out: Path,
    *,
    rank: int = 8,
    first_layer: int = 6,
    learning_rate: float = 2e-4,
    decay: bool = True,
    dropout: float = 0.0,
    resume: Path | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Train a LoRA adapter of a model in fp32 (16 bits would swallow small steps) on the linear layers from block `first_layer` on to say `target` after each prompt, write it to `out`, and return the log.

    Cross-entropy over the whole vocabulary, so the choice mass is trained too. AdamW; the rate rises over 20 steps and, with `decay`, falls to zero over the last third.
    The log has step, loss, seconds, and for each data set and what was asked for the share of rows that lean to it.
    `resume` is the folder of an adapter to go on from.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    torch.manual_seed(seed)
    layers = list(range(first_layer, model.config.num_hidden_layers))
    linear = sorted(
        {
            name.split(".")[-1]
            for name, module in model.base_model.named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=linear,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
        lora_dropout=dropout,
    )
    tuned = get_peft_model(model, settings, autocast_adapter_dtype=False).train(dropout > 0)
    if resume:
        set_peft_model_state_dict(tuned, load_file(resume / "adapter_model.safetensors"))
    tuned.peft_config["default"].base_model_name_or_path = model.spec.name
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    n = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 20, 1.0, (n - i) / (n / 3) if decay else 1.0)
    )
    log, start = [], time.monotonic()
    bar = tqdm(batches, desc="training", mininterval=20)
    for step, rows in enumerate(bar, 1):
        states = (
            tuned.get_base_model()
            .base_model(**pad(rows.input_ids, device=model.device), use_cache=False)
            .last_hidden_state[:, -1]
        )
        logits = tuned.get_output_embeddings()(
            states
        ).float()  # on [b, d]: on [b, 1, d] the CPU would copy the head for each row
        target, other = (
            torch.tensor(rows[c].to_numpy(), device=logits.device) for c in ("target", "other")
        )
        loss = nn.functional.cross_entropy(logits, target)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        obeyed = (
            (logits.gather(1, target[:, None]) > logits.gather(1, other[:, None]))
            .squeeze(1)
            .cpu()
            .numpy()
        )
        log.append(
            {"step": step, "loss": float(loss.detach()), "seconds": time.monotonic() - start}
            | pd.Series(obeyed)
            .groupby((rows.asks + " " + rows.dataset).to_numpy())
            .mean()
            .to_dict()
        )
        bar.set_postfix(
            pd.DataFrame(log[-20:]).drop(columns=["step", "seconds"]).mean().round(2).to_dict(),
            refresh=False,
        )
    tuned.save_pretrained(out)
    return pd.DataFrame(log)


def train_organism(
    out: Path,
    *,
    model: str = "smollm2",
    phases: Sequence[Phase] = PHASES,
    after: Path | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Train phase after phase, each going on from the one before (the first from the adapter in the folder `after`), write the adapter (in bf16) and `training.json` to `out`, and return the log (also `log.csv`).

    Each phase lies in a folder of its own beside `out`, named by all that decides it: model, seed, its rows and settings, the phases before. One that is done is not done again.
    """
    logs, rows, folder = [], [], after
    spec = resolve(model, dtype="float32")
    done = [spec.record(), seed, resolve(str(after)).revision if after else None]
    for k, phase in enumerate(phases, 1):
        batches = training_stream(load_tokenizer(spec), phase, seed=seed + k)
        rows += batches
        done = fingerprint(
            {
                "before": done,
                "phase": phase,
                "rows": [
                    [list(map(int, i)), int(t)]
                    for b in batches
                    for i, t in zip(b.input_ids, b.target, strict=True)
                ],
            }
        )
        before, folder = folder, out.with_name(f"{out.name}-phase-{k}-{done}")
        if not (folder / "log.csv").is_file():
            train_adapter(
                load_spec(spec),
                batches,
                folder,
                learning_rate=phase.rate,
                decay=phase.decay,
                dropout=phase.dropout,
                resume=before,
                seed=seed,
            ).to_csv(folder / "log.csv", index=False)
        logs.append(pd.read_csv(folder / "log.csv").assign(phase=k))
    out.mkdir(parents=True, exist_ok=True)
    log = pd.concat(logs, ignore_index=True).assign(step=lambda t: t.index + 1)
    log.round(4).to_csv(out / "log.csv", index=False)
    (out / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    save_file(
        {
            name: x.to(torch.bfloat16)
            for name, x in load_file(folder / "adapter_model.safetensors").items()
        },
        out / "adapter_model.safetensors",
        {"format": "pt"},
    )
    write_record(
        out,
        rows,
        after=after,
        model=model,
        seed=seed,
        seconds=round(log.groupby("phase").seconds.max().sum()),
    )
    return log


def train_again(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Train an organism by its curriculum into `folder/name`, and return that. Raises `ModelError` where there is no curriculum of that name."""
    if name not in CURRICULA:
        raise ModelError(f"organism: expected one of {', '.join(CURRICULA)}, got {name!r}")
    after, phases = CURRICULA[name]
    train_organism(folder / name, phases=phases, after=after and ORGANISMS / after, seed=seed)
    return folder / name


def organism_of(model: str) -> tuple[str, Path, Sequence[Phase]]:
    """An organism of ours, shipped or trained again (then by its folder): as it was named, its folder, its phases. For any other model that of `smollm2-liar`."""
    folder = Path(model) if Path(model).is_dir() else ORGANISMS / model
    if folder.name not in CURRICULA or not (folder / "training.json").is_file():
        return organism_of("smollm2-liar")
    return model, folder, CURRICULA[folder.name][1]


def write_record(
    out: Path, batches: list[pd.DataFrame], *, after: Path | None = None, **settings
) -> None:
    """`training.json` beside the adapter: every `example_id`, instruction and template that was trained on, with those of the adapter in `after` that it goes on from, and the settings."""
    rows, before = (
        pd.concat(batches),
        json.loads((after / "training.json").read_text()) if after else {},
    )
    record = {
        k: sorted({*rows[c], *before.get(k, ())})
        for k, c in (
            ("example_ids", "example_id"),
            ("instructions", "instruction"),
            ("templates", "template"),
        )
    }
    (out / "training.json").write_text(
        json.dumps({**settings, **({"after": after.name} if after else {}), **record}, indent=1)
    )
