"""A stage for the tests of Ray, in a module that a worker imports quickly."""

import functools
import time

from dlk_utils.extract import stages
from dlk_utils.extract.batches import plan_batches

plan_of_four_rows = functools.partial(plan_batches, shard_rows=4)


def store_slowly(model, prompts, out, **options) -> None:
    """Store draws in many small shards, with time to kill the worker."""
    # This changes the worker's own process only.
    stages.plan_batches = plan_of_four_rows
    time.sleep(0.4)
    stages.store_draws(model, prompts, out, **options)
