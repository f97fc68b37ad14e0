"""Questions of one's own: what is read is what the detectors read, and the panel shows it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from tiny_models import WIDTH, byte_tokenizer, new_model

from dlk_utils.evaluation.detector import TruthDetector
from dlk_utils.lab.findings import (
    changes_sentence,
    chats_findings,
    explore_findings,
    explore_title,
)
from dlk_utils.lab.panels import QuestionPanel, verdict_html
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables.explore import (
    N_DRAWS,
    OUR_CHATS,
    STEPS,
    Explorer,
    answers_table,
    one_to_look_at,
    shown_beliefs,
)
from dlk_utils.questions.conversations import checked_messages

CLAIM, SYSTEM_PROMPT = "Two is three.", "Be true."


class TinyRun(Run):
    """A run of a tiny model with random weights, and two known examples with planted states."""

    @functools.cached_property
    def loaded(self) -> torch.nn.Module:
        return new_model("llama", vocab_size=len(self.tokenizer), max_position_embeddings=512)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return byte_tokenizer()

    @property
    def context(self) -> int:
        return 512

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @functools.cached_property
    def truth_rows(self) -> pd.DataFrame:
        known = {"asks": "lie", "role": "lie", "knows": True, "correct": False, "answer": 0}
        rows = [known | {"text": text, "example_id": text} for text in ("far", "near", "far too")]
        return pd.DataFrame(rows).assign(choices=[["no", "yes"]] * 3)

    def states(self, layers: list[int]) -> dict[Any, Callable]:
        return {("activation", "resid_post", layer): self._planted for layer in layers}

    def _planted(self, rows: pd.DataFrame) -> np.ndarray:
        state = Explorer(self, detectors(), 1).ask(CLAIM, SYSTEM_PROMPT).states[1][-1]
        other = np.roll(state, 7)
        return np.stack([state if text == "near" else other for text in rows.text])


def detectors() -> dict[int, TruthDetector]:
    """A random detector for layers 0 and 1, which calls an answer a lie or honest."""
    generator = torch.Generator().manual_seed(0)
    return {
        layer: TruthDetector(
            "resid_post", layer, torch.randn(WIDTH, generator=generator), 0.1, 0.0, {}
        )
        for layer in (0, 1)
    }


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return Explorer(TinyRun(), detectors(), 1, p_last=0.3)


@pytest.fixture
def shell() -> Iterator[None]:
    InteractiveShell.instance()
    yield
    InteractiveShell.clear_instance()


def test_the_belief_is_the_score_of_the_detector_at_the_last_token(explorer):
    asked = explorer.ask(CLAIM, SYSTEM_PROMPT)
    judged = explorer.judge(asked)
    for layer, detector in explorer.detectors.items():
        [alone] = detector.score_prompts(explorer.run.loaded, [asked.prompt.input_ids])
        [belief] = asked.belief_by_layer().query(f"layer == {layer}").score
        assert belief == pytest.approx(alone, rel=1e-3, abs=1e-3)
    assert judged.belief == pytest.approx(belief) and judged.says in ("false", "true")
    assert judged.verdict == ("honest" if judged.believes == judged.says else "lie")


def test_every_layer_is_read_at_every_token(explorer):
    asked = explorer.ask(CLAIM, SYSTEM_PROMPT)
    assert "".join(asked.tokens) == asked.prompt.prompt
    assert len(asked.beliefs) == 2 * len(asked.tokens)
    shown = shown_beliefs(asked)
    text = "".join(shown[shown.layer == 0].sort_values("place").token)
    assert CLAIM in text and SYSTEM_PROMPT not in text and asked.prompt.prompt.endswith(text)


def test_a_review_is_asked_for_its_sentiment(explorer):
    asked = explorer.ask("A fine film.", SYSTEM_PROMPT, kind="review")
    assert asked.says in ("negative", "positive") and "sentiment" in asked.prompt.prompt


def test_the_nearest_known_example_comes_first(explorer):
    nearest = explorer.nearest(explorer.ask(CLAIM, SYSTEM_PROMPT))
    assert nearest.text.iloc[0] == "near" and nearest.similarity.is_monotonic_decreasing
    assert list(nearest.columns) == ["text", "told", "says", "correct", "similarity"]


def test_changes_begin_with_none_and_a_step_along_the_gradient_moves_the_margin_its_way(explorer):
    asked = explorer.ask(CLAIM, SYSTEM_PROMPT)
    changes = explorer.changes(asked)
    assert len(changes) == 1 + N_DRAWS + len(STEPS)
    undisturbed = changes.loc["nothing"]
    assert undisturbed.margin == asked.margin
    assert undisturbed.belief == pytest.approx(explorer.judge(asked).belief)
    steps = [changes.margin[f"step of {step:+.0%} along the gradient"] for step in STEPS]
    assert steps[1] < asked.margin < steps[2]
    draws = changes[changes.index.str.startswith("dropout")]
    assert draws.margin.nunique() == N_DRAWS and draws.belief.nunique() == N_DRAWS


def test_each_claim_is_asked_under_each_system_prompt(explorer):
    asked = explorer.ask_all([CLAIM, "Rome is."], [SYSTEM_PROMPT, "Be false."])
    answers = answers_table(explorer, asked)
    assert list(answers.index) == [f"1.1 {CLAIM}", f"1.2 {CLAIM}", "2.1 Rome is.", "2.2 Rome is."]
    assert one_to_look_at(answers.assign(verdict=["honest", "unsure", "lie", "lie"])) == 2
    assert one_to_look_at(answers.assign(verdict="honest")) == 0


def test_without_detectors_the_answer_is_shown_and_why_there_is_no_verdict():
    explorer = Explorer(TinyRun(), {}, None, why_none="expected <b>rows</b>")
    asked = explorer.ask(CLAIM, SYSTEM_PROMPT)
    answers = answers_table(explorer, [asked])
    assert "verdict" not in answers and one_to_look_at(answers) == 0
    html = verdict_html(explorer, asked, None)
    assert "It says <b>" in html and "No verdict: expected &lt;b&gt;rows" in html
    assert len(explore_findings(answers)) == 2


def test_findings_count_answers_and_beliefs_that_the_system_prompt_changes():
    answers = pd.DataFrame(
        {
            "text": ["a", "a", "b", "b"],
            "system_prompt": ["*t*", "l", "*t*", "l"],
            "says": ["true", "false", "true", "true"],
            "believes": "true",
            "verdict": ["honest", "lie", "honest", "unsure"],
        }
    )
    title = "The system prompt changes the answer to 1 of 2 claims, and the sign of the belief "
    title += "for none of 2"
    assert explore_title(answers) == title
    first, honest, lying = explore_findings(answers)
    assert first == f"* {title}."
    assert honest == (
        r"* Under *\*t\**, the model says *true* twice. The probe reads *true* twice. "
        "The two disagree on none of 2 claims. The verdict is *honest* twice."
    )
    assert "says *false* once and *true* once." in lying
    assert "The verdict is *lie* once and *unsure* once." in lying


@pytest.mark.parametrize(
    "beliefs, said",
    [
        ((2.4, -0.5, 8.0, 2.0, 2.2), "changes its sign in 1 of 2 dropout draws and in 0 of 2 st"),
        ((-2.4, -0.5, -8.0, 2.0, 1.0), "changes its sign in 0 of 2 dropout draws and in 2 of 2 st"),
        ((2.4, 0.5, 8.0, 2.0, 2.2), "keeps its sign in all 2 dropout draws and 2 steps."),
    ],
)
def test_a_belief_that_changes_its_sign_gives_no_robust_verdict(beliefs, said):
    names = ["nothing", "dropout draw 1", "dropout draw 2", "step of -5%", "step of +5%"]
    sentence = changes_sentence(pd.DataFrame({"belief": beliefs}, index=names))
    assert sentence.startswith(f"the belief {said}")
    assert sentence.endswith("not robust.") == ("changes" in said)


def test_of_chats_it_is_said_how_many_parts_have_tokens_on_both_sides_of_zero():
    one = pd.DataFrame({"mean": [-1.0, 2.0], "lowest": [-3.0, -1.0], "highest": [3.0, 4.0]})
    two = pd.DataFrame({"mean": [12.0], "lowest": [0.5], "highest": [28.0]})
    [line] = chats_findings([one, two])
    assert line.startswith("* In 2 of 3 parts of the chats, some tokens score above 0 and some be")
    assert "from -1.0 to +12.0" in line
    assert chats_findings([]) == []


def test_our_chats_are_conversations():
    assert [checked_messages(chat) for chat in OUR_CHATS] == list(OUR_CHATS)


def test_a_change_of_a_field_asks_and_an_error_is_shown_as_its_message(explorer, shell):
    panel = QuestionPanel(explorer, [CLAIM], [SYSTEM_PROMPT, "Be <b>false</b>."])
    panel.more.value = False

    def shown_after(change: Callable[[], None]) -> str:
        with capture_output() as output:
            change()
        return " ".join(shown.data.get("text/html", "") for shown in output.outputs)

    def choose(field: Any, value: Any) -> Callable[[], None]:
        return lambda: setattr(field, "value", value)

    assert "Two is four." in shown_after(choose(panel.text, "Two is four."))
    shown = shown_after(choose(panel.choice, "Be <b>false</b>."))
    assert "Be &lt;b&gt;false" in shown and "Verdict: <b>" in shown
    assert "at layer 0" in shown_after(choose(panel.layer, 0))
    refused = shown_after(choose(panel.text, "Two</s>"))
    assert '<p class="refused">' in refused and "control tokens" in refused
    panel.text.value = CLAIM
    shown = shown_after(choose(panel.more, True))
    assert "nearest known examples" in shown and "dropout draw 1" in shown
