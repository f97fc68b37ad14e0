"""Results that are kept: tables and stores, named by everything that decided them.

The name of a file holds the fingerprint of the arguments, of what the result was made from, of the
code that made it (`provenance.code_hash`) and of the library versions. So a number that other rules
made is never read back, and editing a docstring or a figure makes nothing again.

`python -m dlk_utils.lab.cache [RUNS_DIR] [--remove]` lists, or removes, what the present code and
libraries would not read.
"""

import argparse
import functools
import importlib
import inspect
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet
import xxhash

from dlk_utils.extract.store import is_complete
from dlk_utils.provenance import PACKAGE, code_hash, fingerprint, library_versions, write_file


class Cache:
    """The folder in which the results of runs lie.

    Parameters
    ----------
    folder
        Where the files go. It is made when the first result is kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def table(
        self, name: str, maker: Callable, decided_by: Mapping[str, Any], make: Callable
    ) -> pd.DataFrame:
        """Read a kept table, or make and keep it.

        Parameters
        ----------
        name
            What the file name begins with, such as ``"08-transfer"``.
        maker
            The function whose code decides the table.
        decided_by
            Everything else that decides it, as JSON values.
        make
            Called without arguments if the table is not there, or is damaged.
        """
        parts = made_by(maker) | dict(decided_by)
        path = self.path(name, parts, ".parquet")
        table = _read_table(path)
        if table is None:
            content = make().to_parquet(index=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
            write_file(_record_path(path), json.dumps(_checksum(content) | parts).encode())
            table = _table_from(content)
        return table

    def store(
        self,
        name: str,
        maker: Callable,
        decided_by: Mapping[str, Any],
        make: Callable[[Path, dict], None],
    ) -> Path:
        """Return the folder of a kept store; `make(folder, parts)` fills an incomplete one."""
        parts = made_by(maker) | dict(decided_by)
        folder = self.path(name, parts)
        if not is_complete(folder):
            make(folder, parts)
        return folder

    def path(self, name: str, parts: Mapping[str, Any], suffix: str = "") -> Path:
        """Name a file or folder by a fingerprint of everything that decides its content."""
        return self.folder / f"{name}-{fingerprint(parts)}{suffix}"

    def tables(self, name: str) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
        """Give every undamaged table of this name, whatever decided it, with what decided it."""
        for path in sorted(self.folder.glob(f"{name}-*.parquet")):
            table = _read_table(path)
            if table is not None:
                yield json.loads(_record_path(path).read_bytes()), table

    def outdated(self) -> Iterator[Path]:
        """Give the tables and stores that the present code and libraries would not read."""
        for path in sorted(self.folder.glob("*.parquet")):
            if _is_outdated(_record_of(_record_path(path))):
                yield path
        for path in sorted(self.folder.glob("*/manifest.json")):
            if _is_outdated(_record_of(path).get("parts", {})):
                yield path.parent

    def remove_outdated(self) -> list[Path]:
        """Remove what `outdated` lists, and return it."""
        paths = list(self.outdated())
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
                _record_path(path).unlink(missing_ok=True)
        return paths


def kept(name: str) -> Callable[[Callable[..., pd.DataFrame]], Callable[..., pd.DataFrame]]:
    """Keep the tables that a function of a run returns.

    Decorates `function(run, ...)`. The table is kept under `name`, the arguments, the run, and the
    code of the module in which the function is defined with all that it imports.
    """

    def decorate(function: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def table(run: Any, *args: Any, **options: Any) -> pd.DataFrame:
            call = signature.bind(run, *args, **options)
            call.apply_defaults()
            _, *names = call.arguments
            arguments = {n: as_json(call.arguments[n]) for n in names}
            decided_by = {"arguments": arguments, "run": run.record}
            return run.cache.table(
                name, function, decided_by, lambda: function(*call.args, **call.kwargs)
            )

        return table

    return decorate


def made_by(function: Callable) -> dict[str, Any]:
    """Describe the code and the libraries that a result is made by."""
    name = f"{function.__module__}:{function.__qualname__}"
    return {"by": name, "code": code_hash(function), "versions": library_versions()}


def as_json(value: Any) -> Any:
    """Turn an argument into a JSON value: sequences become lists, paths their text."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _record_path(path: Path) -> Path:
    """The file beside a table that holds its checksum and what decided it."""
    return path.with_suffix(".json")


def _record_of(path: Path) -> dict[str, Any]:
    """What a record or manifest holds; nothing if it is not there or cannot be read."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _checksum(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def _read_table(path: Path) -> pd.DataFrame | None:
    """A kept table; None if it is not there or does not have its checksum."""
    if not path.is_file():
        return None
    content, record = path.read_bytes(), _record_of(_record_path(path))
    if _checksum(content).items() <= record.items():
        return _table_from(content)
    print(f"{path.name} does not have its checksum: it is made again")
    return None


def _table_from(content: bytes) -> pd.DataFrame:
    """Read a parquet file; its columns of lists hold lists, which pandas would read as arrays."""
    table = pd.read_parquet(io.BytesIO(content))
    columns = pyarrow.parquet.read_table(io.BytesIO(content))
    for field in columns.schema:
        if pyarrow.types.is_list(field.type):
            table[field.name] = columns[field.name].to_pylist()
    return table


def _is_outdated(parts: Mapping[str, Any]) -> bool:
    """Whether other code, or other versions of the libraries, made a result."""
    if parts.get("versions") != library_versions():
        return True
    module, _, name = parts.get("by", "").partition(":")
    if module.split(".")[0] != PACKAGE:
        return True
    try:
        function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return True
    return parts.get("code") != code_hash(function)


def main(arguments: Sequence[str] | None = None) -> int:
    """List or remove outdated results; the command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m dlk_utils.lab.cache", description=main.__doc__)
    parser.add_argument("runs_dir", nargs="?", default="runs", type=Path)
    parser.add_argument("--remove", action="store_true", help="remove them instead of listing them")
    options = parser.parse_args(arguments)
    cache = Cache(options.runs_dir)
    paths = cache.remove_outdated() if options.remove else list(cache.outdated())
    for path in paths:
        print(path.name)
    done = "removed" if options.remove else "outdated (remove them with --remove)"
    print(f"{len(paths)} results in {options.runs_dir}: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
