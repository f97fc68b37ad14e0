"""Take the picture of the front page that the README shows: `make picture`, after `make book`."""

import base64
import sys
import tempfile
from pathlib import Path

from browser import find_browser, opened_browser, served

BOOK = Path(__file__).parents[1] / "_build" / "html"
PICTURE = Path(__file__).with_name("page.png")
WIDTH, HEIGHT = 1300, 1900
"""Pixels: the finding, its figure and the table of scores."""


def main(book: Path = BOOK) -> int:
    """Write the picture of a built book, and return an exit code."""
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
        shot = page.call("Page.captureScreenshot", format="png")
    PICTURE.write_bytes(base64.b64decode(shot["data"]))
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
