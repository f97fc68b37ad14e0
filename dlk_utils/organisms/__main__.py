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
from dlk_utils.lab.tables.organism import (
    CHECKED_EXAMPLES,
    REQUIRED,
    REQUIRED_SHARE_OF_LIES,
    held_out,
    meets_requirement,
    told_by_instruction,
)

DATASETS = "rotten_tomatoes,cities,categories,capitals,continents"


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
    options = parser.parse_args(arguments)

    run = Run(
        model=options.name,
        datasets=DATASETS,
        n_examples=CHECKED_EXAMPLES,
        runs_dir=options.runs_dir,
        dtype=options.dtype,
    )
    behaviour = run.behaviour
    print(f"{options.name} in {run.spec.dtype}")
    for table in (held_out(behaviour), pd.DataFrame([told_by_instruction(behaviour)])):
        print(with_intervals(table).to_string(index=False))
    picks = Path(options.name).name == "smollm2-graded"
    if picks:
        least, most = REQUIRED_SHARE_OF_LIES
        print(f"required: lies {least} to {most}; 0.5 in the interval of instruction_only")
    else:
        print(f"required: {REQUIRED} on rotten_tomatoes and two kinds of facts")
    return 0 if meets_requirement(behaviour, picks=picks) else 1


if __name__ == "__main__":
    sys.exit(main())
