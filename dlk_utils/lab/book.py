"""Run the notebooks in their order, and build the book. It needs no make.

``python -m dlk_utils.lab.book`` does what ``make book`` does, in an environment that has this
package with ``[notebooks]``. With ``-p NAME VALUE``, as papermill has it, the notebooks run with
other parameters. With ``--only 01 02 --to FOLDER``, some of them run, and no pages are built.
"""

import argparse
import graphlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from dlk_utils.errors import BookError
from dlk_utils.lab.escaping import without_folders

NOTEBOOKS = {
    "01_make_dataset": (),
    "00_train_liar": (),
    "02_check_lie_rate": ("01_make_dataset",),
    # It could start at once. But most others wait for 02, which should not be last.
    "07_traps": ("00_train_liar",),
    "03_extract": ("02_check_lie_rate",),
    "05_probe_ablations": ("03_extract",),
    "09_pairs_and_votes": ("05_probe_ablations",),
    "04_extract_grads": ("02_check_lie_rate",),
    "06_detect": ("02_check_lie_rate",),
    "08_carry_over": ("02_check_lie_rate",),
    "10_headlines": ("08_carry_over", "09_pairs_and_votes"),
    "11_steer": ("02_check_lie_rate",),
    # It reads the detector that 06 keeps.
    "12_explore": ("06_detect",),
    # It has a model of its own, and waits for nothing that others keep.
    "13_dropout_trial": ("01_make_dataset",),
}
"""Those that each notebook waits for, as it reads their files. The first that may start, starts."""
SMALL = {
    "": {"n_examples": 16},
    "00_train_liar": {"n_examples": 8},
    "02_check_lie_rate": {"n_grid": 4},
    "03_extract": {"audit_rows": 4},
    "05_probe_ablations": {"layer_stride": 10},
    "06_detect": {"layer_stride": 10},
    "08_carry_over": {"layer_stride": 10, "n_graded": 8},
    "09_pairs_and_votes": {"layer_stride": 10, "n_draws": 4},
    "10_headlines": {"layer_stride": 10, "n_draws": 4},
    "11_steer": {"layer_stride": 10, "n_random": 1},
    "12_explore": {"layer_stride": 10},
    "13_dropout_trial": {"layer_stride": 10, "n_draws": 4, "n_prompt_draws": 2},
}
"""The parameters of the small size that the check runs: of all notebooks, and of each."""
WIDGET = "application/vnd.jupyter.widget-view+json"
JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"
NEEDED = ("papermill", "ipykernel", "myst_nb", "jupyter_book", "sphinx_book_theme")
"""Packages of ``[notebooks]``."""
KERNEL_DIED = "Kernel died before replying to kernel_info"
MAX_STARTS = 3
"""How often a notebook is started whose kernel dies before it runs anything.

The ports of a kernel are chosen before it opens them, and another process may be faster.
"""


def run_all(
    after: Mapping[str, Sequence[str]], run: Callable[[str], None], *, n_jobs: int = 2
) -> None:
    """Call `run` with each name, several at a time, and each after those that it waits for.

    Of those that may start, the one that comes first in `after` does. After an error no other one
    starts, and the error is raised when the running ones have ended.
    """
    order = list(after)
    sorter = graphlib.TopologicalSorter(after)
    sorter.prepare()
    ready, running = [], {}
    with ThreadPoolExecutor(n_jobs) as pool:
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=order.index)
            while ready and len(running) < n_jobs:
                name = ready.pop(0)
                running[pool.submit(run, name)] = name
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                sorter.done(running.pop(done))


def run_notebook(name: str, top: Path, to: Path, parameters: Sequence[str]) -> None:
    """Run a notebook of the checkout `top`, and put it into the folder `to` when it is complete.

    Raises
    ------
    BookError
        If a cell fails; the error ends with the last lines of the log.
    """
    build = top / "build"
    aside, log = build / f"{name}.ipynb", build / f"{name}.log"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    command += [f"{name}.ipynb", str(aside), *parameters]
    # Each may use all cores, but waits without holding one: two that spin share them badly.
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    print(name, *parameters, flush=True)
    for start in range(1, MAX_STARTS + 1):
        try:
            _run(command, log, cwd=top / "notebooks", env=env)
            break
        except BookError as error:
            if start == MAX_STARTS or KERNEL_DIED not in str(error):
                raise
    os.replace(aside, to / aside.name)


