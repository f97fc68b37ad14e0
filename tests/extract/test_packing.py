"""Packing: sequences become trees in which each distinct beginning stands once; and the plan."""

import itertools
import random
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
import pytest

from dlk_utils.extract.packing import MAX_PROMPTS, Packed, pack, plan_packed
from dlk_utils.extract.store import Plan

SEEDS = range(20)


def random_prompts(seed: int, n: int = 60) -> list[list[int]]:
    """Prompts with random, nested beginnings; some are equal, some the beginning of another."""
    rng = random.Random(seed)
    vocabulary = rng.choice([2, 5, 50])
    prompts = [[rng.randrange(vocabulary)]]
    while len(prompts) < n:
        earlier = rng.choice(prompts)
        beginning = earlier[: rng.randint(0, len(earlier))]
        more = [rng.randrange(vocabulary) for _ in range(rng.choice([0, 1, 3, 10, 40]))]
        if beginning + more:
            prompts.append(beginning + more)
    return prompts


def path_to(packed: Packed, row: int, node: int) -> list[int]:
    """The nodes from the first token of a sequence to one of its nodes."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = int(packed.parents[row, node])
    return nodes[::-1]


def spelled(packed: Packed, row: int, node: int) -> list[Hashable]:
    return [packed.keys[row][i] for i in path_to(packed, row, node)]


def ends_of(packed: Packed) -> list[tuple[int, int]]:
    return list(zip(packed.row.tolist(), packed.node.tolist(), strict=True))


# pack


def test_the_example_of_the_module_is_packed_as_it_is_drawn_there():
    packed = pack(["abc", "abd", "ae"])
    assert packed.keys == [list("abcde")]
    assert packed.parents.tolist() == [[-1, 0, 1, 1, 0]]
    assert packed.depth.tolist() == [[0, 1, 2, 2, 1]]
    assert ends_of(packed) == [(0, 2), (0, 3), (0, 4)]


def test_a_node_sees_itself_and_what_is_on_its_path():
    assert pack(["abc", "abd", "ae"]).sees().astype(int).tolist() == [
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 0, 1, 0],
            [1, 0, 0, 0, 1],
        ]
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_path_to_where_a_sequence_ends_spells_it(seed):
    prompts = random_prompts(seed)
    packed = pack(prompts)
    assert [spelled(packed, row, node) for row, node in ends_of(packed)] == prompts


@pytest.mark.parametrize("seed", SEEDS)
def test_each_distinct_beginning_stands_once_in_its_row(seed):
    packed = pack(random_prompts(seed))
    for row, keys in enumerate(packed.keys):
        beginnings = [tuple(spelled(packed, row, node)) for node in range(len(keys))]
        assert len(set(beginnings)) == len(keys)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_holds_no_node_that_no_sequence_needs(seed):
    packed = pack(random_prompts(seed))
    needed = [path_to(packed, row, node) for row, node in ends_of(packed)]
    for row, keys in enumerate(packed.keys):
        paths = [path for path, end in zip(needed, packed.row, strict=True) if end == row]
        assert set(itertools.chain.from_iterable(paths)) == set(range(len(keys)))


@pytest.mark.parametrize("seed", SEEDS)
def test_depth_counts_the_nodes_above(seed):
    packed = pack(random_prompts(seed))
    for row, keys in enumerate(packed.keys):
        depth = [len(path_to(packed, row, node)) - 1 for node in range(len(keys))]
        assert packed.depth[row, : len(keys)].tolist() == depth


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_of_random_trees_sees_its_path_alone(seed):
    packed = pack(random_prompts(seed))
    sees = packed.sees()
    for row, keys in enumerate(packed.keys):
        for node in range(len(keys)):
            assert np.flatnonzero(sees[row, node]).tolist() == path_to(packed, row, node)


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_is_alone(seed):
    packed = pack(random_prompts(seed))
    width = packed.parents.shape[1]
    for row, keys in enumerate(packed.keys):
        padding = slice(len(keys), width)
        assert (packed.parents[row, padding] == -1).all()
        assert (packed.depth[row, padding] == 0).all()
        alone = np.eye(width, dtype=bool)
        assert (packed.sees()[row, padding] == alone[padding]).all()
        assert (packed.sees()[row, :, padding] == alone[:, padding]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_trees_do_not_depend_on_the_order_of_the_sequences(seed):
    prompts = random_prompts(seed)
    order = np.random.default_rng(seed).permutation(len(prompts))
    packed, shuffled = pack(prompts), pack([prompts[i] for i in order])
    assert shuffled.keys == packed.keys
    np.testing.assert_array_equal(shuffled.parents, packed.parents)
    np.testing.assert_array_equal(shuffled.row, packed.row[order])
    np.testing.assert_array_equal(shuffled.node, packed.node[order])


def test_a_sequence_that_is_the_beginning_of_another_ends_on_its_path():
    packed = pack([[5, 6, 7, 8], [5, 6]])
    assert packed.keys == [[5, 6, 7, 8]]
    assert ends_of(packed) == [(0, 3), (0, 1)]


def test_equal_sequences_share_their_end():
    packed = pack([[5, 6], [5, 7], [5, 6]])
    assert packed.keys == [[5, 6, 7]]
    assert ends_of(packed) == [(0, 1), (0, 2), (0, 1)]


def test_sequences_without_a_common_token_at_the_start_get_a_row_each():
    packed = pack([[8, 6, 7], [5, 6, 7], [9]])
    assert packed.keys == [[5, 6, 7], [8, 6, 7], [9]]
    assert packed.row.tolist() == [1, 0, 2]


def test_sequences_of_other_keys_share_a_node_where_the_complete_keys_are_equal():
    packed = pack([[(5, -1), (6, 0)], [(5, -1), (6, 1)], [(5, -1), (6, 1), (7, 1)]])
    assert packed.keys == [[(5, -1), (6, 0), (6, 1), (7, 1)]]
    assert packed.parents.tolist() == [[-1, 0, 0, 2]]
    assert ends_of(packed) == [(0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize("sequences", [[], [[]], [[5, 6], []]])
def test_empty_sequences_are_refused(sequences):
    with pytest.raises(ValueError, match="expected sequences of at least one token each"):
        pack(sequences)


# How long rows are


def test_a_row_is_not_made_longer_than_what_its_prompts_share_is_worth():
    """Behind 4 common tokens, a row of more than 4 + sqrt(4 * 3004) = 113 nodes takes longer."""
    packed = pack([[1, 2, 3, 4] + [10 + i] * 20 for i in range(20)])
    assert {len(keys) for keys in packed.keys} == {4 + 5 * 20}
    shorter = pack([[1, 2, 3] + [10 + i] * 30 for i in range(20)])
    assert {len(keys) for keys in shorter.keys} == {3 + 3 * 30, 3 + 2 * 30}


def test_the_more_is_shared_the_longer_is_a_row():
    n_rows = [
        len(pack([[1] * shared + [10 + i] * 20 for i in range(40)]).keys)
        for shared in (0, 1, 10, 100)
    ]
    assert n_rows == sorted(n_rows, reverse=True)
    assert n_rows[0] == 40 and n_rows[-1] < 5


# plan_packed


def table(prompts: Sequence[Sequence[int]]) -> pd.DataFrame:
    """Rows as of `make_prompts`, under names that say nothing about the prompts."""
    names = [f"row{i}" for i in np.random.default_rng(0).permutation(len(prompts))]
    return pd.DataFrame({"row_id": names, "input_ids": list(prompts)})


def batches_of(plan: Plan) -> list[list[str]]:
    return list(itertools.chain.from_iterable(plan))


def packed_batches(rows: pd.DataFrame, batch_tokens: int) -> list[Packed]:
    """The planned batches as they run: the trees of all tokens but the last."""
    ids_of = rows.set_index("row_id").input_ids
    plan = plan_packed(rows, batch_tokens)
    return [pack([ids_of[row][:-1] for row in batch]) for batch in batches_of(plan)]


def n_padded(packed: Packed) -> int:
    return packed.parents.size


def n_nodes(packed: Packed) -> int:
    return sum(map(len, packed.keys))


def questions_behind(beginnings: Sequence[list[int]], n_questions: int) -> pd.DataFrame:
    """Behind each beginning the same questions, of 10 to 60 tokens, and the start of the answer."""
    rng = random.Random(0)
    questions = [
        [100 + rng.randrange(1000) for _ in range(rng.randint(10, 60))] for _ in range(n_questions)
    ]
    return table([[*beginning, *ask, 7, 8] for beginning in beginnings for ask in questions])


# Two system prompts of 40 tokens, and two further turns of 60 tokens behind each.
INSTRUCTIONS = [[10 + i] * 40 + [20 + 2 * i + t] * 60 for i in (0, 1) for t in (0, 1)]


@pytest.mark.parametrize("batch_tokens", [32, 200, 2048])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_has_each_row_once(seed, batch_tokens):
    rows = table(random_prompts(seed, 200))
    batches = batches_of(plan_packed(rows, batch_tokens))
    assert sorted(itertools.chain.from_iterable(batches)) == sorted(rows.row_id)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_does_not_depend_on_the_order_of_the_rows(seed):
    rows = table(random_prompts(seed, 200))
    shuffled = rows.sample(frac=1, random_state=seed)
    assert plan_packed(shuffled, 200) == plan_packed(rows, 200)


@pytest.mark.parametrize("batch_tokens", [32, 200, 1000])
@pytest.mark.parametrize("seed", range(60))
def test_a_batch_is_within_its_tokens_when_it_is_packed_again_or_is_one_prompt_s_path(
    seed, batch_tokens
):
    rows = table([[*ids, 1] for ids in random_prompts(seed, 200)])
    for packed in packed_batches(rows, batch_tokens):
        longest = packed.depth.max() + 1
        assert n_padded(packed) <= batch_tokens or packed.parents.shape == (1, longest)


def test_a_batch_has_no_more_prompts_than_fit_into_memory():
    rows = table([[1] * 50 + [2 + i] for i in range(3 * MAX_PROMPTS)])
    batches = batches_of(plan_packed(rows, 10**6))
    assert [len(batch) for batch in batches] == [MAX_PROMPTS] * 3


def test_a_prompt_longer_than_a_batch_is_a_batch():
    rows = table([[1] * 500, [2] * 20, [3] * 20])
    long = rows.row_id[0]
    assert [long] in batches_of(plan_packed(rows, 100))


def test_prompts_of_which_one_is_the_beginning_of_the_other_and_equal_ones_are_planned():
    rows = table([[1, 2, 3], [1, 2], [1], [1, 2, 3], [4]])
    batches = batches_of(plan_packed(rows, 2048))
    assert sorted(itertools.chain.from_iterable(batches)) == sorted(rows.row_id)


def test_prompts_that_share_no_beginning_get_a_row_each():
    rng = np.random.default_rng(0)
    firsts = rng.permutation(100)
    rows = table([[first, *rng.integers(100, 200, 30)] for first in firsts.tolist()])
    for packed in packed_batches(rows, 2048):
        assert len(packed.keys) == len(packed.row)


def test_prompts_with_equal_beginnings_are_in_the_same_row():
    rows = questions_behind(INSTRUCTIONS, 40)
    n_beginnings = []
    for packed in packed_batches(rows, 2048):
        for row in packed.keys:
            n_beginnings.append(sum(row.count(20 + turn) // 60 for turn in range(4)))
    # Each beginning goes over into the next in one row at most.
    assert sum(n > 1 for n in n_beginnings) <= 3
    assert len(n_beginnings) < 4 * 40 / 5


def test_an_instruction_runs_a_few_times_for_many_questions():
    rows = questions_behind(INSTRUCTIONS, 40)
    n_tokens = rows.input_ids.map(len).sum()
    n_run = sum(map(n_nodes, packed_batches(rows, 2048)))
    assert n_run < 0.5 * n_tokens


@pytest.mark.parametrize("batch_tokens", [512, 2048, 8192])
def test_questions_behind_instructions_need_little_padding(batch_tokens):
    batches = packed_batches(questions_behind(INSTRUCTIONS, 200), batch_tokens)
    assert sum(map(n_padded, batches)) <= 1.1 * sum(map(n_nodes, batches))


def test_shards_are_of_about_as_many_prompts_as_asked_for():
    rows = questions_behind(INSTRUCTIONS, 50)
    sizes = [sum(map(len, shard)) for shard in plan_packed(rows, 1000, shard_rows=30)]
    assert min(sizes[:-1]) >= 30 and max(sizes) < 30 + MAX_PROMPTS
