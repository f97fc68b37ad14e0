"""Time the last-token states of all layers by other libraries, beside ours.

All of them read the same model folder and the same token ids, in fp32, and take turns. This needs
an environment of its own (`make bench-peers`). Each library is used as its documentation says is
best for this task:

* nnsight traces a batch, saves one slice per layer, and stops after the last layer;
* transformer-lens caches `resid_post` alone, at the last position, with the logits of that one;
* lmprobe's local backend tokenises the prompts itself and runs the model on all tokens; the last
  token is kept.
"""

from collections.abc import Callable
from importlib.metadata import version
from itertools import chain
from typing import Any

import pandas as pd
import torch
from extraction import RESID, add_speed, batched_states, shared_states
from results import add_parity, batches_of, prompt_rows, save, time_ways, token_ids
from torch import Tensor

from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.models.loading import load_model, resolve

LIBRARIES = ("nnsight", "transformer-lens", "lmprobe")


def main(kind: str, n_examples: int, rounds: int = 3) -> None:
    """Time the libraries on one kind of prompts (see `results.PROMPT_KINDS`)."""
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    folder = resolve("smollm2").source
    rows, description = prompt_rows(tokenizer, kind, n_examples)
    plan = batches_of(rows)
    batches = [pad(token_ids(rows, batch)) for batch in plan]

    nnsight_states = by_nnsight(tokenizer)
    lens_states = by_transformer_lens(folder, model.config.num_hidden_layers)
    lmprobe_states = by_lmprobe(folder, model.config.num_hidden_layers, rows)
    ways = {
        "bare forward (the limit)": lambda: [last_logits(model, batch) for batch in batches],
        "ours": lambda: batched_states(model, batches, RESID),
        "ours, shared prefixes": shared_states(model, rows, list(chain(*plan)), RESID),
        "nnsight": lambda: torch.cat([nnsight_states(batch) for batch in batches], 1),
        "transformer-lens": lambda: torch.cat([lens_states(batch) for batch in batches], 1),
        "lmprobe": lambda: torch.cat([lmprobe_states(row_ids) for row_ids in plan], 1),
    }
    with torch.no_grad():
        table, values = time_ways(ways, rounds)
    # Some libraries give the last layer after the final norm, so it is not compared.
    for way in list(ways)[1:]:
        add_parity(table, way, (values[way][:-1], values["ours"][:-1]))
    versions = {name: version(name) for name in LIBRARIES}
    title = f"Beside other libraries: {description}"
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


def by_lmprobe(folder: str, n_layers: int, rows: pd.DataFrame) -> Callable[[list[str]], Tensor]:
    """Load the model in lmprobe; return its way from row ids to states [layer, b, d]."""
    from lmprobe.extraction import ActivationExtractor

    extractor = ActivationExtractor(
        folder, device="cpu", layers="all", batch_size=64, dtype=torch.float32
    )

    def states_of(row_ids: list[str]) -> Tensor:
        texts = list(rows.prompt[row_ids])
        states, mask = extractor.extract_batch(texts, list(range(n_layers)))
        last = (mask * torch.arange(mask.shape[1])).argmax(1)
        at_last = states[torch.arange(len(last)), last]
        return at_last.view(len(last), n_layers, -1).swapaxes(0, 1)

    return states_of


if __name__ == "__main__":
    main("plain", 12)
    main("one", 24)
