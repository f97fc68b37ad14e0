"""What the model answers: the log-probabilities of the two choices after a prompt."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlk_utils.extract.batches import forward, pad
from dlk_utils.extract.states import clean_states


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


def answer_batch(model: nn.Module, rows: pd.DataFrame) -> dict[str, Tensor]:
    """Return the model's answers to a batch of rows of `make_prompts`.

    Choices that differ only after their first token (`choice_tokens`) are scored by all their
    tokens.

    Returns
    -------
    dict
        `choice_logprobs` [n, 2]; `strict_logprobs` [n, 2], of each choice as it is written
        (`strict_ids`), in no other spelling; and `top_token` [n].
    """
    _, logits = clean_states(model, list(rows.input_ids), [])
    answers = read_logits(logits, rows)
    if "choice_tokens" in rows:
        for i, choices in enumerate(rows.choice_tokens):
            if choices is not None:
                logprobs, strict = _complete_logprobs(model, rows.input_ids.iloc[i], choices)
                answers["choice_logprobs"][i], answers["strict_logprobs"][i] = logprobs, strict
    return answers


def read_logits(logits: Float[Tensor, "n vocab"], rows: pd.DataFrame) -> dict[str, Tensor]:
    """Read what `answer_batch` returns out of the logits, for choices told by their first token."""
    logprobs = choice_logprobs(logits, list(rows.choice_ids))
    strict = logprobs.clone()
    if "strict_ids" in rows:
        strict = choice_logprobs(logits, list(rows.strict_ids))
    top_token = logits.argmax(-1)
    return {"choice_logprobs": logprobs, "strict_logprobs": strict, "top_token": top_token}


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
        mask = batch["attention_mask"]
        behind_prompt = {
            "input_ids": batch["input_ids"],
            "attention_mask": torch.cat([mask.new_ones(len(mask), len(prompt)), mask], 1),
            "position_ids": batch["position_ids"] + len(prompt),
            "past_key_values": cache,
        }
        logits = forward(model, behind_prompt, n_logits=None).logits
        logprobs = torch.cat([logprobs, logits.float().log_softmax(-1)], 1)
    by_sequence = zip(logprobs, sequences, strict=True)
    return [by_place[range(len(tokens)), list(tokens)].sum() for by_place, tokens in by_sequence]


def _complete_logprobs(
    model: nn.Module, prompt: Sequence[int], choices: Sequence[Sequence[Sequence[int]]]
) -> tuple[Tensor, Tensor]:
    """Score both choices by all their tokens: in any spelling [2], and as written [2].

    A choice has the tokens of each of its spellings, the written one first.
    """
    spellings = [tokens for choice in choices for tokens in choice]
    logprobs = torch.stack(sequence_logprobs(model, prompt, spellings))
    by_choice = logprobs.split([len(choice) for choice in choices])
    any_spelling = torch.stack([choice.logsumexp(0) for choice in by_choice])
    return any_spelling, torch.stack([choice[0] for choice in by_choice])
