"""A kept result is read back only if the present code and libraries made it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
from planted_run import PlantedRun, planted_read_rows
from tiny_models import tiny, tiny_prompts

from dlk_utils import provenance
from dlk_utils.evaluation import tasks
from dlk_utils.extract.stages import store_answers
from dlk_utils.extract.store import is_complete
from dlk_utils.lab import cache
from dlk_utils.lab.cache import kept
from dlk_utils.lab.tables import headlines

PACKAGE = Path(provenance.__file__).parent
OTHER_NUMBERS = {
    "a rule of behaviour": ("evaluation/behaviour.py", "MIN_MARGIN = 0.1", "MIN_MARGIN = 0.3"),
    "a probe": ("probes/linear.py", "C: float | str = 0.01", "C: float | str = 0.5"),
}
"""Changes of the package: a file, an old text, and a new one."""
SAME_NUMBERS = {
    "a docstring": ("evaluation/behaviour.py", '"""', '"""New words. '),
    "a figure": ("lab/figures.py", 'GREY = "#6b6b6b"', 'GREY = "#999"'),
    "a sentence": ("lab/findings.py", "not scored", "not measured"),
}


@dataclass
class Copy:
    """A copy of the package's source files."""

    folder: Path

    def change(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        source = path.read_text(encoding="utf-8")
        assert old in source
        path.write_text(source.replace(old, new, 1), encoding="utf-8")
        provenance._closure_hash.cache_clear()


@pytest.fixture
def copy(tmp_path) -> Copy:
    weights = shutil.ignore_patterns("*.safetensors", "__pycache__")
    return Copy(Path(shutil.copytree(PACKAGE, tmp_path / "copy" / "dlk_utils", ignore=weights)))


@pytest.fixture
def code(copy, monkeypatch) -> Iterator[Copy]:
    """A copy whose code stands for that of the package when results are named."""
    monkeypatch.setattr(provenance, "PACKAGE_FOLDER", copy.folder)
    provenance._closure_hash.cache_clear()
    yield copy
    provenance._closure_hash.cache_clear()


@pytest.fixture
def computed(monkeypatch) -> list[pd.DataFrame]:
    """The tables that were computed, and not read back."""
    monkeypatch.setattr(tasks, "read_rows", planted_read_rows)
    tables = []
    compute = headlines.with_each_mistake

    def remember(*args, **options) -> pd.DataFrame:
        tables.append(compute(*args, **options))
        return tables[-1]

    monkeypatch.setattr(headlines, "with_each_mistake", remember)
    return tables


@pytest.fixture
def run(tmp_path) -> PlantedRun:
    return PlantedRun(n_examples=60, runs_dir=str(tmp_path / "runs"))


def names(folder: Path) -> set[str]:
    """The kept results of a folder, without their records."""
    paths = [path for path in folder.iterdir() if path.name != ".lock"]
    return {path.name for path in paths if path.suffix != ".json"}


@pytest.mark.slow
def test_a_changed_constant_shows_other_numbers_in_the_same_folder(copy, tmp_path):
    def results() -> dict:
        search = os.pathsep.join([str(copy.folder.parent), str(Path(__file__).parent)])
        done = subprocess.run(
            [sys.executable, Path(__file__).parent / "planted_run.py", tmp_path / "runs"],
            env=os.environ | {"PYTHONPATH": search},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    before = results()
    assert before["computed"]
    copy.change(*SAME_NUMBERS["a docstring"])
    assert results() == before | {"computed": False}
    means = {before["mean"]}
    for change in OTHER_NUMBERS.values():
        copy.change(*change)
        after = results()
        assert after["computed"] and after["mean"] not in means
        means.add(after["mean"])


@pytest.mark.slow
@pytest.mark.parametrize("change", OTHER_NUMBERS)
def test_code_that_decides_a_number_makes_another_file(code, run, computed, change):
    headlines.mistakes(run, layers=[0])
    before = names(run.cache.folder)
    code.change(*OTHER_NUMBERS[change])
    headlines.mistakes(run, layers=[0])
    assert len(computed) == 2 and names(run.cache.folder) > before


@pytest.mark.slow
@pytest.mark.parametrize("change", SAME_NUMBERS)
def test_words_and_pictures_compute_nothing_again(code, run, computed, change):
    table = headlines.mistakes(run, layers=[0])
    code.change(*SAME_NUMBERS[change])
    pd.testing.assert_frame_equal(headlines.mistakes(run, layers=[0]), table)
    assert len(computed) == 1


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[0], (0,)], ids=["list", "tuple"])
def test_a_table_is_computed_once_for_the_same_arguments(run, computed, layers):
    headlines.mistakes(run, layers=[0])
    headlines.mistakes(run, layers=layers)
    assert len(computed) == 1
    headlines.mistakes(run, layers=[1])
    headlines.mistakes(replace(run, seed=1), layers=[0])
    assert len(computed) == 3


@pytest.mark.slow
def test_a_damaged_table_is_made_again_with_a_message(run, computed, capsys):
    table = headlines.mistakes(run, layers=[0])
    [path] = run.cache.folder.glob("*.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    pd.testing.assert_frame_equal(headlines.mistakes(run, layers=[0]), table)
    assert len(computed) == 2
    assert f"{path.name} does not match the checksum" in capsys.readouterr().out


def test_a_table_without_its_record_is_made_again(run, computed):
    headlines.mistakes(run, layers=[0])
    [record] = run.cache.folder.glob("*.json")
    record.unlink()
    headlines.mistakes(run, layers=[0])
    assert len(computed) == 2 and record.exists()


def test_other_versions_of_the_libraries_make_another_file(run, computed, monkeypatch):
    headlines.mistakes(run, layers=[0])
    monkeypatch.setattr(cache, "library_versions", lambda: {"torch": "another"})
    headlines.mistakes(run, layers=[0])
    assert len(computed) == 2 and len(names(run.cache.folder)) == 2


def test_why_a_table_is_empty_is_kept_with_it(run, computed):
    small = replace(run, n_examples=6)
    first, again = (headlines.mistakes(small, layers=[0]) for _ in range(2))
    assert first.empty and len(computed) == 1
    assert again.attrs["too_few_rows"].startswith("truth, truth rows -> lie rows: expected")


@pytest.mark.slow
def test_outdated_results_are_listed_and_removed_and_no_others(code, run, computed, capsys):
    def make_store(folder: Path, parts: dict) -> None:
        store_answers(tiny("llama"), tiny_prompts(2), folder, record=parts)

    def make_both() -> set[str]:
        headlines.mistakes(run, layers=[0])
        run.cache.filled_folder("02-answers", store_answers, run.record, is_complete, make_store)
        return names(run.cache.folder)

    outdated = make_both()
    code.change("extract/batches.py", "import ", "import this\nimport ")
    present = make_both() - outdated
    (run.cache.folder / "notes.txt").write_text("not a result")

    cache.main([str(run.cache.folder)])
    listed = capsys.readouterr().out.splitlines()
    assert len(outdated) == len(present) == 2 and outdated <= set(listed)
    assert not present & set(listed) and names(run.cache.folder) > outdated | present

    cache.main([str(run.cache.folder), "--remove"])
    assert names(run.cache.folder) == present | {"notes.txt"}
    assert len(list(run.cache.folder.glob("*.json"))) == 2


@pytest.mark.slow
def test_results_of_functions_outside_the_package_are_not_outdated(run):
    @kept("my-table")
    def my_table(run) -> pd.DataFrame:
        return pd.DataFrame({"x": [1]})

    my_table(run)
    assert list(run.cache.outdated()) == []
