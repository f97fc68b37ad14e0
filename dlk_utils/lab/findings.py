"""From the long table of results to the few rows and sentences that may be said aloud."""

import pandas as pd

from dlk_utils.evaluation.tasks import POSITIVE_CONTROL


def in_brief(row) -> str:
    """An estimate with its interval and n; of an empty table, that it was not scored."""
    row = row.iloc[0] if isinstance(row, pd.DataFrame) and len(row) else row
    return (
        "not scored"
        if row is None or len(row) == 0
        else f"{row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}], n = {row.n}"
    )


NAMED = {
    "pair": ("pair_ranking", "two draws", "resid_post"),
    POSITIVE_CONTROL: ("logistic", "activation", "resid_post"),
}
"""The probe, feature and site that speak for a target, named before any score was seen; for the others the next line."""


NAMED_ELSE = ("logistic_tuned", "activation", "resid_post")


def headline(
    results: pd.DataFrame, target: str, regime: str, *, searched: bool = False
) -> pd.Series | None:
    """The probe that was named in advance for a target, at the layer chosen on validation; with `searched` the one of all probes, features and sites that was best on validation.

    `tried` counts what it was chosen from. None if the task was not scored.
    """
    task = results[
        (results.target == target) & (results.regime == regime) & (results.kind == "probe")
    ]
    probe, feature, site = NAMED.get(target, NAMED_ELSE)
    named = task[(task.probe == probe) & (task.feature == feature) & (task.site == site)]
    if task.empty or (named.empty and not searched):
        return None
    row = (
        task.loc[task.validation[task.selected].idxmax()]
        if searched
        else named[named.selected].iloc[0]
    )
    return pd.concat([row, pd.Series({"tried": len(task) if searched else len(named)})])


def verdict(row: pd.Series) -> str:
    """In words, whether a probe's number is evidence: its interval against chance, and its lift over the best control."""
    if row.low <= 0.5 <= row.high:
        return "not distinguishable from chance"
    if row.high < 0.5:
        return "inverted: below chance"
    return (
        f"above chance and above {row.best_control}"
        if row.lift_low > 0
        else f"above chance, but not above {row.best_control}"
    )


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Two lines a task (the positive control apart): the probe `named` in advance, and the one `searched` for on validation, each with its best control and the verdict."""
    tasks = results[results.target != POSITIVE_CONTROL][["target", "regime"]].drop_duplicates()
    rows = [
        pd.concat([h, pd.Series({"how": how})])
        for t in tasks.itertuples()
        for how in ("named", "searched")
        if (h := headline(results, t.target, t.regime, searched=how == "searched")) is not None
    ]
    columns = [
        "target",
        "regime",
        "how",
        "probe",
        "feature",
        "site",
        "layer",
        "tried",
        "estimate",
        "low",
        "high",
        "n",
        "best_control",
        "lift",
        "lift_low",
        "lift_high",
    ]
    return (
        pd.DataFrame(rows, columns=columns)
        .assign(verdict=[verdict(r) for r in rows])
        .reset_index(drop=True)
    )


def in_words(row) -> str:
    """One sentence on the headline of a task; None is a task without enough rows."""
    if row is None:
        return "not scored, as one class has too few rows"
    control = f"{row.best_control} {row.estimate - row.lift:.2f}, lift {row.lift:+.2f} [{row.lift_low:+.2f}, {row.lift_high:+.2f}]"
    return f"AUROC {row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}], n = {row.n} (best control: {control}): {verdict(row)}"
