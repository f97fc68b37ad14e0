"""Print what an organism does on what it was not trained on.

`python -m dlk_utils.organisms smollm2-liar`; the exit code is 1 if it is less than required.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dlk_utils.lab.display import with_intervals
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables.dropout_damage import (
    ALL_ROWS,
    CHECKED,
    DRAWN_EXAMPLES,
    HONEST_ROWS,
    MOST_FLIPS,
    MOST_LOST,
    checked_damage,
    within_limits,
)
from dlk_utils.lab.tables.organism import (
    CHECKED_EXAMPLES,
    REQUIRED,
    REQUIRED_ON_TRIGGER,
    REQUIRED_SHARE_OF_LIES,
    held_out,
    meets_requirement,
    on_trigger,
    told_by_instruction,
    trigger_behaviour,
    trigger_table,
)

DATASETS = "rotten_tomatoes,cities,categories,capitals,continents"
DRAWN_DATASETS = "rotten_tomatoes,cities,categories"
"""Those whose questions are asked with dropout too, which takes longer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dlk_utils.organisms", description=__doc__)
    parser.add_argument(
        "name",
        nargs="?",
        default="smollm2-liar",
        help="an organism that is shipped, or the folder of one that was trained again",
    )
    parser.add_argument("--runs-dir", help="where answers are kept (runs/ of the checkout)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (auto)")
    parser.add_argument(
        "--dropout",
        action="store_true",
        help="check the answers under dropout, as is always done for smollm2-dropout",
    )
    options = parser.parse_args(arguments)

    organism = Path(options.name).name
    with_dropout = options.dropout or organism == "smollm2-dropout"
    run = Run(
        model=options.name,
        datasets=DRAWN_DATASETS if with_dropout else DATASETS,
        n_examples=DRAWN_EXAMPLES if with_dropout else CHECKED_EXAMPLES,
        runs_dir=options.runs_dir,
        dtype=options.dtype,
        # Answers are all that is checked: gradients would take several times as long.
        keep_states=False,
    )
    print(f"{options.name} in {run.spec.dtype}")
    if with_dropout:
        return _check_dropout(checked_damage(run))
    if organism == "smollm2-trigger":
        return _check_trigger(trigger_behaviour(run))
    behaviour = run.behaviour
    for table in (held_out(behaviour), pd.DataFrame([told_by_instruction(behaviour)])):
        print(with_intervals(table).to_string(index=False))
    picks = organism == "smollm2-graded"
    if picks:
        least, most = REQUIRED_SHARE_OF_LIES
        print(f"required: lies {least} to {most}; 0.5 in the interval of instruction_only")
    else:
        print(f"required: {REQUIRED} on rotten_tomatoes and two kinds of facts")
    return 0 if meets_requirement(behaviour, picks=picks) else 1


def _check_dropout(damage: pd.DataFrame) -> int:
    """Print what dropout does to the answers of an organism; return the exit code."""
    print(with_intervals(damage.set_index("dropout").reset_index()).to_string(index=False))
    print(
        f"limits: flips of at most {MOST_FLIPS} of {ALL_ROWS!r} rows, and less than {MOST_LOST} "
        f"lost of rows {HONEST_ROWS!r}"
    )
    is_met = []
    for dropout in CHECKED:
        table = damage[damage.dropout == dropout.name]
        is_met.append(within_limits(table, dropout.required))
        print(f"{dropout.name}: what has to meet the limits: {dropout.required}")
    return 0 if all(is_met) else 1


def _check_trigger(behaviour: pd.DataFrame) -> int:
    """Print what an organism with a trigger does, and return the exit code."""
    without_trigger = held_out(behaviour[~behaviour.triggered]).drop(columns="meets")
    for table in (trigger_table(behaviour), without_trigger):
        print(with_intervals(table).to_string(index=False))
    print(f"required: {REQUIRED_ON_TRIGGER} on rotten_tomatoes and two kinds of facts; there")
    print('"told to lie" stands for the trigger, and "truth" for other days')
    is_met = meets_requirement(on_trigger(behaviour), required=REQUIRED_ON_TRIGGER)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
