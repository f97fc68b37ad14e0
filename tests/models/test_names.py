"""Names of models: what each one means, and what is said about those that mean nothing."""

import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import tiny_checkpoint

from dlk_utils.errors import ModelError
from dlk_utils.models.embedded_model import GGUF_SHA256
from dlk_utils.models.loading import load_spec, resolve

SHA = "a" * 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"))


def refusal(name) -> str:
    with pytest.raises(ModelError) as error:
        resolve(name)
    message = str(error.value)
    assert len(message.splitlines()) <= 5 and len(message) < 2000
    return message


@pytest.mark.parametrize("name", ["", "  ", None, 5, ["gpt2"], True])
def test_what_is_no_name_is_refused(name):
    # Without the types that tests check.
    with pytest.raises(ModelError, match="expected an alias, a hub id or a local folder, got"):
        inspect.unwrap(resolve)(name)


@pytest.mark.parametrize(
    "name", ["/", "/etc", "..", "x" * 300, "a/" * 5000, "a b", "a\0b", "../no"]
)
def test_a_name_that_can_be_no_model_is_refused_without_asking_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = refusal(name)
    assert "cannot be a name on the hub" in message or "no config.json and no adapter" in message


def test_the_working_folder_goes_by_its_own_name(llama, monkeypatch):
    monkeypatch.chdir(llama)
    assert resolve(".").name == str(llama) and resolve(".").source == str(llama)
    assert resolve(llama).name == str(llama)


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "smollm2-liar"])
def test_a_folder_that_is_called_like_an_alias_is_refused_until_one_of_them_is_meant(
    name, llama, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, name)
    assert f"write './{name}' for the folder" in refusal(name)
    assert resolve(f"./{name}").source == str(tmp_path / name)
    (Path(name) / "config.json").unlink()
    if name != "gpt2":
        assert resolve(name).base_revision == GGUF_SHA256


# Repositories of the hub that are not open.


@pytest.fixture
def hub_says(monkeypatch):
    """A function that sets the error with which the hub answers."""
    from huggingface_hub import HfApi, errors

    def set_error(kind: str) -> None:
        def fail(*args, **options):
            response = SimpleNamespace(headers={}, request=None, status_code=403)
            raise getattr(errors, kind)("403 Client Error.", response=response)

        monkeypatch.setattr(HfApi, "repo_info", fail)

    return set_error


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GatedRepoError", "accept its terms on https://huggingface.co/me/secret, and log in with"),
        ("RepositoryNotFoundError", "or it is private: check the name, or log in with"),
    ],
)
def test_a_repository_that_is_not_open_is_refused_with_what_to_do(hub_says, kind, advice):
    hub_says(kind)
    message = refusal("me/secret")
    assert advice in message and "huggingface-cli login" in message


def test_an_index_of_the_hub_cannot_name_files_outside_the_repository(llama, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--me--base" / "snapshots" / SHA
    shutil.copytree(llama, snapshot)
    (snapshot / "model.safetensors").rename(snapshot.parent / "other.safetensors")
    index = '{"metadata": {}, "weight_map": {"lm_head.weight": "../other.safetensors"}}'
    (snapshot / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"'\.\./other\.safetensors'"):
        load_spec(resolve("me/base", dtype="float32"), device="cpu")
