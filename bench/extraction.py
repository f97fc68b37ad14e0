"""Time extraction: states, gradients, dropout draws and the store, each against its reference.

Everything is in fp32, on the same token ids. `python bench/extraction.py [TABLE ...]` writes all
tables, or those named, to `bench/results`.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gradients import time_gradients, time_gradients_by_part, weigh_gradients
from results import add_parity, batches_of, prompt_rows, save, time_ways, token_ids
from torch import Tensor

from dlk_utils.extract.batches import forward, last_logits, pad
from dlk_utils.extract.draws import draw_states
from dlk_utils.extract.packing import plan_shared, shared_batch
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import fill, read
from dlk_utils.models.loading import load_model
from dlk_utils.models.sites import SITES

RESID = ["resid_post"]
P = 0.1
"""Share of the channels that the timed draws drop; it does not change what they cost."""


def time_states(model: Any, rows: pd.DataFrame, rounds: int) -> pd.DataFrame:
    """Time the last-token states of all layers.

    Values are compared with those of one prompt at a time, except of the last layer, which
    transformers gives after the final norm.
    """
    plan = batches_of(rows)
    batches = [pad(token_ids(rows, batch)) for batch in plan]
    order = list(chain(*plan))
    prompts = token_ids(rows, order)
    by_one = "one at a time, output_hidden_states"
    padded = "padded to 512, output_hidden_states"
    ways = {
        "bare forward, our batches (the limit)": lambda: [last_logits(model, b) for b in batches],
        "ours, resid_post": lambda: batched_states(model, batches, RESID),
        "ours, all four sites": lambda: batched_states(model, batches, SITES),
        "ours, all four sites, shared prefixes": shared_states(model, rows, order, SITES),
        by_one: lambda: hidden_states(model, [pad([prompt]) for prompt in prompts]),
    }
    # Padding to 512 takes long: it is timed once, on short prompts alone.
    if max(map(len, prompts)) < 200:
        ways[padded] = lambda: hidden_states(model, padded_batches(prompts, 512))

    table, values = time_ways(ways, rounds, once=[padded])
    for way in list(ways)[1:]:
        add_parity(table, way, (values[way][:-1], values[by_one][:-1]))
    return add_speed(table, rows)


def batched_states(model: Any, batches: Sequence[dict], sites: Sequence[str]) -> Tensor:
    """Take the states of given sites by our engine; return `resid_post` [layer, n, d]."""
    states = [forward_states(model, batch, sites)[0]["resid_post"] for batch in batches]
    return torch.cat(states, 1)


def shared_states(
    model: Any, rows: pd.DataFrame, order: Sequence[str], sites: Sequence[str]
) -> Callable[[], Tensor]:
    """Plan batches that share prefixes; return the function that takes their states.

    It returns `resid_post` [layer, n, d] of the rows in `order`.
    """
    plan = batches_of(rows, plan_shared)
    place = {row_id: i for i, row_id in enumerate(chain(*plan))}
    in_order = [place[row_id] for row_id in order]

    def run() -> Tensor:
        batches = (shared_batch(model, token_ids(rows, batch)) for batch in plan)
        return batched_states(model, batches, sites)[:, in_order]

    return run


@torch.no_grad()
def hidden_states(model: Any, batches: Sequence[dict] | Iterator[dict]) -> Tensor:
    """Take last-token states [layer, n, d] in the plain way, by `output_hidden_states`."""
    states = []
    for batch in batches:
        output = model(**batch, output_hidden_states=True, use_cache=False)
        states.append(torch.stack([hidden[:, -1] for hidden in output.hidden_states[1:]]))
    return torch.cat(states, 1)


def padded_batches(prompts: Sequence[list[int]], width: int, size: int = 8) -> Iterator[dict]:
    """Give batches of `size` prompts, padded on the left to one width whatever their length."""
    for i in range(0, len(prompts), size):
        batch = prompts[i : i + size]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        yield {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def add_speed(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add tokens per second, and the speed as a share of the first way's, the bare pass."""
    table["tokens/s"] = rows.input_ids.map(len).sum() / table.seconds
    table["share of the limit"] = table.seconds.iloc[0] / table.seconds
    return table


