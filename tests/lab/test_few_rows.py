"""What a run has too few rows for is said in sentences, and then nothing is claimed."""

import pandas as pd
import pytest

from dlk_utils.lab.few_rows import (
    TOO_FEW,
    claim,
    conclusions,
    missing_rows,
    show_missing,
    skipped_lines,
)
from dlk_utils.lab.run import Run

SPLITS = ("train", "train", "train", "test", "test", "validation")


def a_run(
    n: int, *, labels: tuple[int, ...] = (0, 1), readable: bool = True, n_examples: int = 200
) -> Run:
    """A run of `n` examples, each with a row told to tell the truth and one told to lie."""
    examples = pd.DataFrame(
        {
            "dataset": "d",
            "example_id": [f"e{i}" for i in range(n)],
            "split": [SPLITS[i // 2 % 6] for i in range(n)],
            "label": [labels[i % len(labels)] for i in range(n)],
        }
    )
    prompts = pd.concat([examples.assign(role=role) for role in ("truth", "lie")])
    answers = prompts.assign(readable=readable, mass=0.9 if readable else 0.001)
    shot = pd.DataFrame([{"dataset": "d", "example_id": "s", "split": "shot", "label": 0}])
    return with_tables(
        Run(n_examples=n_examples),
        examples=pd.concat([examples, shot]),
        prompts=prompts,
        answers=answers,
        truth_rows=answers[answers.readable],
    )


def with_tables(run: Run, **tables: pd.DataFrame) -> Run:
    """Give a run tables, so that it need not compute them."""
    vars(run).update(tables)
    return run


def test_with_enough_rows_nothing_is_printed_and_every_claim_stands(capsys):
    missing = show_missing(a_run(60))
    assert missing == [] and capsys.readouterr().out == ""
    assert claim("it lies", missing) == "it lies"
    assert conclusions(["* one", "* two"], missing) == "* one\n* two"
    assert conclusions([], missing) == "* Nothing was scored."


def test_of_twelve_examples_it_says_what_each_split_lacks_and_how_many_more_it_takes(capsys):
    missing = show_missing(a_run(12))
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "Too few rows for a claim: this page claims nothing."
    splits, more = missing
    assert "train: 5 more of class 0, 4 more of class 1 (it has 3 and 3 rows" in splits
    assert "validation: 1 more of class 0, 1 more of class 1" in splits
    assert "test: 2 more of class 0, 2 more of class 1" in splits
    # five times two labels in one half of the examples
    assert more.startswith("About 20 more examples would do") and "add about 24 rows" in more
    assert claim("it lies", missing) == TOO_FEW
    assert "* one" not in conclusions(["* one"], missing)


def test_where_the_data_set_has_more_it_says_which_n_examples_to_ask_for():
    *_, more = missing_rows(a_run(12, n_examples=12))
    assert more == "About 20 more examples would do: n_examples = 32 instead of 12."


def test_before_the_model_is_asked_the_prompts_are_counted():
    run = a_run(12, readable=False)
    assert "these rows are missing" in missing_rows(run, answered=False)[0]
    [sentence] = missing_rows(run)
    assert sentence.startswith("None of 24 answers is readable")
    assert "at least 5% of the probability" in sentence and "over the rows is 0.1%" in sentence


def test_one_label_is_named_with_how_many_of_the_other_it_takes():
    [one] = missing_rows(a_run(60, labels=(1,)))
    assert one.startswith("d: all 60 examples have the label 1.")
    assert one.endswith("add as many of label 0 (60).")


def test_where_more_rows_do_not_help_the_page_gives_the_real_reason_once(capsys):
    for options, reason in (
        ({"readable": False}, "no answer of the model is readable"),
        ({"labels": (1,)}, "a data set has examples of one label only"),
    ):
        missing = show_missing(a_run(60, **options))
        printed = capsys.readouterr().out
        end = conclusions(["* one"], missing)
        assert printed.lower().startswith(f"{reason}: this page claims nothing.")
        assert claim("it lies", missing) == reason and f"**Nothing is claimed**: {reason}." in end
        assert "oo few rows" not in printed + end
        assert skipped_lines(["a: too few", "b: too few"], missing) == [
            f"skipped: 2 tasks, as {reason}"
        ]
    assert skipped_lines(["a: too few"], missing_rows(a_run(12))) == ["skipped: a: too few"]
    assert skipped_lines(["a: too few"], []) == ["skipped: a: too few"]


def test_a_page_without_probes_needs_no_rows_of_the_main_task():
    assert missing_rows(a_run(12), probes=False) == []
    assert missing_rows(a_run(12, labels=(1,)), probes=False)


def test_a_data_set_without_a_shot_is_named_and_keeps_nothing_from_being_claimed(capsys):
    run = a_run(60)
    with_tables(run, examples=run.examples[run.examples.split != "shot"])
    assert show_missing(run) == []
    assert "d: no row fell into the pool of shots" in capsys.readouterr().out


@pytest.mark.parametrize("split", SPLITS[::2])
def test_a_split_without_rows_is_said(split):
    run = a_run(60)
    with_tables(run, truth_rows=run.truth_rows[run.truth_rows.split != split])
    assert f"{split}: " in missing_rows(run)[0] and "it has 0 and 0 rows" in missing_rows(run)[0]


def test_a_page_of_scores_takes_more_test_rows():
    assert missing_rows(a_run(60)) == []
    splits, more = missing_rows(a_run(60), scored=True)
    assert "test: 10 more of class 0, 10 more of class 1" in splits and "train" not in splits
    assert "About 59 more examples" in more
    assert missing_rows(a_run(120), scored=True) == []
