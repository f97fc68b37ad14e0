"""Steering: what is added is there and no longer than it should be; a planted direction decides."""

import numpy as np
import pytest
import torch
from tiny_models import (
    FAMILIES,
    LAYERS,
    WIDTH,
    close_in_single,
    new_model,
    prompts_that_begin_alike,
    tiny,
    tiny_prompts,
)
from torch import nn

from dlk_utils.errors import DlkError, ParameterError, UnknownArchitecture
from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.passes import (
    Move,
    activations,
    answer_logprobs,
    answers_after_moves,
    margin_gradients,
)
from dlk_utils.extract.steering import ablate, scaled_to_spread, steer

pytestmark = pytest.mark.slow

QUIET = {"progress": False}
LAYER = 1


def some_direction(seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width)


def answers(model: nn.Module, rows) -> np.ndarray:
    return answer_logprobs(model, list(rows.input_ids), list(rows.choice_ids), **QUIET)[0]


def states(model: nn.Module, rows) -> np.ndarray:
    return activations(model, list(rows.input_ids), **QUIET)["resid_post"]


def assert_close(model: nn.Module, found: np.ndarray, expected: np.ndarray) -> None:
    tolerance = close_in_single(model)
    np.testing.assert_allclose(found, expected, rtol=tolerance["rtol"], atol=5e-5)


def n_hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


# What it does


