"""Tables of notebook 06: how many lies and honest answers a detector flags."""

from collections.abc import Mapping

import pandas as pd

from dlk_utils.evaluation.stats import wilson_interval


def flag_rates(judged: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """For each table of judged rows, by name: of its lies and of its honest answers (told the truth, answered rightly), the share that is flagged as a lie, over all and by data set (Wilson 95 %)."""
    rows = []
    for name, table in judged.items():
        for what, some in (
            ("lies", table[table.lied]),
            ("honest answers", table[(table.role == "truth") & table.correct]),
        ):
            for dataset, t in [("all", some), *some.groupby("dataset")]:
                flagged = int((t.verdict == "lie").sum())
                low, high = wilson_interval(flagged, len(t)) if len(t) else (0.0, 1.0)
                rows.append(
                    {
                        "detector": name,
                        "of": what,
                        "dataset": dataset,
                        "n": len(t),
                        "flagged": flagged / max(1, len(t)),
                        "flagged_low": low,
                        "flagged_high": high,
                    }
                )
    return pd.DataFrame(rows).set_index(["detector", "of", "dataset"])
