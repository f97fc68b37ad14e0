"""Tables of notebook 10: one known mistake at a time, and which reported numbers survive."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from dlk_utils.errors import ParameterError, TooFewRows
from dlk_utils.evaluation.selection import FittingRows, fit_layers, fit_task, in_memory
from dlk_utils.evaluation.stats import (
    auroc,
    bootstrap_weights,
    interval_of_aurocs,
    smaller_class,
    weighted_auroc,
)
from dlk_utils.evaluation.tasks import (
    LYING,
    Features,
    Task,
    make_task,
    require_rows,
    select_rows,
)
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import (
    NOT_SCORED,
    empty_if_too_few,
    estimate_with_interval,
    in_brief,
    least_to_most,
)
from dlk_utils.lab.tables.carry_over import between_groups
from dlk_utils.probes import STATE_PROBES, Logistic

MISTAKE_COLUMNS = ["mistake", "claim", "but", "estimate", "low", "high", "n", "n_smaller"]
CLEAN = "none: as it should be"
TRUTH_OF_LIES = "truth, trained on honest rows, read on rows that ask for a lie"
CLAIMS = {
    CLEAN: (TRUTH_OF_LIES, ""),
    "layer with the highest score on honest rows": (
        TRUTH_OF_LIES,
        "on honest rows the answer itself scores highest",
    ),
    "layer chosen on the test rows": (TRUTH_OF_LIES, "test labels chose the layer"),
    "layer and sign chosen on the test rows": (
        TRUTH_OF_LIES,
        "test labels chose the layer and the sign",
    ),
    "tested on honest rows": ("truth", "on honest rows the answer gives it away"),
    "split by row, twins on both sides": (
        "truth, on rows of either kind",
        "the twins of test rows were trained on",
    ),
    "the next word taken for the truth": (
        "truth",
        "choices that begin alike leave nothing else to read",
    ),
    "honest rows among the lies": (
        "whether an answer was a lie",
        "the system prompt gives it away",
    ),
}
"""For each mistake, what its score claims to measure, and what is wrong with that claim."""
BEST_OF_MANY = (TRUTH_OF_LIES, "the best of many scores is high by chance")
"""The same pair for the mistake whose name says how many scores the best one was chosen from."""
FEW_EXAMPLES = 38
"""As many test examples as the reported .94 had rows."""
SHARE_OF_TRAIN = 0.7
"""The share of the rows that train where the mistake is to split by row."""


@kept("10-mistakes")
def mistakes(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Make one known mistake at a time on the run's states; see `with_each_mistake`."""
    states = in_memory(run.states(layers), run.truth_rows)
    return with_each_mistake(run.truth_rows, states, seed=run.seed)


