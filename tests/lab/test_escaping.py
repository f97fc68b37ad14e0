"""Whatever a name or a text holds, Markdown, HTML, plotly and matplotlib show it as it is."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hostile import HOSTILE, hostile_figures, hostile_sentences
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from matplotlib.text import Text

from dlk_utils.lab.display import interval_text
from dlk_utils.lab.escaping import html_text, markdown_text, plotly_text, without_folders
from dlk_utils.lab.figures import lines_figure
from dlk_utils.lab.static import draw_png

OURS = {"p", "ul", "li", "strong", "em", "span"}
"""The elements that our sentences are made of."""


class Page(HTMLParser):
    """The text of a page, and the elements in it."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.elements, self.attributes = "", set(), set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def rendered(markdown: str) -> Page:
    """Render Markdown with everything switched on that a reader of it may have switched on."""
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return Page(reader.render(markdown))


def in_one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("frame", ["{}", "* {}", "* **{}**: known", "from {} to *{}*, and"])
def test_markdown_shows_the_text_as_it_is(text, frame):
    page = rendered(frame.format(*[markdown_text(text)] * 2))
    assert in_one_line(text) in page.text
    assert page.elements <= OURS and page.attributes <= {"class"}


def test_markdown_leaves_plain_names_as_they_are():
    for name in ("rotten_tomatoes", "smollm2-liar", "org/model-1.5", "my claims.csv"):
        assert markdown_text(name) == name


def test_a_dollar_sign_begins_no_formula_after_markdown_was_read():
    dollar = '<span class="mathjax_ignore tex2jax_ignore">&#36;</span>'
    assert markdown_text("$5") == f"{dollar}5"


@pytest.mark.parametrize("text", HOSTILE)
def test_html_shows_the_text_as_it_is_also_in_an_attribute(text):
    page = Page(f'<p title="{html_text(text)}">{html_text(text)}</p>')
    assert page.text == text and page.elements == {"p"} and page.attributes == {"title"}


@pytest.mark.parametrize("text", HOSTILE)
def test_plotly_gets_no_element_but_line_breaks(text):
    assert Page(plotly_text(text)).text == text
    in_lines = Page(plotly_text(text * 3, 20))
    assert in_lines.elements <= {"br"}
    assert "".join(in_lines.text.split()) == "".join((text * 3).split())


def test_a_title_is_not_broken_between_a_number_and_its_percent_sign():
    assert plotly_text("at most 17 %", 10).split("<br>") == ["at most", "17\N{NO-BREAK SPACE}%"]


# Every sentence that a page ends with.


@pytest.mark.parametrize("name", HOSTILE)
def test_every_sentence_shows_a_name_as_it_is(name):
    page = rendered("\n".join(hostile_sentences(name)))
    assert page.elements <= OURS and page.attributes <= {"class"}
    plain = rendered("\n".join(hostile_sentences("rotten")))
    assert page.text.count(in_one_line(name)) == plain.text.count("rotten") == 25


# Figures.


def texts_of_plotly(fig: dict) -> list[str]:
    """All texts of a figure that plotly reads its markup in."""
    layout = fig["layout"]
    texts = [layout["title"]["text"]]
    texts += [note["text"] for note in layout.get("annotations", [])]
    for axis in ("xaxis", "yaxis"):
        texts += [layout[axis]["title"]["text"], *layout[axis].get("ticktext", [])]
    for trace in fig["data"]:
        texts.append(trace.get("name") or "")
        if trace["type"] == "heatmap":
            texts += [text for row in (*trace["text"], *trace["hovertext"]) for text in row]
        else:
            texts += trace.get("text", [])
    return texts


def without_blanks(text: str) -> str:
    """The letters of a text, however it is broken into lines."""
    return "".join(text.split())


@pytest.mark.parametrize("number", range(5))
def test_a_figure_holds_no_markup_of_names_and_all_of_their_text(number):
    fig = hostile_figures(HOSTILE)[number].to_dict()
    pages = [Page(text) for text in texts_of_plotly(fig)]
    assert set().union(*(page.elements for page in pages)) <= {"br"}
    shown = {without_blanks(page.text) for page in pages}
    assert set(map(without_blanks, HOSTILE)) <= shown


@pytest.mark.slow
def test_every_text_of_the_picture_is_drawn_as_it_is(monkeypatch):
    drawn = []
    save = Figure.savefig

    def save_and_look(picture, *args, **options):
        save(picture, *args, **options)
        drawn.extend(picture.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", save_and_look)
    some = [text for text in HOSTILE if "$" in text or "_" in text or "\n" in text]
    for fig in hostile_figures(some):
        drawn.clear()
        assert draw_png(fig.to_dict()).startswith(b"\x89PNG")
        assert not any(text.get_parse_math() or text.get_usetex() for text in drawn)
        shown = {without_blanks(text.get_text()) for text in drawn}
        assert set(map(without_blanks, some)) <= shown


def test_a_logarithmic_axis_has_numbers_without_formulas(monkeypatch):
    table = pd.DataFrame({"x": [1, 2], "y": [0.01, 1000.0]})
    labels = {"title": "", "xlabel": "", "ylabel": ""}
    fig = lines_figure(table, x="x", y="y", log_y=True, **labels)
    ticks = []
    save = Figure.savefig

    def save_and_look(picture, *args, **options):
        save(picture, *args, **options)
        ticks.extend(label.get_text() for label in picture.axes[0].get_yticklabels())

    monkeypatch.setattr(Figure, "savefig", save_and_look)
    draw_png(fig.to_dict())
    assert {"0.01", "1000"} <= set(ticks)


# Errors.


@pytest.mark.parametrize(
    "message, shown",
    [
        ("{tmp}/my claims.csv: row 3", "my claims.csv: row 3"),
        ("no such file: '{tmp}/deeper/a.csv'", "no such file: 'a.csv'"),
        ("/data/some/where/a.csv: empty", "a.csv: empty"),
        (r"C:\Users\me\a.csv: empty", "a.csv: empty"),
        ("tried /usr/bin/python -m pip", "tried python -m pip"),
        ("see https://pypi.org/project/uv/", "see https://pypi.org/project/uv/"),
        ("org/model and 1/2 and and/or", "org/model and 1/2 and and/or"),
        ("<script>a</script> is no label", "<script>a</script> is no label"),
    ],
)
def test_an_error_names_the_file_and_not_where_it_lies(message, shown, tmp_path, monkeypatch):
    working_folder = tmp_path / "a folder"
    working_folder.mkdir()
    monkeypatch.chdir(working_folder)
    assert without_folders(message.format(tmp=Path.cwd())) == shown


def test_an_interval_is_plain_text():
    row = {"estimate": np.float64(0.5), "low": 0.4, "high": 0.6}
    assert markdown_text(interval_text(row)).replace("\\", "") == "0.50 [0.40, 0.60]"