def build_pages(top: Path) -> Path:
    """Build the HTML pages of ``book/`` from notebooks that have run, and return the first page.

    Raises
    ------
    BookError
        If jupyter-book fails, or warns.
    """
    plotly = Path(importlib.util.find_spec("plotly").submodule_search_locations[0])
    assets = top / "book" / "_assets"
    assets.mkdir(exist_ok=True)
    shutil.copy(plotly / "package_data" / "plotly.min.js", assets)
    for notebook in (top / "book" / "notebooks").glob("*.ipynb"):
        hide_folders(notebook)
        drop_widgets(notebook)
    # A page that once failed to build is not looked at again by an incremental build.
    shutil.rmtree(top / "_build", ignore_errors=True)
    command = [sys.executable, "-c", JUPYTER_BOOK, "build", "book", "-W", "--keep-going"]
    _run(command, top / "build" / "book.log", cwd=top)
    return top / "_build" / "html" / "index.html"


def hide_folders(notebook: Path) -> None:
    """Take the folders of this machine out of what a notebook says of its parameters.

    The page then shows the names of files alone.
    """
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["source"] = [without_folders(line) for line in cell["source"]]
    content["metadata"].pop("papermill", None)
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def drop_widgets(notebook: Path) -> None:
    """Leave progress bars and other widgets out of a notebook that has run.

    They work in JupyterLab alone, and a page with them would ask the internet for their scripts.
    """
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [
                output for output in cell["outputs"] if WIDGET not in output.get("data", {})
            ]
    content["metadata"].pop("widgets", None)
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _run(command: Sequence[str], log: Path, **options) -> None:
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise BookError("\n".join([*lines[-40:], f"{log.stem} failed: see {log}"]))


def _checkout() -> Path:
    """The checkout that the command runs in, or else the one that this package lies in."""
    for top in (Path.cwd(), Path.cwd().parent, Path(__file__).resolve().parents[2]):
        if (top / "notebooks" / f"{min(NOTEBOOKS)}.ipynb").is_file():
            return top
    raise BookError(
        "expected a checkout of dlk_utils, because the installed package has no notebooks; clone "
        "the repository, and run this at the top of the checkout"
    )


def _require_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BookError(
            f"{sys.executable} has no {', '.join(missing)}; at the top of the checkout, run: "
            f'"{sys.executable}" -m pip install -c constraints.txt -e ".[notebooks]"'
        )


def chosen(beginnings: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the notebooks whose names begin so, each with those of them that it waits for.

    Raises
    ------
    BookError
        If there is none for one of the beginnings.
    """
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in NOTEBOOKS):
            raise BookError(
                f"--only: expected beginnings of {', '.join(NOTEBOOKS)}, got {beginning!r}"
            )
    names = [name for name in NOTEBOOKS if name.startswith(tuple(beginnings))]
    return {name: tuple(other for other in NOTEBOOKS[name] if other in names) for name in names}


def absolute_paths(value: str) -> str:
    """Make the paths among the values of a parameter absolute: notebooks run in another folder."""
    parts = value.split(",")
    are_paths = [os.sep in part or Path(part).is_file() for part in parts]
    return ",".join(
        str(Path(part).resolve()) if is_path and Path(part).exists() else part
        for part, is_path in zip(parts, are_paths, strict=True)
    )


def _arguments(name: str, options: argparse.Namespace) -> list[str]:
    """The parameters of a notebook, as papermill takes them; those that are given come last."""
    small = SMALL[""] | SMALL.get(name, {}) if options.small else {}
    own = [[key, absolute_paths(value)] for key, value in options.parameters]
    given = [*([key, str(value)] for key, value in small.items()), *own]
    return [word for pair in given for word in ("-p", *pair)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dlk_utils.lab.book",
        description="Run the notebooks in their order, and build the book.",
    )
    parser.add_argument(
        *("-p", "--parameters"),
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of every notebook",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="NAME",
        help="how the names of the notebooks begin that are run, such as 01 02 (with --to)",
    )
    parser.add_argument("--small", action="store_true", help="run the small size of the check")
    parser.add_argument("--to", type=Path, help="put the notebooks there, and build no pages")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time (default: 2)")
    options = parser.parse_args(arguments)
    try:
        _require_packages()
        notebooks = chosen(options.only)
        if len(notebooks) < len(NOTEBOOKS) and not options.to:
            raise BookError("--only: expected --to FOLDER too, as the pages need every notebook")
        top = _checkout()
        to = options.to.resolve() if options.to else top / "book" / "notebooks"
        for folder in (to, top / "build"):
            folder.mkdir(parents=True, exist_ok=True)

        def run(name: str) -> None:
            run_notebook(name, top, to, _arguments(name, options))

        run_all(notebooks, run, n_jobs=options.jobs)
        if not options.to:
            print("open", build_pages(top))
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
