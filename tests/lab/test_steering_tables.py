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
    EITHER_SIGN,
    FITS_NEITHER,
    NOT_AS_TOLD,
    NOT_BOTH_LABELS,
    NOTHING_MOVED,
    by_sign,
    everywhere_findings,
    everywhere_table,
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
    as_long_as_truth,
    both_ways,
    controls_of_other_lengths,
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
            (NOTHING, NOTHING, 0, LAYER, 0.0),
            twin_move(held_out, states, LAYER)._replace(scales=np.zeros(len(held_out))),
        )
    ]
    controls = controls_of_other_lengths(list(directions.values()))
    for direction in (*directions.values(), *controls):
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


def test_each_direction_has_controls_of_its_own_length(directions):
    controls = controls_of_other_lengths(list(directions.values()))
    names = [name for name in directions if name not in (TRUTH, *CONTROLS)]
    assert [(c.as_long_as, c.name) for c in controls] == [(n, c) for n in names for c in CONTROLS]
    for control in controls:
        length = np.linalg.norm(directions[control.as_long_as].vectors[0])
        assert np.linalg.norm(control.vectors, axis=1) == pytest.approx(length, rel=1e-6)
        same_way = directions[control.name].vectors
        assert control.vectors / length == pytest.approx(
            same_way / np.linalg.norm(same_way, axis=1, keepdims=True), rel=1e-6
        )


def test_the_overview_compares_with_the_first_direction(directions):
    table = direction_table(list(directions.values()), states(task().train))
    table = table.set_index("direction")
    assert table.cosine[TRUTH] == pytest.approx(1) and table.cosine[OWN_ANSWER] > 0.9
    assert table.cosine[RANDOM] < 0.3 and table.directions[RANDOM] == 4
    assert table.push[RANDOM] == pytest.approx(table.push[TRUTH])


def test_a_direction_that_decides_the_answer_flips_it_and_the_controls_do_not(tables):
    undisturbed, pushed = tables
    assert (undisturbed.disobeyed == 0).all() and (undisturbed.n == 30).all()
    cell = as_long_as_truth(pushed).set_index(["direction", "dose", "role"])
    for name in (*OF_HONEST, OWN_ANSWER):
        assert cell.disobeyed[name, DOSE, "lie"] > 0.9
        assert cell.disobeyed[name, -DOSE, "truth"] > 0.9
        assert cell.disobeyed[name, DOSE, "truth"] == cell.disobeyed[name, -DOSE, "lie"] == 0
    assert cell.disobeyed[RANDOM].max() < 0.2
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
    assert re.match(r"On rows told to lie, \d+ % of the answers are right after a push by", title)


def test_all_tokens_may_be_pushed_and_rows_of_either_label_each_their_way(directions, held_out):
    for sign, role in ((1, "lie"), (-1, "truth")):
        answers = answers_when_steered(liar(), held_out, directions[TRUTH], LAYER, sign * DOSE)
        assert list(answers.row_id) == list(held_out.row_id)
        counted = responses(answers, answers).set_index("role")
        assert counted.disobeyed[role] > 0.9


def test_with_the_state_of_its_twin_a_row_answers_like_its_twin(held_out):
    move = twin_move(held_out, states, LAYER)
    answers = answers_of_moves(liar(), held_out, [((TWIN, TWIN, 0, LAYER, 1.0), move)])
    table = responses(answers, answers)
    assert (table.disobeyed == 1).all()
    assert layers_title(table).startswith(f"From layer {LAYER} on")
    lines = layer_lines(table, "lie")
    assert list(lines.line) == [TWIN]


def test_the_layers_at_which_the_twins_state_turns_lies_are_named_as_they_are():
    def title(**share_by_layer: float) -> str:
        layers = [int(name.removeprefix("layer_")) for name in share_by_layer]
        shares = {"disobeyed": list(share_by_layer.values())}
        return layers_title(
            pd.DataFrame({"layer": layers, "direction": TWIN, "role": "lie"} | shares)
        )

    turns = "the honest twin's state turns at least half of the lies into true answers"
    assert title(layer_3=0.1, layer_6=0.5, layer_9=0.9) == f"From layer 6 on, {turns}"
    assert title(layer_3=0.6, layer_6=0.4, layer_9=0.9) == f"From layer 9 on, {turns}"
    assert title(layer_3=0.6, layer_6=0.7, layer_9=0.4) == f"At layers 3 and 6, {turns}"
    assert title(layer_3=0.1, layer_6=0.4).endswith("(at most 40 %)")


