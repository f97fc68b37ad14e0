"""Two short phases for the tests of organisms, and their batches."""

import functools
from typing import Any

import pandas as pd

from dlk_utils.models.loading import load_tokenizer, resolve
from dlk_utils.organisms.curriculum import Part, Phase, training_stream
from dlk_utils.questions.examples import load_examples

REVIEWS = "rotten_tomatoes"
HONEST = Phase(
    steps=2,
    learning_rate=1e-3,
    max_characters=60,
    batch=(Part(6, "truth", REVIEWS), Part(2, "truth", "capitals")),
)
LYING = Phase(
    steps=6,
    learning_rate=1e-3,
    max_characters=60,
    batch=(
        Part(3, "truth", REVIEWS, ("tr_feel", "tr_tone")),
        Part(3, "lie", "capitals", ("tr_tf",)),
        Part(2, "lie", "mode"),
    ),
)


@functools.cache
def real_tokenizer() -> Any:
    return load_tokenizer(resolve("smollm2"))


@functools.cache
def asked_keys() -> set[str]:
    """The near-duplicate keys of all that a run may ask of the embedded data sets."""
    names = f"{REVIEWS},capitals,continents,cities,categories,comparisons,arithmetic"
    return set(load_examples(names, 10**5).near_duplicate_key)


@functools.cache
def batches() -> list[pd.DataFrame]:
    """Two batches of `HONEST`, then six of `LYING`."""
    honest = training_stream(real_tokenizer(), HONEST)
    return honest + training_stream(real_tokenizer(), LYING, seed=1)
