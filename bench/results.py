"""The threads and the prompts of the benchmarks; what one measured, kept beside the machine it was measured on; and the page of the book that shows it."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.prompts import make_prompts

THREADS = 2
torch.set_num_threads(THREADS)
SAME = 0.99999
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "book" / "speed.md"


def machine() -> str:
    """The processor by its own name, and the threads that torch uses."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.is_file()
        else []
    )
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def prompt_rows(tokenizer, kind: str, n_examples: int) -> tuple[pd.DataFrame, str]:
    """Prompts about short reviews and what they are, for a title: without shots, with two under the "mixed" library, or with two under one template and "one" pair of instructions."""
    options, said = {
        "plain": ({}, "no shots"),
        "mixed": ({"n_shots": 2}, "two shots, all instructions and templates"),
        "one": (
            {
                "n_shots": 2,
                "n_known": 0,
                "templates": ["review_sentiment"],
                "families": ["charity"],
            },
            "two shots, one template and a pair of instructions",
        ),
    }[kind]
    rows = make_prompts(
        load_examples("rotten_tomatoes", n_examples), tokenizer, **options
    ).set_index("row_id", drop=False)
    return rows, f"{len(rows)} prompts of {rows.input_ids.map(len).mean():.0f} tokens, {said}"


def save(name: str, title: str, table: pd.DataFrame, **libraries: str) -> None:
    """Print a table and keep it; `libraries` are others that took part, with their versions. Raises `ValueError` where a way did not give the values of the reference: its speed does not count."""
    cosine = table["least cosine"].dropna() if "least cosine" in table else pd.Series(dtype=float)
    if (cosine < SAME).any():
        raise ValueError(
            f"{title}: expected every way to give the same values (cosine at least {SAME}), got {cosine[cosine < SAME].to_dict()}"
        )
    print(f"\n{title}\n{machine()}\n{table.round(4).to_string()}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"{name}.csv")
    record = {
        "title": title,
        "machine": machine(),
        "transformers": version("transformers"),
        **libraries,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def markdown(table: pd.DataFrame) -> str:
    """With three digits, and nothing where there is no value."""
    digits = lambda x: (
        ("" if pd.isna(x) else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}")
        if isinstance(x, float)
        else x
    )
    return (
        table.map(digits)
        .rename_axis(table.index.name or " ")
        .to_markdown(disable_numparse=True, colalign=["left", *["right"] * table.shape[1]])
    )


def page(intro: str, notes: dict[str, str]) -> None:
    """Write `book/speed.md` from all that is kept; `notes` has what there is to say of each table, in the order of the page."""
    parts = [intro]
    for name, note in notes.items():
        if (RESULTS / f"{name}.json").is_file():
            record = json.loads((RESULTS / f"{name}.json").read_text())
            table = pd.read_csv(RESULTS / f"{name}.csv", index_col=0)
            versions = ", ".join(
                f"{k} {v}" for k, v in record.items() if k not in ("title", "machine")
            )
            parts.append(
                f"## {record['title']}\n\n{note}\n\n{markdown(table)}\n\n*{record['machine']}, {versions}.*"
            )
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
