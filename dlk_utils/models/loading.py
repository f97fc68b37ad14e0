"""Load a model by name: the embedded one, an alias of `models.yaml`, a hub id or a local folder."""

import functools
import json
import logging
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from torch import Tensor, nn

from dlk_utils.errors import ModelError
from dlk_utils.models import hub
from dlk_utils.models.adapters import Adapter, adapter_in, adapter_on_hub, base_of, lay_on
from dlk_utils.models.configuration import model_class, text_config
from dlk_utils.models.embedded_model import GGUF_SHA256, embedded_model
from dlk_utils.models.folders import (
    INDEX_FILES,
    chat_template_in,
    has_tokenizer,
    holds_model,
    is_folder,
    revision_of,
    shards,
)
from dlk_utils.models.sites import check_sites
from dlk_utils.models.weights import copy_into_memory, refuse_other_weights

ORGANISMS = Path(__file__).parent.parent / "organisms"
EMBEDDED = "smollm2"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The embedded model in full precision, as adapters that were trained on it name their base."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides what a loaded model computes, known before its weights are read.

    `name` is what the user called the model, and `source` a local folder or the id of a repository
    on the Hugging Face hub. `base_revision` is the sha256 of the embedded file, the commit of a hub
    repository, or a hash over the files of a local folder. `chat_format` names the chat template
    (see `chat_formats`) for a tokenizer that has none. `adapters` are put on the model one after
    the other: the first was trained on it, the next on the result, and so on.
    """

    name: str
    source: str
    base_revision: str
    dtype: str
    quantization: str | None
    chat_format: str | None
    adapters: tuple[Adapter, ...] = ()

    @property
    def revision(self) -> str:
        """What identifies the weights: the revisions of the model and its adapters."""
        return "+".join([self.base_revision, *(adapter.revision for adapter in self.adapters)])

    def adapter_folders(self) -> list[Path]:
        """Return the folder of each adapter; those of the hub are downloaded if need be."""
        return [adapter.folder() for adapter in self.adapters]

    def record(self) -> dict:
        """Return the spec as it is stored with results: folders by name, chat format by text."""
        is_local = is_folder(self.source)
        return {
            "name": self.name,
            "source": Path(self.source).name if is_local else self.source,
            "revision": self.revision,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "chat_format": self.chat_format and chat_formats()[self.chat_format],
            "adapters": [adapter.name for adapter in self.adapters],
        }


def organism_names() -> list[str]:
    """List the adapters that come with this package: models that lie by construction."""
    return sorted(path.parent.name for path in ORGANISMS.glob("*/adapter_config.json"))


@functools.cache
def registry() -> dict[str, dict]:
    """Return `models.yaml`: hub id, quantization, chat format and a note for each alias."""
    return _read_yaml("models.yaml")


@functools.cache
def chat_formats() -> dict[str, str]:
    """Return `chat_formats.yaml`: chat templates, by name, for tokenizers that have none."""
    return _read_yaml("chat_formats.yaml")


def _read_yaml(name: str) -> dict:
    return yaml.safe_load(files("dlk_utils.models").joinpath(name).read_text(encoding="utf-8"))


def load_model(
    name: str | os.PathLike,
    *,
    quantization: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "auto",
) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer.

    The code that comes with some models is never run: only architectures of transformers are used.

    Parameters
    ----------
    name
        ``"smollm2"`` or one of `organism_names` (these need no hub), an alias of `registry`, the id
        of a model on the Hugging Face hub, or a local folder. The id or folder may also belong to
        a peft adapter (LoRA, DoRA, IA3, ...; also a trainer's checkpoint). The base model that it
        was trained on is found in the same ways, and the adapter is merged into its weights, in
        fp32. On a quantised model it stays separate, because rounding to 4 bits would lose most of
        it. The adapter's own tokenizer and chat template are used if it has them.
    quantization
        "8bit", "4bit" (both with bitsandbytes), or None: what `registry` says of the alias, if
        anything.
    dtype
        One of `DTYPES`, or "auto". "auto" is the value of the environment variable ``DLK_DTYPE``
        (float32 or bfloat16) if it is set. Otherwise it is bfloat16 where the hardware is fast in
        it; elsewhere it is float16 on a GPU, and float32 on a CPU or another device.
    device
        "cpu", "cuda", "cuda:1" and so on, "mps", or "auto": a CUDA GPU if there is one, else the
        CPU. On any other kind of device, the model is used only if a short text has the same
        states there as on the CPU, so "mps" has to be asked for.

    Returns
    -------
    model
        In evaluation mode. ``model.spec`` is its `ModelSpec`.
    tokenizer
        One of transformers, with a chat template.

    Raises
    ------
    ModelError
        If the model, the quantization, the dtype or the device is not known or cannot be used.
    UnknownArchitecture
        If the places where activations are read are not known for this kind of model.
    """
    spec = resolve(name, quantization, dtype, device)
    return load_spec(spec, device), load_tokenizer(spec)


