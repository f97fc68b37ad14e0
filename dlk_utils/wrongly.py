"""How to get 99 %, wrongly: the same states and the same probe, with one known mistake put back at a time."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from dlk_utils.generalise import too_few
from dlk_utils.metrics import auroc, earliest, resamples, weighted_auroc
from dlk_utils.probes import STATE_PROBES, Logistic
from dlk_utils.targets import Features, of_role


def with_each_mistake(rows: pd.DataFrame, features: Features, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """`mistake`, what it claims to measure, `estimate`, `low`, `high`, `n`: the first line is as it should be, each other has one mistake.

    `rows` are those of the target truth (`y` is the label), with `role`, `split`, `answer`, `knows` and `lied`. Intervals resample examples in every line, also where the mistake is to split by row. Empty if there are too few rows of a class.
    """
    keys, found = list(features), []
    stack = lambda some: np.stack([features[k](some) for k in keys])
    honest, validation, lying = of_role(rows, "truth", "train"), of_role(rows, "truth", "validation"), of_role(rows, "lie", "test")
    told = of_role(rows, "truth", "test")
    if too_few(honest, "train") or too_few(validation, "validation") or too_few(lying, "test") or too_few(told, "test"):
        return pd.DataFrame(columns=["mistake", "claim", "estimate", "low", "high", "n"])
    probe = Logistic().fit(stack(honest), honest.y.to_numpy())
    best = lambda fitted, some, y: int(np.argmax([auroc(s, y) for s in fitted.decision_function(stack(some))]))
    chosen = earliest(probe.decision_function(stack(validation)), validation.y.to_numpy(), validation.example_id)
    on_lies = probe.decision_function(stack(lying))

    def add(mistake: str, claim: str, scores: np.ndarray, test: pd.DataFrame, y: np.ndarray, turn: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
        low, high = np.nanpercentile(turn(weighted_auroc(scores, y, resamples(test.example_id, n_boot, seed))), [2.5, 97.5])
        found.append({"mistake": mistake, "claim": claim, "estimate": float(turn(np.array(auroc(scores, y)))), "low": low, "high": high, "n": len(test)})

    label = lying.y.to_numpy()
    add("none: as it should be", "truth, trained on honest rows, read on rows told to lie", on_lies[chosen], lying, label)
    add("layer with the highest score on honest rows", "the same; but on honest rows the answer itself scores highest", on_lies[best(probe, validation, validation.y.to_numpy())], lying, label)
    add("layer chosen on the test rows", "the same", on_lies[best(probe, lying, label)], lying, label)
    turned = int(np.argmax([abs(auroc(s, label) - 0.5) for s in on_lies]))
    add("layer and sign chosen on the test rows", "the same", on_lies[turned], lying, label, lambda x: np.maximum(x, 1 - x))
    few = lying[lying.example_id.isin(lying.example_id.drop_duplicates().sample(min(38, lying.example_id.nunique()), random_state=seed))]
    tries = [s for make in STATE_PROBES.values() for s in make().fit(stack(honest), honest.y.to_numpy()).decision_function(stack(few))]
    add(f"the best of {len(tries)} probes, on {len(few)} test rows", "the same", max(tries, key=lambda s: auroc(s, few.y.to_numpy())), few, few.y.to_numpy())
    add("tested on honest rows", "truth; but there the answer says it too", probe.decision_function(stack(told))[chosen], told, told.y.to_numpy())

    shuffled = rows.sample(frac=1, random_state=seed)
    train, test = shuffled.iloc[: int(0.7 * len(rows))], shuffled.iloc[int(0.7 * len(rows)) :]
    by_row = Logistic().fit(stack(train), train.y.to_numpy())
    add("split by row, twins on both sides", "truth, on rows of either kind", by_row.decision_function(stack(test))[chosen], test, test.y.to_numpy())

    train, checked, test = (rows[rows.split == split] for split in ("train", "validation", "test"))
    word = Logistic().fit(stack(train), train.answer.to_numpy(int))
    add("the next word taken for the truth", "truth; but choices that begin alike leave nothing else to read", word.decision_function(stack(test))[best(word, checked, checked.answer.to_numpy(int))], test, test.answer.to_numpy(int))

    known = rows[rows.knows]
    train, test = known[known.split == "train"], known[known.split == "test"]
    if all(known[known.split == split].lied.nunique() == 2 for split in ("train", "validation", "test")):
        prompts = Logistic().fit(stack(train), train.lied.to_numpy(int))
        at = best(prompts, known[known.split == "validation"], known[known.split == "validation"].lied.to_numpy(int))
        add("honest rows beside the lies", "was this answer a lie; but the system prompt says it too", prompts.decision_function(stack(test))[at], test, test.lied.to_numpy(int))
    return pd.DataFrame(found)
