"""What may be said of a number: headlines, verdicts, and what is left of reported numbers."""

import numpy as np
import pandas as pd
import pytest

from dlk_utils.errors import ParameterError
from dlk_utils.evaluation.controls import ASKED_AGAIN, TURNED
from dlk_utils.evaluation.evaluate import RESULT_COLUMNS
from dlk_utils.evaluation.tasks import KNOWN, LYING, POSITIVE_CONTROL
from dlk_utils.lab.findings import (
    best_and_worst_losses,
    carry_over_findings,
    cases_sentence,
    curve_title,
    fit_names,
    gains_title,
    graded_sentence,
    headline,
    in_words,
    lifts_title,
    pair_findings,
    pairs_title,
    positive_controls,
    probe_answer,
    probe_findings,
    rivals_title,
    searched_sentence,
    styles_title,
    summary,
    survivors_finding,
    tasks_lines,
    turn_title,
    verdict,
)
from dlk_utils.lab.tables.graded import PROBE, WHAT_IS_TRUE
from dlk_utils.lab.tables.headlines import (
    NOT_MEASURED,
    NOT_REACHED,
    REACHED,
    REACHED_BY_INTERVAL,
    CleanNumber,
    clean_numbers,
    survivors,
)
from dlk_utils.lab.tables.probe_ablations import curve_table, rivals

TRUTH = "by example, truth rows"


def result(**columns) -> dict:
    base = dict.fromkeys(RESULT_COLUMNS, 0) | {
        "target": "truth",
        "regime": TRUTH,
        "kind": "probe",
        "probe": "logistic",
    }
    base |= {"feature": "activation", "site": "resid_post", "best_control": "TF-IDF"}
    base |= {"selected": True, "validation": 0.7, "estimate": 0.6, "low": 0.55, "high": 0.65}
    base |= {"n": 90, "n_smaller": 40, "accuracy": 0.75}
    row = base | {"lift": 0.1, "lift_low": 0.05, "lift_high": 0.15} | columns
    return row | {"choice_low": row["low"], "choice_high": row["high"]}


def test_headlines_are_the_probe_named_in_advance_and_the_best_on_validation_never_on_test():
    table = pd.DataFrame(
        [
            result(probe="logistic_tuned", layer=1, validation=0.9, estimate=0.6, selected=False),
            result(probe="logistic_tuned", layer=2, validation=0.7, estimate=0.65),
            result(layer=3, validation=0.8, estimate=0.7),
            result(layer=5, validation=0.75, estimate=0.99),
            result(kind="control", probe="TF-IDF", validation=np.nan, estimate=1.0),
            result(layer=4, target="lie", validation=1.0),
        ]
    )
    named, searched = (headline(table, "truth", TRUTH, searched=s) for s in (False, True))
    assert (named.probe, named.layer, named.estimate, named.tried) == ("logistic_tuned", 2, 0.65, 2)
    assert (searched.layer, searched.estimate, searched.tried) == (
        3,
        0.7,
        4,
    )  # not layer 1, which is no choice, nor layer 5, the best on test
    assert headline(table, "pair", TRUTH) is None and headline(table, "lie", TRUTH) is None


@pytest.mark.parametrize(
    "columns, words",
    [
        (dict(low=0.45, estimate=0.55, high=0.65), "not distinguishable from chance"),
        (dict(low=0.20, estimate=0.30, high=0.40), "inverted: below chance"),
        (
            dict(low=0.60, estimate=0.70, high=0.80, lift_low=0.02),
            "above chance and above its best control",
        ),
        (
            dict(low=0.60, estimate=0.70, high=0.80, lift_low=-0.02),
            "above chance, but not clearly above its best control",
        ),
        (
            dict(low=0.50, estimate=0.60, high=0.70, lift_low=0.02),
            "not distinguishable from chance",
        ),
        (dict(low=np.nan, estimate=np.nan, high=np.nan), "not distinguishable from chance"),
        (
            dict(low=np.nan, estimate=0.7, high=np.nan, lift_low=0.02),
            "not distinguishable from chance",
        ),
        (
            dict(low=0.60, estimate=0.70, high=0.80, lift_low=np.nan),
            "above chance, but not clearly above its best control",
        ),
        (
            dict(low=0.90, estimate=0.95, high=1.00, lift_low=0.02, n_smaller=4),
            "no claim, because one class has only 4 test rows",
        ),
    ],
)
def test_the_verdict_weighs_chance_and_the_best_control(columns, words):
    assert verdict(pd.Series(result(**columns))) == words


