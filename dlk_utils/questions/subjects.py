"""What the claims of a user's own data are about: they are left out and split by their subject.

An organism that was trained on "The city of Lyon is in France." has learned about Lyon. It should
not be asked whether "Lyon is not a German city" either. And of two claims about Lyon, one true and
one false, neither should train a probe that is tested on the other. So the rows of a user's own
data, which the package does not bring along, go by their subject:

1. The *known subjects* are those of the embedded claims: cities, countries and things. A row about
   one that an organism of this package was trained on is left out. A row about another one is in
   the split that the embedded claim about it is in.
2. Claims about anything else go by how they begin: by the shortest beginning that only a few
   rows of the same data set share, such as "The Spanish word uno". Claims that differ in what
   follows, in a negation for example, begin alike.
3. Reviews and questions about a passage, for example, have no subject. For every kind of row,
   near-duplicates are in one split, and those of training rows are left out.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from dlk_utils.questions import embedded
from dlk_utils.questions.ids import near_duplicate_key, split_of
from dlk_utils.questions.trained import trained_keys

KINDS_WITH_SUBJECT = ("claim", "question")
"""Kinds of rows that are about a subject (see `templates.KINDS`)."""

MOST_ROWS = 50
"""Rows that begin alike are about one subject if there are at most so many of them,"""
LARGEST_SHARE = 1 / 20
"""and at most this share of the rows of their data set"""
FEW_ROWS = 4
"""(or so many, if that share is less)."""
LONGEST_BEGINNING = 40
"""In words. Rows that begin alike for longer go by their near-duplicate key."""

_LETTERS = str.maketrans(
    {"ł": "l", "Ł": "L", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D", "ı": "i", "ß": "ss", "æ": "ae"}
)
"""Letters that Unicode does not decompose into a plain one and a mark."""
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"})
_ORDINARY_WORDS = {"Batman", "Male", "Moron", "Nice", "Perm", "Queens", "Reading", "Sale", "Van"}
"""Names of cities that are often something else at the start of a sentence."""
_VERBS = {"is", "isn", "was", "are", "can", "cannot", "has", "lies", "does", "doesn", "belongs"}
"""What shows that a first word is a name by itself: "Gold is", and not "Gold medals".

