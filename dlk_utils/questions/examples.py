"""Binary questions with known answers: the embedded data sets, your own file, or a data set of the hub."""

import hashlib
from collections.abc import Sequence

import pandas as pd

from dlk_utils.errors import DataError
from dlk_utils.questions.embedded import EMBEDDED, cities
from dlk_utils.questions.ids import example_id, split_of
from dlk_utils.questions.sources import read_rows_of, source_of
from dlk_utils.questions.trained import trained_example_ids

COLUMNS = ["example_id", "dataset", "kind", "text", "choice_0", "choice_1", "label", "split"]


def load_examples(
    datasets: str | Sequence[str], n_examples: int, *, seed: int = 0, n_pool: int = 32
) -> pd.DataFrame:
    """Examples, at most `n_examples` per data set and balanced by label, and up to `n_pool` more per data set for shots.

    `datasets` is a comma-separated string or a list of names: see `dataset_names()`, a path to a `.csv` or `.jsonl` with
    columns `statement,label` or `question,choice_0,choice_1,label` (UTF-8), or a data set of `hub_sets.yaml` by its name or
    as a local folder of that name. What an organism of this package was trained on is left out of your own and the hub's (it is never among the embedded rows). Rows come as the columns `COLUMNS`; label 1 means that choice 1 is right (a claim: that it is
    true; a review: that it is positive). Raises `DataError` naming the file, column and row of bad input.
    """
    if isinstance(n_examples, bool) or not isinstance(n_examples, int) or n_examples < 4:
        raise DataError(f"n_examples: expected a whole number of at least 4, got {n_examples!r}")
    names = (
        [d.strip() for d in datasets.split(",")] if isinstance(datasets, str) else list(datasets)
    )
    if not names or len(set(names)) != len(names) or "" in names:
        raise DataError(f"datasets: expected distinct names separated by commas, got {datasets!r}")
    parts, dropped, in_another, trained_on = [], {}, {}, {}
    for name in names:
        rows = _distinct(name, read_rows_of(name))
        dropped[name] = rows.attrs["dropped_duplicates"]
        trained = rows.example_id.isin(trained_example_ids() if name not in EMBEDDED else ())
        taken = rows.example_id.isin([i for p in parts for i in p.example_id])
        trained_on[name], in_another[name] = int(trained.sum()), int((taken & ~trained).sum())
        rows = rows[~trained & ~taken]
        rows = rows.assign(order=[_order(seed, i) for i in rows.example_id]).sort_values("order")
        queries, pool = rows[~rows.split.isin(["shot", "organism"])], rows[rows.split == "shot"]
        if queries.label.nunique() < 2:
            why = {
                "an organism was trained on them": trained_on[name],
                "a data set before it has them": in_another[name],
            }
            left_out = "".join(
                f"; {n} more were left out, because {reason}" for reason, n in why.items() if n
            )
            raise DataError(
                f"{name}: expected examples of both labels outside the shot pool, got {queries.label.value_counts().to_dict()}{left_out}"
            )
        parts += [_balanced(queries, n_examples), _balanced(pool, n_pool)]
    out = pd.concat(parts, ignore_index=True)[COLUMNS].astype({"label": int})
    assert out.example_id.is_unique
    out.attrs |= {
        "dropped_duplicates": dropped,
        "dropped_in_another": in_another,
        "dropped_trained_on": trained_on,
    }
    out.attrs["sources"] = {name: source_of(name) for name in names}
    return out


def training_examples(name: str, n_examples: int, *, seed: int = 0) -> pd.DataFrame:
    """At most `n_examples` of an embedded data set from the split `organism`, balanced by label: no run ever asks them.

    Of a country or a thing in that split more is claimed than the one claim that its split goes by, true and false. Cities of 300,000 to half a million people are of that split too, all of them:
    they are asked nowhere.
    """
    rows = _distinct(name, read_rows_of(name))
    rows = rows[rows.split == "organism"]
    if name in ("capitals", "continents", "cities", "categories"):
        table = pd.DataFrame(EMBEDDED[name](each=8), columns=["kind", "text", "label"]).assign(
            choice_0="", choice_1=""
        )
        block = table.text.isin(rows.text).groupby(table.index // 8).transform("any")
        more = pd.DataFrame(
            cities(each=8, people=(3e5, 5e5)) if name == "cities" else [],
            columns=["kind", "text", "label"],
        ).assign(choice_0="", choice_1="")
        rows = _distinct(name, pd.concat([table[block], more])).assign(split="organism")
    rows = rows.assign(order=[_order(seed, i) for i in rows.example_id])
    return _balanced(rows, n_examples)[COLUMNS].reset_index(drop=True)


def _order(seed: int, key: str) -> str:
    return hashlib.sha256(f"order:{seed}:{key}".encode()).hexdigest()


def _distinct(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with id and split; a content that comes twice is kept once, and not at all if its labels differ."""
    out = rows.assign(
        example_id=[
            example_id(*r) for r in zip(rows.text, rows.choice_0, rows.choice_1, strict=True)
        ]
    )
    both = out.groupby("example_id").label.nunique()
    out = out[~out.example_id.isin(both[both > 1].index)].drop_duplicates("example_id")
    out = out.assign(
        split=[split_of(i, embedded=name in EMBEDDED) for i in out.example_id], dataset=name
    )
    out.attrs["dropped_duplicates"] = len(rows) - len(out)
    return out


def _balanced(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    return pd.concat(
        [g.head((n + i) // 2) for i, (_, g) in enumerate(rows.groupby("label"))]
    ).sort_values("order")
