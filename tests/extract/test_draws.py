import pandas as pd
import pytest
import torch
from conftest import FAMILIES, close, tiny, tiny_prompts

from dlk_utils.errors import DeadDropout
from dlk_utils.extract import draws
from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.draws import draw_states, dropout_audit
from dlk_utils.extract.dropout import DROPOUT_SITES, draw_seed, keep_pairs, mc_dropout, native_sites
from dlk_utils.extract.stages import store_draws
from dlk_utils.extract.states import forward_states
from dlk_utils.extract.store import describe, read_rows
from dlk_utils.lab.tables.dropout_pairs import move_table, spread_table
from dlk_utils.models.sites import SITES

WITH_ATTENTION = [
    f for f in FAMILIES if f not in ("falcon", "falcon grouped", "falcon alibi", "mpt")
]


def seeds(rows: pd.DataFrame, draws: int) -> list[list[int]]:
    return [[draw_seed(r, k) for r in rows.row_id] for k in range(draws)]


LAST_TOKEN = [
    (f, places)
    for places in ("native", ["attn_out", "mlp_out"], ["attention", "embedding"])
    for f in (FAMILIES if "attention" not in places else WITH_ATTENTION)
]


@pytest.mark.parametrize(("family", "places"), LAST_TOKEN)
def test_draws_of_the_last_token_differ_and_do_not_depend_on_how_they_are_batched(family, places):
    model, rows = tiny(family), tiny_prompts()
    batch, options = pad(rows.input_ids), dict(p=0.4, scope="last_token", places=places)
    loose = (
        close(model)
        if model.dtype == torch.float32 or "attn_out" in places
        else dict(rtol=1e-5, atol=1e-6)
    )  # where attention is written out, some families take the softmax in single precision
    whole = draw_states(model, batch, SITES, seeds=seeds(rows, 5), **options)
    for at_once in (1, 2):
        parts = draw_states(model, batch, SITES, seeds=seeds(rows, 5), at_once=at_once, **options)
        for k, (states, logits) in enumerate(whole):
            for site in SITES:
                torch.testing.assert_close(parts[k][0][site], states[site], **loose)
            torch.testing.assert_close(parts[k][1], logits, **loose)
    for i in range(len(rows)):
        alone = draw_states(
            model,
            pad([rows.input_ids[i]]),
            ["resid_post"],
            seeds=[[s[i]] for s in seeds(rows, 5)],
            **options,
        )
        torch.testing.assert_close(
            alone[3][0]["resid_post"][0], whole[3][0]["resid_post"][i], **loose
        )
    assert ((whole[0][0]["resid_post"] - whole[1][0]["resid_post"]).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("family", ["mpt", "falcon alibi", "mistral window", "gemma3_text window"])
def test_draws_go_one_by_one_where_a_mask_does_not_say_all_and_would_be_wrong_together(
    family, monkeypatch
):
    model, rows = tiny(family), tiny_prompts()
    draw = lambda: draw_states(
        model, pad(rows.input_ids), ["resid_post"], seeds=seeds(rows, 4), p=0.3, scope="last_token"
    )
    right = draw()
    monkeypatch.setattr(draws, "takes_a_mask", lambda *_: True)
    try:
        planted = draw()
    except (RuntimeError, ValueError, IndexError):
        return  # the family cannot even run with such a mask
    assert not torch.allclose(
        planted[3][0]["resid_post"], right[3][0]["resid_post"], **close(model)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "opt"])
