"""Templates: promptsource's format, read so that no question depends on the label."""

import re
from pathlib import Path

import pandas as pd
import pytest

from dlk_utils.errors import TemplateError
from dlk_utils.questions.templates import KINDS, prompt_library, read_templates

TEMPLATE = """
  00000000-0000-0000-0000-00000000000{number}: !Template
    answer_choices: {choices}
    id: 00000000-0000-0000-0000-00000000000{number}
    jinja: "{jinja}"
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages: [en]
      metrics: [Accuracy]
      original_task: true
    name: mine
    reference: ''
"""


def write(folder: Path, *templates: str, choices: str = "no ||| yes") -> Path:
    """A promptsource file of templates that all have one name."""
    path = folder / "mine.yaml"
    entries = [
        TEMPLATE.format(number=i, jinja=jinja, choices=choices) for i, jinja in enumerate(templates)
    ]
    path.write_text("dataset: mine\ntemplates:" + "".join(entries))
    return path


def read_one(folder: Path, jinja: str) -> pd.Series:
    [(_, row)] = read_templates(write(folder, jinja)).iterrows()
    return row


def test_a_promptsource_file_is_read_with_its_tags(tmp_path):
    template = read_one(tmp_path, "{{text}} Is it? ||| {{ answer_choices[label] }}")
    assert template.text == "{{text}} Is it?" and template.prefix == ""
    assert template.choices == ["no", "yes"] and template.scoring == "first"


def test_what_stands_before_the_choice_is_the_beginning_of_the_answer(tmp_path):
    assert read_one(tmp_path, "{{text}} ||| It is {{ answer_choices[label] }}").prefix == "It is"


def test_the_answer_may_stand_on_a_line_of_its_own_as_promptsource_advises(tmp_path):
    jinja = "{{text}} |||\\n{% if label != -1 %}\\n{{ answer_choices[label] }}\\n{% endif %}"
    template = read_one(tmp_path, jinja)
    assert (template.prefix, template.choices) == ("", ["no", "yes"])


@pytest.mark.trap(9)
@pytest.mark.parametrize(
    "answer",
    [
        "{{ answer_choices[1 - label] }}",
        "{% if label == 1 %}{{ answer_choices[0] }}{% else %}{{ answer_choices[1] }}{% endif %}",
    ],
)
def test_the_right_choice_of_a_reversed_template_is_read_from_its_answer(tmp_path, answer):
    template = read_one(tmp_path, "{{text}} Definitely not? ||| " + answer)
    assert template.choices == ["yes", "no"] and template.listed == ["no", "yes"]


@pytest.mark.trap(10)
@pytest.mark.parametrize(
    "question",
    [
        "{{text}} {{ answer_choices[label] }} or not?",
        "{% if label %}{{text}}{% else %}{{text}} {% endif %}",
        "{{ answer_choices[label] }} ||| {{ answer_choices[1 - label] }}: {{text}}",
    ],
)
def test_a_template_whose_question_depends_on_the_label_is_refused_by_name(tmp_path, question):
    with pytest.raises(TemplateError, match=r"mine.yaml, template 'mine': expected"):
        read_templates(write(tmp_path, question + " ||| {{ answer_choices[label] }}"))


@pytest.mark.parametrize(
    "answer",
    ["yes", "{{ answer_choices[0] }}", "{% if label %}Yes, {% endif %}{{ answer_choices[label] }}"],
)
def test_an_answer_that_does_not_end_in_a_choice_is_refused(tmp_path, answer):
    with pytest.raises(TemplateError, match="expected an answer that ends in"):
        read_templates(write(tmp_path, "{{text}} ||| " + answer))


def test_a_template_of_three_choices_is_refused(tmp_path):
    path = write(tmp_path, "{{text}} ||| {{ answer_choices[label] }}", choices="a ||| b ||| c")
    with pytest.raises(TemplateError, match="expected two answer_choices"):
        read_templates(path)


def test_a_question_of_fields_that_no_example_has_is_refused_with_their_names(tmp_path):
    message = (
        "mine.yaml, template 'mine': expected a question made of answer_choices, choice_0, "
        "choice_1, text, got one with passage"
    )
    with pytest.raises(TemplateError, match=re.escape(message)):
        read_templates(write(tmp_path, "{{passage}} {{text}} ||| {{ answer_choices[label] }}"))


def test_two_templates_of_one_name_are_refused(tmp_path):
    jinja = "{{text}} ||| {{ answer_choices[label] }}"
    with pytest.raises(TemplateError, match="got 'mine' twice"):
        read_templates(write(tmp_path, jinja, jinja))


def test_a_template_cannot_reach_into_python(tmp_path):
    jinja = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ answer_choices[label] }}"
    with pytest.raises(Exception, match=r"unsafe|access"):
        read_templates(write(tmp_path, "{{text}} ||| " + jinja))


# The library.


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_four_templates_of_varied_choices(kind):
    templates = prompt_library(kind)
    assert len(templates) >= 4
    assert templates.choices.map(tuple).nunique() >= 2


@pytest.mark.parametrize("kind", ["review", "claim", "question"])
def test_saying_yes_is_right_for_either_label(kind):
    affirmative = {"yes", "positive", "up", "true", "correct", "right", "a"}
    labels = {
        label
        for choices in prompt_library(kind).choices
        for label, choice in enumerate(choices)
        if choice.lower() in affirmative
    }
    assert labels == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_of_the_library_shows_the_text_and_neither_label_nor_split_nor_id(kind):
    for template in prompt_library(kind).itertuples():
        parts = " ".join([template.text, template.prefix, *template.choices])
        fields = set(re.findall(r"{{\s*(\w+)\s*}}", parts))
        assert {"text"} <= fields <= {"text", "choice_0", "choice_1"}
        assert "{%" not in template.text


def test_the_instructions_come_in_families_that_ask_for_truth_and_lies():
    instructions = prompt_library("instructions")
    counts = instructions.asks.value_counts()
    assert set(counts.index) == {"truth", "lie", "unsure", "random", "neutral"}
    assert counts["truth"] >= 4 and counts["lie"] >= 6
    asks_of_family = instructions.groupby("family").asks.agg(set)
    assert sum({"truth", "lie"} <= asks for asks in asks_of_family) >= 6
    assert instructions.text[~instructions.role_in_shots].is_unique


@pytest.mark.parametrize("name", ["instructions", "review", "claim"])
def test_what_trains_organisms_is_nowhere_else_in_the_library(name):
    asked, training = prompt_library(name), prompt_library(f"training/{name}")
    assert not set(asked.name) & set(training.name)
    assert not set(asked.text) & set(training.text)
