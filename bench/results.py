"""What a benchmark measured, kept beside the machine it was measured on, and the page of the book that shows it."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "book" / "speed.md"


def machine() -> str:
    """The processor by its own name, and the threads that torch uses."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def save(name: str, title: str, table: pd.DataFrame, **libraries: str) -> None:
    """Print a table and keep it; `libraries` are others that took part, with their versions."""
    print(f"\n{title}\n{machine()}\n{table.round(4).to_string()}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"{name}.csv")
    record = {"title": title, "machine": machine(), "transformers": version("transformers"), **libraries}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def page(intro: str, notes: dict[str, str]) -> None:
    """Write `book/speed.md` from all that is kept; `notes` has what there is to say of each table, in the order of the page."""
    parts = [intro]
    for name, note in notes.items():
        if (RESULTS / f"{name}.json").is_file():
            record = json.loads((RESULTS / f"{name}.json").read_text())
            table = pd.read_csv(RESULTS / f"{name}.csv", index_col=0)
            versions = ", ".join(f"{k} {v}" for k, v in record.items() if k not in ("title", "machine"))
            parts.append(f"## {record['title']}\n\n{note}\n\n{table.to_markdown(floatfmt='.3g')}\n\n*{record['machine']}, {versions}.*")
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
