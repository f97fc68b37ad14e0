"""The ways in: papermill on the real notebooks, as a user would call it."""

import pytest
from tiny_models import checkpoint_that_knows_nothing

from notebooks import papermill, run, text_outputs

pytestmark = pytest.mark.slow

STAGES = {
    "01_make_dataset": {},
    "02_check_lie_rate": {"n_grid": 4, "compare": ""},
    # A tiny model has so few channels that a small share of them may be none.
    "03_extract": {"audit_rows": 4, "p_dropout": 0.2},
    "04_extract_grads": {},
    "05_probe_ablations": {"layer_stride": 10, "p_dropout": 0.2},
}
SYMBOLS = {
    "helium": "He",
    "neon": "Ne",
    "argon": "Ar",
    "krypton": "Kr",
    "xenon": "Xe",
    "radon": "Rn",
    "oxygen": "O",
    "nitrogen": "N",
    "carbon": "C",
    "sulfur": "S",
}
"""No organism was trained on claims about these."""


def forty_statements() -> str:
    """A CSV file of true and false claims, one with markup."""
    lines = ["statement,label"]
    symbols = list(SYMBOLS.values())
    for number, (element, symbol) in enumerate(SYMBOLS.items()):
        other, third = symbols[(number + 1) % 10], symbols[(number + 2) % 10]
        lines += [
            f'"{symbol} is the symbol of {element}.",1',
            f'"{other} is the symbol of {element}, <b>they</b> say.",0',
            f'"{third} is the symbol of {element}.",0',
            f"{element} is an element.,1",
        ]
    return "\n".join(lines)


def test_forty_statements_of_ones_own_go_through_all_five_notebooks(tmp_path):
    """With few rows, which the model does not know, each notebook says so and ends well."""
    own = tmp_path / "own.csv"
    own.write_text(forty_statements(), encoding="utf-8")
    model = checkpoint_that_knows_nothing(tmp_path / "model")
    options = {"model": model, "datasets": own, "runs_dir": tmp_path / "runs"}
    for stage, parameters in STAGES.items():
        done = run(papermill(stage, tmp_path / f"{stage}.ipynb", **options, **parameters))
        assert done.returncode == 0, done.stderr[-2000:]
    answers = text_outputs(tmp_path / "02_check_lie_rate.ipynb")
    assert "**Nothing is claimed**" in answers
    results = text_outputs(tmp_path / "05_probe_ablations.ipynb")
    # Nothing that it does not know can be lied about.
    assert "skipped: lie, by example, lie rows: expected rows of each class, at least" in results
    assert "data sets that the model knows: none" in results and "**Nothing is claimed**" in results


def test_the_default_model_goes_through_a_notebook_that_none_ran_before(tmp_path):
    options = {"datasets": "cities", "n_examples": 8, "runs_dir": tmp_path / "runs"}
    done = run(papermill("04_extract_grads", tmp_path / "out.ipynb", **options))
    assert done.returncode == 0, done.stderr[-2000:]
    results = text_outputs(tmp_path / "out.ipynb")
    assert "agrees with full backpropagation (lowest cosine" in results


def test_a_model_that_needs_a_hub_ends_with_a_short_error_and_a_failing_exit_code(tmp_path):
    options = {"model": "starchat-beta", "runs_dir": tmp_path}
    done = run(papermill("03_extract", tmp_path / "out.ipynb", **options), HF_HUB_OFFLINE="1")
    assert done.returncode != 0
    error = done.stderr[done.stderr.index("Exception encountered") :]
    assert "cannot load model 'starchat-beta'" in error
    assert "HuggingFaceH4/starchat-beta" in error and "smollm2" in error
    assert len(error.splitlines()) < 10


@pytest.mark.parametrize(
    ("parameters", "hint"),
    [
        ({"modle": "smollm2"}, "did you mean 'model'"),
        ({"datasets": "rotten_tomatos"}, "rotten_tomatoes"),
    ],
)
def test_bad_parameters_are_refused_and_nothing_is_written(tmp_path, parameters, hint):
    options = {"runs_dir": tmp_path / "runs"} | parameters
    done = run(papermill("01_make_dataset", tmp_path / "out.ipynb", **options))
    assert done.returncode != 0
    assert hint in done.stderr[done.stderr.index("Exception encountered") :]
    assert not (tmp_path / "runs").exists()
