"""Train an organism: LoRA adapters (Hu et al., 2021, through peft), phase after phase."""

import io
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from dlk_utils.errors import ModelError
from dlk_utils.extract.batches import Batch, pad
from dlk_utils.extract.dropout import draw_seed, mc_dropout
from dlk_utils.models.configuration import n_layers
from dlk_utils.models.loading import ORGANISMS, load_spec, load_tokenizer, resolve
from dlk_utils.organisms.curriculum import CURRICULA, PHASES, Phase, training_stream
from dlk_utils.provenance import fingerprint
from dlk_utils.questions.trained import RECORD_FILE
from dlk_utils.safe_files import is_sealed, read_sealed, seal

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LOG_FILE = "log.csv"
TRAINED_ON = ("example_ids", "instructions", "templates", "openings")
"""What a record names: a model with the adapter must be asked none of it."""
PHASE_FILES = [CONFIG_FILE, WEIGHTS_FILE, LOG_FILE]
"""What is read back of a phase that was trained before."""


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
    state_dropout: float = 0.0,
    resume: Path | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Train a LoRA adapter to say the `answer_ids` of each row next, and write it to a folder.

    The loss is the cross-entropy of the answer's first token plus the mean cross-entropy of its
    other tokens. It is taken over the whole vocabulary, so the model also learns to answer with one
    of the choices. The optimizer is AdamW. The learning rate rises over the first 20 steps.

    Parameters
    ----------
    model
        A model in fp32: 16 bits would swallow small steps.
    batches
        One batch a step: see `training_stream`.
    out
        The folder to write to.
    rank, dropout
        Of the adapter. It has a part in every linear layer, from block `first_layer` on.
    decay
        Whether the learning rate falls to zero over the last third.
    state_dropout
        Share of channels dropped at every token, as in draws of the complete prompt
        (`extract.dropout`). The masks of a row depend on its `row_id`, the step and the seed.
    resume
        Folder of an adapter to start from. It may have a lower rank, or leave out some blocks: then
        the new adapter gives the same outputs at first, and has more weights to train.

    Returns
    -------
    DataFrame
        One row a step: step, loss, seconds since the start, and for each `Part.title` (such as "lie
        cities") the share of rows for which the model, with any dropout, prefers the target to the
        other choice. The target of a self-labelled row is its own answer without state dropout.
    """
    torch.manual_seed(seed)
    tuned = _add_adapter(model, rank, first_layer, dropout, resume)
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    n_steps = len(batches)

    def rate_factor(step: int) -> float:
        falling = (n_steps - step) / (n_steps / 3) if decay else 1.0
        return min((step + 1) / 20, 1.0, falling)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)
    log = []
    start = time.monotonic()
    progress = tqdm(batches, desc="training", mininterval=20)
    for step, batch in enumerate(progress, 1):
        batch = _with_own_answers(tuned, batch)
        with _state_dropout(tuned, batch, state_dropout, step=step, seed=seed):
            logits, rest_loss = _predict(tuned, batch)
        target = torch.tensor(batch.target.to_numpy(), device=logits.device)
        other = torch.tensor(batch.other.to_numpy(), device=logits.device)
        loss = nn.functional.cross_entropy(logits, target) + rest_loss
        if not loss.isfinite():
            raise ModelError(
                f"training: expected a finite loss, got {loss.item()} at step {step} of {n_steps}; "
                f"lower the learning rate ({learning_rate})"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        row = torch.arange(len(batch), device=logits.device)
        prefers_target = (logits[row, target] > logits[row, other]).cpu().numpy()
        shares = pd.Series(prefers_target).groupby(batch.part.to_numpy()).mean()
        seconds = time.monotonic() - start
        log.append({"step": step, "loss": loss.item(), "seconds": seconds} | shares.to_dict())
        recent = pd.DataFrame(log[-20:]).drop(columns=["step", "seconds"]).mean().round(2)
        progress.set_postfix(recent.to_dict(), refresh=False)
    # The embeddings are not trained. To find that out, peft would ask the hub for the base model.
    tuned.save_pretrained(out, save_embedding_layers=False)
    return pd.DataFrame(log)


def _add_adapter(
    model: nn.Module, rank: int, first_layer: int, dropout: float, resume: Path | None
) -> Any:
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    modules = model.base_model.named_modules()
    linear = {name.split(".")[-1] for name, module in modules if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted(linear),
        layers_to_transform=list(range(first_layer, n_layers(model))),
        task_type="CAUSAL_LM",
        lora_dropout=dropout,
    )
    tuned = get_peft_model(model, config, autocast_adapter_dtype=False).train(dropout > 0)
    if resume:
        wider = get_peft_model_state_dict(tuned)
        weights = load_file(resume / WEIGHTS_FILE)
        if not all(n in wider and _fits_in(weights[n], wider[n]) for n in weights):
            raise ModelError(
                f"{resume}: expected an adapter of rank {rank} or less, in blocks from "
                f"{first_layer} on, to go on from"
            )
        set_peft_model_state_dict(tuned, {n: _widened(weights[n], wider[n]) for n in weights})
    tuned.peft_config["default"].base_model_name_or_path = model.spec.name
    return tuned


def _fits_in(weight: Tensor, wider: Tensor) -> bool:
    return all(size <= room for size, room in zip(weight.shape, wider.shape, strict=True))


def _widened(weight: Tensor, wider: Tensor) -> Tensor:
    """Write a matrix of an adapter into the first rows and columns of one of a higher rank.

    What is added to the model stays the same, for the rest of a new adapter's B is 0, and its
    scale, `lora_alpha` by the rank, is always 2.
    """
    out = wider.clone()
    out[: weight.shape[0], : weight.shape[1]] = weight
    return out


@torch.no_grad()
def _with_own_answers(tuned: Any, batch: pd.DataFrame) -> pd.DataFrame:
    """Set the target of each self-labelled row to the choice preferred without state dropout."""
    if not batch.self_labelled.any():
        return batch
    target, other = batch.target.to_numpy(copy=True), batch.other.to_numpy(copy=True)
    chosen = np.flatnonzero(batch.self_labelled)
    logits = _predict(tuned, batch.iloc[chosen])[0].cpu().numpy()
    row = np.arange(len(chosen))
    swapped = chosen[logits[row, other[chosen]] > logits[row, target[chosen]]]
    target[swapped], other[swapped] = other[swapped], target[swapped]
    answer_ids = [
        [first] if alone else ids
        for ids, first, alone in zip(batch.answer_ids, target, batch.self_labelled, strict=True)
    ]
    return batch.assign(target=target, other=other, answer_ids=answer_ids)


def _state_dropout(
    tuned: Any, rows: pd.DataFrame, p: float, *, step: int, seed: int
) -> AbstractContextManager[Any]:
    """Return the context in which `_predict` has dropout with probability `p`, if any."""
    if not p:
        return nullcontext()
    model = tuned.get_base_model()
    seeds = [draw_seed(row_id, step, seed) for row_id in rows.row_id]
    position_ids = _padded_texts(rows, model)["position_ids"]
    return mc_dropout(model, p, seeds=seeds, position_ids=position_ids)


def _padded_texts(rows: pd.DataFrame, model: nn.Module) -> Batch:
    """Lay the prompts side by side, each with its answer but for the last token."""
    texts = [
        [*ids, *answer[:-1]] for ids, answer in zip(rows.input_ids, rows.answer_ids, strict=True)
    ]
    return pad(texts, device=model.device)


def _predict(tuned: Any, rows: pd.DataFrame) -> tuple[Float[Tensor, "b vocab"], Float[Tensor, ""]]:
    """Return the logits where the answer begins, and the loss of the tokens that end it.

    Of each row's `answer_ids`, the first is the target. The others are the rest of the choice and
    the end of the turn: without them a model says its choice again and again.
    """
    model = tuned.get_base_model()
    answers = list(rows.answer_ids)
    batch = _padded_texts(rows, model)
    states = model.base_model(**batch, use_cache=False).last_hidden_state
    # Padding stands on the left: a row ends in the last column, and its answer before that.
    end = states.shape[1]
    row = [k for k, answer in enumerate(answers) for _ in answer]
    column = [end - len(answer) + i for answer in answers for i in range(len(answer))]
    # On [n, d]: on [n, 1, d] the CPU would copy the head for each row.
    logits = tuned.get_output_embeddings()(states[row, column]).float()
    is_first = torch.tensor([i == 0 for answer in answers for i in range(len(answer))])
    rest = torch.tensor([token for answer in answers for token in answer[1:]])
    rest_loss = logits.new_zeros(())
    if len(rest):
        rest_loss = nn.functional.cross_entropy(logits[~is_first], rest.to(logits.device))
    return logits[is_first], rest_loss


def train_organism(
    out: Path,
    *,
    model: str = "smollm2",
    phases: Sequence[Phase] = PHASES,
    after: Path | None = None,
    n_averaged: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Train phase after phase, and write the adapter (in bf16), its record and its log to a folder.

    Each phase goes on from the one before. Its folder lies beside `out` and is named by a
    fingerprint of the model, the seed, the phase's settings, its prompts and answers, and the
    phases before it. A finished phase is used again unless one of its files is missing or damaged.

    Parameters
    ----------
    out
        The folder to write to.
    model
        The name of the model to train, as in `load_model`.
    phases
        What it is taught.
    after
        Folder of the adapter that the first phase goes on from.
    n_averaged
        The adapter is the mean of those that this many last phases give (`average_adapters`).

    Returns
    -------
    DataFrame
        The logs of `train_adapter` under each other, with the column `phase`.
    """
    spec = resolve(model, dtype="float32")
    tokenizer = load_tokenizer(spec)
    start_from = after and resolve(str(after)).revision
    key = fingerprint({"model": spec.record(), "seed": seed, "after": start_from})
    logs, trained, folders = [], [], []
    folder = after
    for k, phase in enumerate(phases, 1):
        batches = training_stream(tokenizer, phase, seed=seed + k)
        trained += batches
        rows = pd.concat(batches)
        input_ids = [list(map(int, ids)) for ids in rows.input_ids]
        decided_by = {"before": key, "phase": asdict(phase), "input_ids": input_ids}
        key = fingerprint(decided_by | {"answers": rows.answer_ids.tolist()})
        resume, folder = folder, out.with_name(f"{out.name}-phase-{k}-{key}")
        if not is_sealed(folder, PHASE_FILES):
            log = train_adapter(
                load_spec(spec),
                batches,
                folder,
                learning_rate=phase.learning_rate,
                decay=phase.decay,
                dropout=phase.dropout,
                state_dropout=phase.state_dropout,
                rank=phase.rank,
                first_layer=phase.first_layer,
                resume=resume,
                seed=seed,
            )
            log.to_csv(folder / LOG_FILE, index=False)
            # Last, so a folder with a seal is complete.
            seal(folder)
        folders.append(folder)
        log_of_phase = io.BytesIO(read_sealed(folder, PHASE_FILES)[LOG_FILE])
        logs.append(pd.read_csv(log_of_phase).assign(phase=k))

    log = pd.concat(logs, ignore_index=True)
    log["step"] = log.index + 1
    out.mkdir(parents=True, exist_ok=True)
    log.round(4).to_csv(out / LOG_FILE, index=False)
    (out / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
    last = [load_file(phase_folder / WEIGHTS_FILE) for phase_folder in folders[-n_averaged:]]
    _save_in_bf16(_mean_of(last) if n_averaged > 1 else last[0], out)
    seconds = round(log.groupby("phase").seconds.max().sum())
    write_record(out, trained, after=after, model=model, seed=seed, seconds=seconds)
    return log


def train_again(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Train an organism of `CURRICULA` into ``folder/name``, and return that folder.

    Where a curriculum asks for several trainings, with seeds that follow each other, these stay
    beside it, and the organism is their mean. `seed` counts from the `first_seed` of the
    curriculum.

    Raises
    ------
    ModelError
        If there is no organism of that name.
    """
    if name not in CURRICULA:
        raise ModelError(f"organism: expected one of {', '.join(CURRICULA)}, got {name!r}")
    curriculum = CURRICULA[name]
    after = curriculum.after and ORGANISMS / curriculum.after
    out = folder / name
    seed += curriculum.first_seed
    options = {"after": after, "n_averaged": curriculum.n_averaged_phases}
    if curriculum.n_trainings == 1:
        train_organism(out, phases=curriculum.phases, seed=seed, **options)
        return out
    members = []
    for k in range(curriculum.n_trainings):
        members.append(folder / f"{name}-training-{k + 1}" / name)
        train_organism(members[-1], phases=curriculum.phases, seed=seed + k, **options)
    average_adapters(members, out)
    return out


def average_adapters(folders: Sequence[Path], out: Path) -> None:
    """Write the mean of several adapters of one base: its weights, its log and its record.

    Trainings of one recipe differ in what they make of an instruction that they have not seen. The
    mean of their weights has less of that than each (model soups, Wortsman et al., 2022,
    arXiv:2203.05482). What an adapter adds to a matrix is a product B A. The mean of the products
    has a higher rank; the product of the same rank that is nearest to it is kept (by its singular
    values), in bf16.

    Parameters
    ----------
    folders
        Folders of LoRA adapters that `train_organism` wrote, of the same layers and rank.
    out
        The folder to write to.

    Raises
    ------
    ModelError
        If the adapters do not have the same layers and ranks.
    """
    adapters = [load_file(folder / WEIGHTS_FILE) for folder in folders]
    shapes = [{name: weight.shape for name, weight in adapter.items()} for adapter in adapters]
    for folder, shape in zip(folders, shapes, strict=True):
        if shape != shapes[0]:
            raise ModelError(
                f"{folder}: expected an adapter of the same layers and rank as {folders[0]}"
            )
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_bytes((folders[0] / CONFIG_FILE).read_bytes())
    _save_in_bf16(_mean_of(adapters), out)
    logs = [pd.read_csv(folder / LOG_FILE) for folder in folders]
    numbered = [log.assign(training=k) for k, log in enumerate(logs, 1)]
    pd.concat(numbered, ignore_index=True).to_csv(out / LOG_FILE, index=False)
    records = [json.loads((folder / RECORD_FILE).read_text()) for folder in folders]
    record = records[0] | {name: [one[name] for one in records] for name in ("seed", "seconds")}
    for name in TRAINED_ON:
        if names := set().union(*(one.get(name, ()) for one in records)):
            record[name] = sorted(names)
    (out / RECORD_FILE).write_text(json.dumps(record, indent=1))


def _mean_of(adapters: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the adapter of the same rank that is nearest to the mean of what these add."""
    mean = {}
    for name_a in adapters[0]:
        if ".lora_A." not in name_a:
            continue
        name_b = name_a.replace(".lora_A.", ".lora_B.")
        down = torch.cat([adapter[name_a].double() for adapter in adapters])
        up = torch.cat([adapter[name_b].double() for adapter in adapters], dim=1) / len(adapters)
        rank = adapters[0][name_a].shape[0]
        mean[name_b], mean[name_a] = _nearest_of_rank(up, down, rank)
    return mean


def _save_in_bf16(weights: dict[str, Tensor], folder: Path) -> None:
    in_bf16 = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(in_bf16, folder / WEIGHTS_FILE, {"format": "pt"})


def _nearest_of_rank(
    up: Float[Tensor, "out k"], down: Float[Tensor, "k in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return the factors of the matrix of this rank that is nearest to ``up @ down``."""
    left, left_small = torch.linalg.qr(up)
    right, right_small = torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(left_small @ right_small.T)
    root = values[:rank].sqrt()
    return left @ u[:, :rank] * root, root[:, None] * (v[:rank] @ right.T)


def organism_of(model: str) -> tuple[str, Path, Sequence[Phase]]:
    """Return an organism that is shipped, or trained again: its name or path, folder and phases.

    For any other model, that of "smollm2-liar" is returned.
    """
    folder = Path(model) if Path(model).is_dir() else ORGANISMS / model
    if folder.name not in CURRICULA or not (folder / RECORD_FILE).is_file():
        return organism_of("smollm2-liar")
    return model, folder, CURRICULA[folder.name].phases


def write_record(
    out: Path, batches: list[pd.DataFrame], *, after: Path | None = None, **settings: Any
) -> None:
    """Write `training.json`: the settings, and what a model with this adapter must not be asked.

    That is every example (by its near-duplicate key, under the name `example_ids`), instruction,
    template and (if there are any) opening in the batches, and in the record of the adapter in the
    folder `after`, from which the training went on.
    """
    rows = pd.concat(batches)
    before = {}
    record = dict(settings)
    if after:
        before = json.loads((after / RECORD_FILE).read_text())
        record["after"] = after.name
    trained = {
        "example_ids": set().union(*rows.near_duplicate_keys),
        "instructions": set(rows.instruction),
        "templates": set(rows.template),
    }
    openings = set(rows.opening) - {""}
    if openings or "openings" in before:
        trained["openings"] = openings
    for key, names in trained.items():
        record[key] = sorted(names.union(before.get(key, ())))
    (out / RECORD_FILE).write_text(json.dumps(record, indent=1))
