"""Packing: sequences become a tree in which each distinct beginning stands once; and the plan."""

import itertools
import random
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
import pytest

from dlk_utils.extract.packing import MAX_PROMPTS, Packed, pack, plan_packed
from dlk_utils.extract.store import Plan

SEEDS = range(12)


def random_prompts(seed: int, n: int = 60, *, longest_piece: int = 40) -> list[list[int]]:
    """Prompts with random, nested beginnings; some are equal, some the beginning of another."""
    rng = random.Random(seed)
    vocabulary = rng.choice([2, 5, 50])
    prompts = [[rng.randrange(vocabulary)]]
    while len(prompts) < n:
        earlier = rng.choice(prompts)
        beginning = earlier[: rng.randint(0, len(earlier))]
        length = rng.choice([0, 1, 3, 10, longest_piece])
        more = [rng.randrange(vocabulary) for _ in range(length)]
        if beginning + more:
            prompts.append(beginning + more)
    return prompts


def large_prompts(seed: int) -> list[list[int]]:
    """Many questions behind a few nested beginnings, so that most such trees have a trunk."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(50) for _ in range(n)]

    beginnings = [tokens(rng.randint(20, 80))]
    for _ in range(rng.randint(1, 4)):
        beginnings.append(rng.choice(beginnings) + tokens(rng.randint(5, 40)))
    questions = [tokens(rng.randint(1, 60)) for _ in range(rng.randint(10, 80))]
    prompts = [rng.choice(beginnings) + question for question in questions]
    prompts += [list(prompts[0]), prompts[1][:-1]]
    rng.shuffle(prompts)
    return prompts


def beginnings_of(prompts: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[:end]) for ids in prompts for end in range(1, len(ids) + 1)}


def path_to(packed: Packed, row: int, place: int) -> list[int]:
    """The places from the first token of a sequence to one of its nodes."""
    places = []
    while place >= 0:
        places.append(place)
        place = int(packed.parents[row, place])
    return places[::-1]


def spelled(packed: Packed, row: int, place: int) -> list[Hashable]:
    return [packed.keys[row][i] for i in path_to(packed, row, place)]


def ends_of(packed: Packed) -> list[tuple[int, int]]:
    return list(zip(packed.row.tolist(), packed.place.tolist(), strict=True))


def places_in(keys: Sequence[Hashable | None]) -> list[int]:
    """The places of a row that are no padding."""
    return [place for place, key in enumerate(keys) if key is not None]


def own_nodes(packed: Packed) -> list[tuple[int, int]]:
    """The row and place of each node, those of the trunk once."""
    nodes = [(0, place) for place in range(packed.n_trunk)]
    for row, keys in enumerate(packed.keys):
        nodes += [(row, place) for place in places_in(keys) if place >= packed.n_trunk]
    return nodes


def n_run(packed: Packed) -> int:
    """How many nodes run: the trunk, and the rows with their padding."""
    n_rows, n_places = packed.parents.shape
    return packed.n_trunk + n_rows * (n_places - packed.n_trunk)


# pack


def test_the_example_of_the_module_is_packed_as_it_is_drawn_there():
    packed = pack(["abc", "abd", "ae"])
    assert packed.n_trunk == 0
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


def test_some_of_the_random_trees_have_a_trunk_and_several_rows():
    all_packed = [pack(large_prompts(seed)) for seed in SEEDS]
    assert sum(packed.n_trunk > 0 and len(packed.keys) > 1 for packed in all_packed) >= 5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_path_to_where_a_sequence_ends_spells_it(seed):
    prompts = large_prompts(seed)
    packed = pack(prompts)
    assert [spelled(packed, row, node) for row, node in ends_of(packed)] == prompts


@pytest.mark.parametrize("make_prompts", [random_prompts, large_prompts])
@pytest.mark.parametrize("seed", SEEDS)
def test_each_distinct_beginning_stands_once_in_the_batch(make_prompts, seed):
    prompts = make_prompts(seed)
    packed = pack(prompts)
    beginnings = [tuple(spelled(packed, row, place)) for row, place in own_nodes(packed)]
    assert len(set(beginnings)) == len(beginnings)
    assert set(beginnings) == beginnings_of(prompts)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_row_begins_with_the_trunk(seed):
    packed = pack(large_prompts(seed))
    n = packed.n_trunk
    for keys, parents, depth in zip(packed.keys, packed.parents, packed.depth, strict=True):
        assert keys[:n] == packed.keys[0][:n]
        assert parents[:n].tolist() == packed.parents[0, :n].tolist()
        assert depth[:n].tolist() == packed.depth[0, :n].tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_sequences_end_at_the_last_places_of_a_row(seed):
    packed = pack(large_prompts(seed))
    n_places = packed.parents.shape[1]
    for row in range(len(packed.keys)):
        ends = {place for end_row, place in ends_of(packed) if end_row == row}
        assert ends == set(range(n_places - len(ends), n_places))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_sequence_ends_in_the_trunk(seed):
    packed = pack(large_prompts(seed))
    assert (packed.place >= packed.n_trunk).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_no_row_is_without_nodes_of_its_own(seed):
    packed = pack(large_prompts(seed))
    assert {row for row, _ in ends_of(packed)} == set(range(len(packed.keys)))


@pytest.mark.parametrize("seed", SEEDS)
def test_depth_counts_the_nodes_above(seed):
    packed = pack(large_prompts(seed))
    for row, place in own_nodes(packed):
        assert packed.depth[row, place] == len(path_to(packed, row, place)) - 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_of_random_trees_sees_its_path_alone(seed):
    packed = pack(large_prompts(seed))
    sees = packed.sees()
    for row, keys in enumerate(packed.keys):
        for place in places_in(keys):
            seen = np.flatnonzero(sees[row, place]).tolist()
            assert seen == sorted(path_to(packed, row, place))


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_is_alone(seed):
    packed = pack(large_prompts(seed))
    sees = packed.sees()
    alone = np.eye(packed.parents.shape[1], dtype=bool)
    for row, keys in enumerate(packed.keys):
        padding = [place for place, key in enumerate(keys) if key is None]
        assert (packed.parents[row, padding] == -1).all()
        assert (packed.depth[row, padding] == 0).all()
        assert (sees[row][padding] == alone[padding]).all()
        assert (sees[row][:, padding] == alone[:, padding]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_trees_do_not_depend_on_the_order_of_the_sequences(seed):
    prompts = large_prompts(seed)
    order = np.random.default_rng(seed).permutation(len(prompts))
    packed, shuffled = pack(prompts), pack([prompts[i] for i in order])
    assert shuffled.keys == packed.keys
    np.testing.assert_array_equal(shuffled.parents, packed.parents)
    np.testing.assert_array_equal(shuffled.row, packed.row[order])
    np.testing.assert_array_equal(shuffled.place, packed.place[order])


def test_a_sequence_that_is_the_beginning_of_another_ends_on_its_path():
    packed = pack([[5, 6, 7, 8], [5, 6]])
    [long_end, short_end] = ends_of(packed)
    assert sorted(packed.keys[0]) == [5, 6, 7, 8]
    assert short_end[1] in path_to(packed, *long_end)


def test_equal_sequences_share_their_end():
    packed = pack([[5, 6], [5, 7], [5, 6]])
    assert packed.keys == [[5, 6, 7]]
    assert ends_of(packed) == [(0, 1), (0, 2), (0, 1)]


def test_sequences_of_other_keys_share_a_node_where_the_complete_keys_are_equal():
    sequences = [[(5, -1), (6, 0)], [(5, -1), (6, 1)], [(5, -1), (6, 1), (7, 1)]]
    packed = pack(sequences)
    assert sorted(packed.keys[0]) == [(5, -1), (6, 0), (6, 1), (7, 1)]
    assert [spelled(packed, *end) for end in ends_of(packed)] == sequences


@pytest.mark.parametrize("sequences", [[], [[]], [[5, 6], []]])
def test_empty_sequences_are_refused(sequences):
    with pytest.raises(ValueError, match="expected sequences of at least one token each"):
        pack(sequences)


# Where a tree is cut


def instruction_and_questions(n_questions: int) -> list[list[int]]:
    return [[1] * 60 + [10 + i] * 50 for i in range(n_questions)]


def test_an_instruction_of_many_questions_is_the_trunk():
    packed = pack(instruction_and_questions(100))
    assert packed.n_trunk == 60
    assert packed.keys[0][:60] == [1] * 60
    assert len(packed.keys) > 1


def test_a_few_questions_are_one_row_without_a_trunk():
    packed = pack(instruction_and_questions(2))
    assert packed.n_trunk == 0
    assert len(packed.keys) == 1


def test_sequences_of_a_length_that_share_nothing_get_a_row_each_and_no_trunk():
    packed = pack([[first] + [5] * 30 for first in (1, 2, 3)])
    assert packed.n_trunk == 0
    assert sorted(packed.row.tolist()) == [0, 1, 2]


# plan_packed


def table(prompts: Sequence[Sequence[int]]) -> pd.DataFrame:
    """Rows as of `make_prompts`, under names that say nothing about the prompts."""
    names = [f"row{i}" for i in np.random.default_rng(0).permutation(len(prompts))]
    return pd.DataFrame({"row_id": names, "input_ids": list(prompts)})


def batches_of(plan: Plan) -> list[list[str]]:
    return list(itertools.chain.from_iterable(plan))


def packed_batches(rows: pd.DataFrame, batch_tokens: int) -> list[Packed]:
    """The planned batches as they run."""
    ids_of = rows.set_index("row_id").input_ids
    plan = plan_packed(rows, batch_tokens)
    return [pack([ids_of[row] for row in batch]) for batch in batches_of(plan)]


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
@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_has_no_more_distinct_nodes_than_tokens_or_is_a_single_prompt(seed, batch_tokens):
    rows = table(random_prompts(seed, 200))
    ids_of = rows.set_index("row_id").input_ids
    for batch in batches_of(plan_packed(rows, batch_tokens)):
        n_nodes = len(beginnings_of([ids_of[row] for row in batch]))
        assert n_nodes <= batch_tokens or len(batch) == 1


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


def test_prompts_that_share_no_beginning_are_put_together_by_length():
    rng = np.random.default_rng(0)
    rows = table([[i, *rng.integers(100, 200, rng.integers(10, 60))] for i in range(100)])
    length = dict(zip(rows.row_id, rows.input_ids.map(len), strict=True))
    plan = plan_packed(rows, 500)
    lengths = [length[row] for batch in batches_of(plan) for row in batch]
    assert lengths == sorted(lengths)


def test_prompts_of_a_length_that_share_no_beginning_get_a_row_each():
    rng = np.random.default_rng(0)
    rows = table([[i, *rng.integers(100, 200, 30)] for i in range(100)])
    for packed in packed_batches(rows, 500):
        assert packed.n_trunk == 0
        assert len(packed.keys) == len(packed.row)


def test_prompts_with_equal_beginnings_are_neighbours():
    rows = questions_behind(INSTRUCTIONS, 40)
    ids_of = rows.set_index("row_id").input_ids
    for batch_tokens in (200, 2048):
        order = itertools.chain.from_iterable(batches_of(plan_packed(rows, batch_tokens)))
        beginnings = [tuple(ids_of[row][:100]) for row in order]
        assert len(list(itertools.groupby(beginnings))) == len(INSTRUCTIONS)


def test_an_instruction_runs_a_few_times_for_many_questions():
    rows = questions_behind(INSTRUCTIONS, 40)
    n_tokens = rows.input_ids.map(len).sum()
    assert sum(map(n_run, packed_batches(rows, 2048))) < 0.5 * n_tokens


@pytest.mark.parametrize("batch_tokens", [512, 2048, 8192])
def test_questions_behind_instructions_need_little_padding(batch_tokens):
    batches = packed_batches(questions_behind(INSTRUCTIONS, 200), batch_tokens)
    n_nodes = sum(len(own_nodes(packed)) for packed in batches)
    assert sum(map(n_run, batches)) <= 1.1 * n_nodes


def test_shards_are_of_about_as_many_prompts_as_asked_for():
    rows = questions_behind(INSTRUCTIONS, 50)
    sizes = [sum(map(len, shard)) for shard in plan_packed(rows, 1000, shard_rows=30)]
    assert min(sizes[:-1]) >= 30 and max(sizes) < 30 + MAX_PROMPTS
