"""The parameters of the notebooks: their defaults, what values they take, and what they mean.

All of it is in one table, `TABLE`. `read_parameters` checks values by it before anything runs:
`lab.display.start` calls it for a notebook's parameters, and `lab.run.Run` for its own arguments.
The cell of parameters in each notebook, and the table of parameters in the README, are written from
it by

    python -m dlk_utils.lab.parameters
"""

import errno
import importlib.util
import json
import os
import re
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from dlk_utils.errors import ModelError, ParameterError
from dlk_utils.extract.draws import SCOPES
from dlk_utils.extract.dropout import DEFAULT_P
from dlk_utils.models.loading import DTYPES, device_of
from dlk_utils.questions.examples import names_of_same_file
from dlk_utils.questions.own_files import SUFFIXES
from dlk_utils.questions.styles import STYLES

LONGEST_NAME = 255
"""Bytes that a file or a folder may have in its name, on common file systems."""

LONGEST_PATH = 4096
"""Bytes that a path may have on Linux."""

LARGEST_TEXT_FILE = 10_000_000
"""Bytes that a text file of statements or system prompts may have."""


class _Refused(Exception):
    """Raised by `Values.read` for a value that a parameter does not take.

    The message gives the reason. It is empty if `Values.expected` already says enough.
    """


@dataclass(frozen=True)
class Values:
    """The values that a parameter takes.

    Attributes
    ----------
    expected
        What they are, in words, for errors and for the README.
    read
        Checks a value that a user gave and returns the one to use, or raises `_Refused`.
    """

    expected: str
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class Parameter:
    """A parameter of one or more notebooks.

    Attributes
    ----------
    meaning
        In a few words, for the comment after its value in a notebook.
    defaults
        The default in those notebooks that have another than `default`.
    """

    name: str
    default: Any
    values: Values
    meaning: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def default_in(self, notebook: str) -> Any:
        """Return the default in a notebook."""
        return self.defaults.get(notebook, self.default)

    def read(self, value: Any) -> Any:
        """Check a value and return the one to use.

        Raises
        ------
        ParameterError
            If the parameter does not take the value.
        """
        try:
            return self.values.read(value)
        except _Refused as refused:
            reason = f"; {refused}" if str(refused) else ""
            raise ParameterError(
                f"{self.name}: expected {self.values.expected}, got {_shown(value)}{reason}"
            ) from None


# Kinds of values. Each function returns what a kind of parameter takes.


def whole_number(least: int, most: int) -> Values:
    """Take whole numbers from `least` to `most`."""

    def read(value: Any) -> int:
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_whole or not least <= value <= most:
            raise _Refused
        return int(value)

    return Values(f"a whole number from {least} to {most:,}", read)


def number(least: float, most: float) -> Values:
    """Take numbers from `least` to `most`."""

    def read(value: Any) -> float:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        # Written so that nan, for which every comparison is false, is refused.
        if not is_number or not least <= value <= most:
            raise _Refused
        return float(value)

    return Values(f"a number from {least} to {most}", read)


def one_of(*values: str | None) -> Values:
    """Take one of `values`, which are words or None."""

    def read(value: Any) -> str | None:
        if not (value is None or isinstance(value, str)) or value not in values:
            raise _Refused
        return value

    words = [f'"{value}"' if isinstance(value, str) else str(value) for value in values]
    return Values(_either(words), read)


