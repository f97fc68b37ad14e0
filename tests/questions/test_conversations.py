"""Conversations of one's own: read from a file, and the tokens of the answers where they are."""

import json

import pytest
from tiny_models import TURNS, byte_tokenizer

from dlk_utils.errors import DataError, ModelError, TemplateError
from dlk_utils.models.loading import load_tokenizer, resolve
from dlk_utils.questions.conversations import checked_messages, read_chats, write_conversation
from dlk_utils.questions.turns import passages_of

SYSTEM = {"role": "system", "content": "Be true."}
CHAT = [
    SYSTEM,
    # The words of the answer stand in the question, and in the other answer.
    {"role": "user", "content": "assistant: is it yes?"},
    {"role": "assistant", "content": " yes "},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "é, yes\nand yes"},
]
THOUGHT = [
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "<think>\nI guess. It is.\n</think>\n\nIt is."},
]


def chatml(answer: str) -> str:
    """ChatML, in which `answer` writes the content of an assistant's turn."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        f"{{% if m.role == 'assistant' %}}{answer}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


SPLIT = (
    "{% set parts = m.content.split('</think>') %}"
    "<think>\n{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 }}\n</think>\n\n"
    "{{ parts[-1].strip() }}"
)
TEMPLATES = {
    "as it is": TURNS,
    "trimmed": chatml("{{ m.content | trim }}"),
    "no system turn": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    + TURNS,
    "own BOS": "{{ bos_token }}" + TURNS,
    "thoughts rewritten": chatml(SPLIT),
}
DROPS_THOUGHTS = chatml("{{ m.content.split('</think>')[-1] | trim }}")


def passages(text: str) -> list[tuple[str, bool]]:
    return [(text[start:end], is_thought) for start, end, is_thought in passages_of(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" It is. ", [("It is.", False)]),
        ("<think>Hm.</think> It is.", [("Hm.", True), ("It is.", False)]),
        (
            "Well <think>a</think>b<think>c",
            [("Well", False), ("a", True), ("b", False), ("c", True)],
        ),
        ("Hm.\n</think>\nIt is.", [("Hm.", True), ("It is.", False)]),
        ("<think>\n\n</think>\n\nIt is.", [("It is.", False)]),
        ("[THINK]Hm.[/THINK]It is.", [("Hm.", True), ("It is.", False)]),
    ],
)
def test_thoughts_are_told_from_what_is_said(text, expected):
    assert passages(text) == expected


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_tokens_of_a_turn_are_those_of_its_words_where_they_stand(template, bos):
    tokenizer = byte_tokenizer(bos=bos, chat_template=TEMPLATES[template])
    chat = write_conversation(tokenizer, CHAT)
    for turn in (2, 4):
        words = CHAT[turn]["content"].strip()
        tokens = [token for token in chat.tokens if token.turn == turn]
        assert "".join(token.text for token in tokens) == words
        positions = [token.position for token in tokens]
        assert positions == list(range(positions[0], positions[0] + len(words.encode())))
        assert tokenizer.decode([chat.input_ids[position] for position in positions]) == words
        # What stands before them is the conversation so far, as a prompt has it.
        before = tokenizer.decode(chat.input_ids[: positions[0]])
        assert before.rstrip(" ").endswith(("[assistant]", "assistant\n", "</think>\n\n"))
        assert before.count("is it yes?") == 1 and before.count("\nand yes") == 0
    assert chat.left_out == [] and not any(token.is_thought for token in chat.tokens)


@pytest.mark.parametrize("template", ["as it is", "trimmed", "thoughts rewritten"])
def test_thoughts_are_kept_apart(template):
    chat = write_conversation(byte_tokenizer(chat_template=TEMPLATES[template]), THOUGHT)
    texts = {
        is_thought: "".join(token.text for token in chat.tokens if token.is_thought == is_thought)
        for is_thought in (True, False)
    }
    assert texts == {True: "I guess. It is.", False: "It is."}
    assert chat.left_out == []


def test_a_thought_that_the_template_leaves_out_is_named_and_not_looked_for():
    chat = write_conversation(byte_tokenizer(chat_template=DROPS_THOUGHTS), THOUGHT)
    assert "".join(token.text for token in chat.tokens) == "It is."
    assert not any(token.is_thought for token in chat.tokens) and chat.left_out == [1]


def test_a_token_of_several_characters_may_hold_blanks_before_the_turn():
    tokenizer = load_tokenizer(resolve("smollm2"))
    tokenizer.chat_template = "{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
    chat = write_conversation(tokenizer, CHAT[3:])
    words = CHAT[4]["content"]
    assert "".join(token.text for token in chat.tokens) == words
    positions = [token.position for token in chat.tokens]
    assert len(positions) < len(words)
    assert tokenizer.decode(chat.input_ids[positions[0] : positions[-1] + 1]) == f" {words}"


@pytest.mark.parametrize(
    "template",
    [
        chatml("{{ m.content | upper }}"),
        chatml("{{ 'yes' if 'yes' in m.content else m.content }}"),
        # Other marks around the turn if it holds some word.
        chatml("{{ '(sure) ' if 'yes' in m.content }}{{ m.content }}"),
        TURNS.replace("{{ m['content'] }}", "{{ (m['content'] ~ '')[:12] }}"),
    ],
)
def test_a_template_that_changes_a_turn_is_refused(template):
    chat = [CHAT[1], {"role": "assistant", "content": "Oh yes, it is."}]
    with pytest.raises(TemplateError, match=r"message \d|leaves out or changes"):
        write_conversation(byte_tokenizer(chat_template=template), chat)


def test_a_turn_that_spells_the_end_of_a_turn_is_refused():
    for role in ("user", "assistant"):
        chat = [dict(message) for message in CHAT[1:3]]
        [message] = [message for message in chat if message["role"] == role]
        message["content"] = "yes</s>"
        with pytest.raises(DataError, match=f"expected a {role} turn without marks .* got '</s>'"):
            write_conversation(byte_tokenizer(), chat)


def test_a_tokenizer_that_does_not_say_where_tokens_stand_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    with pytest.raises(ModelError, match=r"expected a tokenizer that says where .* got a Slow"):
        write_conversation(tokenizer, CHAT)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (CHAT[:2], "expected a turn of the assistant, .* got 2 messages without one"),
        ([], "expected a turn of the assistant"),
        ("Hello", "expected a list of messages with role and content, got 'Hello'"),
        ({"role": "user"}, "expected a list of messages"),
        (["Hello"], "message 0: expected an object with role and content, got 'Hello'"),
        ([{"role": "tool", "content": "3"}], "message 0: expected the role user or assistant or"),
        ([CHAT[1], SYSTEM], "message 1: expected the role user or assistant, got 'system'"),
        ([{"role": "user", "content": " "}], "message 0: expected a text as its content, got ' '"),
        ([{"role": "user", "content": ["a"]}], "message 0: expected a text as its content"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair at character 1"),
        ([SYSTEM, CHAT[2]], "expected a user turn after the system turn"),
        ([CHAT[1], CHAT[2] | {"reasoning_content": "Hm."}], "got them under 'reasoning_content'"),
    ],
)
def test_what_is_no_conversation_is_refused_with_the_place(messages, reason):
    with pytest.raises(DataError, match=reason):
        checked_messages(messages)


def test_conversations_are_read_from_lines_with_lists_or_objects(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps(CHAT), "", json.dumps({"id": 3, "messages": THOUGHT}, ensure_ascii=False)]
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert read_chats(path) == [CHAT, THOUGHT]
    assert read_chats(str(path)) == [CHAT, THOUGHT]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "chats.jsonl: expected one conversation per line, got no line"),
        (b'[{"role": "user"', "line 1: expected a conversation in JSON, such as"),
        (b"[]\n", "line 1: expected a turn of the assistant"),
        (b'\n{"role": "user"}', "line 2: expected a list of messages"),
        (b'[{"role": "user", "content": "\xe9"}]', "expected UTF-8, got byte 0xe9"),
    ],
)
def test_a_file_of_anything_else_is_refused_with_its_line(content, reason, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_chats(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_chats(tmp_path / "chats.jsonl")
