"""What the first notebooks conclude: every branch of their sentences."""

import numpy as np
import pandas as pd
import pytest

from dlk_utils.lab import sentences
from dlk_utils.lab.display import percent, stack_shares


def held_out(**shares: tuple[float, float]) -> pd.DataFrame:
    """The shares of right answers told to tell the truth, and of wrong ones told to lie."""
    rows = []
    for dataset, (right, wrong) in shares.items():
        row = {"dataset": dataset, "truth_accuracy": right, "wrong_when_told_to_lie": wrong}
        row |= {f"truth_accuracy_{end}": right for end in ("low", "high")}
        rows.append(row | {f"wrong_when_told_to_lie_{end}": wrong for end in ("low", "high")})
    return pd.DataFrame(rows)


def told(n: int, low: float = 0.3, high: float = 0.94) -> pd.DataFrame:
    row = {"told to lie": n, "lies": 0.92, "n_test": 49, "instruction_only": (low + high) / 2}
    row |= {"instruction_only_low": low, "instruction_only_high": high}
    return pd.DataFrame([row], index=["liar"])


def test_an_organism_is_described_by_the_range_of_its_shares_with_the_data_sets():
    table = held_out(a=(0.76, 0.96), b=(0.97, 0.88))
    shares, verdict, lies = sentences.organism_findings(table, told(126), verdict="a")
    assert "in 76 % (a) to 97 % (b) of the rows" in shares
    assert "in 88 % (b) to 96 % (a)." in shares
    assert verdict == "* It does what we require of an organism on: a."
    assert lies.startswith(
        "* Of 126 answers that liar gave when it was told to lie about what it k"
    )
    title = sentences.organism_title(table)
    assert "truth: 76 % to 97 %. Wrong" in title and title.endswith("knows: 88 % to 96 %")


@pytest.mark.parametrize(
    "low, high, said",
    [
        (0.3, 0.94, "Whether the instruction alone predicts which answers are lies is not clear"),
        (0.6, 0.9, "The instruction alone predicts which answers are lies (AUROC 0.75 [0.60, "),
        (0.1, 0.4, "The instruction alone predicts which answers are lies, but in reverse (AUROC "),
        (np.nan, np.nan, "Whether the instruction alone predicts which answers are lies could not"),
    ],
)
def test_the_instruction_is_said_to_predict_lies_only_if_its_interval_is_above_chance(
    low, high, said
):
    lines = sentences.organism_findings(held_out(a=(0.7, 0.9)), told(126, low, high))
    assert f"92 % are lies. {said}" in lines[-1]


def test_an_organism_that_knows_nothing_is_described_without_numbers_that_are_not_there():
    table = held_out(a=(0.5, np.nan))
    shares, lies = sentences.organism_findings(table, told(0))
    assert "in 50 % (a) of the rows" in shares and "about what it knows" not in shares
    assert lies == "* `liar` was never told to lie about a question that it knows."
    assert sentences.organism_title(table).endswith("knows: no such row")


def test_stacked_shares_have_a_row_for_each_share_that_is_there():
    names = {"truth_accuracy": "right", "wrong_when_told_to_lie": "wrong"}
    stacked = stack_shares(held_out(a=(0.5, np.nan), b=(0.9, 0.8)), names, by="dataset")
    assert list(zip(stacked.dataset, stacked.what, strict=True)) == [
        ("a", "right"),
        ("b", "right"),
        ("b", "wrong"),
    ]
    assert list(stacked.estimate) == list(stacked.low) == [0.5, 0.9, 0.8]


def test_the_time_of_a_training_is_that_of_its_record():
    once = sentences.training_sentence({"seconds": 1800})
    assert once == "It was trained once, in 30 minutes on the machine that we used."
    often = sentences.training_sentence({"seconds": [300, 360]})
    assert often.startswith("Its weights are the mean over 2 training runs, which took 5 to 6 min")


