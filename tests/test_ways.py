"""The ways in: papermill on the real notebooks and the real model, as a user would call it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
STAGES = ["01_make_dataset", "02_check_lie_rate", "03_extract", "04_extract_grads", "05_probe_ablations"]


def papermill(notebook: str, out: Path, **parameters) -> list[str]:
    given = [str(x) for k, v in parameters.items() for x in ("-p", k, v)]
    return [sys.executable, "-m", "papermill", "--no-progress-bar", f"{notebook}.ipynb", str(out), *given]


def run(command: list[str], **env) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=NOTEBOOKS, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"} | env)


def said(path: Path) -> str:
    outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
    return "\n".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)


def test_forty_statements_of_ones_own_go_through_all_five_notebooks(tmp_path):
    """With 40 rows and a model that does not know them there is little to say; each notebook must say so and end well."""
    capitals = ["Paris", "Rome", "Madrid", "Vienna", "Athens", "Oslo", "Cairo", "Lima", "Tokyo", "Ottawa"]
    lands = ["France", "Italy", "Spain", "Austria", "Greece", "Norway", "Egypt", "Peru", "Japan", "Canada"]
    rows = [f'"{capitals[(i + k) % 10]} is the capital of {lands[i]}{", <b>they</b> say" if k == 1 else ""}.",{int(k == 0)}' for i in range(10) for k in (0, 1, 2)]
    rows += [f"{lands[i]} is a country.,1" for i in range(10)]
    own = tmp_path / "own.csv"
    own.write_text("\n".join(["statement,label", *rows]), encoding="utf-8")
    assert len(rows) == 40
    for stage in STAGES:
        done = run(papermill(stage, tmp_path / f"{stage}.ipynb", model="smollm2", datasets=own, runs_dir=tmp_path / "runs", **({"layer_stride": 10} if stage.startswith("05") else {})))
        assert done.returncode == 0, done.stderr[-2000:]
    found = said(tmp_path / "05_probe_ablations.ipynb")
    assert "skipped: lie" in found and "each class needs at least" in found  # nothing that it does not know can be lied about
    assert "none of these numbers is a claim" in found


def test_a_model_that_needs_a_hub_ends_with_a_short_error_and_a_failing_exit_code(tmp_path):
    done = run(papermill("03_extract", tmp_path / "out.ipynb", model="starchat-beta", runs_dir=tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode != 0
    error = done.stderr[done.stderr.index("Exception encountered") :]
    assert "cannot load model 'starchat-beta'" in error and "HuggingFaceH4/starchat-beta" in error and "smollm2" in error
    assert len(error.splitlines()) < 10


@pytest.mark.parametrize(
    "parameters, words",
    [({"modle": "smollm2"}, "did you mean 'model'"), ({"datasets": "rotten_tomatos"}, "rotten_tomatoes")],
)
def test_bad_parameters_are_refused_and_nothing_is_written(tmp_path, parameters, words):
    done = run(papermill("01_make_dataset", tmp_path / "out.ipynb", **{"runs_dir": tmp_path / "runs"} | parameters))
    assert done.returncode != 0
    assert words in done.stderr[done.stderr.index("Exception encountered") :]
    assert not (tmp_path / "runs").exists()


def test_a_kill_during_03_and_a_second_run_give_the_features_of_an_undisturbed_run(tmp_path):
    options = {"datasets": "rotten_tomatoes", "n_examples": 40}
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