def test_a_headline_in_words_has_the_number_the_interval_the_control_and_the_verdict():
    row = result(probe="logistic_tuned", layer=7)
    table = pd.DataFrame([row]).assign(choice_low=0.52, choice_high=0.7)
    assert in_words(headline(table, "truth", TRUTH)) == (
        'AUROC 0.60 [0.52, 0.70], n = 90 (smaller class 40), at layer 7. The best control, "TF-IDF"'
        ", scores 0.50 (lift +0.10 [+0.05, +0.15]). Verdict: above chance and above its best "
        "control"
    )
    assert in_words(None) == "not scored, as one class has too few rows"


def test_the_summary_has_two_lines_a_task_and_no_positive_control():
    table = pd.DataFrame(
        [
            result(probe="logistic_tuned"),
            result(layer=2, validation=0.1),
            result(target="lie"),
            result(target="own answer (positive control)"),
        ]
    )
    found = summary(table)
    assert list(found.target) == ["truth", "truth", "lie"] and list(found.how) == [
        "named",
        "searched",
        "searched",
    ]
    assert list(found.tried) == [1, 2, 1]
    assert found.verdict.notna().all()


def test_the_search_is_named_with_its_fit_and_whether_it_follows_the_answer():
    row = result(regime=KNOWN, feature="gradient", site="mlp_out", layer=9, validation=0.97)
    inverted = pd.DataFrame([row | {"estimate": 0.2, "choice_low": 0.1, "choice_high": 0.3}])
    sentence = searched_sentence(inverted)
    assert (
        "takes the logistic probe of the gradient at mlp_out, layer 9, with validation" in sentence
    )
    assert (
        "AUROC 0.97" in sentence and "this probe scores 0.20 [0.10, 0.30]: where the " in sentence
    )
    assert sentence.endswith("where the truth and the model's answer differ, it follows the answer")
    assert searched_sentence(pd.DataFrame([row])).endswith("this probe scores 0.60 [0.55, 0.65]")
    assert searched_sentence(pd.DataFrame([row]).head(0)) == "not scored"
    assert list(fit_names(inverted)) == ["logistic, gradient, mlp_out"]


def test_verdicts_on_the_tasks_are_counted_and_those_on_few_rows_apart():
    intervals = [
        {"low": 0.6, "high": 0.8, "lift_low": 0.1},
        {"low": 0.6, "high": 0.8, "lift_low": -0.1},
        {"low": 0.1, "high": 0.3, "lift_low": -0.1},
        {"low": 0.9, "high": 1.0, "lift_low": 0.1, "n_smaller": 4},
    ]
    rows = [result(regime=str(i)) | {"how": "named"} | of for i, of in enumerate(intervals)]
    searched = rows[0] | {"how": "searched"}
    assert tasks_lines(pd.DataFrame([*rows, searched])) == [
        "* The probe that was named in advance is above chance in 2 of 4 tasks. In 1 of these it "
        "also beats its best control. In 1 it is below chance. One task has too few test rows of "
        "one class."
    ]
    assert tasks_lines(pd.DataFrame(rows[:1])) == [
        "* The probe that was named in advance is above chance in 1 of 1 tasks. In 1 of these it "
        "also beats its best control."
    ]
    [line] = tasks_lines(pd.DataFrame(rows[1:2]))
    assert line.endswith("In none of these does it also beat its best control.")
    [line] = tasks_lines(pd.DataFrame(rows[2:3]))
    assert line.endswith(
        "The probe that was named in advance is above chance in none of 1 tasks. "
        "In 1 it is below chance."
    )
    assert tasks_lines(pd.DataFrame([searched])) == []


