"""Tables of notebook 11: a planted direction moves the answer, and the controls do not."""

import functools
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import new_model
from torch import nn

from dlk_utils.evaluation.tasks import LYING, Task, make_task
from dlk_utils.extract.passes import activations, answer_logprobs, margin_gradients
from dlk_utils.lab.findings import (
    NOTHING_MOVED,
    layer_verdicts,
    layers_title,
    steering_findings,
    steering_in_brief,
    steering_table,
    steering_title,
    steering_verdict,
)
from dlk_utils.lab.tables.steering import (
    ANSWER_COLUMNS,
    CONTROLS,
    NOTHING,
    OWN_ANSWER,
    RANDOM,
    SHUFFLED,
    TOLD,
    TRUTH,
    TRUTH_LDA,
    TRUTH_LOGISTIC,
    TRUTHS,
    TWIN,
    answers_of_moves,
    answers_when_steered,
    both_ways,
    direction_table,
    effects,
    fit_directions,
    labelled_moves,
    layer_lines,
    responses,
    twin_move,
    twins_of,
    with_undisturbed,
)

OF_HONEST = (TRUTH, TRUTH_LDA, TRUTH_LOGISTIC)
WIDTH, LAYER, DOSE = 96, 1, 4.0
TRUE, FALSE, HONEST, LYING_TOKEN = 10, 11, 12, 13
NO, YES = 1, 2


@functools.cache
def liar() -> nn.Module:
    """A model whose last token says whether it answers yes, along one direction.

    The last token is `TRUE` or `FALSE`: the answer that the model is about to give. (Rows told to
    lie about a true claim end with `FALSE`.) The token before it is the instruction.
    """
    model = new_model("llama", hidden_size=WIDTH, tie_word_embeddings=False)
    with torch.no_grad():
        unit = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
        model.model.embed_tokens.weight[TRUE] += unit
        model.model.embed_tokens.weight[FALSE] -= unit
        model.lm_head.weight.zero_()
        model.lm_head.weight[YES], model.lm_head.weight[NO] = 3 * unit, -3 * unit
    return model


@functools.cache
def rows() -> pd.DataFrame:
    """Twins of 90 examples; the model does as it is told."""
    rng = np.random.default_rng(0)
    table = []
    for i in range(90):
        label = int(rng.integers(0, 2))
        start = rng.integers(20, 90, 4).tolist()
        for role in ("truth", "lie"):
            answer = label if role == "truth" else 1 - label
            told = HONEST if role == "truth" else LYING_TOKEN
            table.append(
                {
                    "row_id": f"{i}{role}",
                    "example_id": f"e{i}",
                    "split": ("train", "validation", "test")[i % 3],
                    "role": role,
                    "label": label,
                    "y": label,
                    "answer": answer,
                    "knows": True,
                    "input_ids": [*start, told, TRUE if answer else FALSE],
                    "choice_ids": [[NO], [YES]],
                }
            )
    return pd.DataFrame(table)


def task() -> Task:
    return make_task(rows(), "truth", LYING)


def states(some: pd.DataFrame) -> np.ndarray:
    return activations(liar(), list(some.input_ids), layers=LAYER, progress=False)["resid_post"][0]


def gradients(some: pd.DataFrame) -> np.ndarray:
    prompts, choices = list(some.input_ids), list(some.choice_ids)
    found = margin_gradients(liar(), prompts, choices, layers=LAYER, progress=False)
    return found["resid_post"][0]


@pytest.fixture(scope="module")
def directions() -> dict:
    twins = twins_of(rows()[rows().split == "train"])
    fitted = fit_directions(task().train, twins, states, gradients, n_random=4)
    return {direction.name: direction for direction in fitted}


@pytest.fixture(scope="module")
def held_out() -> pd.DataFrame:
    return rows()[rows().split == "test"].reset_index(drop=True)


