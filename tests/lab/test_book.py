"""The notebooks run in their order, two at a time, and the book is built without make."""

import graphlib
import json
import threading

import pytest

from dlk_utils.lab import book
from dlk_utils.lab.book import (
    KERNEL_DIED,
    NOTEBOOKS,
    WIDGET,
    BookError,
    drop_widgets,
    hide_folders,
    main,
    run_all,
    run_notebook,
)


def started(after: dict, *, n_jobs: int, fails: str = "") -> tuple[list[str], list[str]]:
    """The names in the order in which they started, and in which they ended."""
    starts, ends, lock = [], [], threading.Lock()

    def run(name: str) -> None:
        with lock:
            assert set(after[name]) <= set(ends)
            assert len(starts) - len(ends) < n_jobs
            starts.append(name)
        if name == fails:
            raise BookError(f"{name} failed")
        with lock:
            ends.append(name)

    try:
        run_all(after, run, n_jobs=n_jobs)
    except BookError:
        assert fails
    return starts, ends


@pytest.mark.parametrize("n_jobs", [1, 2, 20])
def test_each_notebook_runs_once_and_after_those_that_it_waits_for(n_jobs):
    starts, ends = started(NOTEBOOKS, n_jobs=n_jobs)
    assert sorted(starts) == sorted(ends) == sorted(NOTEBOOKS)


def test_alone_they_run_in_the_order_in_which_they_are_listed():
    assert started(NOTEBOOKS, n_jobs=1)[0] == list(NOTEBOOKS)
    assert list(graphlib.TopologicalSorter(NOTEBOOKS).static_order())


def test_after_an_error_no_other_one_starts_and_the_error_is_raised():
    starts, _ = started(NOTEBOOKS, n_jobs=1, fails="02_check_lie_rate")
    assert starts == ["01_make_dataset", "00_train_liar", "02_check_lie_rate"]


def test_two_run_at_the_same_time():
    both = threading.Barrier(2, timeout=20)
    run_all({"a": (), "b": ()}, lambda name: both.wait())


def test_the_parameters_that_are_given_come_after_those_of_the_small_size(tmp_path, monkeypatch):
    ran = {}
    monkeypatch.setattr(
        book, "run_notebook", lambda name, top, to, words: ran.update({name: " ".join(words)})
    )
    assert main(["--small", "--to", str(tmp_path), "-p", "n_examples", "12"]) == 0
    assert ran["09_pairs_and_votes"] == (
        "-p n_examples 16 -p layer_stride 10 -p n_draws 4 -p n_examples 12"
    )
    assert ran["01_make_dataset"] == "-p n_examples 16 -p n_examples 12" and len(ran) == 14


def test_some_notebooks_run_alone_with_files_of_the_folder_that_one_is_in(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        book, "run_notebook", lambda name, top, to, words: ran.append((name, words[-1]))
    )
    monkeypatch.chdir(book._checkout() / "tests")
    only = ["--only", "01", "05", "02", "--to", str(tmp_path), "--jobs", "1"]
    assert main([*only, "-p", "datasets", "conftest.py,cities,lab/no.csv"]) == 0
    given = f"{book._checkout()}/tests/conftest.py,cities,lab/no.csv"
    assert ran == [
        ("01_make_dataset", given),
        ("02_check_lie_rate", given),
        ("05_probe_ablations", given),
    ]


def test_a_notebook_that_there_is_not_and_pages_of_some_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(book, "run_all", None)
    assert main(["--only", "01", "99", "--to", str(tmp_path)]) == 1
    assert "--only: expected beginnings of 01_make_dataset, " in capsys.readouterr().err
    assert main(["--only", "01"]) == 1
    assert "--only: expected --to FOLDER too" in capsys.readouterr().err


def notebook(*cells: tuple[str, str]) -> dict:
    """A notebook of code cells, each with a tag."""
    return {
        "cells": [
            {
                "cell_type": "code",
                "id": str(number),
                "execution_count": None,
                "metadata": {"tags": [tag]},
                "outputs": [],
                "source": [source],
            }
            for number, (tag, source) in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "", "language": "python"},
            "papermill": {"input_path": "/home/me/notebooks/a.ipynb"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def test_a_published_notebook_names_files_and_not_where_they_lie(tmp_path):
    path = tmp_path / "a.ipynb"
    injected = 'datasets = "/home/me/my.csv,cities"\nwindows = "C:\\\\Users\\\\me\\\\my.csv"'
    path.write_text(json.dumps(notebook(("injected-parameters", injected), ("", "x = '/a/b/c'"))))
    hide_folders(path)
    first, second = json.loads(path.read_text())["cells"]
    assert "".join(first["source"]) == 'datasets = "my.csv,cities"\nwindows = "my.csv"'
    assert second["source"] == ["x = '/a/b/c'"] and "/home/me" not in path.read_text()


@pytest.mark.slow
def test_a_notebook_that_fails_ends_with_its_log_and_leaves_no_page(tmp_path):
    for folder in ("notebooks", "build", "to"):
        (tmp_path / folder).mkdir()
    failing = notebook(("parameters", "n = 1"), ("", "raise ValueError(f'n is {n}')"))
    (tmp_path / "notebooks" / "a.ipynb").write_text(json.dumps(failing))
    with pytest.raises(BookError, match=r"(?s)n is 3.*a failed: see"):
        run_notebook("a", tmp_path, tmp_path / "to", ["-p", "n", "3"])
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize(("n_deaths", "runs"), [(0, True), (2, True), (3, False)])
def test_a_notebook_whose_kernel_found_its_ports_taken_is_started_again(
    tmp_path, monkeypatch, n_deaths, runs
):
    for folder in ("build", "notebooks", "to"):
        (tmp_path / folder).mkdir()
    # Stands in for Python with papermill, whose fifth argument is the notebook to write.
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
echo start >> {tmp_path}/starts
if [ $(wc -l < {tmp_path}/starts) -le {n_deaths} ]; then echo "{KERNEL_DIED}"; exit 1; fi
echo done > "$5"
"""
    )
    python.chmod(0o755)
    monkeypatch.setattr(book.sys, "executable", str(python))
    if runs:
        run_notebook("a", tmp_path, tmp_path / "to", [])
        assert (tmp_path / "to" / "a.ipynb").read_text() == "done\n"
    else:
        with pytest.raises(BookError, match=KERNEL_DIED):
            run_notebook("a", tmp_path, tmp_path / "to", [])
    assert len((tmp_path / "starts").read_text().splitlines()) == min(n_deaths + 1, 3)


def test_outside_a_checkout_and_without_its_packages_the_first_error_says_what_to_do(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(book, "__file__", str(tmp_path / "a" / "b" / "book.py"))
    assert main([]) == 1
    assert "clone the repository, and run this at the top" in capsys.readouterr().err
    monkeypatch.setattr(book, "NEEDED", ("papermill", "no_such_package"))
    assert main([]) == 1
    error = capsys.readouterr().err
    assert "has no no_such_package;" in error and '-e ".[notebooks]"' in error


def test_progress_bars_of_a_kernel_do_not_come_into_the_book(tmp_path):
    bar = {"output_type": "display_data", "data": {WIDGET: {}, "text/plain": "100%"}}
    text = {"output_type": "stream", "name": "stdout", "text": "done"}
    cells = [{"cell_type": "code", "outputs": [bar, text]}, {"cell_type": "markdown"}]
    path = tmp_path / "ran.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {"widgets": {}, "kernelspec": {}}}))
    drop_widgets(path)
    content = json.loads(path.read_text())
    assert content["cells"][0]["outputs"] == [text] and content["metadata"] == {"kernelspec": {}}
