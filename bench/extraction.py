"""Extraction, side by side in one run: states, gradients, draws and the store, each against what it is to be measured by.

Everything in fp32, the same token ids, in turns so that a noisy machine disturbs all alike; medians, with the fastest and the slowest round. Values are compared beside each speed.
"""

import contextlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from results import prompt_rows, save

from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import forward, last_logits, pad, plan_batches
from dlk_utils.extract.draws import draw_states
from dlk_utils.extract.gradients import full_backprop, states_and_gradients
from dlk_utils.extract.packing import plan_shared, shared_batch
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import fill, read
from dlk_utils.models.loading import load_model
from dlk_utils.models.sites import SITES, at_sites, blocks

CHOICES = [[[5], [6]]]
LEAST = "the last token's products alone"
PRODUCTS = {"aten::mm", "aten::addmm"}
ATTENTION = (
    "aten::bmm",
    "aten::_flash_attention",
    "aten::_scaled_dot_product",
    "aten::_softmax",
    "aten::_safe_softmax",
)


def timed(
    ways: dict[str, Callable[[], object]], rounds: int, *, once: Sequence[str] = ()
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Seconds of each way (the median, fastest and slowest of `rounds` turns, in an order drawn anew each time: a processor runs faster after a lighter load), and what it gave. Those `once` run, long ones, take part in the first turn only."""
    seconds, gave = {w: [] for w in ways}, {}
    for i in range(rounds):
        turn = [w for w in ways if i == 0 or w not in once]
        for way in random.Random(i).sample(turn, len(turn)):
            start = time.perf_counter()
            gave[way] = ways[way]()
            seconds[way].append(time.perf_counter() - start)
    return pd.DataFrame(
        {
            w: {"seconds": np.median(s), "fastest": min(s), "slowest": max(s)}
            for w, s in seconds.items()
        }
    ).T, gave


def apart(*pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """The largest difference, and the least cosine over the last axis, of all pairs of tensors."""
    return max(float((a - b).abs().max()) for a, b in pairs), min(
        float(torch.cosine_similarity(a.double(), b.double(), dim=-1).min()) for a, b in pairs
    )


def states(model, rows: pd.DataFrame, rounds: int) -> pd.DataFrame:
    """Last-token states of all layers."""
    names = [batch for shard in plan_batches(rows, 2048) for batch in shard]
    plan = [[list(rows.input_ids[r]) for r in batch] for batch in names]
    groups = [batch for shard in plan_shared(rows, 2048) for batch in shard]

    def ours(sites):
        found = [forward_states(model, pad(b), sites)[0]["resid_post"] for b in plan]
        return torch.cat(found, 1).transpose(0, 1)  # [n, layer, d], as the reference is

    def ours_shared(sites):
        found = {}
        for batch in groups:
            found |= dict(
                zip(
                    batch,
                    forward_states(model, shared_batch(model, list(rows.input_ids[batch])), sites)[
                        0
                    ]["resid_post"].unbind(1),
                    strict=True,
                )
            )
        return torch.stack([found[r] for batch in names for r in batch])

    @torch.no_grad()
    def hidden(batches):
        return torch.cat(
            [
                torch.stack(
                    [
                        h[:, -1]
                        for h in model(
                            **b, output_hidden_states=True, use_cache=False
                        ).hidden_states[1:]
                    ],
                    1,
                )
                for b in batches
            ]
        )

    def padded(width: int):
        for i in range(0, len(order), 8):
            ids = torch.zeros(len(order[i : i + 8]), width, dtype=torch.long)
            for j, p in enumerate(order[i : i + 8]):
                ids[j, width - len(p) :] = torch.tensor(p)
            mask = (
                torch.arange(width) >= width - torch.tensor([[len(p)] for p in order[i : i + 8]])
            ).long()
            yield {
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            }

    order = [p for b in plan for p in b]
    ways = {
        "bare forward, our batches (the limit)": lambda: [last_logits(model, pad(b)) for b in plan],
        "ours, resid_post": lambda: ours(["resid_post"]),
        "ours, all four sites": lambda: ours(SITES),
        "ours, all four sites, shared prefixes": lambda: ours_shared(SITES),
        "one at a time, output_hidden_states": lambda: hidden([pad([p]) for p in order]),
    }
    long = "padded to 512, output_hidden_states"
    if max(map(len, order)) < 200:  # a look at what it costs, on short prompts alone
        ways[long] = lambda: hidden(padded(512))
    table, gave = timed(ways, rounds, once=[long])
    reference = gave["one at a time, output_hidden_states"][
        :, :-1
    ]  # the last has the final norm in it
    for way in list(ways)[1:]:
        table.loc[way, ["largest difference", "least cosine"]] = apart(
            (gave[way][:, :-1], reference)
        )
    return table.assign(
        **{
            "tokens/s": sum(map(len, order)) / table.seconds,
            "share of the limit": table.seconds.iloc[0] / table.seconds,
        }
    )


def gradients(model, rounds: int, shapes=((4, 64), (32, 64), (4, 256), (4, 1024))) -> pd.DataFrame:
    """Gradients of the margin at all sites: the cached prefix against full backprop, asked of the activations alone, or by `backward()`, which goes to the weights too."""
    tables = []
    for rows, length in shapes:
        ways = gradient_ways(model, rows, length)
        table, gave = timed(ways, rounds if length < 1000 else 2)
        for way in list(ways)[2:]:
            table.loc[way, ["largest difference", "least cosine"]] = apart(
                *((gave[way][s], gave["full backprop"][s]) for s in SITES)
            )
        table["times the states alone"] = table.seconds / table.seconds["states alone"]
        tables.append(table.set_index(table.index + f", {rows} x {length:,}"))
    return pd.concat(tables)


def gradient_ways(model, rows: int, length: int) -> dict[str, Callable[[], object]]:
    """The ways that are compared, on a batch of random tokens."""
    batch = pad(
        torch.randint(
            10, 40_000, (rows, length), generator=torch.Generator().manual_seed(length)
        ).tolist()
    )
    return {
        "bare forward": lambda: last_logits(model, batch),
        "states alone": lambda: forward_states(model, batch, SITES),
        "ours": lambda: states_and_gradients(model, batch, CHOICES * rows, SITES)[1],
        "full backprop": lambda: full_backprop(model, batch, CHOICES * rows, SITES),
        "full backprop, head at the last token": lambda: head_at_last(model, batch),
        "full backprop, weights too": lambda: by_backward(model, batch),
    }


def head_at_last(model, batch) -> dict[str, torch.Tensor]:
    """Full backprop at its best: to the activations alone, and with logits of the last token only, as left padding allows; a model asked plainly gives those of every token."""
    found = {site: [] for site in SITES}
    with (
        torch.enable_grad(),
        at_sites(model, SITES, lambda site, layer, hidden: found[site].append(hidden)),
    ):
        logp = choice_logprobs(
            forward(model, batch, use_cache=False).logits[:, -1], CHOICES * len(batch["input_ids"])
        )
        grads = iter(
            torch.autograd.grad(
                (logp[:, 1] - logp[:, 0]).sum(), [h for site in SITES for h in found[site]]
            )
        )
    return {site: torch.stack([next(grads)[:, -1] for _ in found[site]]) for site in SITES}


def by_backward(model, batch) -> dict[str, torch.Tensor]:
    """As it is commonly written: keep the gradient at each site, and call `backward()`."""
    found = {site: [] for site in SITES}
    with (
        torch.enable_grad(),
        at_sites(
            model,
            SITES,
            lambda site, layer, hidden: (hidden.retain_grad(), found[site].append(hidden))[0],
        ),
    ):
        logp = choice_logprobs(
            forward(model, batch, last_only=False, use_cache=False).logits[:, -1],
            CHOICES * len(batch["input_ids"]),
        )
        (logp[:, 1] - logp[:, 0]).sum().backward()
    model.zero_grad()
    return {site: torch.stack([h.grad[:, -1] for h in found[site]]) for site in SITES}


def gradients_profile(model, rounds: int, shapes=((4, 64), (4, 256))) -> pd.DataFrame:
    """Where the gradients' time goes: seconds of the passes without a graph, of those with one, and of what follows them; and, by torch's profiler, shares by kind of operation."""
    tables = []
    for rows, length in shapes:
        ways, parts = (
            {
                w: run
                for w, run in gradient_ways(model, rows, length).items()
                if w not in ("states alone", "full backprop, weights too")
            },
            {},
        )

        def watched(way, run, parts=parts):
            def go() -> None:
                with forward_seconds(model) as spent:
                    run()
                parts.setdefault(way, []).append(spent)

            return go

        timers = {w: watched(w, run) for w, run in ways.items()} | {
            LEAST: lambda parts=parts, rows=rows: parts.setdefault(LEAST, []).append(
                last_token_products(model, rows)
            )
        }
        table, _ = timed(timers, rounds)
        table["without a graph"], table["with a graph"] = (
            [np.median([spent[graph] for spent in parts[w]]) for w in table.index]
            for graph in (False, True)
        )
        table["backward and the rest"] = (
            table.seconds - table["without a graph"] - table["with a graph"]
        )
        table.loc[LEAST, "MB of weights"] = sum(w.nbytes for w in block_weights(model)) / 1e6
        for way, run in ways.items():
            for kind, share in by_operation(run).items():
                table.loc[way, f"share: {kind}"] = share
        tables.append(table.set_index(table.index + f", {rows} x {length:,}"))
    return pd.concat(tables)


@contextlib.contextmanager
def forward_seconds(model) -> Iterator[dict[bool, float]]:
    """Seconds of the model's forward passes within: those without a graph (False), and those with one (True)."""
    spent, began = {False: 0.0, True: 0.0}, []

    def ends(*_) -> None:
        spent[torch.is_grad_enabled()] += time.perf_counter() - began.pop()

    handles = [
        model.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())),
        model.register_forward_hook(ends),
    ]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def last_token_products(model, rows: int) -> dict[bool, float]:
    """The least that a pass of the last token can cost: one product with each weight of the blocks forward, and one backward. Seconds of the forward ones, under True."""
    weights = block_weights(model)
    x = {width: torch.randn(rows, width) for w in weights for width in w.shape}
    start = time.perf_counter()
    for w in weights:
        x[w.shape[1]] @ w.T
    forward_ones = time.perf_counter() - start
    for w in weights:
        x[w.shape[0]] @ w
    return {False: 0.0, True: forward_ones}


