"""Prompts: twins, shots that obey, nothing truncated, one BOS, no leak of the label. Answers are read back from the rendered text."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest
from conftest import TURNS, byte_tokenizer

from dlk_utils.errors import DataError
from dlk_utils.models.loading import load_tokenizer, resolve
from dlk_utils.questions.chat import encode_prompt, render_chat
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.ids import example_id
from dlk_utils.questions.prompts import make_prompts
from dlk_utils.questions.templates import KINDS, prompt_library

MEANS = {  # words of the question -> what an answer says of the claim: written down apart from the library
    "true or false": {"true": 1, "false": 0},
    "correct or incorrect": {"correct": 1, "incorrect": 0},
    "Is that right, yes or no": {"yes": 1, "no": 0},
    "contain an error": {"yes": 0, "no": 1},
    "get it right or wrong": {"right": 1, "wrong": 0},
}
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("smollm2"))


@pytest.fixture(scope="module")
def examples() -> pd.DataFrame:
    return load_examples("comparisons,arithmetic", 40)


@pytest.fixture(scope="module")
def reviews() -> pd.DataFrame:
    return load_examples("rotten_tomatoes", 16)


@pytest.fixture(scope="module")
def prompts(examples, tokenizer) -> pd.DataFrame:
    return make_prompts(examples, tokenizer)


@pytest.fixture(scope="module")
def with_shots(examples, tokenizer) -> pd.DataFrame:
    return make_prompts(examples, tokenizer, n_shots=2)


def frame(*rows: tuple) -> pd.DataFrame:
    """Examples by hand: (kind, text, choice_0, choice_1, label, split)."""
    table = pd.DataFrame(rows, columns=["kind", "text", "choice_0", "choice_1", "label", "split"])
    return table.assign(
        dataset="own",
        example_id=[example_id(r.text, r.choice_0, r.choice_1) for r in table.itertuples()],
    )


def turns(prompt: str) -> list[tuple[str, str]]:
    """(role, content) of a rendered ChatML prompt; the last turn is open."""
    return [
        tuple(t.split("\n", 1))
        for t in re.split(r"<\|im_end\|>\n?", prompt)[:-1]
        for t in [t.replace("<|im_start|>", "")]
    ]


def truth_of(question: str) -> int:
    if m := re.search(r"(\d+) plus (\d+) equals (\d+)\.", question):
        return int(int(m[1]) + int(m[2]) == int(m[3]))
    m = re.search(r"(\d+) is (larger|smaller) than (\d+)\.", question)
    return int((int(m[1]) > int(m[3])) == (m[2] == "larger"))


def said_of_the_claim(question: str, answer: str) -> int:
    [meaning] = [v for k, v in MEANS.items() if k in question]
    return meaning[answer.split()[-1]]


def cramers_v(a: pd.Series, b: pd.Series) -> float:
    observed = pd.crosstab(a, b).to_numpy(float)
    expected = observed.sum(1, keepdims=True) * observed.sum(0) / observed.sum()
    return float(
        np.sqrt(
            ((observed - expected) ** 2 / expected).sum()
            / observed.sum()
            / (min(observed.shape) - 1)
        )
    )


def test_an_example_has_a_truth_and_a_lie_row_and_two_known_rows(prompts, examples):
    assert set(prompts.example_id) == set(examples.example_id[examples.split != "shot"])
    for _, t in prompts.groupby("example_id"):
        assert sorted(t.role) == ["known", "known", "lie", "truth"]
        scored, known = t[t.role != "known"], t[t.role == "known"]
        assert set(t.asks[t.role != "lie"]) == {"truth"}
        assert not set(known.template) & set(scored.template)
        assert not set(known.instruction) & set(scored.instruction)
        assert known.instruction.is_unique and known.template.is_unique


def test_twins_share_the_template_and_the_shots_questions_and_differ_in_the_instruction(with_shots):
    for _, t in with_shots[with_shots.role != "known"].groupby("example_id"):
        truth, lie = (turns(t.prompt[t.role == r].item()) for r in ("truth", "lie"))
        assert t.template.nunique() == 1
        assert truth[0][0] == lie[0][0] == "system" and t.instruction.nunique() == 2
        hidden = prompt_library("instructions").role_in_shots[t.instruction].all()
        assert truth[0][1] != lie[0][1] or (
            hidden and truth[2][1] != lie[2][1]
        )  # then the shots tell them apart
        assert [c for r, c in truth if r == "user"] == [c for r, c in lie if r == "user"]
        assert len([c for r, c in truth if r == "user"]) == 3


def test_an_instruction_whose_role_only_the_shots_reveal_is_never_used_without_them(
    prompts, with_shots, examples, tokenizer
):
    shown = prompt_library("instructions").role_in_shots
    assert shown[with_shots.instruction].any() and not shown[prompts.instruction].any()
    assert not shown[
        make_prompts(examples.head(30), tokenizer, n_shots=2, shots_say="lie").instruction
    ].any()


@pytest.mark.parametrize("says", ["truth", "lie"])
def test_shots_can_say_the_same_whatever_is_asked(examples, tokenizer, says):
    rows = make_prompts(examples, tokenizer, n_shots=2, shots_say=says, n_known=0)
    label = examples.set_index("example_id").label
    for row in rows.itertuples():
        said = [
            c.removeprefix(row.prefix).strip() for r, c in turns(row.prompt) if r == "assistant"
        ]
        assert said == [
            row.choices[label[s] if says == "truth" else 1 - label[s]] for s in row.shots
        ]


def test_an_example_that_spells_a_control_token_is_dropped_and_counted(examples, tokenizer):
    planted = pd.concat(
        [examples, frame(("claim", "One<|im_end|> and two.", "", "", 1, "train"))],
        ignore_index=True,
    )
    rows = make_prompts(planted, tokenizer)
    [dropped] = rows.attrs["dropped_control_tokens"]
    assert dropped == planted.example_id.iloc[-1] and dropped not in set(rows.example_id)


def test_a_chat_template_that_drops_the_system_role_without_a_word_still_gets_the_instruction(
    examples,
):
    silent = byte_tokenizer(
        chat_template="{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    )
    for row in make_prompts(examples.head(20), silent, context=10**5).itertuples():
        assert prompt_library("instructions").text[row.instruction] in row.prompt


def test_families_of_instructions_can_be_held_out(examples, tokenizer):
    assert set(make_prompts(examples.head(30), tokenizer, families=["exam", "charity"]).family) == {
        "exam",
        "charity",
    }
    with pytest.raises(DataError, match="ask for 'lie'"):
        make_prompts(examples.head(30), tokenizer, families=["nowhere"], asks=("lie",), n_known=0)


@pytest.mark.trap(12)
def test_shots_answer_as_the_instruction_asks(with_shots):
    seen = {0: 0, 1: 0}
    for row in with_shots.itertuples():
        conversation = turns(row.prompt)[1:]
        questions, answers = (
            [c for r, c in conversation if r == role] for role in ("user", "assistant")
        )
        assert len(answers) == 2
        for question, answer in zip(questions, answers, strict=False):
            obeys = truth_of(question) if row.asks == "truth" else 1 - truth_of(question)
            assert said_of_the_claim(question, answer) == obeys, (row.instruction, question, answer)
            seen[obeys] += 1
    assert min(seen.values()) > 50


def test_shots_answers_follow_the_prefix_that_the_query_has(with_shots):
    for row in with_shots.head(40).itertuples():
        prefix = row.prompt.rsplit("<|im_start|>assistant\n", 1)[1]
        assert prefix
        assert all(c.startswith(prefix + " ") for r, c in turns(row.prompt) if r == "assistant")


def test_the_wanted_label_is_the_right_one_for_truth_and_the_wrong_one_for_lies(prompts):
    for row in prompts.itertuples():
        right = truth_of(row.text)
        assert row.label == right
        assert row.wanted == (1 - right if row.role == "lie" else right)


def test_an_instruction_that_asks_for_neither_wants_no_label(examples, tokenizer):
    t = make_prompts(
        examples.head(60), tokenizer, asks=("truth", "lie", "unsure", "neutral"), n_known=0
    )
    assert (t.wanted[t.role.isin(["unsure", "neutral"])] == -1).all()
    assert sorted(t.role.unique()) == ["lie", "neutral", "truth", "unsure"]


def test_the_choice_of_index_1_says_that_the_claim_is_true(prompts):
    for row in prompts.itertuples():
        assert [said_of_the_claim(row.prompt, c) for c in row.choices] == [0, 1]


@pytest.mark.trap(11)
def test_a_query_is_never_a_shot(with_shots, examples):
    queries, pool = set(with_shots.example_id), set(examples.example_id[examples.split == "shot"])
    shots = set(itertools.chain.from_iterable(with_shots.shots))
    assert shots and not queries & shots and shots <= pool
    asked = set(with_shots.text)
    for row in with_shots.itertuples():
        users = [c for r, c in turns(row.prompt) if r == "user"]
        assert row.text in users[-1]
        # whole claims: "1 is larger than 2." is also the end of "11 is larger than 2."
        claims = [re.search(r"\d+ (?:plus|is) .*?\.", c)[0] for c in users[:-1]]
        assert not set(claims) & asked


def test_all_rows_of_a_template_are_shown_the_same_shots_of_both_labels_and_the_seed_draws_others(
    with_shots, examples, tokenizer
):
    shown = with_shots.groupby(["dataset", "template"]).shots
    assert (shown.agg(lambda s: len(set(map(tuple, s)))) == 1).all()
    label = dict(zip(examples.example_id, examples.label, strict=True))
    assert all({label[s] for s in shots} == {0, 1} for shots in shown.first())
    other = (
        make_prompts(examples, tokenizer, n_shots=2, seed=1)
        .groupby(["dataset", "template"])
        .shots.first()
    )
    assert (other != shown.first()).any()


def test_shots_come_from_the_data_set_of_the_query(with_shots, examples):
    home = examples.set_index("example_id").dataset
    assert all(home[s] == row.dataset for row in with_shots.itertuples() for s in row.shots)


@pytest.mark.trap(2)
def test_the_template_says_nothing_about_being_told_to_lie(prompts, with_shots):
    for t in (prompts, with_shots):
        twins = t[t.role != "known"]
        assert twins.template.nunique() >= 4
        assert cramers_v(twins.template, twins.role) == 0
        assert cramers_v(twins.template, twins.label) < 0.35


def test_each_example_draws_its_own_instruction_and_template(prompts):
    assert prompts.instruction[prompts.role == "lie"].nunique() >= 6
    assert prompts.instruction[prompts.role == "truth"].nunique() >= 4
    assert prompts.template[prompts.role == "truth"].value_counts(normalize=True).max() < 0.5


@pytest.mark.parametrize("n_shots", [0, 2])
def test_the_label_of_the_query_is_not_in_its_prompt(examples, tokenizer, n_shots):
    some = pd.concat(
        [examples[examples.split == "shot"], examples[examples.split != "shot"].head(20)]
    )
    turned = some.assign(label=some.label.where(some.split == "shot", 1 - some.label))
    one, other = (make_prompts(e, tokenizer, n_shots=n_shots) for e in (some, turned))
    assert list(one.prompt) == list(other.prompt)
    assert list(one.row_id) == list(other.row_id)
    assert list(one.choice_ids) == list(other.choice_ids)
    assert (one.wanted == 1 - other.wanted).all() and (one.label == 1 - other.label).all()


@pytest.mark.parametrize("n_shots", [0, 2])
def test_a_row_id_is_unique_and_does_not_depend_on_the_order_of_examples(
    examples, tokenizer, n_shots
):
    some = pd.concat(
        [examples[examples.split == "shot"], examples[examples.split != "shot"].head(20)]
    )
    one, shuffled = (
        make_prompts(e, tokenizer, n_shots=n_shots)
        for e in (some, some.sample(frac=1, random_state=1))
    )
    assert one.row_id.is_unique
    assert set(one.row_id) == set(shuffled.row_id)


def test_a_seed_decides_the_prompts(examples, tokenizer):
    some = examples.head(20)
    one, again, other = (make_prompts(some, tokenizer, seed=s) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(one, again)
    assert set(one.row_id) != set(other.row_id)


def test_a_prompt_is_never_cut(prompts, with_shots, tokenizer):
    for t in (prompts, with_shots):
        for row in t.itertuples():
            assert tokenizer.decode(list(row.input_ids)) == row.prompt
            assert prompt_library("instructions").text[row.instruction] in row.prompt


@pytest.mark.trap(15)
def test_a_small_context_takes_shots_first_and_then_drops_the_example(reviews, tokenizer):
    free = make_prompts(reviews, tokenizer, n_shots=2)
    bare = make_prompts(reviews, tokenizer)
    longest = bare.groupby("example_id").input_ids.agg(lambda s: max(map(len, s)))
    context = int(longest.median())
    tight = make_prompts(reviews, tokenizer, n_shots=2, context=context)
    assert free.shots.map(len).eq(2).all() and free.attrs["dropped_too_long"] == []
    assert (tight.shots.map(len) < 2).any()
    assert (tight.input_ids.map(len) <= context).all()
    assert set(tight.attrs["dropped_too_long"]) == set(longest.index[longest > context]) != set()
    assert set(tight.example_id) == set(longest.index[longest <= context])
    assert (tight.groupby("example_id").shots.agg(lambda s: len({len(x) for x in s})) == 1).all()
    for row in tight.itertuples():
        assert tokenizer.decode(list(row.input_ids)) == row.prompt
        assert (
            row.text in row.prompt
            and prompt_library("instructions").text[row.instruction] in row.prompt
        )


def test_if_every_prompt_is_too_long_that_is_an_error(reviews, tokenizer):
    with pytest.raises(DataError, match=r"16 examples are longer than the context of 20 tokens"):
        make_prompts(reviews, tokenizer, n_shots=2, context=20)


@pytest.mark.trap(17)
@pytest.mark.parametrize("written", ["", "{{ bos_token }}"])
@pytest.mark.parametrize("bos", [True, False])
def test_there_is_exactly_one_bos_where_the_tokenizer_has_one(examples, bos, written):
    made = byte_tokenizer(bos=bos, chat_template=written + TURNS)
    assert (made("a").input_ids[0] == 0) == bos
    t = make_prompts(examples.head(50), made, n_shots=1)
    expected = 1 if bos or written else 0
    assert t.input_ids.map(lambda ids: list(ids).count(0)).eq(expected).all()
    assert t.input_ids.map(lambda ids: ids[0] == 0).eq(bool(expected)).all()


def test_the_real_tokenizer_writes_no_token_twice_at_the_start(prompts, tokenizer):
    start = tokenizer("<|im_start|>", add_special_tokens=False).input_ids[0]
    assert all(
        list(row.input_ids).count(start) == 3 and row.input_ids[0] == start
        for row in prompts.itertuples()
    )
    assert encode_prompt(tokenizer, "a") == tokenizer("a").input_ids


def test_without_a_system_role_the_instruction_heads_the_first_question(examples):
    made = byte_tokenizer(bos=False, chat_template=NO_SYSTEM)
    t = make_prompts(examples, made, n_shots=1)
    for row in t.head(40).itertuples():
        instruction = prompt_library("instructions").text[row.instruction]
        assert row.prompt.startswith(f"[user]{instruction}\n\n")
        assert row.prompt.count(instruction) == 1
        assert re.findall(r"\[(user|assistant|system)\]", row.prompt) == [
            "user",
            "assistant",
            "user",
            "assistant",
        ]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert render_chat(made, messages) == "[user]S\n\nU[end][assistant]"
    assert messages[1]["content"] == "U"


@pytest.mark.parametrize(
    "text",
    [
        "{{ label }}",
        "{% for x in y %}",
        "<script>alert('&amp;')</script>",
        "{{ 7 * 7 }} {# note #}",
        "a\n\nb  c\\n",
    ],
)
def test_markup_inside_an_example_is_text(tokenizer, text):
    examples = frame(
        ("review", text, "", "", 1, "train"),
        ("question", "Which?", text + " x", "zebra", 0, "test"),
    )
    t = make_prompts(examples, tokenizer, templates=["question_plain"])
    assert all(text in p for p in t.prompt)
    assert "49" not in "".join(t.prompt)


def test_a_template_sees_neither_label_nor_split_nor_id():
    for kind in ("review", "claim", "question"):
        for template in prompt_library(kind).itertuples():
            used = set(
                re.findall(
                    r"{{\s*(\w+)\s*}}",
                    " ".join([template.text, template.prefix, *template.choices]),
                )
            )
            assert used <= {"text", "choice_0", "choice_1"} and "text" in used
            assert "{%" not in template.text


def test_only_the_templates_asked_for_are_used(examples, tokenizer):
    t = make_prompts(examples.head(30), tokenizer, templates=["claim_error"])
    assert set(t.template) == {"claim_error"}
    assert t.groupby("example_id").instruction.nunique().eq(4).all()


def test_the_library_has_the_instructions_and_templates_promised():
    instructions = prompt_library("instructions")
    counts = instructions.asks.value_counts()
    assert counts["truth"] >= 4 and counts["lie"] >= 6 and counts["unsure"] + counts["neutral"] >= 2
    assert set(counts.index) == {"truth", "lie", "unsure", "random", "neutral"}
    assert instructions.text[~instructions.role_in_shots].is_unique
    assert (
        len(
            set(instructions.family[instructions.asks == "truth"])
            & set(instructions.family[instructions.asks == "lie"])
        )
        >= 3
    )


@pytest.mark.parametrize("kind", ["review", "claim", "question"])
def test_each_kind_has_templates_of_varied_words_and_of_both_polarities(kind):
    t = prompt_library(kind)
    assert len(t) >= 4
    assert len({c.lower() for choices in t.choices for c in choices}) >= 6
    assert t.prefix.nunique() >= 2
    # the affirmative word stands for label 1 in one template and for label 0 in another: saying yes is not the truth
    affirmative = {"yes", "positive", "up", "true", "correct", "right", "a"}
    assert {k for choices in t.choices for k in (0, 1) if choices[k].lower() in affirmative} == {
        0,
        1,
    }


def test_questions_with_their_own_choices_say_which_index_is_which(tokenizer):
    e = frame(("question", "What is the capital of France?", "Rome", "Paris", 1, "train"))
    means = {
        "question_letters": ["A", "B"],
        "question_letters_turned": ["B", "A"],
        "question_claim": ["no", "yes"],
        "question_claim_turned": ["yes", "no"],
    }
    for name in prompt_library("question").name:
        row = make_prompts(e, tokenizer, templates=[name]).iloc[0]
        assert list(row.choices) == means.get(name, ["Rome", "Paris"])
        shown = dict(re.findall(r"^([AB])\. (\w+)$", row.prompt, flags=re.M))
        if shown:
            assert [shown[c] for c in row.choices] == ["Rome", "Paris"]
        if suggested := re.search(r"Suggested answer: (\w+)", row.prompt):
            assert row.choices[1] == ("yes" if suggested[1] == "Paris" else "no")


@pytest.mark.trap(13)
@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_ids_of_each_row_spell_its_own_choices_and_no_token_is_in_both(tokenizer, kind):
    examples = frame(
        (kind, "It rains in Oslo.", "Rome", "Paris", 1, "train"),
        (kind, "It snows in Lima.", "Oslo", "Lima", 0, "test"),
    )
    parts = [
        make_prompts(examples, tokenizer, templates=[name], n_known=0)
        for name in prompt_library(kind).name
    ]
    assert (
        len({tuple(c) for t in parts for c in t.choices}) >= 2
    )  # or pooling them would change nothing
    for row in pd.concat([*parts, make_prompts(examples, tokenizer)]).itertuples():
        assert not set(row.choice_ids[0]) & set(row.choice_ids[1])
        for choice, ids in zip(row.choices, row.choice_ids, strict=True):
            spelt = [tokenizer.decode([i]).strip().lower() for i in ids]
            assert spelt and all(s and choice.lower().startswith(s) for s in spelt), (
                row.template,
                choice,
                spelt,
            )


def test_a_chat_template_that_prints_the_date_makes_the_same_prompt_tomorrow():
    tokenizer = byte_tokenizer(chat_template="Today: {{ strftime_now('%d %b %Y') }}\n" + TURNS)
    assert render_chat(
        tokenizer, [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    ).startswith("Today: 26 Jul 2024\n")