def resolve(
    name: str | os.PathLike,
    quantization: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "auto",
) -> ModelSpec:
    """Find out what `load_model` would load with these arguments, without reading any weights.

    Raises
    ------
    ModelError
        If the model is not here and no hub answers, or another argument is not valid.
    """
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if not isinstance(name, str) or not name.strip():
        raise ModelError(
            f"model: expected an alias, a hub id or a local folder, got {name!r}; {_offered()}"
        )
    name = os.path.expanduser(name)
    if quantization not in (None, "8bit", "4bit"):
        raise ModelError(f"quantization: expected None, '8bit' or '4bit', got {quantization!r}")
    if dtype not in ("auto", *DTYPES):
        expected = ", ".join(map(repr, ("auto", *DTYPES)))
        raise ModelError(f"dtype: expected one of {expected}, got {dtype!r}")
    dtype = _auto_dtype(device) if dtype == "auto" else dtype
    if is_folder(name) and Path(name).name in ("", ".."):
        # Such as ".", which says nothing to who reads it later.
        name = str(Path(name).resolve())
    return _resolve(name, None, quantization, dtype, laid_on_it=())


def _resolve(
    name: str,
    revision: str | None,
    quantization: str | None,
    dtype: str,
    laid_on_it: tuple[str, ...],
) -> ModelSpec:
    """Resolve a model, of which a revision may be wanted, for the adapters that are put on it."""
    source = _source_of(name)
    if source in laid_on_it:
        raise ModelError(f"adapter {name}: expected another model as its base, got itself")
    if name == EMBEDDED:
        return ModelSpec(name, source, GGUF_SHA256, dtype, quantization, None)
    if is_folder(source):
        if not holds_model(Path(source)):
            raise _cannot_load(name, source, _nothing_in(Path(source)))
        adapter = adapter_in(Path(source))
        revision = adapter.revision if adapter else revision_of(Path(source))
    else:
        try:
            revision = hub.commit(source, revision=revision)
            adapter = adapter_on_hub(source, revision)
        except Exception as error:  # Whatever the hub's client finds.
            raise _cannot_load(name, source, error) from error
    if adapter is None:
        quantization = quantization or registry().get(name, {}).get("quantization")
        return ModelSpec(name, source, revision, dtype, quantization, _chat_format_of(name))

    wanted = base_of(adapter)
    try:
        base = _resolve(wanted.name, wanted.revision, quantization, dtype, (*laid_on_it, source))
    except ModelError as error:
        hint = ""
        is_relative = not Path(wanted.name).is_absolute()
        if is_relative and is_folder(str(adapter.folder() / wanted.name)):
            hint = "; it is a path relative to the adapter, so write it absolute"
        raise ModelError(
            f"adapter {adapter.name}: cannot load the model that it was trained on, "
            f"{_shortened(wanted.name)!r} (base_model_name_or_path){hint}\n{error}"
        ) from error
    return replace(base, name=name, adapters=(*base.adapters, adapter))


