"""Prompts as the tree that their tokens form, in HTML: what several begin with is there once.

Everything that came from data is escaped. The words have the colour of the page's own text.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from dlk_utils.lab.escaping import html_text
from dlk_utils.lab.html_view import HtmlView

MOST_CHARACTERS = 90
"""A longer piece of a prompt is shown without its middle."""
INDENT = "  "

Tokens = tuple[int, ...]


def count_nodes(prompts: Iterable[Sequence[int]]) -> int:
    """Count the nodes of the tree that prompts form: a token that several share counts once."""
    paths = sorted(set(map(tuple, prompts)))
    n_shared = sum(_n_shared(one, other) for one, other in itertools.pairwise(paths))
    return sum(map(len, paths)) - n_shared


def show_tree(
    prompts: Iterable[Sequence[int]], decode: Callable[[Sequence[int]], str], *, caption: str
) -> HtmlView:
    """Show prompts as a tree.

    Parameters
    ----------
    prompts
        The token ids of each prompt.
    decode
        Gives the text of token ids.
    caption
        What stands above it, as plain text.
    """
    pieces = list(_pieces(sorted(set(map(tuple, prompts))), 0))
    lines = [caption]
    parts = [f"<p><b>{html_text(caption)}</b></p>"]
    for depth, tokens, n_prompts in pieces:
        text = _shortened(decode(list(tokens)).replace("\n", "⏎"))
        size = f"{len(tokens)} token{'s' if len(tokens) > 1 else ''}"
        size += f", {n_prompts} prompts" if n_prompts > 1 else ""
        lines.append(f"{INDENT * depth}{text} ({size})")
        style = (
            f"margin-left: {1.2 * depth:.1f}em; padding: 0.1em 0.5em; "
            "border-left: 3px solid #808890; overflow-wrap: anywhere"
        )
        parts.append(f'<div style="{style}">{html_text(text)} <i>({html_text(size)})</i></div>')
    return HtmlView("tree-view", parts, lines)


def _pieces(paths: Sequence[Tokens], depth: int) -> Iterator[tuple[int, Tokens, int]]:
    """Yield the pieces of a tree from the top: their depth, their tokens, how many share them."""
    for _, group in itertools.groupby(paths, key=_first):
        alike = list(group)
        # They are sorted, so that the first and the last differ earliest.
        n_shared = _n_shared(alike[0], alike[-1])
        yield depth, alike[0][:n_shared], len(alike)
        rests = [path[n_shared:] for path in alike if len(path) > n_shared]
        yield from _pieces(rests, depth + 1)


def _n_shared(one: Tokens, other: Tokens) -> int:
    """Count the tokens that two prompts begin with alike."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def _first(path: Tokens) -> int:
    return path[0]


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"
