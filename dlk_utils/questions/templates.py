"""The prompt library: instructions, and question templates in promptsource's format."""

import functools
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2.meta
import jinja2.sandbox
import pandas as pd
import yaml

from dlk_utils.errors import TemplateError
from dlk_utils.questions.ids import Example

KINDS = ("review", "claim", "question", "yes_no", "irony")
"""Kinds of example, each with its own templates."""

_FIELDS = frozenset({"text", "choice_0", "choice_1", "answer_choices"})
"""What a question may be made of. The label is not among them."""

_JINJA = jinja2.sandbox.SandboxedEnvironment(
    undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True
)


@dataclass(frozen=True)
class Instruction:
    """A system prompt: one row of `prompt_library("instructions")`."""

    name: str
    family: str
    """Kind of wording, such as role play. A whole family can be held out."""
    asks: str
    """What it asks for: truth, lie, neutral, unsure or random."""
    text: str
    role_in_shots: bool = False
    """Whether only the shots reveal what is asked for."""


@dataclass(frozen=True)
class Template:
    """A way to ask for the label of an example: one row of `prompt_library(kind)`."""

    name: str
    text: str
    """The question, in jinja."""
    prefix: str
    """How the answer begins, up to the choice."""
    choices: list[str]
    """The two choices in jinja, index = label."""
    listed: list[str]
    """The same, in the order in which the template lists them."""
    scoring: str = "first"
    """Whether the first token of a choice is scored ("first"), or all of them ("whole")."""

    def question_for(self, example: Example) -> str:
        """Return what the user says about an example."""
        fields = _fields_of(example)
        listed = [render(choice, fields) for choice in self.listed]
        return render(self.text, fields | {"answer_choices": listed})

    def choices_for(self, example: Example) -> list[str]:
        """Return the two choices of an example, index = label."""
        return [render(choice, _fields_of(example)) for choice in self.choices]


def _fields_of(example: Example) -> dict[str, Any]:
    """Everything of an example that a template sees, so that its label cannot leak."""
    return {"text": example.text, "choice_0": example.choice_0, "choice_1": example.choice_1}


@functools.cache
def prompt_library(name: str) -> pd.DataFrame:
    """Return a table of the library, indexed by name.

    `name` is "instructions" (columns: the fields of `Instruction`) or one of `KINDS` (those of
    `Template`). With "training/" before it, it means what organisms are trained with.
    """
    path = files("dlk_utils.questions").joinpath(f"library/{name}.yaml")
    if not name.endswith("instructions"):
        return read_templates(path)
    table = pd.DataFrame(yaml.safe_load(path.read_text(encoding="utf-8")))
    table = table.set_index("name", drop=False)
    hidden = table.get("role_in_shots", pd.Series(False, table.index))
    table["role_in_shots"] = hidden.eq(True)
    _require_distinct_names(table, path)
    return table


def read_templates(path: Path | Any) -> pd.DataFrame:
    """Read a promptsource file: a table of the fields of `Template`, indexed by name.

    A template is written `question ||| answer`. Which choice is right for which label is read from
    the rendered answer, so that a reversed template needs no flag. A key of our own,
    `scoring: whole`, scores choices by all their tokens instead of the first.

    Raises
    ------
    TemplateError
        If two templates have one name, a question depends on the label or on fields that no example
        has, or an answer does not end in one of two choices.

    References
    ----------
    Bach et al. (2022), "PromptSource: An Integrated Development Environment and Repository for
    Natural Language Prompts".
    """
    entries = yaml.load(path.read_text(encoding="utf-8"), _PromptsourceLoader)["templates"]
    file_name = getattr(path, "name", str(path))
    templates = [_parse_template(entry, file_name) for entry in entries.values()]
    table = pd.DataFrame([asdict(t) for t in templates]).set_index("name", drop=False)
    _require_distinct_names(table, path)
    return table


def render(text: str, fields: dict[str, Any]) -> str:
    """Render a jinja text; a field that is not given is an error."""
    return _compiled(text).render(**fields)


@functools.cache
def _compiled(text: str) -> jinja2.Template:
    return _JINJA.from_string(text)


def _require_distinct_names(table: pd.DataFrame, path: Any) -> None:
    repeated = table.name[table.name.duplicated()]
    if len(repeated):
        raise TemplateError(f"{path}: expected different names, got {repeated.iloc[0]!r} twice")


def _parse_template(entry: dict[str, Any], file_name: str) -> Template:
    where = f"{file_name}, template {entry.get('name')!r}"
    listed = [choice.strip() for choice in (entry.get("answer_choices") or "").split("|||")]
    parts = entry["jinja"].split("|||")
    if len(listed) != 2 or len(parts) != 2:
        raise TemplateError(
            f"{where}: expected two answer_choices and `question ||| answer`, "
            f"got {len(listed)} and {len(parts)} parts"
        )
    question, answer = (part.strip() for part in parts)
    _check_fields(question, listed, where)
    prefix, order = _read_answer(answer, where)
    return Template(
        name=entry["name"],
        text=question,
        prefix=prefix,
        choices=[listed[i] for i in order],
        listed=listed,
        scoring=entry.get("scoring", "first"),
    )


def _check_fields(question: str, choices: list[str], where: str) -> None:
    if "label" in _fields_in(question):
        raise TemplateError(
            f"{where}: expected a question that does not depend on the label, got one with `label`"
        )
    unknown = _fields_in(" ".join([question, *choices])) - _FIELDS
    if unknown:
        raise TemplateError(
            f"{where}: expected a question made of {', '.join(sorted(_FIELDS))}, got one with "
            f"{', '.join(sorted(unknown))} (for a hub set, put its own fields into its entry of "
            "hub_sets.yaml)"
        )


def _fields_in(text: str) -> set[str]:
    return jinja2.meta.find_undeclared_variables(_JINJA.parse(text))


def _read_answer(answer: str, where: str) -> tuple[str, list[int]]:
    """Find how an answer begins, and the index of the listed choice that each label gets."""
    # Render it for both labels with marks in place of the choices, and see where these land.
    marks = ["\x000", "\x001"]
    rendered = [
        render(answer, {"answer_choices": marks, "label": label}).strip() for label in (0, 1)
    ]
    (prefix, _, first), (other_prefix, _, second) = (text.partition("\x00") for text in rendered)
    if prefix != other_prefix or {first, second} != {"0", "1"}:
        raise TemplateError(
            f"{where}: expected an answer that ends in answer_choices[...] of the label and is "
            f"otherwise the same for both, got {[t.replace(chr(0), 'choice ') for t in rendered]}"
        )
    return prefix.strip(), [int(first), int(second)]


class _PromptsourceLoader(yaml.SafeLoader):
    """YAML with promptsource's two tags read as plain mappings."""


def _plain_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    return loader.construct_mapping(node, deep=True)


for _tag in ("!Template", "!TemplateMetadata"):
    _PromptsourceLoader.add_constructor(_tag, _plain_mapping)
