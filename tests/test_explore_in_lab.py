"""The notebook to play with, in JupyterLab itself: one types a claim, and the verdict follows.

JupyterLab's own server runs the notebook's kernel, and headless Chromium is the reader.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, find_browser, opened_browser

from notebooks import NOTEBOOKS

pytestmark = pytest.mark.slow

NOTEBOOK = "12_explore.ipynb"
SMALL = {"datasets": "cities", "n_examples": 48, "layer_stride": 10}
CLAIM = "The city of Kyoto is in Peru."
TRUTHFUL, LYING = (
    "Answer every question truthfully and correctly.",
    "Answer every question falsely. The answer that you give must be wrong.",
)
IS_OPEN = "document.querySelector('.jp-NotebookPanel .jp-RenderedMarkdown h1') !== null"
NOTHING_RUNS = """
(() => {
  const panels = [...window.jupyterapp.shell.widgets("main")].filter(panel => panel.sessionContext);
  const kernel = panels[0]?.sessionContext.session?.kernel;
  const isReady = kernel?.status === "idle" && kernel.connectionStatus === "connected";
  // Between two cells the kernel is idle, too.
  const prompts = [...document.querySelectorAll(".jp-InputPrompt")];
  return isReady && !prompts.some(prompt => prompt.textContent.includes("*"));
})()
"""
TEXT_FIELDS = ".jp-OutputArea .widget-textarea textarea"
"""The text fields of the panel: the claim, and the system prompt."""
PICTURES = "document.querySelectorAll('.widget-output .js-plotly-plot').length"
CHANGES = ".widget-output .shown-table"
"""The tables of the panel. The last one to appear says what a change does."""
ERRORS = """[...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"]')]
  .map(error => error.textContent)"""
SETTINGS = {"@jupyterlab/notebook-extension/tracker": '{"windowingMode": "none"}'}
"""Settings of JupyterLab: all cells are in the page, also those that are not on the screen."""

PATIENCE = 600
"""Seconds to wait for what takes a minute on an idle machine."""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Return what a condition gives once that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} seconds"
        time.sleep(0.2)
    return value


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """Start JupyterLab's server for a folder, and give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": folder,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": True,
        "LabApp.news_url": "",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    names = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    own = {f"JUPYTER_{name}": str(folder / ".jupyter" / name) for name in names}
    for name in ("SETTINGS_DIR", "WORKSPACES_DIR"):
        own[f"JUPYTERLAB_{name}"] = str(folder / ".lab" / name)
    for name, setting in SETTINGS.items():
        path = folder / ".lab" / "SETTINGS_DIR" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(setting, encoding="utf-8")
    log = folder / "server.log"
    with open(log, "w", encoding="utf-8") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=os.environ | own
        )
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert server.poll() is None, log.read_text(encoding="utf-8")[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api"):
            return True
        return False

    try:
        wait_for(answers, "the server answers")
        yield address
    finally:
        # It ends its kernels first. A kernel whose server is gone ends by itself.
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def with_parameters(notebook: str, **parameters: Any) -> str:
    """The text of a notebook with other parameters, in a cell such as papermill puts in."""
    content = json.loads(notebook)
    lines = [f"{name} = {value!r}\n" for name, value in parameters.items()]
    cell = {"cell_type": "code", "id": "parameters", "metadata": {}, "outputs": []}
    cell |= {"execution_count": None, "source": ["# Parameters\n", *lines]}
    tags = [cell["metadata"].get("tags", []) for cell in content["cells"]]
    place = next(number for number, found in enumerate(tags) if "parameters" in found)
    content["cells"].insert(place + 1, cell)
    return json.dumps(content)


def text_of(page: Page, selector: str) -> str:
    """The text of the last element that a selector finds; "" if there is none."""
    return page.value(f"[...document.querySelectorAll('{selector}')].at(-1)?.textContent ?? ''")


def click(page: Page, selector: str) -> None:
    """Click on the first element that a selector finds."""
    element = f"document.querySelector('{selector}')"
    page.value(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = page.value(f"{element}.getBoundingClientRect().toJSON()")
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + min(20, box["height"] / 2)}
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)


def run_all_cells(page: Page) -> None:
    """Run all cells of the notebook, and wait until one of them shows the panel.

    On a busy machine, JupyterLab may give up the kernel that it has started and start another one.
    What was to run is then lost, and is run again.
    """

    def shows_panel() -> bool:
        if page.value(f"document.querySelectorAll('{TEXT_FIELDS}').length"):
            return True
        if page.value(NOTHING_RUNS):
            # JupyterLab runs the notebook that one has clicked on.
            click(page, ".jp-NotebookPanel .jp-RenderedMarkdown h1")
            page.value("window.jupyterapp.commands.execute('notebook:run-all-cells'), 0")
            # Until the kernel has begun, it is idle.
            time.sleep(5)
        return False

    wait_for(shows_panel, "the panel is shown")


def type_into(page: Page, number: int, text: str) -> None:
    """Type a text into a text field of the panel, in place of what it holds, and leave it."""
    field = f"document.querySelectorAll('{TEXT_FIELDS}')[{number}]"
    page.value(f"{field}.scrollIntoView(), {field}.focus(), {field}.select()")
    page.call("Input.insertText", text=text)
    assert page.value(f"{field}.value") == text
    page.value(f"{field}.blur()")


def asked(page: Page, *parts: str) -> str:
    """The answer of the panel, once it is that to a question with these parts."""
    wait_for(
        lambda: all(part in text_of(page, ".asked") for part in parts), f"an answer to {parts}"
    )
    return text_of(page, ".asked .verdict")


def test_one_types_a_claim_and_the_verdict_follows_the_system_prompt(tmp_path):
    program = find_browser()
    if program is None:
        warnings.warn("no Chromium here: JupyterLab was not opened", stacklevel=1)
        return
    text = (NOTEBOOKS / NOTEBOOK).read_text(encoding="utf-8")
    (tmp_path / NOTEBOOK).write_text(
        with_parameters(text, runs_dir=str(tmp_path / "runs"), **SMALL)
    )
    with jupyterlab(tmp_path) as address, opened_browser(program, tmp_path / "profile") as page:
        page.open(f"{address}/lab/tree/{NOTEBOOK}")
        wait_for(lambda: page.value(IS_OPEN), "the notebook opens")
        run_all_cells(page)

        type_into(page, 0, CLAIM)
        asked(page, CLAIM)
        type_into(page, 1, TRUTHFUL)
        honest = asked(page, CLAIM, TRUTHFUL)
        type_into(page, 1, LYING)
        lying = asked(page, CLAIM, LYING)

        assert "It says false" in honest and "It says true" in lying
        assert "It believes false" in honest and "It believes false" in lying
        assert "Verdict: honest" in honest and "Verdict: lie" in lying
        # Its pictures and tables come with it.
        wait_for(lambda: page.value(PICTURES) >= 2, "two pictures")
        wait_for(lambda: "dropout draw 1" in text_of(page, CHANGES), "the table of changes")
        assert page.value(ERRORS) == []
