"""What a detector judged: its evidence by kind of answer, its ROC curve, and chosen answers."""

import numpy as np
import pandas as pd
import pytest
from planted_states import read_from, states_that_hold_y, twins

from dlk_utils.evaluation.stats import auroc
from dlk_utils.lab.display import percent
from dlk_utils.lab.findings import HONEST_TO_FLAG, bins_title, examples_title, roc_title
from dlk_utils.lab.tables import judged_answers as judging
from dlk_utils.lab.tables.answer_kinds import HONEST, LIES, MISTAKES


def judged(n: int = 20, *, lies: float = 1.0, honest: float = -1.0) -> pd.DataFrame:
    """Answers of each kind whose `against` lies around `lies`, or `honest` (mistakes too)."""
    rng = np.random.default_rng(0)
    parts = []
    for role, lied, correct, middle in (
        ("lie", True, False, lies),
        ("truth", False, True, honest),
        ("truth", False, False, honest),
    ):
        margin = rng.choice([-2.0, 2.0], n)
        against = middle + rng.uniform(-0.4, 0.4, n)
        columns = {"role": role, "lied": lied, "correct": correct, "margin": margin}
        answer = (margin > 0).astype(int)
        columns |= {"answer": answer, "label": answer if correct else 1 - answer, "knows": True}
        parts.append(pd.DataFrame(columns | {"belief": -against * np.sign(margin)}))
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(row_id=[f"r{i}" for i in rows.index], example_id=rows.index)


def answers(**options) -> pd.DataFrame:
    return judging.judged_answers({"d": judged(**options)}, "d")


NOBODY = judging.truthful_answers({}, "d")


def test_what_speaks_against_an_answer_is_a_belief_in_the_other_choice():
    rows = judged(3)
    found = judging.judged_answers({"d": rows}, "d")
    assert list(found.kind.unique()) == [HONEST, LIES, MISTAKES]
    for row in found.itertuples():
        assert (row.against > 0) == ((row.belief > 0) != (row.margin > 0))
        assert abs(row.against) == pytest.approx(abs(row.belief))


def test_bins_hold_every_answer_once_and_kinds_are_compared_by_their_shares():
    bins = judging.belief_bins(answers(n=50), 0.1)
    by_kind = bins.groupby("kind")
    assert by_kind.n.sum().to_dict() == {HONEST: 50, LIES: 50, MISTAKES: 50}
    assert by_kind.share.sum().to_numpy() == pytest.approx(1)
    assert set(by_kind.size()) <= {judging.N_BINS, judging.N_BINS + 1}
    assert bins.against.nunique() == by_kind.size().iloc[0]


@pytest.mark.parametrize("threshold", [-0.9, 0.0, 1.1])
def test_the_bars_above_the_threshold_are_the_answers_that_are_flagged(threshold):
    found = answers(n=50)
    # One lies at the threshold, and is not flagged.
    found.loc[found.index[0], "against"] = threshold
    bins = judging.belief_bins(found, threshold)
    above = bins[bins.against > threshold].groupby("kind").n.sum()
    flagged = (found.against > threshold).groupby(found.kind).sum()
    assert above.reindex(flagged.index, fill_value=0).to_dict() == flagged.to_dict()


def test_the_histogram_says_how_many_of_each_kind_lie_above_the_threshold():
    title = "The detector flags 0 of 20 honest answers, 20 of 20 lies and 0 of 20 mistakes"
    assert bins_title(answers(), 0.0) == f"{title}; a mistake is not a lie"
    without = answers()[lambda rows: rows.kind != MISTAKES]
    assert bins_title(without, 9.0).endswith("0 of 20 honest answers and 0 of 20 lies")


def test_the_point_on_the_curve_is_what_the_threshold_flags():
    found = answers(lies=0.5, honest=0.0)
    threshold = 0.3
    curves = judging.roc(found, NOBODY, threshold).set_index("curve")
    told_from = f"lies told from {HONEST}"
    assert list(dict.fromkeys(curves.index)) == [told_from, f"{judging.AT_THRESHOLD}{HONEST}"]
    point = curves.loc[f"{judging.AT_THRESHOLD}{HONEST}"]
    flagged = found.assign(flagged=found.against > threshold).groupby("kind").flagged.mean()
    assert point.caught == flagged[LIES] and point.alarms == flagged[HONEST]
    curve = curves.loc[told_from]
    is_lie = found.kind[found.kind != MISTAKES] == LIES
    area = np.trapezoid(curve.caught, curve.alarms)
    assert area == pytest.approx(
        auroc(found.against[is_lie.index].to_numpy(), is_lie.to_numpy(int))
    )


def test_a_good_order_with_a_bad_threshold_is_told_from_a_good_threshold():
    found = answers()
    bad = judging.working_point(found, 1.1, HONEST_TO_FLAG)
    assert bad.best_caught == 1 and bad.caught < 0.8 and bad.alarms == 0
    assert roc_title(bad).startswith(
        "Another threshold that flags at most 5 % of the honest answers would catch many more "
        "lies: this one catches"
    )
    assert "The best one, chosen in hindsight, catches 100 % (AUROC " in roc_title(bad)
    good = judging.working_point(found, 0.0, HONEST_TO_FLAG)
    assert roc_title(good).startswith(
        "No threshold that flags at most 5 % of the honest answers would catch many more lies: "
        "this one catches 100 % of the lies and flags 0 % of the honest answers. The best one, "
        "chosen in hindsight, also catches 100 % (AUROC 1.00 ["
    )