def block_weights(model) -> list[torch.Tensor]:
    """The linear layers' weights, without that of the LM head, whose product the forward pass of the prompt has in it already."""
    return [
        m.weight
        for block in blocks(model)
        for m in block.modules()
        if isinstance(m, torch.nn.Linear)
    ]


def by_operation(run: Callable[[], object]) -> dict[str, float]:
    """Shares of the processor's time by kind of operation, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run()
    kind = lambda name: (
        "matrix products"
        if name in PRODUCTS
        else "attention"
        if name.startswith(ATTENTION)
        else "the rest"
    )
    spent = pd.Series({e.key: e.self_cpu_time_total for e in seen.key_averages()})
    return (spent.groupby(kind).sum() / spent.sum()).to_dict()


def memory(lengths=(64, 256, 1024), rows: int = 4) -> pd.DataFrame:
    """Extra peak memory of the ways to the gradients, each in a process of its own."""
    ways = (
        "states alone",
        "ours",
        "full backprop",
        "full backprop, head at the last token",
        "full backprop, weights too",
    )
    peak = {
        length: {
            w: int(
                subprocess.run(
                    [sys.executable, __file__, "peak", w, str(length), str(rows)],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout.split()[-1]
            )
            / 1e6
            for w in ways
        }
        for length in lengths
    }
    table = pd.DataFrame(peak).T.add_suffix(", MB").set_axis([f"{rows} x {n:,}" for n in lengths])
    saved = table["full backprop, MB"] - table["ours, MB"]
    return table.assign(
        **{
            "saved by ours, MB": saved,
            "ours / full backprop": table["ours, MB"] / table["full backprop, MB"],
        }
    ).rename_axis("prompts x tokens")


def print_peak(way: str, length: int, rows: int) -> None:
    """Print how many bytes the process's memory rises, at its peak, over that after one short pass."""
    model, _ = load_model("smollm2", dtype="float32", device="cpu")
    run = gradient_ways(model, rows, length)[way]
    gradient_ways(model, rows, 8)["states alone"]()
    process, done, peak = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    print(peak[0] - before)


