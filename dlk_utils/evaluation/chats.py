"""Score the assistant's tokens of a conversation by a probe."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn

from dlk_utils.errors import DataError, ParameterError
from dlk_utils.evaluation.detector import TruthDetector
from dlk_utils.extract.passes import activations
from dlk_utils.models import configuration
from dlk_utils.questions.conversations import write_conversation

ANSWER, THOUGHT = "answer", "thought"
"""The parts of an assistant's turn."""


class ChatScores(NamedTuple):
    """What `score_chat` finds in a conversation.

    Attributes
    ----------
    tokens : DataFrame
        A row for each scored token: `turn` (the index of its message in `messages`), `part`
        ("answer" or "thought"), `position` (its place in `input_ids`), `token` (its text) and
        `score`.
    turns : DataFrame
        A row for each part of each turn: `turn`, `part`, `n` tokens, and of their scores `mean`,
        `highest`, `lowest`.
    input_ids : list of int
        The tokens of the conversation, as the model read them.
    left_out : list of int
        Indices of the messages whose thought the model's chat template leaves out, so that it is
        not scored.
    """

    tokens: pd.DataFrame
    turns: pd.DataFrame
    input_ids: list[int]
    left_out: list[int]


def score_chat(
    model: nn.Module,
    tokenizer: Any,
    probe: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    layer: int | None = None,
    site: str = "resid_post",
) -> ChatScores:
    """Score every token of the assistant's turns of a conversation, in one forward pass.

    The conversation is written by the model's own chat template. The score of a token is read
    from the state at this token, so it depends on the conversation up to and including this token.
    Thoughts (between ``<think>`` and ``</think>``, or other markers that models use) are kept apart
    from the answer, and the markers are not scored. A probe of truth is fitted where an answer
    begins; its scores elsewhere are less reliable.

    Parameters
    ----------
    model : nn.Module
        A causal model of transformers, in evaluation mode.
    tokenizer
        Its tokenizer, with a chat template.
    probe : TruthDetector or estimator
        What scores a state: a detector, or a probe fitted to the states [n, d] of one layer, with
        `decision_function`.
    messages : list
        The turns, each with `role` ("system", "user" or "assistant") and `content`: one of the
        conversations of `read_chats`.
    layer, site
        Where the state is read. A detector knows its own; a probe needs the layer.

    Returns
    -------
    ChatScores
        The scores by token, and their mean and extremes by turn.

    Raises
    ------
    DataError
        If `messages` are not a conversation with an assistant's turn, hold marks of the format,
        or are longer than the model's context.
    ModelError
        If the tokenizer does not say which characters a token stands for.
    ParameterError
        If the layer is missing, or given with a detector, or the probe gives no score per state.
    TemplateError
        If the tokenizer has no chat template, or one that leaves out or changes a turn.
    """
    if isinstance(probe, TruthDetector):
        if layer is not None:
            raise ParameterError(
                f"layer: expected none, as the detector has its own, got {layer!r}"
            )
        layer, site = probe.layer, probe.site
    elif not hasattr(probe, "decision_function"):
        raise ParameterError(
            f"probe: expected a TruthDetector or a fitted probe, got a {type(probe).__name__}"
        )
    elif layer is None:
        raise ParameterError("layer: expected the layer that the probe was fitted to, got none")
    chat = write_conversation(tokenizer, messages)
    context = configuration.context_length(model)
    if len(chat.input_ids) > context:
        raise DataError(
            f"messages: expected a conversation of at most {context:,} tokens, as the model takes, "
            f"got {len(chat.input_ids):,}; remove some turns"
        )
    # States are kept from the first scored token on; what comes before it is context.
    first = min(token.position for token in chat.tokens)
    n_kept = len(chat.input_ids) - first
    by_site = activations(
        model, [chat.input_ids], sites=[site], layers=layer, positions=n_kept, progress=False
    )
    # Of a single position, `activations` drops the axis: it is put back.
    states = by_site[site][0].reshape(n_kept, -1)
    scores = _scores(probe, states)
    rows = [
        {
            "turn": token.turn,
            "part": THOUGHT if token.is_thought else ANSWER,
            "position": token.position,
            "token": token.text,
            "score": float(scores[token.position - first]),
        }
        for token in chat.tokens
    ]
    tokens = pd.DataFrame(rows)
    return ChatScores(tokens, _by_turn_and_part(tokens), chat.input_ids, chat.left_out)


def _scores(probe: Any, states: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    if isinstance(probe, TruthDetector):
        return probe.score_states(states)
    scores = np.asarray(probe.decision_function(states))
    if scores.shape != (len(states),):
        raise ParameterError(
            f"probe: expected a score for each of {len(states)} states, got scores of the shape "
            f"{list(scores.shape)}; fit the probe to the states of one layer"
        )
    return scores


def _by_turn_and_part(tokens: pd.DataFrame) -> pd.DataFrame:
    by_part = tokens.groupby(["turn", "part"], sort=False).score
    return by_part.agg(n="size", mean="mean", highest="max", lowest="min").reset_index()
