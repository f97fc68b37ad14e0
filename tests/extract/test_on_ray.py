"""The stages on a real Ray cluster on this machine, of two workers."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from ray_stages import plan_of_four_rows, store_slowly
from tiny_models import tiny_checkpoint, tiny_prompts

from dlk_utils.errors import StoreError
from dlk_utils.extract import stages
from dlk_utils.extract.on_ray import TURNS, extract_on_ray
from dlk_utils.extract.packing import plan_packed
from dlk_utils.extract.stages import store_draws, store_gradients
from dlk_utils.extract.store import is_complete
from dlk_utils.lab.run import Run
from dlk_utils.models.loading import load_spec, resolve
from dlk_utils.safe_files import lock

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return resolve(str(tiny_checkpoint(tmp_path_factory.mktemp("model"))), dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    # The workers import this module, `tiny_models` and the package.
    path = os.pathsep.join(map(str, [HERE, HERE.parent, HERE.parents[1]]))
    environment = {"env_vars": {"PYTHONPATH": path}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith("shard")}


def with_lists(run: Run) -> Run:
    """Turn the arrays of a parquet file into lists, which the type checks of the tests want."""

    def as_list(x):
        return json.loads(json.dumps(x, default=lambda array: array.tolist()))

    columns = ("input_ids", "choice_ids", "strict_ids")
    vars(run)["prompts"] = run.prompts.assign(**{c: run.prompts[c].map(as_list) for c in columns})
    return run


@pytest.mark.parametrize("stage", [Run.draws, Run.gradients])
def test_two_workers_make_the_bytes_of_a_local_run_which_gives_up_its_own_copy_of_the_model(
    stage, tmp_path, monkeypatch
):
    tiny_checkpoint(tmp_path / "model", max_position_embeddings=4096)
    # Workers have another working folder, so a path that is relative to this one must reach them
    # as an absolute one.
    monkeypatch.chdir(tmp_path)
    options = {"model": "model", "datasets": "capitals", "n_examples": 70, "dtype": "float32"}
    local = with_lists(Run(engine="local", runs_dir="local", **options))
    ray = with_lists(Run(engine="ray", runs_dir="ray", **options))
    # A notebook that shows something before has loaded the model.
    assert ray.loaded is not None
    assert stage(ray).name == stage(local).name
    n_shards = len(list(stage(local).glob("shard-*.json")))
    assert n_shards >= 2 and len(content(stage(local))) == 2 * n_shards
    assert content(stage(ray)) == content(stage(local))
    assert "loaded" not in vars(ray) and "loaded" in vars(local)


def test_a_job_on_a_store_with_other_parts_is_refused(spec, tmp_path):
    rows = tiny_prompts(4)
    store_gradients(load_spec(spec), rows, tmp_path)
    options = {"plan": plan_packed, "workers": 1, "record": {"p": 0.1}}
    with pytest.raises(Exception, match="which differs in parts"):
        extract_on_ray(store_gradients, spec, rows, tmp_path, **options)


def test_a_worker_that_is_killed_with_many_shards_to_do_loses_none(spec, tmp_path, monkeypatch):
    rows, local, ray = tiny_prompts(200), tmp_path / "local", tmp_path / "ray"
    n_finished = []

    def kill_a_worker() -> None:
        while not list(ray.glob("shard-*.json")):
            time.sleep(0.02)
        # Of this cluster, not of another one on the same machine.
        children = psutil.Process().children(recursive=True)
        workers = [p for p in children if p.cmdline() and p.cmdline()[0].startswith("ray::MapW")]
        os.kill(workers[0].pid, signal.SIGKILL)
        n_finished.append(len(list(ray.glob("shard-*.json"))))

    thread = threading.Thread(target=kill_a_worker, daemon=True)
    thread.start()
    # So many shards that each worker is sent several at a time.
    assert len(plan_of_four_rows(rows, 2048)) == 50 > 2 * 2 * TURNS
    extract_on_ray(store_slowly, spec, rows, ray, plan=plan_of_four_rows, workers=2)
    thread.join()
    monkeypatch.setattr(stages, "plan_batches", plan_of_four_rows)
    store_draws(load_spec(spec), rows, local)
    assert n_finished and n_finished[0] < 50
    assert is_complete(ray) and len(content(ray)) == 2 * 50 and content(ray) == content(local)


def test_a_second_job_on_the_same_folder_is_refused(spec, tmp_path):
    with lock(tmp_path), pytest.raises(StoreError, match="another process is writing here"):
        extract_on_ray(store_draws, spec, tiny_prompts(4), tmp_path, workers=1)
