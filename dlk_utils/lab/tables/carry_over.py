"""Does a probe carry over? From one data set, instruction family or template to another, and from few examples to many."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from dlk_utils.evaluation.stats import auroc, auroc_interval, earliest_good_layer
from dlk_utils.evaluation.tasks import Features, select_rows, too_few
from dlk_utils.probes import ALL_STATE_PROBES, fit_probe


def transfer_matrix(
    rows: pd.DataFrame,
    by: str,
    features: Features,
    *,
    probe: str = "logistic",
    roles: tuple[str, str] = ("truth", "lie"),
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Trained on each group of the column `by`, tested on each: `trained_on`, `tested_on`, `layer`, `estimate`, `low`, `high`, `n`, `n_train`.

    `rows` have the class `y`. Training and validation rows have the role `roles[0]`, test rows `roles[1]`; splits keep examples apart, within a group and across. The layer is
    chosen (`metrics.earliest`) on validation rows of the training group. "all others" is trained on every group but the one it is tested on. Groups with too few rows of a class are left out.
    """
    groups, found = sorted(rows[by].unique()), []
    for trained_on in [*groups, "all others"]:
        for fold in groups if trained_on == "all others" else [None]:
            mine = rows[rows[by] == trained_on] if fold is None else rows[rows[by] != fold]
            train, validation = (
                select_rows(mine, roles[0], "train"),
                select_rows(mine, roles[0], "validation"),
            )
            if too_few(train, "train") or too_few(validation, "validation"):
                continue
            score, layer = _chosen(probe, features, train, validation)
            for tested_on in groups if fold is None else [fold]:
                test = select_rows(rows[rows[by] == tested_on], roles[1], "test")
                if not too_few(test, "test"):
                    found.append(
                        {
                            "trained_on": trained_on,
                            "tested_on": tested_on,
                            "layer": layer,
                            "n_train": len(train),
                        }
                        | _scored(score(test), test, n_boot, seed)
                    )
    return pd.DataFrame(
        found,
        columns=["trained_on", "tested_on", "layer", "estimate", "low", "high", "n", "n_train"],
    )


def example_curve(
    rows: pd.DataFrame,
    features: Features,
    *,
    sizes: Sequence[int] = (8, 16, 32, 64, 128),
    probes: Sequence[str] = ("logistic", "mean_difference", "lda"),
    roles: tuple[str, str] = ("truth", "lie"),
    repeats: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """The test AUROC by the number of training rows (both classes alike, and all there are): mean, least and most over `repeats` draws of them. Empty if there are too few rows of a class."""
    train, validation, test = (
        select_rows(rows, roles[0], "train"),
        select_rows(rows, roles[0], "validation"),
        select_rows(rows, roles[1], "test"),
    )
    found = []
    for probe in (
        []
        if too_few(train, "train") or too_few(validation, "validation") or too_few(test, "test")
        else probes
    ):
        for n in [*(s for s in sizes if s < 2 * train.y.value_counts().min()), len(train)]:
            scores = []
            for r in range(repeats if n < len(train) else 1):
                some = (
                    train
                    if n == len(train)
                    else train.groupby("y").sample(n // 2, random_state=1000 * seed + r)
                )
                score, _ = _chosen(probe, features, some, validation)
                scores.append(auroc(score(test), test.y.to_numpy()))
            found.append(
                {
                    "probe": probe,
                    "n_train": n,
                    "estimate": np.mean(scores),
                    "least": min(scores),
                    "most": max(scores),
                    "draws": len(scores),
                }
            )
    return pd.DataFrame(found, columns=["probe", "n_train", "estimate", "least", "most", "draws"])


def regrouped(
    rows: pd.DataFrame,
    features: Features,
    *,
    probe: str = "logistic",
    roles: tuple[str, str] = ("truth", "lie"),
    repeats: int = 10,
) -> pd.DataFrame:
    """The examples split again at random, in the same shares, `repeats` times: `layer`, `estimate`, `n`. What one lucky split is worth; empty if one has too few rows of a class."""
    found, examples = [], rows[["example_id", "split"]].drop_duplicates()
    for r in range(repeats):
        again = dict(
            zip(
                examples.example_id,
                np.random.default_rng(r).permutation(examples.split),
                strict=True,
            )
        )
        t = rows.assign(split=rows.example_id.map(again))
        train, validation, test = (
            select_rows(t, roles[0], "train"),
            select_rows(t, roles[0], "validation"),
            select_rows(t, roles[1], "test"),
        )
        if too_few(train, "train") or too_few(validation, "validation") or too_few(test, "test"):
            break
        score, layer = _chosen(probe, features, train, validation)
        found.append(
            {
                "again": r,
                "layer": layer,
                "estimate": auroc(score(test), test.y.to_numpy()),
                "n": len(test),
            }
        )
    return pd.DataFrame(
        found if len(found) == repeats else [], columns=["again", "layer", "estimate", "n"]
    )


def style_table(
    rows: pd.DataFrame,
    features: Features,
    styled: Mapping[str, tuple[pd.DataFrame, Features]],
    *,
    probes: Sequence[str] = ("logistic", "mean_difference", "ttpd"),
    seed: int = 0,
) -> pd.DataFrame:
    """Probes trained on honest clean rows, tested on rows told to lie: clean ones, and those of each style (their rows with `y` and `margin`, their features). Beside them the model's own answer."""
    train, validation, test, found = (
        select_rows(rows, "truth", "train"),
        select_rows(rows, "truth", "validation"),
        select_rows(rows, "lie", "test"),
        [],
    )
    if not (too_few(train, "train") or too_few(validation, "validation") or too_few(test, "test")):
        for probe in probes:
            made, layer = _fit(probe, features, train, validation)
            for style, (some, where) in {"clean": (test, features), **styled}.items():
                if not too_few(some, "test"):
                    found.append(
                        {
                            "style": style,
                            "probe": probe,
                            "layer": layer,
                            "own_answer": auroc(some.margin.to_numpy(), some.y.to_numpy()),
                        }
                        | _scored(made(some, where), some, 1000, seed)
                    )
    return pd.DataFrame(
        found, columns=["style", "probe", "layer", "own_answer", "estimate", "low", "high", "n"]
    )


def _chosen(
    probe: str, features: Features, train: pd.DataFrame, validation: pd.DataFrame
) -> tuple[Callable[[pd.DataFrame], np.ndarray], int]:
    """A scorer of rows with the layer that is best on validation, and that layer."""
    made, layer = _fit(probe, features, train, validation)
    return lambda some: made(some, features), layer


def _fit(
    probe: str, features: Features, train: pd.DataFrame, validation: pd.DataFrame
) -> tuple[Callable[[pd.DataFrame, Features], np.ndarray], int]:
    """The same for rows whose features lie elsewhere."""
    keys = list(features)
    stack = lambda some, where: np.stack([where[k](some) for k in keys])
    found = fit_probe(ALL_STATE_PROBES[probe], stack(train, features), train)
    best = earliest_good_layer(
        found.decision_function(stack(validation, features)),
        validation.y.to_numpy(),
        validation.example_id,
    )
    return lambda some, where: found.decision_function(stack(some, where))[best], keys[best][2]


def _scored(scores: np.ndarray, test: pd.DataFrame, n_boot: int, seed: int) -> dict[str, float]:
    y = test.y.to_numpy()
    low, high = auroc_interval(scores, y, test.example_id, n_boot=n_boot, seed=seed)
    return {"estimate": auroc(scores, y), "low": low, "high": high, "n": len(test)}
