"""Whether the weights of a checkpoint are those of its model, all of them and no others."""

import re
from typing import Any

from torch import nn

from dlk_utils.errors import ModelError


def refuse_other_weights(model: nn.Module, found: dict[str, Any], name: str) -> None:
    """Raise `ModelError` unless a checkpoint has exactly the weights of its model.

    transformers only warns of weights that it did not find, and makes them random.

    Parameters
    ----------
    model
        The model as it was read.
    found
        What transformers says of the checkpoint: `missing_keys`, `unexpected_keys` and
        `mismatched_keys`. Tied heads and known buffers are not among them.
    name
        What the user called the model.
    """
    sizes = [f"{key} ({list(got)} for {list(own)})" for key, got, own in found["mismatched_keys"]]
    faults = {
        "has weights of other sizes": sizes,
        "lacks weights, which would be random numbers": found["missing_keys"],
        "has weights for which the model has no place": [
            key for key in found["unexpected_keys"] if _is_of(model, key)
        ],
    }
    for fault, keys in faults.items():
        if keys:
            raise ModelError(
                f"{name}: the checkpoint {fault}: {len(keys)}, such as "
                f"{', '.join(sorted(keys)[:3])}; was config.json saved with it?"
            )


def _is_of(model: nn.Module, weight: str) -> bool:
    """Whether a weight belongs to a module that the model has, in any of its layers.

    A value head or the tower of a vision model does not. Nor do buffers that older versions saved.
    """
    if re.search(r"(attn|attention)\.(masked_)?bias$|inv_freq$|position_ids$", weight):
        return False
    modules = {_in_any_layer(name) for name, _ in model.named_modules()} - {""}
    module = _in_any_layer(weight.rpartition(".")[0])
    return not modules.isdisjoint({module, f"{model.base_model_prefix}.{module}"})


def _in_any_layer(module: str) -> str:
    return re.sub(r"\.\d+\b", ".*", f".{module}")[1:]


def copy_into_memory(model: nn.Module) -> None:
    """Give a model copies of its weights.

    Weights on the CPU that nothing changed since they were read are still the bytes of the file.
    Without a copy, a file that is written over changes the loaded model.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
