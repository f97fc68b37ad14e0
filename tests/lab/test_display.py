"""What notebooks start with: parameters checked by name, prompts escaped, intervals as text."""

import re
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell

from dlk_utils.errors import DataError, ParameterError
from dlk_utils.lab.display import (
    check_parameters,
    describe_run,
    interval_text,
    percent,
    refusal,
    show_prompt,
    start,
    versions,
    with_intervals,
)

OWN = (
    '# parameters\nmodel = "smollm2"  # alias\nn_examples = 120  # per data set\nseed = 0  # seed\n'
)
NAMES = "this notebook has model, n_examples, seed"
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
    """The cell that papermill puts in."""
    return "# Parameters\n" + "".join(f"{name} = 1\n" for name in names)


def test_parameters_that_the_notebook_has_are_accepted():
    names = ["model", "n_examples", "seed"]
    assert check_parameters(["", OWN, injected("n_examples", "seed"), "x = 1"]) == names
    assert check_parameters(["", OWN, injected()]) == check_parameters(["", OWN]) == names
    assert check_parameters([]) == []


def test_an_unknown_parameter_is_refused_with_the_nearest_name_and_all_names():
    with pytest.raises(ParameterError) as error:
        check_parameters(["", OWN, injected("seed", "n_example")])
    expected = f"unknown parameter 'n_example', did you mean 'n_examples'?; {NAMES}"
    assert str(error.value) == expected


def test_a_parameter_like_no_other_is_refused_without_a_guess():
    with pytest.raises(ParameterError, match=f"unknown parameter 'zzz'; {NAMES}"):
        check_parameters(["", OWN, injected("zzz")])


def test_names_of_other_cells_are_no_parameters():
    with pytest.raises(ParameterError, match="'x'"):
        check_parameters(["", OWN, injected("x"), "x = 1"])
    check_parameters(["", "y = 2", OWN])


def test_a_table_shows_data_as_text_also_where_formulas_are_read(shell):
    html = pd.DataFrame({"<b>": ["$x$ <script>"]})._repr_html_()
    assert "<script" not in html and "<b>" not in html and "mathjax_ignore" in html


@pytest.fixture
def shell():
    """An IPython shell in which a notebook has started."""
    shell = InteractiveShell.instance()
    start([])
    yield shell
    InteractiveShell.clear_instance()
    for option in ("max_colwidth", "width", "max_columns", "precision", "html.use_mathjax"):
        pd.reset_option(f"display.{option}")


def test_only_errors_that_a_user_can_mend_are_shown_without_frames(shell, capsys):
    shell.run_cell("from dlk_utils.errors import StoreError\nraise StoreError('the disk is full')")
    assert capsys.readouterr().out.strip() == "StoreError: the disk is full"
    shell.run_cell("raise StoreError('/home/me/runs/a: the disk is full')")
    assert capsys.readouterr().out.strip() == "StoreError: a: the disk is full"
    shell.run_cell("1 / 0")
    assert "Traceback" in capsys.readouterr().out


def test_an_error_of_any_class_is_shown_within_a_screen(shell, capsys):
    shell.run_cell(
        "from dlk_utils.errors import CardError\nraise CardError('got ' + 'column,' * 50_000)"
    )
    shown = capsys.readouterr().out
    assert shown.startswith("CardError: got column,") and len(shown) < 2000


def test_a_notebook_that_starts_has_the_values_that_its_parameters_take(shell):
    cell = "# parameters\ndatasets = 'cities'  # names\ntrain = False  # again\nmine = 5  # my own"
    shell.user_ns |= {"datasets": ["cities", "imdb"], "train": "no", "mine": [5]}
    start(["", cell])
    values = {name: shell.user_ns[name] for name in ("datasets", "train", "mine")}
    assert values == {"datasets": "cities,imdb", "train": False, "mine": [5]}


def test_a_notebook_with_a_bad_value_does_not_start(shell):
    shell.user_ns["n_draws"] = 2.5
    with pytest.raises(ParameterError, match="n_draws: expected a whole number from 2 to"):
        start(["", "# parameters\nn_draws = 2  # draws"])