def _source_of(name: str) -> str:
    """Return the absolute folder, or the hub id, that a name means."""
    aliases = registry()
    if name in (EMBEDDED, *organism_names(), *aliases):
        if is_folder(name) and holds_model(Path(name)):
            other = f", and {aliases[name]['hub_id']!r} for the other" if name in aliases else ""
            raise ModelError(
                f"model {name!r}: expected the name of one model, got one that is both ours and a "
                f"folder's; write './{name}' for the folder{other}, or work in another folder"
            )
        if name == EMBEDDED:
            return str(embedded_model())
        return aliases[name]["hub_id"] if name in aliases else str(ORGANISMS / name)
    if is_folder(name):
        # The absolute path, for a worker may have another working folder.
        return str(Path(name).absolute())
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        reason = f"{_no_folder(name)}, and it cannot be a name on the hub ('organisation/model')"
        if os.path.isfile(name):
            reason = "it is a file; give the folder that it is in"
        raise ModelError(
            f"cannot load model {_shortened(name)!r}\n  {_offered()}\n  {reason}"
        ) from None
    return name


def _no_folder(name: str) -> str:
    """Say that there is no folder of this name, and where a relative one was looked for.

    The working folder goes by its name alone: a saved notebook shows nothing of the machine.
    """
    where = "" if Path(name).is_absolute() else f" in the working folder {Path.cwd().name!r}"
    return f"there is no such folder{where}"


def _nothing_in(folder: Path) -> FileNotFoundError:
    """Say that a folder holds no model, and which of the folders in it do."""
    try:
        inside = [path.name for path in sorted(folder.iterdir()) if holds_model(path)]
    except OSError:
        inside = []
    hint = f"; there is one in {', '.join(inside[:5])}" if inside else ""
    return FileNotFoundError(f"it has no config.json and no adapter_config.json{hint}")


def _chat_format_of(name: str) -> str:
    """The format of an alias, a hub id of one, or a folder that is called like one."""
    known = {entry["hub_id"]: entry for entry in registry().values()} | registry()
    entry = known.get(name) or known.get(Path(name).name) or {}
    return entry.get("chat_format") or "plain"


def device_of(name: str | torch.device) -> str:
    """Return the name of the device of torch that is meant: see `load_model`.

    Raises
    ------
    ModelError
        If there is no such device here.
    """
    name = str(name)
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_cuda else "cpu"
    n_gpus = torch.cuda.device_count() if has_cuda else 0
    here = ["cpu", *(["cuda"] if n_gpus else []), *(f"cuda:{i}" for i in range(n_gpus))]
    if torch.backends.mps.is_available():
        here.append("mps")
    if name not in here:
        raise ModelError(
            "device: expected 'auto', 'cpu', 'cuda', 'cuda:1' and so on, or 'mps', "
            f"got {name[:80]!r}; here: {', '.join(here)}"
        )
    return name


