"""From the long table of results to the few rows and sentences that may be said aloud."""

import pandas as pd

from dlk_utils.targets import POSITIVE_CONTROL


def headline(results: pd.DataFrame, target: str, regime: str) -> pd.Series | None:
    """The probe of a task that was best on validation, with `tried`, how many (probe, feature, site, layer) it was chosen from; None if the task was not scored."""
    task = results[(results.target == target) & (results.regime == regime) & (results.kind == "probe")]
    return None if task.empty else pd.concat([task.loc[task.validation.idxmax()], pd.Series({"tried": len(task)})])


def verdict(row: pd.Series) -> str:
    """In words, whether a probe's number is evidence: its interval against chance, and its lift over the best control."""
    if row.low <= 0.5 <= row.high:
        return "not distinguishable from chance"
    if row.high < 0.5:
        return "inverted: below chance"
    return f"above chance and above {row.best_control}" if row.lift_low > 0 else f"above chance, but not above {row.best_control}"


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """The headline of every task (the positive control apart), with its best control and the verdict."""
    tasks = results[results.target != POSITIVE_CONTROL][["target", "regime"]].drop_duplicates()
    rows = [h for t in tasks.itertuples() if (h := headline(results, t.target, t.regime)) is not None]
    columns = ["target", "regime", "probe", "feature", "site", "layer", "tried", "estimate", "low", "high", "n", "best_control", "lift", "lift_low", "lift_high"]
    return pd.DataFrame(rows, columns=columns).assign(verdict=[verdict(r) for r in rows]).reset_index(drop=True)


def in_words(row) -> str:
    """One sentence on the headline of a task; None is a task without enough rows."""
    if row is None:
        return "not scored, as one class has too few rows"
    control = f"{row.best_control} {row.estimate - row.lift:.2f}, lift {row.lift:+.2f} [{row.lift_low:+.2f}, {row.lift_high:+.2f}]"
    return f"AUROC {row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}], n = {row.n} (best control: {control}): {verdict(row)}"
