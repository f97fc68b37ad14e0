"""The store: what is finished survives anything, and what is damaged is noticed."""

import io
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tqdm import tqdm

from dlk_utils.errors import StoreError
from dlk_utils.extract import store
from dlk_utils.extract.store import (
    MOST_SHARDS,
    as_dataset,
    describe,
    fill,
    is_complete,
    load_features,
    read,
    read_rows,
    row_ids,
    shard_rows_of,
)

# Four shards of two batches of three rows.
PLAN = [[[f"r{s}{b}{i}" for i in range(3)] for b in range(2)] for s in range(4)]
ROWS = [row for shard in PLAN for batch in shard for row in batch]


def values(ids: list[str], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """200 numbers that follow from a row's id."""
    start = [sum(ord(letter) * 7**i for i, letter in enumerate(row)) % 101 for row in ids]
    return {"x": (torch.tensor(start)[:, None] + torch.arange(200)).to(dtype)}


def other_values(ids: list[str]) -> dict[str, torch.Tensor]:
    return {"x": values(ids)["x"] + 1}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def in_another_process(function, *args) -> multiprocessing.Process:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=with_a_lock_of_its_own, args=(function, *args))
    process.start()
    return process


def with_a_lock_of_its_own(function, *args) -> None:
    """Call a function in a process that may be killed.

    Processes share the lock of tqdm's bars. One that is killed while it holds this lock would leave
    the others waiting for ever.
    """
    tqdm.set_lock(threading.RLock())
    function(*args)


def fill_slowly(folder: Path, pause: float) -> None:
    def compute(ids: list[str]) -> dict[str, torch.Tensor]:
        with open(folder.parent / "log", "a") as log:
            log.write("batch\n")
        time.sleep(pause)
        return values(ids)

    fill(folder, {"what": "test"}, PLAN, compute)


def n_batches_computed(folder: Path) -> int:
    log = folder.parent / "log"
    return log.read_text().count("batch") if log.is_file() else 0


# Reading


@pytest.mark.trap(29)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_was_written_is_read_bit_for_bit_in_its_own_dtype(tmp_path, dtype):
    fill(tmp_path, {}, PLAN, lambda ids: values(ids, dtype))
    assert read(tmp_path, "x").dtype == dtype
    assert torch.equal(read(tmp_path, "x"), values(ROWS, dtype)["x"])
    assert row_ids(tmp_path) == ROWS


def test_rows_are_found_by_the_example_they_are_of(tmp_path):
    examples = {row: f"e{i // 2}" for i, row in enumerate(ROWS)}
    name = "activation.resid_post.2.0"
    fill(
        tmp_path,
        {},
        PLAN,
        lambda ids: {name: values(ids, torch.bfloat16)["x"]},
        examples=examples,
    )
    every, rows = load_features(tmp_path, "resid_post", 2)
    assert rows == ROWS and every.dtype == np.float32
    some, some_rows = load_features(tmp_path, "resid_post", 2, examples=["e1", "e0"])
    assert some_rows == ROWS[:4] and (some == every[:4]).all()
    with pytest.raises(StoreError, match=r"expected examples that are stored, got others \(e999\)"):
        load_features(tmp_path, "resid_post", 2, examples=["e999", "e0"])


@pytest.mark.trap(4, 33)
def test_rows_are_read_in_the_order_asked_for_and_strangers_and_repeats_are_refused(tmp_path):
    fill(tmp_path, {}, PLAN, values)
    rows = pd.DataFrame({"row_id": ROWS})
    assert (read_rows(tmp_path, rows[::-1], "x") == read_rows(tmp_path, rows, "x")[::-1]).all()
    stranger = pd.DataFrame({"row_id": [*ROWS, "stranger"]})
    with pytest.raises(StoreError, match="got 1 that are not stored"):
        read_rows(tmp_path, stranger, "x")
    with pytest.raises(StoreError, match="25 different rows of it, got some of them twice"):
        read_rows(tmp_path, pd.concat([rows, rows.tail(1)]), "x")


def test_a_store_is_described_and_given_out_as_a_dataset(tmp_path):
    fill(tmp_path, {}, PLAN, values, examples={row: f"example of {row}" for row in ROWS})
    summary = describe(tmp_path)
    assert summary["rows"] == 24 and summary["shards"] == 4 and summary["width"] == 200
    assert summary["dtype"] == "float32"
    table = as_dataset(tmp_path, ["x"])
    assert list(table["row_id"]) == ROWS
    assert table[5]["example_id"] == f"example of {ROWS[5]}"
    assert (table[5]["x"] == values(ROWS)["x"][5].numpy()).all()


