"""A real Ray cluster on this machine, of two workers."""

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
from conftest import byte_tokenizer, tiny, tiny_prompts
from transformers import LlamaConfig, LlamaForCausalLM

from dlk_utils.errors import StoreError
from dlk_utils.extract.batches import plan_batches
from dlk_utils.extract.on_ray import extract_on_ray
from dlk_utils.extract.packing import plan_shared
from dlk_utils.extract.stages import store_draws, store_gradients
from dlk_utils.extract.store import is_complete, lock
from dlk_utils.lab.run import Run
from dlk_utils.models.loading import load_spec, resolve


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return resolve(str(folder), dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={
            "env_vars": {
                "PYTHONPATH": os.pathsep.join(
                    map(str, [Path(__file__).parents[1], Path(__file__).parents[2]])
                )
            }
        },
    )
    yield
    ray.shutdown()


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith("shard")}


def test_two_workers_make_the_shards_of_a_local_run_bit_for_bit(spec, tmp_path):
    rows, model = tiny_prompts(200), load_spec(spec)
    store_gradients(model, rows, tmp_path / "local", record={})
    extract_on_ray(
        store_gradients, spec, rows, tmp_path / "ray", plan=plan_shared, workers=2, record={}
    )
    assert len(content(tmp_path / "ray")) == 2 * 4 and content(tmp_path / "ray") == content(
        tmp_path / "local"
    )
    with pytest.raises(Exception, match="with other parts"):
        extract_on_ray(
            store_gradients,
            spec,
            rows,
            tmp_path / "ray",
            plan=plan_shared,
            workers=1,
            record={"p": 0.1},
        )


def test_a_run_by_ray_has_the_bytes_of_a_local_one_and_gives_up_its_own_copy_of_the_model(
    tmp_path, monkeypatch
):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=36,
        intermediate_size=40,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=4096,
    )
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(
        tmp_path
    )  # no worker's working folder: what is relative here has to reach it all the same
    local, ray = (
        Run(
            model="model",
            datasets="capitals",
            n_examples=8,
            runs_dir=engine,
            dtype="float32",
            engine=engine,
        )
        for engine in ("local", "ray")
    )
    for run in (
        local,
        ray,
    ):  # with lists of tokens: arrays, as a parquet file gives them, do not pass the type checks of the tests
        vars(run)["prompts"] = run.prompts.assign(
            **{
                c: run.prompts[c].map(
                    lambda x: json.loads(json.dumps(x, default=lambda a: a.tolist()))
                )
                for c in ("input_ids", "choice_ids", "strict_ids")
            }
        )
    for stage in (Run.draws, Run.gradients):
        ray.loaded  # noqa: B018 (as a notebook has it that shows something before)
        assert (
            stage(ray).name == stage(local).name
            and len(content(stage(local))) >= 2
            and content(stage(ray)) == content(stage(local))
        )
        assert "loaded" not in vars(ray) and "loaded" in vars(local)


def one_row_shards(model, prompts, out, **options):
    from dlk_utils.extract import draws

    draws.plan_batches = functools.partial(
        plan_batches, shard_rows=1
    )  # in the worker's own process
    store_draws(model, prompts, out, **options)


def slow_draws(model, prompts, out, **options):
    time.sleep(0.4)
    store_draws(model, prompts, out, **options)


def test_a_worker_that_is_killed_on_the_way_loses_nothing(spec, tmp_path):
    rows, killed = tiny_prompts(700), []

    def kill_one():
        while not list((tmp_path / "ray").glob("shard-*.json")):
            time.sleep(0.02)
        ours = psutil.Process().children(
            recursive=True
        )  # of this cluster, not of another on the same machine
        worker = next(
            p for p in ours if p.cmdline() and p.cmdline()[0].startswith("ray::MapWorker")
        )
        os.kill(worker.pid, signal.SIGKILL)
        killed.append(len(list((tmp_path / "ray").glob("shard-*.json"))))

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    extract_on_ray(slow_draws, spec, rows, tmp_path / "ray", workers=2, record={})
    thread.join()
    store_draws(load_spec(spec), rows, tmp_path / "local", record={})
    assert (
        killed
        and killed[0] < 11
        and is_complete(tmp_path / "ray")
        and content(tmp_path / "ray") == content(tmp_path / "local")
    )


def test_a_second_job_on_the_same_folder_is_refused(spec, tmp_path):
    with lock(tmp_path), pytest.raises(StoreError, match="another process is writing here"):
        extract_on_ray(store_draws, spec, tiny_prompts(4), tmp_path, workers=1, record={})


def test_many_shards_go_to_a_worker_at_a_time_and_none_is_lost(spec, tmp_path, monkeypatch):
    rows = tiny_prompts(40)
    plan = functools.partial(plan_batches, shard_rows=1)
    monkeypatch.setattr("dlk_utils.extract.stages.plan_batches", plan)
    store_draws(load_spec(spec), rows, tmp_path / "local", record={})
    monkeypatch.undo()
    extract_on_ray(one_row_shards, spec, rows, tmp_path / "ray", plan=plan, workers=2, record={})
    assert len(content(tmp_path / "ray")) == 2 * 40 and content(tmp_path / "ray") == content(
        tmp_path / "local"
    )
