"""Own files: claims and questions are read as they are, or refused by file, row and column."""

import gzip
import json
import warnings
from pathlib import Path

import pandas as pd
import pytest

from dlk_utils.errors import DataError
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.own_files import read_own_file
from dlk_utils.questions.sources import read_source, source_of

CLAIMS = [(f"Item {i} is {'red' if i % 2 else 'blue'}, they say", i % 2) for i in range(60)]
QUESTIONS = [
    {
        "question": f"How much is {i} plus {i}?",
        "choice_0": str(2 * i),
        "choice_1": str(2 * i + 1),
        "label": i % 2,
    }
    for i in range(50)
]


def write_csv(path: Path, rows: list[dict]) -> str:
    pd.DataFrame(rows).to_csv(path, index=False)
    return str(path)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(path: Path | str) -> str:
    """The message with which a file is refused; it has at most three lines."""
    with pytest.raises(DataError) as error:
        load_examples([str(path)], 10)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_claims_are_read_alike_from_csv_and_jsonl(tmp_path):
    rows = [{"statement": text, "label": label} for text, label in CLAIMS]
    csv = load_examples(write_csv(tmp_path / "own.csv", rows), 40)
    jsonl = load_examples(write_jsonl(tmp_path / "own.jsonl", rows), 40)
    pd.testing.assert_frame_equal(csv.drop(columns="dataset"), jsonl.drop(columns="dataset"))
    assert set(csv.kind) == {"claim"}
    assert dict(zip(csv.text, csv.label, strict=True)).items() <= dict(CLAIMS).items()


@pytest.mark.parametrize("write, name", [(write_csv, "q.csv"), (write_jsonl, "q.jsonl")])
def test_questions_keep_their_choices_in_order(tmp_path, write, name):
    examples = load_examples(write(tmp_path / name, QUESTIONS), 30)
    assert set(examples.kind) == {"question"}
    by_question = {row["question"]: row for row in QUESTIONS}
    for example in examples.itertuples():
        row = by_question[example.text]
        assert (example.choice_0, example.choice_1) == (row["choice_0"], row["choice_1"])
        assert example.label == row["label"]


def test_words_like_none_and_na_are_text_and_not_missing(tmp_path):
    rows = [
        row | {"choice_0": ["None", "NA", "null"][i % 3], "choice_1": "Some"}
        for i, row in enumerate(QUESTIONS)
    ]
    examples = load_examples(write_csv(tmp_path / "none.csv", rows), 30)
    assert set(examples.choice_0) == {"None", "NA", "null"}