def test_a_prompt_is_shown_completely_and_escaped():
    tokens = ["<|im_start|>", "<script>", "alert('x')", "</script>", " &amp;", "\n", '"quoted"']
    html = show_prompt(ROW, tokens)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "&amp;amp;" in html and "&lt;|im_start|&gt;" in html
    assert html.count("<span") == len(tokens)
    assert set(re.findall(r"</?(\w+)", html)) == {"p", "b", "pre", "span", "br"}


def test_the_head_of_a_prompt_is_escaped_too():
    row = pd.Series(ROW.to_dict() | {"choices": ["<img src=x onerror=y>", "no"]})
    html = show_prompt(row, ["a"])
    assert "<img" not in html and "&lt;img" in html
    assert "lie_spy" in html and "claim_yes" in html and "1 tokens" in html


def test_an_estimate_is_written_with_its_interval():
    table = pd.DataFrame({"estimate": [0.5], "low": [-0.4], "high": [0.6], "n": [3]})
    assert interval_text(table.iloc[0]) == "0.50 [-0.40, 0.60]"
    [row] = table.rename(columns={"low": "estimate_low", "high": "estimate_high"}).itertuples()
    assert interval_text(row, signed=True) == "+0.50 [-0.40, +0.60]"
    assert interval_text({"gap": 0.1, "low": 0.0, "high": 0.2}, "gap") == "0.10 [0.00, 0.20]"


def test_intervals_become_one_column():
    table = pd.DataFrame(
        {"rate": [0.5, 0.25], "rate_low": [0.4, 0.126], "rate_high": [0.6, 0.374], "n": [10, 20]}
    )
    shown = with_intervals(table)
    assert list(shown.columns) == ["rate", "n"]
    assert list(shown.rate) == ["0.50\u00a0[0.40,\u00a00.60]", "0.25\u00a0[0.13,\u00a00.37]"]
    assert list(table.columns) == ["rate", "rate_low", "rate_high", "n"]
    estimates = pd.DataFrame({"estimate": [0.5], "low": [0.4], "high": [0.6]})
    assert list(with_intervals(estimates).columns) == ["estimate"]


@pytest.mark.parametrize("signed, text", [(True, "+0.01"), (False, "0.01")])
def test_what_rounds_to_zero_has_no_sign(signed, text):
    row = pd.Series({"lift": 0.003, "lift_low": -0.0004, "lift_high": 0.01})
    assert interval_text(row, "lift", signed=signed) == f"0.00 [0.00, {text}]"


def test_an_end_of_a_difference_that_rounds_to_zero_says_on_which_side_it_is():
    below = pd.Series({"estimate": -0.02, "low": -0.16, "high": -0.0025})
    assert interval_text(below, signed=True) == interval_text(below) == "-0.02 [-0.16, -0.003]"
    above = pd.Series({"estimate": 0.02, "low": 0.004, "high": 0.05})
    assert interval_text(above, signed=True) == "+0.02 [+0.004, +0.05]"
    share = pd.Series({"estimate": 0.02, "low": 0.004, "high": 0.05})
    assert interval_text(share) == "0.02 [0.00, 0.05]"


def test_what_computes_is_said_in_one_line():
    line = versions()
    # Not `torch.__version__`, which also names the build, such as "+cpu".
    assert f"torch {version('torch')}" in line and "dlk_utils " in line and "\n" not in line


def test_a_run_is_described_in_one_line():
    spec = SimpleNamespace(dtype="float32", quantization=None, revision="0123456789abcdef")
    line = describe_run(SimpleNamespace(model_name="mine", spec=spec))
    assert line == "model mine, float32, quantization None, revision 0123456789ab"


def test_a_guard_that_refuses_is_quoted_and_one_that_does_not_is_an_error(capsys):
    def refuse():
        raise DataError("expected rows, got none")

    refusal(refuse)
    assert capsys.readouterr().out == "DataError: expected rows, got none\n"
    with pytest.raises(AssertionError, match="nothing was refused"):
        refusal(lambda: None)


@pytest.mark.parametrize(
    "share", [0.576, np.float64(0.576), np.float32(0.576), np.mean([True, False])]
)
def test_a_share_of_any_kind_of_number_is_a_whole_percentage(share):
    assert percent(share) == f"{round(100 * float(share))} %"
