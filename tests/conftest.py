"""What all tests share: tiny models (from `tiny_models`), and the order of the test files."""

import pytest
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

LONG = [
    "test_ways.py",
    "test_survival.py",
    "test_on_ray.py",
    "test_organism_check.py",
    "test_cache.py",
    "test_documentation.py",
]


QUICK_FAMILIES = (
    "llama",
    "gpt2",
    "mpt",
    "mistral window",
)
"""One model family of each kind: the fast tests run for these, `make test` for all families."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the other families slow, and put the long files first.

    So no worker of xdist is left with a long file at the end. (Needs `--no-loadscope-reorder`.)
    """
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        family = parameters.get("family")
        if family in FAMILIES and family not in QUICK_FAMILIES:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
