"""Rows from a file of one's own, checked before anything is computed on them.

What can be read in one way only is read. What could be read in two ways is refused, and the error
names the file, the row and the column.
"""

import codecs
import collections
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet

from dlk_utils.errors import DataError
from dlk_utils.questions.ids import example_id

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
"""In lower or upper case. All but .parquet may be compressed, with .gz added."""

_LAYOUTS = {
    "claim": ["statement", "label"],
    "question": ["question", "choice_0", "choice_1", "label"],
}
_LAYOUTS_IN_WORDS = " or ".join(",".join(columns) for columns in _LAYOUTS.values())

_NUMBERS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
_BOOLEANS = {"false": 0, "true": 1}
_WORDS = {"f": 0, "t": 1, "no": 0, "yes": 1, "n": 0, "y": 1, "negative": 0, "positive": 1}
_LABELS = {
    "claim": _NUMBERS | _BOOLEANS | _WORDS,
    # Here a label numbers a choice. The choices themselves may be "yes" and "no".
    "question": _NUMBERS | _BOOLEANS,
}
_LABELS_IN_WORDS = {
    "claim": "0 or 1, false or true, F or T, no or yes, N or Y, negative or positive",
    "question": "0 or 1, the number of the right choice",
}

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@dataclass
class _Columns:
    """The columns of a file that are used, and what had to be understood to read them."""

    kind: str
    values: dict[str, list[Any]]
    notes: list[str] = field(default_factory=list)


def is_own_file(name: str) -> bool:
    """Whether the name of a data set is that of a file which `read_own_file` reads."""
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def read_own_file(path: Path) -> pd.DataFrame:
    """Read claims (`statement,label`) or questions (`question,choice_0,choice_1,label`).

    Parameters
    ----------
    path
        A file with one of `SUFFIXES`: a table with a header, separated by commas, semicolons, tabs
        or vertical bars; a list of JSON objects, or one object a line; or a Parquet file. Text is
        in UTF-8, or in UTF-16 with a byte-order mark. The case of the column names does not count,
        nor do blanks around them, and there may be further columns.

    Returns
    -------
    pandas.DataFrame
        Columns `kind`, `text`, `choice_0`, `choice_1` and `label`, with the rows of the file
        counted from 1. `attrs["sha256"]` is the hash of the bytes that were read, and
        `attrs["notes"]` lists in words how the file differs from the plain form.

    Raises
    ------
    DataError
        If the file cannot be read or could be read in two ways; if a field is empty, a label is
        none, or the two choices are the same; or if the same content comes
        with both labels.
    """
    content = read_bytes(path)
    columns = _parse(path, content)
    # As objects: other types would turn what is missing, and numbers, into something else.
    table = pd.DataFrame(columns.values, dtype=object)
    if table.empty:
        raise DataError(f"{path.name}: expected rows, got none under the header")
    table.index += 1
    *text_columns, _ = _LAYOUTS[columns.kind]
    for column in text_columns:
        _check_texts(path, table[column])
    labels = _read_labels(path, table.label, columns)
    texts = [table[column].astype(str).str.strip() for column in text_columns]
    if columns.kind == "question":
        _check_choices_differ(path, table)
    _check_contradictions(path, texts, labels)
    text, choice_0, choice_1 = texts if columns.kind == "question" else (*texts, "", "")
    rows = pd.DataFrame(
        {
            "kind": columns.kind,
            "text": text,
            "choice_0": choice_0,
            "choice_1": choice_1,
            "label": labels,
        }
    )
    rows.attrs = {"sha256": hashlib.sha256(content).hexdigest(), "notes": columns.notes}
    return rows


