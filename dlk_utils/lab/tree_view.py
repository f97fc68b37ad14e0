"""Prompts as the tree that their tokens form, in HTML: what several begin with is there once.

Everything that came from data is escaped. The words have the colour of the page's own text.
"""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

from dlk_utils.lab.escaping import html_text
from dlk_utils.lab.html_view import HtmlView
from dlk_utils.questions.shared_prefix import shared_prefix_length

MOST_CHARACTERS = 90
"""A longer piece of a prompt is shown without its middle."""
INDENT = "  "

Tokens = tuple[int, ...]


def count_nodes(prompts: Iterable[Sequence[int]]) -> int:
    """Count the nodes of the tree that prompts form: a token that several share counts once."""
    paths = sorted(set(map(tuple, prompts)))
    n_shared = sum(shared_prefix_length(one, other) for one, other in itertools.pairwise(paths))
    return sum(map(len, paths)) - n_shared


def show_tree(
    prompts: Iterable[Sequence[int]], decode: Callable[[Sequence[int]], str], *, caption: str
) -> HtmlView:
    """Show prompts as a tree.

    Equal prompts count as one, and a prompt of no tokens has no place in it.

    Parameters
    ----------
    prompts
        The token ids of each prompt.
    decode
        Gives the text of token ids.
    caption
        What stands above it, as plain text.
    """
    paths = sorted({tuple(prompt) for prompt in prompts if len(prompt)})
    pieces = list(_pieces(paths, 0))
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
    for _, group in itertools.groupby(paths, key=operator.itemgetter(0)):
        alike = list(group)
        # They are sorted, so that the first and the last differ earliest.
        n_shared = shared_prefix_length(alike[0], alike[-1])
        yield depth, alike[0][:n_shared], len(alike)
        rests = [path[n_shared:] for path in alike if len(path) > n_shared]
        yield from _pieces(rests, depth + 1)


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"
