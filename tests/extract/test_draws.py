"""Dropout draws: of the complete prompt, its question and its last token, however batched."""

import pandas as pd
import pytest
import torch
from tiny_models import (
    FAMILIES,
    LAYERS,
    close,
    close_in_single,
    prompts_that_begin_alike,
    tiny,
    tiny_prompts,
)

from dlk_utils.errors import DeadDropout
from dlk_utils.extract import dropout, prefixes
from dlk_utils.extract.batches import pad
from dlk_utils.extract.draws import draw_states, dropout_audit
from dlk_utils.extract.dropout import draw_seed, mc_dropout
from dlk_utils.extract.states import forward_states
from dlk_utils.lab.tables.dropout_pairs import move_table, spread_table
from dlk_utils.models.sites import SITES, at_sites, site_modules

WITH_ATTENTION = [family for family in FAMILIES if not family.startswith(("falcon", "mpt"))]


def seeds_of(rows: pd.DataFrame, n_draws: int) -> list[list[int]]:
    return [[draw_seed(row_id, k) for row_id in rows.row_id] for k in range(n_draws)]


def draw_last_token(model, rows: pd.DataFrame, n_draws: int, sites=("resid_post",), **options):
    seeds = seeds_of(rows, n_draws)
    prompts = list(rows.input_ids)
    return draw_states(model, prompts, sites, seeds=seeds, scope="last_token", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "places"),
    [
        *((family, ["attn_out", "mlp_out"]) for family in FAMILIES),
        *((family, ["attention", "embedding"]) for family in WITH_ATTENTION),
        ("gpt2", "native"),
        ("falcon", "native"),
    ],
)
def test_draws_of_the_last_token_differ_and_do_not_depend_on_how_they_are_batched(family, places):
    model, rows = tiny(family), tiny_prompts(4)
    options = {"p": 0.4, "places": places}
    loose = close(model) if "attn_out" in places else close_in_single(model)
    together = draw_last_token(model, rows, 3, SITES, **options)
    two_at_once = draw_last_token(model, rows, 3, SITES, at_once=2, **options)
    for (states, logits), (other_states, other_logits) in zip(together, two_at_once, strict=True):
        torch.testing.assert_close(other_logits, logits, **loose)
        for site in SITES:
            torch.testing.assert_close(other_states[site], states[site], **loose)
    last_draw = together[2][0]["resid_post"]
    for i in (0, 3):
        alone = draw_last_token(model, rows.iloc[[i]], 3, at_once=1, **options)[2][0]["resid_post"]
        torch.testing.assert_close(alone[:, 0], last_draw[:, i], **loose)
    assert ((together[0][0]["resid_post"] - last_draw).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("family", ["mpt", "falcon alibi", "mistral window", "gemma3_text window"])
def test_draws_go_one_by_one_where_a_mask_does_not_say_all_and_would_be_wrong_together(
    family, monkeypatch
):
    model, rows = tiny(family), tiny_prompts()
    right = draw_last_token(model, rows, 4, p=0.3)
    monkeypatch.setattr(prefixes, "takes_trees", lambda *_: True)
    try:
        planted = draw_last_token(model, rows, 4, p=0.3)
    except (RuntimeError, ValueError, IndexError):
        # The family cannot even run with such a mask.
        return
    expected = right[3][0]["resid_post"]
    assert not torch.allclose(planted[3][0]["resid_post"], expected, **close(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "opt"])
def test_a_draw_of_the_last_token_is_a_pass_in_which_only_that_token_is_dropped(
    family, monkeypatch
):
    """The reference runs the complete prompt, and keeps everything at its earlier tokens."""
    model, rows, p = tiny(family), tiny_prompts(1), 0.3
    batch, n_before = pad(rows.input_ids), len(rows.input_ids[0]) - 1
    [(draw, _)] = draw_last_token(model, rows, 1, p=p)
    real_mask = dropout.keep_mask

    def keep_earlier_tokens(seeds, positions, d, p):
        return real_mask(seeds, positions, d, p) | (positions < n_before)[:, :, None]

    def undo_scale(module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        rows_of_tokens = hidden.view(-1, hidden.shape[-1])
        rows_of_tokens[:n_before] *= 1 - p

    monkeypatch.setattr(dropout, "keep_mask", keep_earlier_tokens)
    with mc_dropout(model, p, seeds=[draw_seed("row0", 0)], position_ids=batch["position_ids"]):
        modules = site_modules(model, "attn_out") + site_modules(model, "mlp_out")
        handles = [module.register_forward_hook(undo_scale) for module in modules]
        expected, _ = forward_states(model, batch, ["resid_post"])
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(draw["resid_post"], expected["resid_post"], **close(model))


# Scope "question"


def draw_question(model, rows: pd.DataFrame, n_draws: int, sites=("resid_post",), **options):
    return draw_states(
        model,
        list(rows.input_ids),
        sites,
        seeds=seeds_of(rows, n_draws),
        scope="question",
        question_starts=list(rows.question_start),
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "places"),
    [
        *((family, ["attn_out", "mlp_out"]) for family in FAMILIES),
        *((family, ["attention", "embedding"]) for family in WITH_ATTENTION),
        ("gpt2", "native"),
    ],
)
def test_a_draw_of_the_question_is_a_padded_pass_in_which_the_tokens_before_it_are_kept(
    family, places
):
    model, rows = tiny(family), prompts_that_begin_alike(4)
    batch = pad(rows.input_ids)
    drop_at = batch["position_ids"] >= torch.tensor(rows.question_start.tolist())[:, None]
    draws = draw_question(model, rows, 3, SITES, p=0.4, places=places)
    for seeds, (states, logits) in zip(seeds_of(rows, 3), draws, strict=True):
        options = {"seeds": seeds, "position_ids": batch["position_ids"], "places": places}
        with mc_dropout(model, 0.4, drop_at=drop_at, **options):
            expected, expected_logits = forward_states(model, batch, SITES)
        loose = close(model) if "attn_out" in places else close_in_single(model)
        torch.testing.assert_close(logits, expected_logits, **loose)
        torch.testing.assert_close(states, expected, **loose)


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_nothing_is_dropped_before_the_question(family):
    """With the same masks, another dropout probability changes only what comes after."""
    model, rows = tiny(family), prompts_that_begin_alike(2)
    ids = list(rows.input_ids)
    batch = pad(ids)
    before_question = int(rows.question_start[0])
    drop_at = batch["position_ids"] >= before_question
    recorded = []

    def keep(site: str, layer: int, hidden: torch.Tensor) -> None:
        recorded.append(hidden.clone())

    with at_sites(model, ["resid_post"], keep):
        forward_states(model, batch, [])
        options = {"seeds": [1, 2], "position_ids": batch["position_ids"], "drop_at": drop_at}
        with mc_dropout(model, 0.4, **options):
            forward_states(model, batch, [])
    for clean, dropped in zip(recorded[:LAYERS], recorded[LAYERS:], strict=True):
        is_same = (clean == dropped).all(-1)
        assert is_same[batch["attention_mask"].bool() & ~drop_at].all()
        assert not is_same[drop_at].any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mpt", "falcon alibi"])
def test_a_question_that_begins_with_the_prompt_is_drawn_as_the_complete_prompt(family):
    model, rows = tiny(family), tiny_prompts().assign(question_start=0)
    of_question = draw_question(model, rows, 2, SITES, p=0.3)
    of_sequence = draw_states(
        model, list(rows.input_ids), SITES, seeds=seeds_of(rows, 2), p=0.3, scope="sequence"
    )
    torch.testing.assert_close(of_question, of_sequence, **close(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mpt", "falcon alibi"])
def test_a_question_of_one_token_is_drawn_as_the_last_token(family):
    model, rows = tiny(family), tiny_prompts()
    rows = rows.assign(question_start=rows.input_ids.map(len) - 1)
    of_question = draw_question(model, rows, 2, SITES, p=0.3)
    of_last_token = draw_last_token(model, rows, 2, SITES, p=0.3)
    torch.testing.assert_close(of_question, of_last_token, **close(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mpt"])
@pytest.mark.parametrize(
    "places", [["attn_out", "mlp_out"], pytest.param(["mlp_out"], marks=pytest.mark.slow)]
)
def test_masks_of_a_question_are_the_same_whatever_the_batch(family, places):
    model, rows = tiny(family), prompts_that_begin_alike(3)
    options = {"p": 0.3, "places": places}
    together = draw_question(model, rows, 3, **options)
    reversed_rows = draw_question(model, rows[::-1], 3, **options)
    two_draws = draw_question(model, rows, 2, **options)
    for i in range(len(rows)):
        alone = draw_question(model, rows.iloc[[i]], 3, **options)
        for draw in range(3):
            expected = together[draw][0]["resid_post"][:, i]
            found = alone[draw][0]["resid_post"][:, 0]
            torch.testing.assert_close(found, expected, **close(model))
            found = reversed_rows[draw][0]["resid_post"][:, -1 - i]
            torch.testing.assert_close(found, expected, **close(model))
    torch.testing.assert_close(two_draws, together[:2], **close(model))


def test_equal_questions_of_two_rows_have_masks_of_their_own():
    model, rows = tiny("llama"), prompts_that_begin_alike(2)
    rows["input_ids"] = [rows.input_ids[0]] * 2
    [(states, _)] = draw_question(model, rows, 1, p=0.3)
    assert (states["resid_post"][:, 0] != states["resid_post"][:, 1]).any(-1).all()


def test_question_starts_that_leave_no_question_are_refused():
    model, prompts = tiny("llama"), [[5, 6, 7], [8, 9]]
    options = {"seeds": [[1, 2]], "p": 0.1, "scope": "question"}
    with pytest.raises(ValueError, match="expected question_starts, one for each prompt"):
        draw_states(model, prompts, ["resid_post"], **options)
    with pytest.raises(ValueError, match=r"one for each prompt \(2\), got 1"):
        draw_states(model, prompts, ["resid_post"], question_starts=[1], **options)
    with pytest.raises(ValueError, match="got 2 in prompt 1, which has 2 tokens"):
        draw_states(model, prompts, ["resid_post"], question_starts=[1, 2], **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_native_dropout_moves_every_family(family):
    audit = dropout_audit(tiny(family), tiny_prompts().tail(6), p=0.4, places="native")
    assert (audit.relative_move > 0).any()


@pytest.mark.trap(18)
def test_a_model_in_which_nothing_moves_is_refused():
    model = tiny("llama", torch.float32)
    assert (dropout_audit(model, tiny_prompts(), p=0.1).least > 0).all()
    layers = model.model.layers
    weights = [m.weight for x in layers for m in (x.self_attn.o_proj, x.mlp.down_proj)]
    kept = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.zero_()
        with pytest.raises(DeadDropout, match="7 of 7 rows"):
            dropout_audit(model, tiny_prompts(), p=0.1)
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.data.copy_(before)


def test_places_scopes_and_positions_that_do_not_exist_are_refused():
    model, rows = tiny("llama"), tiny_prompts()
    with pytest.raises(ValueError, match="dropout places"):
        dropout_audit(model, rows, places=["elbow"])
    with pytest.raises(ValueError, match="scope"):
        dropout_audit(model, rows, scope="somewhere")
    with pytest.raises(ValueError, match=r"positions: expected 1 with scope 'last_token'.* got 3"):
        draw_last_token(model, rows, 2, p=0.1, positions=3)
    with pytest.raises(DeadDropout, match="falcon: attention dropout cannot"):
        dropout_audit(tiny("falcon"), rows, places="attention")


@pytest.mark.slow
def test_the_range_of_two_draws_is_their_move_and_more_draws_never_narrow_it():
    model, rows = tiny("llama", torch.float32), tiny_prompts()
    spread, moves = spread_table(model, rows, n_draws=8, p=0.2), move_table(model, rows, ps=[0.2])
    for scope, table in spread.groupby("scope"):
        assert list(table.draws) == [2, 4, 8] and table.range.is_monotonic_increasing
        move = moves.answer_move[moves.scope == scope].item()
        assert table.range.iloc[0] == pytest.approx(move, rel=1e-5)
        assert ((table.range_low <= table.range) & (table.range <= table.range_high)).all()
        assert (table.mean_off_plain > 0).all()
