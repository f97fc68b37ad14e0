"""A finished run: what is damaged is found, said and made again, and it is shown without writing.

The run has a kept table, a store and a probe card, and no model.
"""

import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from tqdm import tqdm

from dlk_utils.errors import StoreError
from dlk_utils.evaluation.detector import TruthDetector
from dlk_utils.extract import store
from dlk_utils.extract.store import fill, is_complete, read
from dlk_utils.lab.cache import Cache, main
from dlk_utils.safe_files import ASIDE

N_FLIPS = 8
"""How many bits are flipped in each file, one by one."""
PLAN = [[["a", "b"]], [["c"]]]
INPUTS = {"run": {"model": "planted", "seed": 0}, "arguments": {"layers": [0, 1]}}


def table() -> pd.DataFrame:
    table = pd.DataFrame({"name": ["a", "b"], "estimate": [0.7, 0.2], "ids": [[1, 2], [3]]})
    table.attrs["skipped"] = ["a sentence that says why a number is missing"]
    return table


def make_store(folder: Path, record: dict) -> None:
    def compute(ids: list[str]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([[float(ord(name))] for name in ids])}

    fill(folder, record, PLAN, compute, examples={"a": "e1", "b": "e2", "c": "e3"})


def make_card(folder: Path, record: dict) -> None:
    fixture = {"input_ids": [[1, 2]], "scores": [0.5]}
    card = {"format": 2, "model": "planted", "revision": "0", "fixture": fixture}
    TruthDetector("resid_post", 1, torch.tensor([1.0, -2.0]), 0.25, 0.5, card).save(folder)


def show(folder: Path) -> tuple:
    """Make what is not kept in a folder, and read everything back."""
    cache = Cache(folder)
    results = cache.table("05-results", table, INPUTS, table)
    answers = cache.filled_folder("02-answers", make_store, INPUTS, is_complete, make_store)
    detector = cache.filled_folder(
        "06-detector", make_card, INPUTS, TruthDetector.is_kept, make_card
    )
    card = json.loads((detector / "card.json").read_bytes())
    return results.to_dict("list"), results.attrs, read(answers, "x").tolist(), card


def files(folder: Path) -> dict[Path, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in paths}


def write_damaged(path: Path, content: bytes, number: int) -> None:
    path.write_bytes(content)
    # A file's time may be no finer than a few milliseconds.
    os.utime(path, (number, number))


@pytest.mark.slow
@pytest.mark.trap(30)
def test_a_flipped_bit_in_any_kept_file_is_found_said_and_made_again(tmp_path, capsys):
    shown = show(tmp_path)
    good = files(tmp_path)
    assert len(good) == 3 + 1 + 5 + 3
    for path, content in good.items():
        for flip in range(N_FLIPS):
            damaged = bytearray(content)
            # From the first byte to the last, and every one of the eight bits.
            damaged[flip * (len(content) - 1) // (N_FLIPS - 1)] ^= 1 << flip % 8
            capsys.readouterr()
            write_damaged(path, damaged, flip + 1)
            assert show(tmp_path) == shown
            said = capsys.readouterr().out
            assert path.stem in said and "again" in said, (path.name, flip)
            assert files(tmp_path) == good, (path.name, flip)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncated, emptied, Path.unlink])
def test_a_truncated_an_empty_and_a_missing_file_are_made_again(tmp_path, harm):
    shown = show(tmp_path)
    good = files(tmp_path)
    for path in good:
        harm(path)
        assert show(tmp_path) == shown
        assert files(tmp_path) == good, path.name


@pytest.mark.parametrize("content", [b"null", b"[1]", b'{"by": 3}', b"\xff{", b"[" * 100_000])
def test_a_broken_record_of_a_table_stops_no_run_that_lists_such_tables(tmp_path, capsys, content):
    shown = show(tmp_path)
    [record] = tmp_path.glob("05-results-*.json")
    good = record.read_bytes()
    record.write_bytes(content)
    assert list(Cache(tmp_path).tables("05-results")) == []
    assert (
        "a damaged one, so it is left out until its run makes it again" in capsys.readouterr().out
    )
    assert show(tmp_path) == shown and record.read_bytes() == good
    assert "a damaged one, so it is made again" in capsys.readouterr().out
    assert len(list(Cache(tmp_path).tables("05-results"))) == 1


def test_a_finished_run_is_shown_without_writing_anything(tmp_path, monkeypatch):
    shown = show(tmp_path)

    def state() -> list[tuple]:
        paths = [tmp_path, *sorted(tmp_path.rglob("*"))]
        return [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in paths]

    before = state()
    assert show(tmp_path) == shown
    assert state() == before


@pytest.fixture
def no_permissions() -> Callable[[Callable], str]:
    """Call a function in a process that must not write to a folder of another user."""

    def call(function: Callable[[], object]) -> str:
        source, target = os.pipe()
        pid = os.fork()
        if not pid:
            # The lock of tqdm's bars may have been held when the process was forked.
            tqdm.set_lock(threading.RLock())
            if os.getuid() == 0:
                os.seteuid(65534)
            try:
                said = repr(function())
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            os.write(target, said.encode())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(target)
        with os.fdopen(source) as file:
            return file.read()

    return call


def test_a_read_only_run_is_shown_and_what_it_lacks_is_refused(no_permissions, capsys):
    # Not tmp_path, which other users must not enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shown = show(folder)
        (folder / ".left.tmp").write_text("by a killed writer")
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        assert no_permissions(lambda: show(folder) == shown) == "True"

        def another() -> pd.DataFrame:
            return Cache(folder).table("08-transfer", table, INPUTS, never)

        def show_anew() -> tuple:
            store._read_manifest.cache_clear()
            store._checksum.cache_clear()
            return show(folder)

        (outdated := folder / "02-model-0.parquet").write_bytes(b"")
        outdated.with_suffix(".json").write_text("{}")
        assert no_permissions(lambda: main([str(folder), "--remove"])) == "1"

        said = no_permissions(another)
        assert said.startswith("StoreError: ") and "can be written to (Permission denied)" in said
        for pattern in ("05-*.parquet", "02-*/manifest.json", "02-*/shard-*", "06-*/card.json"):
            path = next(folder.glob(pattern))
            path.chmod(0)
            said = no_permissions(show_anew)
            assert said.startswith("StoreError: ") and "can be read (Permission denied)" in said
            path.chmod(0o444)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


def never(*_: object) -> pd.DataFrame:
    raise AssertionError("something was computed that cannot be kept")


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "file/runs", "loop", "x" * 300):
        cache = Cache(tmp_path / name)
        with pytest.raises(StoreError):
            cache.table("08-transfer", table, INPUTS, never)
        with pytest.raises(StoreError):
            cache.filled_folder("02-answers", make_store, INPUTS, is_complete, never)


@pytest.mark.trap(30)
def test_a_write_that_was_killed_leaves_nothing_after_the_next_run(tmp_path):
    show(tmp_path)
    for folder in (tmp_path, *(path for path in tmp_path.iterdir() if path.is_dir())):
        (folder / ".table.parquet.0.tmp").write_bytes(b"half")
    show(tmp_path)
    assert list(tmp_path.rglob(ASIDE)) == []


def test_a_damaged_record_removes_no_store(tmp_path, capsys):
    show(tmp_path)
    for path in tmp_path.glob("*.json"):
        truncated(path)
    outdated = {path.name.rsplit("-", 1)[0] for path in Cache(tmp_path).outdated()}
    assert outdated == {"05-results"}
