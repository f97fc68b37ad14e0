"""Read claims or questions from a user's own file, and check them.

Files may differ in format, separator, encoding and the spelling of labels, as long as there is only
one way to read them. A file that could be read in two ways is refused. The error names the file,
the row and the column.
"""

import codecs
import collections
import csv
import gzip
import hashlib
import io
import json
import os
import re
import unicodedata
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
"""Suffixes of the files that are read, in lower or upper case.

All but .parquet may be compressed, with .gz added.
"""

_LAYOUTS = {
    "claim": ["statement", "label"],
    "question": ["question", "choice_0", "choice_1", "label"],
}
"""The columns of a file, by the kind of its rows. The last one is the label."""

_LAYOUTS_IN_WORDS = " or ".join(",".join(columns) for columns in _LAYOUTS.values())

_NUMBERS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
_BOOLEANS = {"false": 0, "true": 1}
_WORDS = {"f": 0, "t": 1, "no": 0, "yes": 1, "n": 0, "y": 1, "negative": 0, "positive": 1}
_LABELS = {
    "claim": _NUMBERS | _BOOLEANS | _WORDS,
    # Here a label numbers a choice. The choices themselves may be "yes" and "no".
    "question": _NUMBERS | _BOOLEANS,
}
"""What a label means, by the kind of the rows, for each of its spellings in lower case."""

_LABELS_IN_WORDS = {
    "claim": "0 or 1, false or true, F or T, no or yes, N or Y, negative or positive",
    "question": "0 or 1, the number of the right choice",
}

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@dataclass
class _Parsed:
    """The content of a file, before its fields are checked.

    Attributes
    ----------
    kind
        What the rows are: one of `_LAYOUTS`.
    values
        The fields of each column of the layout. Further columns of the file are left out.
    notes
        How the file differs from the plain form: UTF-8, and fields separated by commas or tabs as
        its suffix says.
    """

    kind: str
    values: dict[str, list[Any]]
    notes: list[str] = field(default_factory=list)


def is_own_file(name: str) -> bool:
    """Whether the name of a data set is that of a file which `read_own_file` reads."""
    return _has_suffix(name, *SUFFIXES)


def _has_suffix(name: str, *suffixes: str) -> bool:
    """Whether a file's name has one of some suffixes, whatever its case, compressed or not."""
    return name.lower().removesuffix(".gz").endswith(suffixes)


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
        counted from 1. Claims have empty choices. `attrs["sha256"]` is the hash of the bytes that
        were read, and `attrs["notes"]` lists in words how the file differs from the plain form,
        which is UTF-8 with labels 0 and 1, and fields separated as the suffix says.

    Raises
    ------
    DataError
        If the file cannot be read, or could be read in two ways; if a field is empty, a label
        cannot be understood, or the two choices are the same; or if the same content has both
        labels.
    """
    content = read_bytes(path)
    parsed = _parse(path, content)
    # As objects: with other types, pandas would convert numbers and missing fields.
    table = pd.DataFrame(parsed.values, dtype=object)
    if table.empty:
        raise DataError(f"{path.name}: expected rows, got none under the header")
    table.index += 1
    *text_columns, _ = _LAYOUTS[parsed.kind]
    for column in text_columns:
        _check_texts(path, table[column])
    spellings = table.label.map(lambda value: "" if value is None else str(value).strip())
    labels = _read_labels(path, spellings, parsed.kind)
    notes = parsed.notes + _notes_on_labels(spellings, parsed.kind)
    texts = [table[column].astype(str).str.strip() for column in text_columns]
    if parsed.kind == "question":
        _check_choices_differ(path, table)
    _check_contradictions(path, texts, labels)
    text, choice_0, choice_1 = texts if parsed.kind == "question" else (*texts, "", "")
    rows = pd.DataFrame(
        {
            "kind": parsed.kind,
            "text": text,
            "choice_0": choice_0,
            "choice_1": choice_1,
            "label": labels,
        }
    )
    rows.attrs = {"sha256": hashlib.sha256(content).hexdigest(), "notes": notes}
    return rows


def with_home(name: str) -> str:
    """Return a path with the home folder in place of a `~` at its start; other names unchanged."""
    return os.path.expanduser(name) if name.startswith("~") else name


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a user's own file; raise `DataError` if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        reason = f"no such file (looked in {shortened(Path.cwd())})"
        if re.match(r"https?:/", str(path)):
            reason = "expected a file, got an address of the web; download it, and give its path"
    except OSError as error:
        reason = f"could not be read ({error.strerror})"
    except ValueError as error:
        reason = f"could not be read ({error})"
    raise DataError(f"{str(path)[:200]}: {reason}")


def shortened(value: Any, length: int = 60) -> str:
    """Return the first characters of a value, for a message: those of a text between quotes."""
    text = str(value)
    first = text[:length]
    # The quotes are put around what is left, as the complete text may be as long as a book.
    shown = repr(first) if isinstance(value, str) else first
    return shown + ("..." if len(text) > length else "")


def listed(values: Iterable[Any], most: int = 12) -> str:
    """Return the first few of some values, each by its first characters, for a message."""
    values = list(values)
    texts = [str(value)[:40] for value in values[:most]]
    # Quotes tell an empty text, or one with a comma, from two of them.
    shown = ",".join(repr(text) if not text.strip() or "," in text else text for text in texts)
    return shown + (f",... ({len(values):,} in all)" if len(values) > most else "")


# Checks of the columns.


def _check_texts(path: Path, column: pd.Series) -> None:
    """Refuse fields that are not text, are empty, or cannot be written in UTF-8."""
    for row, value in column.items():
        where = f"{path.name}: row {row}, column {column.name}"
        if not isinstance(value, str):
            got = "nothing" if value is None else f"{type(value).__name__} {repr(value)[:60]}"
            raise DataError(f"{where}: expected a text, got {got}")
        if "\0" in value:
            raise DataError(f"{where}: expected a text, got one with a NUL character; remove it")
        if not _is_visible(value):
            raise DataError(
                f"{where}: expected a text, got an empty one; fill it, or remove the row"
            )
        require_unicode(value, where)


def require_unicode(text: str, where: str) -> None:
    """Raise `DataError` if a text holds half of a surrogate pair, which cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected Unicode text, got half of a surrogate pair at character "
            f"{error.start + 1}"
        ) from None