def test_what_is_left_of_each_reported_number_is_shown_and_a_wrong_name_is_an_error():
    rows = [
        result(regime=LYING, probe=p, feature=f, site=s)
        for p, f, s in (
            ("convolution", "activation", "resid_post"),
            ("logistic", "both", "head_out"),
            ("dice", "activation", "resid_post"),
        )
    ]
    pairs = pd.DataFrame(
        [
            {
                "pairs": "draws, sequence",
                "regime": LYING,
                "probe": "pair_direction",
                "least_move": 0.0,
                "estimate": 0.5,
                "low": 0.4,
                "high": 0.6,
                "n": 9,
                "n_smaller": 4,
            }
        ]
    )
    across = pd.DataFrame(
        [
            {"trained_on": a, "tested_on": b}
            | ({"estimate": 0.9} if a == b else {"estimate": 0.4})
            | {"low": 0.3, "high": 0.95}
            for a in "xy"
            for b in "xy"
        ]
    )
    classes = pd.DataFrame(
        {
            "method": ["softmax regression", "instruction only"],
            "class": "deception",
            "f1": [0.7, 0.6],
        }
    )
    table = survivors(
        clean_numbers(pd.DataFrame(rows), classes, pairs, across),
        {"convolution over depth": "m 0.97"},
    )
    left = table["here, cleanly"]
    assert (
        left["convolution over depth"] == "0.60 [0.55, 0.65], n = 90 (smaller class 40)"
        and left["pairs of draws, linear"] == "0.50 [0.40, 0.60], n = 9 (smaller class 4)"
    )
    assert (
        left["pairs of draws, ranking, big moves only"] == "not scored"
        and left["weight gradients, linear"] == "not measured"
    )
    assert (
        left["from one data set to another"] == "0.40 to 0.40 (the lowest with [0.30, 0.95])"
        and left["one data set"] == "x 0.90; y 0.90"
    )
    assert (table["here, with the same mistake"] != "not tried").sum() == 1
    assert table["reached here"]["from one data set to another"] == NOT_REACHED
    with pytest.raises(ParameterError, match="expected names of REPORTED"):
        survivors({"nothing of the kind": CleanNumber("")}, {})


def test_a_reported_number_is_reached_if_the_upper_end_of_its_interval_here_is_as_high():
    # .961 and .60 were reported.
    clean = {
        "convolution over depth": CleanNumber("0.95 [0.91, 0.97]", 0.95, 0.97, True),
        "one data set": CleanNumber("1.00 [0.99, 1.00]", 1.0, 1.0, True),
        "from one data set to another": CleanNumber("0.40 to 0.90", 0.4, 0.45, True),
        "pairs of draws, linear": CleanNumber("0.55 [0.35, 0.76]", 0.55, 0.76, False),
        "heads, state and gradient, linear": CleanNumber("not scored"),
    }
    table = survivors(clean, {})
    reached = table["reached here"]
    assert reached["convolution over depth"] == REACHED_BY_INTERVAL
    assert reached["one data set"] == REACHED
    assert reached["from one data set to another"] == NOT_REACHED
    assert reached["pairs of draws, linear"] == NOT_REACHED
    not_scored = "heads, state and gradient, linear"
    assert reached[not_scored] == reached["weight gradients, linear"] == NOT_MEASURED
    assert survivors_finding(table) == (
        "Of 4 reported numbers that were measured again, a clean evaluation reaches 2 here: "
        "*convolution over depth* and *one data set*. Reached means that the score is above "
        "chance, and that it, or the upper end of its interval, is at least the lowest number "
        "reported. *convolution over depth* is reached only by the upper end of the interval. A "
        "clean evaluation does not reach *pairs of draws, linear* or *from one data set to another*"
    )
    assert survivors_finding(table[table.index == not_scored]).startswith("None of the rep")
    one = survivors_finding(survivors({"one data set": clean["one data set"]}, {}))
    assert one.endswith("is at least the lowest number reported")
    f1 = {
        "three classes, F1 of deception": CleanNumber(
            "F1 0.70; instruction alone 0.60", 0.7, 0.7, True
        )
    }
    of_classes = survivors_finding(survivors(f1, {}))
    assert of_classes.endswith("next to that of its control (F1 0.70; instruction alone 0.60)")
    none = survivors_finding(table.query("what == 'from one data set to another'"))
    assert (
        "reaches none here. A clean evaluation does not reach *from one data set to another*"
        in none
    )


