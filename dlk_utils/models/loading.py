"""Load a model by name: the embedded one, an alias of `models.yaml`, a hub id or a local folder."""

import functools
import json
import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from dlk_utils.errors import ModelError
from dlk_utils.models import hub
from dlk_utils.models.embedded_model import GGUF_SHA256, embedded_model
from dlk_utils.models.sites import check_sites

ORGANISMS = Path(__file__).parent.parent / "organisms"
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides what a loaded model computes, known before its weights are read.

    `name` is what the user called the model, and `source` a local folder or the id of a repository
    on the Hugging Face hub. `revision` is the sha256 of the embedded file, the commit of a hub
    repository, or a hash over the files of a local folder. `chat_format` names the chat template
    (see `chat_formats`) for a tokenizer that has none. `adapter` is the folder of a LoRA adapter
    that is merged into the weights; a hash over its files is then added to `revision`.
    """

    name: str
    source: str
    revision: str
    dtype: str
    quantization: str | None
    chat_format: str | None
    adapter: str | None = None

    def record(self) -> dict:
        """Return the spec as it is stored with results: folders by name, chat format by text."""
        record = asdict(self)
        for key in ("source", "adapter"):
            if record[key] and Path(record[key]).is_dir():
                record[key] = Path(record[key]).name
        if self.chat_format:
            record["chat_format"] = chat_formats()[self.chat_format]
        return record


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
    name: str, *, quantization: str | None = None, dtype: str = "auto", device: str = "auto"
) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer.

    The code that comes with some models is never run: only architectures of transformers are used.

    Parameters
    ----------
    name
        ``"smollm2"`` or one of `organism_names` (these need no hub), an alias of `registry`, the id
        of a model on the Hugging Face hub, or a local folder. A folder may also hold a LoRA
        adapter, which is merged into the model that it was trained on.
    quantization
        "8bit", "4bit" (both with bitsandbytes), or None: what `registry` says of the alias, if
        anything.
    dtype
        One of `DTYPES`, or "auto". "auto" is the value of the environment variable ``DLK_DTYPE``
        (float32 or bfloat16) if it is set. Otherwise it is bfloat16 where the hardware is fast in
        it, and else float16 on a GPU and float32 on a CPU or another device.
    device
        "cpu", "cuda", "cuda:1" and so on, "mps", or "auto": a CUDA GPU if there is one, else the
        CPU. On a device of another kind than these two the model is used only if a short text has
        the same states there as on the CPU, so "mps" has to be asked for.

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
    name: str, quantization: str | None = None, dtype: str = "auto", device: str = "auto"
) -> ModelSpec:
    """Find out what `load_model` would load with these arguments, without reading any weights.

    Raises
    ------
    ModelError
        If the model is not here and no hub answers, or another argument is not valid.
    """
    entry = registry().get(name, {})
    quantization = quantization or entry.get("quantization")
    if quantization not in (None, "8bit", "4bit"):
        raise ModelError(f"quantization: expected None, '8bit' or '4bit', got {quantization!r}")
    if dtype not in ("auto", *DTYPES):
        expected = ", ".join(map(repr, ("auto", *DTYPES)))
        raise ModelError(f"dtype: expected one of {expected}, got {dtype!r}")
    if dtype == "auto":
        dtype = _auto_dtype(device)

    adapter = ORGANISMS / name if name in organism_names() else Path(name)
    adapter_config = adapter / "adapter_config.json"
    if adapter_config.is_file():
        base_name = json.loads(adapter_config.read_text())["base_model_name_or_path"]
        base = resolve(base_name, quantization, dtype)
        revision = f"{base.revision}+{_hash_files(adapter, 'adapter_*')}"
        return replace(base, name=name, adapter=str(adapter.absolute()), revision=revision)

    chat_format = _chat_format_of(name)
    if name == "smollm2":
        source, revision, chat_format = str(embedded_model()), GGUF_SHA256, None
    elif Path(name).is_dir():
        # The absolute path, for a worker may have another working folder.
        source, revision = str(Path(name).absolute()), _hash_files(Path(name))
    else:
        source = entry.get("hub_id", name)
        try:
            revision = hub.commit(source)
        except Exception as error:
            raise _cannot_load(name, source, error) from None
    return ModelSpec(name, source, revision, dtype, quantization, chat_format)


def _chat_format_of(name: str) -> str:
    """The format of an alias, a hub id of one, or a folder that is called like one."""
    known = {entry["hub_id"]: entry for entry in registry().values()} | registry()
    entry = known.get(name) or known.get(Path(name).name) or {}
    return entry.get("chat_format") or "plain"


def device_of(name: str) -> str:
    """Return the device of torch that a name means: see `load_model`.

    Raises
    ------
    ModelError
        If there is no such device here.
    """
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


def _auto_dtype(device: str = "auto") -> str:
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
    """Load the tokenizer of a resolved model; if it has no chat template, it gets the spec's.

    Raises
    ------
    ModelError
        If it cannot be loaded, or has no single tokens for the marks (such as ``<|end|>``) of the
        chat template that it gets.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, spec)
    if tokenizer.chat_template or not spec.chat_format:
        return tokenizer
    tokenizer.chat_template = chat_formats()[spec.chat_format]
    marks = sorted(set(re.findall(r"<\|\w+\|>", tokenizer.chat_template)))
    in_pieces = [m for m in marks if len(tokenizer.encode(m, add_special_tokens=False)) != 1]
    if in_pieces:
        raise ModelError(
            f"{spec.name}: expected a tokenizer with the marks of the chat format "
            f"{spec.chat_format!r}, it has no token {', '.join(in_pieces)}"
        )
    return tokenizer


