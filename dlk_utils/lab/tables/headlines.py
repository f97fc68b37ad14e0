"""Tables of notebook 10: the same states and probe with one known mistake at a time, and which reported numbers survive."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from dlk_utils.evaluation.stats import auroc, bootstrap_weights, earliest_good_layer, weighted_auroc
from dlk_utils.evaluation.tasks import LYING, Features, select_rows, too_few
from dlk_utils.lab.findings import in_brief
from dlk_utils.probes import STATE_PROBES, Logistic


def with_each_mistake(
    rows: pd.DataFrame, features: Features, *, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """`mistake`, what it claims to measure, `estimate`, `low`, `high`, `n`: the first line is as it should be, each other has one mistake.

    `rows` are those of the target truth (`y` is the label), with `role`, `split`, `answer`, `knows` and `lied`. Intervals resample examples in every line, also where the mistake is to split by row. Empty if there are too few rows of a class.
    """
    keys, found = list(features), []
    stack = lambda some: np.stack([features[k](some) for k in keys])
    honest, validation, lying = (
        select_rows(rows, "truth", "train"),
        select_rows(rows, "truth", "validation"),
        select_rows(rows, "lie", "test"),
    )
    told = select_rows(rows, "truth", "test")
    if (
        too_few(honest, "train")
        or too_few(validation, "validation")
        or too_few(lying, "test")
        or too_few(told, "test")
    ):
        return pd.DataFrame(columns=["mistake", "claim", "estimate", "low", "high", "n"])
    probe = Logistic().fit(stack(honest), honest.y.to_numpy())
    best = lambda fitted, some, y: int(
        np.argmax([auroc(s, y) for s in fitted.decision_function(stack(some))])
    )
    chosen = earliest_good_layer(
        probe.decision_function(stack(validation)), validation.y.to_numpy(), validation.example_id
    )
    on_lies = probe.decision_function(stack(lying))

    def add(
        mistake: str,
        claim: str,
        scores: np.ndarray,
        test: pd.DataFrame,
        y: np.ndarray,
        turn: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    ) -> None:
        low, high = np.nanpercentile(
            turn(weighted_auroc(scores, y, bootstrap_weights(test.example_id, n_boot, seed))),
            [2.5, 97.5],
        )
        found.append(
            {
                "mistake": mistake,
                "claim": claim,
                "estimate": float(turn(np.array(auroc(scores, y)))),
                "low": low,
                "high": high,
                "n": len(test),
            }
        )

    label = lying.y.to_numpy()
    add(
        "none: as it should be",
        "truth, trained on honest rows, read on rows told to lie",
        on_lies[chosen],
        lying,
        label,
    )
    add(
        "layer with the highest score on honest rows",
        "the same; but on honest rows the answer itself scores highest",
        on_lies[best(probe, validation, validation.y.to_numpy())],
        lying,
        label,
    )
    add(
        "layer chosen on the test rows",
        "the same",
        on_lies[best(probe, lying, label)],
        lying,
        label,
    )
    turned = int(np.argmax([abs(auroc(s, label) - 0.5) for s in on_lies]))
    add(
        "layer and sign chosen on the test rows",
        "the same",
        on_lies[turned],
        lying,
        label,
        lambda x: np.maximum(x, 1 - x),
    )
    few = lying[
        lying.example_id.isin(
            lying.example_id.drop_duplicates().sample(
                min(38, lying.example_id.nunique()), random_state=seed
            )
        )
    ]
    tries = [
        s
        for make in STATE_PROBES.values()
        for s in make().fit(stack(honest), honest.y.to_numpy()).decision_function(stack(few))
    ]
    add(
        f"the best of {len(tries)} probes, on {len(few)} test rows",
        "the same",
        max(tries, key=lambda s: auroc(s, few.y.to_numpy())),
        few,
        few.y.to_numpy(),
    )
    add(
        "tested on honest rows",
        "truth; but there the answer says it too",
        probe.decision_function(stack(told))[chosen],
        told,
        told.y.to_numpy(),
    )

    shuffled = rows.sample(frac=1, random_state=seed)
    train, test = shuffled.iloc[: int(0.7 * len(rows))], shuffled.iloc[int(0.7 * len(rows)) :]
    by_row = Logistic().fit(stack(train), train.y.to_numpy())
    add(
        "split by row, twins on both sides",
        "truth, on rows of either kind",
        by_row.decision_function(stack(test))[chosen],
        test,
        test.y.to_numpy(),
    )

    train, checked, test = (rows[rows.split == split] for split in ("train", "validation", "test"))
    word = Logistic().fit(stack(train), train.answer.to_numpy(int))
    add(
        "the next word taken for the truth",
        "truth; but choices that begin alike leave nothing else to read",
        word.decision_function(stack(test))[best(word, checked, checked.answer.to_numpy(int))],
        test,
        test.answer.to_numpy(int),
    )

    known = rows[rows.knows]
    train, test = known[known.split == "train"], known[known.split == "test"]
    if all(
        known[known.split == split].lied.nunique() == 2 for split in ("train", "validation", "test")
    ):
        prompts = Logistic().fit(stack(train), train.lied.to_numpy(int))
        at = best(
            prompts,
            known[known.split == "validation"],
            known[known.split == "validation"].lied.to_numpy(int),
        )
        add(
            "honest rows beside the lies",
            "was this answer a lie; but the system prompt says it too",
            prompts.decision_function(stack(test))[at],
            test,
            test.lied.to_numpy(int),
        )
    return pd.DataFrame(found)


REPORTED = (
    (
        "2023-07-13",
        "three classes, F1 of deception",
        "F1 .371 at accuracy .850",
        "the majority had .837",
    ),
    ("2023-07-20", "pairs of draws, linear", ".70 to .71", "duplicates on both sides of the split"),
    (
        "2023-07-21",
        "pairs of draws, ranking, big moves only",
        ".89 to .94",
        "duplicates on both sides of the split",
    ),
    ("2023-07-28", "convolution over depth", "AUROC .961", "duplicates on both sides of the split"),
    ("2023-09-04", "weight gradients, linear", ".77 to .81", "at or below the majority"),
    (
        "2023-09-10",
        "heads, state and gradient, linear",
        "96 %, then 99.6 %",
        "choices that begin alike; one seed",
    ),
    ("2023-09-11", "one data set", "near 100 %", "the same"),
    (
        "2023-09-11",
        "from one data set to another",
        "60 %",
        "a split that separated them by accident",
    ),
    (
        "2023-09-15",
        "heads, state and gradient, dice loss",
        ".94 (n = 38)",
        "38 rows, the best of many",
    ),
)
"""The work that this grows from, by its own diary: date, what, reported, and what is known to be wrong with it."""


def clean_numbers(
    results: pd.DataFrame, classes: pd.DataFrame, pairs: pd.DataFrame, across: pd.DataFrame
) -> dict[str, str]:
    """What a clean evaluation gives for the lines of `REPORTED`: trained on honest rows, read on rows told to lie, layer chosen on validation (of the classes, F1 on test; across data sets, the least and the most)."""
    lying = results[
        (results.regime == LYING)
        & results.selected
        & (results.kind == "probe")
        & (results.target == "truth")
    ]
    pick = lambda probe, feature, site: in_brief(
        lying[(lying.probe == probe) & (lying.feature == feature) & (lying.site == site)]
    )
    ranked = pairs[(pairs.pairs == "draws, sequence") & (pairs.regime == LYING)]
    pair = lambda probe, least: in_brief(
        ranked[(ranked.probe == probe) & (ranked.least_move == least)]
    )
    deception = classes[classes["class"] == "deception"].set_index("method").f1
    own, apart = (
        across[across.trained_on == across.tested_on],
        across[(across.trained_on != across.tested_on) & (across.trained_on != "all others")],
    )
    return {
        "three classes, F1 of deception": f"F1 {deception['softmax regression']:.2f}; instruction alone {deception['instruction only']:.2f}"
        if len(deception)
        else "not scored",
        "pairs of draws, linear": pair("pair_direction", 0.0),
        "pairs of draws, ranking, big moves only": pair("pair_ranking", 0.1),
        "convolution over depth": pick("convolution", "activation", "resid_post"),
        "heads, state and gradient, linear": pick("logistic", "both", "head_out"),
        "one data set": "; ".join(f"{r.tested_on} {r.estimate:.2f}" for r in own.itertuples())
        or "not scored",
        "from one data set to another": f"{apart.estimate.min():.2f} to {apart.estimate.max():.2f}"
        if len(apart)
        else "not scored",
        "heads, state and gradient, dice loss": pick("dice", "activation", "resid_post")
        + " (residual stream)",
    }


def survivors(clean: Mapping[str, str], wrong: Mapping[str, str]) -> pd.DataFrame:
    """`REPORTED` with what is left here of each (`clean`, by what) and what the like mistake gives here (`wrong`, by what)."""
    unknown = (set(clean) | set(wrong)) - {what for _, what, _, _ in REPORTED}
    if unknown:
        raise KeyError(f"survivors: expected names of REPORTED, got {sorted(unknown)}")
    return pd.DataFrame(
        [
            {
                "date": date,
                "what": what,
                "reported": reported,
                "what is wrong with it": flaw,
                "here, cleanly": clean.get(what, "not measured"),
                "here, with the like mistake": wrong.get(what, ""),
            }
            for date, what, reported, flaw in REPORTED
        ]
    ).set_index(["date", "what"])
