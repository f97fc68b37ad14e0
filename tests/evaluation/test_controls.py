"""Each control catches the shortcut that is planted for it."""

import numpy as np
import pandas as pd
import pytest
from planted_rows import TRUTH, features_of, make_rows, planted_states

from dlk_utils.evaluation import evaluate
from dlk_utils.evaluation.controls import (
    ASKED_AGAIN,
    ORIENTED,
    TOLD_TO_LIE_PROBE,
    TOLD_TO_LIE_WORDS,
    TRUTH_TIMES_TURN,
    TURNED,
    TWIN,
    fit_shuffled_labels,
    random_direction_scores,
    rival_scores,
    scores_without_states,
)
from dlk_utils.evaluation.evaluate import evaluate_tasks, possible_tasks
from dlk_utils.evaluation.selection import FittingRows
from dlk_utils.evaluation.stats import auroc
from dlk_utils.evaluation.tasks import KNOWN, LYING, Task, make_task
from dlk_utils.probes import PAIR_PROBES, Logistic


def aurocs_without_states(rows, target: str = "truth") -> dict[str, float]:
    task = make_task(rows, target, TRUTH)
    y = task.test.y.to_numpy()
    return {name: auroc(scores, y) for name, scores in scores_without_states(task).items()}


@pytest.mark.trap(33)
def test_where_nothing_is_planted_every_control_is_at_chance():
    rows = make_rows(600)
    task = make_task(rows, "truth", TRUTH)
    features = features_of(planted_states(rows, 0.0))
    y = task.test.y.to_numpy()
    for score in aurocs_without_states(rows).values():
        assert abs(score - 0.5) < 0.12
    read = features["activation", "resid_post", 0]
    random = [auroc(s, y) for s in random_direction_scores(read, task, seed=0)]
    assert abs(np.mean(random) - 0.5) < 0.06


def test_shuffled_labels_do_not_read_what_is_planted():
    rows = make_rows()
    task = make_task(rows, "truth", TRUTH)
    features = features_of(planted_states(rows, 4.0))
    fitting_rows = FittingRows.read(features, task.train, task.validation)
    fits = fit_shuffled_labels(Logistic, fitting_rows, task, seed=0)
    y = task.test.y.to_numpy()
    assert abs(np.mean([auroc(fit.score(task.test), y) for fit in fits]) - 0.5) < 0.25


@pytest.mark.trap(42)
def test_tf_idf_catches_a_planted_word():
    rows = make_rows()
    rows["prompt"] = rows.prompt + np.where(rows.y == 1, " hooray", " alas")
    found = aurocs_without_states(rows)
    assert found["TF-IDF"] == 1.0
    assert found["instruction only"] < 0.7


def test_tf_idf_of_the_question_reads_the_question_only():
    rows = make_rows()
    rows["text"] = np.where(rows.y == 1, "hooray", "alas")
    found = aurocs_without_states(rows)
    assert found["TF-IDF, question only"] == 1.0
    assert found["TF-IDF"] < 0.7


def test_the_length_of_the_prompt_is_a_control():
    rows = make_rows()
    rows["prompt"] = rows.prompt + np.where(rows.y == 1, " stone stone stone", "")
    assert aurocs_without_states(rows)["length"] > 0.95


@pytest.mark.trap(3)
@pytest.mark.parametrize("column", ["instruction", "template", "dataset"])
def test_metadata_catch_a_class_that_the_form_of_the_prompt_decides(column):
    rows = make_rows()
    rows[column] = np.where(rows.y == 1, "that", "this")
    found = aurocs_without_states(rows)
    assert found["metadata"] == 1.0
    assert (found["instruction only"] == 1.0) == (column == "instruction")
    assert found["own answer"] < 0.7


@pytest.mark.trap(38)
def test_the_own_answer_catches_a_class_that_is_the_answer():
    rows = make_rows()
    rows["margin"] = rows.margin.abs() * (2 * rows.y - 1)
    found = aurocs_without_states(rows)
    assert found["own answer"] == 1.0
    assert found["TF-IDF"] < 0.7


def test_for_lies_the_own_answer_is_how_unsure_the_answer_is():
    rows = make_rows()
    sure = 20 * np.random.default_rng(0).choice([-1, 1], len(rows))
    rows["margin"] = np.where(rows.y == 1, rows.margin, sure)
    assert aurocs_without_states(rows, "lie")["own answer"] > 0.98


def test_for_pairs_knowing_the_label_and_the_change_of_the_answer_is_knowing_the_class():
    rng = np.random.default_rng(0)
    rows = make_rows()
    rows["p1_draw0"], rows["p1_draw1"] = rng.uniform(size=(2, len(rows)))
    rows["move"] = (rows.p1_draw1 - rows.p1_draw0) * (2 * rows.label - 1)
    rows["y"] = (rows.move > 0).astype(int)
    assert abs(aurocs_without_states(rows, "pair")["TF-IDF"] - 0.5) < 0.2
    rows["prompt"] = np.where(rows.label == 1, "true", "false")
    assert aurocs_without_states(rows, "pair")["TF-IDF"] == 1.0


# Rivals: what the model's answers tell, to those who know when to trust them.


