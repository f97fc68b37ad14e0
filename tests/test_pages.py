"""The pages of a small book in headless Chromium: nothing is cut off, fails, or is asked elsewhere.

They are opened on a wide screen and on a phone, in the light and in the dark theme, with scripts
and without. To look at the pages of another book, give its folder: ``DLK_PAGES=_build/html``.
"""

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_core_python.base import AXE_SCRIPT
from browser import Page, find_browser, opened_browser, served
from test_hostile_pages import write_book, write_notebook

from dlk_utils.lab.book import build_pages, run_notebook

pytestmark = pytest.mark.slow

WIDTHS = (1300, 390)
PAGES = ("families", "glossary", "mistakes", "references", "cite")
"""Pages of the real book that need no notebook."""
FRONT = """# Front

A name that is wider than a phone: `dlk_utils/organisms/smollm2-dropout/README.md`.

```{raw} html
:file: static/pipeline.html
```
"""
PLANTED = """
import sys
sys.path.insert(0, {folder!r})
from wide_displays import answers, chats, figures, tables
from IPython.display import display
from dlk_utils.lab.display import start
start(In)
for shown in [*tables(), *chats(), *answers(), *figures()]:
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
    const shown = isHidden ? table.tBodies[0] : table;
    const texts = document.createTreeWalker(shown, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const text = texts.currentNode;
      // Code may break anywhere.
      if (text.parentElement.closest("code")) continue;
      for (const word of text.data.matchAll(/(?<![a-z0-9])[a-z0-9]{2,12}(?![a-z0-9])/gi)) {
        const place = document.createRange();
        place.setStart(text, word.index);
        place.setEnd(text, word.index + word[0].length);
        const lines = new Set([...place.getClientRects()].map(line => Math.round(line.top)));
        if (lines.size > 1) faults.push(`a word is broken: ${word[0]}, ${name(table)}`);
      }
    }
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
PATIENCE = 10
"""Seconds after which a fault is one that stays."""
PLANT_FAULTS = """
console.error("planted");
document.querySelector("article").insertAdjacentHTML("beforeend", `<h1>planted</h1>
  <div style="overflow-x: auto"><table><tr><td><hr style="width: 3000px"></td></tr></table></div>
  <table style="table-layout: fixed; width: 50px"><tr><td>${"wide".repeat(20)}</td></tr></table>
  <h2 style="white-space: nowrap; overflow: hidden">${"wide ".repeat(200)}</h2>
  <table style="table-layout: fixed; width: 40px"><tr><td style="overflow-wrap: anywhere">breakfast
  </td></tr></table>
  <p style="color: #ddd">pale in the light theme</p><div style="width: 3000px">wide</div>`)
"""
AXE = """
axe.run(document, {resultTypes: ["violations"]}).then(found => found.violations
  .filter(fault => ["serious", "critical"].includes(fault.impact))
  .map(fault => `${fault.id}: ${fault.nodes.map(node => node.html.slice(0, 120)).slice(0, 3)}`))
"""


def elements(selector: str) -> str:
    """JavaScript for the list of elements of a page."""
    return f"[...document.querySelectorAll('{selector}')]"


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
    """The pages of the small book that show something, or all pages of another book."""
    if "DLK_PAGES" not in os.environ:
        return ["intro.html", "notebooks/planted.html", *(f"{name}.html" for name in PAGES)]
    found = [*pages.glob("*.html"), *(pages / "notebooks").glob("*.html")]
    made_by_sphinx = ("genindex", "index", "py-modindex", "search")
    names = [str(path.relative_to(pages)) for path in found if path.stem not in made_by_sphinx]
    return sorted(names)


def layout_faults(page: Page) -> list[str]:
    """What is cut off or overflows, on a wide screen and on a phone."""
    found = []
    for width in WIDTHS:
        page.resize(width)
        deadline = time.monotonic() + PATIENCE
        # On a busy machine it takes some time until plots fit a new width.
        while (faults := page.value(FAULTS)) and time.monotonic() < deadline:
            time.sleep(0.5)
        found += [f"{width} px: {fault}" for fault in faults]
    page.resize(WIDTHS[0])
    return found


def accessibility_faults(page: Page) -> list[str]:
    """The serious faults that axe finds, in the light and in the dark theme."""
    page.value(AXE_SCRIPT)
    light = page.value(AXE)
    page.value(DARK)
    # Colours change slowly.
    time.sleep(0.4)
    return [f"axe: {fault}" for fault in [*light, *page.value(AXE)]]


def test_no_page_is_cut_off_fails_asks_elsewhere_or_is_hard_to_read(pages, browser):
    if browser is None:
        return
    page, address = browser
    faults = []
    for name in names_of(pages):
        page.open(f"{address}/{name}")
        of_page = layout_faults(page) + [f"console: {error}" for error in page.errors]
        outside = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
        of_page += [f"asked elsewhere: {url}" for url in outside]
        # Axe takes a minute for a table of hundreds of rows.
        if name != "families.html":
            of_page += accessibility_faults(page)
        faults += [f"{name}: {fault}" for fault in of_page]
    assert faults == []


def test_a_fault_is_found(browser):
    """Plant one of each kind into an empty page."""
    if browser is None:
        return
    page, address = browser
    page.open(f"{address}/cite.html")
    page.value(PLANT_FAULTS)
    layout = " ".join(layout_faults(page))
    faults = ("the page is", "a table overflows", "a cell overflows", "cut: ", "not one h1")
    for fault in (*faults, "a word is broken: breakfast"):
        assert fault in layout, fault
    assert "color-contrast" in " ".join(accessibility_faults(page))
    assert "planted" in " ".join(page.errors)


def test_without_scripts_every_figure_is_a_picture(pages, browser):
    if browser is None:
        return
    page, address = browser
    [name] = [name for name in names_of(pages) if "planted" in name or "05_probe" in name]
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(f"{address}/{name}")
        plots = page.value(f"{elements('.live-figure .plot')}.map(plot => plot.offsetHeight)")
        pictures = page.value(f"{elements('img.still-figure')}.map(image => image.clientWidth)")
        assert len(pictures) == len(plots) > 0
        assert set(plots) == {0} and min(pictures) > 300
        faults = [fault for fault in layout_faults(page) if "not drawn" not in fault]
        assert faults == []
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_search_works_from_the_file_too(pages, browser):
    if browser is None:
        return
    page, _ = browser
    page.open(f"{(pages / 'search.html').as_uri()}?q=table")
    assert page.value(f"{elements('#search-results li')}.length") > 0
