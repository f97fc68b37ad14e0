"""Prefixes: packed prompts give what each prompt gives in a padded row of its own."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
import pytest
import torch
from tiny_models import FAMILIES, LAYERS, VOCAB, close, new_model, tiny
from torch import Tensor, nn

from dlk_utils.extract import draws, packing, prefixes, states
from dlk_utils.extract.batches import forward, pad
from dlk_utils.extract.draws import draw_states
from dlk_utils.extract.dropout import draw_seed
from dlk_utils.extract.gradients import (
    counterfactual_states,
    first_tokens,
    last_token_gradients,
    states_after_choices,
    states_and_gradients,
)
from dlk_utils.extract.packing import pack
from dlk_utils.extract.passes import activations, answer_logprobs, dropout_draws, margin_gradients
from dlk_utils.extract.prefixes import Prefixes, in_parts, run_prefixes, takes_trees, window
from dlk_utils.extract.states import clean_states, forward_states
from dlk_utils.models.sites import SITES, blocks, site_modules

# MPT is not told positions, and the bias of ALiBi goes by a mask of zeros and ones.
PADDED = ["mpt", "falcon alibi"]
PACKED = [family for family in FAMILIES if family not in PADDED]
WINDOW = ["mistral window", "gemma3_text window"]
QUIET = {"progress": False}


def slow(value: Any) -> Any:
    """A value of a parameter that only the slow tests try."""
    return pytest.param(value, marks=pytest.mark.slow)


def nested_prompts(longest: int = 24, n: int = 30) -> pd.DataFrame:
    """Questions behind a few nested beginnings, in random order.

    Two prompts are equal, and one is the beginning of another.
    """
    rng = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(1, VOCAB) for _ in range(n)]

    beginnings = [tokens(longest // 4)]
    for _ in range(4):
        beginnings.append(rng.choice(beginnings)[: longest // 4] + tokens(longest // 4))
    prompts = []
    for _ in range(n - 2):
        question = tokens(rng.randint(2, longest // 2))
        prompts.append(rng.choice(beginnings) + question)
    prompts += [list(prompts[0]), prompts[1][:-1]]
    rng.shuffle(prompts)
    return pd.DataFrame(
        {
            "row_id": [f"row{i}" for i in range(n)],
            "input_ids": prompts,
            "question_start": [rng.randrange(len(ids)) for ids in prompts],
            "choice_ids": [[[1, 2], [3]] if i % 2 else [[4], [5, 6]] for i in range(n)],
            "strict_ids": [[[1], [3]] if i % 2 else [[4], [5]] for i in range(n)],
        }
    )


def packed_family(family: str) -> tuple[nn.Module, pd.DataFrame]:
    """A model, and prompts that it runs packed."""
    model = tiny(family)
    rows = nested_prompts(int(min(24, window(model) - 1)))
    assert takes_trees(model, int(rows.input_ids.map(len).max()))
    return model, rows


def seeds_of(rows: pd.DataFrame, n_draws: int) -> list[list[int]]:
    return [[draw_seed(row_id, draw) for row_id in rows.row_id] for draw in range(n_draws)]


def cut_small(patch: pytest.MonkeyPatch) -> None:
    """Cut even small trees into a trunk and rows: attention is slow, and a pass costs nothing."""
    patch.setattr(packing, "ATTENTION_NODES", 5)
    patch.setattr(packing, "PASS_NODES", 0)
    patch.setattr(packing, "_BRANCH_SIZES", (4, 8, 16))


def assert_ways_agree(compute: Callable, model: nn.Module) -> None:
    """In one row, with a trunk and rows, and with a padded row for each prompt."""
    in_one_row = compute()
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch)
        with_trunk = compute()
    with pytest.MonkeyPatch.context() as patch:
        for module in (prefixes, states, draws):
            patch.setattr(module, "takes_trees", lambda model, longest: False)
        padded = compute()
    torch.testing.assert_close(in_one_row, padded, **close(model))
    torch.testing.assert_close(with_trunk, padded, **close(model))


@contextlib.contextmanager
def counted_calls(*modules: nn.Module) -> Iterator[list[int]]:
    """Within it, each call of a module counts."""
    calls = [0] * len(modules)
    handles = []
    for number, module in enumerate(modules):

        def count(*_, number: int = number) -> None:
            calls[number] += 1

        handles.append(module.register_forward_pre_hook(count))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# Packed and padded


@pytest.mark.parametrize("longest", [7, 24])
def test_the_trees_of_these_tests_are_cut_into_one_row_and_into_a_trunk_and_rows(
    longest, monkeypatch
):
    complete = list(nested_prompts(longest).input_ids)
    beginnings = [ids[:-1] for ids in complete]
    for sequences in (complete, beginnings):
        in_one_row = pack(sequences)
        assert in_one_row.n_trunk == 0 and len(in_one_row.keys) == 1
    cut_small(monkeypatch)
    for sequences in (complete, beginnings):
        packed = pack(sequences)
        assert packed.n_trunk > 0 and len(packed.keys) > 1
        # Rows with more prompts than others.
        assert len(set(pd.Series(packed.row).value_counts())) > 1


@pytest.mark.parametrize("family", PACKED)
def test_states_and_logits_are_the_same_packed_and_padded(family):
    model, rows = packed_family(family)
    assert_ways_agree(lambda: clean_states(model, list(rows.input_ids), SITES), model)


@pytest.mark.parametrize("family", PACKED)
def test_states_without_logits_are_the_same_packed_and_padded(family):
    model, rows = packed_family(family)
    prompts = list(rows.input_ids)
    assert_ways_agree(lambda: clean_states(model, prompts, SITES, [1], with_logits=False), model)


@pytest.mark.parametrize("family", PACKED)
def test_gradients_are_the_same_packed_and_padded(family):
    model, rows = packed_family(family)
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    assert_ways_agree(lambda: states_and_gradients(model, prompts, choices, SITES), model)


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("with_logits", [True, slow(False)])
@pytest.mark.parametrize("scope", ["last_token", slow("question")])
def test_draws_are_the_same_packed_and_padded(family, scope, with_logits):
    model, rows = packed_family(family)
    options = {"p": 0.3, "scope": scope, "with_logits": with_logits}
    options["question_starts"] = list(rows.question_start)
    prompts, seeds = list(rows.input_ids), seeds_of(rows, 3)
    assert_ways_agree(lambda: draw_states(model, prompts, SITES, seeds=seeds, **options), model)


@pytest.mark.parametrize("family", PACKED)
def test_states_after_either_choice_are_the_same_packed_and_padded(family):
    model, rows = packed_family(family)

    def after_choices() -> list[dict[str, Tensor]]:
        prefixes = run_prefixes(model, list(rows.input_ids))
        last_tokens = prefixes.append()
        last_token_gradients(model, last_tokens, list(rows.choice_ids), ["resid_post"])
        complete = prefixes.extended(last_tokens)
        return states_after_choices(model, complete, first_tokens(rows.strict_ids), SITES)

    assert_ways_agree(after_choices, model)


@pytest.mark.parametrize("family", PACKED)
def test_a_counterfactual_pass_is_the_same_packed_and_padded(family):
    model, rows = packed_family(family)
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    assert_ways_agree(lambda: counterfactual_states(model, prompts, choices, SITES, layer=1), model)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_row_of_more_nodes_than_the_model_has_positions_runs(family):
    model, rows = packed_family(family)
    prefixes = run_prefixes(model, list(rows.input_ids))
    assert prefixes.position_ids.shape[1] > model.config.max_position_embeddings


# Any order, and any batch


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", *map(slow, ["gpt2", "opt", "falcon", *PADDED, *WINDOW])]
)
def test_neither_the_batches_nor_the_order_change_a_result(family):
    model, rows = tiny(family), nested_prompts(12, n=9)

    def everything(rows: pd.DataFrame, batch_tokens: int) -> dict[str, Tensor]:
        ids, choices, keys = list(rows.input_ids), list(rows.choice_ids), list(rows.row_id)
        options = {"batch_tokens": batch_tokens, **QUIET}
        dropout = {"p": 0.2, "keys": keys, "question_starts": list(rows.question_start)}
        logprobs, top_token = answer_logprobs(model, ids, choices, **options)
        found = {"logprobs": logprobs, "top token": top_token}
        for site, state in activations(model, ids, sites=SITES, **options).items():
            found[f"states {site}"] = state.swapaxes(0, 1)
        for site, gradient in margin_gradients(model, ids, choices, sites=SITES, **options).items():
            found[f"gradients {site}"] = gradient.swapaxes(0, 1)
        for scope in draws.SCOPES:
            drawn = dropout_draws(model, ids, scope=scope, **dropout, **options)["resid_post"]
            found[f"draws {scope}"] = drawn.swapaxes(0, 2)
        return {name: torch.from_numpy(x) for name, x in found.items()}

    together = everything(rows, 2048)
    shuffled = rows.sample(frac=1, random_state=1)
    in_other_order = {name: x[shuffled.index.tolist()] for name, x in together.items()}
    for batch_tokens in (32, 200):
        torch.testing.assert_close(
            everything(shuffled, batch_tokens), in_other_order, rtol=1e-5, atol=5e-6
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_prompts_in_two_parts_give_what_they_give_together(family):
    model, rows = packed_family(family)

    def both_of(rows: pd.DataFrame) -> tuple[dict, dict, Tensor]:
        return states_and_gradients(model, list(rows.input_ids), list(rows.choice_ids), SITES)

    together = both_of(rows)
    for part in (slice(0, 11), slice(11, None)):
        found = both_of(rows[part])
        for one, all_rows in zip(found[:2], together[:2], strict=True):
            for site in SITES:
                torch.testing.assert_close(one[site], all_rows[site][:, part], **close(model))
        torch.testing.assert_close(found[2], together[2][part], **close(model))


# Prompts of every kind


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", *PADDED, *WINDOW])
@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param([[5, 6, 7], [8, 9], [5, 6, 7]], id="a prompt twice"),
        pytest.param([[5, 6, 7, 8], [5, 6], [5, 6, 7]], id="beginnings of another"),
        pytest.param([[5, 6, 7]] * 4, id="all equal"),
        pytest.param([[5, 6], [8, 7], [9, 9]], id="nothing in common"),
        pytest.param([[5], [5, 6, 7], [8]], id="one token"),
        pytest.param([[5, 6, 7, 8]], id="one prompt"),
    ],
)
def test_each_prompt_gives_what_it_gives_alone(family, prompts):
    model = tiny(family)
    found, logits = clean_states(model, prompts, SITES)
    for i, ids in enumerate(prompts):
        expected, expected_logits = forward_states(model, pad([ids]), SITES)
        torch.testing.assert_close(logits[[i]], expected_logits, **close(model))
        for site in SITES:
            torch.testing.assert_close(found[site][:, [i]], expected[site], **close(model))


@pytest.mark.parametrize("family", ["llama", "mpt"])
@pytest.mark.parametrize("prompts", [[[5]], [[5], [6, 7, 8]]])
def test_a_prompt_of_one_token_has_no_prefix(family, prompts):
    with pytest.raises(ValueError, match="at least two tokens"):
        run_prefixes(tiny(family), prompts)


@pytest.mark.parametrize("family", WINDOW)
def test_a_choice_behind_a_prompt_that_fills_the_window_does_not_see_beyond_it(family):
    model = tiny(family)
    length = int(window(model))
    rows = pd.DataFrame({"input_ids": [[5, 6, 7, 8, 9, 10, 11, 12][:length], [5, 6, 7, 4]]})
    choices, tokens = [[[3], [4]]] * 2, [[3, 4]] * 2
    prefixes = run_prefixes(model, list(rows.input_ids))
    last_tokens = prefixes.append()
    last_token_gradients(model, last_tokens, choices, ["resid_post"])
    complete = prefixes.extended(last_tokens)
    after = states_after_choices(model, complete, tokens, ["resid_post"])
    for choice, found in enumerate(after):
        longer = [[*ids, pair[choice]] for ids, pair in zip(rows.input_ids, tokens, strict=True)]
        expected, _ = forward_states(model, pad(longer), ["resid_post"])
        torch.testing.assert_close(found, expected, **close(model))


# Which models take trees


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_packed_but_those_that_count_places(family):
    assert takes_trees(tiny(family), 7) == (family not in PADDED)


@pytest.mark.parametrize("family", WINDOW)
def test_prompts_that_fill_a_sliding_window_run_padded(family):
    """Behind such a prompt, a choice does not see the first token."""
    model = tiny(family)
    assert takes_trees(model, 7) and not takes_trees(model, 8)
    assert run_prefixes(model, [[5] * 7, [5] * 8]).sees is None


def test_a_window_that_the_config_switches_off_does_not_count(monkeypatch):
    model = tiny("mistral window")
    monkeypatch.setattr(model.config, "use_sliding_window", False, raising=False)
    assert takes_trees(model, 100)


@pytest.mark.parametrize("family", PADDED)
def test_a_family_that_counts_places_has_a_row_for_each_prompt(family):
    prefixes = run_prefixes(tiny(family), [[5, 6, 7], [5, 6], [5, 6, 7]])
    assert prefixes.sees is None
    assert prefixes.row.tolist() == [0, 1, 2]


def drop_mask(inputs: dict) -> None:
    inputs["attention_mask"] = None


def let_all_be_seen(inputs: dict) -> None:
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])


def see_all_before(inputs: dict) -> None:
    mask = inputs["attention_mask"]
    queries, keys = mask.shape[-2:]
    later = torch.ones(queries, keys).triu(keys - queries + 1).bool()
    least = torch.finfo(mask.dtype).min
    inputs["attention_mask"] = torch.zeros_like(mask).masked_fill(later, least)


def see_the_last_places_alone(inputs: dict) -> None:
    mask = inputs["attention_mask"]
    queries, keys = mask.shape[-2:]
    far = torch.ones(queries, keys).tril(keys - queries - 3).bool()
    inputs["attention_mask"] = mask.masked_fill(far, torch.finfo(mask.dtype).min)


def count_places(inputs: dict) -> None:
    n_keys, n_queries = (inputs["attention_mask"].shape[axis] for axis in (-1, -2))
    places = torch.arange(n_keys - n_queries, n_keys)
    inputs["position_ids"] = places.expand_as(inputs["position_ids"])


def see_nothing(inputs: dict) -> None:
    """No softmax is left: the logits are nan, which is neither equal nor more than anything."""
    inputs["attention_mask"] = torch.full_like(inputs["attention_mask"], torch.nan)


FAULTS = [
    drop_mask,
    let_all_be_seen,
    see_all_before,
    see_the_last_places_alone,
    count_places,
    see_nothing,
]


def sharp_model(family: str, dtype: torch.dtype) -> nn.Module:
    """A model with large weights: attention is far from uniform, so positions make a difference."""
    return new_model(family, initializer_range=0.3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", PACKED)
def test_a_sound_model_passes_the_trial(family, dtype):
    assert takes_trees(sharp_model(family, dtype), 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", PACKED)
def test_a_model_that_does_not_go_by_mask_and_positions_is_found_out(family, fault, dtype):
    """The planted fault changes packed prompts alone, as a kernel without a mask would."""
    model = sharp_model(family, dtype)
    real = model.forward

    def faulty(**inputs: Any) -> Any:
        if inputs["attention_mask"].dim() == 4:
            fault(inputs)
        return real(**inputs)

    model.forward = faulty
    assert not takes_trees(model, 7)


def test_a_model_is_tried_out_once_for_each_implementation_of_attention():
    model = new_model("llama")
    with counted_calls(model) as calls:
        takes_trees(model, 8)
        once = calls[0]
        takes_trees(model, 9)
        assert calls[0] == once
        model.set_attn_implementation("eager")
        takes_trees(model, 8)
        assert calls[0] == 2 * once


# Batches for models that take no trees


def test_a_batch_stays_as_planned_where_the_model_takes_trees():
    ids = {"a": [5] * 10, "b": [5] * 12}
    assert list(in_parts(tiny("llama"), [["b", "a"]], ids.get, 12)) == [["b", "a"]]


def test_a_batch_is_cut_into_padded_ones_where_the_model_takes_no_trees():
    ids = {"a": [5] * 10, "b": [5] * 12, "c": [5] * 5, "d": [6] * 2}
    parts = list(in_parts(tiny("mpt"), [["a", "b"], ["c", "d"]], ids.get, 12))
    assert parts == [["a"], ["b"], ["d", "c"]]


def test_a_batch_with_a_prompt_of_one_token_stays_as_planned():
    ids = {"a": [5] * 10, "b": [5] * 10 + [6], "c": [7]}
    assert list(in_parts(tiny("llama"), [["a", "b", "c"]], ids.get, 12)) == [["a", "b", "c"]]


# What runs


def tokens_run(model: nn.Module, compute: Callable) -> list[int]:
    """How many tokens each pass embeds."""
    counts = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: counts.append(args[0].numel())
    )
    try:
        compute()
    finally:
        handle.remove()
    return counts


def n_distinct(sequences: Sequence[Sequence[int]]) -> int:
    """How many distinct beginnings the sequences have: the nodes of their tree."""
    return len({tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)})


@pytest.mark.parametrize("family", PACKED)
def test_a_common_beginning_runs_once(family):
    model, rows = packed_family(family)
    prompts = list(rows.input_ids)
    assert tokens_run(model, lambda: clean_states(model, prompts, [])) == [n_distinct(prompts)]


@pytest.mark.parametrize("family", PACKED)
def test_a_common_beginning_runs_once_for_gradients(family):
    model, rows = packed_family(family)
    prompts, choices = list(rows.input_ids), list(rows.choice_ids)
    counts = tokens_run(model, lambda: states_and_gradients(model, prompts, choices, SITES))
    assert counts[0] == n_distinct([ids[:-1] for ids in prompts])
    assert set(counts[1:]) == {len(prompts)}


@pytest.mark.parametrize("family", PACKED)
def test_a_trunk_runs_once_for_all_rows(family, monkeypatch):
    model, rows = packed_family(family)
    prompts = list(rows.input_ids)
    cut_small(monkeypatch)
    packed = pack(prompts)
    n_rows, n_places = packed.parents.shape
    counts = tokens_run(model, lambda: clean_states(model, prompts, []))
    assert counts == [packed.n_trunk, n_rows * (n_places - packed.n_trunk)]


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("with_trunk", [False, True])
def test_prefixes_run_no_block_above_the_highest_layer_and_not_its_mlp(
    family, with_trunk, monkeypatch
):
    model, rows = packed_family(family)
    if with_trunk:
        cut_small(monkeypatch)
    mlps = site_modules(model, "mlp_out")
    with (
        counted_calls(*blocks(model)) as of_blocks,
        counted_calls(*mlps) as of_mlps,
        counted_calls(model.get_output_embeddings()) as of_head,
    ):
        run_prefixes(model, list(rows.input_ids), highest=1)
    n_passes = 1 + with_trunk
    assert of_blocks == [n_passes, n_passes, 0]
    assert of_mlps == [n_passes, 0, 0]
    assert of_head == [0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_trunk", [False, True])
def test_states_of_a_layer_need_no_block_above_it_and_no_head(family, with_trunk, monkeypatch):
    model, rows = tiny(family), nested_prompts(7, n=9)
    activations(model, [[5, 6]], **QUIET)  # checks the model's sites, which runs all of it
    if with_trunk:
        cut_small(monkeypatch)
    with (
        counted_calls(*blocks(model)) as of_blocks,
        counted_calls(model.get_output_embeddings()) as of_head,
    ):
        activations(model, list(rows.input_ids), layers=[1], **QUIET)
    assert of_blocks[1] > 0
    assert of_blocks[2] == of_head[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("scope", draws.SCOPES)
@pytest.mark.parametrize("with_trunk", [False, True])
def test_draws_of_a_layer_need_no_block_above_it_and_no_head(
    family, scope, with_trunk, monkeypatch
):
    model, rows = tiny(family), nested_prompts(7, n=9)
    activations(model, [[5, 6]], **QUIET)  # checks the model's sites, which runs all of it
    if with_trunk:
        cut_small(monkeypatch)
    starts = list(rows.question_start)
    with (
        counted_calls(*blocks(model)) as of_blocks,
        counted_calls(model.get_output_embeddings()) as of_head,
    ):
        dropout_draws(
            model, list(rows.input_ids), layers=[1], scope=scope, question_starts=starts, **QUIET
        )
    assert of_blocks[1] > 0
    assert of_blocks[2] == of_head[0] == 0


def test_states_of_some_layers_are_those_of_all_layers():
    model, rows = packed_family("llama")
    prompts = list(rows.input_ids)
    every, _ = clean_states(model, prompts, SITES)
    for layers in ([0], [1], [0, 2]):
        some, _ = clean_states(model, prompts, SITES, layers, with_logits=False)
        for site in SITES:
            torch.testing.assert_close(some[site], every[site][layers], **close(model))


# Prefixes and what is appended to them


@pytest.fixture
def three_prefixes() -> Prefixes:
    """Of the prompts "5 6 7", "5 6 8 9" and "4 3": a row of the nodes 5, 6, 8 and 4."""
    return run_prefixes(tiny("llama"), [[5, 6, 7], [5, 6, 8, 9], [4, 3]])


def test_an_appended_token_sees_its_prefix_and_itself(three_prefixes):
    batch = three_prefixes.append().batch
    assert batch["input_ids"].tolist() == [[7, 9, 3]]
    assert batch["position_ids"].tolist() == [[2, 3, 1]]
    assert batch["attention_mask"].int().tolist() == [
        [
            [1, 1, 0, 0, 1, 0, 0],
            [1, 1, 1, 0, 0, 1, 0],
            [0, 0, 0, 1, 0, 0, 1],
        ]
    ]


def test_copies_of_a_token_stand_side_by_side_and_see_none_of_each_other(three_prefixes):
    appended = three_prefixes.append(torch.tensor([[7, 9, 3], [17, 19, 13]]))
    assert appended.batch["input_ids"][appended.row, appended.place].tolist() == [
        [7, 9, 3],
        [17, 19, 13],
    ]
    own = appended.batch["attention_mask"][:, :, 4:]
    assert torch.equal(own, torch.eye(6).bool()[None])


def test_what_is_spread_over_appended_tokens_is_taken_back_as_it_was(three_prefixes):
    appended = three_prefixes.append(torch.tensor([[7, 9, 3], [17, 19, 13]]))
    values = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(appended.take(appended.spread(values)), values)


def test_prefixes_stay_as_they_are_when_tokens_run_behind_them(three_prefixes):
    model = tiny("llama")
    first, second = (
        forward(model, three_prefixes.append().batch, n_logits=None, use_cache=True).logits
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert three_prefixes.cache.get_seq_length() == 4


@pytest.mark.parametrize(("family", "sizes"), [("llama", [3, 2]), ("mpt", [1] * 5)])
def test_copies_run_side_by_side_where_the_model_takes_trees_and_one_by_one_elsewhere(
    family, sizes
):
    prefixes = run_prefixes(tiny(family), [[5, 6, 7], [5, 6, 8, 9]])
    assert [len(some) for some in prefixes.rounds(5, at_once=3)] == sizes


def test_two_copies_in_a_padded_batch_are_refused():
    prefixes = run_prefixes(tiny("mpt"), [[5, 6, 7], [5, 6]])
    with pytest.raises(ValueError, match="expected one copy in a padded batch, got 2"):
        prefixes.append(torch.tensor([[7, 6], [7, 6]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_have_the_layers_that_the_counts_above_expect(family):
    assert len(blocks(tiny(family))) == LAYERS == 3
