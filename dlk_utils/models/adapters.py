"""Adapters of peft: find one, read which model it was trained on, and apply it to that model.

`adapter_in` and `adapter_on_hub` find an adapter, `base_of` checks it and names its model, and
`lay_on` applies it.
"""

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
"""Methods of peft that are refused, because they do not change the model's layers, or not always.

POLY and XLORA mix adapters anew for each prompt. The others add tokens or prefixes to each prompt,
and leave the weights as they are.
"""

HUB_FILES = ("adapter_*", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm")
"""Patterns of the files that are downloaded: the adapter and its tokenizer.

A repository may also hold checkpoints of the training, whose optimizer states are large.
"""


@dataclass(frozen=True)
class Adapter:
    """An adapter of peft, in a folder or on the hub.

    Attributes
    ----------
    source
        The absolute path of the folder, or the id of the repository.
    revision
        A hash over the files of the folder that are read, or the commit of the repository.
    """

    source: str
    revision: str

    @property
    def name(self) -> str:
        """The name of the folder, or the id on the hub."""
        return Path(self.source).name if is_folder(self.source) else self.source

    def folder(self) -> Path:
        """Return the folder with the adapter's files; download them if they are on the hub only.

        Raises
        ------
        ModelError
            If they cannot be downloaded.
        """
        if is_folder(self.source):
            return Path(self.source)
        try:
            return hub.folder(self.source, self.revision, HUB_FILES)
        # The hub's client raises errors of many kinds.
        except Exception as error:
            raise ModelError(
                f"adapter {self.source}: cannot be downloaded ({type(error).__name__}: "
                f"{_short(error)})"
            ) from error


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on.

    Attributes
    ----------
    name
        Its id on the hub, or its folder.
    revision
        A branch, tag or commit; None for the default one.
    """

    name: str
    revision: str | None


def adapter_in(folder: Path) -> Adapter | None:
    """Return the adapter that a folder holds; None if it holds none."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    return Adapter(str(folder.absolute()), revision_of(folder))


def adapter_on_hub(repo: str, commit: str) -> Adapter | None:
    """Return the adapter that a repository on the hub holds; None if it holds none."""
    if not hub.file(repo, ADAPTER_CONFIG, commit):
        return None
    return Adapter(repo, commit)


def base_of(adapter: Adapter) -> Base:
    """Check an adapter's configuration, and return the model that it was trained on.

    Raises
    ------
    ModelError
        If the adapter cannot be used: its configuration is broken or names no model, its weights
        are missing, it is not for a causal language model, or its method does not change the
        model's layers (`NOT_OF_LAYERS`).
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
    """Apply an adapter to the model that it was trained on, and return the adapted model.

    Parameters
    ----------
    merge
        Add the adapter to the weights, so that the model has the same modules as before. Otherwise
        the modules that it changes are wrapped in others, which compute both.

    Raises
    ------
    ModelError
        If its weights cannot be read, do not fit the model, are not complete, or cannot be merged.
    """
    # The warnings of peft are about faults that raise an error here, and about its own use of a
    # deprecated name of transformers.
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
    """Return the `PeftModel` of a model and an adapter; raise `ModelError` if they do not fit."""
    from peft import PeftModel

    folder = str(adapter.folder())
    try:
        tuned = PeftModel.from_pretrained(model, folder)
        # Load the weights a second time, because only this method reports missing ones.
        result = tuned.load_adapter(folder, tuned.active_adapter)
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ModelError(
            f"adapter {adapter.name}: expected a complete file of tensors in "
            f"{' or '.join(ADAPTER_WEIGHTS)}, got one that is cut off or of another kind "
            f"({_short(error)})"
        ) from error
    # With a configuration that does not fit the model, peft raises errors of many kinds.
    except Exception as error:
        message = (
            f"adapter {adapter.name}: does not fit the model that its {ADAPTER_CONFIG} names "
            f"({type(error).__name__}: {_short(error)})"
        )
        if re.search("size mismatch.*(embed|lm_head|wte)", str(error)):
            message += (
                "; its embeddings were resized in training: put the adapter on a base model with "
                "as many tokens, save that, and load the result"
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
    """Return the message of an error in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