@pytest.mark.parametrize("family", FAMILIES)
def test_states_move_by_the_direction_from_its_layer_on(family):
    model, rows, direction = tiny(family), tiny_prompts(), some_direction()
    before = states(model, rows)
    with steer(model, direction, LAYER, 2.0):
        after = states(model, rows)
    assert_close(model, after[LAYER], before[LAYER] + 2 * direction)
    np.testing.assert_array_equal(after[:LAYER], before[:LAYER])
    assert (np.abs(after[LAYER + 1 :] - before[LAYER + 1 :]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_along_a_direction_that_is_taken_out(family):
    model, rows = tiny(family), tiny_prompts()
    directions = np.stack([some_direction(layer) for layer in range(LAYERS)])
    centers = np.stack([some_direction(10 + layer) for layer in range(LAYERS)])

    def components(states: np.ndarray) -> np.ndarray:
        return np.einsum("lnd,ld->nl", states, directions)

    assert np.abs(components(states(model, rows))).min() > 1e-4
    with ablate(model, directions):
        assert np.abs(components(states(model, rows))).max() < 1e-4
    with ablate(model, directions, center=centers):
        kept = components(states(model, rows))
    np.testing.assert_allclose(kept, np.tile((centers * directions).sum(1), (7, 1)), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_tokens_move_if_these_are_chosen(family):
    model, direction = tiny(family), some_direction()
    rows = tiny_prompts()
    prompts = [ids for ids in rows.input_ids if len(ids) >= 4]
    options = {"positions": 4, **QUIET}
    before = activations(model, prompts, **options)["resid_post"][LAYER]
    with steer(model, direction, LAYER, 2.0, positions=2):
        after = activations(model, prompts, **options)["resid_post"][LAYER]
    assert_close(model, after[:, 2:], before[:, 2:] + 2 * direction)
    assert_close(model, after[:, :2], before[:, :2])


def test_directions_of_several_layers_and_nested_blocks_add_up():
    model, rows = tiny("llama"), tiny_prompts()
    one, two = some_direction(1), some_direction(2)
    with steer(model, one, 0, 0.5), steer(model, two, 2, -1):
        nested = states(model, rows)
    with steer(model, np.stack([0.5 * one, -two]), [0, 2], 1):
        assert_close(model, states(model, rows), nested)
    with steer(model, one + two, -1, 1.0):
        together = answers(model, rows)
    with steer(model, one, LAYERS - 1, 1.0), steer(model, two.tolist(), LAYERS - 1, 1.0):
        assert_close(model, answers(model, rows), together)


def test_a_direction_of_the_spread_is_one_standard_deviation_long():
    rng = np.random.default_rng(0)
    direction = np.array([0.0, 5.0, 0.0])
    sample = rng.standard_normal((4000, 3)) * [1.0, 3.0, 9.0] + 7
    assert scaled_to_spread(direction, sample) == pytest.approx([0, 3, 0], abs=0.1)


@torch.no_grad()
def test_generated_tokens_are_steered_like_those_of_the_prompt():
    model, prompt = tiny("llama"), [5, 6, 7]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    batch = {name: x for name, x in pad([prompt]).items() if name != "position_ids"}
    with steer(model, some_direction(), LAYER, 3.0):
        generated = model.generate(**batch, **options)[0].tolist()
        ids = list(prompt)
        while len(ids) < len(generated):
            ids.append(int(last_logits(model, pad([ids])).argmax()))
    assert ids == generated
    assert generated != model.generate(**batch, **options)[0].tolist()


# What does not matter


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["all", 1])
def test_a_prompt_is_steered_alike_alone_in_a_batch_packed_and_padded(family, positions):
    model, rows, direction = tiny(family), prompts_that_begin_alike(), some_direction()
    with steer(model, direction, LAYER, 3.0, positions=positions):
        together = answers(model, rows)
        alone = np.concatenate([answers(model, rows.iloc[[i]]) for i in range(len(rows))])
        choices = list(rows.choice_ids)
        padded = [
            choice_logprobs(last_logits(model, pad(rows.input_ids, side=side)), choices)
            for side in ("left", "right")
        ]
    assert np.abs(together - answers(model, rows)).max() > 1e-3
    assert_close(model, together, alone)
    for of_side in padded:
        assert_close(model, together, of_side.numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_many_moves_of_the_last_token_are_each_what_steering_it_gives(family):
    model, rows = tiny(family), prompts_that_begin_alike()
    moves, expected = [], []
    for number, (layer, scale) in enumerate([(0, 0.0), (1, 3.0), (2, -2.0), (1, -3.0)]):
        direction = some_direction(number)
        vectors = np.broadcast_to(direction, (len(rows), WIDTH))
        moves.append(Move(layer, vectors, np.full(len(rows), scale)))
        with steer(model, direction, layer, scale, positions=1):
            expected.append(answers(model, rows))
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    found = answers_after_moves(model, prompts, choices, moves, **QUIET)
    assert_close(model, found, np.stack(expected))


def test_each_prompt_moves_by_its_own_vector_and_scale():
    model, rows = tiny("llama"), tiny_prompts()
    vectors = np.stack([some_direction(i) for i in range(len(rows))])
    scales = np.linspace(-2, 2, len(rows))
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    [found] = answers_after_moves(model, prompts, choices, [Move(-2, vectors, scales)], **QUIET)
    for i in range(len(rows)):
        with steer(model, vectors[i], -2, float(scales[i]), positions=1):
            assert_close(model, found[i], answers(model, rows.iloc[[i]])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_zero_changes_no_bit(dtype):
    model, rows = tiny("llama", dtype), tiny_prompts()
    before = answers(model, rows)
    with steer(model, some_direction(), "all", 0):
        np.testing.assert_array_equal(answers(model, rows), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["all", 2])
def test_after_the_block_the_model_is_as_before_also_after_an_error(family, positions):
    model, rows = tiny(family), tiny_prompts()
    before, hooks_before = answers(model, rows), n_hooks(model)
    options = {"positions": positions}
    with (
        steer(model, some_direction(), LAYER, 5.0, **options),
        ablate(model, some_direction(1), **options),
    ):
        assert n_hooks(model) > hooks_before
    with pytest.raises(ZeroDivisionError), steer(model, some_direction(), LAYER, 5.0, **options):
        raise ZeroDivisionError
    assert n_hooks(model) == hooks_before
    np.testing.assert_array_equal(answers(model, rows), before)


def test_a_model_that_was_never_used_is_checked_before_its_states_are_changed():
    model, rows = new_model("llama"), tiny_prompts()
    with steer(model, some_direction(), LAYER, 5.0):
        assert np.isfinite(answers(model, rows)).all()


# A planted direction


@torch.no_grad()
def model_that_answers_by(direction: np.ndarray) -> nn.Module:
    """A model that says token 1 where its last state lies along a direction, else token 2.

    A prompt that ends with token 10 has such a state, and one that ends with token 11 the opposite.
    """
    model = new_model("llama", hidden_size=len(direction), tie_word_embeddings=False)
    unit = torch.from_numpy(direction / np.linalg.norm(direction)).float()
    model.model.embed_tokens.weight[10] = 3 * unit
    model.model.embed_tokens.weight[11] = -3 * unit
    model.lm_head.weight.zero_()
    model.lm_head.weight[1], model.lm_head.weight[2] = unit, -unit
    return model


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_the_direction_that_decides_flips_the_answers_and_a_random_one_does_not(layer):
    direction = some_direction(3, width=384)
    unit = direction / np.linalg.norm(direction)
    model = model_that_answers_by(direction)
    prompts = [[5, 6, last] for last in (10, 11)] + [[7, last] for last in (10, 11)]
    margins = {}
    for name, vector in (
        ("none", unit),
        ("decides", unit),
        ("away", -unit),
        ("random", some_direction(4, width=384) / np.sqrt(384)),
    ):
        with steer(model, vector, layer, 0 if name == "none" else 6.0):
            logprobs, _ = answer_logprobs(model, prompts, ([2], [1]), **QUIET)
        margins[name] = logprobs[:, 1] - logprobs[:, 0]
    assert list(margins["none"] > 0) == list(margins["random"] > 0) == [True, False, True, False]
    assert (margins["decides"] > 0).all() and (margins["away"] < 0).all()
    with ablate(model, direction):
        logprobs, _ = answer_logprobs(model, prompts, ([2], [1]), **QUIET)
    assert np.abs(logprobs[:, 1] - logprobs[:, 0]).max() < 1e-3


# What is refused


@pytest.mark.parametrize(
    ("direction", "layer", "scale", "expected"),
    [
        (np.ones(35), 1, 1.0, r"direction: expected a vector \[36\], got the shape \[35\]"),
        (np.ones((2, 36)), 1, 1.0, r"direction: expected a vector \[36\], got .* \[2, 36\]"),
        (np.ones((3, 36)), [0, 1], 1.0, r"one for each of 2 layers \[2, 36\], got .* \[3, 36\]"),
        (np.zeros(36), 1, 1.0, "expected a vector other than zero, got zeros at layer 1"),
        (np.full(36, np.nan), 1, 1.0, "direction: expected finite numbers, got nan or inf"),
        ("north", 1, 1.0, "direction: expected numbers, got 'north'"),
        (np.ones(36), 3, 1.0, "layers: expected 'all', an index below 3"),
        (np.ones(36), [], 1.0, "layers: expected at least one layer"),
        (np.ones(36), 1, float("nan"), "scale: expected a finite number, got nan"),
        (np.ones(36), 1, True, "scale: expected a finite number, got True"),
    ],
)
def test_what_cannot_be_steered_by_is_refused_and_leaves_no_hook(direction, layer, scale, expected):
    model = tiny("llama")
    hooks_before = n_hooks(model)
    with pytest.raises(ParameterError, match=expected), steer(model, direction, layer, scale):
        pass
    assert n_hooks(model) == hooks_before


@pytest.mark.parametrize("positions", [0, -1, "last", True])
def test_positions_are_all_or_a_number_from_the_end(positions):
    model = tiny("llama")
    hooks_before = n_hooks(model)
    with (
        pytest.raises(ParameterError, match="positions: expected 'all' or a number of tokens"),
        steer(model, some_direction(), 1, 1.0, positions=positions),
    ):
        pass
    assert n_hooks(model) == hooks_before


def test_the_center_of_what_is_taken_out_has_to_fit():
    with (
        pytest.raises(
            ParameterError, match=r"center: expected a vector \[36\], or .* got .* \[3\]"
        ),
        ablate(tiny("llama"), some_direction(), center=np.ones(3)),
    ):
        pass


def test_what_runs_prompts_in_parts_is_refused_where_the_last_tokens_are_steered():
    model, rows = tiny("llama"), tiny_prompts()
    gradients = [list(rows.input_ids), list(rows.choice_ids)]
    with (
        steer(model, some_direction(), 1, 1.0, positions=1),
        pytest.raises(ParameterError, match="may run prompts in parts"),
    ):
        margin_gradients(model, *gradients, **QUIET)
    assert margin_gradients(model, *gradients, **QUIET)["resid_post"].any()


def test_a_model_in_training_mode_or_without_a_head_is_refused():
    with (
        pytest.raises(ParameterError, match="evaluation mode"),
        steer(new_model("llama").train(), some_direction(), 1, 1.0),
    ):
        pass
    with pytest.raises(UnknownArchitecture), steer(tiny("llama").model, some_direction(), 1, 1.0):
        pass


@pytest.mark.parametrize(
    ("direction", "sample", "expected"),
    [
        (np.ones(3), np.ones((4, 3)), "states that differ along the direction"),
        (np.ones(2), np.eye(3), r"direction: expected a vector \[3\]"),
        (np.zeros(3), np.eye(3), "other than zero, got zeros"),
        (np.ones(3), np.ones(3), r"states \[n, d\] of two rows or more, got the shape \[3\]"),
        (np.ones(3), np.full((2, 3), np.inf), "expected finite states"),
    ],
)
def test_a_spread_needs_states_that_vary_along_the_direction(direction, sample, expected):
    with pytest.raises(ParameterError, match=expected):
        scaled_to_spread(direction, sample)


def test_moves_of_another_number_of_prompts_or_no_layer_are_refused():
    model, prompts = tiny("llama"), [[5, 6], [7, 8]]
    for move, expected in (
        (
            Move(0, np.ones((3, WIDTH)), np.ones(3)),
            r"moves: expected vectors \[2, 36\] and a scale",
        ),
        (Move(9, np.ones((2, WIDTH)), np.ones(2)), "layers: expected 'all', an index below 3"),
    ):
        with pytest.raises(DlkError, match=expected):
            answers_after_moves(model, prompts, ([3], [4]), [move], **QUIET)
