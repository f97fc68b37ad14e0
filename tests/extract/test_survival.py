"""A stage that is killed on the way, by papermill on the real notebook and model."""

import json
import os
import shutil
import signal
import subprocess
import time

import psutil
from jupyter_client.manager import start_new_kernel

from notebooks import NOTEBOOKS, papermill, run


def test_a_kill_during_03_and_a_second_run_give_the_features_of_an_undisturbed_run(tmp_path):
    options = {"datasets": "cities", "n_examples": 64, "audit_rows": 2}  # two shards of draws
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        papermill("03_extract", tmp_path / "a.ipynb", runs_dir=killed, **options),
        cwd=NOTEBOOKS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(killed.glob("03-draws-*/shard-*.safetensors")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    for one in [
        *psutil.Process(process.pid).children(recursive=True),
        process,
    ]:  # the kernel is a child with a session of its own
        os.kill(one.pid, signal.SIGKILL)
    process.wait()
    [draws] = killed.glob("03-draws-*")
    planned = len(json.loads((draws / "manifest.json").read_text())["plan"])
    assert len(list(draws.glob("shard-*.json"))) < planned
    shutil.copytree(killed, whole, ignore=shutil.ignore_patterns("03-draws-*"))
    for folder in (killed, whole):
        done = run(papermill("03_extract", tmp_path / "b.ipynb", runs_dir=folder, **options))
        assert done.returncode == 0, done.stderr[-2000:]
    files = sorted(p.name for p in draws.glob("shard-*"))
    assert len(files) == 2 * planned
    assert all((draws / f).read_bytes() == (whole / draws.name / f).read_bytes() for f in files)


SLOW = """
import time
from pathlib import Path
import torch
from dlk_utils.extract.store import fill
plan = [[[f"r{i}"]] for i in range(12)]
def compute(ids):
    time.sleep(0.2)
    return {"x": torch.full((1, 3), float(ids[0][1:]))}
"""


def test_an_interrupt_inside_a_notebook_loses_nothing_and_the_same_cell_goes_on(tmp_path):
    manager, client = start_new_kernel()
    done = lambda folder: [
        p.with_suffix(".safetensors") for p in (tmp_path / folder).glob("shard-*.json")
    ]  # a shard without it does not count yet, and is made again
    shards = lambda folder: {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in done(folder)}
    run_cell = lambda code: client.execute_interactive(
        code, timeout=60, output_hook=lambda message: None
    )["content"]
    try:
        assert run_cell(SLOW)["status"] == "ok"
        client.execute(
            f"fill(Path({str(tmp_path / 'a')!r}), {{}}, plan, compute)", stop_on_error=False
        )  # else the kernel drops what comes right after the interrupt
        while len(shards("a")) < 3:
            time.sleep(0.05)
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=60))["msg_type"] != "execute_reply":
            pass
        before = shards("a")
        assert reply["content"]["ename"] == "KeyboardInterrupt" and 3 <= len(before) < 12
        for folder in "ab":
            assert (
                run_cell(f"fill(Path({str(tmp_path / folder)!r}), {{}}, plan, compute)")["status"]
                == "ok"
            )
        after = shards("a")
        assert len(after) == 12 and {k: v for k, v in after.items() if k in before} == before
        assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in shards("b").items()}
        assert not [p for p in (tmp_path / "a").iterdir() if "tmp" in p.name]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
