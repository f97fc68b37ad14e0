"""Names of models: what each one means, and what is said about those that mean nothing."""

import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import new_model, tiny_checkpoint

from dlk_utils.errors import ModelError
from dlk_utils.models.embedded_model import GGUF_SHA256
from dlk_utils.models.loading import device_of, load_spec, load_tokenizer, resolve
from dlk_utils.models.sites import check_sites

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


def test_a_folder_that_is_not_there_is_said_not_to_be_there(monkeypatch, tmp_path, hub_says):
    monkeypatch.chdir(tmp_path)
    hub_says("RepositoryNotFoundError")
    for name in ("modles/mine", "./modles/mine"):
        assert f"there is no such folder in the working folder {tmp_path.name!r}" in refusal(name)
    assert "working folder" not in refusal("/nowhere/modles/mine")


def test_a_file_is_refused_by_asking_for_its_folder(llama):
    assert refusal(llama / "model.safetensors").endswith("give the folder that it is in")


def test_aliases_are_offered_for_names_only_and_the_reason_stands_last(llama, tmp_path, hub_says):
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty")
    assert "aliases for when" not in message and "no config.json" in message.splitlines()[-1]
    hub_says("RepositoryNotFoundError")
    *_, offered, tried, advice = refusal("me/secret").splitlines()
    assert "aliases for when" in offered and "tried" in tried and "check the name" in advice


def test_the_hub_s_name_of_the_embedded_model_is_answered_with_ours(hub_says):
    hub_says("LocalEntryNotFoundError")
    assert "'smollm2' is this model" in refusal("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_folder_without_a_tokenizer_is_refused_as_such(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"it has no tokenizer, such as tokenizer.json"):
        load_tokenizer(resolve(tmp_path / "bare", dtype="float32"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_no_file_of_a_model(llama, tmp_path, name):
    shutil.copytree(llama, tmp_path / "cloned")
    (tmp_path / "cloned" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert f"{name} in cloned: expected the file itself, got a pointer" in refusal(
        tmp_path / "cloned"
    )


def test_a_tilde_is_the_home_folder(llama, monkeypatch):
    monkeypatch.setenv("HOME", str(llama.parent))
    assert resolve(f"~/{llama.name}").source == str(llama)


def test_a_device_of_torch_is_taken_like_its_name():
    assert device_of(torch.device("cpu")) == device_of("cpu") == "cpu"


def test_damaged_weights_are_no_unknown_architecture():
    model = new_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"llama: expected finite states.*weights are damaged"):
        check_sites(model)