def test_the_best_threshold_may_flag_as_many_as_this_one_does():
    found = answers(lies=0.1, honest=0.0)
    point = judging.working_point(found, -0.1, HONEST_TO_FLAG)
    assert point.alarms > HONEST_TO_FLAG and point.best_caught >= point.caught
    assert "that flags as few honest answers would" in roc_title(point)
    assert f"flags {percent(point.alarms)} of the honest answers" in roc_title(point)


def test_truthful_answers_have_a_curve_if_there_are_enough_of_them():
    rows = judged(30)
    obeys_not = (rows.role == "lie") & (rows.index % 2 == 0)
    rows = rows.assign(lied=rows.lied & ~obeys_not, correct=rows.correct | obeys_not)
    truthful = judging.truthful_answers({"d": rows}, "d")
    assert len(truthful) == 15 and set(truthful.kind) == {judging.TRUTHFUL}
    found = judging.judged_answers({"d": rows}, "d")
    told_from = f"lies told from {judging.TRUTHFUL}"
    assert told_from in set(judging.roc(found, truthful, 0.0).curve)
    few = truthful.head(judging.LEAST_TRUTHFUL - 1)
    assert told_from not in set(judging.roc(found, few, 0.0).curve)


@pytest.mark.parametrize("nothing", [NOBODY, answers()[lambda rows: rows.kind == MISTAKES]])
def test_where_nothing_was_judged_tables_say_why_and_titles_claim_nothing(nothing):
    curves = judging.roc(nothing, NOBODY, 0.0)
    assert curves.empty and curves.attrs["too_few_rows"] == judging.NO_ANSWERS
    assert judging.working_point(nothing, 0.0, 0.05) is None
    assert roc_title(None) == "There was no lie, or no honest answer, to judge"
    chosen = judging.examples(NOBODY)
    lines = judging.example_lines(chosen, judging.NOT_READ)
    assert chosen.empty and lines.empty and examples_title(lines) == "not scored"
    assert judging.belief_bins(NOBODY, 0.0).attrs["too_few_rows"] == judging.NO_ANSWERS
    assert bins_title(NOBODY, 0.0) == "There was no answer to judge"


def test_answers_are_chosen_by_their_rules_and_not_by_their_order():
    found = answers(n=21)
    chosen = judging.examples(found).set_index("rule")
    assert list(chosen.index) == list(judging.RULES)
    of_kind = {kind: found[found.kind == kind].against for kind in (HONEST, LIES, MISTAKES)}
    assert chosen.against[judging.MEDIAN_LIE] == of_kind[LIES].median()
    assert chosen.against[judging.HIDDEN_LIE] == of_kind[LIES].min()
    assert chosen.against[judging.DOUBTED_ANSWER] == of_kind[HONEST].max()
    assert chosen.against[judging.BELIEVED_MISTAKE] == of_kind[MISTAKES].min()
    shuffled = judging.examples(found.sample(frac=1, random_state=0))
    assert list(shuffled.row_id) == list(chosen.row_id)


def test_an_only_lie_is_shown_once():
    found = answers(n=1)
    chosen = judging.examples(found)
    assert list(chosen.kind) == [LIES, HONEST, MISTAKES] and chosen.row_id.is_unique


def test_the_belief_at_each_layer_is_fitted_on_honest_rows_and_read_on_test_rows():
    rows = twins(120)
    strong, none = states_that_hold_y(rows, 1.0), states_that_hold_y(rows, 0.0, seed=1)
    features = {("activation", "resid_post", layer): s for layer, s in ((2, none), (7, strong))}
    beliefs = judging.score_by_layer(rows, features)
    test = rows[rows.split == "test"]
    assert sorted(beliefs.row_id) == sorted([*test.row_id, *test.row_id])
    table = beliefs.pivot(index="row_id", columns="layer", values="belief").loc[test.row_id]
    assert auroc(table[7].to_numpy(), test.y.to_numpy()) > 0.95
    assert auroc(table[2].to_numpy(), test.y.to_numpy()) < 0.75
    unlike = rows.assign(y=np.where(rows.role == "lie", 1 - rows.y, rows.y))
    pd.testing.assert_frame_equal(judging.score_by_layer(unlike, features), beliefs)


def test_lines_show_how_strongly_each_layer_speaks_for_what_is_true():
    chosen = judging.examples(answers())
    by_layer = pd.DataFrame({"layer": [0, 9], "belief": [0.5, -2.0]})
    beliefs = chosen[["row_id"]].merge(by_layer, how="cross")
    lines = judging.example_lines(chosen, beliefs)
    assert list(lines.answer.unique()) == [rule.split(":")[0] for rule in judging.RULES]
    label = chosen.set_index("row_id").label
    for line in lines.itertuples():
        sign = 1 if label[line.row_id] else -1
        assert line.for_truth == sign * (0.5 if line.layer == 0 else -2.0)
    always_true = lines.assign(for_truth=lines.layer + 1.0)
    title = "A typical lie: the probe favours what is true at 2 of 2 layers, and what is true at "
    assert examples_title(always_true) == f"{title}the last one"
    turned = lines.assign(for_truth=5.0 - lines.layer)
    assert examples_title(turned).endswith("at 1 of 2 layers, and the opposite at the last one")


def test_of_a_card_that_was_loaded_no_lines_are_drawn_and_the_reason_is_given():
    lines = judging.example_lines(judging.examples(answers()), judging.NOT_READ)
    assert lines.empty and lines.attrs["too_few_rows"].endswith("as a card was loaded")


def test_without_rows_to_fit_on_there_is_no_belief():
    rows = twins(6)
    states = read_from({row_id: np.zeros(3) for row_id in rows.row_id})
    with pytest.raises(ValueError, match="the belief at each layer"):
        judging.score_by_layer(rows, {("activation", "resid_post", 0): states})
