"""What all tests share: tiny models (from `tiny_models`), and the order of the test files."""

import threadpoolctl
from tiny_models import (
    CONFIGS,
    FAMILIES,
    LAYERS,
    PRECISE,
    SINGLE,
    TURNS,
    VOCAB,
    WIDTH,
    byte_tokenizer,
    close,
    prompts_that_begin_alike,
    tiny,
    tiny_checkpoint,
    tiny_prompts,
)

__all__ = [
    "CONFIGS",
    "FAMILIES",
    "LAYERS",
    "PRECISE",
    "SINGLE",
    "TURNS",
    "VOCAB",
    "WIDTH",
    "byte_tokenizer",
    "close",
    "prompts_that_begin_alike",
    "tiny",
    "tiny_checkpoint",
    "tiny_prompts",
]

# Workers that each use all cores slow each other down. (`tiny_models` limits torch.)
threadpoolctl.threadpool_limits(1)

LONG = ["test_organism_check.py", "test_ways.py", "test_survival.py", "test_on_ray.py"]


def pytest_collection_modifyitems(items):
    """Put the long files first, so that no worker of xdist is left with one of them at the end.

    Needs `--no-loadscope-reorder`.
    """
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
