"""Time the last-token states of all layers by other libraries, beside ours and the bare pass.

All of them read the same model folder and the same token ids, in fp32, and take turns. This needs
an environment of its own (`make bench-peers`). Each library is used as its documentation says is
best for this task:

* nnsight traces a batch, saves one slice per layer, and stops after the last layer;
* transformer-lens caches `resid_post` alone, at the last position, with the logits of that one;
* lmprobe's local backend tokenises the prompts itself and runs the model on all tokens; the last
  token is kept.

All but lmprobe are given the same padded batches, laid out beforehand. Our time includes all that
`activations` does.

`python bench/peers.py [KIND ...]` writes the tables `peers_KIND` of all kinds, or those named.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from extraction import BARE, OURS, add_speed, bare_pass, our_states
from growth import warm_up
from results import (
    ROUNDS,
    TRIAL,
    add_parity,
    in_order_of,
    padded_batches,
    padded_plan,
    prompt_rows,
    save,
    time_ways,
)
from torch import Tensor

from dlk_utils.models.loading import load_model, resolve

LIBRARIES = ("nnsight", "transformer-lens", "lmprobe")
KINDS = {"default": ROUNDS, "unshared": 1 if TRIAL else 5, "two_shots": ROUNDS}
"""Kinds of prompts (`results.prompt_rows`), and how often each way is timed on them. Those that
share nothing are few, and their goals are near 1, so they take more rounds."""


def main(*kinds: str) -> None:
    """Time the libraries on all kinds of prompts, or those named."""
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise SystemExit(f"kinds: expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    warm_up(model)
    folder = resolve("smollm2").source
    n_layers = model.config.num_hidden_layers
    nnsight_states = by_nnsight(tokenizer)
    lens_states = by_transformer_lens(folder, n_layers)
    extractor = lmprobe_extractor(folder)
    versions = {name: version(name) for name in LIBRARIES}

    for kind in kinds or KINDS:
        rows, description = prompt_rows(tokenizer, kind)
        print(f"{kind}: {description}", flush=True)
        plan = padded_plan(rows)
        batches = padded_batches(rows, plan)
        texts = [list(rows.prompt[row_ids]) for row_ids in plan]
        ways = {
            BARE: lambda b=batches: bare_pass(model, b),
            OURS: lambda r=rows: our_states(model, r),
            "nnsight": lambda b=batches: torch.cat([nnsight_states(x) for x in b], 1),
            "transformer-lens": lambda b=batches: torch.cat([lens_states(x) for x in b], 1),
            "lmprobe": lambda t=texts: torch.cat(
                [by_lmprobe(extractor, x, n_layers) for x in t], 1
            ),
        }
        with torch.no_grad():
            table, values = time_ways(ways, KINDS[kind])
        # The libraries give states in the order of the plan, and some of them give the last layer
        # after the final norm, so that one is not compared.
        order = in_order_of(plan, rows)
        for library in LIBRARIES:
            add_parity(table, library, (values[library][:-1, order], values[OURS][:-1]))
        title = f"States, compared with other libraries: {description}"
        save(f"peers_{kind}", title, add_speed(table, rows), **versions)


def by_nnsight(tokenizer: Any) -> Callable[[dict], Tensor]:
    """Load the model in nnsight; return its way from a batch to states [layer, b, d]."""
    import nnsight

    model, _ = load_model("smollm2", dtype="float32", device="cpu")
    traced = nnsight.TransformersModel(model, tokenizer=tokenizer)

    def states_of(batch: dict) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad(), traced.trace(inputs) as tracer:
            states = nnsight.save([])
            for layer in traced.model.layers:
                states.append(layer.output[:, -1])
            tracer.stop()
        return torch.stack(list(states))

    return states_of


def by_transformer_lens(folder: str, n_layers: int) -> Callable[[dict], Tensor]:
    """Load the model in transformer-lens; return its way from a batch to states [layer, b, d]."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(folder, dtype=torch.float32, device="cpu")
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]

    def states_of(batch: dict) -> Tensor:
        _, cache = bridge.run_with_cache(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            names_filter=names,
            pos_slice=-1,
            return_type=None,
            logits_to_keep=1,
        )
        n_prompts = len(batch["input_ids"])
        return torch.stack([cache[name].reshape(n_prompts, -1) for name in names])

    return states_of


def lmprobe_extractor(folder: str) -> Any:
    """Load the model in lmprobe."""
    from lmprobe.extraction import ActivationExtractor

    return ActivationExtractor(
        folder, device="cpu", layers="all", batch_size=64, dtype=torch.float32
    )


def by_lmprobe(extractor: Any, texts: list[str], n_layers: int) -> Tensor:
    """Take the last-token states [layer, b, d] of some prompts in lmprobe."""
    states, mask = extractor.extract_batch(texts, list(range(n_layers)))
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    at_last = states[torch.arange(len(last)), last]
    return at_last.view(len(last), n_layers, -1).swapaxes(0, 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