def _auto_dtype(device: str | torch.device = "auto") -> str:
    """The dtype that "auto" means on a device: see `load_model`."""
    chosen = os.environ.get("DLK_DTYPE")
    if chosen:
        if chosen not in ("float32", "bfloat16"):
            raise ModelError(f"DLK_DTYPE: expected 'float32' or 'bfloat16', got {chosen!r}")
        return chosen
    kind = device_of(device).partition(":")[0]
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if kind != "cpu":
        return "float32"
    cpu = _cpu_info()
    # With AVX512-BF16 alone, bf16 has twice the speed of fp32 on an EPYC, and half of it on a Xeon
    # without AMX (measured on both).
    fast = "amx_bf16" in cpu or ("avx512_bf16" in cpu and "AuthenticAMD" in cpu)
    return "bfloat16" if fast else "float32"


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def load_tokenizer(spec: ModelSpec) -> Any:
    """Load the tokenizer of a resolved model, with a chat template.

    Both are those of the last adapter that has them, or else the model's own. If neither has a
    template, the tokenizer gets the spec's.

    Raises
    ------
    ModelError
        If it cannot be loaded, or has no single tokens for the marks (such as ``<|end|>``) of the
        chat template that it gets.
    """
    from transformers import AutoTokenizer

    folders = spec.adapter_folders()[::-1]
    own = next(filter(has_tokenizer, folders), None)
    if own:
        # The folder of an adapter has no configuration, which may decide the tokenizer's class.
        config = load_config(spec)
        tokenizer = _from_pretrained(AutoTokenizer, spec, folder=own, config=config)
    else:
        tokenizer = _from_pretrained(AutoTokenizer, spec)
    templates = [*map(chat_template_in, folders), tokenizer.chat_template]
    template = next(filter(None, templates), None)
    if own and not template:
        template = _from_pretrained(AutoTokenizer, spec).chat_template
    _refuse_changed(spec)
    if template or not spec.chat_format:
        tokenizer.chat_template = template
        return tokenizer
    tokenizer.chat_template = chat_formats()[spec.chat_format]
    marks = sorted(set(re.findall(r"<\|\w+\|>", tokenizer.chat_template)))
    in_pieces = [m for m in marks if len(tokenizer.encode(m, add_special_tokens=False)) != 1]
    if in_pieces:
        raise ModelError(
            f"{spec.name}: expected a tokenizer with the marks of the chat format "
            f"{spec.chat_format!r}, got one without the tokens {', '.join(in_pieces)}"
        )
    return tokenizer


def load_config(spec: ModelSpec) -> Any:
    """Load the configuration of a resolved model, without its weights."""
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig, spec)
    _refuse_changed(spec)
    return config


