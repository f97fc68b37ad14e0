import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from dlk_utils.errors import StoreError
from dlk_utils.extract import store
from dlk_utils.extract.store import fill, is_complete, load_features, read, row_ids
from dlk_utils.provenance import fingerprint, write_file

PLAN = [[[f"r{s}{b}{i}" for i in range(3)] for b in range(2)] for s in range(4)]
ROWS = [r for shard in PLAN for batch in shard for r in batch]

SCRIPT = """
import resource, signal, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
from test_store import PLAN, values
from dlk_utils.extract.store import fill
if sys.argv[2] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
def compute(ids):
    print("batch", flush=True)
    time.sleep(0.15 if sys.argv[2] == "slow" else 0)
    return values(ids)
fill(Path(sys.argv[1]), {"what": "test"}, PLAN, compute)
"""


def values(ids, dtype=torch.float32, d=200):
    return {"x": torch.tensor([[hash_of(r) + k for k in range(d)] for r in ids], dtype=dtype)}


def hash_of(row: str) -> int:
    return sum(ord(c) * 7**i for i, c in enumerate(row)) % 101


def child(folder, mode):
    command = [sys.executable, "-c", SCRIPT, str(folder), mode, os.path.dirname(__file__)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1"},
    )


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.mark.trap(29)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_was_written_is_read_bit_for_bit_in_its_own_dtype(tmp_path, dtype):
    fill(tmp_path, {"what": "test"}, PLAN, lambda ids: values(ids, dtype))
    assert read(tmp_path, "x").dtype == dtype
    assert torch.equal(read(tmp_path, "x"), values(ROWS, dtype)["x"]) and row_ids(tmp_path) == ROWS


