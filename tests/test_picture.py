"""The README says what the front page says: `make picture` copies its sentences."""

import re
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / "book"))
from picture import BEGIN, END, readme_with  # noqa: E402

MARKED = f"# A\n\n{BEGIN}\nold\n{END}\n\nafter\n"


def test_the_sentences_replace_those_between_the_marks():
    paragraphs = ["Yes,  on\n a model.", "Its strongest rival. It is \\1 of $2 _c_."]
    made = readme_with(MARKED, paragraphs)
    assert made.startswith(
        f"# A\n\n{BEGIN}\nYes, on a model.\n\n* Its strongest rival. It is \\1 of"
    )
    assert made.endswith(f"](book/page.png)\n{END}\n\nafter\n") and "old" not in made
    assert readme_with(made, paragraphs) == made


def test_long_sentences_are_wrapped_and_no_number_is_broken():
    made = readme_with(MARKED, ["word " * 60, "AUROC 0.93 [0.69, 1.00] " * 20])
    lines = made.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line.startswith(("* AUROC", "  ")) for line in lines if "AUROC" in line)
    made = readme_with(MARKED, ["First.", "It flags 58 % of the lies. " * 20])
    assert made.count("58 %") == 20 and "\N{NO-BREAK SPACE}" not in made


def test_the_readme_has_the_finding_its_rival_and_what_else_the_front_page_says():
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    made = readme[readme.index(BEGIN) : readme.index(END)]
    page = (TOP / "book" / "intro.md").read_text(encoding="utf-8")
    above_figure, figure, _ = page.partition("```{glue} turn")
    assert figure
    labels = re.findall(r"^\* \*\*(.+?)\*\* \{glue", above_figure, flags=re.MULTILINE)
    assert len(labels) == 3
    for label in labels:
        assert f"* {label} " in made, "run make book, then make picture"
    assert re.search(r"AUROC \d\.\d\d \[\d\.\d\d,\s+\d\.\d\d\]", made)
    assert "(book/page.png)" in made and (TOP / "book" / "page.png").stat().st_size > 10_000
