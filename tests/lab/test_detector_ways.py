"""Ways to make a detector, where the instruction to lie moves the scores, or tells on itself."""

import numpy as np
import pandas as pd
import pytest
from planted_states import read_from, twins

from dlk_utils.lab.findings import WAY_NAMES, way_lines
from dlk_utils.lab.tables import detector_ways
from dlk_utils.lab.tables.detector_ways import (
    BY_TWINS,
    DETECTORS,
    EARLIEST,
    SHIFTED,
    TAKEN_OUT,
    TOLD,
    WAYS,
    accuracy_at,
    best_rivals,
    compare_ways,
    ways_compared,
)

WIDTH = 12

pytestmark = pytest.mark.slow


def rows_that_often_obey() -> pd.DataFrame:
    """Twins; one in five rows told to lie is answered rightly nevertheless."""
    rows = twins(160)
    disobeys = (rows.role == "lie") & (np.random.default_rng(0).random(len(rows)) < 0.2)
    answer = np.where(disobeys, rows.label, rows.answer)
    correct = answer == rows.label
    return rows.assign(
        answer=answer,
        margin=2.0 * answer - 1,
        correct=correct,
        lied=(rows.role == "lie") & ~correct,
    )


def compared(rows: pd.DataFrame, *, shift: float) -> pd.DataFrame:
    """Rates of each way, where told to lie lowers the score of truth by `shift`."""
    rng = np.random.default_rng(1)
    told_to_lie = (rows.role == "lie").to_numpy()
    features = {}
    for layer in range(3):
        states = rng.normal(size=(len(rows), WIDTH))
        states[:, 0] += 2.5 * (2 * rows.y - 1) - shift * told_to_lie
        states[:, 1] += 4 * told_to_lie
        reader = read_from(dict(zip(rows.row_id, states, strict=True)))
        features["activation", "resid_post", layer] = reader
    return compare_ways(rows, features)


@pytest.fixture(scope="module", autouse=True)
def two_splits():
    """Two other splits of the examples are enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector_ways, "SPLITS", 2)
        yield


@pytest.fixture(scope="module")
def shifted(two_splits) -> pd.DataFrame:
    return compared(rows_that_often_obey(), shift=2.5)


@pytest.mark.slow
def test_where_lying_moves_the_scores_the_order_survives_and_the_threshold_does_not(shifted):
    table = ways_compared(shifted).set_index("way")
    assert list(table.index) == list(WAYS)
    raw = table.loc[EARLIEST]
    assert raw.auroc > 0.9 and raw.lies_choice_1 < 0.6 < 0.95 < raw.lies_choice_0
    for way in (TAKEN_OUT, SHIFTED):
        mended = table.loc[way]
        assert mended[["lies_choice_1", "lies_choice_0"]].min() > 0.75 and mended.honest < 0.1
        assert mended["accuracy at 0.8"] > raw["accuracy at 0.8"] + 0.04


@pytest.mark.slow
def test_where_lying_moves_nothing_the_plain_detector_needs_no_mending():
    table = ways_compared(compared(twins(160), shift=0.0)).set_index("way")
    assert table.lies[[EARLIEST, BY_TWINS, TAKEN_OUT, SHIFTED]].min() > 0.85
    assert table.honest.max() < 0.1
    # No row told to lie is answered rightly, so nothing is made up of such rows.
    assert np.isnan(table.truthful).all() and (table.n_truthful == 0).all()


def test_a_probe_of_the_instruction_flags_lies_and_truthful_answers_alike(shifted):
    table = ways_compared(shifted).set_index("way")
    told = table.loc[TOLD]
    assert told.lies > 0.9 and told.honest < 0.1 and told.truthful > 0.9
    assert 0.35 < told.auroc_truthful < 0.65 and told["told to lie, at 0.5"] < 0.6
    assert table.truthful[SHIFTED] < 0.1


def test_a_base_rate_weighs_flagged_lies_against_answers_left_alone():
    table = pd.DataFrame({"lies": [1.0], "honest": [0.5], "truthful": [1.0]})
    assert list(accuracy_at(table, 0.2)) == pytest.approx([0.6])
    assert list(accuracy_at(table, 0.8)) == pytest.approx([0.9])
    assert list(accuracy_at(table, 0.8, "truthful")) == pytest.approx([0.8])


def test_the_rivals_to_show_are_those_that_do_best_on_validation_rows(shifted):
    rivals = best_rivals(shifted)
    assert rivals[0] == TAKEN_OUT and len(set(rivals)) == 2
    assert set(rivals) < set(DETECTORS) - {EARLIEST}
    # What they do on test rows has no say.
    others = shifted.assign(lies=shifted.lies.where(shifted.split == "validation", 0.0))
    assert best_rivals(others) == rivals and best_rivals(others, 1) == rivals[:1]


def test_the_best_way_is_named_by_validation_rows_and_never_one_that_reads_no_truth(shifted):
    best, told, truthful = way_lines(shifted)
    assert (
        f"the best on validation rows is *{WAY_NAMES[TAKEN_OUT]}*. With as many lies as hone"
        in best
    )
    assert "It is the higher of the two in 2 of 2 splits" in best
    only_earliest = shifted.copy()
    only_earliest.loc[shifted.way != EARLIEST, ["lies", "lies_choice_1", "lies_choice_0"]] = 0.0
    best = way_lines(only_earliest)[0]
    assert f"*{WAY_NAMES.get(EARLIEST, EARLIEST)}*" in best and "higher of the two" not in best
    assert told.startswith("A probe of *told to lie?*, which does not read the truth, flags ")
    assert truthful.startswith("Of true answers under an instruction to lie (")


def test_where_no_answer_is_a_lie_no_way_is_best(shifted):
    of_lies = ["lies", "lies_choice_1", "lies_choice_0", "auroc", "auroc_truthful"]
    [said] = way_lines(shifted.assign(**dict.fromkeys(of_lies, np.nan)))
    assert said.endswith("as no answer was a lie.")
    [_, told] = way_lines(shifted.assign(truthful=np.nan, n_truthful=0))
    assert "nan" not in told


def test_with_too_few_rows_the_table_is_empty_and_says_why():
    table = compare_ways(twins(9), {})
    assert table.empty and "too_few_rows" in table.attrs
    assert way_lines(table) == [] and ways_compared(table).empty and best_rivals(table) == []
