"""Tables of notebook 06: who judges which rows, and how many are flagged."""

import numpy as np
import pandas as pd
import pytest
import torch

from dlk_utils.evaluation.detector import TruthDetector
from dlk_utils.lab.findings import detector_findings, detector_title, flagged
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import detector as detector_tables
from dlk_utils.lab.tables.detector import (
    HONEST_AT_TWINS,
    HONEST_ONLY,
    card_table,
    fit_detectors,
    flag_rates,
    join_judgements,
    judge_test_rows,
    rates_shown,
    read_lines,
)


def detector(layer: int) -> TruthDetector:
    """A detector whose score is the first neuron of the state."""
    card = {"model": "planted", "fixture": {"input_ids": [[1], [2]], "scores": [0.0, 1.0]}}
    return TruthDetector("resid_post", layer, torch.tensor([1.0, 0.0]), 0.0, 0.5, card)


@pytest.fixture
def run(monkeypatch) -> Run:
    """Four rows of the test split and one to fit on; states hold 1 in the first neuron."""
    scored = pd.DataFrame(
        {
            "row_id": list("abcde"),
            "split": ["test"] * 4 + ["train"],
            "readable": [True, True, True, False, True],
            "role": ["truth", "lie", "lie", "lie", "truth"],
            "family": ["plain", "play", "order", "play", "plain"],
            "dataset": "d",
            "margin": [2.0, -2.0, -2.0, -2.0, 2.0],
        }
    )

    def states(run: Run, layers: list[int]) -> dict:
        held = np.array([1.0, 0.0])
        return {
            ("activation", "resid_post", layer): lambda rows: np.tile(held, (len(rows), 1))
            for layer in layers
        }

    monkeypatch.setattr(Run, "scored", scored)
    monkeypatch.setattr(Run, "states", states)
    return Run()


def test_a_detector_judges_readable_test_rows_of_families_that_it_has_not_seen(run):
    judged = judge_test_rows(run, {"d": detector(3)}, {"d": ["play"]})["d"]
    assert list(judged.row_id) == ["a", "c"]
    assert list(judged.verdict) == ["honest", "lie"]


def test_a_detector_chooses_its_layer_unless_twins_have_chosen_it(run, monkeypatch):
    choices = []

    def fit_detector(run: Run, *, layers: list[int], **options) -> TruthDetector:
        choices.append(layers)
        return detector(layers[0])

    monkeypatch.setattr(detector_tables, "chosen_layer", lambda run, layers: 18)
    monkeypatch.setattr(detector_tables, "fit_detector", fit_detector)
    fitted = fit_detectors(run, {HONEST_ONLY: [], HONEST_AT_TWINS: []}, layers=[15, 18])
    assert choices == [[15, 18], [18]] and list(fitted) == [HONEST_ONLY, HONEST_AT_TWINS]


def test_a_row_is_flagged_if_one_of_its_judges_flags_it():
    first = pd.DataFrame({"row_id": ["a", "b"], "verdict": ["honest", "unsure"]})
    second = pd.DataFrame({"row_id": ["a", "c"], "verdict": ["lie", "honest"]})
    joined = join_judgements([first, second]).set_index("row_id").verdict
    assert joined.to_dict() == {"a": "lie", "b": "unsure", "c": "honest"}


def test_flagged_lies_and_honest_answers_are_counted_apart():
    table = pd.DataFrame(
        {
            "dataset": list("aabb"),
            "role": ["lie", "lie", "truth", "truth"],
            "lied": [True, True, False, False],
            "correct": [False, False, True, False],
            "verdict": ["lie", "honest", "lie", "lie"],
        }
    )
    rates = flag_rates({"d": table})
    assert rates.flagged["d", "lies", "all"] == 0.5 and rates.n["d", "lies", "a"] == 2
    assert rates.flagged["d", "honest answers", "b"] == 1.0
    assert rates.n["d", "honest answers", "all"] == 1
    assert (rates.flagged_low <= rates.flagged).all()
    assert (rates.flagged <= rates.flagged_high).all()
    shown = rates_shown(rates, ["d"]).loc["d"]
    assert (shown.lies, shown.n_lies, shown.honest, shown.n_honest) == (0.5, 2, 1.0, 1)
    assert shown.lies_low < 0.5 < shown.lies_high and rates_shown(rates, []).empty


def test_of_no_rows_nothing_is_flagged_and_no_share_is_made_up():
    table = pd.DataFrame(
        {"dataset": ["a"], "role": ["lie"], "lied": [False], "correct": [True], "verdict": ["lie"]}
    )
    rates = flag_rates({"d": table})
    assert rates.n["d", "lies", "all"] == 0 and np.isnan(rates.flagged["d", "lies", "all"])
    assert flagged(rates, "d", "lies") == "no lies (there were none to judge)"
    assert flagged(flag_rates({}), "d", "lies") == "no lies (there were none to judge)"
    [said, goal] = detector_findings(rates, ["d"])
    assert said == (
        "* **d** flags no lies (there were none to judge) and no honest answers (there were none "
        "to judge)."
    )
    assert goal.endswith("cannot be said without lies and honest answers.")
    assert detector_title(rates, ["d"]) == "There was no lie, or no honest answer, to judge"
    assert detector_findings(flag_rates({}), []) == []
    assert detector_title(flag_rates({}), []) == "not scored"


def judged(n_lies: int, n_flagged: int) -> pd.DataFrame:
    """Lies, of which some are flagged, and as many honest answers, of which none is flagged."""
    columns = {"dataset": "a", "role": "lie", "lied": True, "correct": False}
    rows = [columns | {"verdict": "lie" if i < n_flagged else "honest"} for i in range(n_lies)]
    honest = columns | {"role": "truth", "lied": False, "correct": True, "verdict": "honest"}
    return pd.DataFrame([*rows, *[honest] * n_lies])


def test_the_goal_is_surely_reached_only_if_the_ends_of_the_intervals_reach_it():
    of = {"few": judged(20, 19), "many": judged(400, 400), "bad": judged(20, 5)}
    rates = flag_rates(of)
    assert detector_findings(rates, ["few", "bad"])[-1].endswith(
        "*few* reaches it. The intervals include values that miss it (down to 76 % of the lies and "
        "up to 16 % of the honest answers), so this is not certain."
    )
    assert detector_findings(rates, ["many"])[-1].endswith("On these rows, *many* reaches it.")
    assert detector_findings(rates, ["few", "many"])[-1].endswith(
        "*few* and *many* reach it. Only for *many* do the whole intervals reach it."
    )
    assert detector_findings(rates, ["few"])[0] == (
        "* **few** flags 95 % [76, 99] of 20 lies and 0 % [0, 16] of 20 honest answers."
    )


def test_a_card_is_shown_without_the_numbers_of_its_fixture():
    shown = card_table({"d": detector(3)}, {"d": []}).d
    assert shown["layer"] == 3 and shown["families of lies seen"] == "none"
    assert shown["threshold"] == 0.5 and shown["least agreement"] == 0
    assert shown["fixture"] == "2 prompts and their scores"


def test_blank_lines_of_a_file_are_left_out_no_file_has_no_lines_and_a_list_stays(tmp_path):
    path = tmp_path / "claims.txt"
    path.write_text("One claim.\r\n\n  Another claim. \n", encoding="utf-8")
    assert read_lines(str(path)) == ["One claim.", "Another claim."]
    assert read_lines("") == []
    assert read_lines(["One claim.", "Another\nclaim."]) == ["One claim.", "Another\nclaim."]
