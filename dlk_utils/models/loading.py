"""Models by name: the embedded default, the aliases of `models.yaml`, any hub id, any local folder."""

import functools
import json
import logging
import os
import re
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch
import xxhash
import yaml
from safetensors import SafetensorError

from dlk_utils.errors import ModelError
from dlk_utils.models import hub
from dlk_utils.models.embedded_model import GGUF_SHA256, embedded_model
from dlk_utils.models.sites import check_sites

ORGANISMS = Path(__file__).parent.parent / "organisms"


@dataclass(frozen=True)
class ModelSpec:
    """All that decides what a loaded model computes: part of every fingerprint, and known without reading weights."""

    name: str
    source: str
    """Local folder or hub id."""
    revision: str
    """sha256 of the embedded file, commit of the hub, or hash of a local folder's files."""
    dtype: str
    quantization: str | None
    chat_format: str | None
    adapter: str | None = None
    """Folder of a LoRA adapter on top; its hash is in `revision`."""

    def record(self) -> dict:
        """What a manifest stores (a local folder by its name: its content is in `revision`; a chat format by its text)."""
        names = {
            k: Path(v).name if v and Path(v).is_dir() else v
            for k, v in (("source", self.source), ("adapter", self.adapter))
        }
        return (
            asdict(self)
            | names
            | {"chat_format": self.chat_format and chat_formats()[self.chat_format]}
        )


def organism_names() -> list[str]:
    """The adapters that this package ships: models that lie by construction."""
    return sorted(p.parent.name for p in ORGANISMS.glob("*/adapter_config.json"))


@functools.cache
def registry() -> dict[str, dict]:
    """alias -> hub id, quantisation, chat format (`models.yaml`)."""
    return yaml.safe_load(
        files("dlk_utils.models").joinpath("models.yaml").read_text(encoding="utf-8")
    )


@functools.cache
def chat_formats() -> dict[str, str]:
    """name -> chat template, for tokenizers without one (`templates/chat_formats.yaml`)."""
    return yaml.safe_load(
        files("dlk_utils.models").joinpath("chat_formats.yaml").read_text(encoding="utf-8")
    )


def resolve(name: str, quantization: str | None = None, dtype: str = "auto") -> ModelSpec:
    """What `load_model` would load. Raises `ModelError` if the model is unknown here and no hub answers."""
    entry = registry().get(name, {})
    quantization = quantization or entry.get("quantization")
    if quantization not in (None, "8bit", "4bit"):
        raise ModelError(f"quantization: expected None, '8bit' or '4bit', got {quantization!r}")
    if dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise ModelError(
            f"dtype: expected 'auto', 'float32', 'bfloat16', 'float16' or 'float64', got {dtype!r}"
        )
    dtype = _best_dtype() if dtype == "auto" else dtype
    adapter = ORGANISMS / name if name in organism_names() else Path(name)
    if (adapter / "adapter_config.json").is_file():
        base = resolve(
            json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"],
            quantization,
            dtype,
        )
        return replace(
            base,
            name=name,
            adapter=str(adapter.absolute()),
            revision=f"{base.revision}+{_folder_hash(adapter, 'adapter_*')}",
        )
    if name == "smollm2":
        return ModelSpec(name, str(embedded_model()), GGUF_SHA256, dtype, quantization, None)
    if Path(name).is_dir():
        return ModelSpec(
            name,
            str(Path(name).absolute()),
            _folder_hash(Path(name)),
            dtype,
            quantization,
            _chat_format(name),
        )  # absolute: a worker may have another working folder
    source = entry.get("hub_id", name)
    return ModelSpec(
        name, source, _hub_revision(name, source), dtype, quantization, _chat_format(name)
    )


def _chat_format(name: str) -> str:
    """What is used where the tokenizer has no chat template: that of the alias, of the alias with this hub id, or of that which a local folder is called by; plain text for others."""
    known = {e["hub_id"]: e for e in registry().values()} | registry()
    return known.get(name, known.get(Path(name).name, {})).get("chat_format") or "plain"


