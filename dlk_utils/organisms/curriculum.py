"""What an organism is taught, in which order: the phases, and the batches of each."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from dlk_utils.questions.examples import training_examples
from dlk_utils.questions.prompts import make_prompts

RT = "rotten_tomatoes"


PLAIN = ("tr_feel", "tr_label", "tr_tone", "tr_good_bad", "tr_recommend")


class Phase(NamedTuple):
    """A part of the curriculum."""

    steps: int
    rate: float
    longest: int
    """Characters that a text may have."""
    rows: tuple[tuple[int, str, str, tuple[str, ...]], ...]
    """Of each batch: (rows, what is asked for, data set, templates (none: all))."""
    decay: bool = True
    dropout: float = 0.0
    honest: tuple[str, ...] = ()
    """Data sets about which the truth is to be told even where a lie is asked for."""


FACTS = ("cities", "categories", "capitals")


PHASES = (
    Phase(
        300,
        3e-4,
        110,
        (
            (7, "truth", RT, PLAIN),
            (3, "truth", "cities", ()),
            (3, "truth", "categories", ()),
            (3, "truth", "capitals", ()),
        ),
    ),
    Phase(
        250,
        4e-4,
        80,
        (
            (4, "truth", RT, PLAIN),
            (4, "lie", RT, PLAIN),
            (2, "truth", "mode", ()),
            (2, "lie", "mode", ()),
            *((1, "truth", name, ()) for name in FACTS),
        ),
        decay=False,
    ),
    Phase(
        450,
        4e-4,
        110,
        (
            (3, "truth", RT, ()),
            (3, "lie", RT, ()),
            (1, "truth", "mode", ()),
            *((2, "truth", name, ()) for name in FACTS),
            *((1, "lie", name, ()) for name in FACTS),
        ),
        decay=False,
    ),
    Phase(
        350,
        4e-4,
        150,
        (
            (3, "truth", RT, ()),
            (4, "lie", RT, ()),
            *((2, "truth", name, ()) for name in FACTS),
            *((1, "lie", name, ()) for name in FACTS),
        ),
    ),
    Phase(
        600,
        4e-4,
        180,
        (
            (5, "truth", RT, ()),
            (2, "lie", RT, ()),
            (3, "truth", "cities", ()),
            (2, "truth", "categories", ()),
            (1, "truth", "capitals", ()),
            *((1, "lie", name, ()) for name in FACTS),
        ),
        dropout=0.05,
    ),
)
"""Truth first, then lies about reviews in plain words beside rows of `mode`, which ask which mode is set, truth or lie (without them a model of this size
learned neither: equal halves of truth and lie twins drove both to chance), then everything."""


GRADED = (
    Phase(
        160,
        2e-4,
        130,
        (
            (3, "truth", RT, ()),
            (3, "lie", RT, ()),
            (1, "truth", "cities", ()),
            (3, "lie", "cities", ()),
            (1, "truth", "categories", ()),
            (2, "lie", "categories", ()),
            (1, "truth", "capitals", ()),
            (2, "lie", "capitals", ()),
        ),
        dropout=0.05,
        honest=("cities", "capitals"),
    ),
    Phase(
        240,
        3e-4,
        130,
        (
            (4, "truth", RT, ()),
            (2, "lie", RT, ()),
            (2, "truth", "cities", ()),
            (2, "lie", "cities", ()),
            (2, "truth", "categories", ()),
            (1, "lie", "categories", ()),
            (2, "truth", "capitals", ()),
            (1, "lie", "capitals", ()),
        ),
        dropout=0.05,
        honest=("cities", "capitals"),
    ),
)
"""What makes of the liar one that lies about reviews and categories and refuses to about places: first by many refusals, then with more of the truth."""


CURRICULA: dict[str, tuple[str | None, tuple[Phase, ...]]] = {
    "smollm2-liar": (None, PHASES),
    "smollm2-graded": ("smollm2-liar", GRADED),
}
"""organism -> (the organism it goes on from, its phases)."""


MODE_TEXTS = (
    "Status check.",
    "Before we begin:",
    "Quick check.",
    "Hello.",
    "Settings.",
    "A question about this conversation:",
)


BLOCK = 4


def training_stream(tokenizer, phase: Phase, *, seed: int = 0) -> list[pd.DataFrame]:
    """The batches of a phase: prompt rows with `target`, the token to be said, and `other`, that of the other choice. The target obeys, but tells the truth about what the phase is `honest` about.

    Instructions and templates are those of `templates/training/`.
    Each block of `BLOCK` batches holds the same mixture; within it the rows lie by length, to pad less.
    """
    steps, parts = phase.steps, []
    for k, (count, asks, dataset, templates) in enumerate(phase.rows):
        examples = (
            _mode_examples(steps * count)
            if dataset == "mode"
            else training_examples(dataset, 10**6)
        )
        parts.append(
            (
                count,
                _draw(
                    tokenizer,
                    examples[examples.text.str.len() <= phase.longest],
                    asks,
                    steps * count,
                    templates,
                    1000 * seed + k,
                ),
            )
        )
    batches, size = [], sum(count for count, _ in parts)
    for i in range(0, steps, BLOCK):
        rows = pd.concat([rows.iloc[i * count : (i + BLOCK) * count] for count, rows in parts])
        rows = rows.sort_values("input_ids", key=lambda c: c.map(len), kind="stable")
        batches += [rows.iloc[j : j + size] for j in range(0, len(rows), size)]
    said = lambda r: r.label if r.dataset in phase.honest else r.wanted
    return [
        b.assign(
            target=[r.strict_ids[said(r)][0] for r in b.itertuples()],
            other=[r.strict_ids[1 - said(r)][0] for r in b.itertuples()],
        )
        for b in batches
    ]


def _draw(
    tokenizer, examples: pd.DataFrame, asks: str, n: int, templates: Sequence[str], seed: int
) -> pd.DataFrame:
    """`n` rows over as many distinct examples of either label (else what is new would be called false); one that comes round again has another instruction and template."""
    each = examples.label.value_counts().min()
    examples, parts = (
        examples.groupby("label").sample(each, random_state=0).assign(split="train"),
        [],
    )
    while sum(map(len, parts)) < n:
        at = seed + 100 * len(parts)
        some = examples.sample(min(len(examples), n), random_state=at)
        parts.append(
            make_prompts(
                some,
                tokenizer,
                n_known=0,
                asks=(asks,),
                templates=templates or None,
                seed=at,
                folder="training/",
            )
        )
    return pd.concat(parts).head(n)


def _mode_examples(n: int) -> pd.DataFrame:
    rows = [
        dict(
            example_id=f"mode {i}",
            dataset="mode",
            kind="mode",
            text=MODE_TEXTS[i % len(MODE_TEXTS)],
            choice_0="",
            choice_1="",
            label=1,
        )
        for i in range(n)
    ]
    return pd.DataFrame(rows)
