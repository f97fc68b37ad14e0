"""What the model answers: one clean pass over each prompt, with what neighbouring prompts share computed once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.choices import choice_logprobs
from dlk_utils.extract import fill_rows, forward, last_logits, pad
from dlk_utils.shared import plan_shared, shared_batch


def answer_prompts(model: nn.Module, prompts: pd.DataFrame, out: Path, *, record: Mapping[str, Any], batch_tokens: int = 2048) -> None:
    """Store for each prompt `choice_logprobs` [n, 2] (index = label), `strict_logprobs` [n, 2] (each choice as written, no other spelling) and `top_token` [n].

    A row with `choice_tokens` (choices that only differ after their first token) has each choice scored by its whole log-probability.
    """

    def compute(rows: pd.DataFrame) -> dict[str, Tensor]:
        logits = last_logits(model, shared_batch(model, list(rows.input_ids)))
        logp = choice_logprobs(logits, list(rows.choice_ids))
        strict = choice_logprobs(logits, list(rows.strict_ids)) if "strict_ids" in rows else logp.clone()
        for i, whole in enumerate(rows.choice_tokens if "choice_tokens" in rows else []):
            if whole is not None:
                found = torch.stack(sequence_logprobs(model, rows.input_ids.iloc[i], [v for variants in whole for v in variants]))
                per_choice = found.split([len(variants) for variants in whole])
                logp[i] = torch.stack([p.logsumexp(0) for p in per_choice])
                strict[i] = torch.stack([p[0] for p in per_choice])
        return {"choice_logprobs": logp, "strict_logprobs": strict, "top_token": logits.argmax(-1)}

    fill_rows(out, prompts, record, plan_shared(prompts, batch_tokens), compute, "answers", batch_tokens)


@torch.no_grad()
def sequence_logprobs(model: nn.Module, prompt: Sequence[int], sequences: Sequence[Sequence[int]]) -> list[Float[Tensor, ""]]:
    """Log-probability of each token sequence after the prompt, summed over its tokens: one pass over the prompt, one over all sequences."""
    first = forward(model, pad([list(prompt)], device=model.device), use_cache=True)
    after = [first.logits[0, -1].float().log_softmax(-1).expand(len(sequences), -1)[:, None]]
    if max(map(len, sequences)) > 1:
        cache, n = first.past_key_values, len(prompt)
        cache.batch_repeat_interleave(len(sequences))
        rest = pad([list(s)[:-1] or [0] for s in sequences], side="right", device=model.device)
        mask = torch.cat([torch.ones(len(sequences), n, dtype=torch.long, device=model.device), rest["attention_mask"]], 1)
        logits = forward(model, rest | {"attention_mask": mask, "position_ids": rest["position_ids"] + n, "past_key_values": cache}, last_only=False).logits
        after.append(logits.float().log_softmax(-1))
    logp = torch.cat(after, 1)
    return [logp[i, range(len(s)), list(s)].sum() for i, s in enumerate(sequences)]