def load_tokenizer(spec: ModelSpec):
    """The tokenizer; one without a chat template gets that of the registry (plain text for unknown models). Raises `ModelError` if it would write that format's marks in pieces."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, spec)
    if not tokenizer.chat_template and spec.chat_format:
        tokenizer.chat_template = chat_formats()[spec.chat_format]
        marks = sorted(set(re.findall(r"<\|\w+\|>", tokenizer.chat_template)))
        if pieces := [
            m for m in marks if len(tokenizer(m, add_special_tokens=False).input_ids) != 1
        ]:
            raise ModelError(
                f"{spec.name}: expected a tokenizer with the marks of the chat format {spec.chat_format!r}, it has no token {', '.join(pieces)}"
            )
    return tokenizer


def load_config(spec: ModelSpec):
    """The configuration, known without the weights."""
    from transformers import AutoConfig

    return _load(AutoConfig, spec)


def load_model(
    name: str, quantization: str | None = None, dtype: str = "auto", device: str = "auto"
):
    """`(model, tokenizer)`, in eval mode; `model.spec` tells what was loaded.

    `name` is `smollm2`, an alias of `models.yaml`, a hub id or a local folder; `quantization` None, "8bit" or "4bit"
    (bitsandbytes); `dtype` "auto" is bf16 where the machine computes in it, else fp16 on a GPU and fp32 on a CPU; `device` "auto" is the GPU if there is one.
    Remote code is never trusted. Raises `ModelError`.
    """
    spec = resolve(name, quantization, dtype)
    return load_spec(spec, device), load_tokenizer(spec)


def load_spec(spec: ModelSpec, device: str = "auto"):
    """The model of a resolved spec; its sites are checked. Raises `ModelError`, and `UnknownArchitecture` where the sites are not known or do not keep the conventions."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    options: dict = {"dtype": getattr(torch, spec.dtype)}
    if spec.quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=spec.quantization == "8bit",
            load_in_4bit=spec.quantization == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if spec.adapter and not spec.quantization:
        options["dtype"] = torch.float32  # the adapter is merged before the weights are rounded
    model = _load(
        AutoModelForCausalLM,
        spec,
        device_map="auto" if device == "cuda" else {"": device},
        **options,
    )
    if spec.adapter:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # peft asks transformers for a name that is going away
            model = PeftModel.from_pretrained(model, spec.adapter).merge_and_unload()
        model = (
            model if spec.quantization else model.to(getattr(torch, spec.dtype)).requires_grad_()
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes packs 4-bit weights at the first pass on some CPUs, and no gradient passes them after that
    model.spec = spec
    # not frozen: PyTorch's matmul does not fold the batch of weights that need no gradient, which halves the speed in bf16 on a CPU.
    # No weight gradient is ever computed (gradients are asked of activations only).
    check_sites(model.eval())
    return model


def _load(cls, spec: ModelSpec, **options):
    remote = not Path(spec.source).is_dir()
    try:
        return cls.from_pretrained(
            spec.source,
            trust_remote_code=False,
            **({"revision": spec.revision} if remote else {}),
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as e:
        raise ModelError(_sorry(spec.name, spec.source, e)) from None


def _hub_revision(name: str, source: str) -> str:
    try:
        return hub.commit(source)
    except Exception as e:
        raise ModelError(_sorry(name, source, e)) from None


def _sorry(name: str, source: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0][:160]
    where = (
        "as a local folder"
        if Path(source).is_dir()
        else "on the Hugging Face hub and in its local cache"
    )
    return (
        f"cannot load model {name!r}\n  tried: {source} {where} ({type(error).__name__}: {reason})\n"
        f"  offline: use {', '.join(repr(n) for n in ['smollm2', *organism_names()])} or a local folder; aliases for when there is a hub: {', '.join(sorted(registry()))}"
    )


def _best_dtype() -> str:
    """What "auto" means here: `DLK_DTYPE` if it is set, else the format that this machine is fast in."""
    if chosen := os.environ.get("DLK_DTYPE"):
        if chosen not in ("float32", "bfloat16"):
            raise ModelError(f"DLK_DTYPE: expected 'float32' or 'bfloat16', got {chosen!r}")
        return chosen
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    # with AVX512-BF16 alone bf16 has twice the speed of fp32 on an EPYC, and half of it on a Xeon without AMX (measured on both)
    fast = "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in flags)
    return "bfloat16" if fast else "float32"


def _folder_hash(folder: Path, pattern: str = "*") -> str:
    digest = xxhash.xxh3_128()
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        with open(path, "rb") as f:
            while block := f.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
