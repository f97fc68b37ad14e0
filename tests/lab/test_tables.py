"""Tables of stage 05 and after it on planted rows: heads, classes, votes, styles, scales, restarts, pairs, regrouping."""

import numpy as np
import pandas as pd
import pytest

from dlk_utils.evaluation.stats import auroc
from dlk_utils.evaluation.tasks import make_task
from dlk_utils.lab.tables.carry_over import regrouped, style_table
from dlk_utils.lab.tables.pairs_and_votes import pair_table, vote, votes_table
from dlk_utils.lab.tables.probe_ablations import (
    CLASSES,
    class_report,
    class_rows,
    gain_table,
    head_scores,
    restart_table,
    scale_table,
    top_heads,
)
from dlk_utils.questions.styles import STYLES, restyled

D = 24
LYING = "truth rows -> lie rows"


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Twins of 300 examples; on lie rows the model says the opposite."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(300):
        y = int(rng.integers(0, 2))
        for role in ("truth", "lie"):
            said = y if role == "truth" else 1 - y
            made.append(
                dict(
                    row_id=f"{i}{role}",
                    example_id=f"e{i}",
                    split=("train", "validation", "test")[i % 3],
                    role=role,
                    label=y,
                    y=y,
                    margin=(2 * said - 1) * 1.0,
                    p1=0.7 if said else 0.3,
                    polarity=1 if i % 2 else -1,
                    instruction=role,
                    template="t",
                    dataset="d",
                    text=f"text {i}",
                    prompt=f"{role}: text {i}",
                )
            )
    return pd.DataFrame(made)


