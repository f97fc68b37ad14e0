"""What the model answers: the log-probabilities of the two choices after a prompt."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.extract.batches import after_prefix, forward, pad


def choice_logprobs(logits: Float[Tensor, "n vocab"], choice_ids: Sequence) -> Float[Tensor, "n 2"]:
    """Return the log-probability of each choice at the next token, in float32 or wider.

    `choice_ids` has a pair for each row: the token ids that count as choice 0 (its spelling
    variants, whose probabilities add up), and those of choice 1. Column 1 minus column 0 is the
    margin.
    """
    logprobs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    rows = []
    for row, pair in zip(logprobs, choice_ids, strict=True):
        rows.append(torch.stack([row[list(tokens)].logsumexp(0) for tokens in pair]))
    return torch.stack(rows)


@torch.no_grad()
def sequence_logprobs(
    model: nn.Module, prompt: Sequence[int], sequences: Sequence[Sequence[int]]
) -> list[Float[Tensor, ""]]:
    """Return the log-probability of each token sequence after a prompt, summed over its tokens.

    The prompt runs once; then all sequences run side by side.
    """
    first = forward(model, pad([list(prompt)], device=model.device), use_cache=True)
    first_logprobs = first.logits[0, -1].float().log_softmax(-1)
    logprobs = first_logprobs.expand(len(sequences), -1)[:, None]
    if max(len(sequence) for sequence in sequences) > 1:
        # What comes after a sequence's last token is not asked for. A sequence of one token has no
        # other: in its place runs a token whose prediction is not read.
        inputs = [list(sequence)[:-1] or [0] for sequence in sequences]
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(sequences))
        batch = pad(inputs, side="right", device=model.device)
        logits = forward(model, after_prefix(batch, cache, len(prompt)), last_only=False).logits
        logprobs = torch.cat([logprobs, logits.float().log_softmax(-1)], 1)
    by_sequence = zip(logprobs, sequences, strict=True)
    return [by_place[range(len(tokens)), list(tokens)].sum() for by_place, tokens in by_sequence]
