"""A book made from hostile names and data: no script of theirs runs, and all of it is readable.

The pages are opened in headless Chromium. Where there is none, their HTML is searched alone.
"""

import csv
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from browser import find_browser, opened_browser, served
from tiny_models import checkpoint_that_knows_nothing

from dlk_utils.lab.book import NOTEBOOKS, build_pages, run_notebook
from notebooks import papermill, run

sys.path.insert(0, str(Path(__file__).parent / "lab"))
from hostile import FLAG, HOSTILE

pytestmark = pytest.mark.slow

TOP = Path(__file__).resolve().parent.parent
PLANTED = """
import sys
sys.path.insert(0, {folder!r})
import pandas as pd
from hostile import HOSTILE, hostile_figures, hostile_sentences
from IPython.display import HTML, Markdown, display
from myst_nb import glue
from dlk_utils.errors import DataError
from dlk_utils.lab.display import refusal, show_prompt, start
from dlk_utils.lab.table_display import show_table
start(In)
table = pd.DataFrame([HOSTILE] * 2, columns=HOSTILE, index=HOSTILE[:2]).T
display(table)
display(show_table(table.rename_axis(HOSTILE[0]), HOSTILE[1], whole=table, file_name=HOSTILE[2]))
for text in HOSTILE:
    display(Markdown("\\n".join(hostile_sentences(text))))
    print(text)
row = pd.Series(dict(role="lie", instruction=HOSTILE[0], template=HOSTILE[1], choices=HOSTILE[2:4],
                     label=1))
display(HTML(show_prompt(row, HOSTILE)))
for number, text in enumerate(HOSTILE):
    glue(f"text_{{number}}", text, display=False)
def refuse():
    raise DataError(" ".join(HOSTILE))
refusal(refuse)
for figure in hostile_figures(HOSTILE):
    display(figure)
"""
OF_THE_THEME = re.compile("THEBE_JS_URL|invalid theme mode|favicon")
"""What the theme's own scripts complain about on any page."""
HOVER = """
document.querySelectorAll(".js-plotly-plot").forEach(
    figure => Plotly.Fx.hover(figure, [{curveNumber: 0, pointNumber: 0}]))
"""


def write_claims(path: Path) -> Path:
    """A file of true and false claims, with a hostile text in each."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["statement", "label"])
        for i in range(60):
            rows.writerow([f"Claim {i}: {HOSTILE[i % len(HOSTILE)]}", i % 2])
    return path


def write_questions(path: Path) -> Path:
    """A file of questions with hostile choices."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "choice_0", "choice_1", "label"])
        for i in range(60):
            text = HOSTILE[i % len(HOSTILE)]
            rows.writerow([f"Question {i}? {text}", f"no {text}", f"yes {text}", i % 2])
    return path


