"""Time extraction: states, gradients, answers, dropout draws and the store.

Everything is in fp32 on the same token ids, unless a table says otherwise, and is compared with a
reference. `python bench/extraction.py [TABLE ...]` writes all tables, or those named, to
`bench/results`.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gradients import time_gradients, weigh_gradients
from growth import N_LAYERS, measure_growth, warm_up, weigh_packing
from results import (
    ROUNDS,
    TRIAL,
    add_logprob_parity,
    add_parity,
    describe_size,
    in_order_of,
    packed_plan,
    padded_batches,
    padded_plan,
    prompt_rows,
    save,
    time_ways,
    token_ids,
)
from torch import Tensor

from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import Batch, last_logits, pad
from dlk_utils.extract.gradients import full_backprop, states_and_gradients
from dlk_utils.extract.passes import activations, answer_logprobs, dropout_draws, margin_gradients
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import fill, read
from dlk_utils.models.loading import load_model
from dlk_utils.models.sites import SITES

BARE = "bare pass"
"""The forward pass over all tokens of the prompts, in padded batches of prompts sorted by length,
with logits at the last tokens alone."""

OURS = "ours"
P = 0.1
"""Share of the channels that the timed draws drop; it does not change what they cost."""

NATIVE_BF16 = ("avx512_bf16", "amx_bf16")
"""Flags of processors that multiply matrices of bf16."""


# States.


def bare_pass(model: Any, batches: Iterable[Batch]) -> Tensor:
    """Run padded batches; return the logits [n, vocab] after each prompt."""
    return torch.cat([last_logits(model, batch) for batch in batches])


def our_states(model: Any, rows: pd.DataFrame) -> np.ndarray:
    """Take the last-token states [layer, n, d] at `resid_post`, as a user does."""
    return activations(model, list(rows.input_ids), progress=False)["resid_post"]


def time_states(model: Any, rows: pd.DataFrame, rounds: int) -> pd.DataFrame:
    """Time the last-token states of all layers against the bare pass.

    The states of the first and the last prompts are compared with those of each prompt alone.
    """
    batches = padded_batches(rows, padded_plan(rows))
    ways = {BARE: lambda: bare_pass(model, batches), OURS: lambda: our_states(model, rows)}
    table, values = time_ways(ways, rounds)
    few = [0, 1, 2, 3, -4, -3, -2, -1]
    alone = [forward_states(model, pad([rows.input_ids.iloc[i]]), ["resid_post"])[0] for i in few]
    reference = torch.cat([states["resid_post"] for states in alone], 1)
    add_parity(table, OURS, (values[OURS][:, few], reference))
    return add_speed(table, rows)


def add_speed(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add tokens per second, and the speed as a multiple of the bare pass's."""
    table["tokens/s"] = rows.input_ids.map(len).sum() / table.seconds
    table["times as fast as the bare pass"] = table.seconds[BARE] / table.seconds
    return table


# Answers, states and gradients.


def time_together(model: Any, rows: pd.DataFrame, rounds: int) -> pd.DataFrame:
    """Time answers, states and gradients of one pass, of three passes, and of full backprop.

    States and gradients are of all layers and sites. Values are compared with full backprop, which
    takes long and runs in the first round only, and with the answers of the bare pass.
    """
    plan = padded_plan(rows)
    batches, order = padded_batches(rows, plan), in_order_of(plan, rows)
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    together, full = "ours, one pass for all three", "full backprop, gradients alone"
    answers, states, gradients = (
        "ours, answers alone",
        "ours, states alone",
        "ours, gradients alone",
    )
    options = {"sites": SITES, "progress": False}
    ways: dict[str, Callable[[], Any]] = {
        BARE: lambda: bare_pass(model, batches),
        together: lambda: all_of_one_pass(model, rows),
        answers: lambda: answer_logprobs(model, prompts, choices, progress=False)[0],
        states: lambda: activations(model, prompts, **options),
        gradients: lambda: margin_gradients(model, prompts, choices, **options),
        full: lambda: padded_gradients(model, rows, plan),
    }
    table, values = time_ways(ways, rounds, once=[full])

    reference = values[full]
    one_pass_states, one_pass_gradients, one_pass_answers = values[together]
    bare_answers = choice_logprobs(values[BARE][order], choices)
    add_parity(
        table,
        together,
        *((one_pass_gradients[site], reference[site]) for site in SITES),
        *((one_pass_states[site], values[states][site]) for site in SITES),
    )
    add_parity(table, gradients, *((values[gradients][site], reference[site]) for site in SITES))
    add_logprob_parity(table, together, one_pass_answers, bare_answers)
    add_logprob_parity(table, answers, values[answers], bare_answers)

    columns = ["seconds", "fastest", "slowest"]
    three = table.loc[[answers, states, gradients], columns].sum()
    table.loc["ours, three passes (the sum)", columns] = three
    table["bare passes"] = table.seconds / table.seconds[BARE]
    return table