def test_a_draw_of_the_last_token_is_a_pass_in_which_only_that_token_is_dropped(family):
    """The reference runs the whole prompt, with the masks of all earlier tokens set to keep."""
    from dlk_utils.extract import dropout

    model, ids = tiny(family), tiny_prompts(1).input_ids[0]
    batch, seed = pad([ids]), [draw_seed("row0", 0)]
    mine = draw_states(model, batch, ["resid_post"], seeds=[seed], p=0.3, scope="last_token")[0][0][
        "resid_post"
    ]
    real = dropout.keep_mask
    try:
        dropout.keep_mask = lambda s, positions, d, p: (
            real(s, positions, d, p) | (positions < len(ids) - 1)[:, :, None]
        )
        # kept channels are scaled by 1/(1-p): for the earlier tokens that is undone
        with mc_dropout(model, 0.3, seeds=seed, positions=batch["position_ids"]):
            undo = [
                m.register_forward_hook(lambda m, a, out: _scaled(out, len(ids) - 1, 0.7))
                for m in _outputs(model)
            ]
            reference = forward_states(model, batch, ["resid_post"])[0]["resid_post"]
            [h.remove() for h in undo]
    finally:
        dropout.keep_mask = real
    torch.testing.assert_close(mine, reference, **close(model))


def _outputs(model) -> list:
    from dlk_utils.models.sites import site_modules

    return site_modules(model, "attn_out") + site_modules(model, "mlp_out")


def _scaled(out, n: int, by: float):
    hidden = out if isinstance(out, torch.Tensor) else out[0]
    flat = hidden.dim() == 2
    scaled = torch.cat(
        [hidden[:n] * by, hidden[n:]] if flat else [hidden[:, :n] * by, hidden[:, n:]],
        0 if flat else 1,
    )
    return scaled if isinstance(out, torch.Tensor) else (scaled, *out[1:])


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_attention_written_out_for_dropout_is_the_family_s_own_where_nothing_is_dropped(family):
    model, batch = tiny(family), pad(tiny_prompts().input_ids)
    with mc_dropout(
        model, 1e-9, seeds=range(7), positions=batch["position_ids"], sites="attention"
    ):  # under 1/65536: every mask keeps all
        written = last_logits(model, batch)
    torch.testing.assert_close(
        written,
        last_logits(model, batch),
        **(close(model) if model.dtype == torch.float32 else dict(rtol=1e-5, atol=1e-6)),
    )


@pytest.mark.parametrize("family", WITH_ATTENTION)
@pytest.mark.parametrize("place", ["attention", "embedding"])
def test_dropout_at_every_place_differs_repeats_and_does_not_depend_on_padding(family, place):
    model, rows = tiny(family), tiny_prompts()

    def draw(table, k, side="left"):
        batch = pad(table.input_ids, side=side)
        with mc_dropout(
            model,
            0.4,
            seeds=[draw_seed(r, k) for r in table.row_id],
            positions=batch["position_ids"],
            sites=place,
        ):
            return forward_states(model, batch, ["resid_post"])[0]["resid_post"]

    rows = rows[rows.input_ids.map(len) > 6]
    assert torch.equal(draw(rows, 0), draw(rows, 0))
    assert ((draw(rows, 0) - draw(rows, 1)).abs().amax(-1) > 0).all()
    loose = (
        close(model) if model.dtype == torch.float32 else dict(rtol=1e-5, atol=1e-6)
    )  # some families take the softmax in single precision
    torch.testing.assert_close(draw(rows, 0, "right"), draw(rows, 0), **loose)
    torch.testing.assert_close(
        torch.cat([draw(rows.iloc[[i]], 0) for i in range(len(rows))]), draw(rows, 0), **loose
    )


def test_masks_of_attention_are_unrelated_over_heads_queries_and_keys_and_keep_one_minus_p():
    keep = keep_pairs(
        torch.arange(9, dtype=torch.int32)[:, None], torch.arange(40).expand(9, 40), 6, 40, 0.3
    ).double()
    assert (
        keep.shape == (9, 6, 40, 40)
        and abs(float(keep.mean()) - 0.7) < 4 * (0.21 / keep.numel()) ** 0.5
    )
    centred = (keep - keep.mean()) / keep.std()
    for a, b in [
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[:, :, 1:], centred[:, :, :-1]),
        (centred[..., 1:], centred[..., :-1]),
        (centred, centred.mT),
    ]:
        off = (a * b).flatten()
        if a is centred:
            off = off[~torch.eye(40, dtype=torch.bool).expand(9, 6, 40, 40).flatten()]
        assert abs(float(off.mean())) < 5 / off.numel() ** 0.5


