"""Kept files: complete or absent, undamaged or refused, and written by one process at a time."""

import errno
import os
from pathlib import Path

import filelock
import pytest

from dlk_utils.errors import StoreError
from dlk_utils.safe_files import (
    SEAL,
    clean,
    is_sealed,
    lock,
    make_folder,
    read_sealed,
    seal,
    write_file,
    write_sealed,
)

FILES = {"a.json": b'{"a": 1}', "b.bin": bytes(range(50))}


def link_to_itself(folder: Path) -> Path:
    path = folder / "loop"
    path.symlink_to(path)
    return path


def file_instead(folder: Path) -> Path:
    path = folder / "file"
    path.write_text("content")
    return path


CANNOT_BE_FOLDERS = {
    "a loop of links": link_to_itself,
    "a file": file_instead,
    "in a file": lambda folder: file_instead(folder) / "runs",
    "a name that is too long": lambda folder: folder / ("x" * 300),
}


@pytest.mark.parametrize("kind", CANNOT_BE_FOLDERS)
def test_what_cannot_be_a_folder_is_one_clear_error(tmp_path, kind):
    folder = CANNOT_BE_FOLDERS[kind](tmp_path)
    with pytest.raises(StoreError, match=r"expected a folder that can be written to .*; choose"):
        make_folder(folder)
    with pytest.raises(StoreError, match="could not write 4 bytes"):
        write_file(folder / "name", b"text")
    clean(folder)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    with pytest.raises(StoreError, match=r"could not write 4 bytes"):
        write_file(folder, b"text")
    assert list(tmp_path.iterdir()) == [folder]


def test_no_two_files_that_are_being_written_have_one_name(tmp_path, monkeypatch):
    aside, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (aside.append(a.name), replace(a, b)))
    for _ in range(2):
        write_file(tmp_path / "same", b"")
    assert aside[0] != aside[1]


def test_a_file_that_is_a_link_is_replaced_and_not_followed(tmp_path):
    precious = file_instead(tmp_path)
    (tmp_path / "kept").symlink_to(precious)
    write_file(tmp_path / "kept", b"new")
    assert precious.read_text() == "content" and (tmp_path / "kept").read_bytes() == b"new"


# Seals


def test_a_sealed_folder_is_read_as_it_was_written(tmp_path):
    write_sealed(tmp_path / "folder", FILES)
    assert read_sealed(tmp_path / "folder", list(FILES)) == FILES
    assert is_sealed(tmp_path / "folder", list(FILES))


def test_a_flipped_bit_in_any_byte_of_a_sealed_folder_is_found(tmp_path):
    write_sealed(tmp_path, FILES)
    for path in [tmp_path / name for name in (*FILES, SEAL)]:
        good = path.read_bytes()
        for place in range(len(good)):
            content = bytearray(good)
            content[place] ^= 1 << place % 8
            path.write_bytes(content)
            with pytest.raises(StoreError, match=r"checksums\.json|checksum"):
                read_sealed(tmp_path, list(FILES))
        path.write_bytes(good)
    assert read_sealed(tmp_path, list(FILES)) == FILES


def test_a_file_that_is_missing_or_not_sealed_is_named(tmp_path, capsys):
    write_sealed(tmp_path, FILES)
    (tmp_path / "more").write_text("not sealed")
    with pytest.raises(StoreError, match="more does not match its checksum"):
        read_sealed(tmp_path, ["more"])
    (tmp_path / "b.bin").unlink()
    assert not is_sealed(tmp_path, list(FILES))
    assert "there is no b.bin" in capsys.readouterr().out
    seal(tmp_path)
    assert is_sealed(tmp_path, ["a.json", "more"])


def test_of_an_empty_folder_nothing_is_said(tmp_path, capsys):
    assert not is_sealed(tmp_path, ["a.json"])
    assert capsys.readouterr().out == ""


# Locks


def take_lock(folder: Path) -> None:
    with lock(folder):
        pass


def test_a_second_writer_is_refused(tmp_path):
    with lock(tmp_path), pytest.raises(StoreError, match="another process is writing here"):
        take_lock(tmp_path)
    take_lock(tmp_path)


def test_a_lock_that_is_a_link_is_refused_and_empties_no_file(tmp_path):
    precious = file_instead(tmp_path)
    (tmp_path / ".lock").symlink_to(precious)
    with pytest.raises(StoreError, match=r"\.lock: expected a file, got a link; remove it"):
        take_lock(tmp_path)
    assert precious.read_text() == "content"


def test_a_lock_that_is_another_name_of_a_file_empties_no_file(tmp_path):
    precious = file_instead(tmp_path)
    os.link(precious, tmp_path / ".lock")
    take_lock(tmp_path)
    assert precious.read_text() == "content"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", no_locks)
    with pytest.raises(StoreError, match=r"could not be locked \(No locks available\)"):
        take_lock(tmp_path)


def test_what_a_killed_writer_has_left_is_removed_but_not_under_a_writer(tmp_path):
    left = tmp_path / f".table.parquet.{'0' * 32}.tmp"
    left.write_bytes(b"half")
    with lock(tmp_path):
        assert not left.exists()
        left.write_bytes(b"being written")
        clean(tmp_path)
        assert left.exists()
    clean(tmp_path)
    assert not left.exists()


def test_clean_takes_no_lock_where_nothing_was_left(tmp_path):
    clean(tmp_path)
    clean(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
