"""The order of the test files, and what is set for all tests. Tiny models are in `tiny_models`.

Nothing heavy is imported here: the process that only hands tests to xdist's workers reads this too.
"""

import gc

import pytest
from beartype.claw import beartype_package

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

# Types of packages without arrays; pyproject.toml names those whose shapes jaxtyping checks.
beartype_package("dlk_utils")

# What importing a library leaves lives as long as the tests: the garbage collector need not look at
# it again and again.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the other families slow, and put the long files first.

    So no worker of xdist is left with a long file at the end. (Needs `--no-loadscope-reorder`.)
    """
    import threadpoolctl
    from tiny_models import FAMILIES

    gc.freeze()
    gc.enable()
    # Workers that each use all cores slow each other down. (`tiny_models` limits torch.)
    threadpoolctl.threadpool_limits(1)
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        family = parameters.get("family")
        if family in FAMILIES and family not in QUICK_FAMILIES:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
