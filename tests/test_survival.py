"""A stage that is killed on the way, by papermill on the real notebook and model."""

import json
import os
import shutil
import signal
import subprocess
import time

import psutil
from notebooks import NOTEBOOKS, papermill, run


def test_a_kill_during_03_and_a_second_run_give_the_features_of_an_undisturbed_run(tmp_path):
    options = {"datasets": "cities", "n_examples": 64, "audit_rows": 2}  # two shards of draws
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(papermill("03_extract", tmp_path / "a.ipynb", runs_dir=killed, **options), cwd=NOTEBOOKS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(killed.glob("03-draws-*/shard-*.safetensors")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:  # the kernel is a child with a session of its own
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
