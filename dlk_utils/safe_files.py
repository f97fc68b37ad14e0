"""Read and write files safely: complete or absent, with a checksum, by one writer at a time.

Everything that this package saves and reads back goes through here.

* `write_file` writes to a temporary file and renames it, so that a crash leaves no part of a file.
* `checksum` finds damage later. It is kept in a record next to the file, or in the seal of a
  folder: a file `SEAL` with the checksums of all others (`write_sealed`, `seal`). `read_sealed`
  reads files only if they agree with the seal.
* `lock` keeps two processes from writing to a folder at the same time.
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
"""The file in a folder that its writer locks."""

ASIDE = ".*.tmp"
"""Pattern of the temporary files of `write_file`. A process that is killed may leave one behind."""

WAIT = 60.0
"""How many seconds to wait for another process that writes small files to the same folder."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is either complete or absent, even if the process is killed.

    The content goes to a temporary file, which is synced to disk and then renamed.

    Raises
    ------
    StoreError
        If it cannot be written, for instance because the disk is full. The temporary file is
        removed, and an earlier file of this name stays as it was.
    """
    # Its name is random because workers on several machines may write the same file.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        free = _free_space(path)
        raise StoreError(
            f"{path}: could not write {len(content):,} bytes ({error.strerror}{free}); what "
            "was finished before is kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _free_space(path: Path) -> str:
    """Say how much space is left on the disk of a file; nothing if that cannot be found out."""
    try:
        return f"; {shutil.disk_usage(path.parent).free:,} bytes free"
    except OSError:
        return ""


def read_file(path: Path) -> bytes | None:
    """Read a file; return None if it does not exist.

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
            f"{path}: expected a file that can be read ({error.strerror}); change its "
            "permissions, or choose another folder"
        ) from error


def checksum(content: bytes) -> dict[str, Any]:
    """Return the size and the hash of a file's content, as JSON values."""
    return {"xxh3_128": xxhash.xxh3_128_hexdigest(content), "bytes": len(content)}


def make_folder(folder: Path) -> None:
    """Make a folder if there is none, and make sure that files can be written to it.

    Raises
    ------
    StoreError
        If it cannot be made, is not a folder, or is read-only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Try it with a file that is gone as soon as it is closed.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(
            f"{folder}: expected a folder that can be written to ({error.strerror}); choose "
            "another runs_dir"
        ) from error


# Folders with a seal.


def write_sealed(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files to a folder, and seal it. `files` has the content of each by its name."""
    make_folder(folder)
    with lock(folder, seconds=WAIT):
        for name, content in files.items():
            write_file(folder / name, content)
        _write_seal(folder, {name: checksum(content) for name, content in files.items()})


def seal(folder: Path) -> None:
    """Seal a folder: write the checksums of all files that are in it now."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.name not in (SEAL, LOCK)]
    _write_seal(folder, {path.name: checksum(path.read_bytes()) for path in sorted(paths)})


def _write_seal(folder: Path, checksums: Mapping[str, Mapping]) -> None:
    """Write the seal of a folder, given the checksum of each file by its name."""
    write_file(folder / SEAL, json.dumps(checksums, indent=1).encode())


def read_sealed(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Read files of a sealed folder, and return the content of each by its name.

    Raises
    ------
    StoreError
        If one of the files, or the seal, is missing, damaged or changed, or cannot be read.
    """
    files = _read_with_seal(folder, names)
    damage = _damage(files)
    if damage:
        raise StoreError(f"{folder.name}: {damage}")
    return {name: files[name] for name in names}


def is_sealed(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder is sealed and has these files, undamaged.

    If it is not, but has one of them, this prints what is wrong. The caller then makes them again.

    Raises
    ------
    StoreError
        If a file cannot be read.
    """
    files = _read_with_seal(folder, names)
    damage = _damage(files)
    has_some = any(content is not None for content in files.values())
    if damage and has_some:
        print(f"{folder.name}: {damage}, so it is made again")
    return not damage


def _read_with_seal(folder: Path, names: Sequence[str]) -> dict[str, bytes | None]:
    """Return the content of some files and of the seal by name; None for those that are absent."""
    return {name: read_file(folder / name) for name in (*names, SEAL)}


def _damage(files: Mapping[str, bytes | None]) -> str | None:
    """Say what is wrong with files read by `_read_with_seal`; None if nothing is."""
    missing = [name for name, content in files.items() if content is None]
    if missing:
        return f"there is no {missing[0]}"
    try:
        checksums = json.loads(files[SEAL])
    except ValueError:
        return f"{SEAL} is damaged"
    if not isinstance(checksums, dict):
        # The seal has been changed to some other JSON, so no file has its checksum in it.
        checksums = {}
    for name, content in files.items():
        if name != SEAL and checksums.get(name) != checksum(content):
            return f"{name} does not match its checksum in {SEAL}"
    return None


# Writers.


@contextlib.contextmanager
def lock(folder: Path, *, seconds: float = 0.0) -> Iterator[None]:
    """Keep other processes from writing to a folder, as long as the context lasts.

    On entry it removes the temporary files that killed processes have left in the folder.

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
    # If this process dies, the operating system releases the lock.
    file_lock = FileLock(path, timeout=seconds)
    try:
        file_lock.acquire()
    except Timeout:
        raise StoreError(
            f"{folder}: another process is writing here; wait for it, or choose another runs_dir"
        ) from None
    except OSError as error:
        if path.is_symlink():
            # The lock refuses a link, so that nothing is written to what it points to.
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
    """Remove temporary files that killed processes have left in a folder.

    It does nothing while another process holds the folder's `lock`, whose temporary files are in
    use, or if the folder is read-only.
    """
    # The files do no harm, so whatever keeps them from being removed is ignored.
    with contextlib.suppress(StoreError, OSError):
        has_unfinished = next(folder.glob(ASIDE), None) is not None
        if has_unfinished:
            # Entering the lock removes them. Without any, a reader takes no lock.
            with lock(folder):
                pass


def _remove_unfinished(folder: Path) -> None:
    """Remove the temporary files in a folder, which no process uses if this one has its lock."""
    for unfinished in folder.glob(ASIDE):
        # A file of another user, who alone may remove it, does no harm.
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
