import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, LAYERS, PRECISE, SINGLE, close, tiny, tiny_prompts

from dlk_utils.errors import DeadDropout
from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import last_logits, pad, plan_batches
from dlk_utils.extract.gradients import full_backprop, states_and_gradients
from dlk_utils.extract.stages import fill_rows, in_halves, store_draws, store_gradients
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import (
    _stored_tensor,
    as_dataset,
    describe,
    is_complete,
    read,
    read_rows,
)
from dlk_utils.models.sites import SITES, at_sites


@pytest.mark.trap(16)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_what_each_prompt_gives_alone(family, side):
    model, rows = tiny(family), tiny_prompts()
    states, logits = forward_states(model, pad(rows.input_ids, side=side, token=50), SITES)
    for i, ids in enumerate(rows.input_ids):
        alone, its_logits = forward_states(model, pad([ids]), SITES)
        torch.testing.assert_close(logits[i], its_logits[0], **close(model))
        for site in SITES:
            torch.testing.assert_close(states[site][i], alone[site][0], **close(model))


@pytest.mark.parametrize(
    "family, dtype",
    [(f, d) for f in FAMILIES for d in PRECISE if d == torch.float32 or f not in SINGLE],
)
def test_gradients_from_the_cached_prefix_equal_full_backprop(family, dtype):
    model, rows = tiny(family, dtype), tiny_prompts()
    batch = pad(rows.input_ids)
    states, grads, logp = states_and_gradients(model, batch, list(rows.choice_ids), SITES)
    full = full_backprop(model, batch, list(rows.choice_ids), SITES)
    plain, logits = forward_states(model, batch, SITES)
    torch.testing.assert_close(logp, choice_logprobs(logits, list(rows.choice_ids)), **close(model))
    for site in SITES:
        assert (
            grads[site].shape == full[site].shape == states[site].shape
            and grads[site].shape[:2] == (len(rows), LAYERS)
            and (grads[site].abs().amax(-1) > 0).all()
        )
        assert (
            (grads[site] - full[site]).norm(dim=-1) <= PRECISE[dtype] * full[site].norm(dim=-1)
        ).all()
        torch.testing.assert_close(states[site], plain[site], **close(model))


def test_gradients_in_single_precision_are_those_of_double_precision():
    rows = tiny_prompts()
    single, double = (
        states_and_gradients(tiny("llama", d), pad(rows.input_ids), list(rows.choice_ids), SITES)[1]
        for d in (torch.float32, torch.float64)
    )
    for site in SITES:
        assert (
            (single[site] - double[site]).norm(dim=-1)
            <= PRECISE[torch.float32] * double[site].norm(dim=-1)
        ).all()


@pytest.mark.trap(22, 24)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
@pytest.mark.parametrize("site", SITES)
def test_gradients_equal_finite_differences_of_the_margin(family, site):
    # a llama's RMS norm computes in single precision whatever the model's dtype: a larger step, a wider tolerance
    step, tolerance, noise = (1e-3, 1e-3, 6e-5) if family == "llama" else (1e-5, 1e-6, 1e-8)
    model, rows = tiny(family), tiny_prompts(1)
    batch, choices = pad(rows.input_ids), list(rows.choice_ids)
    grads = states_and_gradients(model, batch, choices, SITES)[1][site]

    def margin(layer: int, channel: int, by: float) -> float:
        def push(_, at, hidden):
            if at == layer:
                hidden = hidden.clone()
                hidden[:, -1, channel] += by
                return hidden

        with at_sites(model, [site], push):
            logp = choice_logprobs(last_logits(model, batch), choices)
        return float(logp[0, 1] - logp[0, 0])

    for layer in range(LAYERS):
        for channel in (0, 17, 35):
            slope = (margin(layer, channel, step) - margin(layer, channel, -step)) / (2 * step)
            assert slope == pytest.approx(float(grads[0, layer, channel]), rel=tolerance, abs=noise)


@pytest.mark.trap(23)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
def test_a_row_s_gradient_does_not_depend_on_what_else_is_in_the_batch(family):
    model, rows = tiny(family), tiny_prompts()
    whole = states_and_gradients(model, pad(rows.input_ids), list(rows.choice_ids), SITES)[1]
    for i in range(len(rows)):
        alone = states_and_gradients(
            model, pad(rows.input_ids[i : i + 1]), list(rows.choice_ids[i : i + 1]), SITES
        )[1]
        for site in SITES:
            torch.testing.assert_close(whole[site][i], alone[site][0], **close(model))