def _is_visible(text: str) -> bool:
    """Whether a text has more than blanks, marks of format such as U+200B, and combining marks."""
    invisible = ("Cc", "Cf", "Mn", "Zl", "Zp", "Zs")
    return any(unicodedata.category(character) not in invisible for character in text)


def _read_labels(path: Path, spellings: pd.Series, kind: str) -> pd.Series:
    """Return the labels, 0 or 1, that a file spells in one of the ways of `_LABELS`."""
    labels = spellings.str.lower().map(_LABELS[kind])
    if labels.isna().any():
        row = labels.isna().idxmax()
        got = shortened(spellings[row]) if spellings[row] else "nothing"
        raise DataError(
            f"{path.name}: row {row}, column label: expected {_LABELS_IN_WORDS[kind]}, got "
            f"{got} (the labels of the file are {listed(spellings.unique())})"
        )
    return labels.astype(int)


def _notes_on_labels(spellings: pd.Series, kind: str) -> list[str]:
    """Say what the labels of a file mean, in one note; in none if they are all 0 and 1."""
    words = [word for word in spellings.unique() if word not in ("0", "1")]
    if not words:
        return []
    labels_and_words = sorted((_LABELS[kind][word.lower()], word) for word in words)
    return ["labels " + ", ".join(f"{word} = {label}" for label, word in labels_and_words)]


def _check_choices_differ(path: Path, table: pd.DataFrame) -> None:
    """Refuse a question whose two choices are the same, as far as `example_id` tells."""
    for row in table.itertuples():
        if example_id(row.choice_0) == example_id(row.choice_1):
            raise DataError(
                f"{path.name}: row {row.Index}, columns choice_0 and choice_1: expected two "
                f"different answers, got {shortened(row.choice_0)} and {shortened(row.choice_1)}"
            )


def _check_contradictions(path: Path, texts: Sequence[pd.Series], labels: pd.Series) -> None:
    """Refuse rows with the same content and different labels."""
    content_ids = [example_id(*content) for content in zip(*texts, strict=True)]
    for _, labels_of_content in labels.groupby(content_ids, sort=False):
        if labels_of_content.nunique() > 1:
            # The first row with each of the two labels.
            (row_a, label_a), (row_b, label_b) = labels_of_content.drop_duplicates().items()
            raise DataError(
                f"{path.name}: expected one label for {shortened(texts[0][row_b])}, got {label_a} "
                f"in row {row_a} and {label_b} in row {row_b}; remove one of the rows"
            )


# The formats.