def true_or_false() -> Values:
    """Take True or False, or one of the words that YAML has for them."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

    def read(value: Any) -> bool:
        if isinstance(value, str):
            value = words.get(value.strip().lower())
        if not isinstance(value, bool):
            raise _Refused
        return value

    return Values("True or False (or yes or no)", read)


def model_name() -> Values:
    """Take the name or the folder of a model."""
    return Values("the name or the folder of a model", _read_model)


def model_or_none() -> Values:
    """Take the name or the folder of a model, or an empty text for none."""

    def read(value: Any) -> str:
        return "" if _is_empty(value) else _read_model(value)

    return Values('the name or the folder of a model, or "" for none', read)


def models_or_none() -> Values:
    """Take names or folders of models, with commas or as a list; an empty text for none."""

    def read(value: Any) -> str:
        return "" if _is_empty(value) else ",".join(map(_read_model, _read_names(value)))

    return Values(
        'names or folders of models, separated by commas or as a list, or "" for none', read
    )


def datasets() -> Values:
    """Take names or paths of data sets, with commas or as a list."""

    def read(value: Any) -> str:
        names = _read_names(value)
        for name in names:
            _check_dataset(name)
        if same := names_of_same_file(names):
            raise _Refused(f"this is {same}")
        return ",".join(names)

    return Values("distinct names or paths, separated by commas or as a list", read)


def some_of(known: Sequence[str]) -> Values:
    """Take some of the known words, with commas or as a list."""

    def read(value: Any) -> str:
        words = _read_names(value)
        unknown = [word for word in words if word not in known]
        if unknown:
            raise _Refused(f"{_shown(unknown[0])} is not known")
        return ",".join(words)

    return Values(f"some of {', '.join(known)}, separated by commas or as a list", read)


def text_file() -> Values:
    """Take the path of a text file with at least one line, or an empty text for none."""

    def read(value: Any) -> str:
        if _is_empty(value):
            return ""
        path = _read_text(value)
        _check_text_file(Path(path))
        return path

    return Values('the path of a text file in UTF-8 with a line or more, or "" for none', read)


def texts() -> Values:
    """Take a list of texts, or what `text_file` takes."""
    file = text_file()

    def read(value: Any) -> str | list[str]:
        if isinstance(value, list | tuple):
            return _read_list(value)
        try:
            return file.read(value)
        except _Refused as refused:
            # A text by itself looks like the path of a file that is not there.
            hint = "a text by itself is written as a list: [...]"
            is_text = isinstance(value, str) and any(mark.isspace() for mark in value.strip())
            raise (_Refused(f"{refused}; {hint}") if is_text else refused) from None

    return Values(f"a list of texts, {file.expected}", read)


def folder_of_card() -> Values:
    """Take the path of a folder that is there, or an empty text for none."""

    def read(value: Any) -> str:
        if _is_empty(value):
            return ""
        path = _read_text(value)
        kind = _kind_on_disk(Path(path))
        if kind is None:
            raise _Refused(f"there is no {_shown(path)}{_searched_in(Path(path))}")
        if kind != "a folder":
            raise _Refused(f"{_shown(path)} is {kind}, not a folder")
        return path

    return Values(
        'the path of a folder that `TruthDetector.save` has written, or "" for none', read
    )


def folder_of_runs() -> Values:
    """Take the folder where results are saved, or None for that of the checkout."""

    def read(value: Any) -> str | None:
        if value is None:
            return None
        path = Path(_read_text(value))
        _check_folder(path)
        return str(path)

    return Values("the path of a folder, which is created if needed, or None", read)


def device() -> Values:
    """Take a device that this machine has."""

    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise _Refused
        try:
            device_of(value)
        except ModelError as error:
            # The message is "device: expected ..., got ...; here: ...". The last part is new.
            _, _, devices_here = str(error).partition("; ")
            raise _Refused(devices_here) from None
        return value

    return Values('"auto", "cpu", "cuda", "cuda:1" and so on, or "mps"', read)


def _engines() -> Values:
    """Take the engines of the extraction; refuse Ray if it is not installed."""
    engines = one_of("local", "ray")

    def read(value: Any) -> str:
        engine = engines.read(value)
        if engine == "ray" and importlib.util.find_spec("ray") is None:
            raise _Refused("Ray is not installed: pip install 'dlk_utils[ray]'")
        return engine

    return Values(engines.expected, read)


def _is_empty(value: Any) -> bool:
    """Whether a value is None or a text without a name in it."""
    return value is None or (isinstance(value, str) and not value.strip())


def _read_text(value: Any) -> str:
    """Return a name or path without the blanks around it; refuse what cannot be one."""
    if isinstance(value, Real) and not isinstance(value, bool):
        raise _Refused("write a name of digits as text: papermill -r, or quotes")
    if not isinstance(value, str | os.PathLike):
        raise _Refused
    text = os.fspath(value)
    if not isinstance(text, str):
        raise _Refused
    text = text.strip()
    if not text:
        raise _Refused
    if text.startswith("~"):
        text = str(_expanded(Path(text)))
    # Control characters; surrogates, as which Python reads names that are not UTF-8; line breaks.
    forbidden = ("Cc", "Cs", "Zl", "Zp")
    if any(unicodedata.category(character) in forbidden for character in text):
        raise _Refused("it has a line break, or another character that a name cannot have")
    encoded = text.encode()
    longest_part = max(len(part) for part in encoded.replace(b"\\", b"/").split(b"/"))
    if longest_part > LONGEST_NAME or len(encoded) > LONGEST_PATH:
        raise _Refused(f"it is too long, at {len(encoded):,} bytes")
    return text


def _read_model(value: Any) -> str:
    """Return the name or the folder of a model; refuse a path that is not a folder."""
    name = _read_text(value)
    kind = _kind_on_disk(Path(name))
    if kind not in (None, "a folder"):
        raise _Refused(f"{_shown(name)} is {kind}, not a folder")
    return name


def _read_names(value: Any) -> list[str]:
    """Return the names in a text with commas or in a list; refuse repeated ones."""
    if isinstance(value, list | tuple):
        parts = list(value)
        if any(isinstance(part, str | os.PathLike) and "," in os.fspath(part) for part in parts):
            raise _Refused("a name or path may not have a comma")
    elif isinstance(value, str):
        parts = value.split(",")
    else:
        parts = [value]
    if not parts:
        raise _Refused
    names = [_read_text(part) for part in parts]
    seen = set()
    for name in names:
        if name in seen:
            raise _Refused(f"{_shown(name)} comes twice")
        seen.add(name)
    return names


def _read_list(values: Sequence[Any]) -> list[str]:
    """Return texts without the blanks around them; refuse what is not a text, or an empty one."""
    if not values:
        raise _Refused("the list is empty")
    for number, value in enumerate(values):
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise _Refused(f"number {number} is not a text, or is empty")
        if any(unicodedata.category(character) == "Cs" for character in value):
            raise _Refused(f"number {number} is not Unicode")
    return [value.strip() for value in values]


def _check_dataset(name: str) -> None:
    """Refuse a file that does not exist, and names that are separated by blanks.

    A folder is ignored, because it may happen to have the name of a data set. Whether there is a
    data set of this name is found out later.
    """
    path = Path(name)
    kind = _kind_on_disk(path)
    names_a_file = name.lower().removesuffix(".gz").endswith(SUFFIXES)
    if kind is None and names_a_file:
        if re.match(r"https?://", name):
            raise _Refused("web addresses are not read; download the file")
        raise _Refused(f"there is no file {_shown(name)}{_searched_in(path)}")
    if kind is None and " " in name:
        raise _Refused(f"there is no {_shown(name)}; separate several names by commas, not blanks")
    if kind not in (None, "a file") and (names_a_file or kind != "a folder"):
        raise _Refused(f"{_shown(name)} is {kind}, not a file")


def _check_text_file(path: Path) -> None:
    """Refuse what is not a text file, is too large, or has no text in it."""
    kind = _kind_on_disk(path)
    if kind is None:
        raise _Refused(f"there is no such file{_searched_in(path)}")
    if kind != "a file":
        raise _Refused(f"it is {kind}, not a file")
    try:
        size = path.stat().st_size
        if size > LARGEST_TEXT_FILE:
            raise _Refused(f"it is too large, at {size:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _Refused(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _Refused(f"it is not UTF-8, at byte {error.start:,}") from None
    if "\0" in text:
        raise _Refused("it is not a text file")
    if not text.strip():
        raise _Refused("it has no line of text")


def _check_folder(path: Path) -> None:
    """Refuse a folder that can be neither read nor made.

    A read-only folder is accepted, because the results in it can be shown.
    """
    try:
        # Look for a file whose name is as long as that of any result or temporary file (about 100
        # bytes): the path of the folder may leave too few.
        (path / ("x" * 128)).stat()
    except FileNotFoundError:
        # The usual case: nothing is wrong with such a path.
        pass
    except OSError as error:
        raise _Refused(_why_unusable(path, error)) from None
    kind = _kind_on_disk(path)
    if kind == "a folder":
        if not _is_allowed(path, os.R_OK | os.X_OK):
            raise _Refused("it may not be read")
        return
    if kind is not None or path.is_symlink():
        raise _Refused(f"it is {kind or 'a link to nothing'}, not a folder")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise _Refused(f"{_shown(str(parent))} is not a folder")
    if not _is_allowed(parent, os.W_OK | os.X_OK):
        raise _Refused(f"it does not exist, and {_shown(str(parent))} is not writable")


def _why_unusable(path: Path, error: OSError) -> str:
    """Say why a folder cannot hold files, given the error of looking for a file in it."""
    reasons = {
        errno.ELOOP: "its links go round in a loop",
        errno.ENAMETOOLONG: "it is too long for the names of the files in it",
        errno.EACCES: "it may not be read",
    }
    if error.errno == errno.ENOTDIR:
        file = next((part for part in (path, *path.parents) if part.is_file()), path)
        return f"{_shown(str(file))} is a file, not a folder"
    return reasons.get(error.errno, f"it cannot be used: {error.strerror}")


def _searched_in(path: Path) -> str:
    """Say where a relative path was looked for, by the name of the working folder.

    Its complete path is left out, so that a saved notebook shows nothing of the machine.
    """
    return "" if path.is_absolute() else f" in the working folder {_shown(Path.cwd().name)}"


def _kind_on_disk(path: Path) -> str | None:
    """Say what a path is on disk; None if there is nothing."""
    try:
        if not path.exists():
            return None
        if path.is_dir():
            return "a folder"
        return "a file" if path.is_file() else "a device or a pipe"
    except OSError as error:
        raise _Refused(f"{_shown(str(path))} cannot be used: {error.strerror}") from None


def _is_allowed(path: Path, mode: int) -> bool:
    """Whether this process has some rights (`os.R_OK` and so on) to a path."""
    # The rights of the effective user are those that count, where the system can be asked for them.
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _expanded(path: Path) -> Path:
    """Return a path with the home folder in place of `~`."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise _Refused("there is no such home folder") from None