def load_spec(spec: ModelSpec, device: str | torch.device = "auto") -> nn.Module:
    """Load a resolved model, in evaluation mode, and check its sites: see `load_model`."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    device = device_of(device)
    is_usual = device.partition(":")[0] in ("cpu", "cuda")
    if spec.quantization and not is_usual:
        raise ModelError(
            f"{spec.name}: expected a CUDA GPU or a CPU for quantization {spec.quantization!r}, "
            f"got device {device!r}; use another device, or a model that is not quantized"
        )
    options = {"device_map": "auto" if device == "cuda" else {"": device if is_usual else "cpu"}}
    dtype = getattr(torch, spec.dtype)
    if spec.quantization:
        options["quantization_config"] = _bitsandbytes_config(spec.quantization, dtype)
    is_saved_quantized = is_quantized(load_config(spec))
    if spec.quantization and is_saved_quantized:
        raise ModelError(
            f"{spec.name}: expected a checkpoint in full precision to load in {spec.quantization}, "
            "got one that was saved quantised; load it without quantization"
        )
    on_quantized = bool(spec.quantization) or is_saved_quantized
    if on_quantized and len(spec.adapters) > 1:
        raise ModelError(
            f"{spec.name}: expected one adapter on a quantised model, got {len(spec.adapters)} on "
            "each other; load it without quantization"
        )
    # An adapter is merged in fp32, before the weights are rounded.
    merge = bool(spec.adapters) and not on_quantized
    options["dtype"] = torch.float32 if merge else dtype
    model = _read_weights(spec, **options)
    for adapter in spec.adapters:
        model = lay_on(model, adapter, merge=merge)
    if merge:
        # peft has frozen the weights. PyTorch's matmul does not fold the batch of frozen weights,
        # which halves the speed in bf16 on a CPU. No gradient of a weight is ever computed.
        model = model.to(dtype).requires_grad_()
    _refuse_changed(spec)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs bitsandbytes packs 4-bit weights at the first pass. No gradient could
            # pass them after that.
            module.support_avx512bf16_for_cpu = False
    model.eval()
    if not is_usual:
        move_checked(model, device)
    model.spec = spec
    check_sites(model)
    return model


def is_quantized(config: Any) -> bool:
    """Whether a checkpoint was saved in fewer bits, by any method."""
    return getattr(config, "quantization_config", None) is not None


def move_checked(model: nn.Module, device: str) -> None:
    """Move a model from the CPU to another device, if it computes the same there.

    Some versions of torch compute wrongly on some devices, without an error. So two short texts,
    one of them padded, are read on both: at each token, every state and the logits must agree to
    0.1 % of their norm, or to 5 % in 16 bits.

    Raises
    ------
    ModelError
        If they do not agree, or the device cannot run the model.
    """
    on_cpu = _states_of_two_texts(model)
    advice = "; use device 'cpu'"
    try:
        model.to(device)
        on_device = _states_of_two_texts(model)
    except (RuntimeError, TypeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0][:160]
        raise ModelError(
            f"device {device!r} cannot run this model in {model.dtype} "
            f"({type(error).__name__}: {first_line}){advice}"
        ) from None
    tolerance = 5e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3
    for number, (expected, got) in enumerate(zip(on_cpu, on_device, strict=True)):
        off = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        # Written so that nan, for which every comparison is false, is refused.
        if not (off <= tolerance).all():
            what = "the logits" if number == len(on_cpu) - 1 else f"hidden state {number}"
            raise ModelError(
                f"device {device!r}: expected the states of the CPU to {tolerance:.1%}, got "
                f"{what} off by {off.max():.2g} of its norm in {model.dtype}{advice}"
            )


@torch.no_grad()
def _states_of_two_texts(model: nn.Module) -> list[Tensor]:
    """The hidden states and the logits at the tokens of two short texts: each [tokens, width]."""
    token_ids = torch.arange(3, 27).view(2, 12) % text_config(model).vocab_size
    mask = torch.ones_like(token_ids)
    mask[1, :5] = 0
    output = model(
        input_ids=token_ids.to(model.device),
        attention_mask=mask.to(model.device),
        output_hidden_states=True,
        use_cache=False,
    )
    states = [*output.hidden_states, output.logits]
    # Moved before they are widened, for not every device has doubles.
    return [state.cpu().double()[mask.bool()] for state in states]


def _bitsandbytes_config(quantization: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _read_weights(spec: ModelSpec, **options) -> nn.Module:
    """Read the model of a spec, without adapters; refuse weights that are not all of its own."""
    model, found = _from_pretrained(
        model_class(load_config(spec)),
        spec,
        output_loading_info=True,
        # They are refused below, by name.
        ignore_mismatched_sizes=True,
        **options,
    )
    if not is_folder(spec.source):
        indices = (hub.cached_file(spec.source, name, spec.base_revision) for name in INDEX_FILES)
        for index in filter(None, indices):
            shards(index)
    refuse_other_weights(model, found, spec.name)
    if is_folder(spec.source) and model.device.type == "cpu" and not is_quantized(model.config):
        copy_into_memory(model)
    return model


def _refuse_changed(spec: ModelSpec) -> None:
    """Raise `ModelError` if the files of a local model are no longer those that were resolved."""
    resolved = {adapter.source: adapter.revision for adapter in spec.adapters}
    if spec.base_revision != GGUF_SHA256:
        resolved[spec.source] = spec.base_revision
    for source, revision in resolved.items():
        if is_folder(source) and revision_of(Path(source)) != revision:
            raise ModelError(
                f"{Path(source).name}: expected the files of revision {revision[:12]}, got others; "
                "they have changed since this run began, so start it again"
            )


def _from_pretrained(
    auto_class: type, spec: ModelSpec, folder: Path | None = None, **options
) -> Any:
    """Call `from_pretrained` for the spec's model, or for a folder with another tokenizer."""
    source = str(folder or spec.source)
    if not is_folder(source):
        options["revision"] = spec.base_revision
    try:
        return auto_class.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # Whatever transformers makes of a broken file.
        reads_tokenizer = auto_class.__name__ == "AutoTokenizer"
        if reads_tokenizer and is_folder(source) and not has_tokenizer(Path(source)):
            missing = FileNotFoundError(
                "it has no tokenizer, such as tokenizer.json; copy it there"
            )
            raise _cannot_load(spec.name, source, missing) from error
        raise _cannot_load(spec.name, source, error) from error


