"""Prompts as a tree of tokens: what several prompts begin with is one path, and runs only once.

Prompts that begin alike form a tree. Each token is a *node*; its *parent* is the token before it.
A prompt is the path from the root to its last node. For the prompts `a b c`, `a b d` and `a e`::

    node      0  1  2  3  4
    token     a  b  c  d  e
    parent   -1  0  1  1  0
    depth     0  1  2  2  1

A model runs a tree like any other tokens, given each node's depth as its position, and a mask that
says which nodes it sees: itself and those on its path (`Packed.sees`). Then each token has the
state that it has in its own prompt.

In attention each token of a row is compared with all tokens of the row, so one long row is slow.
`pack` therefore cuts the tree in two. The *trunk*, the nodes above many others, runs first, in a
row of its own. The branches that hang from it are divided among rows of about equal length, which
run next. Each row sees the trunk in the key-value cache. No node runs twice.
"""

import heapq
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from dlk_utils.extract.store import Plan

ATTENTION_NODES = 2700
"""A row of so many nodes spends as much time on attention as on everything else.

Measured with a model of width 576 in fp32 on a processor. This and `PASS_NODES` decide how a tree
is cut, which changes the speed and no result.
"""

PASS_NODES = 60
"""Nodes that take about as long as starting one more pass."""

MAX_PROMPTS = 128
"""Most prompts in a batch: what is read of their last tokens has to fit into memory."""

MIN_SHARED = 8
"""Prompts that have fewer tokens in common than this may go into different batches."""

_BRANCH_SIZES = (32, 48, 64, 96, 128, 256, 512)
"""Sizes of the largest branch that `pack` tries; besides, no trunk at all."""

_LENGTHS = (1.25, 1.5, 2, 2.5, 3, 4)
"""Lengths of row that it tries, in lengths of the longest branch; besides, that, and one row."""


@dataclass(frozen=True)
class Packed:
    """Sequences of tokens, packed as a tree into rows.

    The first `n_trunk` places of each row are the trunk. Its last places are the ends of sequences,
    so that an LM head can run on these alone. What is free between them is padding.

    Attributes
    ----------
    n_trunk : int
        Number of nodes in the trunk. No sequence ends in it.
    keys : list of list
        What stands at each place of each row: a token id, or whatever `pack` was given; None is
        padding.
    parents : ndarray [rows, places]
        The place of each node's parent in the same row; -1 for a first token, and for padding.
    depth : ndarray [rows, places]
        How many nodes are above it: its position in its own sequence. 0 for padding.
    row, place : ndarray [sequences]
        Where each sequence ends.
    """

    n_trunk: int
    keys: list[list[Hashable | None]]
    parents: Int[np.ndarray, "r t"]
    depth: Int[np.ndarray, "r t"]
    row: Int[np.ndarray, " n"]
    place: Int[np.ndarray, " n"]

    def sees(self) -> Bool[np.ndarray, "r t t"]:
        """Say which nodes (last axis) each node sees: those on the path to it, and itself.

        Padding sees itself alone. (A token that sees nothing has no attention to spread.)
        """
        n_rows, n_places = self.parents.shape
        sees = np.zeros((n_rows, n_places, n_places), dtype=bool)
        for depth in range(self.depth.max() + 1):
            # What the parents see is complete by now.
            row, place = np.nonzero((self.depth == depth) & (self.parents >= 0))
            sees[row, place] = sees[row, self.parents[row, place]]
            row, place = np.nonzero(self.depth == depth)
            sees[row, place, place] = True
        return sees


def pack(sequences: Sequence[Sequence[Hashable]]) -> Packed:
    """Pack sequences of token ids into a trunk and rows of branches, in which each node is once.

    In place of token ids there may be other keys that can be sorted: two sequences share a node
    where they have equal keys up to it.

    Raises
    ------
    ValueError
        If a sequence is empty.
    """
    paths = [tuple(sequence) for sequence in sequences]
    if not paths or not all(paths):
        raise ValueError("pack: expected sequences of at least one token each")
    tree = _Tree(sorted(set(paths)))
    trunk, rows = _cheapest_cut(tree)

    ends_of_paths = set(tree.end_of.values())
    layouts = []
    for branches in rows:
        nodes = list(itertools.chain.from_iterable(branches))
        inner = [node for node in nodes if node not in ends_of_paths]
        layouts.append(([*trunk, *inner], [node for node in nodes if node in ends_of_paths]))
    width = max(len(inner) + len(ends) for inner, ends in layouts)
    shape = (len(rows), width)
    keys, parents, depth = [], np.full(shape, -1), np.zeros(shape, dtype=int)
    where: dict[int, tuple[int, int]] = {}
    for row, (inner, ends) in enumerate(layouts):
        padding = [None] * (width - len(inner) - len(ends))
        nodes = [*inner, *padding, *ends]
        place_of = {node: place for place, node in enumerate(nodes) if node is not None}
        keys.append([None if node is None else tree.keys[node] for node in nodes])
        for node, place in place_of.items():
            parents[row, place] = place_of.get(tree.parents[node], -1)
            depth[row, place] = tree.depth[node]
            where[node] = (row, place)
    ends = np.array([where[tree.end_of[path]] for path in paths])
    return Packed(len(trunk), keys, parents, depth, row=ends[:, 0], place=ends[:, 1])