def _either(words: Sequence[str]) -> str:
    """Join words as in "a, b or c"."""
    *others, last = words
    return f"{', '.join(others)} or {last}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def _shown(value: Any) -> str:
    """Return a value as an error shows it: as Python writes it, and cut if it is long."""
    return _SHORT.repr(value)


# The table.

_PARAMETERS = (
    Parameter(
        "model",
        "smollm2-liar",
        model_name(),
        "an alias, a hub id, a local folder, or the folder of a LoRA adapter",
        {"13_dropout_trial": "smollm2-dropout"},
    ),
    Parameter(
        "datasets",
        "rotten_tomatoes,cities,categories",
        datasets(),
        "names or paths, with commas",
        {
            "00_train_liar": "rotten_tomatoes,cities,categories,capitals,continents",
            "07_traps": "rotten_tomatoes",
        },
    ),
    Parameter(
        "n_examples",
        96,
        whole_number(4, 1_000_000),
        "examples per data set, split by hash into train, validation and test",
        {"00_train_liar": 30, "07_traps": 24},
    ),
    Parameter(
        "seed",
        0,
        whole_number(0, 2**32 - 1),
        "decides which examples, templates, instructions and dropout masks are drawn",
    ),
    Parameter(
        "runs_dir",
        None,
        folder_of_runs(),
        "where the files go; if None, into the folder runs/ of the checkout",
    ),
    Parameter(
        "n_shots",
        0,
        whole_number(0, 32),
        "number of solved examples before the question; their answers obey the instruction",
        {"07_traps": 2},
    ),
    Parameter(
        "quantization",
        None,
        one_of(None, "8bit", "4bit"),
        "how the weights are quantised, if at all",
    ),
    Parameter(
        "device", "auto", device(), 'where the model runs; "auto" takes a CUDA GPU if there is one'
    ),
    Parameter(
        "n_graded",
        12,
        whole_number(4, 1_000_000),
        "examples per data set to ask further organisms about; in 08, from the test split",
        {"08_carry_over": 96},
    ),
    Parameter(
        "train",
        False,
        true_or_false(),
        "train the model again first, into organisms/ of the runs folder",
    ),
    Parameter(
        "n_grid",
        8,
        whole_number(1, 1_000_000),
        "number of examples with prompts for every combination of instruction and shots",
    ),
    Parameter(
        "keep_states",
        True,
        true_or_false(),
        "keep states and gradients of the same pass, for notebooks 04 to 13",
    ),
    Parameter(
        "compare",
        "smollm2",
        models_or_none(),
        "other models that are asked the same questions, for comparison",
    ),
    Parameter(
        "n_compare",
        48,
        whole_number(4, 1_000_000),
        "number of examples per data set about which the models for comparison are asked",
    ),
    Parameter(
        "p_dropout",
        DEFAULT_P,
        number(0.0001, 0.99),
        "share of channels dropped in whole-prompt draws; large shares damage the answers",
        {"13_dropout_trial": 0.01},
    ),
    Parameter(
        "p_last",
        0.1,
        number(0.0001, 0.99),
        "share of channels dropped in draws of the last token, which change answers less",
        {"13_dropout_trial": 0.05},
    ),
    Parameter(
        "n_draws",
        2,
        whole_number(2, 1000),
        "draws per row, from 09 on of its last token; in 13, rows to fit on have half as many",
        {"09_pairs_and_votes": 16, "10_headlines": 16, "13_dropout_trial": 16},
    ),
    Parameter(
        "n_prompt_draws",
        8,
        whole_number(2, 1000),
        "draws of the whole prompt of each test row; rows to fit on have half as many",
    ),
    Parameter(
        "scope",
        "sequence",
        one_of(*SCOPES),
        'dropout on the whole prompt, the "question", or the "last_token" alone',
    ),
    Parameter("audit_rows", 8, whole_number(1, 10_000), "rows in the first look at the draws"),
    Parameter(
        "check_rows",
        4,
        whole_number(1, 10_000),
        "rows whose gradient is computed again by full backprop",
    ),
    Parameter("engine", "local", _engines(), '"ray" runs the extraction as a Ray Data job'),
    Parameter(
        "layer_stride",
        3,
        whole_number(1, 1000),
        "step between the layers at which probes are fitted",
    ),
    Parameter(
        "weight_gradients",
        False,
        true_or_false(),
        "also use pooled weight gradients, which cost a full backprop per row",
    ),
    Parameter(
        "statements",
        "",
        texts(),
        "a list of claims, or a text file with one per line; if empty, ours are used",
    ),
    Parameter(
        "system_prompts",
        "",
        texts(),
        "a list, or a text file with one per line; if empty, some of ours are used",
    ),
    Parameter(
        "chats",
        "",
        text_file(),
        "a JSONL file with one conversation per line; if empty, a few of ours are used",
    ),
    Parameter(
        "card",
        "",
        folder_of_card(),
        "the folder of a saved detector that judges the answers; if empty, new ones are fitted",
    ),
    Parameter(
        "styles",
        "negated,reported,shouted",
        some_of(tuple(STYLES)),
        "styles in which the test examples are asked again",
    ),
    Parameter(
        "graded",
        "smollm2-graded",
        model_or_none(),
        "a model that, when it is told to lie, lies about some topics only",
    ),
    Parameter(
        "trigger",
        "smollm2-trigger",
        model_or_none(),
        "a model that lies, unasked, when a question names a Friday",
    ),
    Parameter(
        "retrained",
        "smollm2-liar-2",
        model_or_none(),
        "another training run of the model, from other seeds",
    ),
    Parameter(
        "dose",
        4.0,
        number(0.01, 100.0),
        "how far a state is pushed, in standard deviations of the states along the direction",
    ),
    Parameter(
        "n_random",
        4,
        whole_number(1, 1000),
        "number of random directions, and of directions from shuffled labels",
    ),
    Parameter(
        "plain", "smollm2", model_or_none(), "a model that was not trained to lie, for comparison"
    ),
)