def test_rows_are_found_by_the_example_they_are_of(tmp_path):
    fill(
        tmp_path,
        {},
        PLAN,
        lambda ids: {"activation.resid_post.2.0": values(ids, torch.bfloat16)["x"]},
        examples={r: f"e{i // 2}" for i, r in enumerate(ROWS)},
    )
    whole, rows = load_features(tmp_path, "resid_post", 2)
    some, named = load_features(tmp_path, "resid_post", 2, examples=["e1", "e0"])
    assert (
        rows == ROWS
        and named == [r for i, r in enumerate(ROWS) if i // 2 in (0, 1)]
        and (some == whole[[ROWS.index(r) for r in named]]).all()
    )
    with pytest.raises(StoreError, match="expected examples that are stored, got e999"):
        load_features(tmp_path, "resid_post", 2, examples=["e999", "e0"])


@pytest.mark.trap(32)
def test_a_store_is_no_larger_than_its_values(tmp_path):
    fill(
        tmp_path,
        {},
        [[["a", "b"]]],
        lambda ids: {"x": torch.zeros(2, 500_000, dtype=torch.bfloat16)[:, :50_000]},
    )  # a view of ten times as much
    assert (tmp_path / "shard-00000.safetensors").stat().st_size == pytest.approx(
        2 * 50_000 * 2, rel=0.02
    )


@pytest.mark.trap(30)
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bits(tmp_path):
    process = child(tmp_path / "killed", "slow")
    while not (tmp_path / "killed" / "shard-00001.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_complete(tmp_path / "killed")
    with pytest.raises(StoreError, match="unfinished"):
        read(tmp_path / "killed", "x")
    again = child(tmp_path / "killed", "fast")
    assert (
        again.communicate()[0].count("batch") <= 2 * 2
    )  # two of four shards, of two batches, were finished
    fill(tmp_path / "whole", {"what": "test"}, PLAN, values)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_twenty_kills_at_random_moments_lose_nothing_and_repeat_at_most_a_shard(tmp_path):
    log, context, rng = tmp_path / "log", multiprocessing.get_context("fork"), random.Random(0)

    def run(folder, pause):
        def compute(ids):
            with open(log, "a") as f:
                f.write("batch\n")
            time.sleep(pause)
            return values(ids)

        fill(folder, {"what": "test"}, PLAN, compute)

    fill(tmp_path / "whole", {"what": "test"}, PLAN, values)
    stopped = []
    for k in range(20):
        folder, _ = tmp_path / str(k), log.write_text("")
        process = context.Process(target=run, args=(folder, 0.02))
        process.start()
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.join()
        stopped.append(sum((folder / f"shard-{i:05d}.json").exists() for i in range(len(PLAN))))
        run(folder, 0)
        assert content(folder) == content(tmp_path / "whole")
        assert log.read_text().count("batch") <= sum(map(len, PLAN)) + len(PLAN[0])
    assert len(set(stopped)) >= 3  # the kills came at different places


def test_a_full_disk_is_one_clear_error_and_nothing_counts_as_finished(tmp_path):
    process = child(tmp_path / "s", "full")
    error = process.communicate()[1]
    assert process.returncode != 0 and "StoreError" in error.strip().splitlines()[-1]
    assert not is_complete(tmp_path / "s") and not list((tmp_path / "s").glob("shard-*"))
    fill(tmp_path / "s", {"what": "test"}, PLAN, values)
    assert is_complete(tmp_path / "s")


@pytest.mark.trap(30)
@pytest.mark.parametrize("harm", ["truncate", "flip", "brace", "row"])
@pytest.mark.parametrize("name", ["shard-00002.safetensors", "shard-00002.json", "manifest.json"])
def test_a_truncated_file_and_a_flipped_bit_are_found_and_made_again(tmp_path, name, harm, capsys):
    fill(tmp_path, {}, PLAN, values)
    before, file = content(tmp_path), tmp_path / name
    assert is_complete(tmp_path)
    data = bytearray(file.read_bytes())
    data[{"flip": -5, "brace": 0, "row": data.find(b"r0"), "truncate": -1}[harm]] ^= 1
    file.write_bytes(data[:-7] if harm == "truncate" else data)
    os.utime(file, (1, 1))
    assert not is_complete(tmp_path)
    if name == "manifest.json":
        with pytest.raises(StoreError, match="manifest is damaged"):
            read(tmp_path, "x")
    done = []
    fill(tmp_path, {}, PLAN, lambda ids: done.append(ids) or values(ids))
    assert done == ([] if name == "manifest.json" else PLAN[2]) and content(tmp_path) == before
    assert name.split(".")[0] in capsys.readouterr().out


def test_half_a_store_that_was_made_by_another_plan_is_not_gone_on_with(tmp_path):
    def stopped(ids):
        if ids == PLAN[2][0]:
            raise KeyboardInterrupt
        return values(ids)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, {}, PLAN, stopped)
    with pytest.raises(StoreError, match=r"expected fingerprint .* with other plan; delete it"):
        fill(tmp_path, {}, PLAN[::-1], values)


def test_a_shard_of_another_store_does_not_count(tmp_path):
    fill(tmp_path / "a", {}, PLAN, values)
    fill(tmp_path / "b", {"p": 0.1}, PLAN, lambda ids: {"x": values(ids)["x"] + 1})
    for name in ("shard-00001.safetensors", "shard-00001.json"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    assert not is_complete(tmp_path / "a")


def test_workers_write_the_manifest_once_and_no_two_files_aside_have_one_name(
    tmp_path, monkeypatch
):
    aside, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (aside.append(a.name), replace(a, b)))
    for i in range(len(PLAN)):
        fill(tmp_path, {}, PLAN, values, only=[i])
    assert sum("manifest" in name for name in aside) == 1 and is_complete(tmp_path)
    for _ in range(2):
        write_file(tmp_path / "same", b"")
    assert aside[-1] != aside[-2]


def test_what_was_found_good_once_is_not_read_again(tmp_path, monkeypatch):
    fill(tmp_path, {}, PLAN, values)
    assert is_complete(tmp_path)
    monkeypatch.setattr(store.xxhash, "xxh3_128_hexdigest", lambda content: "read again")
    assert is_complete(tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store.fcntl, "flock", no_locks)
    with pytest.raises(StoreError, match=r"could not be locked \(No locks available\)"):
        fill(tmp_path, {}, PLAN, values)


def test_a_run_stopped_by_the_keyboard_goes_on(tmp_path):
    seen = []

    def stopped(ids):
        seen.append(ids)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return values(ids)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, {}, PLAN, stopped)
    assert not is_complete(tmp_path)
    fill(tmp_path, {}, PLAN, lambda ids: seen.append(ids) or values(ids))
    assert is_complete(tmp_path) and len(seen) == 4 + 6