def test_the_rivals_of_the_probe_are_named_with_the_strongest():
    rows = [result(regime=KNOWN, probe="logistic_tuned", estimate=0.95)]
    for rival, estimate in ((TURNED, 0.98), (ASKED_AGAIN, 0.95), ("own answer", 0.01)):
        rows.append(result(regime=KNOWN, kind="control", probe=rival, estimate=estimate))
    rows.append(result(regime=KNOWN, kind="control", probe="TF-IDF", estimate=1.0))
    table = rivals(pd.DataFrame(rows))
    assert len(table) == 4
    assert rivals_title(table) == (
        "On known rows, 2 of 3 rivals read the truth at least as well as the probe. The strongest "
        f'is "{TURNED}" (0.98)'
    )


@pytest.mark.parametrize(
    "high, title",
    [
        (
            0.97,
            "On known rows, no rival has a higher AUROC than the probe, but the interval of the "
            f'strongest overlaps with its own: "{TURNED}" (0.90)',
        ),
        (
            0.92,
            "On known rows, no rival reads the truth as well as the probe. The strongest is "
            f'"{TURNED}" (0.90)',
        ),
    ],
)
def test_a_rival_is_called_worse_only_if_its_interval_lies_below_that_of_the_probe(high, title):
    probe = result(regime=KNOWN, probe="logistic_tuned", estimate=0.95, low=0.93, high=1.0)
    rival = result(regime=KNOWN, kind="control", probe=TURNED, estimate=0.9, low=0.8, high=high)
    assert rivals_title(rivals(pd.DataFrame([probe, rival]))) == title


@pytest.mark.parametrize(
    "estimate, said",
    [
        (0.99, f'1 of 1 rivals score higher, most of all "{TURNED}" (0.99 against 0.95)'),
        (0.95, "no rival scores higher than the probe"),
    ],
)
def test_rivals_that_score_higher_on_all_rows_told_to_lie_are_named_too(estimate, said):
    rows = [
        result(regime=regime, probe="logistic_tuned", estimate=0.95, low=0.93, high=1.0)
        for regime in (KNOWN, LYING)
    ]
    scores = {KNOWN: 0.9, LYING: estimate}
    for regime, score in scores.items():
        rival = {"kind": "control", "probe": TURNED, "estimate": score, "low": 0.8, "high": 0.94}
        rows.append(result(regime=regime, **rival))
    assert rivals_title(rivals(pd.DataFrame(rows))).endswith(f". On all rows told to lie, {said}")


def test_the_answer_names_the_strongest_rival_once_and_a_control_that_is_not_right_by_definition():
    in_known = {"regime": KNOWN, "best_control": TURNED}
    in_lies = {"target": "lie", "regime": "by example, lie rows", "best_control": ASKED_AGAIN}
    rows = [
        result(probe="logistic_tuned", estimate=0.95, **in_known),
        result(kind="control", probe=TURNED, estimate=0.9, **in_known),
        result(probe="logistic_tuned", estimate=0.9, lift=-0.1, **in_lies),
        result(kind="control", probe=ASKED_AGAIN, estimate=1.0, **in_lies),
        result(kind="control", probe="TF-IDF", estimate=0.7, **in_lies),
    ]
    table = pd.DataFrame(rows)
    truth, lie, pair = probe_answer(table, rivals(table))
    assert truth.count(TURNED) == 1 and "rival" not in truth
    assert f'"{ASKED_AGAIN}", scores 1.00 by definition, because its answers decide' in lie
    assert lie.endswith('The next best control, "TF-IDF", scores 0.70.')
    assert pair.endswith("Not scored, as one class has too few rows.")
    other = probe_answer(table.assign(best_control="TF-IDF"), rivals(table))[0]
    assert TURNED in other and "no rival has a higher AUROC than the probe" in other