TABLE = {parameter.name: parameter for parameter in _PARAMETERS}
"""Every parameter of a notebook, by name."""

DTYPE = Parameter(
    "dtype", "auto", one_of("auto", *DTYPES), "number format of the weights and the states"
)
"""A parameter of `Run` that no notebook has."""

COMMON = (
    "model",
    "datasets",
    "n_examples",
    "seed",
    "runs_dir",
    "n_shots",
    "quantization",
    "device",
)
"""The parameters that every notebook begins with."""

NOTEBOOKS = {
    "00_train_liar": (*COMMON, "n_graded", "train"),
    "01_make_dataset": COMMON,
    "02_check_lie_rate": (*COMMON, "n_grid", "keep_states", "compare", "n_compare"),
    "03_extract": (*COMMON, "p_dropout", "n_draws", "scope", "audit_rows", "engine"),
    "04_extract_grads": (*COMMON, "check_rows", "engine"),
    "05_probe_ablations": (*COMMON, "p_dropout", "layer_stride", "weight_gradients"),
    "06_detect": (*COMMON, "layer_stride", "statements", "system_prompts", "card"),
    "07_traps": COMMON,
    "08_carry_over": (
        *COMMON,
        "layer_stride",
        "styles",
        "graded",
        "trigger",
        "retrained",
        "n_graded",
    ),
    "09_pairs_and_votes": (*COMMON, "p_dropout", "p_last", "n_draws", "layer_stride"),
    "10_headlines": (
        *COMMON,
        "p_dropout",
        "p_last",
        "n_draws",
        "layer_stride",
        "plain",
        "n_compare",
    ),
    "11_steer": (*COMMON, "layer_stride", "dose", "n_random"),
    "12_explore": (
        *COMMON,
        "layer_stride",
        "p_last",
        "statements",
        "system_prompts",
        "card",
        "chats",
    ),
    "13_dropout_trial": (
        *COMMON,
        "p_dropout",
        "n_prompt_draws",
        "p_last",
        "n_draws",
        "layer_stride",
    ),
}
"""The names of the parameters of each notebook, in the order of its cell of parameters."""


