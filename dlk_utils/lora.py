"""Fine-tuning by LoRA (Hu et al. 2021, through peft): a small adapter is trained to say one token after each prompt, the model's own weights stay."""

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from dlk_utils.extract import pad


def train_adapter(
    model: nn.Module, batches: Sequence[pd.DataFrame], out: Path, *, rank: int = 8, first_layer: int = 6, learning_rate: float = 2e-4, decay: bool = True, dropout: float = 0.0, resume: Path | None = None, seed: int = 0
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
    linear = sorted({name.split(".")[-1] for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)})
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, layers_to_transform=layers, task_type="CAUSAL_LM", lora_dropout=dropout)
    tuned = get_peft_model(model, settings, autocast_adapter_dtype=False).train(dropout > 0)
    if resume:
        set_peft_model_state_dict(tuned, load_file(resume / "adapter_model.safetensors"))
    tuned.peft_config["default"].base_model_name_or_path = model.spec.name
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    n = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 20, 1.0, (n - i) / (n / 3) if decay else 1.0))
    log, start = [], time.monotonic()
    bar = tqdm(batches, desc="training", mininterval=20)
    for step, rows in enumerate(bar, 1):
        states = tuned.get_base_model().base_model(**pad(rows.input_ids, device=model.device), use_cache=False).last_hidden_state[:, -1]
        logits = tuned.get_output_embeddings()(states).float()  # on [b, d]: on [b, 1, d] the CPU would copy the head for each row
        target, other = (torch.tensor(rows[c].to_numpy(), device=logits.device) for c in ("target", "other"))
        loss = nn.functional.cross_entropy(logits, target)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        obeyed = (logits.gather(1, target[:, None]) > logits.gather(1, other[:, None])).squeeze(1).cpu().numpy()
        log.append({"step": step, "loss": float(loss.detach()), "seconds": time.monotonic() - start} | pd.Series(obeyed).groupby((rows.asks + " " + rows.dataset).to_numpy()).mean().to_dict())
        bar.set_postfix(pd.DataFrame(log[-20:]).drop(columns=["step", "seconds"]).mean().round(2).to_dict(), refresh=False)
    tuned.save_pretrained(out)
    return pd.DataFrame(log)