def draws(model, rows: pd.DataFrame, rounds: int, n: int, scopes: Sequence[str]) -> pd.DataFrame:
    """Dropout draws by number and scope, against as many plain passes. Two rows' first and last draws are compared with the same draws of a prompt alone."""
    prompts = [list(i) for i in rows.input_ids.head(n)]
    batch = pad(prompts)
    seed = lambda k, row: k * n + row

    def drawn(k: int, scope: str) -> list[torch.Tensor]:
        return [
            states["resid_post"]
            for states, _ in draw_states(
                model,
                batch,
                ["resid_post"],
                seeds=[[seed(i, r) for r in range(n)] for i in range(k)],
                p=0.1,
                scope=scope,
            )
        ]

    ways = {"one pass": lambda: [forward_states(model, batch, ["resid_post"])[0]["resid_post"]]}
    asked = {"one pass": (1, None)}
    for scope, k in ((scope, k) for scope in scopes for k in (2, 8, 32)):
        asked[way := f"{k} draws, {scope}"] = k, scope
        ways[way] = lambda k=k, scope=scope: drawn(k, scope)
    table, gave = timed(ways, rounds)
    for way, (k, scope) in asked.items():
        pairs = []
        for row, i in ((0, 0), (n - 1, k - 1)):
            alone = pad([prompts[row]])
            one = (
                draw_states(
                    model, alone, ["resid_post"], seeds=[[seed(i, row)]], p=0.1, scope=scope
                )[0][0]
                if scope
                else forward_states(model, alone, ["resid_post"])[0]
            )
            pairs.append((gave[way][i][:, row], one["resid_post"][:, 0]))
        table.loc[way, ["largest difference", "least cosine"]] = apart(*pairs)
    return table.assign(passes=table.seconds / table.seconds.iloc[0]).set_index(
        table.index + f", {n} prompts"
    )