@empty_if_too_few(MISTAKE_COLUMNS)
def with_each_mistake(rows: pd.DataFrame, features: Features, *, seed: int = 0) -> pd.DataFrame:
    """Score the same states and probe as they should be, and with one known mistake at a time.

    Every interval resamples examples, also where the mistake is to split by row. The next word and
    the lies have targets of their own, which are read at the layer that is best on validation rows.
    They are left out where a class has too few rows.

    Parameters
    ----------
    rows
        Rows of the target truth, with `answer`, `knows` and `lied`.
    features
        States by layer.
    seed
        Decides which rows are drawn where a mistake draws rows.

    Returns
    -------
    DataFrame
        `mistake`, what its score would `claim` to measure, `but` what is wrong with that, and the
        score.
    """
    task = make_task(rows, "truth", LYING)
    honest_test = select_rows(rows, "truth", "test")
    require_rows({"test": honest_test}, "truth, tested on honest rows")
    table = []

    def add_estimate(
        mistake: str, estimate: Mapping[str, Any], claims: tuple[str, str] | None = None
    ) -> None:
        claim, but = claims or CLAIMS[mistake]
        table.append({"mistake": mistake, "claim": claim, "but": but, **estimate})

    def add(mistake: str, scores: np.ndarray, test: pd.DataFrame) -> None:
        add_estimate(mistake, estimate_with_interval(scores, test, seed=seed))

    probe = fit_task(Logistic, features, task)
    on_lies = probe.score_layers(task.test)
    aurocs = np.array([auroc(scores, task.test.y.to_numpy()) for scores in on_lies])
    best_on_honest_rows = probe.validation_aurocs.argmax()
    add(CLEAN, on_lies[probe.chosen], task.test)
    add("layer with the highest score on honest rows", on_lies[best_on_honest_rows], task.test)
    add("layer chosen on the test rows", on_lies[aurocs.argmax()], task.test)
    farthest_from_chance = on_lies[np.abs(aurocs - 0.5).argmax()]
    turned = _turned_estimate(farthest_from_chance, task.test, seed)
    add_estimate("layer and sign chosen on the test rows", turned)

    few, tries = _many_tries(task, features, seed)
    best_try = max(tries, key=lambda scores: auroc(scores, few.y.to_numpy()))
    best_of_many = f"the best of {len(tries)} scores, on {len(few)} test rows"
    add_estimate(best_of_many, estimate_with_interval(best_try, few, seed=seed), BEST_OF_MANY)
    add("tested on honest rows", probe.score(honest_test), honest_test)

    shuffled = rows.sample(frac=1, random_state=seed)
    n_train = int(SHARE_OF_TRAIN * len(rows))
    train, test = shuffled.iloc[:n_train], shuffled.iloc[n_train:]
    split_by_row = fit_layers(Logistic, features, train, task.validation)
    # Read at the layer of the clean probe, so that the choice of the layer does not differ.
    on_both_kinds = split_by_row.score_layers(test)[probe.chosen]
    add("split by row, twins on both sides", on_both_kinds, test)

    next_word = rows.assign(y=rows.answer.astype(int))
    known_rows = rows[rows.knows]
    lies = known_rows.assign(y=known_rows.lied.astype(int))
    for mistake, target_rows in (
        ("the next word taken for the truth", next_word),
        ("honest rows among the lies", lies),
    ):
        with suppress(TooFewRows):
            add(mistake, *_scores_of_best_layer(target_rows, features))
    return pd.DataFrame(table, columns=MISTAKE_COLUMNS)


def with_mistake_kind(scores: pd.DataFrame) -> pd.DataFrame:
    """Say in the column `kind` which rows of `with_each_mistake` have a mistake."""
    is_clean = scores.mistake == CLEAN
    return scores.assign(kind=np.where(is_clean, "as it should be", "with a mistake"))


def that_raise(scores: pd.DataFrame) -> pd.DataFrame:
    """Select the mistakes that raise the score, from a table of `with_each_mistake`.

    The lower end of the interval is then above both the clean score and chance.
    """
    clean = scores.estimate[scores.mistake == CLEAN].max()
    return scores[(scores.mistake != CLEAN) & (scores.low > max(0.5, clean))]


def _turned_estimate(
    scores: Float[np.ndarray, " n"], test: pd.DataFrame, seed: int
) -> dict[str, Any]:
    """An AUROC that is reversed where it is below one half, as are its resamples.

    So the lower end of its interval is never below one half.
    """
    y = test.y.to_numpy()
    resampled = weighted_auroc(scores, y, bootstrap_weights(test.example_id, 1000, seed))
    low, high = interval_of_aurocs(np.maximum(resampled, 1 - resampled), y, test.example_id)
    estimate = auroc(scores, y)
    counts = {"n": len(test), "n_smaller": smaller_class(y)}
    return {"estimate": max(estimate, 1 - estimate), "low": low, "high": high, **counts}


def _many_tries(
    task: Task, features: Features, seed: int
) -> tuple[pd.DataFrame, list[Float[np.ndarray, " n"]]]:
    """A few test rows, and their scores by every probe at every layer."""
    examples = task.test.example_id.drop_duplicates()
    drawn = examples.sample(min(FEW_EXAMPLES, len(examples)), random_state=seed)
    few = task.test[task.test.example_id.isin(drawn)]
    fitting_rows = FittingRows.read(features, task.train, task.validation)
    fitted = [fitting_rows.fit(make_probe) for make_probe in STATE_PROBES.values()]
    return few, [scores for probe in fitted for scores in probe.score_layers(few)]