def _parse(path: Path, content: bytes) -> _Parsed:
    """Parse the content of a file in the format that its suffix says."""
    if content.startswith(b"version https://git-lfs"):
        raise DataError(f"{path.name}: expected rows, got a pointer of Git LFS; run `git lfs pull`")
    is_gzip = path.name.lower().endswith(".gz")
    if content.startswith(b"\x1f\x8b") and not is_gzip:
        remedy = "decompress it" if _has_suffix(path.name, ".parquet") else "add .gz to its name"
        raise DataError(
            f"{path.name}: expected an uncompressed file, got one compressed by gzip; {remedy}"
        )
    if is_gzip:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path.name}: expected a complete gzip file, got a damaged one ({error})"
            ) from None
    if _has_suffix(path.name, ".parquet"):
        return _parse_parquet(path, content)
    text, notes = decode_text(path, content)
    is_separated = _has_suffix(path.name, ".csv", ".tsv")
    parsed = _parse_separated(path, text) if is_separated else _parse_json(path, text)
    return _Parsed(parsed.kind, parsed.values, notes + parsed.notes)


def decode_text(path: Path, content: bytes) -> tuple[str, list[str]]:
    """Decode UTF-8, or UTF-16 if a byte-order mark says so; return the text, and notes on it."""
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
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path.name}: expected UTF-8, got a NUL character in line {line}, as in a binary "
            "file, UTF-32, or UTF-16 without a byte-order mark; save the file as UTF-8"
        )
    # Some programs write the byte-order mark twice.
    return text.lstrip("\ufeff"), ["UTF-16"] if is_utf_16 else []


def _find_layout(path: Path, names: Sequence[Any]) -> tuple[str, dict[str, int]]:
    """Return the kind of the rows, and the place of each column of its layout among `names`."""
    plain = _plain(names)
    kinds = _kinds_of(names)
    if len(kinds) != 1:
        raise DataError(
            f"{path.name}: expected columns {_LAYOUTS_IN_WORDS}"
            f"{' but not both' if kinds else ''}, got {listed(names)}; {_where_named(path)}, so "
            "rename them there"
        )
    [kind] = kinds
    further = [name for name in plain if re.fullmatch(r"choice_\d+", name)]
    further = [name for name in further if name not in _LAYOUTS[kind]]
    if kind == "question" and further:
        raise DataError(
            f"{path.name}: expected two choices, choice_0 and choice_1, got also "
            f"{listed(further)}; remove all but two choices, or make rows of two choices each"
        )
    for column in _LAYOUTS[kind]:
        if plain.count(column) > 1:
            raise DataError(
                f"{path.name}: expected one column {column}, got {plain.count(column)}; keep the "
                "one that you mean"
            )
    return kind, {column: plain.index(column) for column in _LAYOUTS[kind]}


def _where_named(path: Path) -> str:
    """Say where a file of this format has the names of its columns."""
    if _has_suffix(path.name, ".csv", ".tsv"):
        return "the first line names the columns"
    if _has_suffix(path.name, ".parquet"):
        return "the schema of the file names the columns"
    return "the keys of the objects are the columns"


def _kinds_of(names: Sequence[Any]) -> list[str]:
    """List the kinds of rows that have all their columns among `names`."""
    return [kind for kind, columns in _LAYOUTS.items() if set(columns) <= set(_plain(names))]


def _plain(names: Sequence[Any]) -> list[str]:
    """Return the names of columns in lower case, without blanks around them."""
    return [str(name).strip().lower() for name in names]


def _parse_parquet(path: Path, content: bytes) -> _Parsed:
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = file.schema_arrow.names
        kind, places = _find_layout(path, names)
        # Without threads: one that pyarrow started has aborted scripts at their end.
        table = file.read(columns=[names[place] for place in places.values()], use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path.name}: expected a Parquet file, got one that is damaged or of another kind "
            f"({shortened(error, 120)})"
        ) from None
    values = {column: table[names[place]].to_pylist() for column, place in places.items()}
    return _Parsed(kind, values)


def _parse_json(path: Path, text: str) -> _Parsed:
    """Parse a list of objects, which only a .json file may hold, or one object a line."""
    is_list = _has_suffix(path.name, ".json") and text.lstrip().startswith("[")
    if is_list:
        items = _load_json(path, text)
        objects = [(f"item {number}", item) for number, item in enumerate(items, 1)]
    else:
        objects = []
        # Not `splitlines`, which also breaks at characters that JSON allows within a text.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                objects.append((f"line {number}", _load_json(path, line, f"line {number}: ")))
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
    return _Parsed(kind, values)


