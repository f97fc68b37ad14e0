"""A cache of results: tables and folders, kept under a hash of all that decided them.

The hash covers the inputs, the code that computed the result (`provenance.code_hash`) and the
library versions. So a change of code never returns a stale result, and editing a docstring or a
figure recomputes nothing. Next to each result is its record: a JSON file with all of these, and
with the checksum of a table. A record has to have the hash that its file is named by. Damaged
results are made again, with a message. A complete result is shown without writing anything, so that
the folder may be read-only.

`python -m dlk_utils.lab.cache [RUNS_DIR] [--remove]` lists, or removes, what the present code and
libraries would not read.
"""

import argparse
import functools
import importlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet

from dlk_utils.errors import StoreError
from dlk_utils.provenance import PACKAGE, code_hash, fingerprint, library_versions
from dlk_utils.safe_files import (
    WAIT,
    checksum,
    clean,
    lock,
    make_folder,
    read_file,
    write_file,
)


class Cache:
    """The folder in which the results of runs are kept.

    Parameters
    ----------
    folder
        Where the files go. It is made when the first result is kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        clean(folder)

    def table(
        self,
        name: str,
        function: Callable,
        inputs: Mapping[str, Any],
        compute: Callable[[], pd.DataFrame],
    ) -> pd.DataFrame:
        """Read a kept table, or compute and keep it.

        Parameters
        ----------
        name
            What the file name begins with, such as ``"08-transfer"``.
        function
            The function whose code decides the table.
        inputs
            Everything else that decides it, as JSON values.
        compute
            Called if the table is not there, or is damaged. The index of the table is not kept.

        Raises
        ------
        StoreError
            If the table is not there, and the folder cannot be written to.
        """
        record = provenance_of(function) | dict(inputs)
        path = self._path(name, record, ".parquet")
        table = _read_table(path, otherwise="it is made again")
        if table is None:
            # Before it is computed, which may take long.
            make_folder(self.folder)
            content = compute().to_parquet(index=False)
            with lock(self.folder, seconds=WAIT):
                write_file(path, content)
                write_file(_record_path(path), _as_bytes(checksum(content) | record))
            table = _table_from(content)
        return table

    def filled_folder(
        self,
        name: str,
        function: Callable,
        inputs: Mapping[str, Any],
        is_complete: Callable[[Path], bool],
        fill: Callable[[Path, dict], None],
    ) -> Path:
        """Return a kept folder; `fill(folder, record)` fills one that is not complete yet.

        `name`, `function` and `inputs` are those of `table`. `fill` says what it makes again.
        """
        record = provenance_of(function) | dict(inputs)
        folder = self._path(name, record)
        clean(folder)
        complete = is_complete(folder)
        if not complete or _read_record(folder) is None:
            if complete:
                print(f"{_record_path(folder).name} is missing or damaged, so it is written again")
            make_folder(folder)
            with lock(self.folder, seconds=WAIT):
                write_file(_record_path(folder), _as_bytes(record))
        if not complete:
            fill(folder, record)
        return folder

    def tables(self, name: str) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
        """Yield the record and the table of every table of this name.

        A damaged one is left out, with a message: only the run that made it can make it again.
        """
        for path in sorted(self.folder.glob(f"{name}-*.parquet")):
            table = _read_table(path, otherwise="it is left out until its run makes it again")
            if table is not None:
                yield _read_record(path), table

    def outdated(self) -> Iterator[Path]:
        """Yield the results that the present code and libraries would not read.

        Among them are tables that are damaged. A folder whose record is damaged is not: its content
        may well be read.
        """
        for record_path in sorted(self.folder.glob("*.json")):
            for path in (record_path.with_suffix(".parquet"), record_path.with_suffix("")):
                record = _read_record(path)
                if record is None:
                    is_outdated = path.is_file()
                else:
                    is_outdated = path.exists() and _is_outdated(record)
                if is_outdated:
                    yield path

    def remove_outdated(self) -> list[Path]:
        """Remove what `outdated` lists, and return it.

        Raises
        ------
        StoreError
            If something cannot be removed.
        """
        paths = list(self.outdated())
        for path in paths:
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                _record_path(path).unlink()
            except OSError as error:
                raise StoreError(f"{path}: could not be removed ({error.strerror})") from error
        return paths

    def _path(self, name: str, record: Mapping[str, Any], suffix: str = "") -> Path:
        return self.folder / f"{name}-{fingerprint(record)}{suffix}"


def kept(name: str) -> Callable[[Callable[..., pd.DataFrame]], Callable[..., pd.DataFrame]]:
    """Decorate a function of a run, `function(run, ...)`, whose tables are then kept.

    They are kept under `name`, the arguments, the run, and the code of the module in which the
    function is defined, with all that it imports.
    """

    def decorate(function: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(run: Any, *args: Any, **options: Any) -> pd.DataFrame:
            call = signature.bind(run, *args, **options)
            call.apply_defaults()
            names = list(call.arguments)[1:]  # all but the run
            inputs = {
                "arguments": {name: as_json(call.arguments[name]) for name in names},
                "run": run.record,
            }

            def compute() -> pd.DataFrame:
                return function(*call.args, **call.kwargs)

            return run.cache.table(name, function, inputs, compute)

        return wrapper

    return decorate


def provenance_of(function: Callable) -> dict[str, Any]:
    """Describe the code and the libraries that a function computes with."""
    name = f"{function.__module__}:{function.__qualname__}"
    return {"by": name, "code": code_hash(function), "versions": library_versions()}


def as_json(value: Any) -> Any:
    """Turn an argument into a JSON value: sequences become lists, paths their text."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _as_bytes(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode()


