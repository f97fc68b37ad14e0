"""The stages on many machines: a Ray Data job whose actors make shards of one store.

Needs `pip install dlk_utils[ray]`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from dlk_utils.extract.batches import plan_batches
from dlk_utils.extract.store import is_good
from dlk_utils.models.loading import ModelSpec, load_spec
from dlk_utils.safe_files import lock

TURNS = 8
"""How often a worker is sent shards, about: often, so that all workers end at about the same time;
seldom, because a worker plans all batches anew each time."""


class Worker:
    """Holds a model, and makes the shards whose numbers it is sent.

    If it dies, Ray starts it again and sends it the same shards; only the missing ones are made.
    """

    def __init__(
        self,
        stage: Callable,
        spec: ModelSpec,
        prompts: pd.DataFrame,
        out: Path,
        options: dict[str, Any],
    ):
        self.model = load_spec(spec)
        self.stage, self.prompts, self.out, self.options = stage, prompts, out, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shards = [int(i) for i in batch["shard"]]
        self.stage(self.model, self.prompts, self.out, only=shards, **self.options)
        return batch


def extract_on_ray(
    stage: Callable,
    spec: ModelSpec,
    prompts: pd.DataFrame,
    out: Path,
    *,
    plan: Callable = plan_batches,
    workers: int | None = None,
    batch_tokens: int = 2048,
    **options: Any,
) -> None:
    """Run a stage for every shard that is missing, one worker per GPU, or per CPU without GPUs.

    The store is the same, byte for byte, as one that the stage fills alone. A run that was stopped
    resumes with the missing shards. Joins the cluster of `RAY_ADDRESS`, or starts one here.

    Parameters
    ----------
    stage
        A function of `stages` that takes `only`.
    spec
        The model; a local folder must be one that all machines see.
    prompts, out, batch_tokens, **options
        Arguments of the stage. All machines must see `out`.
    plan
        The stage's own plan: `plan_packed` for gradients, for instance.
    workers
        Number of workers, if not one per device.
    """
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    # Absolute, because a worker has a working folder of its own.
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    resources = ray.cluster_resources()
    n_gpus = int(resources.get("GPU", 0))
    options["batch_tokens"] = batch_tokens
    with lock(out):
        shards = range(len(plan(prompts, batch_tokens)))
        missing = [i for i in shards if not is_good(out, i, tell=True)]
        # If none is missing, a worker still checks that what is there is what was asked for.
        missing = missing or [0]
        n_workers = min(workers or n_gpus or int(resources["CPU"]), len(missing))
        turn = max(1, len(missing) // (TURNS * n_workers))
        n_turns = -(-len(missing) // turn)
        items = ray.data.from_items([{"shard": i} for i in missing], override_num_blocks=n_turns)
        items.map_batches(
            Worker,
            fn_constructor_args=(stage, spec, prompts, out, options),
            batch_size=turn,
            compute=ray.data.ActorPoolStrategy(size=n_workers),
            num_gpus=1 if n_gpus else 0,
            num_cpus=0 if n_gpus else 1,
        ).materialize()
