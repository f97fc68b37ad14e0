"""Names and data as text: whatever they hold, no page and no picture reads it as markup.

There is one way for each place where text is shown:

* HTML: `html_text`. (The tables of pandas are escaped by pandas.)
* Markdown: `markdown_text`.
* Plotly: `plotly_text`, which the builders of `lab.figures` call. Their callers give plain text.
* Matplotlib: `lab.static` draws with formulas switched off.
* Glue: a glued string is a node of text in the page, and needs nothing.
* Errors: `without_folders`, so that a published page holds no path of the user's machine.
"""

import contextlib
import html
import re
import string
import tempfile
import textwrap
from pathlib import Path

_JOINERS = "_-./"
"""Punctuation that means nothing in Markdown where it joins two letters or digits."""
_MARKS = re.compile(
    rf"(?<=[^\W_])[{re.escape(_JOINERS)}](?=[^\W_])|([{re.escape(string.punctuation)}])"
)
_FOLDERS = re.compile(
    r"""(?<![\w/\\.:<~-])      # not within a word, an address or a closing tag
        (?:/|[A-Za-z]:[/\\]+)  # the root
        (?:[^\s'":,;()<>|/\\]+[/\\]+)+""",
    re.VERBOSE,
)


def html_text(text: str) -> str:
    """Escape text for HTML, also within the quotes of an attribute."""
    return html.escape(text)


def markdown_text(text: str) -> str:
    """Escape text for Markdown, so that it shows as it is, in one line.

    A dollar sign and a backslash also begin formulas in JupyterLab, after Markdown has been read.
    They are put in an element that its MathJax leaves alone.
    """

    def escape(found: re.Match) -> str:
        mark = found[1]
        if mark is None:
            return found[0]
        if mark in "$\\":
            return f'<span class="mathjax_ignore tex2jax_ignore">&#{ord(mark)};</span>'
        return f"\\{mark}"

    return _MARKS.sub(escape, " ".join(text.split()))


def plotly_text(text: str, width: int | None = None) -> str:
    """Escape text for plotly, which reads a few tags and entities of HTML.

    It is broken into lines of at most `width` characters, if that is given, but not between a
    number and its percent sign.
    """
    lines = [text]
    if width is not None:
        whole_percentages = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)
        lines = textwrap.wrap(whole_percentages, width, break_on_hyphens=False)
    # Broken before it is escaped, so that no entity is cut.
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def without_folders(message: str) -> str:
    """Shorten the absolute paths in a message to the names of their files."""
    for root in sorted(map(str, _own_folders()), key=len, reverse=True):
        # Folders of this machine may have names with blanks, where a pattern would end too early.
        inside = r"[/\\](?:[^\s'\":,;()<>|/\\]+[/\\])*"
        message = re.sub(rf"(?<![\w/\\.]){re.escape(root)}{inside}", "", message)
    return _FOLDERS.sub("", message)


def _own_folders() -> set[Path]:
    """Folders whose paths say something about this machine; not the root, which says nothing."""
    found = {Path.cwd(), Path(tempfile.gettempdir()), Path(__file__).parents[2]}
    # Some users have no such folder.
    with contextlib.suppress(RuntimeError):
        found.add(Path.home())
    return {folder for folder in found | {f.resolve() for f in found} if folder.name}
