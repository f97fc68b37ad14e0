"""Tables of notebook 03: how far dropout draws move the state and the answer."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from dlk_utils.evaluation.stats import mean_interval
from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.draws import SCOPES, draw_states
from dlk_utils.extract.dropout import DEFAULT_P, draw_seed
from dlk_utils.questions.choices import require_first_token_choices


def move_table(
    model: nn.Module,
    prompts: pd.DataFrame,
    *,
    ps: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.4),
    scopes: Sequence[str] = SCOPES,
    seed: int = 0,
) -> pd.DataFrame:
    """For each scope and p, over a few prompts: how far two draws move the last layer's state (relative to its norm) and the probability of choice 1
    (the mean, with a 95 % bootstrap interval), and how often they disagree about the answer."""
    require_first_token_choices(prompts, "dropout draws")
    batch, rows = pad(prompts.input_ids, device=model.device), []
    seeds = [[draw_seed(r, k, seed) for r in prompts.row_id] for k in (0, 1)]
    for scope in scopes:
        for p in ps:
            (one, first), (other, second) = draw_states(
                model, batch, ["resid_post"], -1, seeds=seeds, p=p, scope=scope
            )
            a, b = (x["resid_post"][0].float() for x in (one, other))
            p1 = [
                (logp[:, 1] - logp[:, 0]).double().sigmoid().cpu().numpy()
                for logp in (choice_logprobs(x, list(prompts.choice_ids)) for x in (first, second))
            ]
            move = np.abs(p1[1] - p1[0])
            low, high = mean_interval(move, prompts.example_id.to_numpy())
            rows.append(
                {
                    "scope": scope,
                    "p": p,
                    "rows": len(move),
                    "state_move": float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean()),
                    "answer_move": move.mean(),
                    "answer_move_low": low,
                    "answer_move_high": high,
                    "disagree": float(((p1[0] > 0.5) != (p1[1] > 0.5)).mean()),
                }
            )
    return pd.DataFrame(rows)


def spread_table(
    model: nn.Module,
    prompts: pd.DataFrame,
    *,
    n_draws: int = 16,
    p: float = DEFAULT_P,
    scopes: Sequence[str] = SCOPES,
    seed: int = 0,
) -> pd.DataFrame:
    """For each scope and the first 2, 4, ... `n_draws` draws of a few prompts: the range of the probability of choice 1 (its mean, with a 95 % bootstrap interval),
    and how far its mean over the draws lies from that of the plain pass."""
    require_first_token_choices(prompts, "dropout draws")
    batch, rows, examples = (
        pad(prompts.input_ids, device=model.device),
        [],
        prompts.example_id.to_numpy(),
    )
    p1 = lambda logits: (
        torch.diff(choice_logprobs(logits, list(prompts.choice_ids)).double())[:, 0]
        .sigmoid()
        .cpu()
        .numpy()
    )
    plain, seeds = (
        p1(last_logits(model, batch)),
        [[draw_seed(r, k, seed) for r in prompts.row_id] for k in range(n_draws)],
    )
    for scope in scopes:
        drawn = np.stack(
            [
                p1(logits)
                for _, logits in draw_states(
                    model, batch, ["resid_post"], -1, seeds=seeds, p=p, scope=scope
                )
            ]
        )
        for k in [2**i for i in range(1, n_draws.bit_length())]:
            spread, off = np.ptp(drawn[:k], axis=0), np.abs(drawn[:k].mean(0) - plain)
            low, high = mean_interval(spread, examples)
            rows.append(
                {
                    "scope": scope,
                    "draws": k,
                    "range": spread.mean(),
                    "range_low": low,
                    "range_high": high,
                    "mean_off_plain": off.mean(),
                }
            )
    return pd.DataFrame(rows)
