"""Rendering: a chat template is a program of whoever made the model, and gets time and room."""

import subprocess

import pytest

from dlk_utils.errors import TemplateError
from dlk_utils.questions import rendering
from dlk_utils.questions.rendering import render_template

HELLO = [{"role": "user", "content": "Hello."}]
ECHO = "{{ messages[0].content }}"


@pytest.fixture
def little_time(monkeypatch):
    monkeypatch.setattr(rendering, "MOST_SECONDS", 0.3)


def test_a_template_writes_what_transformers_would_write():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "  {%- generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [{"role": "tool", "content": "no"}, {"role": "user", "content": "<ä> \ud800"}]
    variables = {"bos_token": "<s>"}
    assert render_template(template, messages, variables=variables) == '<s>"<ä> \ud800"[assistant]'
    closed = render_template(template, messages, variables=variables, add_generation_prompt=False)
    assert not closed.endswith("[assistant]")


def test_a_template_that_goes_on_for_ever_is_stopped_also_if_only_some_texts_do_that(little_time):
    template = ECHO + (
        "{% if messages[0].content | length > 9 %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    assert render_template(template, HELLO) == "Hello."
    with pytest.raises(TemplateError, match="no text within"):
        render_template(template, [{"role": "user", "content": "A longer text."}])


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 11 }}",
        "{{ 'a'.ljust(10 ** 11) }}",
        "{{ messages[0].content * 10 ** 6 }}",
        "{% set ns = namespace(x='aaaa') %}"
        "{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_a_template_that_would_fill_the_memory_is_stopped(template):
    with pytest.raises(TemplateError, match=r"MemoryError|characters \(at most|no text within"):
        render_template(template, HELLO)
    assert render_template(ECHO, HELLO) == "Hello."


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('not you') }}", "TemplateError: not you"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[7].content + 'x' }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ],
)
def test_whatever_a_template_raises_is_one_error_of_one_line(template, reason):
    with pytest.raises(TemplateError, match=reason) as error:
        render_template(template, HELLO)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300


def test_a_long_text_may_be_rendered():
    text = "word " * 60_000
    assert render_template(ECHO, [{"role": "user", "content": text}]) == text


@pytest.mark.slow
def test_a_process_that_has_ended_is_started_again():
    render_template(ECHO, HELLO)
    rendering._renderer.process.kill()
    rendering._renderer.process.wait()
    assert render_template(ECHO, HELLO) == "Hello."


@pytest.mark.slow
def test_an_interrupt_leaves_no_reply_for_the_next_request(monkeypatch):
    render_template(ECHO, HELLO)
    process = rendering._renderer.process

    class Interrupted:
        def write(self, text):
            process.stdin_of_old.write(text)
            raise KeyboardInterrupt

    process.stdin_of_old, process.stdin = process.stdin, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        render_template(ECHO, [{"role": "user", "content": "interrupted"}])
    process.stdin = process.stdin_of_old
    assert render_template(ECHO, HELLO) == "Hello."


def test_a_python_that_cannot_render_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(rendering, "_renderer", None)
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: real([*command[:1], "-c", ""], **options)
    )
    with pytest.raises(TemplateError, match="expected a process that renders"):
        render_template(ECHO, HELLO)