def time_draws(
    model: Any, rows: pd.DataFrame, rounds: int, n: int, scopes: Sequence[str]
) -> pd.DataFrame:
    """Time dropout draws of the first `n` prompts, in passes: 1 is one plain pass over them.

    The first draw of the first prompt and the last draw of the last one are compared with the same
    draws of that prompt alone.
    """
    prompts = token_ids(rows, rows.index[:n])
    batch = pad(prompts)
    plain = "one pass"

    def seeds(draws: Sequence[int], row_numbers: Sequence[int]) -> list[list[int]]:
        return [[draw * n + row for row in row_numbers] for draw in draws]

    def draw(n_draws: int, scope: str) -> list[Tensor]:
        drawn = draw_states(
            model, batch, RESID, seeds=seeds(range(n_draws), range(n)), p=P, scope=scope
        )
        return [states["resid_post"] for states, _ in drawn]

    def alone(row: int, number: int, scope: str | None) -> Tensor:
        single = pad([prompts[row]])
        if scope is None:
            states, _ = forward_states(model, single, RESID)
        else:
            [(states, _)] = draw_states(
                model, single, RESID, seeds=seeds([number], [row]), p=P, scope=scope
            )
        return states["resid_post"][:, 0]

    cases = {f"{k} draws, {scope}": (k, scope) for scope in scopes for k in (2, 8, 32)}
    ways = {plain: lambda: [forward_states(model, batch, RESID)[0]["resid_post"]]}
    ways |= {way: lambda case=case: draw(*case) for way, case in cases.items()}
    table, values = time_ways(ways, rounds)
    for way, (n_draws, scope) in ({plain: (1, None)} | cases).items():
        ends = [(0, 0), (n - 1, n_draws - 1)]
        pairs = [(values[way][k][:, row], alone(row, k, scope)) for row, k in ends]
        add_parity(table, way, *pairs)
    table["passes"] = table.seconds / table.seconds[plain]
    return table.set_index(table.index + f", {n} prompts")


def time_store(rounds: int, rows: int = 10_000, d: int = 576, layers: int = 30) -> pd.DataFrame:
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


def main(*names: str, rounds: int = 3) -> None:
    """Write all tables, or those named."""
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    # The first pass of a process is slower than the others.
    forward(model, pad([[1, 2, 3]]))
    plain, about_plain = prompt_rows(tokenizer, "plain", 12)
    shots, about_shots = prompt_rows(tokenizer, "one", 24)

    def draws() -> pd.DataFrame:
        both = time_draws(model, plain, rounds, 24, ["last_token", "sequence"])
        fewer = time_draws(model, plain, rounds, 12, ["last_token"])
        return pd.concat([both, fewer])

    tables = {
        "states_plain": (
            f"States of the last token: {about_plain}",
            lambda: time_states(model, plain, rounds),
        ),
        "states_one": (
            f"States of the last token: {about_shots}",
            lambda: time_states(model, shots, rounds),
        ),
        "gradients": (
            "Gradients of the margin: batches of prompts x tokens",
            lambda: time_gradients(model, rounds),
        ),
        "gradients_profile": (
            "Where the gradients' time goes",
            lambda: time_gradients_by_part(model, rounds),
        ),
        "memory": ("Extra peak memory of the gradients", weigh_gradients),
        "draws": ("Dropout draws", draws),
        "store": (
            "The store: 10,000 examples of one row, 30 layers",
            lambda: time_store(rounds),
        ),
    }
    for name in names or tables:
        title, measure = tables[name]
        save(name, title, measure())


if __name__ == "__main__":
    main(*sys.argv[1:])