def test_right_padding_is_refused_for_gradients():
    rows = tiny_prompts()
    with pytest.raises(ValueError, match="left-padded"):
        states_and_gradients(
            tiny("llama"), pad(rows.input_ids, side="right"), list(rows.choice_ids), SITES
        )


@pytest.mark.trap(22, 25)
def test_features_are_the_same_bits_whatever_the_labels_and_no_weight_is_touched(tmp_path):
    model, rows = tiny("llama", torch.float32), tiny_prompts()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name, table in (("as it is", rows), ("turned", rows.assign(label=1 - rows.label))):
        store_draws(model, table, tmp_path / name / "draws", record={})
        store_gradients(model, table, tmp_path / name / "gradients", record={})
    for stage in ("draws", "gradients"):
        one, other = (
            sorted((tmp_path / name / stage).glob("shard-*.safetensors"))
            for name in ("as it is", "turned")
        )
        assert one and [p.read_bytes() for p in one] == [p.read_bytes() for p in other]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_batches_hold_each_row_once_within_the_budget_whatever_the_order():
    rows = tiny_prompts(150)
    plan = plan_batches(rows, batch_tokens=30)
    assert plan == plan_batches(rows[::-1], batch_tokens=30)
    assert sorted(r for shard in plan for batch in shard for r in batch) == sorted(rows.row_id)
    length = dict(zip(rows.row_id, rows.input_ids.map(len), strict=True))
    assert all(len(b) * max(length[r] for r in b) <= 30 for shard in plan for b in shard)
    assert max(sum(map(len, shard)) for shard in plan) <= 64


@pytest.mark.trap(4, 33)
def test_rows_are_read_in_the_order_asked_for_and_strangers_and_repeats_are_refused(tmp_path):
    model, rows = tiny("gpt2", torch.float32), tiny_prompts()
    store_gradients(model, rows, tmp_path / "s", record={})
    forward = read_rows(tmp_path / "s", rows, "activation.resid_post.1.0")
    assert (
        read_rows(tmp_path / "s", rows[::-1], "activation.resid_post.1.0") == forward[::-1]
    ).all()
    with pytest.raises(KeyError, match="1 are not stored"):
        read_rows(
            tmp_path / "s",
            pd.concat([rows, rows.tail(1).assign(row_id="stranger")]),
            "choice_logprobs",
        )
    with pytest.raises(KeyError, match="each of 8 rows once"):
        read_rows(tmp_path / "s", pd.concat([rows, rows.tail(1)]), "choice_logprobs")
    assert describe(tmp_path / "s")["rows"] == len(rows)
    table = as_dataset(tmp_path / "s", ["gradient.head_out.2.0"])
    assert dict(zip(table["row_id"], table["example_id"], strict=True)) == dict(
        zip(rows.row_id, rows.example_id, strict=True)
    )
    at = list(table["row_id"]).index(rows.row_id.iloc[3])
    assert (
        table[at]["gradient.head_out.2.0"]
        == read_rows(tmp_path / "s", rows, "gradient.head_out.2.0")[3]
    ).all()


@pytest.mark.trap(24)
def test_a_stored_gradient_is_that_of_the_site_and_layer_in_its_name(tmp_path):
    model, rows = tiny("llama"), tiny_prompts()
    store_gradients(model, rows, tmp_path / "s", record={}, layers=[0, 2])
    full = full_backprop(model, pad(rows.input_ids), list(rows.choice_ids), SITES)
    for site in SITES:
        for layer in (0, 2):
            np.testing.assert_allclose(
                read_rows(tmp_path / "s", rows, f"gradient.{site}.{layer}.0"),
                full[site][:, layer].numpy(),
                rtol=1e-5,
                atol=1e-8,
            )


def test_fewer_than_two_draws_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        store_draws(tiny("llama"), tiny_prompts(), tmp_path / "s", record={}, n_draws=1)


@pytest.mark.trap(19)
def test_a_model_left_in_training_mode_is_refused():
    model, rows = tiny("gpt2"), tiny_prompts()
    model.train()
    try:
        with pytest.raises(ValueError, match="evaluation mode"):
            forward_states(model, pad(rows.input_ids), ["resid_post"])
    finally:
        model.eval()