def test_one_tensor_is_read_by_its_own_bytes(tmp_path, monkeypatch):
    fill(tmp_path, {}, PLAN, lambda ids: values(ids) | {"wide": torch.zeros(len(ids), 20_000)})
    n_bytes = []

    class CountedFile(io.FileIO):
        def __init__(self, path: Path, mode: str, buffering: int):
            super().__init__(path, mode)

        def read(self, n: int = -1) -> bytes:
            found = super().read(n)
            n_bytes.append(len(found))
            return found

        def readinto(self, target: memoryview) -> int:
            n_bytes.append(super().readinto(target))
            return n_bytes[-1]

    monkeypatch.setattr(store, "open", CountedFile, raising=False)
    tensor = read(tmp_path, "x")
    size_of_headers = sum(n_bytes) - tensor.nbytes
    assert 0 < size_of_headers < 500 * len(PLAN)


@pytest.mark.trap(32)
def test_a_store_is_no_larger_than_its_values(tmp_path):
    def compute(ids: list[str]) -> dict[str, torch.Tensor]:
        ten_times_as_much = torch.zeros(2, 500_000, dtype=torch.bfloat16)
        return {"x": ten_times_as_much[:, :50_000]}

    fill(tmp_path, {}, [[["a", "b"]]], compute)
    size = (tmp_path / "shard-00000.safetensors").stat().st_size
    assert size == pytest.approx(2 * 50_000 * 2, rel=0.02)


# Interruptions


@pytest.mark.trap(30)
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bits(tmp_path):
    killed = tmp_path / "killed"
    process = in_another_process(fill_slowly, killed, 0.1)
    while not (killed / "shard-00001.json").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not is_complete(killed)
    with pytest.raises(StoreError, match="are missing"):
        read(killed, "x")
    before = n_batches_computed(killed)
    fill_slowly(killed, 0)
    # Two of four shards, of two batches each, were finished.
    assert n_batches_computed(killed) - before <= 4
    fill(tmp_path / "whole", {"what": "test"}, PLAN, values)
    assert content(killed) == content(tmp_path / "whole")


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing_and_repeat_at_most_a_shard(tmp_path):
    rng, n_finished = random.Random(0), []
    fill(tmp_path / "whole", {"what": "test"}, PLAN, values)
    for k in range(20):
        folder = tmp_path / str(k) / "store"
        folder.parent.mkdir()
        process = in_another_process(fill_slowly, folder, 0.02)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.join()
        n_finished.append(len(list(folder.glob("shard-*.json"))))
        fill_slowly(folder, 0)
        assert content(folder) == content(tmp_path / "whole")
        assert n_batches_computed(folder) <= 8 + 2
    # The kills came at different places.
    assert len(set(n_finished)) >= 3


def test_a_run_stopped_by_the_keyboard_goes_on(tmp_path):
    computed = []

    def stopped(ids: list[str]) -> dict[str, torch.Tensor]:
        computed.append(ids)
        if len(computed) == 4:
            raise KeyboardInterrupt
        return values(ids)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, {}, PLAN, stopped)
    assert not is_complete(tmp_path)
    fill(tmp_path, {}, PLAN, stopped)
    assert is_complete(tmp_path) and len(computed) == 4 + 6