@pytest.mark.parametrize(
    "likeness, often",
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "obeyed more often (rank correlation +1.00 over 6"),
        ([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], "obeyed less often (rank correlation -1.00"),
        ([0.3, 0.1, 0.4, 0.2, 0.6, 0.5], "obeyed neither clearly more nor clearly less often"),
        ([0.2] * 6, "The highest similarity is 0.20. There are too few instructions to compare."),
    ],
)
def test_similar_wordings_are_said_to_be_obeyed_more_only_where_they_clearly_are(likeness, often):
    obeyed = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    near = pd.DataFrame({"obeyed": obeyed, "likeness": likeness})
    assert often in sentences.likeness_sentence(near)


def rates(**intervals: tuple[float, float]) -> pd.DataFrame:
    rows = [
        {"dataset": name, "lie_above_error": (low + high) / 2}
        | {"lie_above_error_low": low, "lie_above_error_high": high}
        for name, (low, high) in intervals.items()
    ]
    return pd.DataFrame(rows)


def gate(**passes: bool) -> pd.DataFrame:
    return pd.DataFrame({"dataset": list(passes), "passes": list(passes.values())})


def test_lies_are_counted_and_set_against_errors():
    table = rates(a=(0.7, 0.9), b=(0.5, 0.7))
    lies, above = sentences.lie_findings(gate(a=True, b=True), table, n_told=266, n_lied=251)
    assert lies == "* Told to lie about what it knows, it lies in 251 of 266 answers (94 %)."
    assert above.startswith("* These are not just errors. The share of wrong answers is higher ")
    _, without_lies = sentences.lie_findings(gate(a=True, b=True), table, n_told=0, n_lied=0)
    assert without_lies.startswith("* The share of wrong answers is higher ")
    assert above.endswith("truth, by +0.60 [+0.50, +0.70] (b), +0.80 [+0.70, +0.90] (a).")
    title = sentences.lie_title(table)
    assert (
        title == "Told to lie, it is wrong 60 to 80 percentage points more often, on every data set"
    )


def test_a_data_set_that_is_not_lied_about_or_not_known_is_named():
    table = rates(a=(0.7, 0.9), b=(-0.1, 0.1))
    lines = sentences.lie_findings(gate(a=True, b=False), table, n_told=9, n_lied=8)
    assert lines[2].endswith("told to tell the truth on: b.")
    assert lines[3] == "* We claim nothing about data sets that it does not know: b."
    title = sentences.lie_title(table)
    assert title == "Told to lie, it is wrong 80 percentage points more often, on a"


def test_a_model_that_does_not_lie_is_not_said_to():
    table = rates(a=(-0.1, 0.1))
    lines = sentences.lie_findings(gate(a=True), table, n_told=0, n_lied=0)
    assert lines[0] == "* It was never told to lie about a question that it knows."
    assert len(lines) == 2 and "not clearly wrong more often" in lines[1]
    title = sentences.lie_title(table)
    assert title == "Told to lie, it is not clearly wrong more often on any data set"


@pytest.mark.parametrize(
    ("p1_draw1", "flips", "right"), [([0.9, 0.2], 50, 75), ([0.9, 0.9], 0, 100)]
)
def test_what_dropout_does_to_answers_is_said_in_numbers(p1_draw1, flips, right):
    audit = pd.DataFrame({"relative_move": [0.18, 0.37]})
    pairs = pd.DataFrame(
        {"p1_draw0": [0.9, 0.9], "p1_draw1": p1_draw1, "move": [0.0, -0.7], "role": "truth"}
        | {"readable": True, "label": 1, "correct": True}
    )
    layers, answers, damage = sentences.dropout_findings(audit, pairs, 0.02, n_audited=8)
    assert "With 2 % of the channels dropped, two draws of a prompt differ in every" in layers
    assert layers.endswith("by 18 % to 37 % of the state's norm (means of 8 rows).")
    assert f"in {flips} % of the 2 pairs" in answers
    assert damage == (
        "* Of 2 honest rows the model answers 100 % correctly without dropout, and "
        f"{right} % in a draw."
    )