@pytest.fixture(scope="module")
def tables(directions, held_out) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the model does undisturbed, and after pushes along every direction."""
    labelled = [
        (
            (NOTHING, 0, LAYER, 0.0),
            twin_move(held_out, states, LAYER)._replace(scales=np.zeros(len(held_out))),
        )
    ]
    for direction in directions.values():
        for dose in both_ways([DOSE]):
            labelled += labelled_moves(direction, LAYER, held_out, dose)
    answers = answers_of_moves(liar(), held_out, labelled)
    at_rest = answers[answers.direction == NOTHING]
    return responses(at_rest, at_rest), responses(answers[answers.direction != NOTHING], at_rest)


def test_every_kind_of_direction_is_as_long_as_it_should_be(directions):
    of_twins = states(twins_of(rows()[rows().split == "train"]))
    for name in (*TRUTHS, OWN_ANSWER, TOLD):
        [vector] = directions[name].vectors
        unit = vector / np.linalg.norm(vector)
        assert np.linalg.norm(vector) == pytest.approx((of_twins @ unit).std(), rel=1e-6)
    for control in CONTROLS:
        lengths = np.linalg.norm(directions[control].vectors, axis=1)
        assert len(lengths) == 4
        assert lengths == pytest.approx(np.linalg.norm(directions[TRUTH].vectors[0]), rel=1e-6)
    assert [name for name, d in directions.items() if not d.by_label] == [TOLD]


def test_the_overview_compares_with_the_first_direction(directions):
    table = direction_table(list(directions.values()), states(task().train))
    table = table.set_index("direction")
    assert table.cosine[TRUTH] == pytest.approx(1) and table.cosine[OWN_ANSWER] > 0.9
    assert table.cosine[RANDOM] < 0.3 and table.directions[RANDOM] == 4
    assert table.push[RANDOM] == pytest.approx(table.push[TRUTH])


def test_a_direction_that_decides_the_answer_flips_it_and_the_controls_do_not(tables):
    undisturbed, pushed = tables
    assert (undisturbed.disobeyed == 0).all() and (undisturbed.n == 30).all()
    cell = pushed.set_index(["direction", "dose", "role"])
    for name in (*OF_HONEST, OWN_ANSWER):
        assert cell.disobeyed[name, DOSE, "lie"] > 0.9
        assert cell.disobeyed[name, -DOSE, "truth"] > 0.9
        assert cell.disobeyed[name, DOSE, "truth"] == cell.disobeyed[name, -DOSE, "lie"] == 0
    assert pushed[pushed.direction == RANDOM].disobeyed.max() < 0.2
    # States vary along that axis most, so by chance shuffled labels give it too, with either sign.
    assert cell.disobeyed[SHUFFLED, DOSE, "lie"] < 0.9


def test_the_verdict_of_a_planted_answer_direction_is_that_it_moves_the_answer(tables):
    effect = effects(tables[1], DOSE)
    for name in (*OF_HONEST, OWN_ANSWER):
        assert steering_verdict(effect.loc[name], name) == "moves the answer"
    shown = steering_table(tables[1], DOSE)
    assert shown.verdict[TRUTH] == "moves the answer" and shown.verdict[RANDOM] == "control"
    brief = steering_in_brief(tables[1], DOSE)
    assert brief.endswith("the direction moves the answer")
    title = steering_title(tables[1], DOSE, "lie")
    assert re.match(r"Told to lie, \d+ % tell the truth after a push towards the truth, ", title)


def test_all_tokens_may_be_pushed_and_rows_of_either_label_each_their_way(directions, held_out):
    for sign, role in ((1, "lie"), (-1, "truth")):
        answers = answers_when_steered(liar(), held_out, directions[TRUTH], LAYER, sign * DOSE)
        assert list(answers.row_id) == list(held_out.row_id)
        counted = responses(answers, answers).set_index("role")
        assert counted.disobeyed[role] > 0.9


def test_with_the_state_of_its_twin_a_row_answers_like_its_twin(held_out):
    move = twin_move(held_out, states, LAYER)
    answers = answers_of_moves(liar(), held_out, [((TWIN, 0, LAYER, 1.0), move)])
    table = responses(answers, answers)
    assert (table.disobeyed == 1).all()
    assert layers_title(table).startswith(f"From layer {LAYER} on")
    lines = layer_lines(table, "lie")
    assert list(lines.line) == [TWIN]


def answers_table(**shares: float) -> pd.DataFrame:
    """Answers of 40 examples at `DOSE` either way; `shares` of "lie_plus" and so on disobey."""
    table = []
    for direction in (TRUTH, RANDOM):
        for way, dose in (("plus", DOSE), ("minus", -DOSE)):
            for role in ("lie", "truth"):
                share = shares.get(f"{role}_{way}", 0.0) if direction == TRUTH else 0.0
                for i in range(40):
                    disobeys = i < 40 * share
                    is_right = disobeys == (role == "lie")
                    label = i % 2
                    probabilities = (0.9, 0.05) if is_right == (label == 0) else (0.05, 0.9)
                    row = ["last token", direction, 0, 3, dose, f"{i}{role}", f"e{i}", role, label]
                    table.append([*row, *np.log(probabilities)])
    return pd.DataFrame(table, columns=ANSWER_COLUMNS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({}, NOTHING_MOVED),
        ({"lie_plus": 0.8, "truth_minus": 0.8}, "moves the answer"),
        ({"lie_minus": 0.8, "truth_minus": 0.8}, "moves what it takes to be true"),
        ({"lie_plus": 0.8, "lie_minus": 0.8}, "disturbs lies, whichever way it is pushed"),
        ({"truth_minus": 0.8}, "moves honest answers only"),
        ({"lie_plus": 0.8}, "moves lies only, as an answer would"),
        ({"lie_minus": 0.8}, "moves lies only, as a belief would"),
        (
            {"lie_plus": 0.8, "truth_minus": 0.8, "truth_plus": 0.5},
            "moves the answer, but also rows that should stay",
        ),
        ({"lie_plus": 0.05}, NOTHING_MOVED),
    ],
)
def test_belief_and_answer_are_told_apart_by_the_sign_of_the_push(shares, expected):
    at_rest = answers_table()
    table = responses(answers_table(**shares), at_rest[at_rest.dose == DOSE][:80])
    assert steering_verdict(effects(table, DOSE).loc[TRUTH], TRUTH) == expected


def test_an_answer_that_cannot_be_read_neither_obeys_nor_disobeys():
    answers = answers_table(lie_plus=1.0, truth_plus=1.0)
    answers = answers[(answers.direction == TRUTH) & (answers.dose == DOSE)]
    unreadable = answers.assign(logprob_0=answers.logprob_0 - 9, logprob_1=answers.logprob_1 - 9)
    table = responses(unreadable, answers)
    assert (table.unreadable == 1).all() and (table.disobeyed == 0).all()
    assert (table.difference == -1).all()
    assert (responses(answers, answers).disobeyed == 1).all()


def test_a_curve_begins_with_what_the_rows_do_undisturbed(tables):
    undisturbed, pushed = tables
    curve = with_undisturbed(pushed, undisturbed)
    assert set(curve[curve.dose == 0].direction) == set(pushed.direction)
    assert len(curve) == len(pushed) + 2 * pushed.direction.nunique()


def test_the_findings_are_three_lines_and_none_without_rows(tables):
    _, pushed = tables
    is_truth_or_random = pushed.direction.isin([TRUTH, RANDOM])
    twin = pushed[pushed.direction == TRUTH].assign(direction=TWIN)
    by_layer = pd.concat([pushed[is_truth_or_random], twin])
    in_brief, moving, at_layers = steering_findings(pushed, by_layer, DOSE)
    assert in_brief.endswith("So the direction moves the answer.")
    assert re.match(r"\* Of 7 directions, \d move more answers than the controls do: ", moving)
    assert f"{TRUTH} (moves the answer)" in moving
    assert at_layers.startswith(f"* From layer {LAYER} on")
    assert f"at layer {LAYER} it moves the answer" in layer_verdicts(by_layer, DOSE)
    nothing = pushed.head(0)
    assert steering_findings(nothing, nothing, DOSE) == []
    assert layer_verdicts(nothing, DOSE).endswith(": not scored.")
    assert steering_table(nothing, DOSE).empty
    assert steering_in_brief(nothing, DOSE) == layers_title(nothing) == "not scored"


def test_without_rows_the_counts_are_empty():
    empty = pd.DataFrame(columns=ANSWER_COLUMNS)
    table = responses(empty, empty)
    assert table.empty and layer_lines(table, "lie").empty
    assert with_undisturbed(table, table).empty


def test_the_planted_model_does_as_it_is_told():
    logprobs, _ = answer_logprobs(
        liar(), list(rows().input_ids), list(rows().choice_ids), progress=False
    )
    assert ((logprobs[:, 1] > logprobs[:, 0]) == rows().answer).all()