@pytest.mark.trap(20)
def test_two_draws_that_are_the_same_array_are_refused_with_the_row(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dlk_utils.extract.stages.draw_seed", lambda row, draw, seed: 7
    )  # the planted mistake: one mask for all draws
    rows = tiny_prompts()
    with pytest.raises(DeadDropout, match="two equal draws"):
        store_draws(tiny("llama"), rows, tmp_path / "s", record={})
    assert not is_complete(tmp_path / "s")


@pytest.mark.trap(20)
def test_the_states_of_one_draw_stored_for_both_are_refused_though_the_answers_differ(
    tmp_path, monkeypatch
):
    from dlk_utils.extract import draws

    real = draws.draw_states

    def planted(*args, **options):
        (states, logits), (_, other) = real(*args, **options)
        return [(states, logits), (states, other)]

    monkeypatch.setattr(draws, "draw_states", planted)
    with pytest.raises(DeadDropout, match="two equal draws"):
        store_draws(tiny("llama"), tiny_prompts(), tmp_path / "s", record={})


def test_a_batch_that_does_not_fit_goes_in_halves_and_loses_nothing(tmp_path):
    rows, asked = tiny_prompts(30), []

    def compute(some):
        asked.append(len(some))
        if len(some) > 4:
            raise torch.OutOfMemoryError("planted: more than four rows do not fit")
        return {"x": torch.tensor([[float(i) for i in ids[:2]] for ids in some.input_ids])}

    fill_rows(tmp_path / "s", rows, {}, [[list(rows.row_id)]], compute, "halves", 2048)
    assert read_rows(tmp_path / "s", rows, "x").tolist() == [
        [float(i) for i in ids[:2]] for ids in rows.input_ids
    ]
    assert max(asked) == 30 and sorted(asked)[:2] == [3, 3]
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        in_halves(lambda some: compute(pd.concat([some] * 5)), rows.head(2))


@pytest.mark.parametrize("positions", [1, 2])
def test_one_draw_without_dropout_is_the_clean_pass(tmp_path, positions):
    model, rows = tiny("llama"), tiny_prompts()
    store_draws(model, rows, tmp_path / "s", record={}, n_draws=1, p=0.0, positions=positions)
    states = forward_states(model, pad(rows.input_ids), ["resid_post"], positions=positions)[0]
    for layer in range(LAYERS):
        np.testing.assert_allclose(
            read_rows(tmp_path / "s", rows, f"activation.resid_post.{layer}.0"),
            states["resid_post"][:, layer].numpy(),
            rtol=1e-6,
        )
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["parts"]["mode"] == "clean"
    for draws, p in ((1, 0.1), (2, 0.0)):
        with pytest.raises(ValueError, match=r"draws: expected at least 2|dropout p: expected"):
            store_draws(model, rows, tmp_path / "other", record={}, n_draws=draws, p=p)


def test_a_site_that_comes_before_anything_dropped_is_no_dead_dropout(tmp_path):
    model, rows = tiny("llama"), tiny_prompts()
    store_draws(model, rows, tmp_path / "s", record={}, sites=["head_out"], layers=[0], p=0.3)
    one, other = (read_rows(tmp_path / "s", rows, f"choice_logprobs.{k}") for k in (0, 1))
    assert (one != other).any(1).all()


def test_a_shard_that_was_repaired_is_read_again(tmp_path, capsys):
    model, rows = tiny("llama", torch.float32), tiny_prompts()
    name, make = (
        "activation.resid_post.0.0",
        lambda: store_gradients(model, rows, tmp_path, record={}),
    )
    make()
    good, [shard] = read_rows(tmp_path, rows, name), tmp_path.glob("shard-*.safetensors")
    whole = read(tmp_path, name).numpy().tobytes()
    data = bytearray(shard.read_bytes())
    at = data.find(whole[:64])
    data[at + 3] ^= 0x01
    shard.write_bytes(data)
    _stored_tensor.cache_clear()
    assert not np.array_equal(read_rows(tmp_path, rows, name), good)  # nothing that reads it knows
    make()
    assert "does not have its checksum" in capsys.readouterr().out and np.array_equal(
        read_rows(tmp_path, rows, name), good
    )
