"""Tables on a page: readable headings, whole counts, two digits, nothing of the data run."""

import base64
import io
import re

import numpy as np
import pandas as pd
import pytest

from dlk_utils.errors import ParameterError
from dlk_utils.lab.table_display import MISSING, ShownTable, column_texts, show_row, show_table

SCORES = pd.DataFrame(
    {
        "dataset": ["cities", "cities", "reviews", "reviews"],
        "instruction": ["lie_spy", "lie_plain", "lie_spy", "lie_plain"],
        "n": [104, 90, 12, 8],
        "estimate": [0.95, 0.5, 0.25, np.nan],
        "low": [0.9, 0.4, 0.1, np.nan],
        "high": [1.0, 0.6, 0.4, np.nan],
        "wrong_when_told_to_lie": [0.98765, 1.0, 0.5, 0.0],
    }
)


def html(shown: ShownTable) -> str:
    return shown._repr_html_()


def downloaded(shown: ShownTable) -> pd.DataFrame:
    [content] = re.findall(r"data:text/csv;charset=utf-8;base64,([^\"]*)", html(shown))
    return pd.read_csv(io.BytesIO(base64.b64decode(content, validate=True)))


def test_headings_are_readable_and_intervals_are_one_column():
    shown = show_table(SCORES, "Scores")
    assert shown.headings == ["data set", "instruction", "rows", "AUROC", "wrong, told to lie"]
    expected = ["cities", "lie_spy", "104", "0.95\u00a0[0.90,\u00a01.00]", "0.99"]
    assert shown.rows[0] == expected
    assert shown.rows[3][3] == "not\u00a0scored"
    assert "<caption>Scores</caption>" in html(shown)
    assert list(SCORES.columns)[-1] == "wrong_when_told_to_lie"


def test_another_heading_can_be_given():
    shown = show_table(SCORES, "", headings={"n": "answers"})
    assert shown.headings[2] == "answers"


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([104, 3], ["104", "3"]),
        ([104.0, np.nan], ["104", MISSING]),
        ([0.125, 1.0], ["0.12", "1.00"]),
        ([-0.0, 0.5], ["0.00", "0.50"]),
        ([0.0003, 2.5], ["0.0003", "2.50"]),
        ([-0.00012345, 0.5], ["-0.00012", "0.50"]),
        ([3e-9, 0.5], ["3.0e-09", "0.50"]),
        ([True, False], ["yes", "no"]),
        ([["no", "yes"], None], ["no, yes", MISSING]),
        ([0.5, "none"], ["0.50", "none"]),
        ([np.float32(0.25), np.inf], ["0.25", "inf"]),
        (["a" * 600, "b"], ["a" * 499 + "…", "b"]),
    ],
)
def test_cells_are_written_as_people_write_them(values, texts):
    assert column_texts(pd.Series(values)) == texts


def test_numbers_stand_to_the_right_and_words_to_the_left():
    sides = re.findall(
        r'<th role="columnheader"[^>]*text-align:(\w+)', html(show_table(SCORES, ""))
    )
    assert sides == ["left", "left", "right", "right", "right"]


def test_outer_levels_of_the_index_become_headings_of_their_rows():
    shown = show_table(SCORES.set_index(["dataset", "instruction"]), "")
    assert shown.headings[0] == "instruction"
    groups = re.findall(r'<tr class="group".*?>([^<>]+)</th></tr>', html(shown))
    assert groups == ["data set: cities", "data set: reviews"]
    # Where nearly every row would have a heading, the level is a column.
    one_each = SCORES.iloc[[0, 2]].set_index(["dataset", "instruction"])
    assert show_table(one_each, "").headings[:2] == ["data set", "instruction"]


def test_nested_columns_have_one_heading_and_row_numbers_are_not_shown():
    nested = pd.concat({"planted": SCORES[["n"]], "ours": SCORES[["n"]]}, axis=1)
    shown = show_table(nested, "")
    assert shown.headings == ["planted, rows", "ours, rows"] and shown.rows[1] == ["90", "90"]
    assert show_table(nested.rename_axis("layer"), "").headings[0] == "layer"


def test_values_of_the_data_that_have_become_columns_stay_as_they_are():
    counts = pd.crosstab(SCORES.dataset, pd.Series(["n", "validation", "lie_spy", "n"], name="of"))
    assert show_table(counts, "").headings == ["data set", "lie_spy", "n", "validation"]


def test_a_table_that_is_cut_comes_as_a_whole_in_a_file():
    shown = show_table(SCORES, "", columns=["dataset", "estimate"], rows=2, file_name="scores")
    assert shown.headings == ["data set", "AUROC"] and len(shown.rows) == 2
    assert 'download="scores.csv"' in html(shown)
    pd.testing.assert_frame_equal(downloaded(shown), SCORES, check_dtype=False, rtol=1e-5)
    n_columns = len(SCORES.columns)
    assert f"({len(SCORES)} rows, {n_columns} columns)" in html(shown)
    other = show_table(SCORES.head(1), "", whole=SCORES.set_index("dataset"))
    # The file has the names of the rows too.
    assert f"({len(SCORES)} rows, {n_columns} columns)" in html(other)
    assert list(downloaded(other).columns) == list(SCORES.columns)


def test_a_table_that_is_not_cut_has_no_file():
    assert "download" not in html(show_table(SCORES, ""))


def test_a_column_that_is_not_there_is_refused_by_name():
    with pytest.raises(ParameterError, match="has no 'estimates'; it has 'dataset'"):
        show_table(SCORES, "", columns=["estimates"])


def test_of_a_table_without_rows_the_page_says_why():
    empty = SCORES.head(0)
    empty.attrs = {"too_few_rows": "train: 3 rows <of 4>"}
    shown = show_table(empty, "Scores")
    assert "Scores: train: 3 rows &lt;of 4&gt;" in html(shown) and "<table" not in html(shown)


def test_a_series_is_shown_as_names_and_values():
    shown = show_table(SCORES.iloc[0], "One row")
    assert shown.rows[2:4] == [["rows", "104"], ["AUROC", "0.95"]] and not shown.headings
    assert "<thead" not in html(shown)
    assert html(show_row(SCORES, "One row")) == html(shown)
    assert "One row: there are no rows to show" in html(show_row(SCORES.head(0), "One row"))


def test_each_cell_has_the_heading_that_a_narrow_screen_shows():
    labels = re.findall(r'data-label="(.*?)"', html(show_table(SCORES.head(1), "")))
    assert labels == ["data set", "instruction", "rows", "AUROC", "wrong, told to lie"]


def test_data_is_text_and_long_words_can_be_broken():
    hostile = "<script>alert(1)</script>"
    table = pd.DataFrame({f"<b>{hostile}": [hostile, "$x$", "a_b/c", "f" * 64]})
    markup = html(show_table(table.rename_axis(hostile), hostile, whole=table, file_name='"><b>'))
    assert "<script" not in markup and "<b>" not in markup
    assert "a_<wbr>b/<wbr>c" in markup and f'<span class="long">{"f" * 64}</span>' in markup
    assert "mathjax_ignore" in markup


def test_where_no_html_is_shown_the_table_is_text():
    lines = repr(show_table(SCORES[["dataset", "n"]], "Scores")).splitlines()
    assert lines[:3] == ["Scores", "data set | rows", "cities | 104"]
