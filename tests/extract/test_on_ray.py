"""The stages on a real Ray cluster on this machine, of two workers."""

import functools
import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import byte_tokenizer, new_model, tiny, tiny_prompts

from dlk_utils.errors import StoreError
from dlk_utils.extract import stages
from dlk_utils.extract.batches import plan_batches
from dlk_utils.extract.on_ray import extract_on_ray
from dlk_utils.extract.packing import plan_packed
from dlk_utils.extract.stages import store_draws, store_gradients
from dlk_utils.extract.store import is_complete, lock
from dlk_utils.lab.run import Run
from dlk_utils.models.loading import load_spec, resolve

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
plan_of_single_rows = functools.partial(plan_batches, shard_rows=1)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return resolve(str(folder), dtype="float32")


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


def test_two_workers_make_the_shards_of_a_local_run_bit_for_bit(spec, tmp_path):
    rows, local, ray = tiny_prompts(200), tmp_path / "local", tmp_path / "ray"
    store_gradients(load_spec(spec), rows, local)
    extract_on_ray(store_gradients, spec, rows, ray, plan=plan_packed, workers=2)
    n_shards = len(plan_packed(rows, 2048))
    assert n_shards > 1 and len(content(ray)) == 2 * n_shards
    assert content(ray) == content(local)
    options = {"plan": plan_packed, "workers": 1, "record": {"p": 0.1}}
    with pytest.raises(Exception, match="with other parts"):
        extract_on_ray(store_gradients, spec, rows, ray, **options)


def with_lists(run: Run) -> Run:
    """Turn the arrays of a parquet file into lists, which the type checks of the tests want."""

    def as_list(x):
        return json.loads(json.dumps(x, default=lambda array: array.tolist()))

    columns = ("input_ids", "choice_ids", "strict_ids")
    vars(run)["prompts"] = run.prompts.assign(**{c: run.prompts[c].map(as_list) for c in columns})
    return run


@pytest.mark.parametrize("stage", [Run.draws, Run.gradients])
def test_a_run_by_ray_has_the_bytes_of_a_local_one_and_gives_up_its_own_copy_of_the_model(
    stage, tmp_path, monkeypatch
):
    tokenizer = byte_tokenizer()
    model = new_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    # This is no worker's working folder: what is relative here has to reach it all the same.
    monkeypatch.chdir(tmp_path)
    options = {"model": "model", "datasets": "capitals", "n_examples": 8, "dtype": "float32"}
    local = with_lists(Run(engine="local", runs_dir="local", **options))
    ray = with_lists(Run(engine="ray", runs_dir="ray", **options))
    # A notebook that shows something before has loaded the model.
    assert ray.loaded is not None
    assert stage(ray).name == stage(local).name
    assert len(content(stage(local))) >= 2
    assert content(stage(ray)) == content(stage(local))
    assert "loaded" not in vars(ray) and "loaded" in vars(local)


def store_slowly(model, prompts, out, **options):
    time.sleep(0.4)
    store_draws(model, prompts, out, **options)


def test_a_worker_that_is_killed_on_the_way_loses_nothing(spec, tmp_path):
    rows, local, ray = tiny_prompts(700), tmp_path / "local", tmp_path / "ray"
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
    extract_on_ray(store_slowly, spec, rows, ray, workers=2)
    thread.join()
    store_draws(load_spec(spec), rows, local)
    assert n_finished and n_finished[0] < 11
    assert is_complete(ray) and content(ray) == content(local)


def test_a_second_job_on_the_same_folder_is_refused(spec, tmp_path):
    with lock(tmp_path), pytest.raises(StoreError, match="another process is writing here"):
        extract_on_ray(store_draws, spec, tiny_prompts(4), tmp_path, workers=1)


def store_single_rows(model, prompts, out, **options):
    # In the worker's own process.
    stages.plan_batches = plan_of_single_rows
    store_draws(model, prompts, out, **options)


def test_many_shards_go_to_a_worker_at_a_time_and_none_is_lost(spec, tmp_path, monkeypatch):
    rows, local, ray = tiny_prompts(40), tmp_path / "local", tmp_path / "ray"
    monkeypatch.setattr(stages, "plan_batches", plan_of_single_rows)
    store_draws(load_spec(spec), rows, local)
    monkeypatch.undo()
    extract_on_ray(store_single_rows, spec, rows, ray, plan=plan_of_single_rows, workers=2)
    assert len(content(ray)) == 2 * 40 and content(ray) == content(local)