def plan_packed(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int = 64) -> Plan:
    """Plan batches for `pack`, in shards of about `shard_rows` prompts.

    Prompts with a beginning in common come into one batch, as long as the batch has at most
    `batch_tokens` nodes, or a single prompt. Prompts that have none are put together by length. The
    plan follows from the tokens and keys (`row_id`) alone, so it is the same after a restart and on
    each worker.

    Parameters
    ----------
    prompts
        With the columns `row_id` and `input_ids`.
    """
    by_tokens = sorted(zip(prompts.input_ids.map(tuple), prompts.row_id, strict=True))
    batches: list[list] = []
    n_nodes = 0
    for cluster in sorted(_clusters(by_tokens), key=lambda some: max(len(ids) for ids, _ in some)):
        previous: tuple = ()
        for ids, row_id in cluster:
            n_new = len(ids) - _n_common(previous, ids)
            if not batches or n_nodes + n_new > batch_tokens or len(batches[-1]) == MAX_PROMPTS:
                batches.append([])
                n_nodes, n_new = 0, len(ids)
            batches[-1].append(row_id)
            n_nodes += n_new
            previous = ids
    shards: Plan = [[]]
    for batch in batches:
        if sum(len(b) for b in shards[-1]) >= shard_rows:
            shards.append([])
        shards[-1].append(batch)
    return shards


def _clusters(by_tokens: Sequence[tuple[tuple, Hashable]]) -> Iterator[list]:
    """Divide sorted prompts where two neighbours have fewer than `MIN_SHARED` tokens in common."""
    cluster: list = []
    for ids, row_id in by_tokens:
        if cluster and _n_common(cluster[-1][0], ids) < MIN_SHARED:
            yield cluster
            cluster = []
        cluster.append((ids, row_id))
    if cluster:
        yield cluster


class _Tree:
    """The tree of sorted, distinct paths. Nodes are numbered so that a branch is a range of them.

    Attributes
    ----------
    keys, parents, depth : list
        By node.
    size : list
        How many nodes the branch that begins at a node has.
    n_paths : list
        How many paths lead through a node.
    end_of : dict
        The last node of each path.
    """

    def __init__(self, paths: Sequence[tuple]):
        self.keys: list[Hashable] = []
        self.parents: list[int] = []
        self.depth: list[int] = []
        self.n_paths: list[int] = []
        self.end_of: dict[tuple, int] = {}
        on_path: list[int] = []
        previous: tuple = ()
        for path in paths:
            # In sorted order, no earlier path shares more than the one before.
            del on_path[_n_common(previous, path) :]
            for key in path[len(on_path) :]:
                self.parents.append(on_path[-1] if on_path else -1)
                self.depth.append(len(on_path))
                self.n_paths.append(0)
                on_path.append(len(self.keys))
                self.keys.append(key)
            for node in on_path:
                self.n_paths[node] += 1
            self.end_of[path] = on_path[-1]
            previous = path
        self.size = [1] * len(self.keys)
        for node in reversed(range(len(self.keys))):
            if self.parents[node] >= 0:
                self.size[self.parents[node]] += self.size[node]

    def cut(self, most: int | float) -> tuple[list[int], list[range]]:
        """Cut off all branches of at most `most` nodes; return what is left, and the branches.

        A branch may be longer where it is a single path, of which nothing is shared, or where a
        path ends at its first node.
        """
        ends = set(self.end_of.values())
        in_trunk = {-1}
        branches = []
        for node, parent in enumerate(self.parents):
            if parent not in in_trunk:
                continue
            if self.size[node] > most and self.n_paths[node] > 1 and node not in ends:
                in_trunk.add(node)
            else:
                branches.append(range(node, node + self.size[node]))
        return sorted(in_trunk - {-1}), branches


def _cheapest_cut(tree: _Tree) -> tuple[list[int], list[list[range]]]:
    """Return the trunk, and the branches of each row, for which the tree takes the least time."""
    least, best = float("inf"), None
    for most in (*_BRANCH_SIZES, float("inf")):
        trunk, branches = tree.cut(most)
        n_nodes, longest = sum(map(len, branches)), max(map(len, branches))
        for length in (longest, *(factor * longest for factor in _LENGTHS), n_nodes):
            n_rows = max(1, int(n_nodes // length))
            # First as if there were no padding: most cuts are out by then.
            if _cost(len(trunk), n_rows, n_nodes / n_rows) < least:
                rows = _divide(branches, n_rows)
                cost = _cost(len(trunk), n_rows, max(sum(map(len, row)) for row in rows))
                if cost < least:
                    least, best = cost, (trunk, rows)
    return best


def _cost(n_trunk: int, n_rows: int, width: int | float) -> float:
    """Estimate the time that a trunk, and rows of some width behind it, take; one node takes 1.

    t new nodes that are compared with k nodes take t (1 + k / `ATTENTION_NODES`).
    """
    first_pass = n_trunk * (1 + n_trunk / ATTENTION_NODES) + PASS_NODES if n_trunk else 0
    return first_pass + n_rows * width * (1 + (n_trunk + width) / ATTENTION_NODES)


def _divide(branches: Sequence[range], n_rows: int) -> list[list[range]]:
    """Divide branches among rows of about equal length: the longest first, into the shortest row.

    This is Graham's rule for sharing out jobs (*Bounds on multiprocessing timing anomalies*, 1969).
    """
    rows: list[list[range]] = [[] for _ in range(n_rows)]
    lengths = [(0, number) for number in range(n_rows)]
    for branch in sorted(branches, key=len, reverse=True):
        length, number = heapq.heappop(lengths)
        rows[number].append(branch)
        heapq.heappush(lengths, (length + len(branch), number))
    return rows


def _n_common(a: Sequence, b: Sequence) -> int:
    """Return how many keys two sequences have in common at their beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
