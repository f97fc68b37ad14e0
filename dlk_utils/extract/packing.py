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

_BRANCH_SIZES = (32, 64, 128, 256, 512)
"""Sizes of the largest branch that `pack` tries; besides, no trunk at all."""

_COPIES = 1.5
"""A trunk is copied into the cache of each row. With the copies, a batch has at most so many times
its nodes."""


@dataclass(frozen=True)
class Packed:
    """Sequences of tokens, packed as a tree into rows.

    A place in a row is counted from the trunk's first node: the first `n_trunk` places of each row
    are the trunk.

    Attributes
    ----------
    n_trunk : int
        Number of nodes in the trunk.
    keys : list of list
        For each row, what stands at the trunk's nodes and its own: token ids, or whatever `pack`
        was given.
    parents : ndarray [rows, nodes]
        The place of each node's parent in the same row; -1 for a first token, and for padding.
    depth : ndarray [rows, nodes]
        How many nodes are above it: its position in its own sequence. 0 for padding.
    row, node : ndarray [sequences]
        Where each sequence ends: the row, and the place in it.
    """

    n_trunk: int
    keys: list[list[Hashable]]
    parents: Int[np.ndarray, "r t"]
    depth: Int[np.ndarray, "r t"]
    row: Int[np.ndarray, " n"]
    node: Int[np.ndarray, " n"]

    def sees(self) -> Bool[np.ndarray, "r t t"]:
        """Say which nodes (last axis) each node sees: those on the path to it, and itself.

        Padding sees itself alone. (A token that sees nothing has no attention to spread.)
        """
        n_rows, n_nodes = self.parents.shape
        rows = np.arange(n_rows)
        sees = np.zeros((n_rows, n_nodes, n_nodes), dtype=bool)
        for node in range(n_nodes):
            parent = self.parents[:, node]
            # A parent stands before its children, so what it sees is complete by now.
            sees[:, node] = sees[rows, parent] & (parent >= 0)[:, None]
            sees[:, node, node] = True
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

    keys, parents, depth = [], [], []
    place_of: dict[int, tuple[int, int]] = {}
    for number, branches in enumerate(rows):
        nodes = [*trunk, *itertools.chain.from_iterable(branches)]
        places = {node: place for place, node in enumerate(nodes)}
        keys.append([tree.keys[node] for node in nodes])
        parents.append([places.get(tree.parents[node], -1) for node in nodes])
        depth.append([tree.depth[node] for node in nodes])
        place_of |= {node: (number, place) for node, place in places.items()}
    ends = np.array([place_of[tree.end_of[path]] for path in paths])
    return Packed(
        n_trunk=len(trunk),
        keys=keys,
        parents=_rectangle(parents, padding=-1),
        depth=_rectangle(depth, padding=0),
        row=ends[:, 0],
        node=ends[:, 1],
    )


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

        Where no two paths meet, a branch may be longer: nothing is gained by cutting it.
        """
        trunk = [n for n, size in enumerate(self.size) if size > most and self.n_paths[n] > 1]
        in_trunk = {-1, *trunk}
        return trunk, [
            range(node, node + self.size[node])
            for node, parent in enumerate(self.parents)
            if parent in in_trunk and node not in in_trunk
        ]


def _cheapest_cut(tree: _Tree) -> tuple[list[int], list[list[range]]]:
    """Return the trunk, and the branches of each row, for which the tree takes the least time.

    t new nodes that are compared with k nodes take time t (1 + k / `ATTENTION_NODES`).
    """
    best_cost, best = float("inf"), None
    for most in (*_BRANCH_SIZES, float("inf")):
        trunk, branches = tree.cut(most)
        # A trunk alone, all of whose nodes end a path that others go on from, cannot be: the
        # longest path ends in a branch.
        n_trunk, n_nodes = len(trunk), sum(map(len, branches))
        first_pass = n_trunk * (1 + n_trunk / ATTENTION_NODES) + PASS_NODES if trunk else 0
        most_rows = n_nodes // max(map(len, branches))
        for n_rows in _down_to_one(most_rows):
            rows = _divide(branches, n_rows)
            width = max(sum(map(len, row)) for row in rows)
            if len(rows) > 1 and len(rows) * (n_trunk + width) > _COPIES * len(tree.keys):
                continue
            cost = first_pass + len(rows) * width * (1 + (n_trunk + width) / ATTENTION_NODES)
            if cost < best_cost:
                best_cost, best = cost, (trunk, rows)
    return best


def _down_to_one(n: int) -> Iterator[int]:
    """Yield numbers from `n` down to 1, each about four fifths of the one before."""
    while n > 1:
        yield n
        n = n * 4 // 5
    yield 1


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


def _rectangle(rows: Sequence[Sequence[int]], *, padding: int) -> Int[np.ndarray, "r t"]:
    """Return rows of different lengths as one array, filled up on the right."""
    filled = np.full((len(rows), max(map(len, rows))), padding)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled
