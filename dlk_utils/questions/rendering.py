"""Render a chat template in a process of its own, where it cannot hang or fill the memory.

A chat template is a program that comes with a model. It runs in jinja's sandbox, which keeps it
from the files and from Python, but not from looping for ever. So this module is also a script: the
process that renders, one line of JSON for a conversation and one for its text.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlk_utils.errors import TemplateError

MOST_SECONDS = 10.0
"""How long a template may take for one conversation; it is usually under a millisecond."""

MOST_MEMORY = 2**29
"""How many bytes more the process may take for it, on Linux. Elsewhere only the time is limited."""

MOST_CHARACTERS = 100_000
"""How many characters a template may write besides four times those of the conversation."""

_CHECK_SECONDS = 0.2
"""How often it is checked whether a reply is late."""

_START_SECONDS = 120.0
"""How long the process may take to import what it needs, also on a busy machine."""


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation by a chat template, as transformers does.

    Parameters
    ----------
    template
        The chat template, in jinja.
    messages
        The turns, each with `role` and `content`.
    add_generation_prompt
        Whether the template is asked to begin the assistant's turn.
    variables
        What else the template sees, such as the tokenizer's special tokens.

    Returns
    -------
    str
        What the template has written.

    Raises
    ------
    TemplateError
        If the template fails, takes more than `MOST_SECONDS` or `MOST_MEMORY`, or writes more than
        `MOST_CHARACTERS`.
    """
    request = {
        "template": template,
        "messages": list(messages),
        "variables": {**(variables or {}), "add_generation_prompt": add_generation_prompt},
    }
    with _lock:
        reply = _running_process().reply_to(json.dumps(request, default=str), MOST_SECONDS)
    if "error" in reply:
        raise TemplateError(f"expected the model's chat template to render, got {reply['error']}")
    return reply["text"]


class _Renderer:
    """The process that renders, from its start to its end."""

    def __init__(self):
        self.owner = os.getpid()
        # The same packages as here, and one thread: each more would reserve memory of its own.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": path} | threads,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self.is_ready = False
        self.deadline: float | None = None
        self.was_late = False
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def is_usable(self) -> bool:
        # After a fork, two processes would read the same replies.
        return self.owner == os.getpid() and self.process.poll() is None

    def reply_to(self, request: str, seconds: float) -> dict[str, str]:
        """Send a request and return its reply; a process that does not reply is ended."""
        if not self.is_ready:
            if "error" in self._read(None, _START_SECONDS):
                raise TemplateError(
                    "expected a process that renders chat templates, but it ended at once; check "
                    f"that `{Path(sys.executable).name} -c 'import transformers'` works"
                )
            self.is_ready = True
        return self._read(request, seconds)

    def _read(self, request: str | None, seconds: float) -> dict[str, str]:
        self.deadline = time.monotonic() + seconds
        try:
            if request is not None:
                self.process.stdin.write(request + "\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        except BaseException:
            # The reply to an interrupted request must not be read as that to the next one.
            self.close()
            raise
        finally:
            self.deadline = None
        if not line or self.was_late:
            self.close()
        if line:
            return json.loads(line)
        limit = f"no text within {seconds:g} seconds"
        return {"error": limit if self.was_late else "no text (its process crashed)"}

    def _watch(self) -> None:
        """End the process when a reply is late. A pipe cannot be read with a limit everywhere."""
        while self.process.poll() is None:
            time.sleep(_CHECK_SECONDS)
            deadline = self.deadline
            if deadline is not None and time.monotonic() > deadline:
                self.was_late = True
                self.process.kill()

    def close(self) -> None:
        """End the process, unless it belongs to the process that this one was forked from."""
        if self.is_usable:
            self.process.kill()
        if self.owner == os.getpid():
            self.process.wait()


_lock = threading.Lock()
_renderer: _Renderer | None = None


def _running_process() -> _Renderer:
    global _renderer
    if _renderer is None or not _renderer.is_usable:
        if _renderer is None:
            atexit.register(_close)
        _renderer = _Renderer()
    return _renderer


def _close() -> None:
    _renderer.close()


def _serve() -> None:
    """Answer requests until there are no more: what the process that renders does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # Nothing but replies goes out, whatever a library prints.
    replies, sys.stdout = sys.stdout, sys.stderr
    _limit_memory()
    print(json.dumps({"text": "ready"}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            [text], _ = render_jinja_template(
                conversations=[request["messages"]],
                chat_template=request["template"],
                **request["variables"],
            )
            reply = {"text": text}
            most = MOST_CHARACTERS + 4 * len(json.dumps(request["messages"]))
            if len(text) > most:
                reply = {"error": f"{len(text):,} characters (at most {most:,})"}
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")[:160]
            reply = {"error": f"{type(error).__name__}: {first_line}".removesuffix(": ")}
        print(json.dumps(reply), file=replies, flush=True)


def _limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        most = int(statm.read_text().split()[0]) * resource.getpagesize() + MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    _serve()
