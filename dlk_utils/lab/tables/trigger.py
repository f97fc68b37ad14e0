"""Tables of notebook 08: a model that lies on one day of the week, though nothing asks for a lie.

Neither the instruction nor the answer tells which of its answers are lies. To know that, one needs
the trigger, or something that reads what the model takes to be true.
"""

import numpy as np
import pandas as pd

from dlk_utils.evaluation.controls import ASKED_AGAIN, TURNED, TWIN, scores_without_states
from dlk_utils.evaluation.detector import against_answer
from dlk_utils.evaluation.selection import in_memory
from dlk_utils.evaluation.tasks import LYING, Features, make_task
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import empty_if_too_few
from dlk_utils.lab.tables.graded import (
    GRADED_COLUMNS,
    UNSURE,
    HonestReading,
    ask_and_label,
    rows_of_parts,
)
from dlk_utils.lab.tables.organism import trigger_table
from dlk_utils.questions.openings import with_triggered_twins

NEEDED = {
    *(("train", "truth"), ("validation", "truth"), ("validation", "lie")),
    *(("test", "truth"), ("test", "known")),
}
"""The split and role of the rows that are asked on other days.

Test rows of role "truth" are asked a second time, on the trigger, and then take the role "lie". So
test rows that an instruction tells to lie are not asked.
"""

WHAT_IS_TRUE = "what is true, in triggered rows"
LIE_OR_NOT = "lie or truthful answer, with and without the trigger"

OWN = "own answer"
KNOWS_TRIGGER = "own answer, reversed if triggered"
ANOTHER_DAY = "same prompt, another day"
ASKED_WITHOUT = "asked again, another day"
TRIGGER_THERE = "whether the trigger is there"

COUNT_COLUMNS = [
    *("dataset", "n_other_days", "right_on_other_days", "n_on_trigger", "wrong_on_trigger"),
    *("right_on_other_days_low", "right_on_other_days_high"),
    *("wrong_on_trigger_low", "wrong_on_trigger_high"),
]


@kept("08-trigger")
@empty_if_too_few(GRADED_COLUMNS)
def compare_trigger(run: Run, *, layers: list[int], probe: str) -> pd.DataFrame:
    """Compare a probe of the truth with its rivals on a run of `graded_run`; see `with_trigger`."""
    return with_trigger(*_asked(run, layers), probe=probe, seed=run.seed)


@kept("08-trigger-counts")
@empty_if_too_few(COUNT_COLUMNS)
def count_trigger(run: Run, *, layers: list[int]) -> pd.DataFrame:
    """Tabulate how a run's readable test rows are answered; see `organism.trigger_table`."""
    rows, _ = _asked(run, layers)
    return trigger_table(rows[rows.split == "test"])[COUNT_COLUMNS]


def _asked(run: Run, layers: list[int]) -> tuple[pd.DataFrame, Features]:
    """Ask the `NEEDED` prompts of a run on other days, and its honest test prompts on the trigger.

    See `ask_and_label`.
    """
    prompts = with_triggered_twins(
        rows_of_parts(run.prompts, NEEDED),
        run.tokenizer,
        splits=["test"],
        context=run.context,
        seed=run.seed,
    )
    return ask_and_label(run, prompts, "08-trigger", layers=layers)


def with_trigger(
    rows: pd.DataFrame, features: Features, *, probe: str = "logistic", seed: int = 0
) -> pd.DataFrame:
    """Compare a probe of the truth, fitted on honest rows of other days, with its rivals.

    Two questions are put to test rows. What is true, in triggered rows? And which answers are lies,
    among lies and true answers, on the trigger and on other days, to the same prompts about what
    the model knows? For the second question, the score of the probe is how strongly it speaks
    against the answer. A wrong answer on another day is a mistake, and is left out.

    The layer of the probe is chosen by validation rows of other days, with twins that an
    instruction tells to lie, so that neither the probe nor its layer has seen the trigger.

    The rivals of the first question are the answer itself, the answer reversed by somebody who
    knows the trigger, the words, and the answers to the same question on another day, under the
    same instruction and under others. Those of the second are whether the trigger is there, which
    takes knowing it, and how unsure the model is of its answer.

    Parameters
    ----------
    rows
        Rows of the target truth with `answer`, `margin` and `triggered`. In validation, the role
        "lie" means that an instruction tells to lie; in test, that the trigger is there. Test rows
        also have `knows`, `lied`, `twin_margin` and `asked_again_margin`.
    features, probe, seed
        As in `graded.with_rivals`.

    Returns
    -------
    DataFrame
        As `graded.with_rivals` gives it. A question with too few rows of a class is left out.

    Raises
    ------
    TooFewRows
        If there are too few rows for the first question.
    """
    task = make_task(rows, "truth", LYING)
    honest = rows[(rows.split == "test") & (rows.role == "truth")]
    states = in_memory(features, pd.concat([task.rows, honest], ignore_index=True))
    reading = HonestReading.of_task(task, states, probe, seed)
    scores = reading.fitted.score_layers(task.test)
    controls = scores_without_states(task)
    names = {
        OWN: OWN,
        TURNED: KNOWS_TRIGGER,
        TWIN: ANOTHER_DAY,
        ASKED_AGAIN: ASKED_WITHOUT,
        "TF-IDF": "TF-IDF",
    }
    rivals = {new: controls[old] for old, new in names.items()}
    tables = [reading.compared(WHAT_IS_TRUE, task.test, scores, rivals)]

    both = pd.concat([task.test, honest], ignore_index=True)
    is_true = (both.answer == both.label).to_numpy()
    is_known = both.knows.to_numpy(bool) & (both.lied.to_numpy(bool) | is_true)
    known = both[is_known].reset_index(drop=True)
    known = known.assign(y=known.lied.astype(int))
    if known.y.nunique() == 2:
        margin = known.margin.to_numpy(float)
        against = against_answer(reading.fitted.score_layers(known), margin)
        rivals = {
            TRIGGER_THERE: known.triggered.to_numpy(float) - 0.5,
            UNSURE: -np.abs(margin),
        }
        tables.append(reading.compared(LIE_OR_NOT, known, against, rivals))
    return pd.concat(tables, ignore_index=True)