def test_titles_count_probes_and_sites_whose_whole_interval_is_on_one_side():
    task = pd.DataFrame([result(lift_low=low) for low in (-0.1, 0.0, 0.1)])
    assert lifts_title(task).startswith("1 of the 3 probes, over all sites and features, has a ")
    assert lifts_title(task.head(2)).startswith("None of the 2 probes, over all sites and fea")
    ends = {"a": (-0.3, -0.1), "b": (-0.2, -0.1), "c": (-0.1, 0.1)}
    gains = pd.DataFrame(
        [
            {"feature": "both", "site": s, "gain_low": x, "gain_high": y}
            for s, (x, y) in ends.items()
        ]
    )
    assert gains_title(gains) == (
        "Adding the gradient clearly raises the AUROC at no site, and clearly lowers it at a and b"
    )
    assert gains_title(gains[gains.site == "c"]).endswith("clearly changes the AUROC at no site")


def test_the_class_that_the_probe_of_three_classes_finds_worst_is_named():
    columns = {"method": "softmax regression", "rows": 16}
    classes = pd.DataFrame(
        [columns | {"class": name, "f1": f1} for name, f1 in (("truth", 0.9), ("unknown", 0.2))]
    )
    means = [classes.iloc[0].to_dict() | {"class": "macro avg", "f1": 0.1}]
    table = pd.concat([classes, pd.DataFrame(means)])
    gate, curves = pd.DataFrame({"passes": [True]}), curve_table({}, {})
    results = pd.DataFrame([result()])
    line = probe_findings(results, [], curves, table, gate)[-1]
    assert line.endswith(
        "0.10 for *softmax regression*. Softmax regression does worst on the class *unknown*: "
        "F1 0.20 on 16 rows."
    )


@pytest.mark.parametrize(
    "low, high, found",
    [
        (0.6, 0.8, "reads the truth"),
        (0.2, 0.4, "reads the opposite of the truth"),
        (0.4, 0.6, "does not clearly read the truth"),
    ],
)
def test_the_title_of_the_turn_goes_by_the_interval_of_the_headline(low, high, found):
    row = result(regime=KNOWN, probe="logistic_tuned", layer=7, low=low, high=high)
    title = turn_title(pd.DataFrame([row]))
    expected = f"At layer 7 the probe {found} while the model is told to lie about what it knows: "
    assert title.startswith(f"{expected}AUROC ")
    assert turn_title(pd.DataFrame([row]).head(0)).endswith(": too few rows")


def test_the_page_of_pairs_counts_rankings_and_says_what_could_have_been_seen():
    rows = [
        result(regime=LYING, pairs="draws", least_move=0.0),
        result(pairs="draws", least_move=0.0, low=0.6, estimate=0.66, lift=-0.27, lift_low=-0.4),
        result(pairs="draws", least_move=0.0, low=0.4, estimate=0.5, lift=0.0, lift_low=-0.1),
    ]
    pairs = pd.DataFrame(rows)
    votes = pd.DataFrame([{"method": "listwise", "draws": 16} | result()])
    ranked, power, honest, voted = pair_findings(pairs, votes, "0.90")
    assert (
        "On honest rows, 1 of the 2 rankings" in honest and "and none beats its strongest" in honest
    )
    assert honest.endswith("against 0.93 for the control *TF-IDF*.")
    assert (
        "1 of the 1 rankings (1 losses on 1 kinds of pairs) is above chance, and 1 beats its"
        in ranked
    )
    assert power == (
        "* To be detected four times out of five, an AUROC has to be at least 0.67 for *draws* (40 "
        "of 90 rows in the smaller class). Smaller effects may have been missed."
    )
    few = pd.DataFrame([rows[0] | {"pairs": "counterfactual", "n_smaller": 9}])
    ranked, power, *_ = pair_findings(pd.concat([pairs, few]), votes, "0.90")
    assert ranked.endswith(
        ". In 1 of 2 cases, the smaller class has fewer than 20 rows, which is too few for a claim."
    )
    assert "smaller class) and 0.79 for *counterfactual* (9 of 90 rows" in power
    assert "16 draws" in voted and voted.endswith("reaches 0.90.")
    mean_answer = votes.assign(method="mean answer", estimate=0.05)
    voted = pair_findings(pairs, pd.concat([votes, mean_answer]), "0.90")[-1]
    assert "The mean answer of these draws, reversed, reads it with 0.95. A probe of" in voted
    assert pairs_title(pairs).startswith("On rows told to lie, 1 of 1 rankings of two passes are ")
    assert "the loss pair_ranking" in pairs_title(pairs)
    assert pair_findings(pairs.head(0), votes.head(0), "") == []


