"""Local folders of models and adapters: which of their files are read, and the hash of those."""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dlk_utils.errors import ModelError
from dlk_utils.provenance import hash_files

LFS_POINTER = b"version https://git-lfs"
MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# In the order in which transformers looks for them: it reads the first that is there.
MODEL_WEIGHTS = ("model.safetensors", INDEX_FILES[0], "pytorch_model.bin", INDEX_FILES[1])
# Configurations, chat templates and tokenizers of every kind.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe")
TEMPLATES_FOLDER = "additional_chat_templates"
# What training and evaluation write next to a model, and no loader reads.
LOGS = ("training.json", "trainer_state.json", "*_results.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "*.spm")


def is_folder(name: str) -> bool:
    """Whether a name is that of a folder; no name, however odd, is an error."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def holds_model(folder: Path) -> bool:
    """Whether a folder holds the configuration of a model or of an adapter."""
    return any((folder / name).is_file() for name in (MODEL_CONFIG, ADAPTER_CONFIG))


def revision_of(folder: Path) -> str:
    """Hash the files of a folder that are read when its model, or adapter, is loaded.

    Other files, such as the optimizer's state, older checkpoints or a `.git`, do not count.

    Raises
    ------
    ModelError
        If its index of weights is broken, or names a file outside the folder or one that is not
        there, or a file is a pointer of Git LFS.
    """
    weights = [folder / name for name in _weights(folder)]
    small = [path for pattern in SMALL_FILES for path in folder.glob(pattern) if path.is_file()]
    read = [path for path in small if not any(path.match(pattern) for pattern in LOGS)]
    _refuse_pointers([*weights, *read])
    return hash_files(folder, {*weights, *read, *folder.glob(f"{TEMPLATES_FOLDER}/*.jinja")})


def _refuse_pointers(paths: Iterable[Path]) -> None:
    """Raise `ModelError` if a file is a pointer of Git LFS, which stands for the real one."""
    for path in paths:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(
                    f"{path.name} in {path.parent.name}: expected the file itself, got a pointer "
                    "of Git LFS; run `git lfs pull` in that folder"
                )


def _weights(folder: Path) -> list[str]:
    """The names of the files that hold the weights of a model or an adapter."""
    if (folder / ADAPTER_CONFIG).is_file():
        names = ADAPTER_WEIGHTS
    else:
        # A configuration may name another file.
        named = read_json(folder / MODEL_CONFIG).get("transformers_weights")
        names = (str(named),) if named else MODEL_WEIGHTS
    first = next((name for name in names if (folder / name).is_file()), None)
    if first is None:
        return []
    refuse_paths([first], folder / MODEL_CONFIG)
    if not first.endswith(".index.json"):
        return [first]
    parts = shards(folder / first)
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder.name}: expected the files of weights that {first} names, "
            f"got none called {', '.join(missing[:5])}; was the folder copied completely?"
        )
    return [first, *parts]


def shards(index: Path) -> list[str]:
    """Return the names of the files that an index of weights refers to.

    Raises
    ------
    ModelError
        If it is not an index, names a file that is not next to it, or one in another folder.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        refuse_paths(names, index)
    except (KeyError, TypeError, AttributeError):
        raise ModelError(
            f"{index.name} in {index.parent.name}: expected an object 'weight_map' with a "
            "file name for each weight"
        ) from None
    return names


def refuse_paths(names: list[str], said_in: Path) -> None:
    """Raise `ModelError` if a file name leads out of the folder, to what was not hashed."""
    for name in names:
        path = PurePosixPath(name)
        outside = path.is_absolute() or ".." in path.parts or "\\" in name
        if outside or PureWindowsPath(name).drive:
            raise ModelError(
                f"{said_in.name} in {said_in.parent.name}: expected names of files in that folder, "
                f"got {name!r}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of JSON; raise `ModelError` if the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"{path.name} in {path.parent.name}: expected a file of JSON, got one that cannot be "
            f"read ({reason})"
        ) from None
    if not isinstance(content, dict):
        raise ModelError(
            f"{path.name} in {path.parent.name}: expected an object, got a {type(content).__name__}"
        )
    return content


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, with its vocabulary."""
    return any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES)


def chat_template_in(folder: Path) -> str | None:
    """Return the chat template of a folder, also where it has no tokenizer; None without one."""
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        try:
            return template_file.read_text(encoding="utf-8")
        except ValueError:
            raise ModelError(
                f"{template_file.name} in {folder.name}: expected text in UTF-8, got something else"
            ) from None
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        # Several templates, by name.
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return template if isinstance(template, str) else None
