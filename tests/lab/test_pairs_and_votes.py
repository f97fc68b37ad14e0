"""Tables of notebook 09 on planted pairs and draws."""

import numpy as np
import pandas as pd
import pytest
import torch
from planted_states import read_from, twins
from scipy.special import expit

from dlk_utils.evaluation.tasks import LYING, make_task
from dlk_utils.lab.tables.pairs_and_votes import move_counts, pair_table, vote, vote_table

WIDTH = 24


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return twins()


@pytest.fixture(scope="module")
def pairs(rows) -> tuple[pd.DataFrame, dict]:
    """Rows whose answer moves a little, and pairs of states that differ by as much."""
    rng = np.random.default_rng(4)
    move = 0.1 * rng.normal(size=len(rows))
    moved = rows.assign(
        move=move, y=(move > 0).astype(int), p1_draw0=0.5, p1_draw1=0.5 + move * (2 * rows.y - 1)
    )
    direction = rng.normal(size=WIDTH)
    states = rng.normal(size=(len(rows), 2, WIDTH))
    states[:, 1] += 20 * move[:, None] * direction
    reader = read_from(dict(zip(rows.row_id, states, strict=True)))
    return moved, {("two draws", "resid_post", 0): reader}


@pytest.mark.slow
def test_the_truer_pass_is_found_and_more_surely_where_the_answer_moves_far(pairs):
    table = pair_table({"planted": pairs}, [0.0, 0.1])
    ranking = table[table.probe == "pair_ranking"].set_index(["regime", "least_move"])
    assert set(table.pairs) == {"planted"} and (ranking.estimate > 0.85).all()
    assert ranking.estimate[LYING, 0.1] >= ranking.estimate[LYING, 0.0]
    assert ranking.n[LYING, 0.1] < ranking.n[LYING, 0.0]


def test_kinds_of_pairs_with_too_few_rows_are_left_out(pairs):
    rows, features = pairs
    assert pair_table({"few": (rows.head(5), features)}, [0.0]).empty


def test_moves_are_counted_by_kind_and_role(pairs):
    rows, _ = pairs
    lies = rows[rows.role == "lie"]
    counts = move_counts({"planted": pairs}).loc[("planted", "lie")]
    assert counts["rows that moved 0%"] == len(lies)
    assert counts["rows that moved 10%"] == (lies.move.abs() >= 0.1).sum()
    assert counts["towards the truth"] == (lies.move > 0).mean()


def test_a_vote_leans_to_what_the_truer_draws_say():
    truer = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    p1 = torch.tensor([[0.9, 0.2], [0.9, 0.2], [0.9, 0.2]])
    assert vote(truer, p1).sign().tolist() == [1, -1, 0]


def draws_that_hold_the_truth(rows: pd.DataFrame, strength: float) -> dict:
    """Features of 16 draws at layers 4 and 8; at 8, draws that lean to the truth lie apart."""
    rng = np.random.default_rng(2)
    direction = rng.normal(size=WIDTH)
    lean = rng.normal(size=(len(rows), 16, 1))
    p1 = expit(rows.margin.to_numpy()[:, None, None] + 0.3 * lean)
    towards_truth = lean * (2 * rows.y.to_numpy()[:, None, None] - 1)
    features = {}
    for layer, held in ((4, 0.0), (8, strength)):
        states = rng.normal(size=(len(rows), 16, WIDTH)) + held * towards_truth * direction
        draws = np.concatenate([states, p1], axis=2)
        reader = read_from(dict(zip(rows.row_id, draws, strict=True)))
        features["draws", "resid_post", layer] = reader
    return features


def test_more_draws_vote_better_where_draws_hold_the_truth(rows):
    task = make_task(rows, "truth", LYING)
    table = vote_table(task, draws_that_hold_the_truth(rows, 1.0)).set_index(["method", "draws"])
    few, many = table.loc[("listwise", 2)], table.loc[("listwise", 16)]
    assert many.layer == 8 and many.estimate > 0.95 and many.estimate > few.estimate
    assert table.estimate["pair ranking", 16] > 0.9
    # On these rows the model lies.
    assert table.estimate["mean answer", 16] < 0.1


def test_votes_stay_at_chance_where_draws_hold_nothing(rows):
    task = make_task(rows, "truth", LYING)
    table = vote_table(task, draws_that_hold_the_truth(rows, 0.0)).set_index(["method", "draws"])
    assert abs(table.estimate["listwise", 2] - 0.5) < 0.15
    assert abs(table.estimate["listwise", 16] - 0.5) < 0.15
