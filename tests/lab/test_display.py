"""What notebooks start with: parameters checked by name, prompts shown escaped, intervals as text."""

import re

import pandas as pd
import pytest

from dlk_utils.errors import ParameterError
from dlk_utils.lab.display import check_parameters, show_prompt, versions, with_intervals

OWN = '# parameters\nmodel = "smollm2"  # alias\nn_examples = 120  # per data set\nseed = 0  # of everything\n'
ROW = pd.Series(
    {
        "role": "lie",
        "instruction": "lie_spy",
        "template": "claim_yes",
        "choices": ["no", "yes"],
        "label": 1,
    }
)


def injected(*names: str) -> str:
    return "# Parameters\n" + "".join(f"{n} = 1\n" for n in names)


def test_parameters_that_the_notebook_has_are_accepted():
    check_parameters(["", OWN, injected("n_examples", "seed"), "x = 1"])
    check_parameters(["", OWN, injected()])
    check_parameters(["", OWN])
    check_parameters([])


def test_an_unknown_parameter_is_refused_with_the_nearest_name_and_all_names():
    with pytest.raises(ParameterError) as e:
        check_parameters(["", OWN, injected("seed", "n_example")])
    assert (
        str(e.value)
        == "unknown parameter 'n_example', did you mean 'n_examples'?; this notebook has model, n_examples, seed"
    )


def test_a_parameter_like_no_other_is_refused_without_a_guess():
    with pytest.raises(
        ParameterError, match="unknown parameter 'zzz'; this notebook has model, n_examples, seed"
    ):
        check_parameters(["", OWN, injected("zzz")])


def test_names_of_other_cells_are_no_parameters():
    with pytest.raises(ParameterError, match="'x'"):
        check_parameters(["", OWN, injected("x"), "x = 1"])
    check_parameters(["", "y = 2", OWN])


def test_a_prompt_is_shown_whole_and_escaped():
    tokens = ["<|im_start|>", "<script>", "alert('x')", "</script>", " &amp;", "\n", '"quoted"']
    html = show_prompt(ROW, tokens)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "&amp;amp;" in html and "&lt;|im_start|&gt;" in html
    assert html.count("<span") == len(tokens)
    assert set(re.findall(r"</?(\w+)", html)) == {"p", "b", "pre", "span", "br"}


def test_the_head_of_a_prompt_is_escaped_too():
    html = show_prompt(
        pd.Series(ROW.to_dict() | {"choices": ["<img src=x onerror=y>", "no"]}), ["a"]
    )
    assert "<img" not in html and "&lt;img" in html
    assert "lie_spy" in html and "claim_yes" in html and "1 tokens" in html


def test_intervals_become_one_column():
    t = pd.DataFrame(
        {"rate": [0.5, 0.25], "rate_low": [0.4, 0.126], "rate_high": [0.6, 0.374], "n": [10, 20]}
    )
    shown = with_intervals(t)
    assert list(shown.columns) == ["rate", "n"]
    assert list(shown.rate) == ["0.50\u00a0[0.40,\u00a00.60]", "0.25\u00a0[0.13,\u00a00.37]"]
    assert list(t.columns) == ["rate", "rate_low", "rate_high", "n"]
    estimates = pd.DataFrame({"estimate": [0.5], "low": [0.4], "high": [0.6]})
    assert with_intervals(estimates).to_dict("list") == {
        "estimate": ["0.50\u00a0[0.40,\u00a00.60]"]
    }


def test_versions_say_what_computes():
    import torch

    said = versions()
    assert (
        f"torch {torch.__version__}" in said
        and "dlk_utils " in said
        and len(said.splitlines()) == 1
    )
