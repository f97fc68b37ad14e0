"""Tables of notebook 08: does a probe carry over to what it was not trained on?

From one data set, instruction family or template to another, from few examples to many, to other
splits of the same examples, and to other styles of text. Each probe reads truth, at the layer that
validation rows choose, and for a probe fitted on honest rows also their twins.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.selection import (
    BY_TWINS,
    EARLIEST,
    FittingRows,
    LayerProbe,
    choose_by_twins,
    fit_layers,
    in_memory,
    stack_layers,
)
from dlk_utils.evaluation.stats import auroc
from dlk_utils.evaluation.tasks import (
    LYING,
    Features,
    choosing_twins,
    make_task,
    require_rows,
    select_rows,
    state_features,
)
from dlk_utils.extract.stages import store_states
from dlk_utils.extract.store import read_rows
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import empty_if_too_few, estimate_with_interval, split_anew
from dlk_utils.probes import ALL_STATE_PROBES
from dlk_utils.questions.prompts import make_prompts
from dlk_utils.questions.styles import restyled
from dlk_utils.questions.trained import refuse_trained_rows

# From one group of rows to another.

HONEST_TO_LYING = ("truth", "lie")
ALL_OTHERS = "all others"
ESTIMATE_COLUMNS = ["estimate", "low", "high", "n", "n_smaller"]
TRANSFER_COLUMNS = ["trained_on", "tested_on", "layer", "rule", *ESTIMATE_COLUMNS, "n_train"]


@kept("08-transfer")
def transfer(
    run: Run,
    by: str,
    *,
    layers: list[int],
    roles: tuple[str, str] = HONEST_TO_LYING,
    probe: str = "logistic",
) -> pd.DataFrame:
    """Train on each data set, instruction family or template, and test on each of them.

    `by` is the column that names them; see `transfer_matrix`.
    """
    states = in_memory(run.states(layers), run.truth_rows)
    return transfer_matrix(run.truth_rows, by, states, roles=roles, probe=probe, seed=run.seed)


def transfer_matrix(
    rows: pd.DataFrame,
    by: str,
    features: Features,
    *,
    roles: tuple[str, str] = HONEST_TO_LYING,
    probe: str = "logistic",
    seed: int = 0,
) -> pd.DataFrame:
    """Train on each group of rows with one value of the column `by`, and test on each.

    Rows of role `roles[0]` train the probe and choose its layer, rows of role `roles[1]` test it;
    splits keep their examples apart, also across groups. "all others" was trained on every group
    but the one that it is tested on. Groups with too few rows of a class are left out.

    The layer of a probe that honest rows train is chosen with the twins of the validation rows of
    its own groups. `rule` says by which rule: a group may have too few twins.
    """
    groups = sorted(rows[by].unique())
    trials = [(group, rows[rows[by] == group], groups) for group in groups]
    trials += [(ALL_OTHERS, rows[rows[by] != group], [group]) for group in groups]
    table = []
    for trained_on, fit_rows, test_groups in trials:
        with suppress(TooFewRows):
            train = select_rows(fit_rows, roles[0], "train")
            validation = select_rows(fit_rows, roles[0], "validation")
            require_rows({"train": train, "validation": validation}, trained_on)
            twins = choosing_twins(fit_rows, "truth", roles[0])
            make_probe = ALL_STATE_PROBES[probe]
            fitted = fit_layers(make_probe, features, train, validation, twins=twins)
            common = {"trained_on": trained_on, "n_train": len(train)}
            common |= {"layer": fitted.layer, "rule": fitted.rule}
            for tested_on in test_groups:
                with suppress(TooFewRows):
                    test = select_rows(rows[rows[by] == tested_on], roles[1], "test")
                    require_rows({"test": test}, tested_on)
                    estimate = estimate_with_interval(fitted.score(test), test, seed=seed)
                    table.append({**common, "tested_on": tested_on, **estimate})
    return pd.DataFrame(table, columns=TRANSFER_COLUMNS)


def between_groups(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `transfer_matrix` from one group to another one."""
    return table[(table.trained_on != table.tested_on) & (table.trained_on != ALL_OTHERS)]