def read_bytes(path: Path) -> bytes:
    """Read a file of one's own; raises `DataError` if that is not possible."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        reason = f"no such file (looked in {shortened(Path.cwd())})"
    except OSError as error:
        reason = f"could not be read ({error.strerror})"
    except ValueError as error:
        reason = f"could not be read ({error})"
    raise DataError(f"{str(path)[:200]}: {reason}")


def shortened(value: Any, length: int = 60) -> str:
    """Show a value in a message by its first characters."""
    text = str(value)
    # Cut first: the text may be as long as a book.
    shown = repr(text[:length]) if isinstance(value, str) else text[:length]
    return shown + ("..." if len(text) > length else "")


def listed(values: Iterable[Any], most: int = 12) -> str:
    """List values in a message: the first of them, each by its first characters."""
    values = list(values)
    shown = ",".join(str(value)[:40] for value in values[:most])
    return shown + (f",... ({len(values):,} in all)" if len(values) > most else "")


# Checks of the columns.


def _check_texts(path: Path, column: pd.Series) -> None:
    for row, value in column.items():
        where = f"{path.name}: row {row}, column {column.name}"
        if not isinstance(value, str):
            got = "nothing" if value is None else shortened(repr(value))
            raise DataError(f"{where}: expected a text, got {got}")
        if not value.strip():
            raise DataError(f"{where} is empty: fill it, or take the row out")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: expected Unicode text, got half of a surrogate pair at character "
                f"{error.start + 1}"
            ) from None


def _read_labels(path: Path, column: pd.Series, columns: _Columns) -> pd.Series:
    meanings = _LABELS[columns.kind]
    spelled = column.map(lambda value: "" if value is None else str(value).strip())
    labels = spelled.str.lower().map(meanings)
    if labels.isna().any():
        row = labels.isna().idxmax()
        got = shortened(spelled[row]) if spelled[row] else "nothing"
        raise DataError(
            f"{path.name}: row {row}, column label: expected {_LABELS_IN_WORDS[columns.kind]}, got "
            f"{got} (the labels of the file are {listed(spelled.unique())})"
        )
    labels = labels.astype(int)
    words = {word: meanings[word.lower()] for word in spelled.unique() if word not in ("0", "1")}
    if words:
        by_label = sorted(words.items(), key=lambda item: (item[1], item[0]))
        columns.notes.append("labels " + ", ".join(f"{word} = {label}" for word, label in by_label))
    return labels


def _check_choices_differ(path: Path, table: pd.DataFrame) -> None:
    for row in table.itertuples():
        if example_id(row.choice_0) == example_id(row.choice_1):
            raise DataError(
                f"{path.name}: row {row.Index}, columns choice_0 and choice_1: expected two "
                f"different answers, got {shortened(row.choice_0)} and {shortened(row.choice_1)}"
            )


def _check_contradictions(path: Path, texts: Sequence[pd.Series], labels: pd.Series) -> None:
    contents = [example_id(*content) for content in zip(*texts, strict=True)]
    for _, same in labels.groupby(contents, sort=False):
        if same.nunique() > 1:
            (first, label), (second, other) = same.drop_duplicates().items()
            raise DataError(
                f"{path.name}: rows {first} and {second} are the same with labels {label} and "
                f"{other}: {shortened(texts[0][second])}; take one of them out"
            )


# The formats.


def _parse(path: Path, content: bytes) -> _Columns:
    """Read the columns of a file by its suffix."""
    name = path.name.lower()
    if content.startswith(b"version https://git-lfs"):
        raise DataError(f"{path.name}: expected rows, got a pointer of Git LFS; run `git lfs pull`")
    if name.endswith(".gz"):
        name = name.removesuffix(".gz")
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path.name}: expected a file that gzip reads, got a damaged one ({error})"
            ) from None
    if name.endswith(".parquet"):
        return _parse_parquet(path, content)
    text, notes = _decode(path, content)
    parse = _parse_separated if name.endswith((".csv", ".tsv")) else _parse_json
    columns = parse(path, text)
    columns.notes[:0] = notes
    return columns


def _decode(path: Path, content: bytes) -> tuple[str, list[str]]:
    """Decode UTF-8, or UTF-16 if a byte-order mark says so."""
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise DataError(
            f"{path.name}: expected text, got an Excel workbook or another archive; save it as .csv"
        )
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf_16 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name}: expected UTF-8, got byte {error.object[error.start]:#x} at position "
            f"{error.start}; save the file as UTF-8"
        ) from None
    return text.removeprefix("\ufeff"), ["UTF-16"] if is_utf_16 else []


def _find_layout(path: Path, names: Sequence[Any]) -> tuple[str, dict[str, int]]:
    """Return the kind of the rows, and the place of each of their columns among `names`."""
    plain = [str(name).strip().lower() for name in names]
    kinds = [kind for kind, columns in _LAYOUTS.items() if set(columns) <= set(plain)]
    if len(kinds) != 1:
        raise DataError(
            f"{path.name}: expected columns {_LAYOUTS_IN_WORDS}"
            f"{' but not both' if kinds else ''}, got {listed(names)}; the first line names the "
            "columns"
        )
    [kind] = kinds
    for column in _LAYOUTS[kind]:
        if plain.count(column) > 1:
            raise DataError(
                f"{path.name}: column {column} comes {plain.count(column)} times; keep the one "
                "that is meant"
            )
    return kind, {column: plain.index(column) for column in _LAYOUTS[kind]}


def _parse_parquet(path: Path, content: bytes) -> _Columns:
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = file.schema_arrow.names
        kind, places = _find_layout(path, names)
        # Not with threads: one of pyarrow's aborted scripts at their end.
        table = file.read(columns=[names[place] for place in places.values()], use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path.name}: expected a Parquet file, got one that is damaged or of another kind "
            f"({shortened(error, 120)})"
        ) from None
    values = {column: table[names[place]].to_pylist() for column, place in places.items()}
    return _Columns(kind, values)


def _parse_json(path: Path, text: str) -> _Columns:
    """Read a list of objects, or one object a line."""
    is_list = path.name.lower().removesuffix(".gz").endswith(".json") and text.lstrip()[:1] == "["
    if is_list:
        objects = [(f"item {i}", item) for i, item in enumerate(_load_json(path, text, ""), 1)]
    else:
        # Not `splitlines`, which also breaks at characters that JSON allows within a text.
        lines = enumerate(text.split("\n"), 1)
        objects = [
            (f"line {i}", _load_json(path, line, f"line {i}: "))
            for i, line in lines
            if line.strip()
        ]
    for where, value in objects:
        if not isinstance(value, dict):
            raise DataError(
                f"{path.name}: {where}: expected an object with keys {_LAYOUTS_IN_WORDS}, got "
                f"{json.dumps(value)[:60]}"
            )
    names = list(dict.fromkeys(key for _, value in objects for key in value))
    kind, places = _find_layout(path, names)
    values = {
        column: [value.get(names[place]) for _, value in objects]
        for column, place in places.items()
    }
    return _Columns(kind, values)


def _load_json(path: Path, text: str, where: str) -> Any:
    expected = f"a JSON object with keys {_LAYOUTS_IN_WORDS}"
    if path.name.lower().removesuffix(".gz").endswith(".json"):
        expected = f"a list of JSON objects, or one a line, with keys {_LAYOUTS_IN_WORDS}"

    def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            [(key, n)] = counts.most_common(1)
            raise DataError(f"{path.name}: {where}the key {shortened(key)} comes {n} times")
        return value

    try:
        return json.loads(text, object_pairs_hook=refuse_repeated_keys)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path.name}: {where}expected {expected}; {shortened(error, 120)}"
        ) from None


def _parse_separated(path: Path, text: str) -> _Columns:
    """Read a table with a header; which character separates the fields, the header tells."""
    notes = []
    # Excel writes such a line, and reads it.
    first = re.match(r'"?sep=([,;|\t])"?\r?\n', text)
    candidates = list(_SEPARATORS)
    if first:
        candidates, text = [first[1]], text[first.end() :]
    headers = {separator: _header_of(path, text, separator) for separator in candidates}
    expected = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    fitting = [separator for separator in candidates if _is_layout(headers[separator])]
    separator = fitting[0] if fitting else max(candidates, key=lambda s: len(headers[s]))
    kind, places = _find_layout(path, headers[separator])
    if separator != expected:
        notes.append(f"separated by {_SEPARATORS[separator]}")
    values: dict[str, list[Any]] = {column: [] for column in places}
    rows = _rows_of(path, text, separator)
    next(rows)
    for number, row in enumerate(rows, 1):
        where = f"{path.name}: row {number}"
        n_fields, n_columns = len(row), len(headers[separator])
        if n_fields > n_columns:
            raise DataError(
                f"{where}: expected {n_columns} fields of a csv file, as in the header, got "
                f"{n_fields}; put a text that holds {separator!r} between double quotes"
            )
        _check_swallowed_rows(where, row, n_columns, places["label"], separator, _LABELS[kind])
        for column, place in places.items():
            value = row[place] if place < n_fields else None
            if value and '\\"' in value:
                raise DataError(
                    f"{where}, column {column}: a backslash before a double quote can be read in "
                    'two ways; write the quote twice ("") in a field between quotes, or use .jsonl'
                )
            values[column].append(value)
    return _Columns(kind, values, notes)


def _is_layout(names: Sequence[str]) -> bool:
    plain = {name.strip().lower() for name in names}
    return any(set(columns) <= plain for columns in _LAYOUTS.values())


def _header_of(path: Path, text: str, separator: str) -> list[str]:
    # Not strict, for it may be another character that separates the fields.
    for row in _rows_of(path, text, separator, strict=False):
        return row
    raise DataError(f"{path.name}: expected csv with columns {_LAYOUTS_IN_WORDS}, got nothing")


def _rows_of(path: Path, text: str, separator: str, *, strict: bool = True) -> Iterator[list[str]]:
    """Yield the fields of each line that is not blank."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, strict=strict, skipinitialspace=True)
    # The limit is one for the whole process, and a text may be longer.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    first_line = 1
    try:
        for row in reader:
            if any(value.strip() for value in row):
                yield row
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path.name}: expected csv with columns {_LAYOUTS_IN_WORDS}; the row that begins in "
            f"line {first_line} cannot be read: {error} in line {reader.line_num} (double quotes "
            'around a field come in pairs, and one within it is written twice: "")'
        ) from None


def _check_swallowed_rows(
    where: str,
    row: Sequence[str],
    n_columns: int,
    label_place: int,
    separator: str,
    meanings: dict[str, int],
) -> None:
    """Refuse a field of several lines whose first and last lines complete rows of the table.

    They do where a double quote that was never closed has made one field of several rows.
    """

    def is_row(fields: Sequence[str]) -> bool:
        is_whole = len(fields) == n_columns
        return is_whole and fields[label_place].strip().lower() in meanings

    for place, value in enumerate(row):
        lines = re.split(r"\r\n|\r|\n", value)
        if len(lines) == 1:
            continue
        head = [*row[:place], *lines[0].split(separator)]
        tail = [*lines[-1].split(separator), *row[place + 1 :]]
        if is_row(head) and is_row(tail):
            raise DataError(
                f"{where}: a field has {len(lines)} lines that look like rows, beginning with "
                f"{shortened(value)}; a double quote is not closed there, or belongs to the text "
                "(then write it twice, in a field between quotes)"
            )
