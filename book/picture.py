"""Take the picture of the front page for the README, and its sentences: `make picture`.

It needs a book that `make book` has built, so that neither is older than the pages.
"""

import base64
import re
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from browser import find_browser, opened_browser, served

BOOK = Path(__file__).parents[1] / "_build" / "html"
PICTURE = Path(__file__).with_name("page.png")
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by make picture -->", "<!-- end of what make picture made -->"
WIDTH, HEIGHT = 1300, 1700
"""Pixels: the finding, its figure and the table of scores."""
PARAGRAPHS_ABOVE_THE_FIGURE = """
(() => {
    const figure = document.querySelector("article .live-figure");
    const above = p => p.compareDocumentPosition(figure) & Node.DOCUMENT_POSITION_FOLLOWING;
    return [...document.querySelectorAll("article p")].filter(above).map(p => p.textContent);
})()
"""


def readme_with(readme: str, paragraphs: Sequence[str]) -> str:
    """Put the sentences of the front page, and its picture, between their marks in a README.

    The first paragraph is the finding; each of the others becomes an item of a list.
    """
    finding, *others = (" ".join(paragraph.split()) for paragraph in paragraphs)
    parts = [_wrapped(finding), "\n".join(_wrapped(text, "* ", "  ") for text in others)]
    alternative = "The front page of the book: the finding, truth by layer, and a table of scores"
    parts.append(f"![{alternative}](book/{PICTURE.name})")
    between = "\n\n".join(parts)
    marked = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return marked.sub(lambda _: f"{BEGIN}\n{between}\n{END}", readme)


def _wrapped(text: str, first: str = "", other: str = "") -> str:
    # No line ends between a number and its percent sign.
    filled = textwrap.fill(
        re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text),
        100,
        initial_indent=first,
        subsequent_indent=other,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.replace("\N{NO-BREAK SPACE}", " ")


def main(book: Path = BOOK) -> int:
    """Write the picture of a built book, and its sentences; return an exit code."""
    program = find_browser()
    if program is None or not (book / "intro.html").is_file():
        needs = "a Chromium on the path" if program is None else f"{book}, which make book builds"
        print(f"picture: expected {needs}, found none", file=sys.stderr)
        return 1
    with (
        tempfile.TemporaryDirectory() as profile,
        served(book) as address,
        opened_browser(program, Path(profile)) as page,
    ):
        page.resize(WIDTH, HEIGHT)
        page.open(f"{address}/intro.html")
        paragraphs = page.value(PARAGRAPHS_ABOVE_THE_FIGURE)
        shot = page.call("Page.captureScreenshot", format="png")
    PICTURE.write_bytes(base64.b64decode(shot["data"]))
    readme = README.read_text(encoding="utf-8")
    README.write_text(readme_with(readme, paragraphs), encoding="utf-8")
    print(PICTURE, README)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
