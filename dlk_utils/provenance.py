"""What decides the content of a computed file: inputs, the code that made it, and libraries.

Files are named by a fingerprint of these three, so that a number which other rules made is never
read back.
"""

import ast
import functools
import hashlib
import inspect
import json
import os
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from dlk_utils.errors import StoreError
from dlk_utils.safe_files import write_file

PACKAGE = "dlk_utils"
PACKAGE_FOLDER = Path(__file__).resolve().parent
LIBRARIES = ("torch", "transformers", "tokenizers", "scikit-learn", "numpy", "scipy")
"""Libraries whose version decides numbers."""
LARGE_FILE = 1 << 24
"""From this many bytes on, the hash of a file is kept: reading it again would take longer."""


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Hash everything that decides a file's content, given as JSON values, to 16 hex digits."""
    text = json.dumps(dict(parts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def library_versions() -> dict[str, str]:
    """Return the installed version of each of `LIBRARIES`, without importing any of them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_hash(function: Callable) -> str:
    """Hash the code that a function may run.

    That is the module in which the function is defined, and every module of this package which
    that one imports, directly or through others. Docstrings, comments and formatting do not count.

    Parameters
    ----------
    function
        A function or class. One that is defined outside this package is hashed by its file, with
        the package modules that this imports; one that has no file, by its own source.

    Returns
    -------
    str
        32 hex digits.
    """
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    path = _path_of(function.__module__) or Path(inspect.getfile(function))
    if path.is_file():
        return _closure_hash(path)
    try:
        return _hash_of_sources([inspect.getsource(function)])
    except OSError:  # typed into an interpreter that keeps no source
        return xxhash.xxh3_128_hexdigest(function.__code__.co_code)


@functools.cache
def _closure_hash(path: Path) -> str:
    """Hash a file with all package modules that it imports, in a fixed order."""
    todo, seen = imported_modules(path), set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += imported_modules(_path_of(name))
    paths = [path, *(_path_of(name) for name in sorted(seen))]
    return _hash_of_sources([path.read_text(encoding="utf-8") for path in paths])


def imported_modules(path: Path) -> list[str]:
    """List the modules of this package that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [n for n in names if n.startswith(f"{PACKAGE}.") and _path_of(n)]
    return list(dict.fromkeys(found))


def _path_of(module: str) -> Path | None:
    """The file of a module of this package; None for any other module."""
    first, *rest = module.split(".")
    if first != PACKAGE:
        return None
    base = PACKAGE_FOLDER.joinpath(*rest)
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if rest and path.is_file():
            return path
    return None


def _hash_of_sources(sources: list[str]) -> str:
    digest = xxhash.xxh3_128()
    for source in sources:
        tree = ast.parse(textwrap.dedent(source))
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                node.body = [n for n in node.body if not _is_docstring(n)] or [ast.Pass()]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()


def _is_docstring(node: ast.stmt) -> bool:
    """Whether a statement is a string that stands alone, which documents what is around it."""
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def cache_dir() -> Path:
    """Return the folder of converted models and kept hashes: ``$DLK_CACHE``, or a default.

    The default is ``~/.cache/dlk_utils``.
    """
    return Path(os.environ.get("DLK_CACHE") or Path.home() / ".cache" / "dlk_utils")


def hash_files(folder: Path, paths: Iterable[Path]) -> str:
    """Hash the content of some files below a folder, and their names in it, to 32 hex digits."""
    digest = xxhash.xxh3_128()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Hash the content of a file to 32 hex digits.

    The hash of a large file is kept in `cache_dir`, for as long as the file has its size and times.
    """
    state = _state_of(path)
    if state["size"] < LARGE_FILE:
        return _hash_content(path)
    kept = cache_dir() / "hashes" / fingerprint(state)
    try:
        digest, check = kept.read_text().split()
        if check == fingerprint(state | {"hash": digest}):
            return digest
    except (OSError, ValueError):
        pass  # None is kept, or it is broken.
    digest = _hash_content(path)
    # A file that is being written may change once more without a change of its times.
    is_at_rest = time.time() - max(state["modified"], state["changed"]) / 1e9 > 2
    if is_at_rest and _state_of(path) == state:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_file(kept, f"{digest} {fingerprint(state | {'hash': digest})}".encode())
        except (OSError, StoreError):
            pass  # It will be computed again.
    return digest


def _state_of(path: Path) -> dict[str, Any]:
    """What changes with the content of a file."""
    status = path.stat()
    return {
        "path": str(path.resolve()),
        "inode": [status.st_dev, status.st_ino],
        "size": status.st_size,
        "modified": status.st_mtime_ns,
        "changed": status.st_ctime_ns,
    }


def _hash_content(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
