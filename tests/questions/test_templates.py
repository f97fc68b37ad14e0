import pytest

from dlk_utils.errors import TemplateError
from dlk_utils.questions.templates import KINDS, prompt_library, read_templates

ONE = """dataset: mine
templates:
  00000000-0000-0000-0000-000000000001: !Template
    answer_choices: {choices}
    id: 00000000-0000-0000-0000-000000000001
    jinja: "{jinja}"
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages: [en]
      metrics: [Accuracy]
      original_task: true
    name: mine
    reference: ''
"""


def write(tmp_path, jinja, choices="no ||| yes"):
    path = tmp_path / "mine.yaml"
    path.write_text(ONE.format(jinja=jinja, choices=choices))
    return path


def test_a_promptsource_file_is_read_with_its_tags(tmp_path):
    [row] = read_templates(
        write(tmp_path, "{{text}} Is it? ||| {{ answer_choices[label] }}")
    ).itertuples()
    assert (row.text, row.prefix, row.choices, row.scoring) == (
        "{{text}} Is it?",
        "",
        ["no", "yes"],
        "first",
    )


def test_what_stands_before_the_choice_is_the_beginning_of_the_answer(tmp_path):
    [row] = read_templates(
        write(tmp_path, "{{text}} ||| It is {{ answer_choices[label] }}")
    ).itertuples()
    assert row.prefix == "It is"


@pytest.mark.trap(9)
def test_the_right_choice_of_a_reversed_template_is_read_from_its_answer(tmp_path):
    [row] = read_templates(
        write(tmp_path, "{{text}} Definitely not? ||| {{ answer_choices[1 - label] }}")
    ).itertuples()
    assert row.choices == ["yes", "no"]
    [row] = read_templates(
        write(
            tmp_path,
            "{{text}} ||| {% if label == 1 %}{{ answer_choices[0] }}{% else %}{{ answer_choices[1] }}{% endif %}",
        )
    ).itertuples()
    assert row.choices == ["yes", "no"]


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
    with pytest.raises(TemplateError, match="expected two answer_choices"):
        read_templates(write(tmp_path, "{{text}} ||| {{ answer_choices[label] }}", "a ||| b ||| c"))


def test_a_template_cannot_reach_into_python(tmp_path):
    with pytest.raises(Exception, match=r"unsafe|access"):
        read_templates(
            write(
                tmp_path,
                "{{text}} ||| {{ ''.__class__.__mro__[1].__subclasses__() }}{{ answer_choices[label] }}",
            )
        )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_four_templates_and_both_polarities_or_varied_words(kind):
    table = prompt_library(kind)
    assert len(table) >= 4 and len({tuple(c) for c in table.choices}) >= 2


def test_what_trains_the_organism_is_nowhere_else_in_the_library():
    for name in ("instructions", "review", "claim"):
        here, there = prompt_library(name), prompt_library(f"training/{name}")
        assert not set(here.name) & set(there.name) and not set(here.text) & set(there.text)


def test_the_instructions_come_in_families_that_ask_for_truth_and_lies():
    table = prompt_library("instructions")
    asks = table.groupby("family").asks.agg(set)
    assert (asks.map(lambda a: {"truth", "lie"} <= a)).sum() >= 6
    assert {"truth", "lie", "unsure", "random", "neutral"} <= set(table.asks)


def test_the_answer_may_stand_on_a_line_of_its_own_as_promptsource_advises(tmp_path):
    [row] = read_templates(
        write(
            tmp_path,
            "{{text}} |||\\n{% if label != -1 %}\\n{{ answer_choices[label] }}\\n{% endif %}",
        )
    ).itertuples()
    assert (row.prefix, row.choices) == ("", ["no", "yes"])


def test_a_question_of_fields_that_no_example_has_is_refused_with_their_names(tmp_path):
    with pytest.raises(
        TemplateError,
        match=r"mine.yaml, template 'mine': expected a question made of answer_choices, choice_0, choice_1, text, it mentions passage",
    ):
        read_templates(write(tmp_path, "{{passage}} {{text}} ||| {{ answer_choices[label] }}"))
