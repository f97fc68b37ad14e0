"""Adapters of peft: where they are, which model they were trained on, how they are laid on it."""

import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from dlk_utils.errors import ModelError
from dlk_utils.models import hub
from dlk_utils.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    is_folder,
    read_json,
    revision_of,
)

# Most add tokens or prefixes to each prompt, and leave the weights as they are. POLY and XLORA mix
# adapters anew for each prompt.
NOT_OF_LAYERS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "XLORA",
)
# Not the optimizer's state of a trainer's checkpoint.
HUB_FILES = ("adapter_*", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm")


@dataclass(frozen=True)
class Adapter:
    """An adapter of peft.

    `source` is an absolute folder or the id of a repository on the hub. `revision` is a hash over
    the files that are read of a folder, or the commit of a repository.
    """

    source: str
    revision: str

    @property
    def name(self) -> str:
        """The name of the folder, or the id on the hub."""
        return Path(self.source).name if is_folder(self.source) else self.source

    def folder(self) -> Path:
        """Return the folder of the adapter's files; those of the hub are downloaded if need be."""
        if is_folder(self.source):
            return Path(self.source)
        try:
            return hub.folder(self.source, self.revision, HUB_FILES)
        except Exception as error:  # Whatever the hub's client finds.
            raise ModelError(
                f"adapter {self.source}: cannot be downloaded ({type(error).__name__}: "
                f"{_short(error)})"
            ) from error


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on, by its name, and a branch, tag or commit of it."""

    name: str
    revision: str | None


def adapter_in(folder: Path) -> Adapter | None:
    """Return the adapter of a folder; None if it holds none."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    return Adapter(str(folder.absolute()), revision_of(folder))


def adapter_on_hub(repo: str, commit: str) -> Adapter | None:
    """Return the adapter of a repository of the hub; None if it holds none."""
    return Adapter(repo, commit) if hub.file(repo, ADAPTER_CONFIG, commit) else None


def base_of(adapter: Adapter) -> Base:
    """Read which model an adapter was trained on.

    Raises
    ------
    ModelError
        If the adapter cannot be used here: its configuration is broken or names no model, its
        weights are missing, or it is of a kind that changes prompts instead of the model.
    """
    folder = adapter.folder()
    config = read_json(folder / ADAPTER_CONFIG)
    where = f"adapter {adapter.name}: {ADAPTER_CONFIG}"
    method = config.get("peft_type")
    if not isinstance(method, str):
        raise ModelError(f"{where}: expected a peft_type such as 'LORA', got {method!r}")
    if method in NOT_OF_LAYERS:
        raise ModelError(
            f"{where}: expected an adapter that changes the model's layers, such as LoRA or IA3, "
            f"got {method}, which acts on each prompt in another way"
        )
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(f"{where}: expected the task_type CAUSAL_LM, got {task!r}")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base.strip():
        raise ModelError(
            f"{where}: expected base_model_name_or_path to name the model that it was trained on, "
            f"got {base!r}; write its hub id or folder there"
        )
    if revision is not None and (not isinstance(revision, str) or ".." in revision):
        raise ModelError(f"{where}: expected a revision of {base}, or null, got {revision!r}")
    if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise ModelError(
            f"adapter {adapter.name}: expected its weights in {' or '.join(ADAPTER_WEIGHTS)}, "
            "got neither file"
        )
    return Base(base, revision)


def lay_on(model: nn.Module, adapter: Adapter, *, merge: bool) -> nn.Module:
    """Lay an adapter on the model that it was trained on, and return the model.

    Merged, it is added to the weights, and the model has the modules that it had before. Otherwise
    it stays beside them, in modules that compute both.

    Raises
    ------
    ModelError
        If its weights cannot be read, do not fit the model, or are not complete.
    """
    # peft warns of what is refused here, and uses a name of transformers that is going away.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = _load(model, adapter)
        if not merge:
            return tuned.get_base_model()
        try:
            return tuned.merge_and_unload()
        except Exception as error:
            raise ModelError(
                f"adapter {adapter.name}: cannot be merged into the model it was trained on "
                f"({_short(error)})"
            ) from error


def _load(model: nn.Module, adapter: Adapter) -> Any:
    from peft import PeftModel

    folder = str(adapter.folder())
    try:
        tuned = PeftModel.from_pretrained(model, folder)
        # Once more, for only this way peft says which weights were missing.
        result = tuned.load_adapter(folder, tuned.active_adapter)
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ModelError(
            f"adapter {adapter.name}: expected a complete file of tensors in "
            f"{' or '.join(ADAPTER_WEIGHTS)}, got one that is cut or holds other things "
            f"({_short(error)})"
        ) from error
    except Exception as error:  # Whatever peft makes of a configuration.
        message = (
            f"adapter {adapter.name}: does not fit the model that its {ADAPTER_CONFIG} names "
            f"({type(error).__name__}: {_short(error)})"
        )
        if re.search("size mismatch.*(embed|lm_head|wte)", str(error)):
            message += (
                "; its embeddings were resized in training: lay it on a base with as many tokens, "
                "save that, and load the result"
            )
        raise ModelError(message) from error
    faults = {
        "lacks weights that its configuration asks for": result.missing_keys,
        "has weights for which the model has no place": result.unexpected_keys,
    }
    for fault, names in faults.items():
        if names:
            raise ModelError(
                f"adapter {adapter.name}: {fault}: {len(names)}, such as {sorted(names)[0]}; "
                "is it the adapter of another model?"
            )
    return tuned


def _short(error: Exception) -> str:
    """The message of an error in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