def all_of_one_pass(model: Any, rows: pd.DataFrame) -> tuple[dict, dict, Tensor]:
    """Take states, gradients and answers, each batch in one pass, in the order of the rows."""
    plan = packed_plan(rows)
    states: dict[str, list[Tensor]] = {site: [] for site in SITES}
    gradients: dict[str, list[Tensor]] = {site: [] for site in SITES}
    logprobs = []
    for batch in plan:
        choices = list(rows.choice_ids[batch])
        of_batch = states_and_gradients(model, token_ids(rows, batch), choices, SITES)
        for site in SITES:
            states[site].append(of_batch[0][site])
            gradients[site].append(of_batch[1][site])
        logprobs.append(choice_logprobs(of_batch[2], choices))
    order = in_order_of(plan, rows)
    return (
        {site: torch.cat(by_batch, 1)[:, order] for site, by_batch in states.items()},
        {site: torch.cat(by_batch, 1)[:, order] for site, by_batch in gradients.items()},
        torch.cat(logprobs)[order],
    )


def padded_gradients(
    model: Any, rows: pd.DataFrame, plan: Sequence[Sequence[str]]
) -> dict[str, Tensor]:
    """Take gradients by full backprop of padded batches, in the order of the rows."""
    gradients: dict[str, list[Tensor]] = {site: [] for site in SITES}
    for row_ids, batch in zip(plan, padded_batches(rows, plan), strict=True):
        of_batch = full_backprop(model, batch, list(rows.choice_ids[row_ids]), SITES)
        for site in SITES:
            gradients[site].append(of_batch[site])
    order = in_order_of(plan, rows)
    return {site: torch.cat(by_batch, 1)[:, order] for site, by_batch in gradients.items()}


# Draws.


def time_draws(model: Any, rows: pd.DataFrame, rounds: int) -> pd.DataFrame:
    """Time dropout draws in passes: 1 is one padded pass over the same prompts, without dropout.

    The draws of the first and of the last prompt are compared with those of that prompt alone.
    """
    plan = padded_plan(rows)
    batches, order = padded_batches(rows, plan), in_order_of(plan, rows)
    padded, packed = "clean pass, padded", "clean pass, packed"

    def clean_padded() -> Tensor:
        states = [forward_states(model, b, ["resid_post"], with_logits=False)[0] for b in batches]
        return torch.cat([by_site["resid_post"] for by_site in states], 1)[:, order]

    def draw(some: pd.DataFrame, scope: str, n_draws: int) -> np.ndarray:
        starts = list(some.question_start) if scope == "question" else None
        draws = dropout_draws(
            model,
            list(some.input_ids),
            n_draws=n_draws,
            p=P,
            scope=scope,
            keys=list(some.row_id),
            question_starts=starts,
            progress=False,
        )
        return draws["resid_post"]

    cases = [("sequence", 2), ("question", 2), ("last_token", 2), ("last_token", 32)]
    draws = {f"{n_draws} draws, {scope}": (scope, n_draws) for scope, n_draws in cases}
    ways: dict[str, Callable[[], Any]] = {
        padded: clean_padded,
        packed: lambda: our_states(model, rows),
    }
    ways |= {way: lambda case=case: draw(rows, *case) for way, case in draws.items()}
    table, values = time_ways(ways, rounds)

    add_parity(table, packed, (values[packed], values[padded]))
    for way, case in draws.items():
        ends = (0, len(rows) - 1)
        alone = np.concatenate([draw(rows.iloc[[i]], *case) for i in ends], 2)
        add_parity(table, way, (values[way][:, :, list(ends)], alone))
    table["passes"] = table.seconds / table.seconds[padded]
    table["passes per draw"] = table.passes / pd.Series({way: n for way, (_, n) in draws.items()})
    return table


# Number formats.


def time_bf16(model: Any, rows: pd.DataFrame, rounds: int) -> pd.DataFrame:
    """Time states in fp32 and, where the processor has it natively, in bf16.

    The states of either format are compared with those in fp32 of the bare pass's batches. Those in
    bf16 cannot be the same, so they are kept as a note, in a column of their own.
    """
    batches = padded_batches(rows, padded_plan(rows))
    models = {"fp32": model}
    if has_native_bf16():
        models["bf16"], _ = load_model("smollm2", dtype="bfloat16", device="cpu")
        warm_up(models["bf16"])
    ways: dict[str, Callable[[], Any]] = {}
    for name, of_format in models.items():
        ways[f"{BARE}, {name}"] = lambda m=of_format: bare_pass(m, batches)
        ways[f"{OURS}, {name}"] = lambda m=of_format: our_states(m, rows)
    table, values = time_ways(ways, rounds)
    exact = torch.as_tensor(values[f"{OURS}, fp32"]).double()
    for name in models:
        cosine = torch.cosine_similarity(
            torch.as_tensor(values[f"{OURS}, {name}"]).double(), exact, dim=-1
        )
        table.loc[f"{OURS}, {name}", "mean cosine with fp32"] = float(cosine.mean())
        bare, ours = table.seconds[f"{BARE}, {name}"], table.seconds[f"{OURS}, {name}"]
        table.loc[f"{OURS}, {name}", "times as fast as the bare pass"] = bare / ours
    table["times as fast as in fp32"] = [
        table.seconds[way.replace("bf16", "fp32")] / table.seconds[way] for way in table.index
    ]
    return table


