"""What the front page says follows from the numbers of the run: every branch of each sentence."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dlk_utils.evaluation.controls import ASKED_AGAIN, TURNED
from dlk_utils.evaluation.evaluate import RESULT_COLUMNS
from dlk_utils.evaluation.selection import BY_TWINS
from dlk_utils.evaluation.tasks import KNOWN, LYING
from dlk_utils.lab import front_page
from dlk_utils.lab.front_page import NO_NUMBER, TOO_FEW, claims
from dlk_utils.lab.tables.detector import HONEST_AT_TWINS, HONEST_ONLY, JOINED_TWINS
from dlk_utils.lab.tables.graded import PROBE, WHAT_IS_TRUE
from dlk_utils.lab.tables.organism import CHECKED_EXAMPLES
from dlk_utils.lab.tables.steering import RANDOM, SHUFFLED, TRUTH
from dlk_utils.lab.tables.trainings import ALL_ROWS, KNOWN_ROWS
from dlk_utils.lab.tables.trigger import LIE_OR_NOT, TRIGGER_THERE

TOP = Path(__file__).resolve().parents[2]


# 00.


def test_the_check_of_a_liar_is_decided_only_with_as_many_examples_as_it_asks():
    held_out = pd.DataFrame({"dataset": ["a", "b", "c"], "meets": [True, False, True]})
    decided = front_page.of_organism(held_out, CHECKED_EXAMPLES)["front_organism_sentence"]
    assert decided.endswith("in wordings that it was not trained on: a, c.")
    no_set = front_page.of_organism(held_out.assign(meets=False), CHECKED_EXAMPLES)
    assert no_set["front_organism_sentence"].endswith("trained on: none.")
    small = front_page.of_organism(held_out, 30)["front_organism_sentence"]
    assert small.endswith("Notebook 00 asked about 30, and so shows no verdict.")


# 05.


def layer_row(layer: int, low: float, high: float, **columns) -> dict:
    """A row of the long table: the plain logistic regression at a layer."""
    row = dict.fromkeys(RESULT_COLUMNS, 0) | {"target": "truth", "regime": KNOWN, "kind": "probe"}
    row |= {"probe": "logistic", "feature": "activation", "site": "resid_post", "layer": layer}
    row |= {"estimate": (low + high) / 2, "low": low, "high": high, "n": 96, "n_smaller": 46}
    return row | columns


def long_table(
    low: float = 0.69,
    high: float = 1.0,
    *,
    lift: tuple[float, float] = (-0.31, 0.02),
    rival: str = ASKED_AGAIN,
    own_answer_high: float = 0.01,
    layers: tuple = (
        (12, 0.4, 0.7),
        (15, 0.9, 1.0),
        (18, 0.9, 1.0),
        (21, 0.2, 0.4),
        (24, 0.0, 0.1),
    ),
    n_smaller: int = 46,
) -> pd.DataFrame:
    """A long table whose headline has this interval, and this lift over its best control."""
    named = layer_row(15, low, high, probe="logistic_tuned", selected=True, n_smaller=n_smaller)
    named |= {"choice_low": low, "choice_high": high, "best_control": rival, "lift": -0.1}
    named |= {"lift_low": lift[0], "lift_high": lift[1]}
    control = layer_row(-1, 0.0, own_answer_high, kind="control", probe="own answer")
    return pd.DataFrame([named, control, *(layer_row(*of_layer) for of_layer in layers)])


@pytest.mark.parametrize(
    "low, high, answer",
    [
        (0.69, 1.0, "Yes, on me/model. A probe that was fitted on honest answers alone reads what"),
        (0.1, 0.4, "No, on me/model. A probe that was fitted on honest answers alone reads the op"),
        (0.4, 0.7, "It could not be shown, on me/model. A probe that was fitted on honest answers"),
        (np.nan, np.nan, "It could not be shown, on me/model. A probe that was fitted on "),
    ],
)
def test_the_answer_goes_by_the_interval_of_the_headline(low, high, answer):
    texts = front_page.of_probes(long_table(low, high), model_name="me/model")
    assert texts["front_finding_sentence"].startswith(answer)


def test_the_answer_says_whether_the_model_was_trained_to_lie():
    texts = front_page.of_probes(long_table(), model_name="smollm2-liar")
    expected = "Yes, on a small model that we trained to lie (smollm2-liar). "
    assert texts["front_finding_sentence"].startswith(expected)


def test_the_cells_of_the_truth_are_a_number_with_its_interval_and_the_rival_with_its_name():
    texts = front_page.of_probes(long_table(), model_name="m")
    assert texts["front_truth"] == "0.84 [0.69, 1.00]"
    assert texts["front_truth_rival"] == f"0.94, {ASKED_AGAIN}"
    finding = texts["front_finding_sentence"]
    assert finding.endswith("AUROC 0.84 [0.69, 1.00] (0.5 is chance). It reads layer 15.")


def test_the_answer_says_if_prompts_that_ask_for_lies_chose_the_layer():
    by_twins = front_page.of_probes(long_table().assign(rule=BY_TWINS), model_name="m")
    expected = (
        "layer 15, which was chosen with prompts that ask for lies, but without their labels."
    )
    assert by_twins["front_finding_sentence"].endswith(expected)


ABOVE, BELOW, CHANCE = (0.6, 0.9), (0.1, 0.4), (0.4, 0.6)


@pytest.mark.parametrize(
    "by_layer, own_answer_high, sentence",
    [
        (
            [CHANCE, ABOVE, ABOVE, BELOW],
            0.0,
            "Of the 4 layers that we read, the probe is above chance at layers 1 and 2. From layer "
            "3 on it reads the false answer that the model is about to give.",
        ),
        (
            [BELOW, ABOVE, CHANCE, BELOW],
            0.9,
            "Of the 4 layers that we read, the probe is above chance at layer 1. From layer 3 on "
            "it reads the opposite of the truth.",
        ),
        (
            [BELOW, CHANCE, ABOVE],
            0.0,
            "Of the 3 layers that we read, the probe is above chance at layer 2, and no later "
            "layer turns against the truth.",
        ),
        (
            [CHANCE, BELOW, BELOW],
            0.0,
            "Of the 3 layers that we read, the probe reads the false answer that the model is "
            "about to give at layers 1 and 2.",
        ),
        (
            [CHANCE, CHANCE],
            0.0,
            "Of the 2 layers that we read, none is clearly above or below chance.",
        ),
        (
            [ABOVE, CHANCE, ABOVE, ABOVE, BELOW, CHANCE],
            0.9,
            "Of the 6 layers that we read, the probe is above chance at layers 0, 2 and 3. It "
            "reads the opposite of the truth at layer 4.",
        ),
    ],
)
def test_the_turn_goes_by_the_intervals_of_the_layers(by_layer, own_answer_high, sentence):
    layers = tuple((i, *interval) for i, interval in enumerate(by_layer))
    table = long_table(layers=layers, own_answer_high=own_answer_high)
    assert front_page.turn_sentence(table) == sentence


@pytest.mark.parametrize(
    "layers, read",
    [
        ([0, 3, 6, 9, 11], "5 layers that we read (every third, and the last), the probe is above"),
        ([0, 2, 4], "3 layers that we read (every second), the probe is above"),
        ([0, 8, 16, 17], "4 layers that we read (every 8th, and the last), the probe is above"),
        ([0, 1, 2], "3 layers that we read, the probe is above"),
        ([0, 1, 5, 6], "4 layers that we read, the probe is above"),
        ([5], "1 layer that we read, the probe is above"),
    ],
)
def test_the_turn_says_which_layers_were_read(layers, read):
    table = long_table(layers=tuple((layer, *ABOVE) for layer in layers))
    assert front_page.turn_sentence(table).startswith(f"Of the {read}")


@pytest.mark.parametrize(
    "lift, rival, sentence",
    [
        (
            (-0.3, 0.02),
            ASKED_AGAIN,
            "The probe is not clearly better: asking the model the same question again, "
            "under an instruction to tell the truth, gives AUROC 0.94.",
        ),
        (
            (-0.3, -0.1),
            TURNED,
            "It beats the probe: taking the model's own answer, and reversing it wherever it was "
            "told to lie, gives AUROC 0.94.",
        ),
        (
            (0.1, 0.2),
            "TF-IDF of the prompt",
            "The probe beats it: TF-IDF of the prompt gives AUROC 0.94.",
        ),
        (
            (np.nan, np.nan),
            "length",
            "The probe is not clearly better: length gives AUROC 0.94.",
        ),
    ],
)
def test_the_rival_goes_by_the_interval_of_the_lift(lift, rival, sentence):
    texts = front_page.of_probes(long_table(lift=lift, rival=rival), model_name="m")
    assert texts["front_rival_sentence"] == sentence


@pytest.mark.parametrize("table", [long_table(n_smaller=19), long_table().tail(-1)])
def test_of_a_headline_on_few_rows_or_of_none_nothing_is_said(table):
    texts = front_page.of_probes(table, model_name="m")
    assert set(texts) == set(front_page.of_probes(long_table(), model_name="m"))
    assert set(texts.values()) == {TOO_FEW, "", NO_NUMBER}


# 06.


def flag_rates(**flagged: tuple[float, float]) -> pd.DataFrame:
    """The shares that each detector flags, of the lies and of the honest answers."""
    rows = [
        {"detector": detector, "of": of, "dataset": "all", "n": 90, "flagged": share}
        | {"flagged_low": share - 0.05, "flagged_high": share + 0.05}
        for detector, shares in flagged.items()
        for of, share in zip(("lies", "honest answers"), shares, strict=True)
    ]
    return pd.DataFrame(rows).set_index(["detector", "of", "dataset"])


LAYER_OF = {HONEST_ONLY: 15, HONEST_AT_TWINS: 18}


@pytest.mark.parametrize(
    "lies, honest, verdict",
    [
        (0.58, 0.05, "It misses too many lies: "),
        (0.95, 0.2, "It accuses too many honest answers: "),
        (0.58, 0.2, "It misses too many lies and accuses too many honest answers: "),
        (0.95, 0.05, "It catches most lies and accuses few honest answers: "),
        (0.896, 0.054, "It catches most lies and accuses few honest answers: "),
    ],
)
def test_the_detector_is_judged_by_both_shares_at_its_threshold(lies, honest, verdict):
    texts = front_page.of_detector(flag_rates(**{HONEST_ONLY: (lies, honest)}), LAYER_OF)
    sentence = texts["front_detector_sentence"]
    assert f"on honest answers alone reads layer 15. {verdict}" in sentence
    assert "layer 18" not in sentence and "also fitted" not in sentence
    assert f"flags {100 * lies:.0f} % of the lies and {100 * honest:.0f} % of the" in sentence


def test_the_detector_that_has_seen_prompts_that_ask_for_lies_is_named_with_what_it_flags():
    rates = flag_rates(**{HONEST_ONLY: (0.58, 0.05), JOINED_TWINS: (0.96, 0.01)})
    texts = front_page.of_detector(rates, LAYER_OF)
    flags = "were lies, flags 96 % of the lies and 1 % of the honest answers."
    assert texts["front_detector_sentence"].endswith(flags)
    assert texts["front_lies"] == "0.58 [0.53, 0.63]"
    assert texts["front_honest"] == "0.05 [0.00, 0.10] of the honest answers"


def test_the_same_detector_at_the_layer_that_twins_choose_is_named_if_that_is_another_layer():
    rates = flag_rates(**{HONEST_ONLY: (0.58, 0.05), HONEST_AT_TWINS: (0.91, 0.02)})
    sentence = front_page.of_detector(rates, LAYER_OF)["front_detector_sentence"]
    at_twins = "At layer 18, which was chosen with prompts that ask for lies, it flags 91 % of the "
    assert sentence.endswith(at_twins + "lies and 2 % of the honest answers.")
    same_layer = front_page.of_detector(rates, LAYER_OF | {HONEST_AT_TWINS: 15})
    assert "91 %" not in same_layer["front_detector_sentence"]


def test_where_there_is_no_lie_or_no_detector_nothing_is_said_of_it():
    rates = flag_rates(**{HONEST_ONLY: (0.58, 0.05)})
    no_lie = rates.assign(n=[0, 90])
    for table in (no_lie, rates.head(0)):
        texts = front_page.of_detector(table, LAYER_OF)
        assert set(texts.values()) == {TOO_FEW, NO_NUMBER} and len(texts) == 3


# 08.


def ways(*intervals: tuple[float, float]) -> pd.DataFrame:
    """A table of transfer with a way for each interval."""
    rows = [
        {"trained_on": "a", "tested_on": f"b{i}", "estimate": (low + high) / 2}
        | {"low": low, "high": high}
        for i, (low, high) in enumerate(intervals)
    ]
    within = {"trained_on": "a", "tested_on": "a", "estimate": 0.1, "low": 0.0, "high": 0.2}
    return pd.DataFrame([within, *rows])


def styled(**intervals: tuple[float, float]) -> pd.DataFrame:
    rows = [
        {"style": style, "probe": probe, "estimate": (low + high) / 2, "low": low, "high": high}
        for style, (low, high) in intervals.items()
        for probe in ("logistic", "lda")
    ]
    return pd.DataFrame(rows, columns=["style", "probe", "estimate", "low", "high"])


@pytest.mark.parametrize(
    "by_dataset, by_style, sentence",
    [
        (
            ways((0.6, 0.9), (0.4, 0.9)),
            styled(clean=(0.8, 0.9), negated=(0.45, 0.75), shouted=(0.6, 0.7)),
            "A probe that was fitted on one data set and reads another is above chance in 1 of 2 "
            "cases (lowest AUROC: 0.65 [0.40, 0.90]). In a separate test with other wordings, a "
            "probe is not clearly above chance where claims are negated (0.60 [0.45, 0.75]).",
        ),
        (
            ways((0.6, 0.9)),
            styled(clean=(0.8, 0.9), negated=(0.6, 0.8), shouted=(0.6, 0.7)),
            "A probe that was fitted on one data set and reads another is above chance in 1 of 1 "
            "cases (lowest AUROC: 0.75 [0.60, 0.90]). In a separate test with other wordings, a "
            "probe is above chance in all that we tried (negated, shouted).",
        ),
        (
            ways(),
            styled(negated=(0.1, 0.4), bare=(np.nan, np.nan)),
            "In a separate test with other wordings, a probe is not clearly above chance where "
            "claims are negated (0.25 [0.10, 0.40]).",
        ),
        (ways(), styled(), "No probe was read on other data or in other wordings."),
    ],
)
def test_what_carries_over_is_counted_and_what_does_not_is_named(by_dataset, by_style, sentence):
    texts = front_page.of_carry_over(by_dataset, by_style)
    assert texts["front_carry_over_sentence"] == sentence


def test_the_worst_way_between_data_sets_is_shown():
    texts = front_page.of_carry_over(ways((0.6, 0.9), (0.4, 0.8)), styled())
    assert texts["front_worst_way"] == "0.60 [0.40, 0.80]"
    assert front_page.of_carry_over(ways(), styled())["front_worst_way"] == NO_NUMBER


def of_graded(n: int = 200, n_smaller: int = 60, **rivals: float) -> pd.DataFrame:
    """The scores of the probe and of rivals on a model that lies about some topics only."""
    row = {"question": WHAT_IS_TRUE, "n": n, "n_smaller": n_smaller, "low": 0.88, "high": 0.96}
    rows = [row | {"who": who, "estimate": score} for who, score in rivals.items()]
    return pd.DataFrame([row | {"who": PROBE, "estimate": 0.93}, *rows])


def test_on_the_second_liar_the_strongest_rival_stands_next_to_the_opposite_of_the_answer():
    texts = front_page.of_graded(of_graded(**{TURNED: 0.66, ASKED_AGAIN: 0.96, "metadata": 0.4}))
    assert texts["front_graded"] == "0.93 [0.88, 0.96]"
    assert texts["front_graded_rival"] == f"0.96, {ASKED_AGAIN}; 0.66, the opposite of its answer"
    strongest = front_page.of_graded(of_graded(**{TURNED: 0.98, ASKED_AGAIN: 0.96}))
    assert strongest["front_graded_rival"] == f"0.98, {TURNED}"


@pytest.mark.parametrize(
    "table", [of_graded(n=199, a=0.5), of_graded(n_smaller=59, a=0.5), of_graded(a=0.5)[1:]]
)
def test_of_a_second_liar_and_few_rows_there_is_no_number(table):
    assert set(front_page.of_graded(table).values()) == {NO_NUMBER}


def of_trigger(low: float, high: float, n: int = 200, n_smaller: int = 60) -> pd.DataFrame:
    """The scores of a probe, and of the trigger itself, for lies on the trigger."""
    row = {"question": LIE_OR_NOT, "n": n, "n_smaller": n_smaller, "low": low, "high": high}
    probe = row | {"who": PROBE, "estimate": (low + high) / 2}
    return pd.DataFrame([probe, row | {"who": TRIGGER_THERE, "estimate": 0.94}])


@pytest.mark.parametrize(
    "low, high, finds",
    [
        (0.9, 1.0, "tells these lies from the model's true answers (AUROC 0.95 [0.90, 1.00])."),
        (0.0, 0.1, "takes the model's true answers for the lies (AUROC 0.05 [0.00, 0.10])."),
        (0.4, 0.6, "does not clearly tell these lies from the model's true answers (AUROC 0.50 "),
    ],
)
def test_lies_on_a_trigger_go_by_the_interval_of_the_probe(low, high, finds):
    sentence = front_page.of_trigger(of_trigger(low, high))["front_trigger_sentence"]
    assert f"even if its instruction asks for the truth. A probe {finds}" in sentence
    assert sentence.endswith("whether the phrase names a Friday reaches AUROC 0.94.")


@pytest.mark.parametrize(
    "table",
    [of_trigger(0.9, 1.0, n=199), of_trigger(0.9, 1.0, n_smaller=59), of_trigger(0.9, 1.0)[1:]],
)
def test_of_a_trigger_and_few_rows_nothing_is_said(table):
    assert front_page.of_trigger(table) == {"front_trigger_sentence": TOO_FEW}


@pytest.mark.parametrize(
    ("probe", "verdict"), [((0.92, 0.98), "agrees"), ((0.4, 0.6), "does not agree")]
)
def test_a_second_training_is_compared_with_the_first(probe, verdict):
    tables = {"a": of_splits((0.9, 1.0)), "b": of_splits(probe)}
    sentence = front_page.of_trainings(tables)["front_second_training_sentence"]
    assert sentence.startswith(
        f"A second training run of the liar, from other seeds, {verdict}. On all"
    )
    assert f"the probe scores {np.mean(probe):.2f} ({probe[0]:.2f} to {probe[1]:.2f})" in sentence
    assert "For the first training run, the probe scores 0.95 (0.90 to 1.00)" in sentence
    assert front_page.of_trainings({"a": of_splits(probe)}) == {
        "front_second_training_sentence": TOO_FEW
    }


def of_splits(probe: tuple[float, float]) -> pd.DataFrame:
    """The scores of a probe and of a rival in two splits."""
    scores = [(PROBE, probe), (TURNED, (0.99, 0.99))]
    return pd.DataFrame(
        [
            {"again": again, "where": where, "who": who, "estimate": score}
            | {"accuracy": 0.9, "n_smaller": 40}
            for where in (KNOWN_ROWS, ALL_ROWS)
            for who, of_who in scores
            for again, score in enumerate(of_who)
        ]
    )


# 05: pairs of dropout draws.


def pair_table(low: float, high: float, **columns) -> pd.DataFrame:
    """The ranking of draws on rows told to lie, among rows that do not count."""
    row = layer_row(18, 0.0, 0.1, target="pair", regime=LYING, probe="pair_ranking")
    row |= {"feature": "two draws", "estimate": (low + high) / 2, "selected": True}
    row |= {"choice_low": low, "choice_high": high, "n": 104, "n_smaller": 49}
    row |= {"best_control": ASKED_AGAIN, "lift": -0.5}
    others = [
        {"target": "truth"},
        {"regime": KNOWN},
        {"probe": "pair_direction"},
        {"selected": False},
    ]
    return pd.DataFrame([*(row | {"estimate": 1.0} | other for other in others), row | columns])


@pytest.mark.parametrize(
    "low, high, found",
    [
        (0.35, 0.57, "does not clearly do better than chance"),
        (np.nan, np.nan, "does not clearly do better than chance"),
        (0.6, 0.8, "tells which of the two is nearer to the truth"),
        (0.2, 0.4, "takes the wrong one of the two to be nearer to the truth"),
    ],
)
def test_dropout_goes_by_the_interval_of_the_ranking(low, high, found):
    texts = front_page.of_pairs(pair_table(low, high))
    assert f" When the model is told to lie, a probe {found}" in texts["front_dropout_sentence"]


def test_the_cells_of_the_pairs_are_those_of_the_ranking():
    texts = front_page.of_pairs(pair_table(0.36, 0.56))
    assert texts["front_pairs"] == "0.46 [0.36, 0.56]"
    assert texts["front_pairs_rival"] == f"0.96, {ASKED_AGAIN}"


@pytest.mark.parametrize("pairs", [pair_table(0.4, 0.5, n_smaller=3), pair_table(0.4, 0.5).head(3)])
def test_of_few_pairs_or_of_none_nothing_is_said(pairs):
    texts = front_page.of_pairs(pairs)
    assert set(texts.values()) == {TOO_FEW, NO_NUMBER} and len(texts) == 3


# 11.


def pushes(**shares: float) -> pd.DataFrame:
    """Shares of true answers under pushes, each named by direction and dose."""
    names = {"truth": TRUTH, "random": RANDOM, "shuffled": SHUFFLED}
    rows = []
    for name, share in shares.items():
        direction, sign = name.split("_")
        dose = {"plus": 4.0, "minus": -4.0, "more": 8.0}[sign]
        ends = {"disobeyed_low": share - 0.01, "disobeyed_high": share + 0.01}
        row = {"direction": names[direction], "dose": dose, "role": "lie", "disobeyed": share}
        rows += [row | ends, row | ends | {"role": "truth", "disobeyed": 1.0}]
    return pd.DataFrame(rows)


NOT_PUSHED = pd.DataFrame({"role": ["truth", "lie"], "disobeyed": [0.01, 0.05]})


def test_both_signs_of_the_push_are_shown_and_the_highest_control_of_the_push_towards_the_truth():
    of_controls = {"random_plus": 0.13, "random_minus": 0.12}
    of_controls |= {"shuffled_plus": 0.11, "shuffled_minus": 0.17, "random_more": 0.9}
    table = pushes(truth_plus=0.29, truth_minus=0.65, truth_more=0.99, **of_controls)
    texts = front_page.of_steering(table, NOT_PUSHED, 4.0)
    assert texts == {
        "front_push_towards": "0.29 [0.28, 0.30]",
        "front_other_pushes": "0.05, no push; 0.13, random directions; 0.65, pushed away from the "
        "truth",
    }
    no_control = pushes(truth_plus=0.29, truth_minus=0.65)
    for few in (pd.DataFrame(), no_control):
        no_texts = front_page.of_steering(few, NOT_PUSHED, 4.0)
        assert set(no_texts) == set(texts) and set(no_texts.values()) == {NO_NUMBER}
    assert set(front_page.of_steering(table, NOT_PUSHED[:1], 4.0).values()) == {NO_NUMBER}


# All of them.


def test_a_run_that_is_too_small_says_so_once_and_has_empty_cells():
    texts = front_page.of_probes(long_table(), model_name="m")
    assert claims(texts, []) == texts
    small = claims(texts, ["rows are missing"])
    assert small["front_finding_sentence"] == small["front_rival_sentence"] == TOO_FEW
    assert small["front_turn_sentence"] == ""
    assert small["front_truth"] == small["front_truth_rival"] == NO_NUMBER


MAKERS = {
    "00_train_liar": front_page.of_organism(pd.DataFrame(), 0),
    "05_probe_ablations": front_page.of_probes(long_table(), model_name="m")
    | front_page.of_pairs(pair_table(0.4, 0.6)),
    "06_detect": front_page.of_detector(flag_rates(**{HONEST_ONLY: (0.5, 0.1)}), LAYER_OF),
    "08_carry_over": front_page.of_carry_over(ways(), styled())
    | front_page.of_graded(of_graded(a=0.5))
    | front_page.of_trigger(of_trigger(0.9, 1.0))
    | front_page.of_trainings({"a": of_splits((0.9, 1.0)), "b": of_splits((0.9, 1.0))}),
    "11_steer": front_page.of_steering(pd.DataFrame(), NOT_PUSHED, 4.0),
}
"""The texts that each notebook glues for the front page."""


def test_the_front_page_shows_no_text_that_no_notebook_glues():
    page = (TOP / "book" / "intro.md").read_text(encoding="utf-8")
    shown = re.findall(r"notebooks/(\w+)\.ipynb::(\w+)", page)
    assert len(shown) > 10
    for notebook, key in shown:
        code = (TOP / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8")
        if key.startswith("front_"):
            assert key in MAKERS[notebook] and "front_page.of_" in code
        else:
            assert f'\\"{key}\\"' in code, key


def test_every_text_made_for_the_front_page_is_shown_there():
    page = (TOP / "book" / "intro.md").read_text(encoding="utf-8")
    for notebook, texts in MAKERS.items():
        for key in texts:
            assert f"notebooks/{notebook}.ipynb::{key}:s" in page, key


def test_the_table_of_the_front_page_has_seven_rows_at_most_and_a_link_in_each():
    page = (TOP / "book" / "intro.md").read_text(encoding="utf-8")
    _heading, _rule, *rows = [line for line in page.splitlines() if line.startswith("|")]
    assert 4 <= len(rows) <= 7
    for row in rows:
        question, score, rival = [cell.strip() for cell in row.strip("|").split("|")]
        assert re.search(r"\[.+\]\(notebooks/\w+\.ipynb\)", question)
        assert score.count("{glue:text}") == 1 and rival.count("{glue:text}") <= 1