def load_config(spec: ModelSpec) -> Any:
    """Load the configuration of a resolved model, without its weights."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, spec)


def load_spec(spec: ModelSpec, device: str = "auto") -> nn.Module:
    """Load a resolved model, in evaluation mode, and check its sites: see `load_model`."""
    from transformers import AutoModelForCausalLM
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
    # An adapter is merged in fp32, before the weights are rounded.
    merge_first = spec.adapter and not spec.quantization
    options["dtype"] = torch.float32 if merge_first else dtype
    model = _from_pretrained(AutoModelForCausalLM, spec, **options)
    if spec.adapter:
        model = _merge_adapter(model, spec.adapter)
    if merge_first:
        # peft has frozen the weights. PyTorch's matmul does not fold the batch of frozen weights,
        # which halves the speed in bf16 on a CPU. No gradient of a weight is ever computed.
        model = model.to(dtype).requires_grad_()
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
    token_ids = torch.arange(3, 27).view(2, 12) % model.config.get_text_config().vocab_size
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


def _merge_adapter(model: nn.Module, adapter: str) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        # peft uses a name of transformers that is going away.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _from_pretrained(auto_class: type, spec: ModelSpec, **options) -> Any:
    if not Path(spec.source).is_dir():
        options["revision"] = spec.revision
    try:
        return auto_class.from_pretrained(spec.source, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _cannot_load(spec.name, spec.source, error) from None


def _cannot_load(name: str, source: str, error: Exception) -> ModelError:
    is_local = Path(source).is_dir()
    where = "as a local folder" if is_local else "on the Hugging Face hub and in its local cache"
    first_line = next(iter(str(error).strip().splitlines()), "")[:160]
    offline_names = ", ".join(map(repr, ["smollm2", *organism_names()]))
    return ModelError(
        f"cannot load model {name!r}\n"
        f"  tried: {source} {where} ({type(error).__name__}: {first_line})\n"
        f"  offline: use {offline_names} or a local folder; "
        f"aliases for when there is a hub: {', '.join(sorted(registry()))}"
    )


def _hash_files(folder: Path, pattern: str = "*") -> str:
    digest = xxhash.xxh3_128()
    for path in sorted(path for path in folder.rglob(pattern) if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


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
