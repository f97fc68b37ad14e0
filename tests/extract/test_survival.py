"""A stage that is killed or interrupted on its way, in the real notebook and in a real kernel."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from jupyter_client.manager import start_new_kernel
from tiny_models import checkpoint_that_knows_nothing

from notebooks import NOTEBOOKS, papermill, run

pytestmark = pytest.mark.slow


def test_a_kill_during_03_and_a_second_run_give_the_features_of_an_undisturbed_run(tmp_path):
    options = {
        "model": checkpoint_that_knows_nothing(tmp_path / "model"),
        "datasets": "cities",
        # Many shards of draws, so that the kill comes between the first one and the last.
        "n_examples": 200,
        "audit_rows": 2,
        # A tiny model has so few channels that a small share of them may be none.
        "p_dropout": 0.2,
    }
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    process = subprocess.Popen(
        papermill("03_extract", tmp_path / "a.ipynb", runs_dir=killed, **options),
        cwd=NOTEBOOKS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(killed.glob("03-draws-*/shard-*.safetensors")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    # The kernel is a child with a session of its own.
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        os.kill(one.pid, signal.SIGKILL)
    process.wait()
    [draws] = [path for path in killed.glob("03-draws-*") if path.is_dir()]
    n_planned = len(json.loads((draws / "manifest.json").read_text())["plan"])
    assert len(list(draws.glob("shard-*.json"))) < n_planned
    shutil.copytree(killed, undisturbed, ignore=shutil.ignore_patterns("03-draws-*"))
    for folder in (killed, undisturbed):
        done = run(papermill("03_extract", tmp_path / "b.ipynb", runs_dir=folder, **options))
        assert done.returncode == 0, done.stderr[-2000:]
    shards = sorted(draws.glob("shard-*"))
    assert len(shards) == 2 * n_planned
    for shard in shards:
        assert shard.read_bytes() == (undisturbed / draws.name / shard.name).read_bytes()


SLOW_FILL = """
import time
from pathlib import Path
import torch
from dlk_utils.extract.store import fill

plan = [[[f"r{i}"]] for i in range(12)]

def compute(ids):
    time.sleep(0.2)
    return {"x": torch.full((1, 3), float(ids[0][1:]))}
"""


class Kernel:
    """A notebook kernel that runs cells, and can be interrupted."""

    def __init__(self):
        self.manager, self.client = start_new_kernel()

    def run(self, code: str) -> str:
        """Run a cell and return its status, "ok" or "error"."""
        reply = self.client.execute_interactive(code, timeout=60, output_hook=lambda message: None)
        return reply["content"]["status"]

    def start(self, code: str) -> None:
        """Run a cell without waiting for it. Cells that come later run even if it fails."""
        self.client.execute(code, stop_on_error=False)

    def interrupt(self) -> str:
        """Interrupt the running cell, and return the name of the error that it ends with."""
        self.manager.interrupt_kernel()
        while (reply := self.client.get_shell_msg(timeout=60))["msg_type"] != "execute_reply":
            pass
        return reply["content"]["ename"]

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def finished_shards(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of the shards that count: those with a record beside them."""
    shards = [path.with_suffix(".safetensors") for path in folder.glob("shard-*.json")]
    return {shard.name: (shard.read_bytes(), shard.stat().st_mtime_ns) for shard in shards}


def test_an_interrupt_inside_a_notebook_loses_nothing_and_the_same_cell_goes_on(tmp_path):
    kernel, interrupted, undisturbed = Kernel(), tmp_path / "a", tmp_path / "b"
    fill_a, fill_b = (
        f"fill(Path({str(folder)!r}), {{}}, plan, compute)" for folder in (interrupted, undisturbed)
    )
    try:
        assert kernel.run(SLOW_FILL) == "ok"
        kernel.start(fill_a)
        deadline = time.monotonic() + 60
        while len(finished_shards(interrupted)) < 3:
            assert time.monotonic() < deadline, "the cell did not write its shards"
            time.sleep(0.05)
        assert kernel.interrupt() == "KeyboardInterrupt"
        before = finished_shards(interrupted)
        assert 3 <= len(before) < 12
        assert kernel.run(fill_a) == "ok" and kernel.run(fill_b) == "ok"
    finally:
        kernel.stop()
    after = finished_shards(interrupted)
    assert len(after) == 12
    assert {name: shard for name, shard in after.items() if name in before} == before
    contents, expected = (
        {name: content for name, (content, _) in finished_shards(folder).items()}
        for folder in (interrupted, undisturbed)
    )
    assert contents == expected
    assert not list(interrupted.glob("*tmp*"))
