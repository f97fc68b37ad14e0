"""Every value of every parameter is read as documented, or refused by one short error."""

import contextlib
import json
import math
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from notebook_cells import run_cells
from tiny_models import checkpoint_that_knows_nothing

from dlk_utils.errors import ParameterError
from dlk_utils.lab.parameters import (
    COMMON,
    NOTEBOOKS,
    TABLE,
    parameters_cell,
    parameters_table,
    read_parameters,
)
from dlk_utils.lab.run import Run
from notebooks import NOTEBOOKS as FOLDER
from notebooks import papermill, run, text_outputs

TOP = FOLDER.parent
BAD = {
    "None": None,
    "True": True,
    "zero": 0,
    "negative": -3,
    "fraction": 2.5,
    "nan": math.nan,
    "infinite": math.inf,
    "very large": 10**30,
    "numbers": [1, 2],
    "nothing": [],
    "mapping": {"cities": 1},
    "bytes": b"cities",
    "object": object(),
    "word": "no",
    "digits": "16",
    "no text": "",
    "blanks": "   ",
    "repeated": "cities,cities",
    "gap": "cities,,capitals",
    "comma in a name": ["cities,capitals"],
    "with a blank": "cities capitals",
    "two lines": "cities\ncapitals",
    "null": "cities\0",
    "no Unicode": "\ud800",
    "long": "x" * 100_000,
    "long list": [f"name{i}" for i in range(1000)],
    "deep": "/".join(["folders"] * 1000),
    "missing": "missing.csv",
    "home": "~nobody-of-this-name/runs",
    "device": "/dev/null",
    # Made by the fixture `folder`.
    "folder": "folder.csv",
    "empty file": "empty.csv",
    "binary file": "binary.csv",
    "zeros": "zeros.csv",
    "in a file": "empty.csv/below",
    "loop": "loop.csv",
    "link to nothing": "dangling.csv",
}

A_MODEL = ("word", "digits", "with a blank", "missing", "folder", "in a file")
NOT_THERE = ("loop", "link to nothing")
"""Such a name may be one of the hub; `resolve` says what is wrong with it."""
AS_IT_IS = {
    "model": (*A_MODEL, *NOT_THERE, "repeated", "gap"),
    "plain": (*A_MODEL, *NOT_THERE, "repeated", "gap"),
    "graded": (*A_MODEL, *NOT_THERE, "repeated", "gap"),
    "trigger": (*A_MODEL, *NOT_THERE, "repeated", "gap"),
    "retrained": (*A_MODEL, *NOT_THERE, "repeated", "gap"),
    "compare": (*A_MODEL, *NOT_THERE),
    # What is in a file is checked when it is read.
    "datasets": ("word", "digits", "empty file", "binary file", "zeros", "in a file"),
    "runs_dir": (
        "None",
        "word",
        "digits",
        "with a blank",
        "repeated",
        "gap",
        "missing",
        "folder",
    ),
    "card": ("folder",),
    "statements": ("comma in a name", "long list"),
    "system_prompts": ("comma in a name", "long list"),
    "seed": ("zero",),
    "n_shots": ("zero",),
    "quantization": ("None",),
    "dose": ("fraction",),
}
"""Values of `BAD` that these parameters take as they are."""
NONE = dict.fromkeys(("None", "no text", "blanks"), "")
YES_OR_NO = {"True": True, "word": False}
MANY = {"long list": ",".join(BAD["long list"])}
READ_AS = {
    "datasets": MANY,
    "train": YES_OR_NO,
    "keep_states": YES_OR_NO,
    "weight_gradients": YES_OR_NO,
    "compare": NONE | MANY,
    "plain": NONE,
    "graded": NONE,
    "trigger": NONE,
    "retrained": NONE,
    "statements": NONE,
    "system_prompts": NONE,
    "card": NONE,
    "chats": NONE,
}
"""Values of `BAD` that these parameters take as another value."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with the files that `BAD` names."""
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "empty.csv").touch()
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    (tmp_path / "zeros.csv").write_bytes(bytes(100))
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal_of(name: str, value: Any) -> str:
    """The message with which a parameter refuses a value."""
    with pytest.raises(ParameterError) as error:
        read_parameters({name: value})
    return str(error.value)


@pytest.mark.parametrize("name", TABLE)
def test_a_bad_value_is_refused_by_one_short_error_or_read_as_documented(name, folder):
    expected = {bad: BAD[bad] for bad in AS_IT_IS.get(name, ())} | READ_AS.get(name, {})
    for bad, value in BAD.items():
        if bad in expected:
            assert read_parameters({name: value}) == {name: expected[bad]}, bad
            continue
        message = refusal_of(name, value)
        start = f"{name}: expected {TABLE[name].values.expected}, got "
        assert message.startswith(start) and len(message.splitlines()) == 1, bad
        assert len(message) < 450 and str(folder) not in message, bad


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_takes_its_defaults_as_they_are(notebook):
    defaults = {name: TABLE[name].default_in(notebook) for name in NOTEBOOKS[notebook]}
    read = read_parameters(defaults)
    assert read == defaults and list(map(type, read.values())) == list(map(type, defaults.values()))


