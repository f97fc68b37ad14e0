"""States in two dimensions: honest training rows alone choose the plane, and where lies lie."""

import re

import numpy as np
import pandas as pd
import pytest
from planted_states import read_from, twins

from dlk_utils.evaluation.tasks import Features
from dlk_utils.lab.findings import sides_title
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables.answer_kinds import HONEST, LIES, MISTAKES, with_kinds
from dlk_utils.lab.tables.components import POINT_COLUMNS, in_two_dimensions, project, sides

WIDTH = 8


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Twins whose model makes a mistake in every fifth honest row."""
    rows = twins(90).assign(readable=True)
    is_wrong = (rows.role == "truth") & (np.arange(len(rows)) % 10 == 0)
    return rows.assign(correct=rows.correct & ~is_wrong)


@pytest.fixture(scope="module")
def features(rows) -> Features:
    """Layer 1 holds what is true, and layer 2 what the model says; both in four neurons."""
    rng = np.random.default_rng(0)
    held = {1: rows.y, 2: rows.answer}
    readers = {}
    for layer, values in held.items():
        states = rng.normal(size=(len(rows), WIDTH))
        states[:, :4] += 6 * values.to_numpy()[:, None]
        reader = read_from(dict(zip(rows.row_id, states, strict=True)))
        readers["activation", "resid_post", layer] = reader
    return readers


def parts(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Honest training rows, and the test rows of a kind."""
    train = rows[(rows.role == "truth") & (rows.split == "train")]
    return train, with_kinds(rows[rows.split == "test"])


@pytest.fixture(scope="module")
def points(rows, features) -> pd.DataFrame:
    return project(features, *parts(rows))


def test_kinds_are_lies_honest_answers_and_mistakes_and_nothing_else(rows):
    disobeys = rows.assign(lied=rows.lied & (rows.example_id != "e2"))
    kinds = with_kinds(disobeys).set_index("row_id").kind
    assert kinds["1lie"] == LIES and kinds["1truth"] == HONEST and kinds["0truth"] == MISTAKES
    assert "2lie" not in kinds.index
    assert list(kinds.unique()) == [HONEST, LIES, MISTAKES]


def test_lies_are_with_what_is_true_where_states_hold_it_and_else_with_what_is_said(points):
    found = sides(points)
    assert found[LIES].to_dict() == {1: 1.0, 2: 0.0} and (found[HONEST] == 1).all()
    n, n_honest = ((points.kind == kind).sum() // 2 for kind in (LIES, HONEST))
    first = (
        f"At layer 1, {n_honest} of {n_honest} honest answers are nearer to the honest rows with "
        f"the same right answer, and so are {n} of {n} lies"
    )
    second = (
        f"At layer 2, {n} of {n} lies are nearer to the honest rows whose right answer is the one "
        "that they give"
    )
    assert sides_title(points, 1) == f"{first}. {second}"
    assert sides_title(points, 2) == second


def test_a_title_says_what_two_components_do_not_show_and_that_there_is_no_lie(points):
    every_other = np.arange(len(points)) % 2 == 0
    lies_by_chance = points.assign(with_truth=every_other | (points.kind == HONEST))
    of_lies = r"and so are \d+ of \d+ lies, about as many as by chance$"
    assert re.search(of_lies, sides_title(lies_by_chance, 2))
    all_by_chance = sides_title(points.assign(with_truth=every_other), 2)
    assert all_by_chance.startswith(
        "At layer 2, the two components do not separate right answers ("
    )
    assert "there was no lie" in sides_title(points[points.kind != LIES], 1)


@pytest.mark.trap(34)
def test_a_row_has_the_same_place_alone_as_among_others(rows, features, points):
    train, test = parts(rows)
    alone = pd.concat([project(features, train, test.iloc[[i]]) for i in range(6)])
    together = points[points.row_id.isin(test.row_id.head(6))]
    order = ["layer", "row_id"]
    alone, together = (table.sort_values(order, ignore_index=True) for table in (alone, together))
    pd.testing.assert_frame_equal(alone, together)


def test_labels_of_lies_do_not_choose_the_plane(rows, features, points):
    turned = rows.assign(y=np.where(rows.role == "lie", 1 - rows.y, rows.y))
    again = project(features, *parts(turned))
    places = ["first", "second", "first_share"]
    pd.testing.assert_frame_equal(again[places], points[places])


def test_lies_among_the_training_rows_do_not_choose_the_plane(monkeypatch, rows, features):
    monkeypatch.setattr(Run, "states", lambda run, layers: features)
    places = ["first", "second", "first_share"]

    def places_of(some: pd.DataFrame) -> pd.DataFrame:
        monkeypatch.setattr(Run, "truth_rows", some)
        return in_two_dimensions(Run(), layers=[1, 2])[places]

    is_training_lie = (rows.role == "lie") & (rows.split == "train")
    without_lies = places_of(rows[~is_training_lie])
    pd.testing.assert_frame_equal(places_of(rows), without_lies)
    # The training lies would move the plane if they counted.
    with_lies = project(
        features, rows[rows.split == "train"], with_kinds(rows[rows.split == "test"])
    )
    assert not np.allclose(with_lies[places], without_lies)


def test_where_choice_1_is_right_training_rows_lie_higher_on_both_components(rows, features):
    train, _ = parts(rows)
    placed = project(features, train, train.assign(kind=HONEST))
    means = placed.merge(train[["row_id", "y"]]).groupby(["layer", "y"])[["first", "second"]].mean()
    assert (means.xs(1, level="y") >= means.xs(0, level="y")).all(axis=None)


@pytest.mark.parametrize("split", ["train", "test"])
def test_without_training_or_test_rows_there_are_no_points_and_a_reason(
    monkeypatch, rows, features, split
):
    monkeypatch.setattr(Run, "truth_rows", rows[rows.split != split])
    monkeypatch.setattr(Run, "states", lambda run, layers: features)
    points = in_two_dimensions(Run(), layers=[1, 2])
    assert points.empty and list(points) == POINT_COLUMNS
    assert points.attrs["too_few_rows"].startswith("states in two dimensions")
