"""What the book's own Sphinx extension does to the markup of pages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "book" / "extensions"))
from page_shell import with_whole_percentages


def test_a_percent_sign_stays_with_its_number_outside_of_code_and_scripts():
    markup = (
        "<p>It flags 58 % of 9 lies, 7 %.</p><pre>a = 9 % 2</pre><p>5 %</p><script>9 % 2</script>"
    )
    assert with_whole_percentages(markup) == (
        "<p>It flags 58&nbsp;% of 9 lies, 7&nbsp;%.</p><pre>a = 9 % 2</pre><p>5&nbsp;%</p>"
        "<script>9 % 2</script>"
    )