def _cannot_load(name: str, source: str, error: Exception) -> ModelError:
    is_local = is_folder(source)
    where = "as a local folder" if is_local else "on the hub and in its local cache"
    if source == name and not is_local:
        where += f"; {_no_folder(name)}"
    # Not the path, which says more of the machine than the name that was given.
    tried = Path(source).name or source if is_local else source
    lines = str(error).strip().splitlines()
    # Errors of PyTorch name what is wrong in their second line.
    reason = " ".join(line.strip() for line in lines[:2])[:200]
    advice = _advice(source, error)
    # The reason comes last, where it is seen first in a log. A folder is no misspelt alias.
    lines = [
        f"cannot load model {_shortened(name)!r}",
        *([] if is_local else [_offered()]),
        f"tried: {tried} {where} ({type(error).__name__}: {reason})",
        *([advice] if advice else []),
    ]
    return ModelError("\n  ".join(lines))


def _advice(source: str, error: BaseException | None) -> str:
    """Say what to do about an error of the hub, or one that came of it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if source == EMBEDDED_HUB_ID:
        return (
            f"{EMBEDDED!r} is this model, quantised, and needs no hub; an adapter is laid on it "
            f"with {EMBEDDED!r} as base_model_name_or_path in its adapter_config.json"
        )
    log_in = "log in with `hf auth login` (or `huggingface-cli login`), or set HF_TOKEN"
    while error is not None:
        if isinstance(error, GatedRepoError):
            return f"it is gated: accept its terms on https://huggingface.co/{source}, and {log_in}"
        if isinstance(error, RepositoryNotFoundError):
            return f"there is none of that name, or it is private: check the name, or {log_in}"
        if isinstance(error, pickle.UnpicklingError):
            return "its weights are a pickle that holds more than tensors: save them as safetensors"
        error = error.__cause__ or error.__context__
    return ""


def _offered() -> str:
    """Say which models there are."""
    offline_names = ", ".join(map(repr, [EMBEDDED, *organism_names()]))
    return (
        f"offline: use {offline_names} or a local folder; "
        f"aliases for when there is a hub: {', '.join(sorted(registry()))}"
    )


def _shortened(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:60]}...{name[-20:]}"


_SET_BY_SAVING = ("_name_or_path", "architectures", "dtype", "transformers_version")


def identity(model: nn.Module) -> tuple[str, str, str]:
    """Say which model this is, to tell whether results come from the same one.

    Returns
    -------
    name, revision, dtype
        Those of ``model.spec``, for a model of `load_model`. For any other model of transformers,
        `name` is the ``name_or_path`` of its configuration or the name of its class, and `revision`
        a hash over the configuration and up to 64 values of every weight. Training changes it; a
        change of a few single values may not.
    """
    # Not `getattr`, by which peft passes on the spec of the model inside, without the adapter.
    spec = vars(model).get("spec")
    if isinstance(spec, ModelSpec):
        return spec.name, spec.revision, spec.dtype
    settings = _without(model.config.to_dict(), _SET_BY_SAVING)
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(_some_values(weight))
    name = model.config.name_or_path or type(model).__name__
    return name, digest.hexdigest(), str(model.dtype).removeprefix("torch.")


def _without(settings: dict, keys: Sequence[str]) -> dict:
    """Leave out some keys, also of the settings inside settings."""
    kept = {key: value for key, value in settings.items() if key not in keys}
    return {k: _without(v, keys) if isinstance(v, dict) else v for k, v in kept.items()}


def _some_values(weight: Tensor, n: int = 64) -> bytes:
    """Up to `n` values at equal distances; none of a weight that is kept off the device."""
    if weight.is_meta:
        return b""
    values = weight.detach().flatten()
    positions = torch.linspace(0, len(values) - 1, min(n, len(values)), dtype=torch.float64)
    sample = values[positions.long().to(values.device)].cpu()
    return sample.contiguous().view(torch.uint8).numpy().tobytes()