def _load_json(path: Path, text: str, where: str = "") -> Any:
    """Return the value of a text in JSON; refuse objects with a key that comes twice.

    `where` says in errors which part of the file the text is.
    """
    expected = f"a JSON object with keys {_LAYOUTS_IN_WORDS}"
    if _has_suffix(path.name, ".json"):
        expected = f"a list of JSON objects, or one a line, with keys {_LAYOUTS_IN_WORDS}"

    def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            [(key, n)] = counts.most_common(1)
            raise DataError(
                f"{path.name}: {where}expected each key once, got {shortened(key)} {n} times"
            )
        return value

    try:
        return json.loads(text, object_pairs_hook=refuse_repeated_keys)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path.name}: {where}expected {expected}; {shortened(error, 120)}"
        ) from None


def _parse_separated(path: Path, text: str) -> _Parsed:
    """Parse a table with a header, whose fields are separated by one of `_SEPARATORS`."""
    separator, header, text = _find_separator(path, text)
    kind, places = _find_layout(path, header)
    expected = "\t" if _has_suffix(path.name, ".tsv") else ","
    notes = [] if separator == expected else [f"separated by {_SEPARATORS[separator]}"]
    values: dict[str, list[Any]] = {column: [] for column in places}
    rows = _rows_of(path, text, separator)
    # The first one is the header.
    next(rows)
    for number, row in enumerate(rows, 1):
        where = f"{path.name}: row {number}"
        if len(row) > len(header):
            raise DataError(
                f"{where}: expected {len(header)} fields of a csv file, as in the header, got "
                f"{len(row)}; put a text that holds {separator!r} between double quotes"
            )
        _check_swallowed_rows(
            where,
            row,
            n_columns=len(header),
            label_place=places["label"],
            separator=separator,
            meanings=_LABELS[kind],
        )
        for column, place in places.items():
            value = row[place] if place < len(row) else None
            if value and '\\"' in value:
                raise DataError(
                    f"{where}, column {column}: expected no backslash before a double quote, which "
                    'can be read in two ways; write the quote twice ("") in a field between '
                    "quotes, or use .jsonl"
                )
            values[column].append(value)
    return _Parsed(kind, values, notes)


def _find_separator(path: Path, text: str) -> tuple[str, list[str], str]:
    """Return what separates the fields, the header, and the text from the header on.

    It is the first separator with which the header has the columns of a layout. If there is none,
    it is the one that divides the header into the most fields, for the error to show.
    """
    candidates = list(_SEPARATORS)
    # Excel writes and reads a line before the header that names the separator.
    declaration = re.match(r'"?sep=([,;|\t])"?\r?\n', text)
    if declaration:
        candidates = [declaration[1]]
        text = text[declaration.end() :]
    headers = {separator: _header_of(path, text, separator) for separator in candidates}
    for separator, header in headers.items():
        if _kinds_of(header):
            return separator, header, text
    separator = max(headers, key=lambda candidate: len(headers[candidate]))
    return separator, headers[separator], text


def _header_of(path: Path, text: str, separator: str) -> list[str]:
    """Return the fields of the first line that is not blank."""
    # Not strict: quotes may look misplaced if this is not the separator of the file.
    header = next(_rows_of(path, text, separator, strict=False), None)
    if header is None:
        raise DataError(f"{path.name}: expected csv with columns {_LAYOUTS_IN_WORDS}, got nothing")
    return header


def _rows_of(path: Path, text: str, separator: str, *, strict: bool = True) -> Iterator[list[str]]:
    """Yield the fields of each row that is not blank. A field between quotes may span lines."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, strict=strict, skipinitialspace=True)
    # A field may be longer than the limit, which holds for the whole process and is never lowered.
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
    *,
    n_columns: int,
    label_place: int,
    separator: str,
    meanings: dict[str, int],
) -> None:
    """Refuse a row that seems to hold several rows of the table in one of its fields.

    A double quote that is never closed makes one field of all that follows, up to the next quote.
    Such a field has several lines. The first one, with the fields before it, makes a row. So does
    the last one, with the fields after it.

    Parameters
    ----------
    where
        Names the file and the row in the error.
    label_place
        Which field of a row is its label.
    meanings
        What can stand there, as in `_LABELS`.
    """

    def is_row(fields: Sequence[str]) -> bool:
        return len(fields) == n_columns and fields[label_place].strip().lower() in meanings

    for place, value in enumerate(row):
        lines = re.split(r"\r\n|\r|\n", value)
        if len(lines) == 1:
            continue
        first_row = [*row[:place], *lines[0].split(separator)]
        last_row = [*lines[-1].split(separator), *row[place + 1 :]]
        if is_row(first_row) and is_row(last_row):
            raise DataError(
                f"{where}: expected one row, got {len(lines)} lines that look like rows in one "
                f"field, beginning with {shortened(value)}; close the double quote before them, "
                "or, if it belongs to the text, write it twice in a field between quotes"
            )
