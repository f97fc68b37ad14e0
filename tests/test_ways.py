"""The ways in: papermill on the real notebooks and the real model, as a user would call it."""

import pytest

from notebooks import papermill, run, said

STAGES = [
    "01_make_dataset",
    "02_check_lie_rate",
    "03_extract",
    "04_extract_grads",
    "05_probe_ablations",
]
SMALL = {
    "02_check_lie_rate": {"n_grid": 4},
    "03_extract": {"audit_rows": 4},
    "05_probe_ablations": {"layer_stride": 10},
}


def test_forty_statements_of_ones_own_go_through_all_five_notebooks(tmp_path):
    """With 40 rows and a model that does not know them there is little to say; each notebook must say so and end well."""
    capitals = [
        "Paris",
        "Rome",
        "Madrid",
        "Vienna",
        "Athens",
        "Oslo",
        "Cairo",
        "Lima",
        "Tokyo",
        "Ottawa",
    ]
    lands = [
        "France",
        "Italy",
        "Spain",
        "Austria",
        "Greece",
        "Norway",
        "Egypt",
        "Peru",
        "Japan",
        "Canada",
    ]
    rows = [
        f'"{capitals[(i + k) % 10]} is the capital of {lands[i]}{", <b>they</b> say" if k == 1 else ""}.",{int(k == 0)}'
        for i in range(10)
        for k in (0, 1, 2)
    ]
    rows += [f"{lands[i]} is a country.,1" for i in range(10)]
    own = tmp_path / "own.csv"
    own.write_text("\n".join(["statement,label", *rows]), encoding="utf-8")
    assert len(rows) == 40
    for stage in STAGES:
        done = run(
            papermill(
                stage,
                tmp_path / f"{stage}.ipynb",
                model="smollm2",
                datasets=own,
                runs_dir=tmp_path / "runs",
                **SMALL.get(stage, {}),
            )
        )
        assert done.returncode == 0, done.stderr[-2000:]
    found = said(tmp_path / "05_probe_ablations.ipynb")
    assert (
        "skipped: lie" in found and "expected of each class at least" in found
    )  # nothing that it does not know can be lied about
    assert "none of these numbers is a claim" in found


def test_a_model_that_needs_a_hub_ends_with_a_short_error_and_a_failing_exit_code(tmp_path):
    done = run(
        papermill("03_extract", tmp_path / "out.ipynb", model="starchat-beta", runs_dir=tmp_path),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode != 0
    error = done.stderr[done.stderr.index("Exception encountered") :]
    assert (
        "cannot load model 'starchat-beta'" in error
        and "HuggingFaceH4/starchat-beta" in error
        and "smollm2" in error
    )
    assert len(error.splitlines()) < 10


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"modle": "smollm2"}, "did you mean 'model'"),
        ({"datasets": "rotten_tomatos"}, "rotten_tomatoes"),
    ],
)
def test_bad_parameters_are_refused_and_nothing_is_written(tmp_path, parameters, words):
    done = run(
        papermill(
            "01_make_dataset",
            tmp_path / "out.ipynb",
            **{"runs_dir": tmp_path / "runs"} | parameters,
        )
    )
    assert done.returncode != 0
    assert words in done.stderr[done.stderr.index("Exception encountered") :]
    assert not (tmp_path / "runs").exists()