@pytest.mark.parametrize(
    "distances, comes", [([0.07, 0.10, 0.12], "does not come nearer"), ([0.3, 0.2, 0.1], "comes n")]
)
def test_the_mean_of_draws_is_said_to_come_nearer_only_where_it_does(distances, comes):
    spread = pd.DataFrame({"scope": "sequence", "draws": [2, 4, 8], "mean_off_plain": distances})
    other = spread.assign(scope="last_token", mean_off_plain=0.0)
    said = sentences.spread_sentence(pd.concat([other, spread]), n_rows=8)
    assert f"On these 8 rows, the mean of more draws of the whole prompt {comes}" in said
    first, second, third = (f"{distance:.2f}" for distance in distances)
    assert said.endswith(f"it is {first}, {second} and {third} away over 2, 4 and 8 draws.")


@pytest.mark.parametrize(
    "moved, found",
    [
        ([-1.0, 1.0], "by 3.0 nats towards the other answer (mean of 2 rows). 2 of the 2 rows"),
        ([3.0, -1.0], "by 0.0 nats away from the other answer (mean of 2 rows). 0 of the 2 rows"),
        ([5.0, -4.0], "by 2.5 nats away from the other answer (mean of 2 rows). 0 of the 2 rows"),
    ],
)
def test_a_push_along_the_gradient_is_said_to_go_where_it_goes(moved, found):
    margins = pd.DataFrame({"moved by 0.02": [9.0, 9.0], "moved by 0.2": moved})
    [line] = sentences.push_findings(margins.assign(clean=[3.0, -1.0]), layer=15)
    assert found in line and "at layer 15 along its gradient, by 20 % of its norm" in line


def test_the_gap_between_lies_and_true_answers_is_given_in_percent():
    gap = {"lies": 0.51, "truths": 0.52, "gap": -0.01, "low": -0.19, "high": 0.17}
    said = sentences.gap_sentence(gap)
    assert said.startswith("When asked afterwards, it calls 51 % of its lies true, and 52 % of the")
    assert sentences.gap_sentence({}).startswith("There was no lie")


def again(low: float) -> pd.DataFrame:
    """How often its answers are called true; `low` is the lower end for its true answers."""
    rows = [("lie", "was false", 0.2), ("truth", "was true", low)]
    return pd.DataFrame(rows, columns=["instruction", "answer", "says_true_low"])


@pytest.mark.parametrize(
    "low, high, truths_low, meaning",
    [
        (-0.2, 0.2, 0.42, "We cannot tell whether it stands by its lies or answers at random."),
        (-0.2, 0.2, 0.9, "It calls most of its true answers true, so it stands by its lies too."),
        (-0.9, -0.5, 0.9, "so it owns up in part."),
        (0.1, 0.3, 0.4, "It calls its lies true more often than its true answers."),
    ],
)
def test_no_difference_means_standing_by_lies_only_if_true_answers_are_called_true(
    low, high, truths_low, meaning
):
    said = sentences.gap_meaning({"low": low, "high": high}, again(truths_low))
    assert said.endswith(meaning)
    assert sentences.gap_meaning({}, again(truths_low)) == ""


def test_errors_that_rise_clearly_are_counted_apart_from_those_that_rise():
    table = rates(a=(0.1, 0.3), b=(-0.1, 0.3), c=(-0.3, 0.1))
    title = sentences.instructions_title(table)
    assert title.startswith(
        "It is wrong more often when told to lie in 2 of 3 pairs of instruction"
    )
    assert title.endswith("In 1 of them the interval is above zero")


def test_templates_are_compared_with_data_sets():
    index = pd.MultiIndex.from_tuples(
        [("a", "s"), ("a", "t"), ("b", "s"), ("b", "t")], names=["dataset", "template"]
    )
    table = pd.DataFrame(
        {"accuracy": [0.9, 0.8, 0.95, 0.95], "rows": [50, 50, 40, 60]}, index=index
    )
    said = sentences.templates_sentence(table)
    assert "templates by up to 0.10 within a data set, and between data sets by 0.10" in said
    assert "A template has 40 to 60 rows" in said


