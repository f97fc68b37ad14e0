"""Tables of notebook 05: which site, feature, scale, attention head and method reads the truth.

All but the long table of results are of the main task: truth, trained on honest rows and read on
rows told to lie, at the layer that validation rows and their twins choose.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, classification_report, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.controls import RIVALS, TURNED
from dlk_utils.evaluation.evaluate import RESULT_COLUMNS, evaluate, evaluate_targets
from dlk_utils.evaluation.selection import (
    FittingRows,
    LayerProbe,
    fit_layers,
    fit_task,
    in_memory,
    stack_layers,
)
from dlk_utils.evaluation.stats import auroc, bootstrap_weights, percentile_interval, weighted_auroc
from dlk_utils.evaluation.tasks import (
    KNOWN,
    LYING,
    Features,
    Task,
    make_targets,
    make_task,
    pair_features,
    require_rows,
    state_features,
    target_features,
)
from dlk_utils.extract.dropout import DEFAULT_P
from dlk_utils.extract.stages import store_weight_gradients
from dlk_utils.extract.store import read_rows
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import empty_if_too_few, estimate_with_interval, lying_task
from dlk_utils.probes import CCS, Logistic
from dlk_utils.probes.base import LeastRows
from dlk_utils.probes.scale import SCALES

NAMED_PROBE = "logistic_tuned"
"""The probe that speaks for truth and lie, named before any score was seen."""
CHOICE_COLUMNS = ["layer", "validation", "estimate", "low", "high", "n", "n_smaller"]


def _choice(probe: LayerProbe, task: Task, seed: int) -> dict[str, Any]:
    """The chosen layer, its AUROC on validation rows, and the test AUROC with its interval."""
    validation = probe.validation_aurocs[probe.chosen]
    estimate = estimate_with_interval(probe.score(task.test), task.test, seed=seed)
    return {"layer": probe.layer, "validation": validation, **estimate}


# Every target, regime, probe and feature.


def targets(run: Run, *, p: float = DEFAULT_P) -> dict[str, pd.DataFrame]:
    """Return the rows of each target with their class `y`; `p` is that of the dropout draws."""
    return make_targets(run.probe_rows, run.dropout_rows, run.draws(p=p))


@kept("05-results")
def results(run: Run, *, layers: list[int], p: float = DEFAULT_P) -> pd.DataFrame:
    """Make the long table of `evaluation.evaluate`: every probe with its controls."""
    features = partial(target_features, clean=run.gradients(), draws=run.draws(p=p), layers=layers)
    return evaluate_targets(targets(run, p=p), features, seed=run.seed)


TURN_CONTROLS = {"own answer": "the model's answer", TURNED: "the opposite of its answer"}
"""The controls that the figure of truth by layer shows, and their names there."""
TURN_SITES = {
    "resid_post": "residual stream",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "head_out": "attention heads",
}
"""The names of the sites in that figure."""


def turn_lines(results: pd.DataFrame) -> pd.DataFrame:
    """Return truth by layer, on rows told to lie about what the model knows, for a figure.

    The column `line` tells the lines apart.

    Lines are the sites, read by logistic regression on the state, and some controls, which have
    one value for all layers.
    """
    known = results[(results.target == "truth") & (results.regime == KNOWN)]
    states = known[(known.probe == "logistic") & (known.feature == "activation")]
    controls = known[known.probe.isin(list(TURN_CONTROLS))]
    names = controls.probe.map(TURN_CONTROLS)
    ends = [
        controls.assign(line=names, layer=layer, low=np.nan, high=np.nan)
        for layer in (states.layer.min(), states.layer.max())
    ]
    return pd.concat([states.assign(line=states.site.map(TURN_SITES)), *ends])


RIVAL_COLUMNS = ["who", "where", "estimate", "low", "high", "n", "n_smaller"]


def rivals(results: pd.DataFrame) -> pd.DataFrame:
    """Return who reads the truth in rows told to lie: the named probe, and those who ask the model.

    The named probe was fitted on honest rows. `where` says whether all rows told to lie are scored,
    or those whose answer the model knows.
    """
    wheres = {KNOWN: "known rows told to lie", LYING: "rows told to lie"}
    of_truth = results[(results.target == "truth") & results.regime.isin(list(wheres))]
    is_named = (of_truth.probe == NAMED_PROBE) & (of_truth.feature == "activation")
    is_named &= (of_truth.site == "resid_post") & of_truth.selected
    is_rival = of_truth.probe.isin(["own answer", *RIVALS])
    shown = of_truth[is_named | is_rival]
    # The probe's interval is the one in which each resample chooses the layer.
    return shown.assign(
        low=shown.choice_low.fillna(shown.low),
        high=shown.choice_high.fillna(shown.high),
        who=shown.probe.where(shown.kind == "control", "probe of truth, fitted on honest rows"),
        where=shown.regime.map(wheres),
    )[RIVAL_COLUMNS].sort_values(["where", "estimate"], ascending=False, ignore_index=True)


# Site and feature.

GAIN_COLUMNS = [
    *("feature", "site", *CHOICE_COLUMNS, "gain", "gain_low", "gain_high"),
    *("over_residual", "over_residual_low", "over_residual_high"),
]


@kept("05-gains")
@empty_if_too_few(GAIN_COLUMNS)
def gains(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Compare the state, the gradient and both at each site; see `gain_table`."""
    clean = run.gradients()
    features = target_features("truth", clean, clean, layers)
    features = {key: read for key, read in features.items() if key[0] != "contrast"}
    return gain_table(lying_task(run), features, seed=run.seed)


