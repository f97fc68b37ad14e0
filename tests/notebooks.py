"""Run notebooks by papermill, as a user would, and read what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dlk_utils.lab.book import KERNEL_DIED, MAX_STARTS

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def papermill(notebook: str, out: Path, **parameters: Any) -> list[str]:
    """The command that runs a notebook of `NOTEBOOKS` and writes it to `out`."""
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        f"{notebook}.ipynb",
        str(out),
    ]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    return command


def run(command: list[str], **env: str) -> subprocess.CompletedProcess:
    """Run a command in the folder of the notebooks.

    The ports of a kernel are chosen before it opens them. If another process was faster, the kernel
    ends before it has run anything, and is started again.
    """
    env = os.environ | {"TQDM_DISABLE": "1"} | env
    for _ in range(MAX_STARTS):
        done = subprocess.run(command, cwd=NOTEBOOKS, capture_output=True, text=True, env=env)
        if KERNEL_DIED not in done.stderr:
            break
    return done


def text_outputs(path: Path) -> str:
    """What the cells of a notebook that was run print and show as text."""
    texts = []
    for cell in json.loads(path.read_text())["cells"]:
        for output in cell.get("outputs", []):
            texts += [*output.get("text", ""), *output.get("data", {}).get("text/markdown", "")]
    return "".join(texts)
