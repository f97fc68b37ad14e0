"""Two runs share a file only if everything that decides its content is equal."""

import inspect
from dataclasses import replace

import numpy as np
import pytest

from dlk_utils.extract import batches as extract
from dlk_utils.extract import store
from dlk_utils.lab import run as asking
from dlk_utils.lab.run import STAGES, Run

BASE = Run(model="smollm2", datasets="capitals", n_examples=12)


@pytest.mark.trap(31)
@pytest.mark.parametrize(
    "change",
    [
        {"model": "smollm2-graded"},
        {"datasets": "categories"},
        {"n_examples": 24},
        {"seed": 1},
        {"n_shots": 2},
        {"dtype": "float32"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_each_parameter_that_decides_the_content_is_in_the_name_of_the_file(change):
    for stage, options in (("prompts", {}), ("answers", {}), ("grid", {"n_examples": 24})):
        assert replace(BASE, **change).path(stage, **options) != BASE.path(stage, **options)
    assert (
        replace(BASE, runs_dir="elsewhere").path("answers").name
        == replace(BASE, engine="ray").path("answers").name
        == BASE.path("answers").name
    )


@pytest.mark.trap(31)
def test_what_other_rules_asked_or_read_is_another_file(monkeypatch):
    before = {stage: BASE.path(stage) for stage in ("prompts", "answers", "line", "kept")}
    monkeypatch.setattr(asking, "code_hash", lambda: "of another version")
    assert all(BASE.path(stage) != path for stage, path in before.items())


OPTIONS = {
    "draws": ({}, [{"p": 0.1}, {"n_draws": 4}, {"scope": "last_token"}, {"layers": (0, 1)}]),
    "gradients": ({}, []),
    "counterfactual": ({"at": 1}, [{"at": 2}, {"step": 0.2}]),
    "weight_gradients": ({}, [{"layers": (0, 1)}]),
    "styled": ({"style": "bare"}, [{"style": "shouted"}, {"layers": (0, 1)}]),
}


@pytest.mark.trap(31)
@pytest.mark.parametrize("stage", OPTIONS)
def test_each_option_of_a_stage_is_in_the_name_of_its_store(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(
        store, "is_complete", lambda folder: True
    )  # each stage finds its store there, and says where
    monkeypatch.setattr(extract, "read_rows", lambda folder, rows, name: np.zeros((len(rows), 2)))
    run = replace(BASE, runs_dir=str(tmp_path))
    vars(run).update(scored=run.prompts[run.prompts.role != "known"], asked=run.prompts)
    plain, changes = OPTIONS[stage]
    stores = [getattr(run, stage)(**plain | change) for change in [{}, *changes]]
    assert len({s[1] if stage == "styled" else s for s in stores}) == 1 + len(changes)
    assert {k for change in changes for k in change} == set(
        inspect.signature(getattr(Run, stage)).parameters
    ) - {"self"}


def test_an_option_of_a_stage_does_not_stand_in_for_the_runs_own_parameter_of_that_name():
    # a grid over 24 examples of a run of 120 was once read as that of a run of 24
    grids = {
        replace(BASE, n_examples=n).path("grid", n_examples=k) for n in (12, 24) for k in (12, 24)
    }
    assert len(grids) == 4


def test_each_stage_has_a_name_of_its_own():
    assert len(set(STAGES.values())) == len(STAGES)