def test_several_names_may_be_a_list_and_blanks_around_them_do_not_count(folder):
    expected = {"datasets": "cities,capitals"}
    for value in (["cities", "capitals"], ("cities ", " capitals"), " cities ,capitals"):
        assert read_parameters({"datasets": value}) == expected
    (folder / "my claims.csv").touch()
    assert read_parameters({"datasets": Path("my claims.csv")}) == {"datasets": "my claims.csv"}
    assert read_parameters({"styles": ["bare", "negated"]}) == {"styles": "bare,negated"}


def test_texts_may_be_a_list_and_one_text_is_not_taken_for_a_file():
    texts = [" Osaka is in Japan. ", "Osaka is in Peru."]
    read = read_parameters({"statements": texts, "system_prompts": tuple(texts)})
    stripped = [text.strip() for text in texts]
    assert read == {"statements": stripped, "system_prompts": stripped}
    message = refusal_of("statements", "Osaka is in Japan.")
    assert message.endswith("; a text by itself is written as a list: [...]")
    for bad in (["Yes.", " "], ["Yes.", 3], ["Yes.", "a\0b"], ["Yes.", None]):
        assert "number 1 is not a text, or is empty" in refusal_of("statements", bad)


def test_an_error_says_what_to_do_about_a_name():
    assert "papermill -r" in refusal_of("datasets", 2024)
    assert "separate several names by commas" in refusal_of("datasets", "cities capitals")
    assert "no file 'missing.csv' in the working folder" in refusal_of("datasets", "missing.csv")


@pytest.mark.parametrize("dtype", ["fp16", "torch.float16"])
def test_a_run_refuses_an_unknown_dtype_with_its_other_parameters(dtype):
    with pytest.raises(ParameterError, match="dtype: expected"):
        Run(dtype=dtype)
    assert Run(dtype="float16").dtype == "float16"


def test_names_of_other_alphabets_are_taken():
    name = "ভাষা\u200d، 東京\u3000модель"
    assert read_parameters({"model": name, "runs_dir": name}) == {"model": name, "runs_dir": name}


def test_the_bounds_of_a_number_are_taken_and_what_lies_beyond_is_not():
    bounds = {"n_draws": (2, 1000), "seed": (0, 2**32 - 1), "p_dropout": (0.0001, 0.99)}
    for name, (least, most) in bounds.items():
        assert read_parameters({name: least}) == {name: least}
        assert read_parameters({name: most}) == {name: most}
        refusal_of(name, least - 1)
        refusal_of(name, most + 1)


def test_a_run_checks_its_arguments_by_the_same_table():
    one, two = Run(datasets=["cities", "capitals"]), Run(datasets="cities, capitals")
    assert one == two and one.datasets == "cities,capitals"
    bad = {"datasets": "a,a", "n_examples": 3, "quantization": "3bit", "runs_dir": "/dev/null"}
    for name, value in bad.items():
        with pytest.raises(ParameterError, match=f"^{name}: expected "):
            Run(**{name: value})


def test_the_defaults_of_a_run_are_those_of_the_table():
    defaults = {field.name: field.default for field in fields(Run) if field.name in TABLE}
    assert defaults == {name: TABLE[name].default for name in defaults}
    assert set(COMMON) < set(defaults)


def test_a_device_that_is_not_here_is_refused_with_those_that_are():
    message = refusal_of("device", "cuda:99")
    assert "; here: cpu" in message
    with pytest.raises(ParameterError, match="each worker takes a device of its own"):
        Run(engine="ray", device="cpu")


# The folder of runs.


@contextlib.contextmanager
def someone_else():
    """Be a user whom the permissions of files bind, as they do not bind root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only():
    """A folder that anyone may read and nobody may write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def test_a_folder_of_runs_may_be_there_or_not_but_must_be_a_folder(folder):
    for name in ("folder.csv", "new", "new/below/it"):
        assert read_parameters({"runs_dir": name}) == {"runs_dir": name}
    reasons = {
        "empty.csv": "'empty.csv' is a file, not a folder",
        "empty.csv/below": "'empty.csv' is a file, not a folder",
        "loop.csv": "its links go round in a loop",
        "dangling.csv": "it is a link to nothing, not a folder",
        "/".join(["long"] * 810): "it is too long for the names of the files in it",
    }
    for name, reason in reasons.items():
        assert refusal_of("runs_dir", name).endswith(f"; {reason}")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["folder.csv", "empty.csv", "binary.csv", "zeros.csv", "loop.csv", "dangling.csv"]
    )


def test_a_folder_that_cannot_be_made_is_refused_and_one_to_read_only_is_taken(read_only):
    with someone_else():
        assert read_parameters({"runs_dir": read_only}) == {"runs_dir": str(read_only)}
        message = refusal_of("runs_dir", read_only / "new")
    assert "it does not exist, and " in message and message.endswith(" is not writable")


