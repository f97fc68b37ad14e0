"""Two runs share a file only if everything that decides its content is equal."""

from dataclasses import replace

import pytest

from dlk_utils.run import STAGES, Run

BASE = Run(model="smollm2", datasets="capitals", n_examples=12)


@pytest.mark.trap(31)
@pytest.mark.parametrize("change", [{"model": "smollm2-graded"}, {"datasets": "categories"}, {"n_examples": 24}, {"seed": 1}, {"n_shots": 2}, {"dtype": "float32"}], ids=lambda c: next(iter(c)))
def test_each_parameter_that_decides_the_content_is_in_the_name_of_the_file(change):
    for stage, options in (("prompts", {}), ("answers", {}), ("grid", {"n_examples": 24})):
        assert replace(BASE, **change).path(stage, **options) != BASE.path(stage, **options)
    assert replace(BASE, runs_dir="elsewhere").path("answers").name == replace(BASE, engine="ray").path("answers").name == BASE.path("answers").name


def test_an_option_of_a_stage_does_not_stand_in_for_the_runs_own_parameter_of_that_name():
    # a grid over 24 examples of a run of 120 was once read as that of a run of 24
    grids = {replace(BASE, n_examples=n).path("grid", n_examples=k) for n in (12, 24) for k in (12, 24)}
    assert len(grids) == 4


def test_each_stage_has_a_name_of_its_own():
    assert len(set(STAGES.values())) == len(STAGES)
