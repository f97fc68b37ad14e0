"""Notebooks run by papermill, as a user would, and what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def papermill(notebook: str, out: Path, **parameters) -> list[str]:
    given = [str(x) for k, v in parameters.items() for x in ("-p", k, v)]
    return [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        f"{notebook}.ipynb",
        str(out),
        *given,
    ]


def run(command: list[str], **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=NOTEBOOKS,
        capture_output=True,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1"} | env,
    )


def said(path: Path) -> str:
    outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
    return "\n".join(
        "".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/markdown", ""))
        for o in outputs
    )
