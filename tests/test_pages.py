"""The pages of a small book in headless Chromium: nothing is cut off, fails, or is asked elsewhere.

They are opened on a wide screen and on a phone, in the light and in the dark theme, with scripts
and without. To look at the pages of another book, give its folder: ``DLK_PAGES=_build/html``.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_core_python.base import AXE_SCRIPT
from browser import Page, find_browser, opened_browser, served
from test_hostile_pages import write_book, write_notebook

from dlk_utils.lab.book import build_pages, run_notebook

sys.path.insert(0, str(Path(__file__).parent / "lab"))
from wide_displays import figures

pytestmark = pytest.mark.slow

WIDTHS = (1300, 390)
PAGES = ("families", "tried", "mistakes", "glossary", "many_machines", "references", "cite")
"""Pages of the real book that need no notebook."""
FRONT = """# Front

```{raw} html
:file: static/pipeline.html
```
"""
PLANTED = """
import sys
sys.path.insert(0, {folder!r})
from wide_displays import figures, tables
from IPython.display import display
from dlk_utils.lab.display import start
start(In)
for shown in [*tables(), *figures()]:
    display(shown)
"""
FAULTS = """
(() => {
  const faults = [];
  const name = element => `${element.tagName} ${element.textContent.trim().slice(0, 60)}`;
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth + 1) faults.push(`the page is ${root.scrollWidth} px wide`);
  for (const table of document.querySelectorAll("table")) {
    let box = table.parentElement;
    while (box !== root && getComputedStyle(box).overflowX === "visible") box = box.parentElement;
    const [inner, outer] = [table, box].map(element => element.getBoundingClientRect());
    if (inner.right > outer.right + 1 || box.scrollWidth > box.clientWidth + 1)
      faults.push(`a table overflows: ${box.scrollWidth} of ${box.clientWidth} px, ${name(table)}`);
    // On a phone, the headings stand in the cells, and the row of headings is hidden.
    const isHidden = table.tHead?.offsetHeight === 1;
    for (const cell of table.querySelectorAll(isHidden ? "tbody :is(th, td)" : "th, td"))
      if (cell.scrollWidth > cell.clientWidth + 1) faults.push(`a cell overflows: ${name(cell)}`);
  }
  for (const caption of document.querySelectorAll("figcaption, caption, h1, h2, h3"))
    if (caption.scrollWidth > caption.clientWidth + 1) faults.push(`cut: ${name(caption)}`);
  for (const plot of document.querySelectorAll(".plotly-graph-div")) {
    if (!plot.querySelector(".main-svg")) faults.push(`a plot was not drawn: ${plot.id}`);
    const frame = plot.getBoundingClientRect();
    for (const text of plot.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      const isOutside = box.left < frame.left - 2 || box.right > frame.right + 2
        || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
      if (box.width && isOutside) faults.push(`cut in a plot: ${name(text)}`);
    }
  }
  if (document.querySelectorAll("h1").length !== 1) faults.push("not one h1");
  return faults;
})()
"""
DARK = "document.documentElement.dataset.theme = document.documentElement.dataset.mode = 'dark'"
AXE = """
axe.run(document, {resultTypes: ["violations"]}).then(found => found.violations
  .filter(fault => ["serious", "critical"].includes(fault.impact))
  .map(fault => `${fault.id}: ${fault.nodes.map(node => node.html.slice(0, 120)).slice(0, 3)}`))
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """The folder of a built book."""
    if "DLK_PAGES" in os.environ:
        return Path(os.environ["DLK_PAGES"]).resolve()
    top = tmp_path_factory.mktemp("book")
    notebooks = top / "book" / "notebooks"
    notebooks.mkdir(parents=True)
    (top / "build").mkdir()
    (top / "notebooks").mkdir()
    planted = PLANTED.format(folder=str(Path(__file__).parent / "lab"))
    write_notebook(top / "notebooks" / "planted.ipynb", planted)
    run_notebook("planted", top, notebooks, [])
    write_book(top, FRONT, PAGES)
    return build_pages(top).parent


@pytest.fixture(scope="module")
def browser(pages, tmp_path_factory) -> Iterator[tuple[Page, str] | None]:
    """A page of a browser, and the address of the book; None where there is no browser."""
    program = find_browser()
    if program is None:
        warnings.warn("no Chromium here: the pages were built, but not opened", stacklevel=1)
        yield None
        return
    profile = tmp_path_factory.mktemp("profile")
    with served(pages) as address, opened_browser(program, profile) as page:
        yield page, address


def names_of(pages: Path) -> list[str]:
    """The pages of the book's table of contents, and its notebooks."""
    return sorted(
        str(path.relative_to(pages))
        for path in pages.rglob("*.html")
        if path.parent.name in (pages.name, "notebooks")
        and path.stem not in ("genindex", "search", "py-modindex", "index", "README")
    )


def faults_at_both_widths(page: Page) -> list[str]:
    found = []
    for width in WIDTHS:
        page.resize(width)
        found += [f"{width} px: {fault}" for fault in page.value(FAULTS)]
    return found


def test_on_no_page_is_anything_cut_off_or_asked_elsewhere(pages, browser):
    page, address = browser
    found = {}
    for name in names_of(pages):
        page.resize(WIDTHS[0])
        page.open(f"{address}/{name}")
        faults = faults_at_both_widths(page)
        faults += [f"console: {error}" for error in page.errors]
        outside = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
        found[name] = faults + [f"asked outside: {url}" for url in outside]
    assert {name: faults for name, faults in found.items() if faults} == {}


def test_axe_finds_no_serious_fault_in_the_light_or_in_the_dark_theme(pages, browser):
    page, address = browser
    page.resize(WIDTHS[0])
    found = {}
    for name in names_of(pages):
        page.open(f"{address}/{name}")
        page.value(AXE_SCRIPT)
        for theme, change in (("light", "0"), ("dark", DARK)):
            page.value(change)
            found[f"{name}, {theme}"] = page.value(AXE)
    assert {name: faults for name, faults in found.items() if faults} == {}


def test_without_scripts_every_figure_is_a_picture_and_nothing_is_cut_off(pages, browser):
    page, address = browser
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(f"{address}/{next(name for name in names_of(pages) if 'planted' in name)}")
        shown = page.value(
            "[...document.querySelectorAll('img.still-figure')].map(image => image.clientWidth)"
        )
        assert len(shown) == len(figures()) and min(shown) > 300
        assert page.value("document.querySelector('.live-figure .plot').offsetHeight") == 0
        assert faults_at_both_widths(page) == []
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_search_works_from_the_file_too(pages, browser):
    page, _ = browser
    page.open(f"{(pages / 'search.html').as_uri()}?q=table")
    assert page.value("document.querySelectorAll('#search-results li').length") > 0