def fill_a_full_disk(folder: Path) -> None:
    """Fill a store where a file can have 3,000 bytes; leave with 3 if that is a clear error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        fill(folder, {}, PLAN, values)
    except StoreError as error:
        os._exit(3 if "could not write" in str(error) else 1)


def test_a_full_disk_is_one_clear_error_and_nothing_counts_as_finished(tmp_path):
    process = in_another_process(fill_a_full_disk, tmp_path)
    process.join()
    assert process.exitcode == 3
    assert not is_complete(tmp_path) and not list(tmp_path.glob("shard-*"))
    fill(tmp_path, {}, PLAN, values)
    assert is_complete(tmp_path)


def test_a_file_has_its_name_only_after_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("synced"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("named"), replace(a, b)))
    fill(tmp_path, {}, PLAN, values)
    assert done == ["synced", "named"] * (1 + 2 * len(PLAN))


# Damage


@pytest.mark.trap(30)
@pytest.mark.parametrize("harm", ["truncate", "flip", "brace", "row"])
@pytest.mark.parametrize("name", ["shard-00002.safetensors", "shard-00002.json", "manifest.json"])
def test_a_truncated_file_and_a_flipped_bit_are_found_and_made_again(tmp_path, name, harm, capsys):
    fill(tmp_path, {}, PLAN, values)
    before, file = content(tmp_path), tmp_path / name
    assert is_complete(tmp_path)
    data = bytearray(file.read_bytes())
    place = {"flip": -5, "brace": 0, "row": data.find(b"r0"), "truncate": -1}[harm]
    data[place] ^= 1
    file.write_bytes(data[:-7] if harm == "truncate" else data)
    os.utime(file, (1, 1))
    assert not is_complete(tmp_path)
    if name == "manifest.json":
        with pytest.raises(StoreError, match="got a damaged manifest"):
            read(tmp_path, "x")
    computed = []
    fill(tmp_path, {}, PLAN, lambda ids: computed.append(ids) or values(ids))
    assert computed == ([] if name == "manifest.json" else PLAN[2])
    assert content(tmp_path) == before
    assert name.split(".")[0] in capsys.readouterr().out


def test_a_shard_that_was_repaired_is_read_again(tmp_path, capsys):
    rows = pd.DataFrame({"row_id": ROWS})
    fill(tmp_path, {}, PLAN, values)
    good = read_rows(tmp_path, rows, "x")
    shard = tmp_path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)
    store._recent.clear()
    # Who reads it does not notice; `is_complete` and `fill` do.
    assert not np.array_equal(read_rows(tmp_path, rows, "x"), good)
    fill(tmp_path, {}, PLAN, values)
    assert "does not match its checksum" in capsys.readouterr().out
    assert np.array_equal(read_rows(tmp_path, rows, "x"), good)


def test_a_shard_that_ends_early_is_not_read_as_if_it_were_complete(tmp_path):
    fill(tmp_path, {}, PLAN, values)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(StoreError, match="shard 1, x: expected a complete file, got a shorter one"):
        read(tmp_path, "x")


def test_a_shard_of_another_store_does_not_count(tmp_path):
    fill(tmp_path / "a", {}, PLAN, values)
    fill(tmp_path / "b", {"p": 0.1}, PLAN, other_values)
    for name in ("shard-00001.safetensors", "shard-00001.json"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    assert not is_complete(tmp_path / "a")


def test_what_was_found_good_once_is_not_read_again(tmp_path, monkeypatch):
    fill(tmp_path, {}, PLAN, values)
    assert is_complete(tmp_path)
    monkeypatch.setattr(store, "checksum", lambda content: "read again")
    assert is_complete(tmp_path)


@pytest.mark.trap(28)
def test_a_row_that_is_not_finite_a_row_too_few_and_a_tensor_that_is_not_there_are_refused(
    tmp_path,
):
    infinite = torch.tensor([[1.0], [float("inf")]])
    with pytest.raises(StoreError, match=r"got nan or inf .* in row b; .*Run\(dtype=.float32"):
        fill(tmp_path / "infinite", {}, [[["a", "b"]]], lambda ids: {"x": infinite})
    with pytest.raises(StoreError, match="expected 2 rows, got 1"):
        fill(tmp_path / "short", {}, [[["a", "b"]]], lambda ids: {"x": torch.ones(1, 3)})
    fill(tmp_path / "x", {}, PLAN, values)
    with pytest.raises(StoreError, match="got 'y'"):
        read(tmp_path / "x", "y")


# Other content, other writers


@pytest.mark.trap(31)
@pytest.mark.parametrize("parts", [{"seed": 1}, {"seed": 0, "p": 0.1}, {}])
def test_a_store_with_other_parts_is_refused_and_they_are_named(tmp_path, parts):
    fill(tmp_path, {"seed": 0}, PLAN, values)
    name = "p" if "p" in parts else "seed"
    with pytest.raises(
        StoreError, match=rf"expected fingerprint .* which differs in parts \({name}\)"
    ):
        fill(tmp_path, parts, PLAN, values)


def test_half_a_store_that_was_made_by_another_plan_is_not_gone_on_with(tmp_path):
    fill(tmp_path, {}, PLAN, values, only=[0, 1])
    with pytest.raises(
        StoreError, match=r"expected fingerprint .* which differs in plan; delete the"
    ):
        fill(tmp_path, {}, PLAN[::-1], values)


@pytest.mark.trap(31)
@pytest.mark.parametrize(
    ("name", "planted", "part"),
    [
        ("code_hash", lambda function: "of other code", "code"),
        ("library_versions", lambda: {"torch": "0.1"}, "versions"),
    ],
)
def test_half_a_store_that_other_code_or_another_library_made_is_not_gone_on_with(
    tmp_path, monkeypatch, name, planted, part
):
    fill(tmp_path, {}, PLAN, values, only=[0])
    monkeypatch.setattr(store, name, planted)
    with pytest.raises(StoreError, match=rf"which differs in parts \({part}\); delete the"):
        fill(tmp_path, {}, PLAN, values)


def test_a_finished_store_is_read_without_asking_for_the_code(tmp_path, monkeypatch):
    fill(tmp_path, {}, PLAN, values)
    monkeypatch.delattr(store, "code_hash")
    monkeypatch.delattr(store, "library_versions")
    assert is_complete(tmp_path) and len(read(tmp_path, "x")) == 24


def test_a_second_writer_is_refused(tmp_path):
    def while_it_writes(ids: list[str]) -> dict[str, torch.Tensor]:
        with pytest.raises(StoreError, match="another process"):
            fill(tmp_path, {}, PLAN, values)
        return values(ids)

    fill(tmp_path, {}, PLAN, while_it_writes)


def test_workers_write_the_manifest_once(tmp_path, monkeypatch):
    named, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (named.append(b.name), replace(a, b)))
    for i in range(len(PLAN)):
        fill(tmp_path, {}, PLAN, values, only=[i])
    assert named.count("manifest.json") == 1 and is_complete(tmp_path)


# Large stores


def test_what_is_kept_in_memory_has_a_bound_in_bytes(tmp_path):
    fill(tmp_path, {}, PLAN, lambda ids: {f"x{k}": values(ids)["x"] + k for k in range(5)})
    n_bytes = 24 * 200 * 4
    recent = store.RecentTensors(room=2 * n_bytes)
    for k in (0, 1, 0, 2):
        assert torch.equal(recent.read(tmp_path, f"x{k}"), values(ROWS)["x"] + k)
        assert recent.nbytes <= 2 * n_bytes
    # The one that was asked for longest ago has gone.
    assert [name for _, name, _ in recent._tensors] == ["x0", "x2"]
    tiny_room = store.RecentTensors(room=n_bytes - 1)
    assert torch.equal(tiny_room.read(tmp_path, "x1"), values(ROWS)["x"] + 1)
    assert tiny_room.nbytes == 0


def test_reading_again_looks_at_no_more_files_for_a_store_of_more_shards(tmp_path, monkeypatch):
    n_calls = []
    stat, listdir = os.stat, os.listdir

    def counted(function):
        def call(*args, **options):
            n_calls[-1] += 1
            return function(*args, **options)

        return call

    for n in (4, 40):
        plan = [[[f"r{i}"]] for i in range(n)]
        folder = tmp_path / str(n)
        fill(folder, {}, plan, values)
        rows = pd.DataFrame({"row_id": [f"r{i}" for i in range(n)]})
        read_rows(folder, rows, "x")
        n_calls.append(0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", counted(stat))
            patch.setattr(os, "listdir", counted(listdir))
            read_rows(folder, rows, "x")
    assert n_calls[0] == n_calls[1] <= 10


def test_a_large_store_has_no_more_files_than_a_folder_can_well_hold():
    assert [shard_rows_of(n) for n in (1, 1000, 64 * MOST_SHARDS)] == [64, 64, 64]
    for n in (64 * MOST_SHARDS + 1, 1_000_000, 20_000_000):
        assert -(-n // shard_rows_of(n)) <= MOST_SHARDS


# Damage that a reader meets


@pytest.mark.parametrize("i", [0, 1])
def test_a_shard_that_is_missing_or_damaged_is_one_clear_error(tmp_path, i):
    fill(tmp_path, {}, PLAN, values)
    shard = tmp_path / f"shard-{i:05d}.safetensors"
    data = bytearray(shard.read_bytes())
    for content in (b"", data[:4], data[:30], b"\xff" * 8 + data[8:], data[:9] + b"!" + data[10:]):
        shard.write_bytes(content)
        with pytest.raises(StoreError, match=f"shard {i}"):
            read(tmp_path, "x")
    shard.unlink()
    with pytest.raises(StoreError, match=f"shard {i} is missing"):
        read(tmp_path, "x")
