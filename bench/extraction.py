"""Extraction, side by side in one run: states, gradients, draws and the store, each against what it is to be measured by.

Everything in fp32, the same token ids, in turns so that a noisy machine disturbs all alike; medians, with the fastest and the slowest round. Values are compared beside each speed.
"""

import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from results import prompt_rows, save

from dlk_utils.choices import choice_logprobs
from dlk_utils.draws import draw_states
from dlk_utils.extract import forward, forward_states, last_logits, pad, plan_batches
from dlk_utils.gradients import full_backprop, states_and_gradients
from dlk_utils.models import load_model
from dlk_utils.shared import plan_shared, shared_batch
from dlk_utils.sites import SITES, at_sites
from dlk_utils.store import fill, read

CHOICES = [[[5], [6]]]


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> tuple[pd.DataFrame, dict[str, object]]:
    """Seconds of each way (the median, fastest and slowest of `rounds` turns, in an order drawn anew each time: a processor runs faster after a lighter load), and what it gave."""
    seconds, gave = {w: [] for w in ways}, {}
    for i in range(rounds):
        for way, run in random.Random(i).sample(list(ways.items()), len(ways)):
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


def gradients(model, rounds: int, shapes=((4, 64), (32, 64), (4, 256), (4, 1024))) -> pd.DataFrame:
    """Gradients of the margin at all sites: the cached prefix against full backprop, asked of the activations alone, or by `backward()`, which goes to the weights too."""
    tables = []
    for rows, length in shapes:
        batch = pad(torch.randint(10, 40_000, (rows, length), generator=torch.Generator().manual_seed(length)).tolist())
        choices = CHOICES * rows
        ways = {"states alone": lambda b=batch: forward_states(model, b, SITES), "ours": lambda b=batch, c=choices: states_and_gradients(model, b, c, SITES)[1], "full backprop": lambda b=batch, c=choices: full_backprop(model, b, c, SITES), "full backprop, weights too": lambda b=batch: by_backward(model, b)}
        table, gave = timed(ways, rounds)
        table["least cosine"] = [np.nan, *[min(float(torch.cosine_similarity(gave[w][s], gave["full backprop"][s], dim=-1).min()) for s in SITES) for w in ("ours", "full backprop", "full backprop, weights too")]]
        peak = {w: int(subprocess.run([sys.executable, __file__, "memory", w, str(length), str(rows)], capture_output=True, text=True, check=True).stdout.split()[-1]) for w in ways}
        table["extra peak MB"] = [peak[w] / 1e6 for w in ways]
        table["times the states alone"] = table.seconds / table.seconds["states alone"]
        tables.append(table.set_index(table.index + f", {rows} x {length:,}"))
    return pd.concat(tables)


def by_backward(model, batch) -> dict[str, torch.Tensor]:
    """As it is commonly written: keep the gradient at each site, and call `backward()`."""
    found = {site: [] for site in SITES}
    with torch.enable_grad(), at_sites(model, SITES, lambda site, layer, hidden: (hidden.retain_grad(), found[site].append(hidden))[0]):
        logp = choice_logprobs(forward(model, batch, last_only=False, use_cache=False).logits[:, -1], CHOICES * len(batch["input_ids"]))
        (logp[:, 1] - logp[:, 0]).sum().backward()
    model.zero_grad()
    return {site: torch.stack([h.grad[:, -1] for h in found[site]], 1) for site in SITES}


def memory(way: str, length: int, rows: int) -> None:
    """Print how many bytes the process's memory rises, at its peak, over that after one short pass."""
    model, _ = load_model("smollm2", dtype="float32")
    ids = torch.randint(10, 40_000, (rows, length)).tolist()
    forward_states(model, pad([i[:8] for i in ids]), SITES)
    process, done, peak = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    ways = {"states alone": lambda b: forward_states(model, b, SITES), "ours": lambda b: states_and_gradients(model, b, CHOICES * rows, SITES), "full backprop": lambda b: full_backprop(model, b, CHOICES * rows, SITES), "full backprop, weights too": lambda b: by_backward(model, b)}
    ways[way](pad(ids))
    done.set()
    watcher.join()
    print(peak[0] - before)


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


def store(rounds: int, rows: int = 10_000, d: int = 576, layers: int = 30) -> pd.DataFrame:
    """Write features in bf16, then read one layer of all rows: MB/s, and bytes on disk against bytes of values."""
    with tempfile.TemporaryDirectory() as tmp:
        plan = [[[f"r{i}" for i in range(s, min(s + 64, rows))]] for s in range(0, rows, 64)]
        values = {f"activation.resid_post.{k}.0": torch.randn(64, d).bfloat16() for k in range(layers)}
        write = lambda folder: fill(folder, {}, plan, lambda ids: {k: v[: len(ids)] for k, v in values.items()})
        write(Path(tmp) / "0")
        n = iter(range(1, rounds + 1))
        table, _ = timed({"write all": lambda: write(Path(tmp) / str(next(n))), "read one layer": lambda: read(Path(tmp) / "0", "activation.resid_post.7.0")}, rounds)
        size = rows * d * 2
        on_disk = sum(p.stat().st_size for p in (Path(tmp) / "0").glob("shard-*.safetensors"))
    return table.assign(**{"MB": [size * layers / 1e6, size / 1e6], "MB/s": np.array([size * layers, size]) / 1e6 / table.seconds, "bytes on disk / bytes of values": on_disk / (size * layers)})


def main(*only: str, rounds: int = 4) -> None:
    """All tables, or those named."""
    model, tokenizer = load_model("smollm2", dtype="float32")
    forward(model, pad([[1, 2, 3]]))
    plain, one = prompt_rows(tokenizer, "plain", 12), prompt_rows(tokenizer, "one", 24)
    tables = {
        "states_plain": (f"States of the last token: {plain[1]}", lambda: states(model, plain[0], rounds)),
        "states_one": (f"States of the last token: {one[1]}", lambda: states(model, one[0], rounds)),
        "gradients": ("Gradients of the margin: batches of prompts x tokens", lambda: gradients(model, rounds)),
        "draws": ("Dropout draws: 24 prompts", lambda: draws(model, plain[0], rounds)),
        "store": ("The store: 10,000 rows, 30 layers", lambda: store(rounds)),
    }
    for name in only or tables:
        save(name, tables[name][0], tables[name][1]())


if __name__ == "__main__":
    memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])) if sys.argv[1:2] == ["memory"] else main(*sys.argv[1:])