def _scores_of_best_layer(
    rows: pd.DataFrame, features: Features
) -> tuple[Float[np.ndarray, " n"], pd.DataFrame]:
    """Scores of test rows, honest and lying ones alike, at the layer best on validation."""
    parts = {split: rows[rows.split == split] for split in ("train", "validation", "test")}
    # A lie detector has few rows of one class, if the model rarely errs when it is honest.
    require_rows(parts, "rows of either kind", least=dict.fromkeys(parts, 1))
    probe = fit_layers(Logistic, features, parts["train"], parts["validation"])
    return probe.score_layers(parts["test"])[probe.validation_aurocs.argmax()], parts["test"]


# The numbers that the original study reported, according to its own diary.

DUPLICATES = "duplicates on both sides of the split"
ALIKE = "choices that begin alike; one seed"
REPORTED_COLUMNS = ["date", "what", "reported", "lowest", "what is wrong with it"]
REPORTED = (
    ("2023-07-13", "three classes, F1 of deception", "F1 .371 at accuracy .850", 0.371,
     "the majority had .837"),
    ("2023-07-20", "pairs of draws, linear", ".70 to .71", 0.70, DUPLICATES),
    ("2023-07-21", "pairs of draws, ranking, big moves only", ".89 to .94", 0.89, DUPLICATES),
    ("2023-07-28", "convolution over depth", "AUROC .961", 0.961, DUPLICATES),
    ("2023-09-04", "weight gradients, linear", ".77 to .81", 0.77, "at or below the majority"),
    ("2023-09-10", "heads, state and gradient, linear", "96 %, then 99.6 %", 0.96, ALIKE),
    ("2023-09-11", "one data set", "near 100 %", 0.99, ALIKE),
    ("2023-09-11", "from one data set to another", "60 %", 0.60,
     "a split that separated them by accident"),
    ("2023-09-15", "heads, state and gradient, dice loss", ".94 (n = 38)", 0.94,
     "38 rows, the best of many"),
)  # fmt: skip
"""`lowest` is the lowest number that was reported, as a share; .99 stands for "near 100 %"."""
NOT_MEASURED = "not measured"
NOT_TRIED = "not tried"
REACHED = "yes"
REACHED_BY_INTERVAL = "only by the upper end of its interval"
NOT_REACHED = "no"


class CleanNumber(NamedTuple):
    """What a clean evaluation gives here.

    Attributes
    ----------
    text : str
        The score, perhaps with its interval.
    score : float
        The score; of several scores, the lowest. Nan if nothing was scored.
    upper_end : float
        The upper end of its interval, or the score itself if it has none.
    is_above_chance : bool
        Whether its interval is above chance; for F1, whether it is above that of the instruction.
    """

    text: str
    score: float = np.nan
    upper_end: float = np.nan
    is_above_chance: bool = False


def clean_numbers(
    results: pd.DataFrame, classes: pd.DataFrame, pairs: pd.DataFrame, across: pd.DataFrame
) -> dict[str, CleanNumber]:
    """Return what a clean evaluation gives for the numbers of `REPORTED`, by their names (`what`).

    That is the AUROC on rows told to lie after training on honest rows, and F1 for the classes.
    For one data set it lists the AUROC of each, and from one data set to another the least and the
    most; both come from `across`, a table of `carry_over.transfer`. Weight gradients are left out,
    as they are not measured here.
    """
    on_lies = results[(results.target == "truth") & (results.regime == LYING)]
    on_lies = on_lies[on_lies.selected & (on_lies.kind == "probe")]
    ranked = pairs[(pairs.pairs == "draws, sequence") & (pairs.regime == LYING)]

    def of_probe(probe: str, feature: str, site: str) -> CleanNumber:
        is_wanted = (on_lies.probe == probe) & (on_lies.feature == feature) & (on_lies.site == site)
        return _number(on_lies[is_wanted])

    def of_pairs(probe: str, least_move: float) -> CleanNumber:
        return _number(ranked[(ranked.probe == probe) & (ranked.least_move == least_move)])

    own = across[across.trained_on == across.tested_on]
    within = "; ".join(f"{row.tested_on} {row.estimate:.2f}" for row in own.itertuples())
    others = between_groups(across)
    dice = of_probe("dice", "activation", "resid_post")
    return {
        "three classes, F1 of deception": _f1_of_deception(classes),
        "pairs of draws, linear": of_pairs("pair_direction", 0.0),
        "pairs of draws, ranking, big moves only": of_pairs("pair_ranking", 0.1),
        "convolution over depth": of_probe("convolution", "activation", "resid_post"),
        "heads, state and gradient, linear": of_probe("logistic", "both", "head_out"),
        "one data set": _lowest(own, within),
        "from one data set to another": _lowest(others, _range_text(others)),
        # Here the dice loss is fitted to the residual stream only, without heads and gradient.
        "heads, state and gradient, dice loss": dice._replace(
            text=f"{dice.text} (residual stream)"
        ),
    }


