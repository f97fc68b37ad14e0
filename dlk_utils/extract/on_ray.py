"""The same extraction on many machines: a Ray Data job whose actors each hold the model and make shards of one store (`pip install dlk_utils[ray]`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from dlk_utils.extract.batches import plan_batches
from dlk_utils.extract.store import is_good, lock
from dlk_utils.models.loading import ModelSpec

TURNS = 8
"""Batches of shards that a worker is sent, about: many, so that all end at about the same time; few, so that planning costs little."""


class Worker:
    """Holds the model; makes the shards whose numbers it is sent, `TURNS` times in a run (each time all rows are planned anew). An actor that dies is started again by Ray, and what it was sent with it."""

    def __init__(
        self,
        extract: Callable,
        spec: ModelSpec,
        prompts: pd.DataFrame,
        out: Path,
        options: dict[str, Any],
    ):
        from dlk_utils.models.loading import load_spec

        self.model, self.extract, self.prompts, self.out, self.options = (
            load_spec(spec),
            extract,
            prompts,
            out,
            options,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.extract(
            self.model,
            self.prompts,
            self.out,
            only=[int(i) for i in batch["shard"]],
            **self.options,
        )  # which looks again at what is there: after a death only the rest is made
        return batch


def extract_on_ray(
    extract: Callable,
    spec: ModelSpec,
    prompts: pd.DataFrame,
    out: Path,
    *,
    plan: Callable = plan_batches,
    workers: int | None = None,
    batch_tokens: int = 2048,
    **options: Any,
) -> None:
    """Run `extract` (`extract_activations` or `extract_gradients`) for every shard that is missing, one actor per GPU, or per CPU where there is none.

    `out` must be a folder that all machines see, as must a model that is a local folder. `plan` is that of `extract` (`plan_shared` for gradients), so each shard is the one that it would have made; a run that was stopped
    goes on at the missing shards. Joins the cluster of `RAY_ADDRESS`, else starts one on this machine.
    """
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    out = out.resolve()  # a worker has a working folder of its own
    out.mkdir(parents=True, exist_ok=True)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    with lock(out):
        todo = [
            i for i in range(len(plan(prompts, batch_tokens))) if not is_good(out, i, tell=True)
        ] or [0]  # a worker looks whether what is there is what was asked for
        size = min(workers or gpus or int(resources["CPU"]), len(todo))
        each = max(1, len(todo) // (TURNS * size))
        shards = ray.data.from_items(
            [{"shard": i} for i in todo], override_num_blocks=-(-len(todo) // each)
        )
        shards.map_batches(
            Worker,
            fn_constructor_args=(
                extract,
                spec,
                prompts,
                out,
                {**options, "batch_tokens": batch_tokens},
            ),
            batch_size=each,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_gpus=1 if gpus else 0,
            num_cpus=0 if gpus else 1,
        ).materialize()
