"""Provenance: what counts as the code of a function, and what a fingerprint depends on."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest

from dlk_utils import provenance
from dlk_utils.evaluation.behaviour import label_behaviour
from dlk_utils.evaluation.stats import auroc
from dlk_utils.provenance import code_hash, fingerprint, imported_modules

SCRIPT = '''\
"""A script of a user."""
from dlk_utils.evaluation.stats import auroc

def score(x):
    """Score."""
    return 2 * x
'''


def load(path: Path, text: str):
    """Import a file under a new name, as its module was written last."""
    path.write_text(text)
    provenance._closure_hash.cache_clear()
    spec = importlib.util.spec_from_file_location("a_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["a_script"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "old, new, is_same",
    [
        ("A script of a user.", "Other words.", True),
        ("return 2 * x", "return 2*x  # twice", True),
        ("return 2 * x", "return 3 * x", False),
    ],
    ids=["docstring", "comment and format", "constant"],
)
def test_only_code_counts(tmp_path, old, new, is_same):
    before = code_hash(load(tmp_path / "script.py", SCRIPT).score)
    after = code_hash(load(tmp_path / "script.py", SCRIPT.replace(old, new)).score)
    assert (before == after) == is_same


def test_the_package_modules_that_a_script_imports_are_part_of_its_code(tmp_path):
    with_import = load(tmp_path / "script.py", SCRIPT)
    assert imported_modules(tmp_path / "script.py") == ["dlk_utils.evaluation.stats"]
    line = "from dlk_utils.evaluation.stats import auroc"
    hashes = {code_hash(with_import.score)}
    hashes.add(code_hash(load(tmp_path / "script.py", SCRIPT.replace(line, "")).score))
    assert len(hashes) == 2


def test_a_function_without_source_has_a_hash():
    names = {"__name__": "__main__"}
    exec("def one(): return 1\ndef two(): return [2]", names)
    assert code_hash(names["one"]) != code_hash(names["two"])


def test_functions_of_other_modules_have_other_hashes_and_a_partial_has_that_of_its_function():
    assert code_hash(auroc) != code_hash(label_behaviour)
    assert code_hash(partial(partial(auroc), y=None)) == code_hash(auroc)


def test_a_fingerprint_does_not_depend_on_the_order_of_its_parts():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