def test_a_family_says_where_its_own_dropout_is_and_native_acts_there():
    assert native_sites(tiny("gpt2")) == list(DROPOUT_SITES) and native_sites(tiny("llama")) == [
        "attention"
    ]
    assert (
        native_sites(tiny("gpt_neox")) == list(DROPOUT_SITES)
        and native_sites(tiny("stablelm")) == ["mlp_out", "attention"]
        and native_sites(tiny("phi3")) == ["attn_out", "mlp_out", "attention"]
    )
    assert native_sites(tiny("falcon")) == native_sites(tiny("mpt")) == ["attn_out", "mlp_out"]
    model, batch = tiny("llama"), pad(tiny_prompts().input_ids)

    def logits(sites):
        with mc_dropout(model, 0.4, seeds=range(7), positions=batch["position_ids"], sites=sites):
            return last_logits(model, batch)

    assert torch.equal(logits("native"), logits(["attention"])) and not torch.equal(
        logits("native"), logits(["attn_out"])
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_native_dropout_moves_every_family(family):
    assert (
        dropout_audit(tiny(family), tiny_prompts().tail(6), p=0.4, places="native").relative_move
        > 0
    ).any()


def test_places_and_scopes_that_do_not_exist_are_refused():
    rows = tiny_prompts()
    with pytest.raises(ValueError, match="dropout sites"):
        dropout_audit(tiny("llama"), rows, places=["elbow"])
    with pytest.raises(ValueError, match="scope"):
        dropout_audit(tiny("llama"), rows, scope="somewhere")
    with pytest.raises(DeadDropout, match="falcon: attention dropout cannot"):
        dropout_audit(tiny("falcon"), rows, places="attention")
    assert tiny("llama").config._attn_implementation == "sdpa"


def test_a_store_of_many_draws_of_the_last_token_at_some_layers(tmp_path):
    model, rows = tiny("llama", torch.float32), tiny_prompts()
    store_draws(
        model,
        rows,
        tmp_path / "s",
        record={},
        draws=4,
        scope="last_token",
        layers="::2",
        sites=["resid_post", "head_out"],
    )
    assert describe(tmp_path / "s")["tensors"] == 4 * (2 * 2 + 1)


def test_a_store_of_the_last_few_tokens_holds_each_of_them(tmp_path):
    model, rows = tiny("llama", torch.float32), tiny_prompts()
    rows = rows[rows.input_ids.map(len) >= 3]
    for n in (1, 3):
        store_draws(model, rows, tmp_path / str(n), record={}, positions=n)
    one, few = (read_rows(tmp_path / str(n), rows, "activation.resid_post.1.0") for n in (1, 3))
    assert (
        few.shape == (len(rows), 3, 36)
        and (few[:, -1] == one).all()
        and (few[:, 0] != one).any(1).all()
    )
    with pytest.raises(ValueError, match=r"positions: expected 1 with scope 'last_token'.* got 3"):
        store_draws(model, rows, tmp_path / "last", record={}, positions=3, scope="last_token")


def test_the_range_of_two_draws_is_their_move_and_more_draws_never_narrow_it():
    model, rows = tiny("llama", torch.float32), tiny_prompts()
    spread, moves = spread_table(model, rows, n_draws=8, p=0.2), move_table(model, rows, ps=[0.2])
    for scope, t in spread.groupby("scope"):
        assert list(t.draws) == [2, 4, 8] and t.range.is_monotonic_increasing
        assert t.range.iloc[0] == pytest.approx(
            moves.answer_move[moves.scope == scope].item(), rel=1e-5
        )
        assert ((t.range_low <= t.range) & (t.range <= t.range_high)).all() and (
            t.mean_off_plain > 0
        ).all()
