"""Tables of notebook 05: the states of a layer in two dimensions."""

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.tasks import Features, require_rows
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import empty_if_too_few
from dlk_utils.lab.tables.answer_kinds import with_kinds

POINT_COLUMNS = [
    *("layer", "row_id", "kind", "right", "text", "first", "second"),
    *("first_share", "second_share", "with_truth"),
]
SHOWN_CHARACTERS = 48
"""Longest text shown with a point. It is short because the page holds it once per layer."""


# It is not kept, as it is computed in a second or two.
@empty_if_too_few(POINT_COLUMNS)
def in_two_dimensions(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Project the states of test rows on two components of honest rows; see `project`."""
    rows = run.truth_rows
    train = rows[(rows.role != "lie") & (rows.split == "train")]
    require_rows({"train": train}, "states in two dimensions")
    test = with_kinds(rows[rows.split == "test"])
    if test.empty:
        raise TooFewRows(
            "states in two dimensions: expected test rows with a lie, an honest answer or a "
            "mistake, got none; ask for more examples (n_examples)"
        )
    return project(run.states(layers), train, test)


def project(features: Features, train: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Project states on the first two principal components of training rows, layer by layer.

    Neurons are first scaled to a variance of one over the training rows. The sign of a component is
    arbitrary: we choose it such that training rows whose choice 1 is right lie higher on average.

    Parameters
    ----------
    features
        Where the states are read, one layer after another.
    train
        Honest rows with their class `y`, on which components are fitted.
    rows
        Other rows, with their `kind`, `text` and class `y`.

    Returns
    -------
    DataFrame
        One row for each of `rows` at each layer: which choice is `right`, its place on the `first`
        and `second` component, the share of the variance of the training rows that each of these
        has, and `with_truth`: whether it is nearer to the mean of training rows of its own class
        than to that of the others. For a lie, the other class is that of honest rows with the
        answer that the lie gives.
    """
    classes = train.y.to_numpy()
    texts = [_shortened(text) for text in rows.text]
    right = [f"choice {k} right" for k in rows.y]
    layers = []
    for (_, _, layer), read in features.items():
        reduction = make_pipeline(StandardScaler(), PCA(2, svd_solver="full"))
        fitted = reduction.fit_transform(read(train))
        signs = np.where(fitted[classes == 1].mean(0) < fitted[classes == 0].mean(0), -1, 1)
        means = [signs * fitted[classes == k].mean(0) for k in (0, 1)]
        points = signs * reduction.transform(read(rows))
        distances = [np.linalg.norm(points - mean, axis=1) for mean in means]
        nearer_class = np.argmin(distances, axis=0)
        shares = reduction[-1].explained_variance_ratio_
        of_layer = pd.DataFrame(
            {
                "layer": layer,
                "row_id": rows.row_id.to_numpy(),
                "kind": rows.kind.to_numpy(),
                "right": right,
                "text": texts,
                # Digits that no picture shows would make the page larger.
                "first": points[:, 0].round(2),
                "second": points[:, 1].round(2),
                "first_share": shares[0],
                "second_share": shares[1],
                "with_truth": nearer_class == rows.y.to_numpy(),
            }
        )
        layers.append(of_layer)
    return pd.concat(layers, ignore_index=True)[POINT_COLUMNS]


def sides(points: pd.DataFrame) -> pd.DataFrame:
    """Return the share of each kind of answers that is `with_truth`, by layer."""
    shares = points.pivot_table("with_truth", "layer", "kind", sort=False)
    shares.columns.name = None
    return shares


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
