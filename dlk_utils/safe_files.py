"""Files that are kept: complete or absent, with a checksum, and with one writer at a time.

Everything that this package reads back goes through here. A file is written aside and renamed
(`write_file`); beside it, or in the record that belongs to it, lies its `checksum`. A folder of
several files is sealed with the checksums of all of them (`write_sealed`, `seal`), and is read only
as long as they agree (`read_sealed`).
"""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout

from dlk_utils.errors import StoreError

SEAL = "checksums.json"
"""The file of a sealed folder that holds the checksum of every other file."""
LOCK = ".lock"
ASIDE = ".*.tmp"
"""Names of files that are being written, or were when their process was killed."""
WAIT = 60.0
"""How many seconds to wait for another process that writes small files to the same folder."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is either complete or absent: aside, synced to disk, then renamed.

    Raises
    ------
    StoreError
        If it cannot be written, for instance because the disk is full. Nothing half-written stays.
    """
    # A random name, for workers on several machines may write the same file.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise StoreError(
            f"{path}: could not write {len(content):,} bytes ({error.strerror}{_free(path)}); what "
            "was finished before is kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _free(path: Path) -> str:
    try:
        return f"; {shutil.disk_usage(path.parent).free:,} bytes free"
    except OSError:
        return ""


def read_file(path: Path) -> bytes | None:
    """Read a file; None if there is none of this name.

    Raises
    ------
    StoreError
        If it cannot be read, for instance because it belongs to another user.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(
            f"{path}: expected a file that can be read ({error.strerror}); give yourself the "
            "right to read it, or choose another folder"
        ) from error


def checksum(content: bytes) -> dict[str, Any]:
    """Return the size and the hash of a file's content, as JSON values."""
    return {"xxh3_128": xxhash.xxh3_128_hexdigest(content), "bytes": len(content)}


def make_folder(folder: Path) -> None:
    """Make a folder to write to, or find out that this one can be written to.

    Raises
    ------
    StoreError
        If it cannot be made, is no folder, or is read-only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file without a name, or one that goes when it is closed.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(
            f"{folder}: expected a folder that can be written to ({error.strerror}); choose "
            "another runs_dir"
        ) from error


# Folders with a seal.


def write_sealed(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, by name, to a folder, and seal it."""
    make_folder(folder)
    with lock(folder, seconds=WAIT):
        for name, content in files.items():
            write_file(folder / name, content)
        _write_seal(folder, {name: checksum(content) for name, content in files.items()})


def seal(folder: Path) -> None:
    """Seal a folder whose files are complete: write down the checksum of each file in it."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.name not in (SEAL, LOCK)]
    _write_seal(folder, {path.name: checksum(path.read_bytes()) for path in sorted(paths)})


def _write_seal(folder: Path, checksums: Mapping[str, Mapping]) -> None:
    write_file(folder / SEAL, json.dumps(checksums, indent=1).encode())


def read_sealed(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Read files of a sealed folder, by name.

    Raises
    ------
    StoreError
        If one of the files, or the seal, is missing, damaged or changed, or cannot be read.
    """
    files = {name: read_file(folder / name) for name in (*names, SEAL)}
    wrong = _damage(files)
    if wrong:
        raise StoreError(f"{folder.name}: {wrong}")
    return {name: files[name] for name in names}


def is_sealed(folder: Path, names: Sequence[str]) -> bool:
    """Whether a sealed folder has these files, undamaged.

    If it has one of them, but is damaged or unfinished, it is printed what is wrong. Raises
    `StoreError` if a file cannot be read.
    """
    files = {name: read_file(folder / name) for name in (*names, SEAL)}
    wrong = _damage(files)
    if wrong and any(content is not None for content in files.values()):
        print(f"{folder.name}: {wrong}: it is made again")
    return not wrong


def _damage(files: Mapping[str, bytes | None]) -> str | None:
    """Say what is wrong with the files of a sealed folder, the seal among them; None if nothing."""
    missing = [name for name, content in files.items() if content is None]
    if missing:
        return f"there is no {missing[0]}"
    try:
        checksums = json.loads(files[SEAL])
    except ValueError:
        return f"{SEAL} is damaged"
    for name, content in files.items():
        is_good = isinstance(checksums, dict) and checksums.get(name) == checksum(content)
        if name != SEAL and not is_good:
            return f"{name} does not have its checksum in {SEAL}"
    return None


# Writers.


@contextlib.contextmanager
def lock(folder: Path, *, seconds: float = 0.0) -> Iterator[None]:
    """Let one process at a time write to a folder, and remove what a killed one has left there.

    Parameters
    ----------
    seconds
        How long to wait for another process.

    Raises
    ------
    StoreError
        If another process is writing there, or the file system has no locks.
    """
    path = folder / LOCK
    # The system frees the lock when the process dies.
    file_lock = FileLock(path, timeout=seconds)
    try:
        file_lock.acquire()
    except Timeout:
        raise StoreError(
            f"{folder}: another process is writing here; wait for it, or choose another runs_dir"
        ) from None
    except OSError as error:
        if path.is_symlink():
            # Whatever it points to is left alone.
            raise StoreError(f"{path}: expected a file, got a link; remove it") from None
        raise StoreError(
            f"{folder}: could not be locked ({error.strerror}); choose a runs_dir that can be "
            "written to, on a file system that has locks"
        ) from error
    try:
        _remove_unfinished(folder)
        yield
    finally:
        file_lock.release()


def clean(folder: Path) -> None:
    """Remove what killed writers have left in a folder, unless one is at work or it is read-only.

    A file in it is written under the folder's `lock`.
    """
    # Nobody waits for this, and a folder that is only read need not take a lock.
    with contextlib.suppress(StoreError, OSError):
        if next(folder.glob(ASIDE), None):
            with lock(folder):
                pass


def _remove_unfinished(folder: Path) -> None:
    for unfinished in folder.glob(ASIDE):
        # One of another user stays, and disturbs nobody.
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