def answers_table(**shares: float) -> pd.DataFrame:
    """Answers of 40 examples at `DOSE` either way; `shares` of "lie_plus" and so on disobey.

    All rows obey after a push along the control.
    """
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
                    row = ["last token", direction, TRUTH, 0, 3, dose]
                    row += [f"{i}{role}", f"e{i}", role, label]
                    table.append([*row, *np.log(probabilities)])
    return pd.DataFrame(table, columns=ANSWER_COLUMNS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({}, NOTHING_MOVED),
        ({"lie_plus": 0.8, "truth_minus": 0.8}, "moves the answer"),
        ({"lie_minus": 0.8, "truth_minus": 0.8}, "moves what the model takes to be true"),
        ({"lie_plus": 0.8, "lie_minus": 0.8}, EITHER_SIGN),
        ({"lie_plus": 0.4, "lie_minus": 0.8, "truth_plus": 0.6, "truth_minus": 0.6}, EITHER_SIGN),
        ({"truth_minus": 0.8}, "moves honest answers only"),
        ({"lie_plus": 0.8}, "moves lies only, as an answer would"),
        ({"lie_minus": 0.8}, "moves lies only, as a belief would"),
        ({"lie_plus": 0.8, "truth_minus": 0.8, "truth_plus": 0.5}, FITS_NEITHER),
        ({"lie_plus": 0.05}, NOTHING_MOVED),
    ],
)
def test_belief_and_answer_are_told_apart_by_the_sign_of_the_push(shares, expected):
    table = responses_to_pushes(**shares)
    assert steering_verdict(effects(table, DOSE).loc[TRUTH], TRUTH) == expected


def responses_to_pushes(**shares: float) -> pd.DataFrame:
    at_rest = answers_table()
    return responses(answers_table(**shares), at_rest[at_rest.dose == DOSE][:80])


@pytest.mark.parametrize(
    ("cells", "direction", "expected"),
    [
        (["some lie -"], TRUTH, NOT_BOTH_LABELS),
        (["lie +", "some lie -"], TRUTH, EITHER_SIGN),
        (["lie +", "truth -"], TOLD, "moves whether the model lies"),
        (["lie +", "some lie -"], TOLD, NOT_AS_TOLD),
    ],
)
def test_a_verdict_needs_rows_of_both_labels_and_that_the_others_stay(cells, direction, expected):
    names = [
        f"{some}{role} {way}" for some in ("", "some ") for role in ("lie", "truth") for way in "+-"
    ]
    effect = pd.Series(0, index=names)
    effect[cells] = 1
    assert steering_verdict(effect, direction) == expected


def test_a_direction_is_compared_with_controls_of_its_own_length_only():
    table = responses_to_pushes(lie_plus=0.3, truth_minus=0.3)
    is_control = table.direction == RANDOM
    strong = table[is_control].assign(
        as_long_as=TRUTH_LDA, disobeyed=0.9, difference=0.9, difference_low=0.8, difference_high=1.0
    )
    lda = table[~is_control].assign(direction=TRUTH_LDA, as_long_as=TRUTH_LDA)
    unmatched = lda.assign(direction=TRUTH_LOGISTIC, as_long_as=TRUTH_LOGISTIC)
    pushed = pd.concat([table, strong, lda, unmatched])
    effect = effects(pushed, DOSE)
    assert list(effect.index) == [TRUTH, TRUTH_LDA]
    assert steering_verdict(effect.loc[TRUTH], TRUTH) == "moves the answer"
    assert steering_verdict(effect.loc[TRUTH_LDA], TRUTH_LDA) == NOTHING_MOVED
    title = steering_title(pushed, DOSE, "lie")
    assert title.endswith("Pushes of this length along controls give at most 0 %")
    shown = steering_table(pd.concat([table, strong, lda]), DOSE)["controls of its length, at most"]
    assert list(shown[[TRUTH, TRUTH_LDA]]) == ["0.00", "0.90"] and pd.isna(shown[RANDOM])


