"""A Sphinx extension for this book: what stands around the text of its pages.

It leaves out the scripts of Thebe. Thebe makes the cells of a page executable by a server, which
this book does not have. Its scripts are nevertheless added to every page, some of them twice, so
that browsers report an error.

Below the title of a page that is a notebook it says how to get the notebook and how to run it.

The cells of tables that were written in Markdown get their headings as attributes. On a phone the
style sheet shows each row as a card, with the headings in it. Names in such tables may break at
their dots, slashes, hyphens and underscores, and very long words anywhere. All other words
stay whole.

A percent sign stays on the line of its number.
"""

import html
import re
from pathlib import PurePosixPath
from typing import Any

from bs4 import BeautifulSoup

TABLE = re.compile(r'<table class="table">.*?</table>', re.DOTALL)
"""A table that was written in Markdown."""
LONGEST_WORD = 12
"""In characters. A longer word may break anywhere."""
LITERAL = re.compile(r"(<(?:script|style|pre)\b.*?</(?:script|style|pre)>)", re.DOTALL)
"""Parts of a page whose text must not change."""
PERCENT = re.compile(r"(?<=\d) %")
WORD = re.compile(r"[^\W_]+")
BETWEEN_WORDS = re.compile(r"(?<=[^\W\d][_./-])(?=\w)|(?<=\w[_./-])(?=[^\W\d])")
"""Where any name may break, such as that of a module. Numbers and dates stay whole."""


def leave_out_thebe(app: Any, page: str, template: str, context: dict, doctree: Any) -> None:
    """Remove the scripts of Thebe from the files that a page asks for."""
    scripts = context.get("script_files", [])
    context["script_files"] = [script for script in scripts if not _is_of_thebe(script)]


def _is_of_thebe(script: Any) -> bool:
    source = f"{getattr(script, 'filename', script)} {getattr(script, 'attributes', {})}"
    return "thebe" in source.lower()


def offer_notebook(app: Any, page: str, template: str, context: dict, doctree: Any) -> None:
    """Say below the title of a notebook how to download it, and how to open it in JupyterLab."""
    source = context.get("sourcename", "")
    if not source.endswith(".ipynb"):
        return
    address = context["pathto"](f"_sources/{source}", 1)
    name = PurePosixPath(source).name
    way = (
        f'<p class="notebook-way">This page is a notebook. <a href="{address}" download="{name}">'
        "Download it</a>, or run <code>make lab</code> in a checkout to open all notebooks in "
        "JupyterLab, change their parameters and run them again.</p>"
    )
    context["body"] = context["body"].replace("</h1>", f"</h1>\n{way}", 1)


def label_cells(app: Any, page: str, template: str, context: dict, doctree: Any) -> None:
    """Give each cell of a Markdown table its heading."""
    if "body" in context:
        context["body"] = TABLE.sub(lambda found: _labelled(found[0]), context["body"])


def _labelled(markup: str) -> str:
    table = BeautifulSoup(markup, "html.parser").table
    headings = [heading.get_text(" ", strip=True) for heading in table.select("thead th")]
    if not headings:
        return markup
    table["class"] = [*table["class"], "shown", "written", *["many"] * (len(headings) > 8)]
    table["role"] = "table"
    roles = {"thead": "rowgroup", "tbody": "rowgroup", "tr": "row", "th": "columnheader"}
    for element in table.find_all([*roles, "td"]):
        element["role"] = roles.get(element.name, "cell")
    for row in table.select("tbody tr"):
        for cell, heading in zip(row.find_all("td"), headings, strict=False):
            cell["data-label"] = heading
    for text in table.find_all(string=True):
        text.replace_with(BeautifulSoup(_breakable(text), "html.parser"))
    return str(table)


def _breakable(text: str) -> str:
    """Return the markup of a text in which long names and very long words may break."""
    markup = BETWEEN_WORDS.sub("\u200b", html.escape(text, quote=False))
    markup = WORD.sub(lambda word: _long(word[0]), markup)
    return markup.replace("\u200b", "<wbr>")


def _long(word: str) -> str:
    return f'<span class="long-word">{word}</span>' if len(word) > LONGEST_WORD else word


def join_percent_signs(app: Any, page: str, template: str, context: dict, doctree: Any) -> None:
    """Put a no-break space between numbers and percent signs."""
    if "body" in context:
        context["body"] = with_whole_percentages(context["body"])


def with_whole_percentages(markup: str) -> str:
    """Return markup in which no line ends between a number and its percent sign.

    Scripts, style sheets and code blocks stay as they are.
    """
    parts = LITERAL.split(markup)
    # Every second part is what separates the others: it is literal.
    parts[::2] = [PERCENT.sub("&nbsp;%", part) for part in parts[::2]]
    return "".join(parts)


def setup(app: Any) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    # After the extensions that add scripts to a page.
    app.connect("html-page-context", leave_out_thebe, priority=900)
    app.connect("html-page-context", offer_notebook, priority=900)
    app.connect("html-page-context", label_cells, priority=900)
    app.connect("html-page-context", join_percent_signs, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
