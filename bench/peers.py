"""Last-token states of all layers by other libraries, beside ours: the same model folder, the same token ids, fp32, in turns. Needs an environment of its own (`make bench-peers`).

Each is used as its own documentation says is best for this: nnsight traces a batch, saves one slice a layer and stops after the last; transformer-lens caches `resid_post` alone, at the last position, with the
logits of that position only; lmprobe's local backend tokenises the same prompts itself, runs the whole model, and the last token is kept.
"""

from importlib.metadata import version

import torch
from extraction import timed
from results import prompt_rows, save

from dlk_utils.extract.batches import last_logits, pad, plan_batches
from dlk_utils.extract.packing import plan_shared, shared_batch
from dlk_utils.extract.states import forward_states
from dlk_utils.models.loading import load_model, resolve


def main(kind: str, n_examples: int, rounds: int = 3) -> None:
    import nnsight
    from lmprobe.extraction import ActivationExtractor
    from transformer_lens.model_bridge import TransformerBridge

    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    folder = resolve("smollm2").source
    rows, title = prompt_rows(tokenizer, kind, n_examples)
    names = [batch for shard in plan_batches(rows, 2048) for batch in shard]
    plan = [pad(list(rows.input_ids[batch])) for batch in names]
    n_layers = model.config.num_hidden_layers
    wanted = [f"blocks.{k}.hook_resid_post" for k in range(n_layers)]
    traced = nnsight.TransformersModel(
        load_model("smollm2", dtype="float32", device="cpu")[0], tokenizer=tokenizer
    )
    bridge = TransformerBridge.boot_transformers(folder, dtype=torch.float32, device="cpu")
    extractor = ActivationExtractor(
        folder, device="cpu", layers="all", batch_size=64, dtype=torch.float32
    )

    def by_nnsight(b):
        with (
            torch.no_grad(),
            traced.trace(
                {
                    "input_ids": b["input_ids"],
                    "attention_mask": b["attention_mask"],
                    "position_ids": b["position_ids"],
                }
            ) as tracer,
        ):
            found = nnsight.save([])
            for layer in traced.model.layers:
                found.append(layer.output[:, -1])
            tracer.stop()
        return torch.stack(list(found), 1)

    def by_lens(b):
        _, cache = bridge.run_with_cache(
            b["input_ids"],
            attention_mask=b["attention_mask"],
            names_filter=wanted,
            pos_slice=-1,
            return_type=None,
            logits_to_keep=1,
        )
        return torch.stack([cache[name].reshape(len(b["input_ids"]), -1) for name in wanted], 1)

    def by_lmprobe(batch):
        states, mask = extractor.extract_batch(list(rows.prompt[batch]), list(range(n_layers)))
        last = (mask * torch.arange(mask.shape[1])).argmax(1)
        return states[torch.arange(len(last)), last].view(len(last), n_layers, -1)

    groups = [batch for shard in plan_shared(rows, 2048) for batch in shard]

    def ours_shared():
        found = {}
        for batch in groups:
            found |= dict(
                zip(
                    batch,
                    forward_states(
                        model, shared_batch(model, list(rows.input_ids[batch])), ["resid_post"]
                    )[0]["resid_post"].unbind(1),
                    strict=True,
                )
            )
        return torch.stack([found[r] for batch in names for r in batch])

    ways = {
        "bare forward (the limit)": lambda: [last_logits(model, b) for b in plan],
        "ours": lambda: torch.cat(
            [forward_states(model, b, ["resid_post"])[0]["resid_post"] for b in plan], 1
        ).transpose(0, 1),
        "ours, shared prefixes": ours_shared,
        "nnsight": lambda: torch.cat([by_nnsight(b) for b in plan]),
        "transformer-lens": lambda: torch.cat([by_lens(b) for b in plan]),
        "lmprobe": lambda: torch.cat([by_lmprobe(batch) for batch in names]),
    }
    with torch.no_grad():
        table, gave = timed(ways, rounds)
    for way in list(ways)[1:]:
        a, b = gave[way][:, :-1], gave["ours"][:, :-1]
        table.loc[way, "largest difference"] = float((a - b).abs().max())
        table.loc[way, "least cosine"] = float(torch.cosine_similarity(a, b, dim=-1).min())
    tokens = int(rows.input_ids.map(len).sum())
    table = table.assign(
        **{
            "tokens/s": tokens / table.seconds,
            "share of the limit": table.seconds.iloc[0] / table.seconds,
        }
    )
    save(
        f"peers_{kind}",
        f"Beside other libraries: {title}",
        table,
        **{name: version(name) for name in ("nnsight", "transformer-lens", "lmprobe")},
    )


if __name__ == "__main__":
    for kind, n_examples in (("plain", 12), ("one", 24)):
        main(kind, n_examples)
