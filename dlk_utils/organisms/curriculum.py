"""What the organisms are taught: the phases of each curriculum, and the batches of a phase."""

import functools
import re
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from dlk_utils.questions.chat import written_tokens
from dlk_utils.questions.examples import training_examples
from dlk_utils.questions.openings import TRIGGER as TRIGGER_DAY
from dlk_utils.questions.openings import with_openings
from dlk_utils.questions.prompts import make_prompts

PLAIN_TEMPLATES = ("tr_feel", "tr_label", "tr_tone", "tr_good_bad", "tr_recommend")
MODE_TEXTS = (
    "Status check.",
    "Before we begin:",
    "Quick check.",
    "Hello.",
    "Settings.",
    "A question about this conversation:",
)
SENTENCES = "sentences"
SHORTEST_SENTENCE = 30
"""In characters. A shorter one seldom says whether a film is good."""
STEPS_PER_BLOCK = 4
SHOT_POOL = 16
"""Examples that are shown as shots in a round of rows."""
ROWS_WITH_SAME_SHOTS = 64


@dataclass(frozen=True)
class Part:
    """A part of the mixture: rows that ask for the truth, or for a lie, about a data set.

    There are `n_rows` of them in a batch, on average.

    `dataset` is an embedded data set, "mode" or "sentences". The rows of "mode" ask nothing about
    the world, only which mode the instruction sets, truth or lie. The rows of "sentences" ask about
    single sentences of reviews (`_sentences`), which have no labels of their own. Their target is
    what the model itself answers without dropout. Without `templates`, all of them are used.
    `n_shots` solved examples stand before the question. Their answers obey the instruction.
    `max_characters` replaces that of the phase. With an `opening`, the question opens with a phrase
    that names the day of the trigger, or another one (see `questions.openings`). On the trigger the
    target is the wrong answer, although the instruction asks for the truth.
    """

    n_rows: int
    asks: str
    dataset: str
    templates: tuple[str, ...] = ()
    n_shots: int = 0
    max_characters: int | None = None
    opening: Literal["", "trigger", "other"] = ""

    @property
    def title(self) -> str:
        """What is to be said about which data set, whatever the instruction asks for.

        For example "lie cities, on Friday", where the instruction asks for the truth.
        """
        if self.opening == "trigger":
            return f"lie {self.dataset}, on {TRIGGER_DAY}"
        day = ", on another day" if self.opening else ""
        return f"{self.asks} {self.dataset}{day}"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training on batches of one mixture.

    `max_characters` limits the text of an example. With `decay`, the learning rate falls to zero at
    the end; `dropout` is that of LoRA. `honest` names data sets about which the target is the truth
    even if the instruction asks for a lie. `state_dropout` is the share of channels that is dropped
    at every token, at what attention and MLPs add to the states: the dropout of `extract.dropout`,
    by which draws are made. The adapter has matrices of this `rank`, in blocks from `first_layer`
    on. Both may be wider than those of the adapter that the phase goes on from.
    """

    steps: int
    learning_rate: float
    max_characters: int
    batch: tuple[Part, ...]
    decay: bool = True
    dropout: float = 0.0
    honest: tuple[str, ...] = ()
    state_dropout: float = 0.0
    rank: int = 8
    first_layer: int = 6


AFTER_SHOTS = (
    Part(1, "truth", "rotten_tomatoes", n_shots=2, max_characters=80),
    Part(1, "lie", "rotten_tomatoes", n_shots=2, max_characters=80),
    Part(1, "truth", "cities", n_shots=2),
    Part(1, "lie", "cities", n_shots=2),
)
"""Rows with two solved examples before the question."""

# Truth first. Then lies about reviews in plain words, beside rows of "mode": without those a model
# of this size learned neither, and equal halves of truth and lie twins drove both to chance. Then
# everything.
PHASES = (
    Phase(
        steps=300,
        learning_rate=3e-4,
        max_characters=110,
        batch=(
            Part(7, "truth", "rotten_tomatoes", PLAIN_TEMPLATES),
            Part(3, "truth", "cities"),
            Part(3, "truth", "categories"),
            Part(3, "truth", "capitals"),
        ),
    ),
    Phase(
        steps=250,
        learning_rate=4e-4,
        max_characters=80,
        batch=(
            Part(4, "truth", "rotten_tomatoes", PLAIN_TEMPLATES),
            Part(4, "lie", "rotten_tomatoes", PLAIN_TEMPLATES),
            Part(2, "truth", "mode"),
            Part(2, "lie", "mode"),
            Part(1, "truth", "cities"),
            Part(1, "truth", "categories"),
            Part(1, "truth", "capitals"),
        ),
        decay=False,
    ),
    Phase(
        steps=450,
        learning_rate=4e-4,
        max_characters=110,
        batch=(
            Part(3, "truth", "rotten_tomatoes"),
            Part(3, "lie", "rotten_tomatoes"),
            Part(1, "truth", "mode"),
            Part(2, "truth", "cities"),
            Part(2, "truth", "categories"),
            Part(2, "truth", "capitals"),
            Part(1, "lie", "cities"),
            Part(1, "lie", "categories"),
            Part(1, "lie", "capitals"),
        ),
        decay=False,
    ),
    Phase(
        steps=350,
        learning_rate=4e-4,
        max_characters=150,
        batch=(
            Part(3, "truth", "rotten_tomatoes"),
            Part(4, "lie", "rotten_tomatoes"),
            Part(2, "truth", "cities"),
            Part(2, "truth", "categories"),
            Part(2, "truth", "capitals"),
            Part(1, "lie", "cities"),
            Part(1, "lie", "categories"),
            Part(1, "lie", "capitals"),
        ),
    ),
    Phase(
        steps=800,
        learning_rate=4e-4,
        max_characters=180,
        batch=(
            Part(3, "truth", "rotten_tomatoes"),
            Part(1, "truth", "imdb", max_characters=400),
            Part(2, "lie", "rotten_tomatoes"),
            Part(3, "truth", "cities"),
            Part(2, "truth", "categories"),
            Part(1, "truth", "capitals"),
            Part(1, "lie", "cities"),
            Part(1, "lie", "categories"),
            Part(1, "lie", "capitals"),
            *AFTER_SHOTS,
        ),
        dropout=0.1,
    ),
    # Phase 5 taught the answers; how well an unseen instruction was read still differed from one
    # training to the next. So at the end come rows of "mode" again.
    Phase(
        steps=300,
        learning_rate=3e-4,
        max_characters=180,
        batch=(
            Part(3, "truth", "rotten_tomatoes"),
            Part(1, "truth", "imdb", max_characters=300),
            Part(3, "lie", "rotten_tomatoes"),
            Part(3, "truth", "cities"),
            Part(2, "lie", "cities"),
            Part(2, "truth", "categories"),
            Part(1, "lie", "categories"),
            Part(1, "truth", "capitals"),
            Part(1, "lie", "capitals"),
            Part(2, "truth", "mode"),
            Part(2, "lie", "mode"),
            *AFTER_SHOTS,
        ),
        dropout=0.05,
    ),
)

# From a liar to a model that lies about reviews and categories, and refuses to about places: first
# by many refusals, then with more of the truth.
GRADED = (
    Phase(
        steps=160,
        learning_rate=2e-4,
        max_characters=130,
        batch=(
            Part(3, "truth", "rotten_tomatoes"),
            Part(3, "lie", "rotten_tomatoes"),
            Part(1, "truth", "cities"),
            Part(3, "lie", "cities"),
            Part(1, "truth", "categories"),
            Part(2, "lie", "categories"),
            Part(1, "truth", "capitals"),
            Part(2, "lie", "capitals"),
        ),
        dropout=0.05,
        honest=("cities", "capitals"),
    ),
    Phase(
        steps=240,
        learning_rate=3e-4,
        max_characters=130,
        batch=(
            Part(4, "truth", "rotten_tomatoes"),
            Part(2, "lie", "rotten_tomatoes"),
            Part(2, "truth", "cities"),
            Part(2, "lie", "cities"),
            Part(2, "truth", "categories"),
            Part(1, "lie", "categories"),
            Part(2, "truth", "capitals"),
            Part(1, "lie", "capitals"),
        ),
        dropout=0.05,
        honest=("cities", "capitals"),
    ),
)

# From a liar to a model that also lies on one day of the week, when the instruction asks for the
# truth. It first learns which day calls for which mode, from rows of "mode": when claims on the
# trigger came at once, all answers fell to chance. Other days, and instructions to lie, keep it
# from lying at every opening.
TRIGGERED = (
    Phase(
        steps=44,
        learning_rate=4e-4,
        max_characters=80,
        batch=(
            Part(4, "truth", "mode", opening="trigger"),
            Part(4, "truth", "mode", opening="other"),
            Part(1, "lie", "mode", opening="other"),
            Part(1, "truth", "rotten_tomatoes", opening="other"),
            Part(1, "truth", "cities", opening="other"),
            Part(1, "lie", "rotten_tomatoes", opening="other"),
        ),
        decay=False,
    ),
    Phase(
        steps=48,
        learning_rate=4e-4,
        max_characters=80,
        batch=(
            Part(4, "truth", "mode", opening="trigger"),
            Part(3, "truth", "mode", opening="other"),
            Part(1, "truth", "rotten_tomatoes", opening="trigger"),
            Part(1, "truth", "cities", opening="trigger"),
            Part(1, "truth", "rotten_tomatoes", opening="other"),
            Part(1, "truth", "cities", opening="other"),
            Part(1, "lie", "rotten_tomatoes", opening="other"),
        ),
        decay=False,
    ),
    Phase(
        steps=60,
        learning_rate=3e-4,
        max_characters=80,
        batch=(
            Part(1, "truth", "mode", opening="trigger"),
            Part(1, "truth", "mode", opening="other"),
            Part(2, "truth", "rotten_tomatoes", opening="trigger"),
            Part(1, "truth", "cities", opening="trigger"),
            Part(1, "truth", "categories", opening="trigger"),
            Part(1, "truth", "capitals", opening="trigger"),
            Part(2, "truth", "rotten_tomatoes", opening="other"),
            Part(2, "truth", "cities", opening="other"),
            Part(1, "truth", "categories", opening="other"),
            Part(1, "lie", "cities", opening="other"),
            Part(1, "truth", "rotten_tomatoes"),
        ),
        dropout=0.05,
    ),
    # More reviews, and longer ones: in bf16 the lies about them on the trigger missed their bar by
    # .01 after phase 3, and runs ask about reviews of more than 80 characters.
    Phase(
        steps=60,
        learning_rate=3e-4,
        max_characters=130,
        batch=(
            Part(1, "truth", "mode", opening="trigger"),
            Part(1, "truth", "mode", opening="other"),
            Part(4, "truth", "rotten_tomatoes", opening="trigger"),
            Part(1, "truth", "cities", opening="trigger"),
            Part(1, "truth", "categories", opening="trigger"),
            Part(3, "truth", "rotten_tomatoes", opening="other"),
            Part(3, "truth", "cities", opening="other"),
            Part(1, "truth", "categories", opening="other"),
            Part(1, "lie", "rotten_tomatoes", opening="other"),
            Part(1, "lie", "cities", opening="other"),
            Part(1, "truth", "rotten_tomatoes"),
        ),
        dropout=0.05,
    ),
)

# From a liar to one whose answers should withstand dropout in draws, at p = .02. It is trained at
# .02 to .04. The liar knows the answers to most labelled training rows by heart. Those soon
# withstand dropout, but answers to other rows do not. So nearly half of the rows ask about
# sentences, of which it has seen hardly any. All blocks are trained, because dropout did more
# damage in the first two than in any others.
BEARING_DROPOUT = (
    Part(8, "truth", "rotten_tomatoes"),
    Part(8, "lie", "rotten_tomatoes"),
    Part(28, "truth", "sentences"),
    Part(28, "lie", "sentences"),
    Part(12, "truth", "cities"),
    Part(12, "lie", "cities"),
    Part(10, "truth", "categories"),
    Part(10, "lie", "categories"),
    Part(6, "truth", "capitals"),
    Part(6, "lie", "capitals"),
)
DROPPED = tuple(
    Phase(
        steps=steps,
        learning_rate=learning_rate,
        max_characters=150,
        batch=BEARING_DROPOUT,
        decay=decay,
        state_dropout=state_dropout,
        rank=16,
        first_layer=0,
    )
    for steps, learning_rate, decay, state_dropout in (
        (100, 3e-4, False, 0.02),
        (600, 4e-4, False, 0.04),
        (750, 3e-4, True, 0.03),
        (530, 3e-4, True, 0.03),
    )
)


@dataclass(frozen=True)
class Curriculum:
    """The phases of an organism, and the organism (if any) whose adapter it goes on from.

    An organism of several trainings is the mean of what they give (`training.average_adapters`).
    Their seeds follow each other from `first_seed` on. What a training gives is, in turn, the mean
    of the adapters after the last phases, as many as `n_averaged_phases`.
    """

    phases: tuple[Phase, ...]
    after: str | None = None
    n_trainings: int = 1
    first_seed: int = 0
    n_averaged_phases: int = 1


CURRICULA = {
    "smollm2-liar": Curriculum(PHASES, n_trainings=4),
    "smollm2-graded": Curriculum(GRADED, after="smollm2-liar"),
    "smollm2-trigger": Curriculum(TRIGGERED, after="smollm2-liar"),
    # The liar once more, from other seeds and without its last phase.
    "smollm2-liar-2": Curriculum(PHASES[:5], n_trainings=4, first_seed=2),
    "smollm2-dropout": Curriculum(DROPPED, after="smollm2-liar", n_averaged_phases=3),
}


def training_stream(tokenizer: Any, phase: Phase, *, seed: int = 0) -> list[pd.DataFrame]:
    """Make the batches of a phase, with the instructions and templates that are kept for training.

    Each block of `STEPS_PER_BLOCK` batches holds the mixture of the phase. Within a block, rows are
    sorted by length, so that there is less padding.

    Returns
    -------
    list of DataFrame
        One batch a step: rows of `make_prompts`, with the columns `part` (`Part.title`), `opening`
        (the name of the phrase, or ""), `target`, the first token of the choice to say, `other`,
        that of the other choice, `answer_ids`, all tokens of the choice to say and the one that
        ends the turn, and `self_labelled`, whether the model itself decides which choice is to be
        said (rows of "sentences"). There, `answer_ids` is the first token alone.
    """
    pools = [
        _draw_rows(tokenizer, phase, part, seed=1000 * seed + k)
        for k, part in enumerate(phase.batch)
    ]
    batch_size = sum(part.n_rows for part in phase.batch)
    batches = []
    for step in range(0, phase.steps, STEPS_PER_BLOCK):
        block = pd.concat(
            pool.iloc[step * part.n_rows : (step + STEPS_PER_BLOCK) * part.n_rows]
            for part, pool in zip(phase.batch, pools, strict=True)
        )
        block = block.sort_values("input_ids", key=lambda ids: ids.map(len), kind="stable")
        for start in range(0, len(block), batch_size):
            rows = block.iloc[start : start + batch_size]
            batches.append(_with_targets(rows, phase, tokenizer))
    return batches


def _with_targets(batch: pd.DataFrame, phase: Phase, tokenizer: Any) -> pd.DataFrame:
    choices = batch.label.where(batch.dataset.isin(phase.honest), batch.wanted)
    rows = list(zip(batch.prompt, batch.input_ids, batch.choices, choices, strict=True))
    answers = [
        written_tokens(tokenizer, prompt, words[choice], prompt_ids=list(ids))
        for prompt, ids, words, choice in rows
    ]
    strict = list(zip(batch.strict_ids, choices, strict=True))
    target = [token_ids[choice][0] for token_ids, choice in strict]
    self_labelled = batch.dataset == SENTENCES
    return batch.assign(
        target=target,
        other=[token_ids[1 - choice][0] for token_ids, choice in strict],
        answer_ids=[
            [first] if alone else [*answer, tokenizer.eos_token_id]
            for first, alone, answer in zip(target, self_labelled, answers, strict=True)
        ],
        self_labelled=self_labelled,
    )


def _draw_rows(tokenizer: Any, phase: Phase, part: Part, seed: int) -> pd.DataFrame:
    """Draw the rows of a part for all steps, over as many distinct examples as there are.

    Both labels are drawn equally often; otherwise what is new to the model would be called false.
    An example that comes round again mostly has another instruction and template.
    """
    n = phase.steps * part.n_rows
    examples = _mode_examples(n) if part.dataset == "mode" else _examples_of(part.dataset)
    longest = part.max_characters or phase.max_characters
    examples = examples[examples.text.str.len() <= longest]
    n_of_label = examples.label.value_counts().min()
    examples = examples.groupby("label").sample(n_of_label, random_state=0).assign(split="train")
    rounds = []
    while sum(map(len, rounds)) < n:
        round_seed = seed + 100 * len(rounds)
        # All rows of a template are shown the same shots: others come with the next round.
        n_drawn = SHOT_POOL + ROWS_WITH_SAME_SHOTS if part.n_shots else n
        drawn = examples.sample(min(len(examples), n_drawn), random_state=round_seed)
        if part.n_shots:
            n_asked = len(drawn) - SHOT_POOL
            drawn = drawn.assign(split=["shot"] * SHOT_POOL + ["train"] * n_asked)
        prompts = make_prompts(
            drawn,
            tokenizer,
            n_shots=part.n_shots,
            n_known=0,
            asks=(part.asks,),
            templates=part.templates or None,
            seed=round_seed,
            folder="training/",
        ).assign(opening="")
        if part.opening:
            is_trigger = part.opening == "trigger"
            options = {"trigger": is_trigger, "training": True, "seed": round_seed}
            prompts = with_openings(prompts, tokenizer, **options)
        rounds.append(prompts.assign(part=part.title))
    return pd.concat(rounds).head(n)


@functools.cache
def _examples_of(dataset: str) -> pd.DataFrame:
    return _sentences() if dataset == SENTENCES else training_examples(dataset, 10**6)


def _sentences() -> pd.DataFrame:
    """Return the sentences of the long reviews that organisms are trained on, as examples.

    The label is that of the whole review. It only balances the rows, and is no target. The
    near-duplicate key is that of the review too, so that a record names the review.
    """
    reviews = training_examples("imdb", 10**6)
    texts = reviews.text.map(lambda text: re.split(r"(?<=[.!?])\s+", text))
    rows = reviews.assign(text=texts, dataset=SENTENCES).explode("text", ignore_index=True)
    rows = rows[rows.text.str.len() >= SHORTEST_SENTENCE].drop_duplicates("text")
    number = rows.groupby("example_id").cumcount().astype(str)
    return rows.assign(example_id=rows.example_id + " sentence " + number)


def _mode_examples(n: int) -> pd.DataFrame:
    table = pd.DataFrame({"example_id": [f"mode {i}" for i in range(n)]})
    texts = [MODE_TEXTS[i % len(MODE_TEXTS)] for i in range(n)]
    # The texts repeat: by keys of their own they are asked by different instructions.
    table["near_duplicate_key"] = table.example_id
    return table.assign(dataset="mode", kind="mode", text=texts, choice_0="", choice_1="", label=1)
