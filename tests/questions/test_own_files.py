"""Own files: claims and questions are read as they are, or refused by file, row and column."""

import json
from pathlib import Path

import pandas as pd
import pytest

from dlk_utils.errors import DataError
from dlk_utils.questions.examples import load_examples

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
            'statement,label\n"It rains.",1\nb,0\n"it RAINS",0\n',
            ["rows 1 and 3", "labels 1 and 0", "it RAINS"],
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
