"""A real Ray cluster on this machine, of two workers."""

import os
import signal
import threading
import time

import psutil
import pytest
import torch
from conftest import byte_tokenizer, tiny, tiny_prompts

from dlk_utils.draws import extract_activations
from dlk_utils.gradients import extract_gradients
from dlk_utils.models import load_spec, resolve
from dlk_utils.on_ray import extract_on_ray
from dlk_utils.shared import plan_shared
from dlk_utils.store import is_complete


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return resolve(str(folder), dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.path.dirname(__file__)}})
    yield
    ray.shutdown()


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith("shard")}


def test_two_workers_make_the_shards_of_a_local_run_bit_for_bit(spec, tmp_path):
    rows, model = tiny_prompts(200), load_spec(spec)
    extract_gradients(model, rows, tmp_path / "local", record={})
    extract_on_ray(extract_gradients, spec, rows, tmp_path / "ray", plan=plan_shared, workers=2, record={})
    assert len(content(tmp_path / "ray")) == 2 * 4 and content(tmp_path / "ray") == content(tmp_path / "local")


def slow_draws(model, prompts, out, **options):
    time.sleep(0.4)
    extract_activations(model, prompts, out, **options)


def test_a_worker_that_is_killed_on_the_way_loses_nothing(spec, tmp_path):
    rows, killed = tiny_prompts(700), []

    def kill_one():
        while not list((tmp_path / "ray").glob("shard-*.json")):
            time.sleep(0.02)
        worker = next(p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] and p.info["cmdline"][0].startswith("ray::MapWorker"))
        os.kill(worker.pid, signal.SIGKILL)
        killed.append(len(list((tmp_path / "ray").glob("shard-*.json"))))

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    extract_on_ray(slow_draws, spec, rows, tmp_path / "ray", workers=2, record={})
    thread.join()
    extract_activations(load_spec(spec), rows, tmp_path / "local", record={})
    assert killed and killed[0] < 11 and is_complete(tmp_path / "ray") and content(tmp_path / "ray") == content(tmp_path / "local")