def test_answers_that_change_with_either_sign_are_no_evidence_of_a_belief():
    table = responses_to_pushes(lie_plus=0.3, lie_minus=0.7, truth_plus=0.45, truth_minus=0.4)
    overview = pd.DataFrame({"direction": [TRUTH], "push": [0.16]})
    brief = steering_in_brief(table, DOSE, overview)
    assert "along the direction of truth (64 % of the mean length of a state), the model" in brief
    assert "So a push of either sign turns lies into right answers." in brief
    assert brief.endswith("weak evidence of what the direction stands for")
    assert "the model answers 30 % [" in brief and "70 % [" in brief
    assert by_sign(table, DOSE)[1:] in brief


@pytest.mark.parametrize(
    ("shares", "lies", "honest"),
    [
        (
            {"lie_plus": 0.2, "lie_minus": 0.8, "truth_plus": 0.45, "truth_minus": 0.4},
            "lies change clearly more often when pushed away from the truth, as we would "
            "expect if the direction stood for a belief",
            "Honest answers do not clearly depend on the sign of the push",
        ),
        (
            {"lie_plus": 0.8, "lie_minus": 0.2, "truth_minus": 0.9},
            "lies change clearly more often when pushed towards the truth, as we would "
            "expect if the direction stood for the answer",
            "Honest answers change clearly more often when pushed away from the truth, as we would "
            "expect whether the direction stood for the answer or for a belief",
        ),
        (
            {"lie_plus": 0.5, "lie_minus": 0.45, "truth_plus": 0.9, "truth_minus": 0.2},
            "lies do not clearly depend on the sign of the push",
            "Honest answers change clearly more often when pushed towards the truth, which we "
            "would not expect whether the direction stood for the answer or for a belief",
        ),
    ],
)
def test_a_share_depends_on_the_sign_if_the_intervals_do_not_overlap(shares, lies, honest):
    assert by_sign(responses_to_pushes(**shares), DOSE) == f"{lies}. {honest}"


def test_a_direction_that_is_removed_has_no_dose_and_its_damage_is_counted():
    table = responses_to_pushes(lie_plus=0.5, lie_minus=0.5)
    truth = table[table.direction == TRUTH].assign(where="all tokens")
    removed = table[table.dose == DOSE].assign(dose=0.0, layer=-1)
    is_truth = removed.direction == TRUTH
    removed = removed.assign(unreadable=0.12 * is_truth, unreadable_low=0.06 * is_truth)
    everywhere = pd.concat([truth, removed])
    shown = everywhere_table(everywhere)
    assert set(shown.change) == {
        "all tokens pushed by +4",
        "all tokens pushed by -4",
        "removed from the last token",
    }
    assert list(shown.layer.unique()) == ["3", "all"]
    by_push, damage = everywhere_findings(everywhere, DOSE)
    assert by_push == (
        "* When all tokens are pushed, neither lies nor honest answers clearly depend on the sign "
        "of the push."
    )
    assert "removed, 12 % of the answers cannot be read. With another direction rem" in damage
    assert damage.endswith(
        "all answers can be read. So some of the effect of removing the direction of truth is "
        "damage."
    )
    harmless = everywhere_findings(everywhere.assign(unreadable=0.0, unreadable_low=0.0), DOSE)[1]
    assert harmless.endswith("all answers can be read.")
    others = everywhere.assign(unreadable=0.03)
    assert (
        everywhere_findings(others, DOSE)[1].split(". ")[1].endswith("3 % or less cannot be read")
    )
    assert everywhere_findings(everywhere.head(0), DOSE) == []


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
    assert re.match(r"\* \d of 7 directions change more answers than controls of their", moving)
    assert re.search(rf"\w+ move the answer \(\*{TRUTH}\*, ", moving)
    assert at_layers.startswith(f"* From layer {LAYER} on")
    assert f"At layer {LAYER} it moves the answer." in layer_verdicts(by_layer, DOSE)
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