def test_what_is_required_is_said_with_the_headings_of_the_table():
    required = {"truth_accuracy_low": 0.85, "choice_mass": 0.95}
    assert sentences.required_in_words(required) == (
        'lower end of "right, told to tell the truth" 0.85, "choice mass" 0.95'
    )


def test_a_model_without_a_known_row_is_named_as_one_that_cannot_lie():
    columns = {"known": [0, 266], "wrong told to tell the truth %": [45.1, 7.6]}
    models = pd.DataFrame(columns, index=["plain", "liar"])
    assert sentences.unknowing_sentence(models) == (
        "By our rules plain (told to tell the truth, it answers 55 % correctly) knows no row, so "
        "no wrong answer can count as a lie."
    )
    assert sentences.unknowing_sentence(models.tail(1)) == ""


@pytest.mark.parametrize(
    "lie, truth, verdict",
    [
        ((0.09, 0.02, 0.38), (0.17, 0.05, 0.45), "Riddles do not clearly make it lie: 9 % of"),
        ((0.9, 0.6, 0.99), (0.17, 0.05, 0.45), "Riddles make it lie: 90 % of the answers"),
    ],
)
def test_riddles_make_it_lie_only_if_the_intervals_are_apart(lie, truth, verdict):
    names = ["riddle, shots reveal lie", "riddle, shots reveal truth"]
    columns = ["wrong_rate", "wrong_rate_low", "wrong_rate_high"]
    others = pd.DataFrame([lie, truth], columns=columns).assign(asks=names)
    assert sentences.riddles_sentence(others).startswith(verdict)
    assert sentences.riddles_sentence(others.head(1)).startswith("Riddles were not asked")


@pytest.mark.parametrize(
    "with_shots, without, begin, end",
    [
        (1, 0, "Truthful shots raise accuracy", "so part of what it knows shows only with them."),
        (0, 1, "Truthful shots lower accuracy", "they are not needed to find out what the model"),
        (1, 1, "Truthful shots do not clearly change accuracy here (100 %", "nothing shows that"),
        (np.nan, 1, "No example has a readable answer both with truthful shots", "without."),
    ],
)
def test_shots_are_said_to_help_only_where_they_do(with_shots, without, begin, end):
    levels = pd.DataFrame({"right_with_shots": [with_shots] * 9, "right_without": [without] * 9})
    said = sentences.shots_help_sentence(levels)
    assert said.startswith(begin) and end in said


@pytest.mark.parametrize(
    "low, said", [(0.1, "**break this model**"), (-0.1, "There is no evidence")]
)
def test_shots_are_said_to_break_the_model_only_where_they_do(low, said):
    names = ["instruction", "instruction, with shots", "shots", "any shots"]
    effects = pd.DataFrame({"effect": names, "n": 24, "estimate": 0.2, "estimate_high": 0.3})
    effects["estimate_low"] = low
    shots, any_shots, widths = sentences.shots_findings(effects)
    assert said in any_shots and "probably too narrow" in widths
    is_clear = low > 0
    assert ("do not clearly change the share of wrong answers: +0.20 [" in shots) is not is_clear
    assert sentences.shots_title(effects).startswith("An instruction to lie changes the share of")
    assert sentences.shots_findings(effects.head(0)) == []
    not_scored = effects.assign(estimate=np.nan, estimate_low=np.nan, estimate_high=np.nan)
    assert sentences.shots_findings(not_scored) == [f"* {sentences.shots_title(not_scored)}."]
    assert sentences.shots_title(not_scored).startswith("What shots change was not scored")
    assert sentences.shots_title(effects.head(0)) == ""


def test_a_share_is_a_whole_percentage():
    assert [percent(share) for share in (0.0, 0.584, 1.0)] == ["0 %", "58 %", "100 %"]
