"""Tables of notebook 03: how far dropout draws move the state and the answer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.special import expit
from torch import Tensor, nn

from dlk_utils.evaluation.stats import mean_interval
from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.draws import SCOPES, seeded_draws
from dlk_utils.extract.dropout import DEFAULT_P, INJECTED
from dlk_utils.extract.states import clean_states
from dlk_utils.extract.store import load_features
from dlk_utils.questions.choices import require_first_token_choices


def move_table(
    model: nn.Module,
    prompts: pd.DataFrame,
    *,
    ps: Sequence[float] = (0.02, 0.1, 0.4),
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how far two draws move state and answer, by scope and dropout probability.

    Returns
    -------
    DataFrame
        For each `scope` and `p`: the mean move of the last layer's state, relative to its norm
        (`state_move`); the mean move of the probability of choice 1 (`answer_move`, with a 95 %
        bootstrap interval); and how often the two draws `disagree` about the answer.
    """
    require_first_token_choices(prompts, "dropout draws")
    rows = []
    for scope in SCOPES:
        for p in ps:
            (one, other), p1 = _draws(model, prompts, 2, p=p, scope=scope, seed=seed)
            move = np.abs(p1[1] - p1[0])
            low, high = mean_interval(move, prompts.example_id.to_numpy())
            rows.append(
                {
                    "scope": scope,
                    "p": p,
                    "rows": len(move),
                    "state_move": float(((other - one).norm(dim=-1) / one.norm(dim=-1)).mean()),
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
    n_draws: int = 8,
    p: float = DEFAULT_P,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how the answer spreads over 2, 4, ... `n_draws` draws of each prompt.

    Returns
    -------
    DataFrame
        For each `scope` and number of `draws`: the mean `range` of the probability of choice 1
        (with a 95 % bootstrap interval), and how far its mean over the draws lies from that of the
        plain pass (`mean_off_plain`).
    """
    require_first_token_choices(prompts, "dropout draws")
    _, logits = clean_states(model, list(prompts.input_ids), [])
    plain = _p1(logits, prompts)
    rows = []
    for scope in SCOPES:
        _, p1 = _draws(model, prompts, n_draws, p=p, scope=scope, seed=seed)
        for k in [2**i for i in range(1, n_draws.bit_length())]:
            spread = np.ptp(p1[:k], axis=0)
            low, high = mean_interval(spread, prompts.example_id.to_numpy())
            rows.append(
                {
                    "scope": scope,
                    "draws": k,
                    "range": spread.mean(),
                    "range_low": low,
                    "range_high": high,
                    "mean_off_plain": np.abs(p1[:k].mean(0) - plain).mean(),
                }
            )
    return pd.DataFrame(rows)


def spread_lines(spread: pd.DataFrame) -> pd.DataFrame:
    """Stack the two columns of a `spread_table` that are drawn as lines: `line`, `value`, ends."""
    ranges = spread.assign(line=spread.scope + ": range", value=spread.range)
    ranges = ranges.rename(columns={"range_low": "low", "range_high": "high"})
    line = spread.scope + ": mean against the plain pass"
    means = spread.assign(line=line, value=spread.mean_off_plain, low=np.nan, high=np.nan)
    columns = ["line", "draws", "value", "low", "high"]
    return pd.concat([ranges[columns], means[columns]])


def shares_moved(folder: Path, n_layers: int) -> list[float]:
    """Measure, by layer, the share of a store's rows whose first two draws differ."""
    shares = []
    for layer in range(n_layers):
        one, other = (load_features(folder, "resid_post", layer, draw=k)[0] for k in (0, 1))
        shares.append(float((np.abs(one - other).max(axis=1) > 0).mean()))
    return shares


def _draws(
    model: nn.Module, prompts: pd.DataFrame, n_draws: int, *, p: float, scope: str, seed: int
) -> tuple[Float[Tensor, "draw n d"], Float[np.ndarray, "draw n"]]:
    """Last-layer states, and probabilities of choice 1, under each draw."""
    draws = seeded_draws(
        model,
        prompts.input_ids,
        list(prompts.row_id),
        ["resid_post"],
        -1,
        n_draws=n_draws,
        p=p,
        seed=seed,
        scope=scope,
        places=INJECTED,
        question_starts=list(prompts.question_start),
    )
    states = torch.stack([states["resid_post"][0].float() for states, _ in draws])
    return states, np.stack([_p1(logits, prompts) for _, logits in draws])


def _p1(logits: Float[Tensor, "n vocab"], prompts: pd.DataFrame) -> Float[np.ndarray, " n"]:
    """Probabilities of choice 1 against choice 0."""
    logp = choice_logprobs(logits, list(prompts.choice_ids)).cpu().double().numpy()
    return expit(logp[:, 1] - logp[:, 0])
