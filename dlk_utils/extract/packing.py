"""Prompts as trees of tokens: what several prompts begin with is one path, and runs only once.

Prompts that begin alike form a tree. Each token is a *node*; its *parent* is the token before it.
A prompt is the path from the root to its last node. For the prompts `a b c`, `a b d` and `a e`::

    node      0  1  2  3  4
    token     a  b  c  d  e
    parent   -1  0  1  1  0
    depth     0  1  2  2  1

`pack` lays such trees side by side in rows of about equal length, which a model can run like any
batch, given each node's depth as its position and a mask that says which nodes it sees: itself and
those on its path (`Packed.sees`). So each token gets the state that it has in its own prompt.
"""

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from dlk_utils.extract.store import Plan

ATTENTION_NODES = 3000
"""A row of so many nodes spends as much time on attention as on everything else.

Attention is dense: in a row of t nodes each node is compared with all t. The number was measured
with a model of width 576 on a processor, and is larger for wider models. It decides how long rows
are, which changes the speed and no result.
"""

MAX_PROMPTS = 128
"""Most prompts in a batch: what is read of their last tokens has to fit into memory."""


_Row = list[tuple[tuple, Hashable]]
"""The prompts of a row: for each its path, and its `row_id`."""


@dataclass(frozen=True)
class Packed:
    """Sequences of tokens, packed as trees into rows.

    Attributes
    ----------
    keys : list of list
        For each row, what stands at each of its nodes: a token id, or what `pack` was given.
    parents : ndarray [rows, nodes]
        The place of each node's parent in the same row; -1 for a first token, and for padding.
    depth : ndarray [rows, nodes]
        How many nodes are above it: its position in its own sequence. 0 for padding.
    row, node : ndarray [sequences]
        Where each sequence ends.
    """

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
    """Pack sequences of token ids into rows, each distinct beginning once in its row.

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
    keys, parents, depth = [], [], []
    end_of: dict[tuple, tuple[int, int]] = {}
    for number, row in enumerate(_rows_of_trees(sorted(set(paths)))):
        row_keys, row_parents, row_depth = [], [], []
        path: list[int] = []
        previous: tuple = ()
        for sequence in row:
            # In sorted order, no earlier sequence of the row shares more than the one before.
            del path[_n_common(previous, sequence) :]
            for key in sequence[len(path) :]:
                row_parents.append(path[-1] if path else -1)
                row_depth.append(len(path))
                path.append(len(row_keys))
                row_keys.append(key)
            end_of[sequence] = (number, path[-1])
            previous = sequence
        keys.append(row_keys)
        parents.append(row_parents)
        depth.append(row_depth)
    ends = np.array([end_of[path] for path in paths])
    return Packed(keys, _rectangle(parents, -1), _rectangle(depth, 0), ends[:, 0], ends[:, 1])


def plan_packed(prompts: pd.DataFrame, batch_tokens: int, shard_rows: int = 64) -> Plan:
    """Plan batches for `pack`, in shards of about `shard_rows` prompts.

    Rows of trees that are about equally long come into one batch, at most `batch_tokens` nodes with
    the padding, or a single row. The plan follows from the tokens and keys (`row_id`) alone, so it
    is the same after a restart and on each worker.

    Parameters
    ----------
    prompts
        With the columns `row_id` and `input_ids`.
    """
    keys_of: dict[tuple, list] = {}
    for ids, row_id in sorted(zip(prompts.input_ids.map(tuple), prompts.row_id, strict=True)):
        # The last token is not part of the tree (`prefixes`).
        keys_of.setdefault(ids[:-1] or ids, []).append(row_id)
    rows = []
    for tree in _rows_of_trees(sorted(keys_of), batch_tokens):
        prompts_of_row = [(path, row_id) for path in tree for row_id in keys_of[path]]
        pieces = range(0, len(prompts_of_row), MAX_PROMPTS)
        rows += [(_n_nodes(tree), prompts_of_row[i : i + MAX_PROMPTS]) for i in pieces]
    batches: list[list[_Row]] = []
    for n_nodes, row in sorted(rows, key=lambda row: row[0]):
        is_full = (
            not batches
            or (len(batches[-1]) + 1) * n_nodes > batch_tokens
            or sum(map(len, batches[-1])) + len(row) > MAX_PROMPTS
        )
        if is_full:
            batches.append([])
        batches[-1].append(row)
    shards: Plan = [[]]
    for batch in itertools.chain.from_iterable(_that_fit(b, batch_tokens) for b in batches):
        if sum(len(b) for b in shards[-1]) >= shard_rows:
            shards.append([])
        shards[-1].append(batch)
    return shards


def _that_fit(rows: list[_Row], batch_tokens: int) -> Iterator[list[Hashable]]:
    """Yield the row ids of a planned batch, in parts if it is larger than planned once packed.

    `pack` may join two rows where the rows that stand between them in sorted order are not in the
    batch. The joined row is longer, and so is the padding of all others.
    """
    packed = _rows_of_trees(sorted({path for row in rows for path, _ in row}))
    if len(rows) == 1 or len(packed) * max(map(_n_nodes, packed)) <= batch_tokens:
        yield [row_id for row in rows for _, row_id in row]
        return
    middle = len(rows) // 2
    yield from _that_fit(rows[:middle], batch_tokens)
    yield from _that_fit(rows[middle:], batch_tokens)


def _rows_of_trees(paths: list[tuple], most_nodes: int | None = None) -> list[list[tuple]]:
    """Divide sorted, distinct paths into rows, none longer than pays for what its paths share."""
    rows: list[list[tuple]] = []
    n_nodes = 0
    for path in paths:
        shared = _n_common(rows[-1][-1], path) if rows else 0
        n_nodes += len(path) - shared
        limit = _best_length(shared)
        if not rows or n_nodes > (limit if most_nodes is None else min(limit, most_nodes)):
            rows.append([])
            n_nodes = len(path)
        rows[-1].append(path)
    return rows


def _best_length(shared: int) -> float:
    """Return the length of row that runs paths with `shared` nodes in common in the least time.

    A row of t nodes takes time t (1 + t / a), a being `ATTENTION_NODES`, and t - shared of its
    nodes are new. Time per new node is least at t = shared + sqrt(shared (shared + a)). Where
    nothing is shared, a longer row gains nothing.
    """
    return shared + math.sqrt(shared * (shared + ATTENTION_NODES))


def _n_nodes(paths: Sequence[tuple]) -> int:
    """Count the distinct nodes of sorted paths."""
    shared = sum(_n_common(a, b) for a, b in itertools.pairwise(paths))
    return sum(map(len, paths)) - shared


def _n_common(a: Sequence, b: Sequence) -> int:
    """Return how many keys two sequences have in common at their beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _rectangle(rows: Sequence[Sequence[int]], padding: int) -> Int[np.ndarray, "r t"]:
    """Return rows of different lengths as one array, filled up on the right."""
    filled = np.full((len(rows), max(map(len, rows))), padding)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled
