"""Pack prompts into a tree of tokens, so that beginnings that they share run only once.

Prompts that begin alike form a tree. Each token is a *node*; its *parent* is the token before it.
A prompt is the path from the root to its last node. For the prompts `a b c`, `a b d` and `a e`::

    node      0  1  2  3  4
    token     a  b  c  d  e
    parent   -1  0  1  1  0
    depth     0  1  2  2  1

A model runs a tree like any other tokens, given each node's depth as its position, and a mask that
says which nodes it sees: itself and those on its path (`Packed.sees`). Then each token has the
state that it has in its own prompt.

Attention compares each token of a row with all tokens of the row, so one long row is slow. `pack`
therefore cuts the tree in two. The *trunk* holds the nodes that large subtrees share. It runs
first, in a row of its own. The branches that hang from it are divided among rows of about equal
length. These run next, and see the trunk in the key-value cache. Each node is computed once.
"""

import heapq
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from dlk_utils.errors import ParameterError
from dlk_utils.extract.store import Plan, shard_rows_of
from dlk_utils.questions.shared_prefix import shared_prefix_length

ATTENTION_NODES = 2700
"""Length of row at which attention takes as long as everything else.

Measured with a model of width 576 in fp32 on a processor. This and `PASS_NODES` decide how a tree
is cut, which changes the speed and no result.
"""

PASS_NODES = 60
"""Fixed cost of one more forward pass, in nodes."""

MAX_PROMPTS = 128
"""Largest number of prompts in a batch. It bounds the memory for what is read of them."""

MIN_SHARED = 8
"""Prompts that have fewer tokens in common than this may go into different batches."""

_BRANCH_SIZES = (32, 48, 64, 96, 128, 256, 512)
"""Limits on the size of a branch that `pack` tries. It also tries having no trunk."""

_LENGTHS = (1, 1.25, 1.5, 2, 2.5, 3, 4)
"""Lengths of row that `pack` tries, as multiples of the longest branch. It also tries one row."""


@dataclass(frozen=True)
class Packed:
    """Sequences of tokens, packed as a tree into rows.

    The first `n_trunk` places of each row are the trunk, which is the same in all of them. Its last
    places are the ends of sequences, so that an LM head can run on these alone. Any places in
    between are padding.

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


def pack(sequences: Sequence[Sequence[Hashable]], *, branch_size: int | None = None) -> Packed:
    """Pack sequences of token ids into a trunk and rows of branches.

    Two sequences share a node where they are equal up to it.

    Parameters
    ----------
    sequences
        Token ids, or other keys that can be sorted.
    branch_size
        Largest size of a branch, and two rows. By default both are chosen for speed.

    Raises
    ------
    ParameterError
        If a sequence is empty.
    """
    paths = [tuple(sequence) for sequence in sequences]
    if not paths or not all(paths):
        got = "an empty one" if paths else "no sequence"
        raise ParameterError(f"pack: expected sequences of at least one token each, got {got}")
    tree = _Tree(sorted(set(paths)))
    if branch_size is None:
        trunk, rows = _cheapest_cut(tree)
    else:
        trunk, branches = tree.cut(branch_size)
        rows = _divide(branches, min(2, len(branches)))

    is_end = set(tree.end_of.values())
    layouts = []
    for branches in rows:
        nodes = list(itertools.chain.from_iterable(branches))
        inner = [node for node in nodes if node not in is_end]
        layouts.append(([*trunk, *inner], [node for node in nodes if node in is_end]))
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
    row, place = np.array([where[tree.end_of[path]] for path in paths]).T
    return Packed(len(trunk), keys, parents, depth, row=row, place=place)


def plan_packed(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int | None = None) -> Plan:
    """Plan batches for `pack`, in shards of about `shard_rows` prompts.

    By default these are as many as `shard_rows_of` says. Prompts are grouped by their beginning,
    and the groups ordered by their longest prompt. Batches are cut from this order. A batch has at
    most `batch_tokens` nodes and `MAX_PROMPTS` prompts, or is a single prompt. The plan follows
    from the tokens and keys (`row_id`) alone, so it is the same after a restart and on each worker.

    Parameters
    ----------
    prompts
        With the columns `row_id` and `input_ids`.
    """
    shard_rows = shard_rows or shard_rows_of(len(prompts))
    by_tokens = sorted(zip(prompts.input_ids.map(tuple), prompts.row_id, strict=True))
    batches: list[list] = []
    n_nodes = 0
    for cluster in sorted(_clusters(by_tokens), key=lambda some: max(len(ids) for ids, _ in some)):
        previous: tuple = ()
        for ids, row_id in cluster:
            n_new = len(ids) - shared_prefix_length(previous, ids)
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
        if cluster and shared_prefix_length(cluster[-1][0], ids) < MIN_SHARED:
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
            del on_path[shared_prefix_length(previous, path) :]
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

    def cut(self, max_size: int | float) -> tuple[list[int], list[range]]:
        """Cut off all branches of at most `max_size` nodes; return what is left, and the branches.

        A branch is larger only if it is a single path, or if a path ends at its first node.
        """
        ends = set(self.end_of.values())
        in_trunk = {-1}
        branches = []
        for node, parent in enumerate(self.parents):
            if parent not in in_trunk:
                continue
            if self.size[node] > max_size and self.n_paths[node] > 1 and node not in ends:
                in_trunk.add(node)
            else:
                branches.append(range(node, node + self.size[node]))
        return sorted(in_trunk - {-1}), branches


def _cheapest_cut(tree: _Tree) -> tuple[list[int], list[list[range]]]:
    """Return the trunk, and the branches of each row, for which the tree takes the least time."""
    least, best = float("inf"), None
    for max_size in (*_BRANCH_SIZES, float("inf")):
        trunk, branches = tree.cut(max_size)
        n_nodes, longest = sum(map(len, branches)), max(map(len, branches))
        for n_rows in {1, *(max(1, int(n_nodes / (factor * longest))) for factor in _LENGTHS)}:
            # A lower bound, without padding, rules out most cuts.
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
    first_pass = 0.0
    if n_trunk:
        first_pass = PASS_NODES + n_trunk * (1 + n_trunk / ATTENTION_NODES)
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
