"""Extraction, side by side in one run: states, gradients, draws and the store, each against what it is to be measured by.

Everything in fp32, the same token ids, in turns so that a noisy machine disturbs all alike; medians, with the fastest and the slowest round. Values are compared beside each speed.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from results import save

from dlk_utils.draws import draw_states
from dlk_utils.examples import load_examples
from dlk_utils.extract import forward, forward_states, last_logits, pad, plan_batches
from dlk_utils.gradients import full_backprop, states_and_gradients
from dlk_utils.models import load_model
from dlk_utils.prompts import make_prompts
from dlk_utils.shared import plan_shared, shared_batch
from dlk_utils.sites import SITES
from dlk_utils.store import fill, read

CHOICES = [[[5], [6]]]


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> tuple[pd.DataFrame, dict[str, object]]:
    """Seconds of each way (the median, fastest and slowest of `rounds` turns), and what it gave."""
    seconds, gave = {w: [] for w in ways}, {}
    for _ in range(rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            gave[way] = run()
            seconds[way].append(time.perf_counter() - start)
    return pd.DataFrame({w: {"seconds": np.median(s), "fastest": min(s), "slowest": max(s)} for w, s in seconds.items()}).T, gave


def states(model, rows: pd.DataFrame, rounds: int) -> pd.DataFrame:
    """Last-token states of all layers."""
    names = [batch for shard in plan_batches(rows, 2048) for batch in shard]
    plan = [[list(rows.input_ids[r]) for r in batch] for batch in names]
    groups = [batch for shard in plan_shared(rows, 2048) for batch in shard]

    def ours(sites):
        return torch.cat([forward_states(model, pad(b), sites)[0]["resid_post"] for b in plan])

    def ours_shared(sites):
        found = {}
        for batch in groups:
            found |= dict(zip(batch, forward_states(model, shared_batch(model, list(rows.input_ids[batch])), sites)[0]["resid_post"], strict=True))
        return torch.stack([found[r] for batch in names for r in batch])

    @torch.no_grad()
    def hidden(batches):
        return torch.cat([torch.stack([h[:, -1] for h in model(**b, output_hidden_states=True, use_cache=False).hidden_states[1:]], 1) for b in batches])

    def padded(width: int):
        for i in range(0, len(order), 8):
            ids = torch.zeros(len(order[i : i + 8]), width, dtype=torch.long)
            for j, p in enumerate(order[i : i + 8]):
                ids[j, width - len(p) :] = torch.tensor(p)
            mask = (torch.arange(width) >= width - torch.tensor([[len(p)] for p in order[i : i + 8]])).long()
            yield {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    order = [p for b in plan for p in b]
    ways = {
        "bare forward, our batches (the limit)": lambda: [last_logits(model, pad(b)) for b in plan],
        "ours, resid_post": lambda: ours(["resid_post"]),
        "ours, all four sites": lambda: ours(SITES),
        "ours, all four sites, shared prefixes": lambda: ours_shared(SITES),
        "one at a time, output_hidden_states": lambda: hidden([pad([p]) for p in order]),
    }
    if max(map(len, order)) < 200:  # a look at what it costs, on short prompts alone: minutes
        ways["padded to 512, output_hidden_states"] = lambda: hidden(padded(512))
    table, gave = timed(ways, rounds)
    reference = gave["one at a time, output_hidden_states"][:, :-1]  # the last has the final norm in it
    table["largest difference"] = [float((gave[w][:, :-1] - reference).abs().max()) if torch.is_tensor(gave[w]) else np.nan for w in ways]
    return table.assign(**{"tokens/s": sum(map(len, order)) / table.seconds, "share of the limit": table.seconds.iloc[0] / table.seconds})


def gradients(model, rounds: int, lengths=(64, 256, 1024), rows: int = 4) -> pd.DataFrame:
    """Gradients of the margin at all sites: full backprop against the cached prefix."""
    tables = []
    for length in lengths:
        batch = pad(torch.randint(10, 40_000, (rows, length), generator=torch.Generator().manual_seed(length)).tolist())
        ways = {"states alone": lambda b=batch: forward_states(model, b, SITES), "ours": lambda b=batch: states_and_gradients(model, b, CHOICES * rows, SITES)[1], "full backprop": lambda b=batch: full_backprop(model, b, CHOICES * rows, SITES)}
        table, gave = timed(ways, rounds)
        table["least cosine"] = [np.nan, *[min(float(torch.cosine_similarity(gave[w][s], gave["full backprop"][s], dim=-1).min()) for s in SITES) for w in ("ours", "full backprop")]]
        peak = {w: int(subprocess.run([sys.executable, __file__, "memory", w, str(length), str(rows)], capture_output=True, text=True, check=True).stdout.split()[-1]) for w in ways}
        table["extra peak MB"] = [peak[w] / 1024 for w in ways]
        tables.append(table.set_index(table.index + f", {length:,} tokens"))
    return pd.concat(tables)


def memory(way: str, length: int, rows: int) -> None:
    """Print how much the process's peak memory (kB) rises over that of one short pass."""
    model, _ = load_model("smollm2", dtype="float32")
    ids = torch.randint(10, 40_000, (rows, length)).tolist()
    forward_states(model, pad([i[:8] for i in ids]), SITES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    {"states alone": lambda: forward_states(model, pad(ids), SITES), "ours": lambda: states_and_gradients(model, pad(ids), CHOICES * rows, SITES), "full backprop": lambda: full_backprop(model, pad(ids), CHOICES * rows, SITES)}[way]()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def draws(model, rows: pd.DataFrame, rounds: int) -> pd.DataFrame:
    """Dropout draws by number and scope, against as many plain passes."""
    batch = pad([list(i) for i in rows.input_ids.head(24)])
    b = len(batch["input_ids"])
    ways = {"one pass": lambda: forward_states(model, batch, ["resid_post"])}
    for scope, ks in (("sequence", (2, 8)), ("last_token", (2, 8, 32))):
        for k in ks:
            ways[f"{k} draws, {scope}"] = lambda scope=scope, k=k: draw_states(model, batch, ["resid_post"], seeds=[list(range(i * b, (i + 1) * b)) for i in range(k)], p=0.1, scope=scope)
    table, _ = timed(ways, rounds)
    return table.assign(passes=table.seconds / table.seconds.iloc[0])


def store(rounds: int, rows: int = 2048, d: int = 576, layers: int = 30) -> pd.DataFrame:
    """Write features in bf16, then read one layer of all rows: MB/s, and bytes on disk against bytes of values."""
    with tempfile.TemporaryDirectory() as tmp:
        plan = [[[f"r{i}" for i in range(s, s + 64)]] for s in range(0, rows, 64)]
        values = {f"activation.resid_post.{k}.0": torch.randn(64, d).bfloat16() for k in range(layers)}
        n = iter(range(rounds))
        table, _ = timed({"write all": lambda: fill(Path(tmp) / str(next(n)), {}, plan, lambda ids: values), "read one layer": lambda: read(Path(tmp) / "0", "activation.resid_post.7.0")}, rounds)
        size = rows * d * 2
        on_disk = sum(p.stat().st_size for p in (Path(tmp) / "0").glob("shard-*.safetensors"))
    return table.assign(**{"MB": [size * layers / 1e6, size / 1e6], "MB/s": np.array([size * layers, size]) / 1e6 / table.seconds, "bytes on disk / bytes of values": on_disk / (size * layers)})


def main(n_examples: int = 12, rounds: int = 3) -> None:
    model, tokenizer = load_model("smollm2", dtype="float32")
    forward(model, pad([[1, 2, 3]]))
    examples = load_examples("rotten_tomatoes", n_examples)
    plain, with_shots = (make_prompts(examples, tokenizer, n_shots=n).set_index("row_id", drop=False) for n in (0, 2))
    for name, rows, shots in (("states", plain, "no"), ("states_shots", with_shots, "two")):
        save(name, f"States of the last token: {len(rows)} prompts of {rows.input_ids.map(len).mean():.0f} tokens, {shots} shots", states(model, rows, rounds))
    save("gradients", "Gradients of the margin: four prompts of 64, 256 and 1,024 tokens", gradients(model, rounds))
    save("draws", "Dropout draws: 24 prompts", draws(model, plain, rounds))
    save("store", "The store: 2,048 rows, 30 layers", store(rounds))


if __name__ == "__main__":
    memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])) if sys.argv[1:2] == ["memory"] else main(*map(int, sys.argv[1:]))