@pytest.mark.parametrize("label_first", [False, True])
@pytest.mark.parametrize("rows_with_comma", [range(60), [0], [1]])
def test_a_claim_with_an_unquoted_comma_is_refused_and_not_cut(
    tmp_path, label_first, rows_with_comma
):
    # pandas takes the first of three fields for an index, and the claim would lose its head.
    lines = ["label,statement" if label_first else "statement,label"]
    for i in range(60):
        text = f"Said on Monday{',' if i in rows_with_comma else ''} it rains in town {i}"
        lines.append(f"{i % 2},{text}" if label_first else f"{text},{i % 2}")
    path = tmp_path / "comma.csv"
    path.write_text("\n".join(lines) + "\n")
    assert "comma.csv" in refusal(path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "columns.csv",
            "text,truth\na,1\nb,0\n",
            ["statement,label", "question,choice_0,choice_1,label", "text,truth"],
        ),
        ("columns.jsonl", '{"text": "a", "truth": 1}\n', ["statement,label", "text,truth"]),
        ("nothing.csv", "", ["statement,label"]),
        ("nothing.jsonl", "", ["statement,label"]),
        ("header.csv", "statement,label\n", ["none under the header"]),
        ("half.csv", "question,choice_0,label\na,b,1\n", ["choice_1"]),
        ("label.csv", "statement,label\na,1\nb,0\nc,2\n", ["row 3", "label", "'2'"]),
        (
            "label.jsonl",
            '{"statement": "a", "label": 1}\n{"statement": "b", "label": "maybe"}\n',
            ["row 2", "label", "maybe"],
        ),
        ("nolabel.csv", "statement,label\na,1\nb,\n", ["row 2", "label"]),
        (
            "twice.csv",
            'statement,label\n"It rains.",1\nb,0\n"it  RAINS.",0\n',
            ["1 in row 1 and 0 in row 3", "it  RAINS."],
        ),
        ("blank.csv", 'statement,label\na,1\n"  ",0\n', ["row 2", "statement"]),
        (
            "empty.jsonl",
            '{"statement": "a", "label": 1}\n{"statement": "", "label": 0}\n',
            ["row 2", "statement"],
        ),
        (
            "number.jsonl",
            '{"statement": "a", "label": 1}\n{"statement": 5, "label": 0}\n',
            ["row 2", "statement"],
        ),
        (
            "choice.csv",
            "question,choice_0,choice_1,label\nq,a,b,1\nr,c,,0\n",
            ["row 2", "choice_1"],
        ),
        ("torn.jsonl", '{"statement": "a", "label": 1}\n{"statement": "b", "la', ["jsonl"]),
        ("ragged.csv", "statement,label\na,1\nb,0,x,y\n", ["csv"]),
    ],
)
def test_bad_rows_are_refused_by_file_and_place(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    message = refusal(tmp_path / name)
    for word in [name, *words]:
        assert word in message


@pytest.mark.parametrize(
    "name, content",
    [
        ("latin.csv", "statement,label\ncafé,1\nb,0\n"),
        ("latin.jsonl", '{"statement": "café", "label": 1}\n'),
    ],
)
def test_a_file_that_is_not_utf_8_is_refused_with_the_byte(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    message = refusal(tmp_path / name)
    for word in (name, "UTF-8", "0xe9"):
        assert word in message


def test_a_missing_file_is_named_with_the_folder_it_was_looked_for_in(tmp_path):
    assert "gone.csv: no such file" in refusal(tmp_path / "gone.csv")
    assert str(Path.cwd()) in refusal("gone.jsonl")


# One table in many spellings.

FEW = [(f"Item {i} is red, they say", i % 2) for i in range(6)]
PLAIN = "statement,label\n" + "".join(f'"{text}",{label}\n' for text, label in FEW)
SEMICOLONS = "statement;label\n" + "".join(f"{text};{label}\n" for text, label in FEW)
TABS = SEMICOLONS.replace(";", "\t")
OBJECTS = [{"statement": text, "label": label} for text, label in FEW]
LINES = "".join(json.dumps(row) + "\n" for row in OBJECTS)


@pytest.mark.parametrize(
    "name, content, notes",
    [
        ("plain.csv", PLAIN, []),
        ("upper.CSV", PLAIN, []),
        ("mark.csv", "\ufeff" + PLAIN, []),
        ("windows.csv", PLAIN.replace("\n", "\r\n"), []),
        ("old_mac.csv", PLAIN.replace("\n", "\r"), []),
        ("blank_lines.csv", PLAIN.replace("\n", "\n\n"), []),
        ("header.csv", PLAIN.replace("statement,label", "Statement , LABEL "), []),
        ("after_commas.csv", 'label, statement\n1, Hello\n0, "It rains, we"\n', None),
        ("semicolons.csv", SEMICOLONS, ["separated by semicolons"]),
        ("excel.csv", "sep=;\n" + SEMICOLONS, ["separated by semicolons"]),
        ("excel.tsv", TABS.encode("utf-16"), ["UTF-16"]),
        ("tabs.tsv", TABS, []),
        ("tabs.csv", TABS, ["separated by tabs"]),
        ("zipped.csv.gz", gzip.compress(PLAIN.encode(), mtime=0), []),
        ("lines.jsonl", LINES, []),
        ("mark.jsonl", "\ufeff" + LINES, []),
        ("zipped.JSONL.gz", gzip.compress(LINES.encode(), mtime=0), []),
        ("lines.ndjson", LINES, []),
        ("lines.json", LINES, []),
        ("list.json", json.dumps(OBJECTS, indent=1), []),
    ],
)
def test_what_can_be_read_in_one_way_only_is_read(tmp_path, name, content, notes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read_own_file(path)
    if notes is None:
        assert list(rows.text) == ["Hello", "It rains, we"] and list(rows.label) == [1, 0]
        return
    assert list(zip(rows.text, rows.label, strict=True)) == FEW
    assert rows.attrs["notes"] == notes
    assert set(read_source(str(path)).text) == {text for text, _ in FEW}


def test_parquet_is_read_with_any_kind_of_label(tmp_path):
    path = tmp_path / "own.parquet"
    for labels in ([0, 1] * 3, [False, True] * 3, ["no", "yes"] * 3, [0.0, 1.0] * 3):
        table = pd.DataFrame(OBJECTS).assign(label=labels, more=[[1]] * 6)
        table.to_parquet(path, index=False)
        rows = read_own_file(path)
        assert list(zip(rows.text, rows.label, strict=True)) == FEW


@pytest.mark.parametrize(
    "no, yes", [("no", "Yes"), ("F", "T"), ("negative", "positive"), ("n", "y"), ("FALSE", "TRUE")]
)
def test_words_for_labels_are_understood_and_said_in_one_line(tmp_path, capsys, no, yes):
    rows = [{"statement": text, "label": yes if label else no} for text, label in CLAIMS]
    examples = load_examples(write_csv(tmp_path / "words.csv", rows), 40)
    assert dict(zip(examples.text, examples.label, strict=True)).items() <= dict(CLAIMS).items()
    [line] = capsys.readouterr().out.splitlines()
    assert line == f"words.csv: read as labels {no} = 0, {yes} = 1"


def test_a_plain_file_is_read_without_a_word(tmp_path, capsys):
    rows = [{"statement": text, "label": label} for text, label in CLAIMS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_examples(write_csv(tmp_path / "own.csv", rows), 40)
    assert capsys.readouterr().out == ""


def rows_with_quotes(before: int, after: int, *, label_first: bool = False) -> str:
    """Forty claims, with a double quote before the text of one and after that of another."""
    lines = ["label,statement" if label_first else "statement,label"]
    for i in range(40):
        text = '"' * (i == before) + f"Item {i} is red" + '"' * (i == after)
        lines.append(f"{i % 2},{text}" if label_first else f"{text},{i % 2}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("twice.csv", "statement,label,Label\na,1,0\nb,0,1\n", ["one column label, got 2"]),
        ("both.csv", "statement,question,choice_0,choice_1,label\n", ["but not both"]),
        (
            "key.jsonl",
            '{"statement": "a", "label": 1, "label": 0}\n',
            ["line 1", "'label'", "2 times"],
        ),
        ("swallowed.csv", rows_with_quotes(3, 23), ["row 4", "21 lines", "quote"]),
        ("first.csv", rows_with_quotes(3, 23, label_first=True), ["row 4", "21 lines"]),
        ("open.csv", rows_with_quotes(3, -1), ["begins in line 5", "quotes"]),
        ("open_first.csv", rows_with_quotes(3, -1, label_first=True), ["begins in line 5"]),
        (
            "middle.csv",
            'question,choice_0,choice_1,label\nq,a,"b,1\nr,c,d",0\ns,e,f,1\n',
            ["row 1", "2 lines"],
        ),
        (
            "backslash.csv",
            'statement,label\na,1\n"He said \\"no\\"",0\n',
            ["begins in line 3", "written twice"],
        ),
        (
            "bare_backslash.csv",
            'statement,label\na,1\nHe said \\"no\\",0\n',
            ["row 2, column statement", "backslash"],
        ),
        *(
            (f"value_{i}.jsonl", '{"statement": "a", "label": 1}\n' + line, ["line 2", line])
            for i, line in enumerate(["null", "5", "[1, 2]", '"x"'])
        ),
        ("items.json", '[{"statement": "a", "label": 1}, null]', ["item 2", "null"]),
        ("deep.jsonl", "[" * 100_000, ["line 1"]),
        ("pretty.json", json.dumps({"data": OBJECTS}, indent=1), ["a list of JSON objects"]),
        ("short.csv", "statement,label\na,1\nb\n", ["row 2, column label", "nothing"]),
        (
            "lacks.jsonl",
            '{"statement": "a", "label": 1}\n{"label": 0}',
            ["row 2, column statement"],
        ),
        ("half.jsonl", '{"statement": "\\ud800", "label": 1}', ["row 1", "surrogate"]),
        (
            "same.csv",
            "question,choice_0,choice_1,label\nq,a,b,1\nr,Paris,paris ,0\n",
            ["row 2", "choice_0 and choice_1", "'Paris'"],
        ),
        (
            "which.csv",
            "question,choice_0,choice_1,label\nq,yes,no,yes\nr,yes,no,no\n",
            ["row 1, column label", "number of the right choice", "'yes'"],
        ),
        ("others.csv", "statement,label\na,1\nb,2\n", ["row 2, column label", "labels", "1,2"]),
        (
            "three.csv",
            "question,choice_0,choice_1,choice_2,label\nq,a,b,c,1\nr,d,e,f,0\n",
            ["expected two choices", "got also choice_2"],
        ),
        ("nul.csv", "statement,label\na\0b,1\nb,0\n", ["NUL character in line 2"]),
        (
            "nul.jsonl",
            '{"statement": "a\\u0000b", "label": 1}\n',
            ["row 1, column statement", "NUL"],
        ),
        (
            "blank.csv",
            "statement,label\na,1\n\u200b,0\n",
            ["row 2, column statement: expected a text"],
        ),
        ("wide.csv", PLAIN.encode("utf-16-le"), ["NUL", "UTF-16 without a byte-order mark"]),
        ("wider.csv", PLAIN.encode("utf-32"), ["NUL", "UTF-32"]),
        ("packed.csv", gzip.compress(PLAIN.encode(), mtime=0), ["gzip", "add .gz to its name"]),
        ("packed.parquet", gzip.compress(b"PAR1", mtime=0), ["gzip", "decompress it"]),
        ("torn.csv.gz", gzip.compress(PLAIN.encode(), mtime=0)[:-20], ["gzip"]),
        ("not.csv.gz", PLAIN, ["gzip"]),
        ("torn.parquet", b"PAR1 and no more", ["Parquet"]),
        ("lfs.parquet", "version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
        ("excel.csv", b"PK\x03\x04...", ["Excel", "save it as .csv"]),
        ("excel.xlsx", b"PK\x03\x04...", [".csv, .tsv", "save it as one of these"]),
    ],
)
def test_what_could_be_read_in_two_ways_or_not_at_all_is_refused(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(path)
    for word in [name, *words]:
        assert word in message


def test_a_text_of_several_lines_is_one_text(tmp_path):
    path = tmp_path / "lines.csv"
    path.write_text('statement,label\n"It rains,\nand, they say: 1, 0",1\nb,0\n')
    assert read_own_file(path).text[1] == "It rains,\nand, they say: 1, 0"
    path.write_text('label,statement\n1,"It rains\nand pours"\n0,b\n')
    assert read_own_file(path).text[1] == "It rains\nand pours"


@pytest.mark.parametrize("name", ["wide.csv", "wide.jsonl", "wide.parquet"])
def test_a_message_about_very_many_columns_is_short(tmp_path, name):
    n = 1_000
    if name == "wide.csv":
        (tmp_path / name).write_text(",".join(f"column {i}" for i in range(n)))
    elif name == "wide.jsonl":
        (tmp_path / name).write_text(json.dumps({f"column {i}": i for i in range(n)}))
    else:
        pd.DataFrame({f"column {i}": [i] for i in range(n)}).to_parquet(tmp_path / name)
    message = refusal(tmp_path / name)
    assert "column 0,column 1," in message and "(1,000 in all)" in message
    assert len(message) < 500


def test_a_long_text_or_label_is_read_or_shown_by_its_beginning(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(f"statement,label\n{'x' * 200_000},1\nb,0\n")
    assert len(read_own_file(path).text[1]) == 200_000
    path.write_text(f"statement,label\na,{'x' * 200_000}\nb,0\n")
    assert len(refusal(path)) < 500


@pytest.mark.parametrize("name", ["/", "/etc", "x" * 5000, "x" * 5000 + ".csv", "a\0b", "a\0b.csv"])
def test_a_name_of_nothing_that_can_be_read_is_refused(name):
    for read in (read_source, source_of):
        with pytest.raises(DataError) as error:
            read(name)
        assert len(str(error.value)) < 500


def test_a_folder_or_missing_file_is_refused_by_its_record_too(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    for name in (tmp_path / "folder.csv", tmp_path / "gone.csv"):
        with pytest.raises(DataError, match=name.name):
            source_of(str(name))


@pytest.mark.parametrize(
    "name, content, where",
    [
        ("a.csv", "text,is_true\nSnow is white,1\n", "the first line names the columns"),
        ("a.jsonl", '{"text": "Snow is white", "is_true": 1}', "the keys of the objects"),
        ("a.json", '[{"text": "Snow is white", "is_true": 1}]', "the keys of the objects"),
    ],
)
def test_a_file_of_other_columns_is_told_where_to_rename_them(tmp_path, name, content, where):
    (tmp_path / name).write_text(content, encoding="utf-8")
    message = refusal(tmp_path / name)
    assert "got text,is_true" in message and where in message and "rename" in message


@pytest.mark.parametrize("value, shown", [(0, "int 0"), ({"a": "b"}, "dict {'a': 'b'}")])
def test_what_is_no_text_is_shown_with_its_type_and_without_more_quotes(tmp_path, value, shown):
    path = write_jsonl(tmp_path / "a.jsonl", [{"statement": value, "label": 1}])
    assert refusal(path).endswith(f"expected a text, got {shown}")


@pytest.mark.parametrize("label, listed", [("", "1,0,'')"), ("1,0", "1,0,'1,0')")])
def test_the_labels_of_a_file_are_listed_one_by_one(tmp_path, label, listed):
    labels = ["1", "0", label]
    rows = [{"statement": f"Item {i}", "label": label} for i, label in enumerate(labels)]
    assert f"the labels of the file are {listed}" in refusal(write_csv(tmp_path / "a.csv", rows))