def gain_table(task: Task, features: Features, *, seed: int = 0) -> pd.DataFrame:
    """Fit a logistic regression on each feature at each site.

    All features of a site are read at the layer that is chosen for its activation. (The gradient
    holds the answer about to be given at every layer. If it had a layer of its own, layers would be
    compared, and not features.)

    `gain` is the test AUROC minus that of the activation at the same site, `over_residual` minus
    that of the activation at `resid_post`. Their 95 % intervals are paired by resample of examples.
    """
    weights = bootstrap_weights(task.test.example_id, 1000, seed)
    rows, resampled, chosen = {}, {}, {}
    groups = dict.fromkeys((feature, site) for feature, site, _ in features)
    # The activations first, as they choose the layers.
    for group in sorted(groups, key=lambda group: group[0] != "activation"):
        of_layers = {key: features[key] for key in features if key[:2] == group}
        of_layers = in_memory(of_layers, task.rows)
        probe = fit_task(Logistic, of_layers, task)
        probe = replace(probe, chosen=chosen.setdefault(group[1], probe.chosen))
        resampled[group] = weighted_auroc(probe.score(task.test), task.test.y.to_numpy(), weights)
        rows[group] = {"feature": group[0], "site": group[1], **_choice(probe, task, seed)}
    for group, row in rows.items():
        baselines = {
            "gain": ("activation", group[1]),
            "over_residual": ("activation", "resid_post"),
        }
        for name, baseline in baselines.items():
            differences = resampled[group] - resampled[baseline]
            row[name] = row["estimate"] - rows[baseline]["estimate"]
            row[f"{name}_low"], row[f"{name}_high"] = percentile_interval(differences)
    return pd.DataFrame([rows[group] for group in groups], columns=GAIN_COLUMNS)


# The gradient, layer by layer.

FITTED_ON = {"honest rows": LYING, "rows told to lie": "by example, lie rows"}
"""What a probe of `curves` is fitted on -> the regime. All are read on rows told to lie."""
CURVE_COLUMNS = [
    *("fitted_on", "feature", "layer", "chosen", "estimate", "low", "high", "n", "n_smaller"),
    *("own_answer", "gain", "gain_low", "gain_high"),
]


