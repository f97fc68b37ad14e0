"""The prompt library: instructions, and question templates in promptsource's format (Bach et al. 2022), which other libraries can be read in."""

import functools
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pandas as pd
import yaml

from dlk_utils.errors import TemplateError

_JINJA = jinja2.sandbox.SandboxedEnvironment(
    undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True
)


KINDS = ("review", "claim", "question", "yes_no", "irony")
"""Kinds of example, each with its templates."""


FIELDS = frozenset({"text", "choice_0", "choice_1", "answer_choices"})
"""What a question may be made of."""


@functools.cache
def prompt_library(name: str) -> pd.DataFrame:
    """A table of the library, indexed by name: `instructions` (family, asks, text), or the templates of a kind of example (`review`, `claim`, `question`, `yes_no`, `irony`)."""
    path = files("dlk_utils.questions").joinpath(f"library/{name}.yaml")
    if not name.endswith("instructions"):
        return read_templates(path)
    table = pd.DataFrame(yaml.safe_load(path.read_text(encoding="utf-8"))).set_index(
        "name", drop=False
    )
    table["role_in_shots"] = table.get("role_in_shots", pd.Series(False, table.index)).eq(True)
    assert table.index.is_unique, f"{name}.yaml: names repeat"
    return table


def read_templates(path: Path | Any) -> pd.DataFrame:
    """Templates of a promptsource file: name, `text` (what the user says), `prefix` (how the answer begins), `choices` (index = label), `scoring`.

    A template is `question ||| answer`. Which choice is right for which label is read from the rendered answer, so a reversed
    template needs no flag. Raises `TemplateError` if the question mentions the label, or if the answer does not end in one of the two choices. The
    key `scoring: whole` (ours) scores choices by all their tokens instead of the first.
    """
    rows = [
        _template(t, getattr(path, "name", str(path)))
        for t in yaml.load(path.read_text(encoding="utf-8"), _Loader)["templates"].values()
    ]
    table = pd.DataFrame(rows).set_index("name", drop=False)
    if not table.index.is_unique:
        raise TemplateError(
            f"{path}: expected names that differ, {table.name[table.name.duplicated()].iloc[0]!r} comes twice"
        )
    return table


def render(text: str, fields: dict[str, Any]) -> str:
    """A jinja text with the given fields; one that is not given is an error."""
    return _compiled(text).render(**fields)


def _template(found: dict, file: str) -> dict:
    where = f"{file}, template {found.get('name')!r}"
    choices = [c.strip() for c in (found.get("answer_choices") or "").split("|||")]
    parts = found["jinja"].split("|||")
    if len(choices) != 2 or len(parts) != 2:
        raise TemplateError(
            f"{where}: expected two answer_choices and `question ||| answer`, got {len(choices)} and {len(parts)} parts"
        )
    question, answer = (p.strip() for p in parts)
    if "label" in jinja2.meta.find_undeclared_variables(_JINJA.parse(question)):
        raise TemplateError(
            f"{where}: expected a question that does not depend on the label, it mentions `label`"
        )
    if (
        unknown := jinja2.meta.find_undeclared_variables(
            _JINJA.parse(" ".join([question, *choices]))
        )
        - FIELDS
    ):
        raise TemplateError(
            f"{where}: expected a question made of {', '.join(sorted(FIELDS))}, it mentions {', '.join(sorted(unknown))} (a data set's own fields are named in its entry of hub_sets.yaml)"
        )
    marks = ["\x000", "\x001"]
    said = [render(answer, {"answer_choices": marks, "label": label}).strip() for label in (0, 1)]
    (before_0, _, which_0), (before_1, _, which_1) = (s.partition("\x00") for s in said)
    if before_0 != before_1 or {which_0, which_1} != {"0", "1"}:
        raise TemplateError(
            f"{where}: expected an answer that ends in answer_choices[...] of the label and is otherwise the same for both, got {[s.replace(chr(0), 'choice ') for s in said]}"
        )
    return dict(
        name=found["name"],
        text=question,
        prefix=before_0.strip(),
        choices=[choices[int(which_0)], choices[int(which_1)]],
        listed=choices,
        scoring=found.get("scoring", "first"),
    )


@functools.cache
def _compiled(text: str) -> jinja2.Template:
    return _JINJA.from_string(text)


class _Loader(yaml.SafeLoader):
    """YAML with promptsource's two tags read as plain mappings."""


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))