def cases_of_probes(**least: float) -> pd.DataFrame:
    """Of each probe the lowest of nine scores; those from 0.5 on are above chance."""
    rows = {
        probe: {"least": low, "cases": 9, "above chance": 9 if low > 0.5 else 8}
        for probe, low in least.items()
    }
    return pd.DataFrame(rows).T


def test_it_is_said_if_other_probes_carry_over_better_than_the_logistic_one():
    better = cases_sentence(cases_of_probes(logistic=0.4, mean_difference=0.82, ttpd=0.83))
    assert better == (
        "Cases in which a probe is above chance: logistic 8 of 9 (lowest AUROC 0.40), "
        "mean_difference 9 of 9 (lowest AUROC 0.82), ttpd 9 of 9 (lowest AUROC 0.83). "
        "Here the other probes carry over at least as well as the logistic one"
    )
    not_all = cases_sentence(cases_of_probes(logistic=0.6, mean_difference=0.82, ttpd=0.55))
    assert not_all.endswith("ttpd 9 of 9 (lowest AUROC 0.55)")
    none = pd.DataFrame({"logistic": {"least": np.nan, "cases": 0, "above chance": 0}}).T
    assert cases_sentence(none) == "not scored"


@pytest.mark.parametrize(
    "n_smaller, intervals, said",
    [
        (20, ((0.5, 0.9), (0.7, 1.0)), ". The intervals all overlap, so no difference is shown."),
        (20, ((0.2, 0.4), (0.7, 1.0)), ". The lowest is exam (0.30 [0.20, 0.40]), and the highest"),
        (4, ((0.2, 0.4), (0.7, 1.0)), ". A claim needs 20 rows of the smaller class, so "),
    ],
)
def test_groups_left_out_are_ranked_only_if_they_are_apart_and_have_enough_rows(
    n_smaller, intervals, said
):
    columns = {"trained_on": "all others", "rule": "", "layer": 1, "n_train": 9}
    columns["n_smaller"] = n_smaller
    rows = [
        columns
        | {"tested_on": name, "estimate": (low + high) / 2, "low": low, "high": high, "n": n}
        for name, n, (low, high) in zip(("exam", "game"), (10, 19), intervals, strict=True)
    ]
    table, nothing = pd.DataFrame(rows), pd.DataFrame()
    no_ways = table.assign(trained_on=table.tested_on)
    styles = pd.DataFrame(columns=["probe"])
    [line] = carry_over_findings(no_ways, {"family": table}, styles, nothing)
    assert line.startswith("* When one family is left out of training, the AUROC on it is 0.")
    assert f"with 10 to 19 rows each ({n_smaller} in the smaller class){said}" in line


def test_of_other_styles_the_range_over_the_probes_is_given_and_not_the_best_one():
    rows = [("clean", "lda", 0.9), ("negated", "lda", 0.63), ("negated", "ttpd", 0.68)]
    styled = pd.DataFrame(rows, columns=["style", "probe", "estimate"])
    assert styles_title(styled) == "AUROC of the 2 probes in each style: negated 0.63 to 0.68"
    assert styles_title(styled.head(1)) == "not scored"


def test_one_family_alone_is_counted_apart_from_all_others():
    pair = {
        "trained_on": "exam",
        "tested_on": "game",
        "rule": "",
        "estimate": 0.7,
        "low": 0.6,
        "high": 0.8,
        "n_smaller": 20,
    }
    table = pd.DataFrame([pair, pair | {"tested_on": "plain", "low": 0.4}])
    nothing, styles = pd.DataFrame(), pd.DataFrame(columns=["probe"])
    alike = table.assign(trained_on=table.tested_on)
    [line] = carry_over_findings(alike, {"family": table}, styles, nothing)
    assert line == (
        "* From one single family to another, the probe is above chance in 1 of 2 cases."
    )
    few = {"family": table.assign(n_smaller=19)}
    [line] = carry_over_findings(alike, few, styles, nothing)
    assert line.endswith(
        "cases. In all 2 cases, the smaller class has fewer than 20 rows, which is too few for a "
        "claim."
    )


