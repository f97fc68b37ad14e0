"""What is shown on a page as HTML, with plain text where no HTML is shown."""

from collections.abc import Sequence


class HtmlView:
    """Something on a page: HTML in a notebook and in the book, plain text elsewhere.

    Parameters
    ----------
    name
        The class of the element in HTML, such as "chat-view".
    parts
        The HTML, part by part. Everything in it that came from data has to be escaped.
    lines
        What it says in words: lines of plain text.
    style
        The CSS of the element.

    Attributes
    ----------
    lines : list of str
        As given; joined by newlines, they are the plain text.
    """

    def __init__(self, name: str, parts: Sequence[str], lines: Sequence[str], style: str = ""):
        self.lines = list(lines)
        # These classes keep MathJax from reading dollar signs as formulas.
        attributes = f'class="{name} tex2jax_ignore mathjax_ignore"'
        if style:
            attributes += f' style="{style}"'
        self._markup = f"<div {attributes}>{''.join(parts)}</div>"

    def _repr_html_(self) -> str:
        return self._markup

    def __repr__(self) -> str:
        return "\n".join(self.lines)