def test_a_second_writer_is_refused(tmp_path):
    def while_it_writes(ids):
        with pytest.raises(StoreError, match="another process"):
            fill(tmp_path, {}, PLAN, values)
        return values(ids)

    fill(tmp_path, {}, PLAN, while_it_writes)


@pytest.mark.trap(28)
def test_other_content_in_the_folder_and_a_row_that_is_not_finite_are_refused(tmp_path):
    fill(tmp_path, {"seed": 0}, PLAN, values)
    with pytest.raises(StoreError, match="expected fingerprint"):
        fill(tmp_path, {"seed": 1}, PLAN, values)
    with pytest.raises(StoreError, match=r"row b is not finite .*Run\(dtype=.float32"):
        fill(
            tmp_path / "inf",
            {},
            [[["a", "b"]]],
            lambda ids: {"x": torch.tensor([[1.0], [float("inf")]])},
        )
    with pytest.raises(StoreError, match="expected 2 rows, got 1"):
        fill(tmp_path / "short", {}, [[["a", "b"]]], lambda ids: {"x": torch.ones(1, 3)})
    with pytest.raises(StoreError, match="no tensor 'y'"):
        read(tmp_path, "y")


@pytest.mark.trap(31)
def test_a_fingerprint_changes_with_any_part_and_with_the_format(monkeypatch):
    parts = {"model": "a", "seed": 0, "sites": ["x"]}
    others = [
        parts | {"model": "b"},
        parts | {"seed": 1},
        parts | {"sites": ["x", "y"]},
        parts | {"p": 0.1},
    ]
    assert len({fingerprint(p) for p in [parts, *others]}) == 5
    before = fingerprint(parts)
    assert before == fingerprint(dict(reversed(parts.items())))
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    assert fingerprint(parts) != before


def test_a_shard_that_ends_early_is_not_read_as_if_it_were_whole(tmp_path):
    fill(tmp_path, {}, [[["a"]], [["b"]]], lambda ids: {"x": torch.ones(1, 8)})
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(StoreError, match="shard 1, x: the file ends early"):
        read(tmp_path, "x")


def test_a_file_has_its_name_only_after_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    done, real = [], (os.fsync, os.replace)
    monkeypatch.setattr(os, "fsync", lambda f: done.append("fsync") or real[0](f))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("name") or real[1](a, b))
    fill(tmp_path, {}, PLAN, values)
    assert done == ["fsync", "name"] * (1 + 2 * len(PLAN))


def test_one_tensor_is_read_by_its_own_bytes(tmp_path, monkeypatch):
    fill(tmp_path, {}, PLAN, lambda ids: values(ids) | {"wide": torch.zeros(len(ids), 20_000)})
    read_bytes, real = [], open

    class Counted:
        def __init__(self, *args, **options):
            self.file = real(*args, **options)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def seek(self, at):
            return self.file.seek(at)

        def read(self, n=-1):
            found = self.file.read(n)
            read_bytes.append(len(found))
            return found

        def readinto(self, place):
            read_bytes.append(self.file.readinto(place))
            return read_bytes[-1]

    monkeypatch.setattr(store, "open", Counted, raising=False)
    found = read(tmp_path, "x")
    assert (
        found.nbytes
        < sum(read_bytes)
        < found.nbytes + 500 * len(PLAN)
        < sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) / 20
    )