def test_the_curve_says_what_few_rows_and_all_of_them_score():
    rows = [("lda", 8, 0.7, 5), ("lda", 16, 0.8, 5), ("lda", 420, 0.95, 1)]
    curve = pd.DataFrame(rows, columns=["probe", "n_train", "estimate", "draws"])
    assert curve_title(curve) == (
        "AUROC with 8 training rows (mean over 5 random subsets), and with all 420: lda 0.70 and "
        "0.95"
    )
    assert curve_title(curve.head(0)) == "not scored"


def rivals_of_graded(**gains: tuple[float, float]) -> pd.DataFrame:
    """A probe with AUROC 0.93, and rivals that it leads by these intervals."""
    row = {"question": WHAT_IS_TRUE, "n": 300, "n_smaller": 100, "low": 0.0, "high": 1.0}
    row |= {"layer": 18, "rule": "layer where twins agree most"}
    rows = [row | {"who": PROBE, "estimate": 0.93, "gain": 0.0, "gain_low": 0.0, "gain_high": 0.0}]
    for who, (low, high) in gains.items():
        gain = (low + high) / 2
        ends = {"gain": gain, "gain_low": low, "gain_high": high}
        rows.append(row | {"who": who, "estimate": 0.93 - gain} | ends)
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "gain, found",
    [
        ((-0.06, -0.01), "It is worse than the strongest control"),
        (
            (-0.06, 0.01),
            "Nothing shows that it is better or worse than the strongest control",
        ),
        ((0.01, 0.06), "It is better than the strongest control"),
    ],
)
def test_on_the_second_liar_the_strongest_control_is_named_beside_the_answer_turned_round(
    gain, found
):
    table = rivals_of_graded(**{TURNED: (0.2, 0.3), ASKED_AGAIN: gain, "metadata": (0.4, 0.5)})
    sentence = graded_sentence(table)
    assert TURNED in sentence and f". {found}, *{ASKED_AGAIN}* (AUROC " in sentence
    assert f"{gain[0]:+.2f}, {gain[1]:+.2f}]" in sentence and "metadata" not in sentence
    strongest = graded_sentence(rivals_of_graded(**{TURNED: gain, ASKED_AGAIN: (0.2, 0.3)}))
    assert TURNED in strongest and ASKED_AGAIN not in strongest


def test_for_each_kind_of_pair_the_best_and_the_worst_loss_are_shown():
    rows = [
        result(regime=LYING, pairs=kind, least_move=0.0, probe=probe, estimate=estimate)
        for kind, probe, estimate in (
            ("a", "pair_ranking", 0.5),
            ("a", "pair_dual", 0.7),
            ("a", "pair_direction", 0.3),
            ("b", "pair_dual", 0.4),
        )
    ]
    others = [rows[0] | {"least_move": 0.1, "estimate": 0.9}, rows[0] | {"regime": TRUTH}]
    table = best_and_worst_losses(pd.DataFrame([*rows, *others]))
    found = list(zip(table.pairs, table.probe, strict=True))
    assert found == [("a", "pair_dual"), ("a", "pair_direction"), ("b", "pair_dual")]


def test_a_positive_control_is_fitted_and_tested_on_rows_of_one_role():
    rows = [
        result(target=POSITIVE_CONTROL, regime=regime, probe="logistic", estimate=estimate)
        for regime, estimate in ((TRUTH, 1.0), ("by example, lie rows", 0.9), (LYING, 0.1))
    ]
    first, second = positive_controls(pd.DataFrame(rows))
    assert first.startswith("AUROC 1.00") and first.endswith("on truth rows")
    assert second.startswith("AUROC 0.90") and second.endswith("on lie rows")