def has_native_bf16() -> bool:
    """Whether the processor multiplies matrices of bf16; elsewhere they are emulated, slowly."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    return bool(words & set(NATIVE_BF16))


# The store.


def time_store(
    rounds: int, rows: int = 500 if TRIAL else 10_000, d: int = 576, layers: int = 30
) -> pd.DataFrame:
    """Time writing features in bf16, and reading one layer of all rows; count the bytes on disk.

    The bytes on disk are those of all files, manifest and checksums included.
    """
    names = [f"activation.resid_post.{layer}.0" for layer in range(layers)]
    row_ids = [f"{i:016x}" for i in range(rows)]
    plan = [[row_ids[i : i + 64]] for i in range(0, rows, 64)]
    values = {name: torch.randn(64, d).bfloat16() for name in names}

    def write(folder: Path) -> None:
        def compute(batch: list[str]) -> dict[str, Tensor]:
            return {name: x[: len(batch)] for name, x in values.items()}

        fill(folder, {}, plan, compute, examples=dict(zip(row_ids, row_ids, strict=True)))

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "read"
        write(folder)
        new_folders = (Path(tmp) / str(i) for i in range(rounds))
        writing, _ = time_ways({"write all": lambda: write(next(new_folders))}, rounds)
        # Reading takes milliseconds, so it is repeated more often.
        ways = {"read one layer": lambda: read(folder, names[7])}
        reading, read_values = time_ways(ways, 5 * rounds)
        on_disk = sum(path.stat().st_size for path in folder.iterdir())

    written = torch.cat([values[names[7]][: len(batch)] for [batch] in plan])
    one_layer = rows * d * 2
    size = pd.Series({"write all": one_layer * layers, "read one layer": one_layer})
    table = pd.concat([writing, reading])
    difference = (read_values["read one layer"] - written).abs().max()
    table.loc["read one layer", "largest difference"] = float(difference)
    table["MB"] = size / 1e6
    table["MB/s"] = table["MB"] / table.seconds
    table.loc["write all", "bytes on disk / bytes of values"] = on_disk / size["write all"]
    table["bytes per example"] = np.array([on_disk, one_layer]) / rows
    return table


# All tables.


def main(*names: str, rounds: int = ROUNDS) -> None:
    """Write all tables, or those named."""
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    warm_up(model)
    default, about_default = prompt_rows(tokenizer, "default")
    # One instruction's prompts: many draws of all of them would take too long.
    one_instruction = default[default.instruction == default.instruction.iloc[0]]
    about_one = f"the default run's prompts of one instruction ({describe_size(one_instruction)})"
    note = "" if has_native_bf16() else "; bf16 is left out, as this processor does not have it"

    def default_two_shots() -> tuple[str, pd.DataFrame]:
        rows, about = prompt_rows(tokenizer, "default_two_shots")
        return f"States, two shots: {about}", time_states(model, rows, min(2, rounds))

    tables: dict[str, Callable[[], tuple[str, pd.DataFrame]]] = {
        "together": lambda: (
            f"Answers, states and gradients of four sites: {about_default}",
            time_together(model, default, rounds),
        ),
        "default_two_shots": default_two_shots,
        "draws": lambda: (
            f"Dropout draws: {about_one}",
            time_draws(model, one_instruction, rounds),
        ),
        "growth": lambda: (
            f"States of growing numbers of prompts, the first {N_LAYERS} layers",
            measure_growth(),
        ),
        "packing_memory": lambda: (
            f"Extra peak memory of packed and padded batches: {about_default}",
            weigh_packing(),
        ),
        "bf16": lambda: (
            f"Number formats: {about_one}{note}",
            time_bf16(model, one_instruction, rounds),
        ),
        "gradients": lambda: (
            "Gradients of the margin: batches of prompts x tokens that share no prefix",
            time_gradients(model, rounds),
        ),
        "gradients_memory": lambda: (
            "Extra peak memory of the gradients",
            weigh_gradients(),
        ),
        "store": lambda: (
            "The store: 10,000 examples of one row, 30 layers",
            time_store(rounds),
        ),
    }
    unknown = set(names) - set(tables)
    if unknown:
        raise SystemExit(f"tables: expected some of {', '.join(tables)}, got {', '.join(unknown)}")
    for name in names or tables:
        print(f"{name}:", flush=True)
        title, table = tables[name]()
        save(name, title, table)


if __name__ == "__main__":
    main(*sys.argv[1:])
