"""Where there is nothing to show, every notebook ends well, says why, and claims nothing."""

from pathlib import Path

import pandas as pd
import pytest
from notebook_cells import NOTEBOOKS, run_cells
from tiny_models import checkpoint_that_knows_nothing
from transformers import AutoModelForCausalLM

from dlk_utils.lab.few_rows import NOTHING_READABLE, ONE_LABEL, TOO_FEW
from dlk_utils.questions.ids import near_duplicate_key
from dlk_utils.questions.subjects import split_by_subject

pytestmark = pytest.mark.slow

# A tiny model has so few channels that a small share of them may be none.
DRAWS = {"p_dropout": 0.2, "p_last": 0.3, "n_draws": 4}
PARAMETERS = {
    "01_make_dataset": {},
    "02_check_lie_rate": {"n_grid": 4, "compare": ""},
    "03_extract": {"audit_rows": 4, "p_dropout": 0.2},
    "04_extract_grads": {},
    "05_probe_ablations": {"p_dropout": 0.2},
    "06_detect": {},
    "07_traps": {},
    "08_carry_over": {"graded": "", "trigger": "", "retrained": ""},
    "09_pairs_and_votes": DRAWS,
    "10_headlines": DRAWS | {"plain": ""},
    "11_steer": {},
    "12_explore": {"p_last": 0.3},
    "13_dropout_trial": DRAWS | {"n_prompt_draws": 4},
}
"""The notebooks of a model and its data; 00 asks its own organism."""
REASONS = {"no readable answer": NOTHING_READABLE, "one class": ONE_LABEL}
"""Why a run claims nothing, where that is not `TOO_FEW`."""
ENOUGH_TO_FIT = ("one data set", "twelve examples")
"""Runs whose rows are enough to fit probes, but too few to claim anything of their scores."""


def claims_file(path: Path, n: int, *, splits: set[str], labels: tuple[int, ...] = (0, 1)) -> str:
    """A file of `n` claims, all of them in some splits."""
    possible = pd.DataFrame({"text": [f"The hall has {number} doors." for number in range(1000)]})
    possible["near_duplicate_key"] = possible.text.map(near_duplicate_key)
    possible = possible.assign(kind="claim", choice_0="", choice_1="")
    texts = possible.text[split_by_subject(possible).split.isin(splits)].head(n)
    claims = [f'"{text}",{labels[i % len(labels)]}' for i, text in enumerate(texts)]
    path.write_text("\n".join(["statement,label", *claims]), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def answers_by_chance(tmp_path_factory) -> Path:
    return checkpoint_that_knows_nothing(tmp_path_factory.mktemp("by-chance"))


@pytest.fixture(scope="module")
def answers_nothing(tmp_path_factory, answers_by_chance) -> Path:
    """The same model, which never says a choice."""
    folder = tmp_path_factory.mktemp("nothing")
    checkpoint_that_knows_nothing(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[:, 0] *= -1
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run_of(request, tmp_path, answers_by_chance) -> dict:
    """The parameters of a run with nothing to show, by its name."""
    everywhere = {"shot", "train", "validation", "test"}
    path = tmp_path / "own.csv"
    name = request.param
    run = {"model": str(answers_by_chance), "datasets": "cities,categories"}
    if name == "no readable answer":
        return run | {"model": str(request.getfixturevalue("answers_nothing")), "n_examples": 24}
    if name == "twelve examples":
        return run | {"n_examples": 12}
    if name == "one data set":
        # 12 training rows of two classes, which 15 neighbours cannot be found among
        return run | {"datasets": "cities", "n_examples": 26}
    options = {
        "one class": {"n": 30, "splits": everywhere, "labels": (1,)},
        "an own file of twelve rows, none of them a shot": {
            "n": 12,
            "splits": everywhere - {"shot"},
        },
        "no test row": {"n": 30, "splits": {"shot", "train", "validation"}},
        "no validation row": {"n": 30, "splits": {"shot", "train", "test"}},
    }
    return run | {"datasets": claims_file(path, **options[name]), "n_examples": 96}


@pytest.mark.parametrize(
    "run_of",
    [
        "no readable answer",
        "one class",
        "one data set",
        "twelve examples",
        "an own file of twelve rows, none of them a shot",
        "no test row",
        "no validation row",
    ],
    indirect=True,
)
def test_every_notebook_ends_well_says_what_is_missing_and_claims_nothing(
    request, run_of, tmp_path
):
    notebooks = {path.stem for path in NOTEBOOKS.glob("*.ipynb")} - {"00_train_liar"}
    assert set(PARAMETERS) == notebooks
    for notebook, parameters in PARAMETERS.items():
        shown = run_cells(notebook, **run_of, **parameters, runs_dir=str(tmp_path / "runs"))
        assert shown.error == "", notebook
        assert "nan" not in " ".join(shown.cells).split(), notebook
        if notebook == "01_make_dataset" and "own.csv" not in run_of["datasets"]:
            continue  # there are enough prompts, though not enough answers
        if notebook == "07_traps":
            continue  # it claims nothing of the model
        if notebook == "04_extract_grads":
            continue  # what it says is of the gradients alone
        if notebook < "05" and request.node.callspec.id in ENOUGH_TO_FIT:
            continue
        [set_up] = [cell for cell in shown.cells if cell.startswith("dlk_utils ")]
        reason = REASONS.get(request.node.callspec.id, TOO_FEW)
        heading = reason[0].upper() + reason[1:]
        assert f"{heading}: this page claims nothing.\n- " in set_up, notebook
        nothing = f"* **Nothing is claimed**: {reason}. The first lines of this page say what it"
        assert any(f"{nothing} takes." in cell for cell in shown.cells), notebook
