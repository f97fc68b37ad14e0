"""What the model answers: log-probabilities of the two choices after a prompt."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.extract.batches import forward, pad


def choice_logprobs(logits: Float[Tensor, "n vocab"], ids: Sequence) -> Float[Tensor, "n 2"]:
    """Log-probability of each choice at the next token: log-sum-exp over its variants, in fp32, with no epsilon.

    `ids` holds, for each row, the token ids of choice 0 and those of choice 1, as `choice_ids` gives them.
    The margin is column 1 minus column 0; the choice mass is the sum of the exponentials.
    """
    logp = (
        logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
    )
    return torch.stack(
        [torch.stack([logp[i, list(s)].logsumexp(0) for s in sets]) for i, sets in enumerate(ids)]
    )


@torch.no_grad()
def sequence_logprobs(
    model: nn.Module, prompt: Sequence[int], sequences: Sequence[Sequence[int]]
) -> list[Float[Tensor, ""]]:
    """Log-probability of each token sequence after the prompt, summed over its tokens: one pass over the prompt, one over all sequences."""
    first = forward(model, pad([list(prompt)], device=model.device), use_cache=True)
    after = [first.logits[0, -1].float().log_softmax(-1).expand(len(sequences), -1)[:, None]]
    if max(map(len, sequences)) > 1:
        cache, n = first.past_key_values, len(prompt)
        cache.batch_repeat_interleave(len(sequences))
        rest = pad([list(s)[:-1] or [0] for s in sequences], side="right", device=model.device)
        mask = torch.cat(
            [
                torch.ones(len(sequences), n, dtype=torch.long, device=model.device),
                rest["attention_mask"],
            ],
            1,
        )
        logits = forward(
            model,
            rest
            | {
                "attention_mask": mask,
                "position_ids": rest["position_ids"] + n,
                "past_key_values": cache,
            },
            last_only=False,
        ).logits
        after.append(logits.float().log_softmax(-1))
    logp = torch.cat(after, 1)
    return [logp[i, range(len(s)), list(s)].sum() for i, s in enumerate(sequences)]
