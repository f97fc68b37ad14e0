"""Open a page in headless Chromium, and see what it did: by the DevTools protocol."""

import contextlib
import functools
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-allow-origins=*",
    "--window-size=1300,1300",
]


def find_browser() -> str | None:
    """The path of a Chromium, or of a Chrome; None if this machine has none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """A page that was opened, and what happened on it so far."""

    connection: Any
    events: list[dict] = field(default_factory=list)
    n_calls: int = 0

    def call(self, method: str, **parameters: Any) -> dict:
        self.n_calls += 1
        message = {"id": self.n_calls, "method": method, "params": parameters}
        self.connection.send(json.dumps(message))
        while True:
            answer = json.loads(self.connection.recv())
            if answer.get("id") == self.n_calls:
                return answer["result"]
            self.events.append(answer)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression, or its promise, gives as JSON; of an error, its words."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        return answer["result"].get("value", answer["result"].get("description"))

    def resize(self, width: int, height: int = 1300) -> None:
        """Make the window as wide as that, in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        time.sleep(0.3)

    def open(self, url: str) -> None:
        """Go to an address, and wait until all is loaded and scripts had a second."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        deadline = time.time() + 60
        while self.value("document.readyState") != "complete" and time.time() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        self.value("0")  # which takes in the events until now

    @property
    def requests(self) -> list[str]:
        found = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [event["request"]["url"] for event in found]

    @property
    def errors(self) -> list[str]:
        """Uncaught exceptions, and what the console has as errors."""
        found = []
        for event in self.events:
            about = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(about["exceptionDetails"].get("exception", {}).get("description", ""))
            elif event["method"] == "Log.entryAdded" and about["entry"]["level"] == "error":
                found.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
            elif event["method"] == "Runtime.consoleAPICalled" and about["type"] == "error":
                found.append(str(about["args"]))
        return found


@contextlib.contextmanager
def opened_browser(program: str, profile: Path) -> Iterator[Page]:
    """Start a browser, whose files go into the folder `profile`, with one empty page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, *OPTIONS, f"--user-data-dir={profile}", f"--remote-debugging-port={port}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "about:blank"], **quiet)
    try:
        page = Page(websocket.create_connection(_address(port), timeout=120))
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        yield page
        page.connection.close()
    finally:
        process.terminate()
        process.wait(30)


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the files of a folder on this machine, and give the address."""
    handler = functools.partial(_QuietHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _address(port: int) -> str:
    """The address of the page's socket, once the browser answers."""
    deadline = time.time() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            return pages[0]["webSocketDebuggerUrl"]
        except (OSError, IndexError):
            if time.time() > deadline:
                raise
            time.sleep(0.2)