def test_a_folder_that_may_not_be_read_is_refused(read_only):
    if os.geteuid():
        read_only.chmod(0o000)
    else:
        read_only.chmod(0o700)
    with someone_else():
        assert refusal_of("runs_dir", read_only).endswith("; it may not be read")


# What is made from the table.


def cell_of(notebook: str) -> str:
    """The cell of parameters of a notebook."""
    cells = json.loads((FOLDER / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    [cell] = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return "".join(cell["source"])


def test_every_notebook_and_every_parameter_are_in_the_tables():
    assert sorted(NOTEBOOKS) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    assert {name for names in NOTEBOOKS.values() for name in names} == set(TABLE)
    for parameter in TABLE.values():
        assert all(parameter.name in NOTEBOOKS[notebook] for notebook in parameter.defaults)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_cell_of_parameters_of_a_notebook_is_the_one_that_the_table_makes(notebook):
    """To make it again: `python -m dlk_utils.lab.parameters`."""
    assert cell_of(notebook) == parameters_cell(notebook)


def test_the_table_of_the_readme_is_the_one_that_the_table_of_parameters_makes():
    assert f"\n{parameters_table()}\n" in (TOP / "README.md").read_text(encoding="utf-8")


# As a user meets it.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "parameters", "expected"),
    [
        ("04_extract_grads", {"check_rows": -1}, "check_rows: expected a whole number from 1"),
        ("06_detect", {"statements": "none.txt"}, "statements: expected a list of texts, the path"),
    ],
)
def test_a_notebook_shows_a_bad_value_without_frames_and_runs_nothing(
    notebook, parameters, expected, tmp_path
):
    runs = tmp_path / "runs"
    out = tmp_path / "out.ipynb"
    done = run(papermill(notebook, out, runs_dir=runs, **parameters))
    assert done.returncode != 0 and not runs.exists()
    error = done.stderr[done.stderr.index("Exception encountered") :]
    assert f"ParameterError: {expected}" in error and len(error.splitlines()) < 10
    assert "Traceback" not in text_outputs(out) and "dlk_utils/" not in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "name"), [("02_check_lie_rate", "compare"), ("10_headlines", "plain")]
)
def test_a_further_model_without_a_tokenizer_is_refused_before_any_model_runs(
    notebook, name, tmp_path
):
    bare, runs = tmp_path / "bare", tmp_path / "runs"
    checkpoint_that_knows_nothing(bare)
    for path in bare.glob("*token*"):
        path.unlink()
    shown = run_cells(notebook, **{name: str(bare), "runs_dir": str(runs)})
    assert "ModelError" in shown.error and "it has no tokenizer" in shown.error
    assert not runs.exists()


@pytest.mark.slow
def test_a_notebook_takes_a_list_of_data_sets_from_papermill(tmp_path):
    runs = tmp_path / "runs"
    command = papermill("01_make_dataset", tmp_path / "out.ipynb", n_examples=8, runs_dir=runs)
    done = run([*command, "-y", "datasets: [cities, categories]"])
    assert done.returncode == 0, done.stderr[-2000:]
    [prompts] = runs.glob("01-prompts-*.parquet")
    assert set(pd.read_parquet(prompts).dataset) == {"cities", "categories"}


@pytest.mark.slow
def test_a_finished_run_is_shown_without_a_file_written(tmp_path):
    """So it can be shown from a folder that may only be read."""
    model = checkpoint_that_knows_nothing(tmp_path / "model")
    runs = tmp_path / "runs"
    options = {"model": model, "n_examples": 16, "n_grid": 4, "compare": "", "runs_dir": runs}
    command = papermill("02_check_lie_rate", tmp_path / "out.ipynb", **options)
    states = []
    for _ in range(2):
        done = run(command)
        assert done.returncode == 0, done.stderr[-2000:]
        states.append({path: path.stat().st_mtime_ns for path in [runs, *runs.rglob("*")]})
    assert states[0] == states[1]


def test_one_data_set_under_two_names_is_refused(folder):
    for other in ("./empty.csv", "link.csv", str(folder / "empty.csv")):
        Path("link.csv").unlink(missing_ok=True)
        Path("link.csv").symlink_to("empty.csv")
        message = refusal_of("datasets", ["empty.csv", other])
        assert "; this is one file under two names, 'empty.csv' and " in message


@pytest.mark.parametrize("name", ["model", "datasets", "runs_dir", "statements", "compare", "card"])
def test_a_tilde_is_the_home_folder_in_every_path(name, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "here").mkdir()
    (folder / "claims.csv").write_text("statement,label\n", encoding="utf-8")
    path = "claims.csv" if name in ("datasets", "statements") else "here"
    assert read_parameters({name: f"~/{path}"}) == {name: str(folder / path)}


def test_an_address_of_the_web_is_no_missing_file():
    assert "web addresses are not read" in refusal_of("datasets", "https://example.org/a.csv")