def lying_rows(obeys: np.ndarray | None = None, n: int = 300) -> pd.DataFrame:
    """Twins of a model that knows everything, and lies when told to where `obeys` [n] holds.

    Every word of the prompts is noise but one, "lie", in those that tell it to lie.
    """
    honest = make_rows(n)
    margin = np.abs(honest.margin) * (2 * honest.y - 1)
    honest = honest.assign(margin=margin, twin_margin=margin, asked_again_margin=margin)
    lies = honest.assign(row_id=honest.row_id + " lie", role="lie", prompt=honest.prompt + " lie")
    lies["instruction"] = "lie"
    lies["margin"] = np.where(True if obeys is None else obeys, -margin, margin)
    return pd.concat([honest, lies], ignore_index=True)


def aurocs_by_regime(rows: pd.DataFrame, states: dict) -> pd.DataFrame:
    """Regime by name of a probe or control -> signed AUROC, at the selected layer."""
    tasks = possible_tasks(rows, "truth")
    with pytest.MonkeyPatch.context() as patch:
        # One probe is enough here, and most others take long to fit.
        patch.setattr(evaluate, "STATE_PROBES", {"logistic": Logistic})
        patch.setattr(evaluate, "MORE_STATE_PROBES", {})
        patch.setattr(evaluate, "STACK_PROBES", {})
        table = pd.concat(evaluate_tasks(tasks, features_of(states), n_boot=50))
    return table[table.selected].pivot(index="probe", columns="regime", values="estimate")


@pytest.mark.trap(38)
def test_the_turned_answer_beats_a_probe_that_reads_only_the_instruction():
    rows = lying_rows().assign(knows=True)
    reads_instruction = planted_states(rows.assign(y=rows.role == "lie"), 8.0)
    found = aurocs_by_regime(rows, reads_instruction)
    assert found.loc[TURNED, LYING] == 1.0
    assert found.loc["own answer", LYING] == 0.0
    assert abs(found.loc["logistic", LYING] - 0.5) < 0.2
    # to know of the instruction is enough to know the truth
    assert found.loc[TOLD_TO_LIE_PROBE, LYING] > 0.95
    assert found.loc[TOLD_TO_LIE_WORDS, LYING] > 0.95


def test_a_probe_of_truth_beats_the_turned_answer_of_a_model_that_does_not_always_obey():
    obeys = np.random.default_rng(3).random(300) < 0.6
    rows = lying_rows(obeys).assign(knows=True)
    found = aurocs_by_regime(rows, planted_states(rows, 8.0))
    assert found.loc["logistic", LYING] > 0.95
    assert found.loc[TURNED, LYING] < 0.8
    assert found.loc[ASKED_AGAIN, LYING] == found.loc[TWIN, LYING] == 1.0


def test_asking_again_is_no_rival_where_it_decides_which_rows_are_known():
    rows = lying_rows().assign(knows=True)
    assert ASKED_AGAIN in rival_scores(make_task(rows, "truth", LYING))
    of_known = rival_scores(make_task(rows, "truth", KNOWN))
    assert ASKED_AGAIN not in of_known and TWIN in of_known


def test_the_own_answer_is_oriented_on_the_training_rows_of_the_regime():
    rows = lying_rows().assign(knows=True)
    found = aurocs_by_regime(rows, planted_states(rows, 0.0))
    assert found.loc[ORIENTED, "by example, lie rows"] == 1.0
    assert found.loc[ORIENTED, LYING] == 0.0
    assert found.loc[ORIENTED, "by example, truth rows"] == 1.0


def test_a_lie_is_found_by_asking_again():
    rows = make_rows().assign(role="lie")
    truth = np.where(rows.label == 1, 2.0, -2.0)
    rows = rows.assign(asked_again_margin=truth, twin_margin=truth, y=(rows.margin * truth < 0) * 1)
    task = Task("lie", LYING, *(rows[rows.split == s] for s in ("train", "validation", "test")))
    scores = rival_scores(task)
    assert auroc(scores[ASKED_AGAIN], task.test.y.to_numpy()) == 1.0
    assert TURNED not in scores


def test_the_better_sign_of_being_sure_is_chosen_for_lies():
    rows = make_rows()
    sure = 20 * np.random.default_rng(0).choice([-1, 1], len(rows))
    rows["margin"] = np.where(rows.y == 1, sure, rows.margin)
    found = aurocs_without_states(rows, "lie")
    assert found[ORIENTED] > 0.98
    assert found["own answer"] < 0.02


def test_pairs_that_no_linear_ranker_can_rank_are_ranked_by_the_truth_times_the_turn():
    """The truer draw is the one that leans to the truth: a product of two things that are held."""
    rng = np.random.default_rng(6)
    rows = make_rows(600)
    turn = rng.normal(size=len(rows))
    move = turn * (2 * rows.label - 1)
    rows = rows.assign(p1_draw0=0.5, p1_draw1=0.5 + 0.1 * turn, move=move, y=(move > 0).astype(int))
    states = rng.normal(size=(len(rows), 2, 20))
    states[:, :, 0] += 6 * (rows.label.to_numpy() - 0.5)[:, None]
    states[:, 1, 1] += 6 * turn
    features = features_of(dict(zip(rows.row_id, states, strict=True)), feature="two draws")
    table = evaluate.evaluate(make_task(rows, "pair", TRUTH), features, n_boot=50)
    found = table[table.selected].set_index("probe").estimate
    assert found[TRUTH_TIMES_TURN] > 0.95
    assert (found[list(PAIR_PROBES)] < 0.65).all()
