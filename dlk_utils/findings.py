"""From the long table of results to the few rows and sentences that may be said aloud."""

from collections.abc import Mapping

import pandas as pd

from dlk_utils.evaluate import LYING
from dlk_utils.targets import POSITIVE_CONTROL


REPORTED = (
    ("2023-07-13", "three classes, F1 of deception", "F1 .371 at accuracy .850", "the majority had .837"),
    ("2023-07-20", "pairs of draws, linear", ".70 to .71", "duplicates on both sides of the split"),
    ("2023-07-21", "pairs of draws, ranking, big moves only", ".89 to .94", "duplicates on both sides of the split"),
    ("2023-07-28", "convolution over depth", "AUROC .961", "duplicates on both sides of the split"),
    ("2023-09-04", "weight gradients, linear", ".77 to .81", "at or below the majority"),
    ("2023-09-10", "heads, state and gradient, linear", "96 %, then 99.6 %", "choices that begin alike; one seed"),
    ("2023-09-11", "one data set", "near 100 %", "the same"),
    ("2023-09-11", "from one data set to another", "60 %", "a split that separated them by accident"),
    ("2023-09-15", "heads, state and gradient, dice loss", ".94 (n = 38)", "38 rows, the best of many"),
)
"""The work that this grows from, by its own diary: date, what, reported, and what is known to be wrong with it."""


def clean_numbers(results: pd.DataFrame, classes: pd.DataFrame, pairs: pd.DataFrame, across: pd.DataFrame) -> dict[str, str]:
    """What a clean evaluation gives for the lines of `REPORTED`: trained on honest rows, read on rows told to lie, layer chosen on validation (of the classes, F1 on test; across data sets, the least and the most)."""
    lying = results[(results.regime == LYING) & results.selected & (results.kind == "probe") & (results.target == "truth")]
    pick = lambda probe, feature, site: in_brief(lying[(lying.probe == probe) & (lying.feature == feature) & (lying.site == site)])
    ranked = pairs[(pairs.pairs == "draws, sequence") & (pairs.regime == LYING)]
    pair = lambda probe, least: in_brief(ranked[(ranked.probe == probe) & (ranked.least_move == least)])
    deception = classes[classes["class"] == "deception"].set_index("method").f1
    own, apart = across[across.trained_on == across.tested_on], across[(across.trained_on != across.tested_on) & (across.trained_on != "all others")]
    return {
        "three classes, F1 of deception": f"F1 {deception['softmax regression']:.2f}; instruction alone {deception['instruction only']:.2f}" if len(deception) else "not scored",
        "pairs of draws, linear": pair("pair_direction", 0.0),
        "pairs of draws, ranking, big moves only": pair("pair_ranking", 0.1),
        "convolution over depth": pick("convolution", "activation", "resid_post"),
        "heads, state and gradient, linear": pick("logistic", "both", "head_out"),
        "one data set": "; ".join(f"{r.tested_on} {r.estimate:.2f}" for r in own.itertuples()) or "not scored",
        "from one data set to another": f"{apart.estimate.min():.2f} to {apart.estimate.max():.2f}" if len(apart) else "not scored",
        "heads, state and gradient, dice loss": pick("dice", "activation", "resid_post") + " (residual stream)",
    }


def survivors(clean: Mapping[str, str], wrong: Mapping[str, str]) -> pd.DataFrame:
    """`REPORTED` with what is left here of each (`clean`, by what) and what the like mistake gives here (`wrong`, by what)."""
    unknown = (set(clean) | set(wrong)) - {what for _, what, _, _ in REPORTED}
    if unknown:
        raise KeyError(f"survivors: expected names of REPORTED, got {sorted(unknown)}")
    return pd.DataFrame([{"date": date, "what": what, "reported": reported, "what is wrong with it": flaw, "here, cleanly": clean.get(what, "not measured"), "here, with the like mistake": wrong.get(what, "")} for date, what, reported, flaw in REPORTED]).set_index(["date", "what"])


def in_brief(row) -> str:
    """An estimate with its interval and n; of an empty table, that it was not scored."""
    row = row.iloc[0] if isinstance(row, pd.DataFrame) and len(row) else row
    return "not scored" if row is None or len(row) == 0 else f"{row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}], n = {row.n}"


NAMED = {"pair": ("pair_ranking", "two draws", "resid_post"), POSITIVE_CONTROL: ("logistic", "activation", "resid_post")}
"""The probe, feature and site that speak for a target, named before any score was seen; for the others the next line."""
NAMED_ELSE = ("logistic_tuned", "activation", "resid_post")


def headline(results: pd.DataFrame, target: str, regime: str, *, searched: bool = False) -> pd.Series | None:
    """The probe that was named in advance for a target, at the layer chosen on validation; with `searched` the one of all probes, features and sites that was best on validation.

    `tried` counts what it was chosen from. None if the task was not scored.
    """
    task = results[(results.target == target) & (results.regime == regime) & (results.kind == "probe")]
    probe, feature, site = NAMED.get(target, NAMED_ELSE)
    named = task[(task.probe == probe) & (task.feature == feature) & (task.site == site)]
    if task.empty or (named.empty and not searched):
        return None
    row = task.loc[task.validation[task.selected].idxmax()] if searched else named[named.selected].iloc[0]
    return pd.concat([row, pd.Series({"tried": len(task) if searched else len(named)})])


def verdict(row: pd.Series) -> str:
    """In words, whether a probe's number is evidence: its interval against chance, and its lift over the best control."""
    if row.low <= 0.5 <= row.high:
        return "not distinguishable from chance"
    if row.high < 0.5:
        return "inverted: below chance"
    return f"above chance and above {row.best_control}" if row.lift_low > 0 else f"above chance, but not above {row.best_control}"


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Two lines a task (the positive control apart): the probe `named` in advance, and the one `searched` for on validation, each with its best control and the verdict."""
    tasks = results[results.target != POSITIVE_CONTROL][["target", "regime"]].drop_duplicates()
    rows = [pd.concat([h, pd.Series({"how": how})]) for t in tasks.itertuples() for how in ("named", "searched") if (h := headline(results, t.target, t.regime, searched=how == "searched")) is not None]
    columns = ["target", "regime", "how", "probe", "feature", "site", "layer", "tried", "estimate", "low", "high", "n", "best_control", "lift", "lift_low", "lift_high"]
    return pd.DataFrame(rows, columns=columns).assign(verdict=[verdict(r) for r in rows]).reset_index(drop=True)


def in_words(row) -> str:
    """One sentence on the headline of a task; None is a task without enough rows."""
    if row is None:
        return "not scored, as one class has too few rows"
    control = f"{row.best_control} {row.estimate - row.lift:.2f}, lift {row.lift:+.2f} [{row.lift_low:+.2f}, {row.lift_high:+.2f}]"
    return f"AUROC {row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}], n = {row.n} (best control: {control}): {verdict(row)}"