def _number(rows: pd.DataFrame) -> CleanNumber:
    """The score in the first row of a table with `estimate`, `low` and `high`."""
    if rows.empty:
        return CleanNumber(NOT_SCORED)
    row = rows.iloc[0]
    return CleanNumber(in_brief(row), row.estimate, row.high, bool(row.low > 0.5))


def _lowest(rows: pd.DataFrame, text: str) -> CleanNumber:
    """The lowest of several scores, with its interval; `text` is shown for all of them."""
    if rows.empty:
        return CleanNumber(NOT_SCORED)
    lowest = rows.loc[rows.estimate.idxmin()]
    return CleanNumber(text, lowest.estimate, lowest.high, bool(lowest.low > 0.5))


def _range_text(rows: pd.DataFrame) -> str:
    """The lowest and the highest of several scores, with the interval of the lowest."""
    if rows.empty:
        return NOT_SCORED
    lowest = rows.loc[rows.estimate.idxmin()]
    return f"{least_to_most(rows.estimate)} (the lowest with [{lowest.low:.2f}, {lowest.high:.2f}])"


def _f1_of_deception(classes: pd.DataFrame) -> CleanNumber:
    """The F1 of the class "deception", which has no interval, next to that of the instruction."""
    f1 = classes[classes["class"] == "deception"].set_index("method").f1
    if f1.empty:
        return CleanNumber(NOT_SCORED)
    probe, control = f1["softmax regression"], f1["instruction only"]
    text = f"F1 {probe:.2f}; instruction alone {control:.2f}"
    return CleanNumber(text, probe, probe, bool(probe > control))


def survivors(clean: Mapping[str, CleanNumber], mistaken: Mapping[str, str]) -> pd.DataFrame:
    """Return `REPORTED` with what is left of each number here.

    Only sizes can be compared: some of the reported numbers are accuracies, and those of this run
    are AUROCs (F1 for the classes).

    Parameters
    ----------
    clean
        What `clean_numbers` returns, by the names of the numbers (`what` of `REPORTED`).
    mistaken
        Texts that say what the same mistake gives here, by the same names.

    Returns
    -------
    DataFrame
        By `what` of `REPORTED`. Its column `reached here` is

        * `NOT_MEASURED` if there is no score here, be it for too few rows;
        * `REACHED` if the score is above chance, and at least the lowest number reported;
        * `REACHED_BY_INTERVAL` if it is above chance, and only the upper end of its interval is at
          least that number;
        * `NOT_REACHED` otherwise.

    Raises
    ------
    ParameterError
        If a name is not one of `REPORTED`.
    """
    table = pd.DataFrame(REPORTED, columns=REPORTED_COLUMNS)
    unknown = (set(clean) | set(mistaken)) - set(table.what)
    if unknown:
        raise ParameterError(f"survivors: expected names of REPORTED, got {sorted(unknown)}")
    numbers = [clean.get(what, CleanNumber(NOT_MEASURED)) for what in table.what]
    scores = np.array([number.score for number in numbers], dtype=float)
    upper_ends = np.array([number.upper_end for number in numbers], dtype=float)
    is_above_chance = np.array([number.is_above_chance for number in numbers])
    table["here, cleanly"] = [number.text for number in numbers]
    table["reached here"] = np.select(
        [
            np.isnan(scores),
            is_above_chance & (scores >= table.lowest),
            is_above_chance & (upper_ends >= table.lowest),
        ],
        [NOT_MEASURED, REACHED, REACHED_BY_INTERVAL],
        default=NOT_REACHED,
    )
    table["here, with the same mistake"] = [mistaken.get(what, NOT_TRIED) for what in table.what]
    return table.set_index("what")
