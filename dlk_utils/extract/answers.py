"""What the model answers: the log-probabilities of the two choices after a prompt."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.extract.batches import after_prefix, forward, pad


def choice_logprobs(logits: Float[Tensor, "n vocab"], choice_ids: Sequence) -> Float[Tensor, "n 2"]:
    """Return the log-probability of each choice at the next token.

    A choice may begin with any of several tokens (spelling variants); their probabilities add up.
    Computed in float32 or wider. The margin is column 1 minus column 0.

    Parameters
    ----------
    logits
        Next-token logits of each row.
    choice_ids
        For each row a pair: the token ids of choice 0, and those of choice 1.

    Returns
    -------
    Tensor [n, 2]
        Natural logarithms.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = wide.log_softmax(-1)
    rows = []
    for row, pair in zip(logprobs, choice_ids, strict=True):
        rows.append(torch.stack([row[list(tokens)].logsumexp(0) for tokens in pair]))
    return torch.stack(rows)


@torch.no_grad()
def sequence_logprobs(
    model: nn.Module, prompt: Sequence[int], sequences: Sequence[Sequence[int]]
) -> list[Float[Tensor, ""]]:
    """Return the log-probability of each of several continuations of one prompt.

    One pass over the prompt serves all sequences, and one more pass runs them side by side.

    Parameters
    ----------
    model
        A causal model.
    prompt
        Token ids.
    sequences
        Token ids of each continuation, at least one.

    Returns
    -------
    list of Tensor
        For each sequence the sum of its tokens' log-probabilities.
    """
    first = forward(model, pad([list(prompt)], device=model.device), use_cache=True)
    first_logprobs = first.logits[0, -1].float().log_softmax(-1)
    logprobs = first_logprobs.expand(len(sequences), -1)[:, None]
    if max(len(sequence) for sequence in sequences) > 1:
        # A sequence's last token predicts nothing that is asked for. One-token sequences have no
        # other: they get a token whose prediction is not read.
        inputs = [list(sequence)[:-1] or [0] for sequence in sequences]
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(sequences))
        batch = pad(inputs, side="right", device=model.device)
        logits = forward(model, after_prefix(batch, cache, len(prompt)), last_only=False).logits
        logprobs = torch.cat([logprobs, logits.float().log_softmax(-1)], 1)
    totals = []
    for by_place, sequence in zip(logprobs, sequences, strict=True):
        totals.append(by_place[range(len(sequence)), list(sequence)].sum())
    return totals