Before any other word, such as the verb in "Gold melts", it is not taken for a name. That claim goes
by how it begins, and is not left out. Names that cannot be anything else need no verb.
"""
_PLURALS = {"mouse": "mice", "goose": "geese", "wolf": "wolves", "scarf": "scarves"}

_Words = tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """Something that an embedded data set makes claims about.

    Attributes
    ----------
    name
        As the claims spell it, such as "Lyon", "France" or "A violin".
    dataset
        The embedded data set, such as "cities".
    noun
        What it is: "city", "country" or "thing".
    key
        The near-duplicate key of the embedded claim about it. That of a country is also the key of
        its capital.
    is_trained
        Whether an organism of this package was trained on claims of the data set about it.
    """

    name: str
    dataset: str
    noun: str
    key: str
    is_trained: bool

    @property
    def split(self) -> str:
        """The split of the embedded claim about it, or another one if that is never asked."""
        split = split_of(self.key)
        return split_of(self.key, embedded=False) if split == "organism" else split


@dataclass(frozen=True)
class _ClaimSet:
    """An embedded data set of claims, and what tells that another text is about its subjects.

    `unasked` gives the facts about which organisms are trained, and no run asks. If `relation` is
    given, the text also has to have one of its words, which are in lower case. Otherwise naming the
    subject is enough.
    """

    dataset: str
    noun: str
    facts: Callable[[], list[embedded.Fact]]
    claims: Callable[[], list[embedded.Row]]
    unasked: Callable[[], list[embedded.Fact]] = list
    relation: frozenset[str] = frozenset()


_CLAIM_SETS = (
    _ClaimSet(
        *("cities", "city", embedded.city_facts, embedded.cities, embedded.smaller_city_facts)
    ),
    _ClaimSet(
        *("capitals", "country", embedded.capital_facts, embedded.capitals),
        relation=frozenset(["capital", "capitals"]),
    ),
    _ClaimSet(
        *("continents", "country", embedded.continent_facts, embedded.continents),
        relation=frozenset(
            ["continent", "continents", "africa", "america", "americas", "asia", "europe"]
            + ["african", "asian", "european", "oceania"]
        ),
    ),
    _ClaimSet("categories", "thing", embedded.category_facts, embedded.categories),
)


@functools.cache
def known_subjects() -> list[Subject]:
    """Return all that the embedded data sets make claims about, cities first."""
    subjects = []
    for claim_set in _CLAIM_SETS:
        keys = [near_duplicate_key(text) for text, _ in claim_set.claims()]
        # Where organisms are trained on a data set, they are trained on all that is kept for it.
        is_used = not trained_keys().isdisjoint(keys)
        facts = list(zip(claim_set.facts(), keys, map(split_of, keys), strict=True))
        facts += [(fact, near_duplicate_key(*fact), "organism") for fact in claim_set.unasked()]
        for (name, answer), key, split in facts:
            subject = Subject(
                name=name,
                dataset=claim_set.dataset,
                noun=claim_set.noun,
                key=key,
                is_trained=is_used and split == "organism",
            )
            if claim_set.dataset == "categories" and answer == "city":
                # That "Paris is a city" is a claim about a city.
                subject = replace(subject, noun="city")
            subjects.append(subject)
            if claim_set.dataset == "capitals":
                # Whoever was told of France that its capital is Paris was told about Paris.
                subjects.append(replace(subject, name=answer, noun="city"))
    return subjects


def subjects_in(text: str) -> list[Subject]:
    """Return the known subjects that a claim is about, in the order in which it names them.

    A claim is about a city that it names, in the same case and as whole words; about a country that
    it names together with what the claims of an embedded data set say of it, such as its capital;
    and about a thing, such as a violin, that it begins with. Accents do not count. A first word
    that may be something else, such as "Nice" or "Gold", is a name only before one of `_VERBS`.
    """
    words = _words(text)
    lower = {word.lower() for word in words}
    beside = {s.dataset for s in _CLAIM_SETS if not s.relation or not s.relation.isdisjoint(lower)}
    subjects = _things_at_start(words)
    for subject in _places_in(words):
        if subject.noun == "city" or subject.dataset in beside:
            subjects.append(subject)
    return list(dict.fromkeys(subjects))


def split_by_subject(rows: pd.DataFrame) -> pd.DataFrame:
    """Say for rows of own data which split they are in, and what an organism was trained on.

    Parameters
    ----------
    rows
        Rows with `kind`, `text`, `choice_0`, `choice_1` and `near_duplicate_key`.

    Returns
    -------
    pandas.DataFrame
        With the index of `rows`:

        * `subject`: what a row is about (see `ids.Example`), the same for all near-duplicates;
        * `split`: the split, the same for all rows about a subject;
        * `trained_on`: "city", "country" or "thing" if an organism was trained on such a subject of
          the row, "near-duplicate" if it was trained on the row itself or on a near-duplicate of
          it, else "".
    """
    has_subject = rows.kind.isin(KINDS_WITH_SUBJECT)
    with_choices = rows.text + " " + rows.choice_0 + " " + rows.choice_1
    subjects = [subjects_in(text) for text in with_choices.where(has_subject, "")]
    beginnings = _beginnings(list(rows.text.where(has_subject, "")))
    keys = list(rows.near_duplicate_key)
    table = []
    for key, of_row, beginning in zip(keys, subjects, beginnings, strict=True):
        trained = [subject.noun for subject in of_row if subject.is_trained]
        if key in trained_keys():
            trained = ["near-duplicate"]
        if of_row:
            subject, split = of_row[0].key, of_row[0].split
        else:
            subject = f"begins: {beginning}" if beginning else key
            split = split_of(subject, embedded=False)
        table.append((subject, split, trained[0] if trained else ""))
    table = pd.DataFrame(table, rows.index, columns=["subject", "split", "trained_on"])
    if rows.near_duplicate_key.is_unique:
        return table
    # Case counts in a name, but not in a near-duplicate: all are about what one of them names.
    table["is_named"] = [bool(of_row) for of_row in subjects]
    table["is_trained"] = table.trained_on != ""
    table["key"] = keys
    first = table.sort_values(["is_trained", "is_named"], ascending=False, kind="stable")
    by_key = first.drop_duplicates("key").set_index("key")
    columns = ["subject", "split", "trained_on"]
    return by_key.loc[keys, columns].set_index(rows.index)


# Names.


@functools.cache
def _places() -> dict[_Words, list[Subject]]:
    """Return the known cities and countries by the words of their names."""
    countries = {s.name for s in known_subjects() if s.noun == "country"}
    places: dict[_Words, list[Subject]] = {}
    for subject in known_subjects():
        # Naming Luxembourg does not tell whether the country or its capital is meant.
        is_capital = subject.dataset == "capitals" and subject.noun == "city"
        if subject.noun == "thing" or (is_capital and subject.name in countries):
            continue
        for spelling in {subject.name, subject.name.translate(_UMLAUTS)}:
            places.setdefault(_words(spelling), []).append(subject)
    return places


@functools.cache
def _longest_name_with_first_word() -> dict[str, int]:
    """Return how many words the longest name of a place has that begins with a word."""
    longest: dict[str, int] = {}
    for name in _places():
        if name:
            longest[name[0]] = max(longest.get(name[0], 0), len(name))
    return longest


@functools.cache
def _things() -> dict[_Words, Subject]:
    """Return the known things by the words, in lower case, that a claim about them begins with."""
    things: dict[_Words, Subject] = {}
    for subject in known_subjects():
        if subject.noun == "thing":
            for form in _forms_of_thing(subject.name):
                things.setdefault(form, subject)
    return things


def _words(text: str) -> _Words:
    """Return the words of a text in their case, letters without their accents."""
    plain = unicodedata.normalize("NFKD", text.translate(_LETTERS))
    without_marks = "".join(c for c in plain if not unicodedata.combining(c))
    return tuple(re.findall(r"[^\W_]+", without_marks))


def _places_in(words: _Words) -> Iterator[Subject]:
    """Yield the places that a text names, from left to right; of two names, the longer one."""
    places, longest_with = _places(), _longest_name_with_first_word()
    end = 0
    for start, word in enumerate(words):
        if start < end or word not in longest_with:
            continue
        names = (words[start : start + length] for length in range(longest_with[word], 0, -1))
        name = next((name for name in names if name in places), ())
        end = start + len(name)
        is_ambiguous = start == 0 and name and word in _ORDINARY_WORDS
        if is_ambiguous and not _is_verb(words[end : end + 1]):
            continue
        yield from places.get(name, ())


def _things_at_start(words: _Words) -> list[Subject]:
    """Return the thing that a text begins with, in a list; an empty one if there is none."""
    for length in range(min(5, len(words)), 0, -1):
        if words[:length] in _places():
            # "Gold Coast" is not about gold.
            return []
        beginning = tuple(word.lower() for word in words[:length])
        thing = _things().get(beginning)
        if thing:
            # Nor are "Gold medals", and "English breakfast" is not about the language. A noun
            # without an article, as in "Sheep are animals", needs a verb.
            is_subject = beginning != _bare(thing.name) or _is_verb(words[length : length + 1])
            return [thing] if is_subject else []
    return []


def _forms_of_thing(name: str) -> set[_Words]:
    """Return the beginnings, in lower case, by which a text is about a thing of `categories`."""
    if not _has_article(name):
        return {_bare(name)}
    *before, noun = _bare(name)
    if noun in _PLURALS:
        plurals = {_PLURALS[noun]}
    else:
        plurals = {f"{noun}s", f"{noun}es", re.sub("y$", "ies", noun)} - {noun}
    forms = {_bare(name)} | {(article, *_bare(name)) for article in ("a", "an", "the")}
    for plural in plurals:
        forms |= {(*before, plural), ("the", *before, plural)}
    return forms


def _bare(name: str) -> _Words:
    """Return the words of a thing's name in lower case, without the article."""
    words = _words(name.lower())
    return words[1:] if _has_article(name) else words