def left_out(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """Return the rows of `transfer_matrix` that tested what was left out of training, by name."""
    name = f"{what} that was left out"
    rows = table[table.trained_on == ALL_OTHERS].drop(columns=["trained_on", "rule"])
    return rows.rename(columns={"tested_on": name}).set_index(name)


def count_cases(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Count, for each probe, the pairs of groups with an AUROC above chance, and below."""
    counts = {}
    for probe, table in tables.items():
        cases = table[table.trained_on != table.tested_on]
        counts[probe] = {
            "least": cases.estimate.min(),
            "mean": cases.estimate.mean(),
            "most": cases.estimate.max(),
            "cases": len(cases),
            "above chance": int((cases.low > 0.5).sum()),
            "below chance": int((cases.high < 0.5).sum()),
        }
    return pd.DataFrame.from_dict(counts, orient="index")


# From few examples to many.

CURVE_SIZES = (8, 16, 32, 64, 128)
CURVE_PROBES = ("logistic", "mean_difference", "lda")
CURVE_DRAWS = 5
CURVE_COLUMNS = ["probe", "n_train", "estimate", "least", "most", "draws"]


@kept("08-curve")
def curve(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Train on few rows and on many; see `example_curve`."""
    states = in_memory(run.states(layers), run.truth_rows)
    return example_curve(run.truth_rows, states, seed=run.seed)


@empty_if_too_few(CURVE_COLUMNS)
def example_curve(rows: pd.DataFrame, features: Features, *, seed: int = 0) -> pd.DataFrame:
    """Score probes on rows told to lie by the number of honest rows that they were trained on.

    For each of `CURVE_SIZES`, as many rows of either class are drawn, `CURVE_DRAWS` times: the
    mean test AUROC over the draws is the `estimate`. All rows that there are come last.
    """
    task = make_task(rows, "truth", LYING)
    y = task.test.y.to_numpy()
    n_balanced = 2 * task.train.y.value_counts().min()
    draws = {
        size: [
            task.train.groupby("y").sample(size // 2, random_state=1000 * seed + draw)
            for draw in range(CURVE_DRAWS)
        ]
        for size in CURVE_SIZES
        if size < n_balanced
    }
    draws[len(task.train)] = [task.train]
    test_states = stack_layers(features, task.test)
    aurocs = {(probe, n_train): [] for probe in CURVE_PROBES for n_train in draws}
    for n_train, trains in draws.items():
        for train in trains:
            fitting_rows = FittingRows.read(features, train, task.validation, task.twins)
            for probe in CURVE_PROBES:
                fitted = fitting_rows.fit(ALL_STATE_PROBES[probe])
                scores = fitted.score_states(test_states)[fitted.chosen]
                aurocs[probe, n_train].append(auroc(scores, y))
    table = [
        [probe, n_train, np.mean(of_draws), min(of_draws), max(of_draws), len(of_draws)]
        for (probe, n_train), of_draws in aurocs.items()
    ]
    return pd.DataFrame(table, columns=CURVE_COLUMNS)


# To other splits of the same examples, and by another rule for the layer.

SPLITS = 10
SAME, OTHER_FAMILIES = "the same data sets", "families of instructions left out"
REGROUPED_COLUMNS = [
    *("again", "tested_on", "rule", "layer", "estimate", "known", "accuracy"),
    *("n", "n_known"),
]

RULE_COLUMNS = [
    *("tested on", "rule", "mean", "least", "greatest", "standard deviation", "accuracy"),
    *("better", "splits"),
]


@kept("08-regrouped")
def regrouped(run: Run, *, layers: list[int], probe: str = "logistic") -> pd.DataFrame:
    """Split the same examples anew, and train and test again; see `split_again`."""
    states = in_memory(run.states(layers), run.truth_rows)
    return split_again(run.truth_rows, states, probe=probe)


@empty_if_too_few(REGROUPED_COLUMNS)
def split_again(rows: pd.DataFrame, features: Features, *, probe: str = "logistic") -> pd.DataFrame:
    """Split the examples at random in the same shares, `SPLITS` times, and score each time.

    It shows what one lucky split is worth, and which rule chooses the better layer. Each time a
    probe is fitted on honest rows, and read on rows told to lie at the layer of either rule. It is
    also fitted without each of the data sets, and tested on that one.

    Returns
    -------
    DataFrame
        A row for each split (`again`), each test (`tested_on`) and each `rule`: the `layer`, the
        AUROC (`estimate`) on `n` rows told to lie, and on those `n_known` whose answer the model
        knows its AUROC (`known`) and its `accuracy` at the threshold of the training rows.
        `tested_on` is `SAME`; a data set that neither the fit nor the choice of the layer has seen;
        or `OTHER_FAMILIES`, where the twins that choose the layer are told to lie by half of the
        instruction families, and the test rows by the other half. Tests with too few rows are left
        out; if those of `SAME` have too few, the table is empty.
    """
    table = []
    for again in range(SPLITS):
        anew = split_anew(rows, again)
        make_task(anew, "truth", LYING)  # raises if there are too few rows
        for left_out in (None, *sorted(rows.dataset.unique())):
            with suppress(TooFewRows):
                found = _score_by_both_rules(anew, left_out, features, probe)
                table += [{"again": again, **row} for row in found]
    return pd.DataFrame(table, columns=REGROUPED_COLUMNS)


def _score_by_both_rules(
    rows: pd.DataFrame, left_out: str | None, features: Features, probe: str
) -> list[dict]:
    """Fit a probe without one data set, and score it by either rule; of None, with all of them."""
    may_fit = rows if left_out is None else rows[rows.dataset != left_out]
    train, validation = (select_rows(may_fit, "truth", split) for split in ("train", "validation"))
    require_rows({"train": train, "validation": validation}, f"without {left_out}")
    # Without twins, by the earlier rule; `_scores` then takes either.
    fitted = fit_layers(ALL_STATE_PROBES[probe], features, train, validation)
    twins = may_fit[may_fit.split == "validation"]
    test = select_rows(rows, "lie", "test")
    if left_out is not None:
        return _scores(fitted, twins, test[test.dataset == left_out], f"{left_out} left out")
    found = _scores(fitted, twins, test, SAME)
    families = sorted(rows.family[rows.role == "lie"].unique())
    for unseen in (families[::2], families[1::2]):
        with suppress(TooFewRows):
            is_seen = (twins.role != "lie") | ~twins.family.isin(unseen)
            of_unseen = test[test.family.isin(unseen)]
            found += _scores(fitted, twins[is_seen], of_unseen, OTHER_FAMILIES)
    return found


def _scores(
    fitted: LayerProbe, twins: pd.DataFrame, test: pd.DataFrame, tested_on: str
) -> list[dict]:
    """Score test rows at the layer that each rule chooses."""
    require_rows({"test": test}, tested_on)
    known = test[test.knows]
    found = []
    for rule, at_layer in ((BY_TWINS, choose_by_twins(fitted, twins)), (EARLIEST, fitted)):
        of_known = at_layer.score(known) if len(known) else np.empty(0)
        found.append(
            {
                "tested_on": tested_on,
                "rule": rule,
                "layer": at_layer.layer,
                "estimate": auroc(at_layer.score(test), test.y.to_numpy()),
                "known": auroc(of_known, known.y.to_numpy()),
                "accuracy": np.mean((of_known > 0) == known.y) if len(known) else np.nan,
                "n": len(test),
                "n_known": len(known),
            }
        )
    return found


def rules_compared(regrouped: pd.DataFrame) -> pd.DataFrame:
    """Summarise `split_again` by test and rule: the AUROC on known rows over the splits.

    `better` counts the splits in which a rule scores higher than the other one.
    """
    means = ["tested_on", "again", "rule"]
    # Both halves of the families are tested in each split.
    of_split = regrouped.groupby(means, sort=False)[["known", "accuracy"]].mean().reset_index()
    other = of_split.assign(rule=of_split.rule.map({EARLIEST: BY_TWINS, BY_TWINS: EARLIEST}))
    of_split = of_split.merge(
        other.drop(columns="accuracy"), on=means, suffixes=("", "_of_other_rule")
    )
    rows = []
    for (tested_on, rule), group in of_split.groupby(["tested_on", "rule"], sort=False):
        rows.append(
            {
                "tested on": tested_on,
                "rule": rule,
                "mean": group.known.mean(),
                "least": group.known.min(),
                "greatest": group.known.max(),
                "standard deviation": group.known.std(),
                "accuracy": group.accuracy.mean(),
                "better": int((group.known > group.known_of_other_rule).sum()),
                "splits": len(group),
            }
        )
    return pd.DataFrame(rows, columns=RULE_COLUMNS)


# To other styles of text.

STYLE_PROBES = ("logistic", "mean_difference", "ttpd")
STYLE_COLUMNS = ["style", "probe", "layer", "own_answer", *ESTIMATE_COLUMNS]


@kept("08-styles")
def style_table(run: Run, *, layers: list[int], styles: Sequence[str]) -> pd.DataFrame:
    """Read truth where the text is put in other styles; see `score_styles`."""
    in_styles = {}
    for style in styles:
        if (restyled(run.examples, style).split == "test").any():
            rows, folder = styled(run, style, layers=layers)
            in_styles[style] = rows.assign(y=rows.label), state_features(folder, layers)
    return score_styles(run.truth_rows, run.states(layers), in_styles, seed=run.seed)


def styled(run: Run, style: str, *, layers: list[int]) -> tuple[pd.DataFrame, Path]:
    """Ask the test examples again in another style, told to lie as in the clean rows.

    Returns the rows with the model's `margin`, and the store of their states at `resid_post`.
    """
    examples = run.examples
    may_ask = examples.split.isin(["test", "shot"])
    examples = examples[may_ask & examples.dataset.isin(run.scored.dataset.unique())]
    rows = make_prompts(
        restyled(examples, style),
        run.tokenizer,
        n_shots=run.n_shots,
        n_known=0,
        context=run.context,
        seed=run.seed,
    )
    refuse_trained_rows(rows, *run.spec.adapter_folders())
    is_twin = (rows.role == "lie") & rows.example_id.isin(run.scored.example_id)
    rows = rows[is_twin].reset_index(drop=True)
    folder = run.stored(store_states, rows, "08-styled", layers=layers)
    logprobs = read_rows(folder, rows, "choice_logprobs").astype(float)
    return rows.assign(margin=logprobs[:, 1] - logprobs[:, 0]), folder


@empty_if_too_few(STYLE_COLUMNS)
def score_styles(
    rows: pd.DataFrame,
    features: Features,
    in_styles: Mapping[str, tuple[pd.DataFrame, Features]],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Train probes on honest clean rows, and test them on clean rows and those of each style.

    `in_styles` holds, by style, rows told to lie and their features. `own_answer` is the AUROC of
    the model's `margin`. Styles with too few rows of a class are left out.
    """
    task = make_task(rows, "truth", LYING)
    fitting_rows = FittingRows.of_task(features, task)
    table = []
    for probe in STYLE_PROBES:
        fitted = fitting_rows.fit(ALL_STATE_PROBES[probe])
        for style, (test, where) in {"clean": (task.test, features), **in_styles}.items():
            with suppress(TooFewRows):
                require_rows({"test": test}, style)
                own_answer = auroc(test.margin.to_numpy(), test.y.to_numpy())
                row = {"style": style, "probe": probe, "layer": fitted.layer}
                estimate = estimate_with_interval(fitted.score(test, where), test, seed=seed)
                table.append({**row, "own_answer": own_answer, **estimate})
    return pd.DataFrame(table, columns=STYLE_COLUMNS)
