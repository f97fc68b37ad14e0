"""Turns: the answer is read where it begins, whatever the chat template does before it.

The templates are those of public models, cut down to what decides it.
"""

import pytest
from tiny_models import TURNS, byte_tokenizer

from dlk_utils.errors import TemplateError
from dlk_utils.questions.chat import render_chat, tokenize
from dlk_utils.questions.prompts import own_prompts
from dlk_utils.questions.turns import turn_format

SYSTEM, *QUESTION = CONVERSATION = [
    {"role": "system", "content": "Be true."},
    {"role": "user", "content": "Is it?"},
]
SHOT = [
    *CONVERSATION,
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "And now?"},
]


def chatml(generation_prompt: str, *, before_answer: str = "") -> str:
    """ChatML, with something before each answer that was given."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        f"{{% if m.role == 'assistant' %}}{before_answer}{{% endif %}}"
        "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{generation_prompt}{{% endif %}}"
    )


START = "<|im_start|>assistant\n"
QWEN3 = START + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
MAGISTRAL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% else %}"
    "[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}[THINK]{# [/THINK] #}"
)
COMMAND_A = chatml(
    START + "<|START_THINKING|>{% if not reasoning %}<|END_THINKING|>{% endif %}",
    before_answer="<|START_RESPONSE|>",
)
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

BEGINNINGS = {
    "ChatML": (chatml(START), START),
    # Reasoning models: the thought is closed, by their own switch where there is one.
    "Qwen3": (chatml(QWEN3), START + EMPTY_THOUGHT),
    "QwQ": (chatml(START + "<think>\n"), START + EMPTY_THOUGHT),
    "OLMo 3": (chatml(START + "<think>"), START + EMPTY_THOUGHT),
    "DeepSeek V3.1": (
        chatml(START + "{% if not thinking %}</think>{% endif %}"),
        START + "</think>",
    ),
    "Magistral": (MAGISTRAL, "[/INST][THINK][/THINK]"),
    "Command A": (COMMAND_A, START + "<|START_THINKING|><|END_THINKING|><|START_RESPONSE|>"),
    "Kimi K2": (chatml(START, before_answer="<think></think>"), START + "<think></think>"),
    # The model itself would begin with a mark that tells its answer from its thought.
    "gpt-oss": (
        chatml("<|im_start|>assistant", before_answer="<|channel|>final<|message|>"),
        START + "<|channel|>final<|message|>",
    ),
    # Without a prompt for the answer, it begins as an answer that was given.
    "no generation prompt": (chatml(""), START),
    "Vicuna without one": (
        "{% for m in messages %}{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] or '' }}"
        "{{ m.content }}\n{% endfor %}",
        "ASSISTANT: ",
    ),
    "Llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        "[/INST]",
    ),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_prompt_ends_where_the_answer_begins(name):
    template, beginning = BEGINNINGS[name]
    tokenizer = byte_tokenizer(chat_template=template)
    for messages in (CONVERSATION, SHOT):
        prompt = render_chat(tokenizer, messages)
        _, question, after = prompt.rpartition(messages[-1]["content"])
        assert question and after.endswith(beginning)
        # Nothing but the end of the user's turn stands before it.
        assert after.removesuffix(beginning).strip() in ("", "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (chatml(START + "<think>\nOkay, I need to"), "begins a thought that is not empty"),
        (chatml(START + "<reasoning>"), r"has no end \(</reasoning>\)"),
        (chatml(START + "Here are my steps:\n"), "generation prompt is what it writes"),
        (chatml("<|im_start|>user\n"), "generation prompt is what it writes"),
    ],
)
def test_a_prompt_after_which_no_answer_begins_is_refused(template, reason):
    with pytest.raises(TemplateError, match=reason) as error:
        own_prompts(["It rains."], {"honest": "Be true."}, byte_tokenizer(chat_template=template))
    assert len(str(error.value).splitlines()) == 1 and "tokenizer.chat_template" in str(error.value)


def test_a_thought_that_an_instruction_switches_on_is_closed_too():
    switch = (
        START + "{% if 'think hard' in messages[0].content %}<think>\n{% else %}"
        "<think>\n\n</think>\n\n{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=chatml(switch))
    for instruction in ("Be true.", "You think hard."):
        [ids] = tokenize(tokenizer, ["Is it?"], chat=True, system=instruction)
        assert tokenizer.decode(ids).endswith(f"Is it?<|im_end|>\n{START}{EMPTY_THOUGHT}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("hello", "leaves out"),
        ("", "expected a tokenizer with a chat template"),
        ("{# nothing #}", "leaves out"),
        ("{{ messages[0].content }}[assistant]", "leaves out"),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
            "leaves out",
        ),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "their order"),
        (TURNS.replace("m['content'] }}", "m['content'] | upper }}"), "leaves out"),
        (
            TURNS.replace("m['content'] }}", "m['content'] | e }}"),
            "got one that leaves out or changes the user",
        ),
        (
            TURNS.replace("m['content'] }}", "m['content'][:40] }}"),
            "got one that leaves out or changes the user",
        ),
        ("{{ raise_exception('no chat') }}", "no chat"),
        (TURNS + "{% if", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_leaves_something_out_or_changes_it_is_refused(template, reason):
    with pytest.raises(TemplateError, match=reason):
        own_prompts(
            ["5 < 6, and it rains in the old town."],
            {"honest": "Be true."},
            byte_tokenizer(chat_template=template),
        )


def test_several_templates_without_a_default_are_refused():
    tokenizer = byte_tokenizer(chat_template={"rag": TURNS, "tool_use": TURNS})
    with pytest.raises(TemplateError, match="rag"):
        render_chat(tokenizer, CONVERSATION)


REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}" + TURNS
DROPS_SYSTEM = TURNS.replace("for m in messages", "for m in messages if m['role'] != 'system'")


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_a_system_turn_that_is_refused_or_dropped_heads_the_question(template):
    tokenizer = byte_tokenizer(chat_template=template)
    assert render_chat(tokenizer, CONVERSATION) == "[user]Be true.\n\nIs it?[end][assistant]"
    # Also where its text happens to be part of the question.
    messages = [{"role": "system", "content": "Is"}, *QUESTION]
    assert render_chat(tokenizer, messages) == "[user]Is\n\nIs it?[end][assistant]"


def test_a_system_turn_may_come_late():
    late = (
        "{% for m in messages[1:] if messages[0].role == 'system' %}[{{ m.role }}]"
        "{% if loop.last %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}{% endfor %}"
        "{% for m in messages if messages[0].role != 'system' %}[{{ m.role }}]{{ m.content }}"
        "{% endfor %}[assistant]"
    )
    tokenizer = byte_tokenizer(chat_template=late)
    expected = "[user]Is it?[assistant]It is.[user]Be true.\n\nAnd now?[assistant]"
    assert render_chat(tokenizer, SHOT) == expected


def test_a_multimodal_template_gets_texts_in_parts():
    parts = TURNS.replace(
        "{{ m['content'] }}",
        "{% for p in m['content'] if p.type == 'text' %}{{ p.text }}{% endfor %}",
    )
    tokenizer = byte_tokenizer(chat_template=parts)
    assert render_chat(tokenizer, SHOT) == render_chat(byte_tokenizer(), SHOT)


@pytest.mark.parametrize("question", ["a", "user", "assistant", "[end]", " blank ", "x\n"])
def test_a_question_that_looks_like_the_marks_is_found_where_it_is(question):
    messages = [SYSTEM, {"role": "user", "content": question}]
    expected = f"[system]Be true.[end][user]{question}[end][assistant]"
    assert render_chat(byte_tokenizer(), messages) == expected


def test_another_chat_template_is_looked_at_anew():
    tokenizer = byte_tokenizer()
    assert turn_format(tokenizer).has_system
    tokenizer.chat_template = DROPS_SYSTEM
    assert not turn_format(tokenizer).has_system
