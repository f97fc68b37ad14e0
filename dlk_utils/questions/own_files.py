"""Rows from a file of one's own, checked before anything is computed on them."""

import warnings
from pathlib import Path

import pandas as pd

from dlk_utils.errors import DataError
from dlk_utils.questions.ids import example_id

_LAYOUTS = {
    "claim": ["statement", "label"],
    "question": ["question", "choice_0", "choice_1", "label"],
}


_LABELS = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}


def read_own_file(path: Path) -> pd.DataFrame:
    """Claims (`statement,label`) or questions (`question,choice_0,choice_1,label`) of a `.csv` or `.jsonl`; row numbers in errors count from 1."""
    if not path.is_file():
        raise DataError(f"{path}: no such file (looked in {Path.cwd()})")
    try:
        reader = (
            pd.read_csv
            if path.suffix == ".csv"
            else (lambda p, **k: pd.read_json(p, lines=True, **k))
        )
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", pd.errors.ParserWarning
            )  # a row longer than the header: an unquoted comma
            options = (
                {"dtype": str, "keep_default_na": False, "index_col": False}
                if path.suffix == ".csv"
                else {"dtype": False}
            )
            table = reader(path, encoding="utf-8", **options)
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path}: expected UTF-8, got byte {e.object[e.start]:#x} at position {e.start}; save the file as UTF-8"
        ) from None
    except (
        pd.errors.EmptyDataError,
        pd.errors.ParserError,
        pd.errors.ParserWarning,
        ValueError,
    ) as e:
        raise DataError(
            f"{path}: expected {path.suffix[1:]} with columns {' or '.join(','.join(c) for c in _LAYOUTS.values())}; {e}"
        ) from None
    kind = next((k for k, cols in _LAYOUTS.items() if set(cols) <= set(table.columns)), None)
    if kind is None:
        raise DataError(
            f"{path}: expected columns {' or '.join(','.join(c) for c in _LAYOUTS.values())}, got {','.join(map(str, table.columns))}"
        )
    if table.empty:
        raise DataError(f"{path}: expected rows, got none under the header")
    columns = _LAYOUTS[kind]
    for i, row in enumerate(table[columns].itertuples(index=False), 1):
        empty = [
            c
            for c, v in zip(columns[:-1], row, strict=False)
            if not isinstance(v, str) or not v.strip()
        ]
        if empty:
            raise DataError(f"{path}: row {i}: {empty[0]} is empty or not text")
        if str(row[-1]).strip().lower() not in _LABELS:
            raise DataError(f"{path}: row {i}: expected label 0 or 1, got {row[-1]!r}")
    out = pd.DataFrame(
        {
            "kind": kind,
            "text": table[columns[0]].str.strip(),
            "label": [_LABELS[str(v).strip().lower()] for v in table.label],
        }
    )
    out["choice_0"], out["choice_1"] = (
        table[c].str.strip() if kind == "question" else "" for c in ("choice_0", "choice_1")
    )
    if out.label.nunique() < 2:
        raise DataError(
            f"{path}: expected both labels, got only {out.label.iloc[0]} in {len(out)} rows"
        )
    seen: dict[str, tuple[int, int]] = {}
    for i, r in enumerate(out.itertuples(), 1):
        first, label = seen.setdefault(example_id(r.text, r.choice_0, r.choice_1), (i, r.label))
        if label != r.label:
            raise DataError(
                f"{path}: rows {first} and {i} are the same with labels {label} and {r.label}: {r.text[:60]!r}"
            )
    return out