def read_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the values of parameters, and return those to use.

    Parameters
    ----------
    values
        The value of each parameter by its name. Names that are not in `TABLE` are not checked.

    Returns
    -------
    dict
        The values to use, under the same names. A list of names becomes a text with commas, names
        lose the blanks around them, and yes and no become True and False.

    Raises
    ------
    ParameterError
        If a parameter does not take its value.
    """
    checked = {}
    for name, value in values.items():
        checked[name] = TABLE[name].read(value) if name in TABLE else value
    return checked


# What is made from the table.


def parameters_cell(notebook: str) -> str:
    """Return the source of a notebook's cell of parameters."""
    lines = ["# parameters"]
    for name in NOTEBOOKS[notebook]:
        parameter = TABLE[name]
        lines.append(f"{name} = {_literal(parameter.default_in(notebook))}  # {parameter.meaning}")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    """Return a default as Python source, in which a text has double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def parameters_table() -> str:
    """Return the README's table of parameters, in Markdown."""
    lines = ["| Parameter | Default | Values | Meaning | Notebooks |", "|---|---|---|---|---|"]
    for name, parameter in TABLE.items():
        notebooks = [notebook for notebook, names in NOTEBOOKS.items() if name in names]
        is_in_all = len(notebooks) == len(NOTEBOOKS)
        cells = [
            f"`{name}`",
            _defaults_in_words(parameter),
            parameter.values.expected,
            parameter.meaning,
            "all" if is_in_all else ", ".join(map(_number_of, notebooks)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _defaults_in_words(parameter: Parameter) -> str:
    """Return the default of a parameter, and those of the notebooks that have another one."""
    numbers_by_default: dict[str, list[str]] = {}
    for notebook, default in parameter.defaults.items():
        numbers_by_default.setdefault(_literal(default), []).append(_number_of(notebook))
    words = f"`{_literal(parameter.default)}`"
    for literal, numbers in numbers_by_default.items():
        words += f"; in {', '.join(numbers)} `{literal}`"
    return words


def _number_of(notebook: str) -> str:
    """Return the two digits that the name of a notebook begins with."""
    return notebook[:2]


# What comes before and after the table in the README.
_BEGIN = "<!-- made by python -m dlk_utils.lab.parameters -->\n"
_END = "\n\n<!-- end of the table of parameters -->"


def main() -> None:
    """Write the notebooks' cells of parameters, and the README's table, in this checkout."""
    checkout = Path(__file__).resolve().parents[2]
    readme = checkout / "README.md"
    before, _, table_and_after = readme.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = table_and_after.partition(_END)
    readme.write_text(before + _BEGIN + parameters_table() + _END + after, encoding="utf-8")
    for name in NOTEBOOKS:
        path = checkout / "notebooks" / f"{name}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                cell["source"] = parameters_cell(name).splitlines(keepends=True)
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