def store(rounds: int, rows: int = 10_000, d: int = 576, layers: int = 30) -> pd.DataFrame:
    """Write features in bf16, then read one layer of all rows: MB/s, and bytes on disk against bytes of values."""
    name = "activation.resid_post.7.0"
    with tempfile.TemporaryDirectory() as tmp:
        plan = [[[f"{i:016x}" for i in range(s, min(s + 64, rows))]] for s in range(0, rows, 64)]
        examples = {r: r for [batch] in plan for r in batch}
        values = {
            f"activation.resid_post.{k}.0": torch.randn(64, d).bfloat16() for k in range(layers)
        }
        write = lambda folder: fill(
            folder,
            {},
            plan,
            lambda ids: {k: v[: len(ids)] for k, v in values.items()},
            examples=examples,
        )
        write(Path(tmp) / "0")
        n = iter(range(1, rounds + 1))
        writing, _ = timed({"write all": lambda: write(Path(tmp) / str(next(n)))}, rounds)
        reading, gave = timed(
            {"read one layer": lambda: read(Path(tmp) / "0", name)}, 5 * rounds
        )  # milliseconds each
        size = rows * d * 2
        on_disk = sum(p.stat().st_size for p in (Path(tmp) / "0").iterdir())
    written = torch.cat([values[name][: len(batch)] for [batch] in plan])
    table = pd.concat([writing, reading])
    table.loc["read one layer", "largest difference"] = float(
        (gave["read one layer"] - written).abs().max()
    )
    return table.assign(
        **{
            "MB": [size * layers / 1e6, size / 1e6],
            "MB/s": np.array([size * layers, size]) / 1e6 / table.seconds,
            "bytes on disk / bytes of values": [on_disk / (size * layers), np.nan],
            "bytes per example": [on_disk / rows, size / rows],
        }
    )


def main(*only: str, rounds: int = 3) -> None:
    """All tables, or those named."""
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    forward(model, pad([[1, 2, 3]]))
    plain, one = prompt_rows(tokenizer, "plain", 12), prompt_rows(tokenizer, "one", 24)
    tables = {
        "states_plain": (
            f"States of the last token: {plain[1]}",
            lambda: states(model, plain[0], rounds),
        ),
        "states_one": (
            f"States of the last token: {one[1]}",
            lambda: states(model, one[0], rounds),
        ),
        "gradients": (
            "Gradients of the margin: batches of prompts x tokens",
            lambda: gradients(model, rounds),
        ),
        "gradients_profile": (
            "Where the gradients' time goes",
            lambda: gradients_profile(model, rounds),
        ),
        "memory": ("Extra peak memory of the gradients", memory),
        "draws": (
            "Dropout draws",
            lambda: pd.concat(
                [
                    draws(model, plain[0], 3, 24, ["last_token", "sequence"]),
                    draws(model, plain[0], 3, 12, ["last_token"]),
                ]
            ),
        ),
        "store": ("The store: 10,000 examples of one row, 30 layers", lambda: store(rounds)),
    }
    for name in only or tables:
        save(name, tables[name][0], tables[name][1]())


if __name__ == "__main__":
    print_peak(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])) if sys.argv[1:2] == [
        "peak"
    ] else main(*sys.argv[1:])