@kept("05-curves")
def curves(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Compare state, gradient and both at every layer, fitted in two ways; see `curve_table`."""
    clean = run.gradients()
    features = target_features("lie", clean, clean, layers)
    features = {key: read for key, read in features.items() if key[1] == "resid_post"}
    tasks = {}
    for fitted_on, regime in FITTED_ON.items():
        with suppress(TooFewRows):
            tasks[fitted_on] = make_task(run.truth_rows, "truth", regime)
    return curve_table(tasks, features, seed=run.seed)


def curve_table(tasks: Mapping[str, Task], features: Features, *, seed: int = 0) -> pd.DataFrame:
    """Fit a logistic regression of truth on each feature at each layer, for each task.

    Parameters
    ----------
    tasks : mapping
        What the probe is fitted on -> the task of the target "truth", whose test rows have the
        model's `answer`.
    features : Features
        "activation", "gradient" and "both" at one site.

    Returns
    -------
    DataFrame
        For each task, feature and layer the test AUROC with its interval, and

        * `chosen`: whether this layer is chosen for the activation;
        * `own_answer`: the AUROC of the same scores against the model's answer instead of the
          truth (nan if it always answers the same);
        * `gain`: the AUROC minus that of the activation at the same layer, with its 95 % interval,
          paired by resample of examples.
    """
    rows = []
    for fitted_on, task in tasks.items():
        y, answer = task.test.y.to_numpy(), task.test.answer.to_numpy()
        weights = bootstrap_weights(task.test.example_id, 1000, seed)
        probes = {
            name: fit_task(
                Logistic, {key: read for key, read in features.items() if key[0] == name}, task
            )
            for name in ("activation", "gradient", "both")
        }
        state = probes["activation"]
        state_scores = state.score_layers(task.test)
        for feature, probe in probes.items():
            all_scores = probe.score_layers(task.test)
            for i, (of_state, scores) in enumerate(zip(state_scores, all_scores, strict=True)):
                differences = weighted_auroc(scores, y, weights) - weighted_auroc(
                    of_state, y, weights
                )
                gain_low, gain_high = percentile_interval(differences)
                rows.append(
                    {
                        "fitted_on": fitted_on,
                        "feature": feature,
                        "layer": probe.layers[i],
                        "chosen": i == state.chosen,
                        **estimate_with_interval(scores, task.test, seed=seed),
                        "own_answer": auroc(scores, answer),
                        "gain": auroc(scores, y) - auroc(of_state, y),
                        "gain_low": gain_low,
                        "gain_high": gain_high,
                    }
                )
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def curve_lines(curves: pd.DataFrame) -> pd.DataFrame:
    """Name the lines of `curve_table` in the column `line`, for a figure."""
    feature = curves.feature.replace({"activation": "state"})
    return curves.assign(line=feature + ", fitted on " + curves.fitted_on)


# How states are scaled.

SCALE_COLUMNS = ["scale", *CHOICE_COLUMNS]


@kept("05-scales")
@empty_if_too_few(SCALE_COLUMNS)
def scales(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Compare the ways to scale states before the probe; see `scale_table`."""
    states = in_memory(run.states(layers), run.truth_rows)
    return scale_table(lying_task(run), states, seed=run.seed)


def scale_table(task: Task, features: Features, *, seed: int = 0) -> pd.DataFrame:
    """Fit a logistic regression under each of `SCALES`, its strength chosen inside train."""
    fitting_rows = FittingRows.of_task(features, task)
    rows = []
    for scale in SCALES:
        probe = fitting_rows.fit(partial(Logistic, "auto", scale=scale))
        rows.append({"scale": scale, **_choice(probe, task, seed)})
    return pd.DataFrame(rows, columns=SCALE_COLUMNS)


# Attention heads.

HEAD_COLUMNS = ["layer", "head", "validation", "estimate"]
BEST_HEADS = (1, 4, 16, 48)
"""How many of the best heads are read together."""
BEST_HEADS_COLUMNS = [
    "heads",
    "validation",
    "estimate",
    "low",
    "high",
    "n",
    "n_smaller",
    "selected",
]


@kept("05-heads")
@empty_if_too_few(HEAD_COLUMNS)
def heads(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Score each attention head by itself; see `head_table`."""
    return head_table(lying_task(run), _heads_of(run, layers))


@kept("05-top-heads")
@empty_if_too_few(BEST_HEADS_COLUMNS)
def best_heads(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Score the best heads side by side; see `best_heads_table`."""
    ranked = heads(run, layers=layers)
    return best_heads_table(lying_task(run), _heads_of(run, layers), ranked, seed=run.seed)


def _heads_of(run: Run, layers: list[int]) -> Features:
    stored = state_features(run.gradients(), layers, "head_out")
    side_by_side = in_memory(stored, run.truth_rows)
    return split_heads(side_by_side, run.n_heads)


def split_heads(features: Features, n_heads: int) -> Features:
    """Read each head by itself from `head_out`, in which the heads of a layer lie side by side.

    The keys of the new features are (number of the head as text, "head_out", layer).
    """

    def read_head(read: Callable, head: int, rows: pd.DataFrame) -> np.ndarray:
        return np.split(read(rows), n_heads, axis=1)[head]

    return {
        (str(head), site, layer): partial(read_head, read, head)
        for (_, site, layer), read in features.items()
        for head in range(n_heads)
    }


def head_table(task: Task, head_features: Features) -> pd.DataFrame:
    """Fit a logistic probe on every head of every layer, and rank them by validation AUROC."""
    probe = fit_layers(Logistic, head_features, task.train, task.validation)
    table = pd.DataFrame(probe.keys, columns=["head", "site", "layer"]).astype({"head": int})
    table["validation"] = probe.validation_aurocs
    y = task.test.y.to_numpy()
    table["estimate"] = [auroc(scores, y) for scores in probe.score_layers(task.test)]
    order = {"validation": False, "layer": True, "head": True}
    table = table.sort_values(list(order), ascending=list(order.values()), ignore_index=True)
    return table[HEAD_COLUMNS]


def best_heads_table(
    task: Task, head_features: Features, ranked: pd.DataFrame, *, seed: int = 0
) -> pd.DataFrame:
    """Fit one probe on the best heads of `head_table` side by side, for each of `BEST_HEADS`.

    The number of heads that is best on validation is `selected`.
    """

    def read_together(readers: Sequence[Callable], rows: pd.DataFrame) -> np.ndarray:
        return np.concatenate([read(rows) for read in readers], axis=1)

    readers = [
        head_features[str(head), "head_out", layer]
        for layer, head in zip(ranked.layer, ranked["head"], strict=True)
    ]
    rows = []
    for size in [size for size in BEST_HEADS if size <= len(readers)]:
        together = {("best heads", "head_out", -1): partial(read_together, readers[:size])}
        probe = fit_layers(Logistic, together, task.train, task.validation)
        rows.append({"heads": size, **_choice(probe, task, seed)})
    table = pd.DataFrame(rows)
    table["selected"] = table.index == table.validation.idxmax()
    return table[BEST_HEADS_COLUMNS]


# The random starts of CCS.

RESTART_COLUMNS = ["layer", "start", "loss", "estimate", "kept"]


@kept("05-restarts")
@empty_if_too_few(RESTART_COLUMNS)
def restarts(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Score every random start of CCS at each layer; see `restart_table`."""
    return restart_table(lying_task(run), pair_features("contrast", run.gradients(), layers))


def restart_table(task: Task, contrast_features: Features) -> pd.DataFrame:
    """Fit CCS, and list the loss and the test AUROC (`estimate`) of each of its starts.

    The loss knows no labels; the start with the lowest one is `kept`.
    """
    probe = fit_layers(CCS, contrast_features, task.train, task.validation).probe
    scores = probe.score_starts(stack_layers(contrast_features, task.test))
    y = task.test.y.to_numpy()
    rows = []
    for i, (_, _, layer) in enumerate(contrast_features):
        losses = probe.losses_[i].tolist()
        kept_start = np.nan_to_num(losses, nan=np.inf).argmin()
        for start, loss in enumerate(losses):
            is_kept = start == kept_start
            rows.append([layer, start, loss, auroc(scores[i, start], y), is_kept])
    return pd.DataFrame(rows, columns=RESTART_COLUMNS)


# Three classes at once.

CLASSES = ("truth", "deception", "unknown")
CLASS_OF = {"correct": "truth", "lie": "deception", "unknown": "unknown"}
"""The class of a row by its `three_class`. Confused and unreadable rows belong to none."""
MIN_CLASS_ROWS = {"train": 4, "validation": LeastRows(per_class=0, in_all=1), "test": 4}
"""How many rows of each class a split needs; the F1 that chooses the layer takes any row."""
CLASS_COLUMNS = ["method", "layer", "class", "precision", "recall", "f1", "rows", "accuracy"]


@kept("05-classes")
def classes(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Tell truth, deception and unknown apart; see `class_report`."""
    return class_report(class_rows(run.scored), run.states(layers))


def class_rows(scored: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that belong to one of `CLASSES`, which is their column `y`."""
    return scored.assign(y=scored.three_class.map(CLASS_OF)).dropna(subset="y", ignore_index=True)


@empty_if_too_few(CLASS_COLUMNS)
def class_report(rows: pd.DataFrame, features: Features) -> pd.DataFrame:
    """Compare softmax regression on states with the instruction alone and with the majority.

    The layer is chosen by macro F1 on validation rows. In training, rows of a class count by the
    inverse of its frequency. The table has a row for each method and class, and for the macro
    average over classes; `rows` counts those of the test split.
    """
    train, validation, test = (
        rows[rows.split == split].reset_index(drop=True)
        for split in ("train", "validation", "test")
    )
    splits = {"train": train, "validation": validation, "test": test}
    require_rows(splits, "three classes", least=MIN_CLASS_ROWS, classes=CLASSES)

    models, macro_f1 = {}, {}
    for key, read in features.items():
        softmax = LogisticRegression(C=0.01, class_weight="balanced", max_iter=500)
        models[key] = make_pipeline(StandardScaler(), softmax).fit(read(train), train.y)
        answers = models[key].predict(read(validation))
        options = {"labels": CLASSES, "average": "macro", "zero_division": 0}
        macro_f1[key] = f1_score(validation.y, answers, **options)
    best = max(macro_f1, key=macro_f1.get)

    columns = ["instruction"]
    onehot = OneHotEncoder(handle_unknown="ignore")
    by_instruction = make_pipeline(onehot, LogisticRegression(class_weight="balanced"))
    by_instruction.fit(train[columns], train.y)
    majority = DummyClassifier().fit(train, train.y)
    reports = [
        _report("softmax regression", best[2], test, models[best].predict(features[best](test))),
        _report("instruction only", -1, test, by_instruction.predict(test[columns])),
        _report("majority", -1, test, majority.predict(test)),
    ]
    return pd.concat(reports, ignore_index=True)


def _report(method: str, layer: int, test: pd.DataFrame, answers: np.ndarray) -> pd.DataFrame:
    options = {"labels": CLASSES, "output_dict": True, "zero_division": 0}
    report = classification_report(test.y, answers, **options)
    table = pd.DataFrame([{"class": name, **report[name]} for name in (*CLASSES, "macro avg")])
    table = table.rename(columns={"f1-score": "f1", "support": "rows"}).astype({"rows": int})
    table = table.assign(method=method, layer=layer, accuracy=accuracy_score(test.y, answers))
    return table[CLASS_COLUMNS]


# Gradients of weights.


@kept("05-weights")
@empty_if_too_few(RESULT_COLUMNS)
def weights(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Score probes of pooled weight gradients, which take a full backward pass for each row."""
    task = lying_task(run)
    folder = run.stored(
        store_weight_gradients, run.probe_rows, "04-weight-gradients", layers=layers
    )
    features = {
        ("weight gradient", "mlp_out", layer): partial(_read_weight_gradient, folder, layer)
        for layer in layers
    }
    return evaluate(task, features, seed=run.seed)


def _read_weight_gradient(folder: Path, layer: int, rows: pd.DataFrame) -> Float[np.ndarray, "n d"]:
    return read_rows(folder, rows, f"weight_gradient.mlp_out.{layer}.0")
