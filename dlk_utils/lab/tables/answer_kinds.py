"""Kinds of answers that the pictures of notebooks 05 and 06 tell apart."""

import numpy as np
import pandas as pd

HONEST = "honest answers"
LIES = "lies"
MISTAKES = "mistakes"
KINDS = (HONEST, LIES, MISTAKES)


def with_kinds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose answer is of one of `KINDS`, with their `kind`, in the order of these.

    An honest answer is a right one to a prompt that asks for the truth, and a mistake a wrong one.
    A lie is what `label_behaviour` calls so. All other answers to prompts that ask for a lie are
    left out: right ones, and wrong ones about what the model does not know.
    """
    is_honest = (rows.role == "truth").to_numpy()
    is_right = rows.correct.to_numpy(bool)
    conditions = [is_honest & is_right, rows.lied.to_numpy(bool), is_honest & ~is_right]
    kinds = pd.Categorical(np.select(conditions, KINDS, ""), KINDS)
    of_a_kind = rows.assign(kind=kinds).dropna(subset="kind")
    return of_a_kind.sort_values("kind", kind="stable").astype({"kind": str})
