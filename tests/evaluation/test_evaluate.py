"""Evaluation: signed AUROC, splits, controls that catch their planted case, intervals by example, and what may be said of a number."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from dlk_utils.errors import DataError, TooFewRows
from dlk_utils.evaluation.evaluate import RESULT_COLUMNS, evaluate
from dlk_utils.evaluation.stats import auroc
from dlk_utils.evaluation.tasks import KNOWN, LYING, REGIMES, make_task
from dlk_utils.lab.findings import headline, in_words, summary, verdict
from dlk_utils.lab.tables.headlines import clean_numbers, survivors
from dlk_utils.probes import MORE_STATE_PROBES, PAIR_PROBES, STACK_PROBES, STATE_PROBES

CONTROLS = {
    "shuffled labels",
    "random direction",
    "first layer",
    "majority",
    "own answer",
    "instruction only",
    "metadata",
    "length",
    "TF-IDF",
    "TF-IDF, question only",
}
TRUTH = "by example, truth rows"
D = 40


def make_rows(n=300, seed=0, **columns) -> pd.DataFrame:
    """Rows in which nothing tells the class `y`; a keyword plants something: a column, or a function from the table to one."""
    rng = np.random.default_rng(seed)
    t = pd.DataFrame(
        {"example_id": [f"e{i:04}" for i in range(n)], "role": "truth", "dataset": "own"}
    )
    t["split"] = np.resize(["train", "train", "validation", "test", "test"], n)
    t["y"] = t["label"] = rng.integers(0, 2, n)
    t["margin"] = rng.normal(size=n)
    t["instruction"], t["template"] = rng.choice(["i1", "i2", "i3"], n), rng.choice(["t1", "t2"], n)
    t["prompt"] = [
        " ".join(rng.choice(["red", "blue", "green", "stone", "river"], 6)) for _ in range(n)
    ]
    return t.assign(row_id=t.example_id, text=t.prompt.str.split().str[:3].str.join(" "), **columns)


def states(rows: pd.DataFrame, strength: float, seed=0) -> dict[str, np.ndarray]:
    """row_id -> a state in which the class shifts the neurons by `strength` in all."""
    rng = np.random.default_rng([seed, 5])
    direction = np.random.default_rng(99).normal(size=D) / np.sqrt(D)
    X = rng.normal(size=(len(rows), D)) + strength * np.outer(rows.y - 0.5, direction)
    return dict(zip(rows.row_id, X, strict=True))


def reader(table: dict[str, np.ndarray]):
    return lambda rows: np.stack([table[i] for i in rows.row_id])


def scored(rows, strengths=(0.0,), *, regime=TRUTH, **more) -> pd.DataFrame:
    """The long table for one feature whose layers carry the class with these strengths."""
    features = {
        ("activation", "resid_post", layer): reader(states(rows, s, layer))
        for layer, s in enumerate(strengths)
    }
    return evaluate(make_task(rows, "truth", regime), features, n_boot=200, **more)


def line(table, probe, layer=None) -> pd.Series:
    [found] = [r for _, r in table[table.probe == probe].iterrows() if layer in (None, r.layer)]
    return found


@pytest.fixture(scope="module")
def planted() -> pd.DataFrame:
    return scored(make_rows(), (0.0, 4.0, 1.5))


@pytest.fixture(scope="module")
def nothing() -> pd.DataFrame:
    return scored(make_rows(600), (0.0, 0.0))


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_equals_scikit_learn_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    y = rng.integers(0, 2, 150)
    scores = rng.integers(0, levels, 150) + 0.3 * levels * y * (levels > 5)
    assert auroc(scores.astype(float), y) == pytest.approx(roc_auc_score(y, scores), abs=1e-12)


def test_auroc_of_constant_scores_is_one_half():
    assert auroc(np.zeros(8), np.array([0, 1] * 4)) == 0.5


@pytest.mark.trap(34)
def test_inverted_scores_give_an_auroc_under_one_half_and_are_never_flipped():
    y = np.array([0, 0, 0, 1, 1, 1])
    assert auroc(y.astype(float), y) == 1.0
    assert auroc(-y.astype(float), y) == 0.0


@pytest.mark.trap(34)
def test_a_probe_whose_direction_turns_on_test_scores_under_one_half():
    rows = make_rows()
    table = states(rows, 4.0)
    turned = {
        i: -table[i] if s == "test" else table[i]
        for i, s in zip(rows.row_id, rows.split, strict=True)
    }
    found = evaluate(
        make_task(rows, "truth", TRUTH),
        {("activation", "resid_post", 0): reader(turned)},
        n_boot=100,
    )
    assert line(found, "mean_difference").estimate < 0.2
    assert line(found, "mean_difference").validation > 0.8


@pytest.mark.trap(5)
def test_an_example_on_two_sides_is_caught():
    rows = make_rows()
    rows.loc[rows.split == "test", "example_id"] = rows.example_id[rows.split == "train"].iloc[0]
    with pytest.raises(DataError, match="straddles"):
        make_task(rows, "truth", TRUTH)


@pytest.mark.trap(6)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_takes_its_roles_and_keeps_examples_apart(regime):
    rows = pd.concat(
        [
            make_rows().assign(role=role, row_id=lambda t, role=role: t.row_id + role)
            for role in ("truth", "lie", "known")
        ],
        ignore_index=True,
    )
    rows = rows[(rows.role != "known") | (rows.split != "test")].assign(
        knows=lambda t: t.example_id.str[-1] != "3"
    )
    task = make_task(rows, "truth", regime)
    honest = {
        "truth",
        "known",
    }  # the further rows that are told the truth teach, and are never tested
    fitted, tested = {
        TRUTH: (honest, {"truth"}),
        "by example, lie rows": ({"lie"}, {"lie"}),
        LYING: (honest, {"lie"}),
        KNOWN: (honest, {"lie"}),
    }[regime]
    assert (
        set(task.train.role) == set(task.validation.role) == fitted
        and set(task.test.role) == tested
    )
    sides = [set(p.example_id) for p in (task.train, task.validation, task.test)]
    assert (
        sum(map(len, sides))
        == len(set.union(*sides))
        == (
            300
            if regime != KNOWN
            else 300 - (~rows.knows & (rows.split == "test") & (rows.role == "lie")).sum()
        )
    )
    assert task.test.knows.all() == (regime == KNOWN)


def test_too_few_rows_are_refused_with_their_counts():
    rows = make_rows(60)
    rows["y"] = (rows.groupby("split").cumcount() < 4).astype(int)
    with pytest.raises(
        TooFewRows,
        match="truth, by example, truth rows: expected of each class at least 5 in train, "
        "2 in validation, 4 in test, got 20 and 4 in train, .*a larger n_examples helps",
    ):
        make_task(rows, "truth", TRUTH)


def test_the_table_has_every_probe_beside_all_controls(planted):
    assert list(planted.columns) == RESULT_COLUMNS
    assert set(planted.probe[planted.kind == "control"]) == CONTROLS
    assert set(planted.probe[planted.kind == "probe"]) == set(
        STATE_PROBES | MORE_STATE_PROBES | STACK_PROBES
    )
    assert (planted.kind == "probe").sum() == 3 * len(STATE_PROBES | MORE_STATE_PROBES) + len(
        STACK_PROBES
    ) and (planted.kind == "control").sum() == len(CONTROLS)
    assert (planted.low <= planted.estimate).all() and (planted.estimate <= planted.high).all()
    assert (planted.n == 120).all() and (planted.n_train == 120).all()
    assert planted.accuracy.between(0, 1).all()


def test_one_layer_is_selected_for_each_probe_and_by_validation(planted):
    probes = planted[planted.kind == "probe"]
    for _, t in probes.groupby(["feature", "site", "probe"]):
        assert t.selected.sum() == 1
        assert t.validation[t.selected].item() == t.validation.max()
        assert (t.compared == len(t)).all() and len(t) == (
            1 if t.probe.iloc[0] in STACK_PROBES else 3
        )
    assert set(probes.layer[probes.selected]) == {1, -1}


@pytest.mark.trap(40)
def test_the_layer_that_is_best_on_test_only_is_not_selected():
    rows = make_rows()
    good, late = states(rows, 2.0), states(rows, 6.0, 1)
    # layer 1 tells the class on train and test but not on validation
    late = {
        i: np.random.default_rng(j).normal(size=D) if s == "validation" else late[i]
        for j, (i, s) in enumerate(zip(rows.row_id, rows.split, strict=True))
    }
    table = evaluate(
        make_task(rows, "truth", TRUTH),
        {("activation", "resid_post", k): reader(x) for k, x in enumerate((good, late))},
        n_boot=100,
    )
    for probe in ("logistic", "mean_difference"):
        t = table[table.probe == probe].set_index("layer")
        assert t.estimate[1] > t.estimate[0]
        assert t.selected[0] and not t.selected[1]


def test_what_is_planted_is_found_and_stands_above_its_controls(planted):
    for probe in ("logistic", "mean_difference"):
        found = line(planted, probe, 1)
        assert found.estimate > 0.9 and found.low > 0.8 and found.accuracy > 0.8
        assert found.lift_low > 0
    assert abs(line(planted, "shuffled labels").estimate - 0.5) < 0.25


@pytest.mark.trap(33)
def test_where_nothing_is_planted_probes_and_controls_sit_at_one_half(nothing):
    assert (nothing.estimate - 0.5).abs().max() < 0.12
    assert abs(line(nothing, "shuffled labels").estimate - 0.5) < 0.06
    missed = binom.ppf(0.975, len(nothing), 0.025)  # of so many 95 % intervals, on either side
    assert (nothing.low > 0.5).sum() <= missed and (nothing.high < 0.5).sum() <= missed


@pytest.mark.trap(42)
def test_tf_idf_catches_a_planted_word():
    rows = make_rows()
    rows["prompt"] = rows.prompt + np.where(rows.y == 1, " hooray", " alas")
    table = scored(rows)
    assert line(table, "TF-IDF").estimate == 1.0
    assert line(table, "instruction only").estimate < 0.7
    assert set(table.best_control[table.kind == "probe"]) == {"TF-IDF"}


@pytest.mark.trap(3)
@pytest.mark.parametrize("column", ["instruction", "template", "dataset"])
def test_the_instruction_only_control_catches_a_class_that_the_prompt_s_form_decides(column):
    rows = make_rows()
    rows[column] = np.where(rows.y == 1, "that", "this")
    table = scored(rows)
    assert line(table, "metadata").estimate == 1.0
    assert (line(table, "instruction only").estimate == 1.0) == (column == "instruction")
    assert line(table, "own answer").estimate < 0.7


def test_length_and_the_words_of_the_question_are_controls_of_their_own():
    rows = make_rows()
    rows["prompt"] = rows.prompt + np.where(rows.y == 1, " stone stone stone", "")
    assert line(scored(rows), "length").estimate > 0.95
    rows = make_rows()
    rows["text"] = np.where(rows.y == 1, "hooray", "alas")
    table = scored(rows)
    assert (
        line(table, "TF-IDF, question only").estimate == 1.0
        and line(table, "TF-IDF").estimate < 0.7
    )


@pytest.mark.trap(38)
def test_the_own_answer_control_catches_a_class_that_is_the_answer():
    rows = make_rows()
    rows["margin"] = rows.margin.abs() * (2 * rows.y - 1)
    table = scored(rows)
    assert line(table, "own answer").estimate == 1.0
    assert line(table, "TF-IDF").estimate < 0.7
    assert set(table.best_control[table.kind == "probe"]) == {"own answer"}


def test_the_own_answer_control_of_lies_is_how_unsure_the_answer_is():
    rows = make_rows()
    rows["margin"] = rows.margin + np.where(rows.y == 1, 0, 20) * np.random.default_rng(0).choice(
        [-1, 1], len(rows)
    )
    features = {("activation", "resid_post", 0): reader(states(rows, 0.0))}
    assert (
        line(evaluate(make_task(rows, "lie", TRUTH), features, n_boot=50), "own answer").estimate
        > 0.98
    )


def test_pairs_have_their_own_probes_and_the_same_controls():
    rng = np.random.default_rng(0)
    rows = make_rows().assign(p1_draw0=rng.uniform(size=300), p1_draw1=rng.uniform(size=300))
    rows["move"] = (rows.p1_draw1 - rows.p1_draw0) * (2 * rows.label - 1)
    rows["y"] = (rows.move > 0).astype(int)
    direction = np.random.default_rng(9).normal(size=8)
    X = {
        i: np.stack([z, z + rng.normal(size=8) + 4 * m * direction])
        for i, m, z in zip(rows.row_id, rows.move, rng.normal(size=(300, 8)), strict=True)
    }
    table = evaluate(
        make_task(rows, "pair", TRUTH), {("two draws", "resid_post", 0): reader(X)}, n_boot=100
    )
    assert set(table.probe[table.kind == "probe"]) == set(PAIR_PROBES)
    assert set(table.probe[table.kind == "control"]) == CONTROLS
    assert table.estimate[table.kind == "probe"].min() > 0.9
    # knowing the label and the change of the answer is knowing the class
    known = rows.assign(prompt=np.where(rows.label == 1, "true", "false"))
    sure = evaluate(
        make_task(known, "pair", TRUTH), {("two draws", "resid_post", 0): reader(X)}, n_boot=50
    )
    assert line(sure, "TF-IDF").estimate == 1.0


def test_the_lift_is_the_difference_from_the_best_control(planted):
    controls = planted[planted.kind == "control"]
    best = controls.loc[controls.estimate.idxmax()]
    chosen = planted[(planted.kind == "probe") & planted.selected]
    assert (chosen.best_control == best.probe).all()
    np.testing.assert_allclose(chosen.lift, chosen.estimate - best.estimate)
    assert (chosen.lift_low <= chosen.lift).all() and (chosen.lift <= chosen.lift_high).all()
    rest = planted[~planted.index.isin(chosen.index)]
    assert rest.lift.isna().all() and (rest.best_control == "").all()


@pytest.mark.trap(39)
def test_rows_of_one_example_do_not_narrow_the_interval():
    rows = make_rows(200)
    table = states(rows, 1.5)
    test = rows[rows.split == "test"]
    again = [test.assign(row_id=test.row_id + f"x{k}") for k in range(4)]
    table |= {r.row_id: table[r.example_id] for t in again for r in t.itertuples()}

    def interval(copies):
        task = make_task(pd.concat([rows, *copies], ignore_index=True), "truth", TRUTH)
        found = line(
            evaluate(task, {("activation", "resid_post", 0): reader(table)}, n_boot=300), "logistic"
        )
        return found.estimate, found.low, found.high, found.n

    one, five = interval([]), interval(again)
    assert five[3] == 5 * one[3]
    assert five[:3] == pytest.approx(one[:3])
    strangers = interval([t.assign(example_id=t.row_id) for t in again])
    assert strangers[2] - strangers[1] < 0.7 * (one[2] - one[1])


def test_the_same_seed_gives_the_same_table():
    rows = make_rows(120)
    pd.testing.assert_frame_equal(scored(rows, (1.0,), seed=3), scored(rows, (1.0,), seed=3))


def result(**columns) -> dict:
    base = dict.fromkeys(RESULT_COLUMNS, 0) | {
        "target": "truth",
        "regime": TRUTH,
        "kind": "probe",
        "probe": "logistic",
    }
    base |= {"feature": "activation", "site": "resid_post", "best_control": "TF-IDF"}
    base |= {"selected": True, "validation": 0.7, "estimate": 0.6, "low": 0.55, "high": 0.65}
    return base | {"lift": 0.1, "lift_low": 0.05, "lift_high": 0.15} | columns


def test_the_headline_is_the_probe_that_was_named_in_advance_and_beside_it_the_best_on_validation_and_not_on_test():
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
        (dict(low=0.60, estimate=0.70, high=0.80, lift_low=0.02), "above chance and above TF-IDF"),
        (
            dict(low=0.60, estimate=0.70, high=0.80, lift_low=-0.02),
            "above chance, but not above TF-IDF",
        ),
        (
            dict(low=0.50, estimate=0.60, high=0.70, lift_low=0.02),
            "not distinguishable from chance",
        ),
    ],
)
def test_the_verdict_weighs_chance_and_the_best_control(columns, words):
    assert verdict(pd.Series(result(**columns))) == words


def test_a_headline_in_words_has_the_number_the_interval_the_control_and_the_verdict():
    said = in_words(pd.Series(result(n=120)))
    assert (
        said
        == "AUROC 0.60 [0.55, 0.65], n = 120 (best control: TF-IDF 0.50, lift +0.10 [+0.05, +0.15]): above chance and above TF-IDF"
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
            }
        ]
    )
    across = pd.DataFrame(
        [
            {"trained_on": a, "tested_on": b, "estimate": 0.9 if a == b else 0.4}
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
    left = table["here, cleanly"].droplevel("date")
    assert (
        left["convolution over depth"] == "0.60 [0.55, 0.65], n = 0"
        and left["pairs of draws, linear"] == "0.50 [0.40, 0.60], n = 9"
    )
    assert (
        left["pairs of draws, ranking, big moves only"] == "not scored"
        and left["weight gradients, linear"] == "not measured"
    )
    assert (
        left["from one data set to another"] == "0.40 to 0.40"
        and left["one data set"] == "x 0.90; y 0.90"
    )
    assert (table["here, with the like mistake"] != "").sum() == 1
    with pytest.raises(KeyError, match="expected names of REPORTED"):
        survivors({"nothing of the kind": ""}, {})
