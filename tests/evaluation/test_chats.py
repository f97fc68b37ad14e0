"""Scores of a chat: those of the states that a plain forward pass has at the same tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, WIDTH, byte_tokenizer, new_model

from dlk_utils.errors import DataError, ParameterError
from dlk_utils.evaluation.chats import ANSWER, THOUGHT, score_chat
from dlk_utils.evaluation.detector import TruthDetector
from dlk_utils.probes import MeanDifference

CHAT = [
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "<think>Hm.</think>It is"},
]
LONGER = [*CHAT, {"role": "user", "content": "?"}, {"role": "assistant", "content": "Y"}]
LAYER = 1


def detector(layer: int = LAYER) -> TruthDetector:
    weight = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    return TruthDetector("resid_post", layer, weight, 0.5, 0.0, {})


def tiny_model(family: str = "llama", **options):
    """A tiny model of a family, for the tokens of `byte_tokenizer`."""
    return new_model(family, vocab_size=len(byte_tokenizer()), **options)


@torch.no_grad()
def plain_states(model, input_ids: list[int]) -> torch.Tensor:
    """The output of block `LAYER` at each token, [n, d], as transformers gives it."""
    output = model(torch.tensor([input_ids]), output_hidden_states=True)
    # The first of them is the embedding.
    return output.hidden_states[LAYER + 1][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_of_a_token_is_that_of_its_state_in_a_plain_pass(family):
    model, judge = tiny_model(family), detector()
    scores = score_chat(model, byte_tokenizer(), judge, CHAT)
    expected = plain_states(model, scores.input_ids) @ judge.weight + judge.bias
    tokens = scores.tokens
    np.testing.assert_allclose(tokens.score, expected[tokens.position], rtol=1e-4, atol=1e-4)
    text = byte_tokenizer().decode(scores.input_ids)
    for part, words in ((THOUGHT, "Hm."), (ANSWER, "It is")):
        of_part = tokens[tokens.part == part]
        assert "".join(of_part.token) == words
        assert list(of_part.position) == [text.index(words) + i for i in range(len(words))]


def test_what_follows_a_token_changes_nothing():
    model = tiny_model(max_position_embeddings=128)
    short, longer = (
        score_chat(model, byte_tokenizer(), detector(), chat) for chat in (CHAT, LONGER)
    )
    np.testing.assert_allclose(
        longer.tokens.score[: len(short.tokens)], short.tokens.score, rtol=1e-5, atol=1e-5
    )
    assert longer.tokens.token.iloc[-1] == "Y"


def test_a_chat_that_ends_with_its_only_scored_token_has_one_row():
    model, judge = tiny_model(), detector()
    template = (
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}:{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    scores = score_chat(model, tokenizer, judge, [CHAT[0], LONGER[-1]])
    expected = plain_states(model, scores.input_ids)[-1] @ judge.weight + judge.bias
    assert scores.tokens.score.tolist() == pytest.approx([float(expected)], rel=1e-4, abs=1e-4)


def test_turns_have_the_mean_and_the_extremes_of_each_part():
    model = tiny_model(max_position_embeddings=128)
    scores = score_chat(model, byte_tokenizer(), detector(), LONGER)
    assert scores.turns[["turn", "part", "n"]].to_numpy().tolist() == [
        [1, THOUGHT, 3],
        [1, ANSWER, 5],
        [3, ANSWER, 1],
    ]
    answer = scores.tokens[(scores.tokens.turn == 1) & (scores.tokens.part == ANSWER)].score
    row = scores.turns.iloc[1]
    assert (row["mean"], row["highest"], row["lowest"]) == (
        pytest.approx(answer.mean()),
        answer.max(),
        answer.min(),
    )


def test_a_fitted_probe_of_any_layer_scores_too():
    rng = np.random.default_rng(0)
    probe = MeanDifference().fit(rng.normal(size=(20, WIDTH)), np.arange(20) % 2)
    model = tiny_model()
    scores = score_chat(model, byte_tokenizer(), probe, CHAT, layer=LAYER)
    states = plain_states(model, scores.input_ids)[scores.tokens.position].numpy()
    expected = probe.decision_function(states)
    np.testing.assert_allclose(scores.tokens.score, expected, rtol=1e-4, atol=1e-4)


def test_what_scores_needs_its_layer_and_a_detector_has_it():
    model, tokenizer = tiny_model(), byte_tokenizer()
    probe = MeanDifference().fit(np.eye(4, WIDTH), [0, 1, 0, 1])
    with pytest.raises(ParameterError, match="expected the layer that the probe was fitted to"):
        score_chat(model, tokenizer, probe, CHAT)
    with pytest.raises(ParameterError, match="expected none, as the detector has its own, got 1"):
        score_chat(model, tokenizer, detector(), CHAT, layer=1)
    with pytest.raises(ParameterError, match="expected a TruthDetector or a fitted probe"):
        score_chat(model, tokenizer, "probe", CHAT, layer=1)
    of_two_layers = SimpleNamespace(decision_function=lambda X: np.zeros((2, len(X))))
    with pytest.raises(
        ParameterError,
        match=r"got scores of the shape \[2, \d+\]; fit the probe to the states of one",
    ):
        score_chat(model, tokenizer, of_two_layers, CHAT, layer=1)


def test_a_conversation_beyond_the_context_is_refused_and_not_cut():
    model = tiny_model(max_position_embeddings=32)
    with pytest.raises(DataError, match="of at most 32 tokens, as the model takes, got 5"):
        score_chat(model, byte_tokenizer(), detector(), CHAT)


def test_what_is_no_conversation_is_refused():
    with pytest.raises(DataError, match="messages: expected a turn of the assistant"):
        score_chat(tiny_model(), byte_tokenizer(), detector(), CHAT[:1])