def write_notebook(path: Path, code: str = "") -> None:
    """A notebook with a title and one cell of code."""
    cell = {"cell_type": "code", "id": "a", "execution_count": None, "outputs": []}
    cell |= {"metadata": {}, "source": code}
    title = {"cell_type": "markdown", "id": "b", "metadata": {}, "source": f"# {path.stem}"}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": [title, cell], "metadata": {"kernelspec": kernel}}
    path.write_text(json.dumps(notebook | {"nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of the pages of a book about hostile names, and the folder of its data."""
    top, data = tmp_path_factory.mktemp("book"), tmp_path_factory.mktemp("of a user")
    pages = top / "book" / "notebooks"
    pages.mkdir(parents=True)
    for name in ("build", "notebooks"):
        (top / name).mkdir()
    model = checkpoint_that_knows_nothing(data / f"<img src=x onerror={FLAG}=11>")
    files = [
        write_claims(data / f"<script>{FLAG}=13<" / "script>.csv"),
        write_claims(data / f"<img src=x onerror={FLAG}=14> *b* $5 $6 __c__.csv"),
        write_questions(data / "`[a](javascript:alert(1)) {{ 1 }}.csv"),
    ]
    options = {"model": model, "datasets": ",".join(map(str, files)), "runs_dir": data / "runs"}
    options |= {"n_examples": 16}
    own = {
        "01_make_dataset": {},
        "02_check_lie_rate": {"n_grid": 4, "compare": ""},
    }
    for stage, parameters in own.items():
        done = run(papermill(stage, pages / f"{stage}.ipynb", **options, **parameters))
        assert done.returncode == 0, done.stderr[-3000:]
    code = PLANTED.format(folder=str(Path(__file__).parent / "lab"))
    write_notebook(top / "notebooks" / "planted.ipynb", code)
    run_notebook("planted", top, pages, [])
    glued = [f"{{glue:text}}`notebooks/planted.ipynb::text_{i}:s`" for i in range(len(HOSTILE))]
    write_book(top, "\n\n".join(["# Front", *glued]))
    return build_pages(top).parent, data


def write_book(top: Path, front: str, pages: Sequence[str] = ()) -> None:
    """The table of contents, settings and pages of a book of the notebooks that have run.

    `front` is the Markdown of its front page, and `pages` are names of pages of the real book.
    """
    book, notebooks = top / "book", top / "book" / "notebooks"
    shutil.copy(TOP / "_config.yml", top)
    for folder in ("static", "extensions", "templates"):
        shutil.copytree(TOP / "book" / folder, book / folder)
    for path in [*(TOP / "book").glob("*.txt"), *(TOP / "book" / f"{name}.md" for name in pages)]:
        shutil.copy(path, book)
    for name in NOTEBOOKS:
        # Pages link to those that have not run.
        if not (notebooks / f"{name}.ipynb").is_file():
            write_notebook(notebooks / f"{name}.ipynb")
    names = [*(f"notebooks/{name}" for name in sorted(p.stem for p in notebooks.iterdir())), *pages]
    chapters = "".join(f"  - file: {name}\n" for name in names)
    (book / "_toc.yml").write_text(f"format: jb-book\nroot: intro\nchapters:\n{chapters}")
    (book / "intro.md").write_text(front)


class Elements(HTMLParser):
    """What could run or fetch something in a page: elements, attributes, addresses."""

    def __init__(self, page: str):
        super().__init__()
        self.handlers, self.addresses, self.scripts, self.in_script = [], [], [], False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.in_script = tag == "script"
        for name, value in attributes:
            if name.startswith("on"):
                self.handlers.append(f"{tag} {name}={value}")
            if name in ("src", "href"):
                self.addresses.append(value or "")

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts.append(data)


def html_pages(folder: Path) -> list[Path]:
    names = ("01_make_dataset", "02_check_lie_rate", "planted")
    return [folder / "intro.html", *(folder / "notebooks" / f"{name}.html" for name in names)]


def test_no_page_has_an_element_of_a_name_or_of_data(built):
    for path in html_pages(built[0]):
        page = Elements(path.read_text(encoding="utf-8"))
        assert not [handler for handler in page.handlers if "hurt" in handler]
        assert not [script for script in page.scripts if script.strip().startswith(FLAG)]
        assert not [a for a in page.addresses if "javascript:" in a or a.endswith("b.png")]


@pytest.fixture
def address(built) -> Iterator[str]:
    """The address of the pages on a server of this machine."""
    with served(built[0]) as address:
        yield address


def test_in_a_browser_no_script_runs_nothing_is_asked_elsewhere_and_all_can_be_read(
    built, address, tmp_path
):
    program = find_browser()
    if program is None:
        warnings.warn("no Chromium here: the pages were searched, but not opened", stacklevel=1)
        return
    with opened_browser(program, tmp_path) as page:
        for path in html_pages(built[0]):
            page.open(f"{address}/{path.relative_to(built[0])}")
            page.value(HOVER)
            assert page.value(f"typeof {FLAG}") == "undefined", path.name
            assert [error for error in page.errors if not OF_THE_THEME.search(error)] == []
            asked = [url for url in page.requests if not url.startswith(("data:", "blob:"))]
            assert asked and all(url.startswith(address) for url in asked)
            paths = [built[0] / unquote(urlparse(url).path).lstrip("/") for url in asked]
            missing = [path.name for path in paths if not path.is_file()]
            assert set(missing) <= {"favicon.ico"}
            if path.stem in ("intro", "planted"):
                text = page.value("document.body.textContent")
                assert [hostile for hostile in HOSTILE if hostile not in text] == []


def test_no_page_says_where_the_files_lie(built):
    pages, data = built
    for path in html_pages(pages):
        assert str(data) not in path.read_text(encoding="utf-8"), path.name
    for source in (pages / "_sources").rglob("*.ipynb"):
        assert str(data) not in source.read_text(encoding="utf-8"), source.name