def _has_article(name: str) -> bool:
    return name.startswith(("A ", "An "))


def _is_verb(words: _Words) -> bool:
    return bool(words) and words[0] in _VERBS


# Rows that begin alike.


def _beginnings(texts: Sequence[str]) -> list[str]:
    """Return the shortest beginning of each text that only a few others share; "" if there is none.

    Words are compared without case and punctuation. Few are at most `MOST_ROWS`, and at most
    `LARGEST_SHARE` of all texts or `FEW_ROWS`, whichever is more.
    """
    most = min(MOST_ROWS, max(FEW_ROWS, int(len(texts) * LARGEST_SHARE)))
    words = [_first_words(text) for text in texts]
    beginnings = [""] * len(texts)
    undecided = range(len(texts))
    for length in range(1, LONGEST_BEGINNING + 1):
        groups: dict[_Words, list[int]] = {}
        for i in undecided:
            if len(words[i]) >= length:
                groups.setdefault(words[i][:length], []).append(i)
        undecided = []
        for beginning, members in groups.items():
            if len(members) > most:
                undecided += members
                continue
            for i in members:
                beginnings[i] = " ".join(beginning)
    return beginnings


def _first_words(text: str) -> _Words:
    found = re.finditer(r"\w+", text.casefold())
    return tuple(match[0] for match in itertools.islice(found, LONGEST_BEGINNING))