def _record_path(path: Path) -> Path:
    """The file next to a result that holds its record."""
    return path.with_suffix(".json")


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record of a result; None if it is missing or damaged.

    A record is undamaged if it has the fingerprint that the result is named by.
    """
    try:
        record = json.loads(read_file(_record_path(path)) or b"")
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    parts = {name: value for name, value in record.items() if name not in checksum(b"")}
    return record if path.stem.endswith(f"-{fingerprint(parts)}") else None


def _read_table(path: Path, *, otherwise: str) -> pd.DataFrame | None:
    """A kept table; None if it is not there, or does not have the checksum of its record.

    In the second case this prints `otherwise`, which says what happens instead.
    """
    content = read_file(path)
    if content is None:
        return None
    record = _read_record(path)
    if record is None:
        print(f"{path.name} has no record, or a damaged one, so {otherwise}")
        return None
    if not checksum(content).items() <= record.items():
        print(f"{path.name} does not match the checksum of its record, so {otherwise}")
        return None
    return _table_from(content)


def _table_from(content: bytes) -> pd.DataFrame:
    """Read a parquet file; its columns of lists hold lists, which pandas would read as arrays."""
    # Not `pandas.read_parquet`: it starts a thread of pyarrow, which aborted scripts at their end.
    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
    columns = file.read(use_threads=False)
    table = columns.to_pandas(use_threads=False)
    table.attrs = json.loads(columns.schema.metadata.get(b"PANDAS_ATTRS", b"{}"))
    for field in columns.schema:
        if pyarrow.types.is_list(field.type):
            table[field.name] = columns[field.name].to_pylist()
    return table


def _is_outdated(record: Mapping[str, Any]) -> bool:
    """Whether other code, or other versions of the libraries, computed a result.

    The code of a function outside this package is not known here: only the versions count then.
    """
    if record.get("versions") != library_versions():
        return True
    module, _, name = record.get("by", "").partition(":")
    if module.split(".")[0] != PACKAGE:
        return False
    try:
        function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return True
    return record.get("code") != code_hash(function)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dlk_utils.lab.cache",
        description="List, or remove, the results that the present code would not read.",
    )
    parser.add_argument("runs_dir", nargs="?", default="runs", type=Path)
    parser.add_argument("--remove", action="store_true", help="remove them instead of listing them")
    options = parser.parse_args(arguments)
    cache = Cache(options.runs_dir)
    try:
        paths = cache.remove_outdated() if options.remove else list(cache.outdated())
    except StoreError as error:
        print(error, file=sys.stderr)
        return 1
    for path in paths:
        print(path.name)
    done = "removed" if options.remove else "outdated (remove them with --remove)"
    print(f"{len(paths)} results in {options.runs_dir}: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
