"""Rows from a file of one's own, checked before anything is computed on them."""

import warnings
from pathlib import Path

import pandas as pd

from dlk_utils.errors import DataError
from dlk_utils.questions.ids import example_id

SUFFIXES = (".csv", ".jsonl")

_LAYOUTS = {
    "claim": ["statement", "label"],
    "question": ["question", "choice_0", "choice_1", "label"],
}
_LAYOUTS_IN_WORDS = " or ".join(",".join(columns) for columns in _LAYOUTS.values())

_LABELS = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}


def read_own_file(path: Path) -> pd.DataFrame:
    """Read claims (`statement,label`) or questions (`question,choice_0,choice_1,label`).

    `path` is a .csv or .jsonl file in UTF-8. Raises `DataError`, which names the file and the row
    (counted from 1), if a field is empty, a label is not 0 or 1, one label is missing, or the same
    content comes with both labels.
    """
    table = _read_table(path)
    kind = next((k for k, columns in _LAYOUTS.items() if set(columns) <= set(table.columns)), None)
    if kind is None:
        columns = ",".join(map(str, table.columns))
        raise DataError(f"{path}: expected columns {_LAYOUTS_IN_WORDS}, got {columns}")
    if table.empty:
        raise DataError(f"{path}: expected rows, got none under the header")
    *text_columns, _ = _LAYOUTS[kind]
    table.index += 1
    for column in text_columns:
        is_text = table[column].map(lambda value: isinstance(value, str) and bool(value.strip()))
        if not is_text.all():
            raise DataError(f"{path}: row {is_text.idxmin()}: {column} is empty or not text")
    labels = table.label.map(lambda value: _LABELS.get(str(value).strip().lower(), -1))
    if (labels < 0).any():
        row = labels.idxmin()
        raise DataError(f"{path}: row {row}: expected label 0 or 1, got {table.label[row]!r}")
    texts = [table[column].str.strip() for column in text_columns]
    contents = [example_id(*content) for content in zip(*texts, strict=True)]
    for _, same in labels.groupby(contents, sort=False):
        if same.nunique() > 1:
            (first, label), (second, other) = same.drop_duplicates().items()
            raise DataError(
                f"{path}: rows {first} and {second} are the same with labels {label} and {other}: "
                f"{texts[0][second][:60]!r}"
            )
    text, choice_0, choice_1 = texts if kind == "question" else (*texts, "", "")
    rows = {"kind": kind, "text": text, "choice_0": choice_0, "choice_1": choice_1, "label": labels}
    return pd.DataFrame(rows)


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"{path}: no such file (looked in {Path.cwd()})")
    try:
        if path.suffix == ".jsonl":
            return pd.read_json(path, lines=True, dtype=False, encoding="utf-8")
        with warnings.catch_warnings():
            # pandas only warns of a row longer than the header, which has an unquoted comma.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8"
            )
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path}: expected UTF-8, got byte {byte:#x} at position {error.start}; save the file "
            "as UTF-8"
        ) from None
    except (ValueError, pd.errors.ParserWarning) as error:
        raise DataError(
            f"{path}: expected {path.suffix[1:]} with columns {_LAYOUTS_IN_WORDS}; {error}"
        ) from None
