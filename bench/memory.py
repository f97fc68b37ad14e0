"""Measure the memory that a computation takes at its peak, in a process of its own. Linux only."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def in_own_process(script: str, *arguments: Any) -> dict[str, float]:
    """Run a script of Python, and return the JSON object that it prints on its last line."""
    command = [sys.executable, script, *map(str, arguments)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def extra_peak(run: Callable[[], Any]) -> int:
    """Return the bytes by which this process grows, at its peak, while `run` computes something.

    The kernel keeps the peak, so no short one is missed. `resource.getrusage` gives the same
    number, but cannot be set back: it would include the loading of the model, and the memory of the
    process that started this one.
    """
    before = _bytes("VmRSS")
    RESET.write_text("5")
    run()
    return _bytes("VmHWM") - before


def _bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())[1])