def planted(rows: pd.DataFrame, strength: float, seed: int = 0, shape: tuple[int, ...] = (D,)):
    """A reader of states that hold `y` along one direction."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=shape[-1:])
    state = {
        r.row_id: rng.normal(size=shape) + strength * (2 * r.y - 1) * direction
        for r in rows.itertuples()
    }
    return lambda some: np.stack([state[i] for i in some.row_id])


def test_the_head_that_holds_the_class_is_ranked_first_and_the_top_heads_read_it(rows):
    loud, quiet = planted(rows, 2.0, shape=(6,)), planted(rows, 0.0, 1, shape=(18,))
    read = lambda some, layer: np.concatenate(
        [quiet(some), loud(some)] if layer == 1 else [loud(some) * 0, quiet(some)], 1
    )
    task = make_task(rows, "truth", LYING)
    ranked = head_scores(task, read, [0, 1], 4)
    assert (
        (ranked.layer[0], ranked["head"][0]) == (1, 3)
        and ranked.estimate[0] > 0.9
        and len(ranked) == 8
    )
    assert ranked.validation.is_monotonic_decreasing and ranked.estimate[1:].max() < 0.7
    together = top_heads(task, read, ranked, 4)
    assert (
        list(together.heads) == [1, 4]
        and together.selected.sum() == 1
        and (together.estimate > 0.85).all()
    )
    assert (together.low <= together.estimate).all() and (together.estimate <= together.high).all()


def test_three_classes_are_told_apart_where_they_are_planted_and_the_majority_is_shown(rows):
    rng = np.random.default_rng(1)
    kind = np.where(
        rng.random(len(rows)) < 0.3, "unknown", np.where(rows.role == "lie", "lie", "correct")
    )
    some = rows.assign(three_class=np.where(rng.random(len(rows)) < 0.05, "confused", kind))
    classes = class_rows(some)
    assert set(classes.y) == set(CLASSES) and len(classes) == (some.three_class != "confused").sum()
    code = {"truth": 0, "deception": 1, "unknown": 2}
    state = {r.row_id: np.eye(3)[code[r.y]] * 3 + rng.normal(size=3) for r in classes.itertuples()}
    features = {
        ("activation", "resid_post", 0): lambda t: rng.normal(size=(len(t), 3)),
        ("activation", "resid_post", 1): lambda t: np.stack([state[i] for i in t.row_id]),
    }
    report = class_report(classes, features).set_index(["method", "class"])
    assert (
        report.f1["softmax regression", "macro avg"] > 0.85
        and report.layer["softmax regression", "truth"] == 1
    )
    assert (
        report.f1["majority", "macro avg"] < 0.3 and report.f1["instruction only", "unknown"] < 0.6
    )
    test = classes[classes.split == "test"]
    assert [report.rows["majority", c] for c in CLASSES] == [(test.y == c).sum() for c in CLASSES]
    assert class_report(classes[classes.y != "unknown"], features).empty


def test_a_vote_leans_to_what_the_truer_draws_say():
    truer, p1 = (
        np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        np.array([[0.9, 0.2], [0.9, 0.2], [0.9, 0.2]]),
    )
    assert np.sign(vote(truer, p1)).tolist() == [1, -1, 0]


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_more_draws_vote_better_where_draws_hold_the_truth_and_stay_at_chance_where_they_do_not(
    rows, strength
):
    rng = np.random.default_rng(2)
    direction = rng.normal(size=(1, 1, D))
    parts = {
        "train": rows[(rows.role == "truth") & (rows.split == "train")],
        "validation": rows[(rows.role == "truth") & (rows.split == "validation")],
        "test": rows[(rows.role == "lie") & (rows.split == "test")],
    }
    X, p1 = {}, {}
    for split, t in parts.items():
        move = rng.normal(size=(len(t), 16))  # how far a draw leans to choice 1
        p1[split] = 1 / (1 + np.exp(-t.margin.to_numpy()[:, None] - 0.3 * move))
        towards = move * (2 * t.y.to_numpy()[:, None] - 1)
        X[split] = (
            rng.normal(size=(2, len(t), 16, D))
            + np.array([0.0, strength])[:, None, None, None]
            * (towards[..., None] * direction)[None]
        )
    table = votes_table(parts, X, p1, [4, 8]).set_index(["method", "draws"])
    few, many = table.loc[("listwise", 2)], table.loc[("listwise", 16)]
    if strength:
        assert (
            many.layer == 8
            and many.estimate > 0.95
            and many.estimate > few.estimate
            and table.loc[("pair ranking", 16)].estimate > 0.9
        )
        assert table.loc[("mean answer", 16)].estimate < 0.1  # on these rows the model lies
    else:
        assert few.low < 0.5 < few.high or abs(few.estimate - 0.5) < 0.15
        assert abs(many.estimate - 0.5) < 0.15


def test_a_style_keeps_ids_and_splits_and_turns_labels_only_where_it_negates():
    table = pd.DataFrame(
        {
            "example_id": ["a", "b", "c"],
            "kind": ["claim", "claim", "review"],
            "split": ["test"] * 3,
            "text": ["The city of Osaka is in Japan.", "Nothing here.", "A fine film, is it?"],
            "label": [1, 0, 1],
        }
    )
    negated = restyled(table, "negated")
    assert (
        negated.text.tolist() == ["The city of Osaka is not in Japan."]
        and negated.label.tolist() == [0]
        and negated.example_id.tolist() == ["a"]
    )
    assert restyled(negated, "negated").empty  # not negated twice
    for style in set(STYLES) - {"negated"}:
        again = restyled(table, style)
        assert (
            again.label.tolist() == [1, 0, 1]
            and again.example_id.tolist() == ["a", "b", "c"]
            and (again.text != table.text).all()
        )
    with pytest.raises(ValueError, match="expected one of"):
        restyled(table, "sung")


def test_a_probe_of_style_falls_in_another_style_and_one_of_truth_does_not(rows):
    lie = rows[(rows.role == "lie") & (rows.split == "test")]
    state = planted(rows, 1.0)
    turned = lambda some: -state(some)  # the planted mistake: what was read is turned by the style
    table = style_table(
        rows,
        {("activation", "resid_post", 3): state},
        {
            "same": (lie, {("activation", "resid_post", 3): state}),
            "turned": (lie, {("activation", "resid_post", 3): turned}),
        },
    ).set_index(["probe", "style"])
    for probe in ("logistic", "mean_difference", "ttpd"):
        assert (
            table.estimate[probe, "clean"] == table.estimate[probe, "same"] > 0.9
            and table.estimate[probe, "turned"] < 0.1
        )
    assert (
        (table.own_answer < 0.1).all() and (table.n == len(lie)).all() and (table.layer == 3).all()
    )
    assert style_table(rows[rows.y == 1], {("activation", "resid_post", 3): state}, {}).empty


def test_every_scale_reads_what_is_planted_and_noise_stays_noise(rows):
    task = make_task(rows, "truth", LYING)
    for strength, holds in (
        (1.0, lambda x: (x > 0.9).all()),
        (0.0, lambda x: x.between(0.3, 0.7).all()),
    ):
        table = scale_table(
            task,
            {
                ("activation", "resid_post", k): planted(rows, strength * (k == 2), k)
                for k in (1, 2)
            },
        )
        assert list(table.scale) == ["none", "neuron", "row", "whiten"] and holds(table.estimate)
        assert (table.layer == 2).all() or not strength


def test_every_start_is_in_the_table_and_one_is_kept(rows):
    rng = np.random.default_rng(3)
    direction = rng.normal(size=D)
    state = {
        r.row_id: np.stack([(2 * (k == r.y) - 1) * 2 * direction for k in (0, 1)])
        + rng.normal(size=(2, D))
        for r in rows.itertuples()
    }
    table = restart_table(
        make_task(rows, "truth", LYING),
        {("contrast", "resid_post", 5): lambda t: np.stack([state[i] for i in t.row_id])},
    )
    assert (
        len(table) == 10
        and table.kept.sum() == 1
        and table.loss[table.kept].item() == table.loss.min()
        and table.estimate[table.kept].item() > 0.9
    )


def test_pairs_are_ranked_by_kind_and_by_the_least_move(rows):
    rng = np.random.default_rng(4)
    some = rows.assign(move=rng.normal(size=len(rows)) * 0.1).assign(
        y=lambda t: (t.move > 0).astype(int),
        p1_draw0=0.5,
        p1_draw1=lambda t: 0.5 + t.move * (2 * t.label - 1),
    )
    move = dict(zip(some.row_id, some.move, strict=True))
    direction = rng.normal(size=D)
    held = {
        i: np.stack([rng.normal(size=D), rng.normal(size=D)])
        + np.array([[0.0], [20 * m]]) * direction
        for i, m in move.items()
    }
    features = {("two draws", "resid_post", 0): lambda t: np.stack([held[i] for i in t.row_id])}
    table = pair_table({"planted": (some, features)}, [0.0, 0.1])
    assert (
        set(table.pairs) == {"planted"}
        and table.groupby(["regime", "least_move"])
        .n.first()
        .groupby("regime")
        .is_monotonic_decreasing.all()
    )
    best = table[table.probe == "pair_ranking"].set_index(["regime", "least_move"]).estimate
    assert (best > 0.85).all() and best[LYING, 0.1] >= best[LYING, 0.0]
    assert pair_table({"none": (some.head(5), features)}, [0.0]).empty


def test_regrouping_draws_other_splits_of_the_same_sizes(rows):
    table = regrouped(rows, {("activation", "resid_post", 1): planted(rows, 0.15)}, repeats=4)
    assert (
        len(table) == 4
        and table.estimate.nunique() > 1
        and (table.n == 100).all()
        and table.estimate.between(0.5, 1).all()
    )
    assert regrouped(
        rows[rows.y == 0], {("activation", "resid_post", 1): planted(rows, 1.0)}, repeats=4
    ).empty
    assert auroc(np.array([0.0, 1.0]), np.array([0, 1])) == 1.0


def test_what_a_feature_adds_is_paired_and_zero_for_the_state_itself(rows):
    task = make_task(rows, "truth", LYING)
    state, noise = planted(rows, 0.6), planted(rows, 0.0, 1)
    features = {
        ("activation", "resid_post", 2): state,
        ("gradient", "resid_post", 2): noise,
        ("both", "resid_post", 2): lambda t: np.concatenate([state(t), state(t)], 1),
        ("activation", "mlp_out", 2): noise,
    }
    table = gain_table(task, features).set_index(["site", "feature"])
    assert table.gain["resid_post", "activation"] == table.gain_low["resid_post", "activation"] == 0
    assert (
        table.gain_high["resid_post", "gradient"] < 0
        and abs(table.gain["resid_post", "both"]) < 0.02
    )  # twice the same adds nothing
    assert table.over_residual["mlp_out", "activation"] == pytest.approx(
        table.estimate["mlp_out", "activation"] - table.estimate["resid_post", "activation"]
    )
    assert (table.gain_low <= table.gain + 1e-9).all() and (
        table.gain <= table.gain_high + 1e-9
    ).all()
