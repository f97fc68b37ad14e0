"""Find the sites of a model whose family is not in the table, from the model itself.

A model is run on a few tokens, and what its modules read and put out is compared with the residual
stream, which transformers returns as ``output_hidden_states``:

* the *blocks* are the list of modules whose outputs are these hidden states;
* ``attn`` and ``mlp`` are the two modules in each block whose outputs add up to what the block adds
  to the stream, times a factor in some families; ``attn`` is the first of them that looks at other
  tokens;
* ``w_o`` is the linear layer whose output is that of ``attn``, or is read by it.

What is found must also be usable as the rest of this package uses it: no token sees a later one,
padding changes nothing, and the last token can run behind a cache of keys and values. A model that
fails in any of this is refused, with what failed.
"""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dlk_utils.errors import UnknownArchitecture
from dlk_utils.models.architectures import Architecture
from dlk_utils.models.configuration import text_config

_N_TOKENS = 6

RAISED_BY_A_MODEL = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    ImportError,
)
"""What a model raises that is not made to be run as it is here."""


class _NotFound(Exception):
    """What failed, in the words of the error for the user."""


@torch.no_grad()
def find_architecture(model: nn.Module) -> Architecture:
    """Find where the sites of a causal model are, and prove that they can be used.

    The model, in evaluation mode, runs on a few tokens, about six times. `sites.check_sites` checks
    what is found once more, at each layer.

    Raises
    ------
    UnknownArchitecture
        If the sites are not found, or cannot be used. The message names the family and says what
        failed.
    """
    kind = model.config.model_type
    try:
        return _find(model)
    except torch.OutOfMemoryError:
        raise
    except _NotFound as reason:
        failure = str(reason)
    except RAISED_BY_A_MODEL as error:
        first_line = next(iter(str(error).strip().splitlines()), "")[:160]
        failure = f"it cannot be run on a few tokens ({type(error).__name__}: {first_line})"
    raise UnknownArchitecture(
        f"architecture {kind!r} cannot be used: its sites are not in the table of "
        f"dlk_utils/models/architectures.py, and were not found from the model: {failure}"
    )


def _find(model: nn.Module) -> Architecture:
    if model.training:
        raise _NotFound("expected a model in evaluation mode (`model.eval()`)")
    token_ids = trial_tokens(model)
    run = _run_model(model, token_ids)
    blocks = _path_of_blocks(model, run)
    outputs = _outputs_in_every_block(run, blocks)
    pair, scale = _pair_that_adds_up(model, run, outputs)
    attn, mlp = _attention_first(model, token_ids, run, blocks, pair)
    w_o = _last_projection(model, run, blocks, attn)
    if w_o is None:
        raise _NotFound(
            f"no linear layer makes what {attn} puts out, so there are no heads to read"
        )
    n_heads = getattr(text_config(model), "num_attention_heads", None) or 1
    widths = {run.inputs[f"{blocks}.{i}.{w_o}"].shape[-1] for i in range(run.n_layers)}
    if len(widths) > 1:
        raise _NotFound(f"the heads of its blocks differ in width: {w_o} reads {sorted(widths)}")
    if min(widths) % n_heads:
        raise _NotFound(f"what {w_o} reads is not the outputs of {n_heads} heads, side by side")
    down = _last_projection(model, run, blocks, mlp)
    _refuse_unusable_batches(model, token_ids)
    added = {"attn_out": outputs[attn], "mlp_out": outputs[mlp]}
    dropout = _own_dropout(model, run, blocks, added, w_o)
    return Architecture(blocks, attn, mlp, w_o, dropout, scale, down)


def trial_tokens(model: nn.Module, n: int = _N_TOKENS) -> list[int]:
    """Return ids of `n` ordinary tokens: none that stands for the end, an image, or a sound."""
    settings = model.config.to_dict() | text_config(model).to_dict()
    special = set()
    for name, value in settings.items():
        if name.endswith(("token_id", "token_index")):
            special.update(value if isinstance(value, list) else [value])
    ordinary = (token for token in range(3, text_config(model).vocab_size) if token not in special)
    return list(itertools.islice(ordinary, n))


@dataclass
class _Run:
    """What a pass over one prompt of t tokens showed: tensors [t, width], in 32 bits on the CPU.

    Attributes
    ----------
    hidden_states
        Those of transformers: the embedding, and the state after each block.
    inputs, outputs
        What each module read and put out, by its path in the model, in the order in which the
        modules ended. Modules that ran more than once are left out.
    into_dropout
        What was handed to dropout.
    """

    hidden_states: list[Tensor] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    into_dropout: list[Tensor] = field(default_factory=list)

    @property
    def n_layers(self) -> int:
        return len(self.hidden_states) - 1


def _run_model(model: nn.Module, token_ids: Sequence[int]) -> _Run:
    n_tokens = len(token_ids)
    run = _Run()
    n_calls: dict[str, int] = {}

    def by_token(x: Any) -> Tensor | None:
        x = x[0] if isinstance(x, tuple | list) and x else x
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() not in (2, 3):
            return None
        if x.shape[:-1].numel() != n_tokens:
            return None
        # A copy, for some families add to it in place later.
        return x.reshape(n_tokens, -1).to("cpu", torch.float32, copy=True)

    def record(path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        n_calls[path] = n_calls.get(path, 0) + 1
        read = by_token(args[0] if args else kwargs.get("hidden_states"))
        put_out = by_token(output)
        for values, value in ((run.inputs, read), (run.outputs, put_out)):
            values.pop(path, None)
            if value is not None and n_calls[path] == 1:
                values[path] = value

    class NoteDropout(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.dropout:
                hidden = by_token(args[0] if args else kwargs["input"])
                if hidden is not None:
                    run.into_dropout.append(hidden)
            return function(*args, **(kwargs or {}))

    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            hook = functools.partial(record, path)
            hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        hooks.enter_context(NoteDropout())
        output = model(**_batch(model, [token_ids]), output_hidden_states=True, use_cache=False)
    for hidden in getattr(output, "hidden_states", None) or ():
        state = by_token(hidden)
        if state is None:
            raise _NotFound(
                "expected output_hidden_states with one state for each token, got a tensor of "
                f"shape {list(hidden.shape)} for {n_tokens} tokens"
            )
        run.hidden_states.append(state)
    if run.n_layers < 1:
        raise _NotFound("expected output_hidden_states, got none")
    if not all(state.isfinite().all() for state in run.hidden_states):
        raise _NotFound(f"its states are not finite in {model.dtype}")
    return run


def _batch(model: nn.Module, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Lay prompts side by side, padded on the left, as inputs of the model."""
    width = max(map(len, prompts))
    rows = [[0] * (width - len(ids)) + list(ids) for ids in prompts]
    masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    mask = torch.tensor(masks, device=model.device)
    batch = {"input_ids": torch.tensor(rows, device=model.device), "attention_mask": mask}
    if "position_ids" in signature(model.forward).parameters:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def _path_of_blocks(model: nn.Module, run: _Run) -> str:
    """Return the path of the list of modules that put out transformers' hidden states."""
    for path, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or len(modules) != run.n_layers:
            continue
        read = [run.inputs.get(f"{path}.{i}") for i in range(run.n_layers)]
        put_out = [run.outputs.get(f"{path}.{i}") for i in range(run.n_layers)]
        if any(x is None or x.shape != run.hidden_states[0].shape for x in (*read, *put_out)):
            continue
        # The last hidden state of transformers is behind the final norm.
        before = zip(read, run.hidden_states[:-1], strict=True)
        after = zip(put_out[:-1], run.hidden_states[1:-1], strict=True)
        if all(torch.equal(x, state) for x, state in (*before, *after)):
            run.hidden_states[-1] = put_out[-1]
            return path
    raise _NotFound(
        f"no list of {run.n_layers} blocks reads and puts out its {run.n_layers + 1} hidden states"
    )


def _outputs_in_every_block(run: _Run, blocks: str) -> dict[str, Tensor]:
    """Return what the modules within the blocks put out, [layer, t, d], by their path in the block.

    Only of modules that all blocks have, and whose output has the width of the residual stream. Of
    modules with the same outputs, only the one with the shortest path.
    """
    width = run.hidden_states[0].shape[-1]
    by_layer: list[dict[str, Tensor]] = [{} for _ in range(run.n_layers)]
    for path, value in run.outputs.items():
        if path.startswith(f"{blocks}.") and value.shape[-1] == width:
            layer, _, part = path.removeprefix(f"{blocks}.").partition(".")
            by_layer[int(layer)][part] = value
    children = [{part.partition(".")[0] for part in parts} for parts in by_layer]
    for layer, names in enumerate(children):
        if names != children[0]:
            raise _NotFound(
                f"its blocks are of different kinds: only one of block 0 and block {layer} has "
                f"{' and '.join(sorted(names ^ children[0]))}"
            )
    distinct: dict[str, Tensor] = {}
    for part in sorted(by_layer[0], key=lambda part: part.count(".")):
        if part and all(part in parts for parts in by_layer):
            values = torch.stack([parts[part] for parts in by_layer])
            if not any(torch.equal(values, others) for others in distinct.values()):
                distinct[part] = values
    return distinct


def _pair_that_adds_up(
    model: nn.Module, run: _Run, outputs: dict[str, Tensor]
) -> tuple[list[str], float]:
    """Return the two parts whose outputs are what each block adds, and the factor before them."""
    states = torch.stack(run.hidden_states).double()
    added = (states[1:] - states[:-1]).flatten(1)
    least, best, factor = float("inf"), ["no two"], 1.0
    for pair in itertools.combinations(outputs, 2):
        total = sum(outputs[part].double().flatten(1) for part in pair)
        fitted = float((total * added).sum() / total.square().sum().clamp(min=1e-30))
        for scale in (1.0, fitted):
            errors = (added - scale * total).norm(dim=1) / added.norm(dim=1)
            # A factor, or a part deep inside another, has to be clearly better.
            if errors.max() < 0.5 * least:
                least, best, factor = float(errors.max()), list(pair), scale
    # In 16 bits the sum is rounded as coarsely as the stream, which is far larger than its parts.
    if least > (0.25 if _is_coarse(model) else 1e-3):
        raise _NotFound(
            "no two of the modules in a block put out what the block adds to the residual stream "
            f"(nearest: {' and '.join(best)}, which are {least:.2g} of it off)"
        )
    return best, _as_configured(model, factor)


def _as_configured(model: nn.Module, factor: float) -> float:
    """Return the number in the model's configuration that a measured factor must be, if any."""
    numbers = [x for x in text_config(model).to_dict().values() if isinstance(x, float)]
    near = [x for x in (1.0, *numbers) if abs(factor - x) < 5e-3 * abs(x)]
    return near[0] if near else factor


def _attention_first(
    model: nn.Module, token_ids: Sequence[int], run: _Run, blocks: str, pair: Sequence[str]
) -> tuple[str, str]:
    """Tell the attention of a pair from its MLP.

    In the first block it is the first of the two that puts out something else at the last token
    when the first token is another. (An MLP that runs after it does so too.)
    """
    others = _run_model(model, [token_ids[-2], *token_ids[1:]]).outputs
    first, second = sorted(pair, key=lambda part: list(run.outputs).index(f"{blocks}.0.{part}"))
    for attn, mlp in ((first, second), (second, first)):
        path = f"{blocks}.0.{attn}"
        if not _is_close(model, others[path][-1:], run.outputs[path][-1:], factor=0.01):
            return attn, mlp
    raise _NotFound(f"neither {first} nor {second} of block 0 looks at other tokens")


def _last_projection(model: nn.Module, run: _Run, blocks: str, part: str) -> str | None:
    """Return the path in the blocks of the linear layer that makes what a part puts out, if any.

    Its output is that of the part or, if the part is a norm, what this reads.
    """

    def by_layer(values: dict[str, Tensor], path: str) -> list[Tensor | None]:
        return [values.get(f"{blocks}.{layer}.{path}") for layer in range(run.n_layers)]

    put_out, read = by_layer(run.outputs, part), by_layer(run.inputs, part)
    first = f"{blocks}.0."
    for path in reversed(run.outputs):
        if not path.startswith(first) or path not in run.inputs:
            continue
        weight = getattr(model.get_submodule(path), "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            made = by_layer(run.outputs, path.removeprefix(first))
            if _are_equal(made, put_out) or _are_equal(made, read):
                return path.removeprefix(first)
    return None


def _are_equal(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether two lists hold the same tensors, and None nowhere."""
    pairs = zip(some, others, strict=True)
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def _own_dropout(
    model: nn.Module, run: _Run, blocks: str, added: dict[str, Tensor], w_o: str
) -> tuple[str, ...]:
    """Say where the family has dropout of its own, from what was handed to dropout in the run.

    Fused attention drops probabilities by itself; that it can is seen by its rate.
    """
    places = {site: list(by_layer) for site, by_layer in added.items()}
    places["embedding"] = [run.hidden_states[0]]
    found = []
    for place, values in places.items():
        if all(any(_are_equal([x], [y]) for y in run.into_dropout) for x in values):
            found.append(place)
    attention = model.get_submodule(f"{blocks}.0.{w_o}".rpartition(".")[0])
    has_rate = any(hasattr(attention, name) for name in ("attention_dropout", "attn_dropout"))
    if has_rate and getattr(model, "_supports_attention_backend", False):
        found.append("attention")
    return tuple(found)


def _refuse_unusable_batches(model: nn.Module, token_ids: Sequence[int]) -> None:
    """Refuse a model in which later tokens, padding or a cache change the state of a token."""
    [states] = _final_states(model, _batch(model, [token_ids]))
    [changed] = _final_states(model, _batch(model, [[*token_ids[:-1], token_ids[0]]]))
    if not _is_close(model, changed[:-1], states[:-1]):
        raise _NotFound("its tokens see later ones")

    shorter = list(token_ids)[:-2][::-1]
    [others] = _final_states(model, _batch(model, [shorter]))
    alone = torch.stack([states[-1], others[-1]])
    batch = _batch(model, [token_ids, shorter])
    if not _is_close(model, _final_states(model, batch)[:, -1], alone):
        raise _NotFound("padding changes its states")

    n_before = len(token_ids) - 1
    before = {name: x[:, :n_before] for name, x in batch.items()}
    cache = model(**before, use_cache=True).past_key_values
    for layer, kept in enumerate(getattr(cache, "layers", None) or [cache]):
        keys = getattr(kept, "keys", None)
        if not isinstance(keys, Tensor) or keys.dim() != 4 or keys.shape[2] != n_before:
            raise _NotFound(
                f"its cache does not keep the keys and values of all tokens (layer {layer} has a "
                f"{type(kept).__name__})"
            )
    last = {name: x[:, n_before:] for name, x in batch.items()}
    last |= {"attention_mask": batch["attention_mask"], "past_key_values": cache}
    if not _is_close(model, _final_states(model, last)[:, -1], alone):
        raise _NotFound("its last token has another state behind a cache of the earlier ones")


def _final_states(model: nn.Module, batch: dict[str, Any]) -> Float[Tensor, "b t d"]:
    """Run a batch; return its last hidden states."""
    use_cache = "past_key_values" in batch
    output = model(**batch, output_hidden_states=True, use_cache=use_cache)
    return output.hidden_states[-1].float().cpu()


def _is_coarse(model: nn.Module) -> bool:
    return model.dtype in (torch.bfloat16, torch.float16)


def _is_close(model: nn.Module, got: Tensor, expected: Tensor, *, factor: float = 1.0) -> bool:
    """Whether states [n, d] are the same, up to what another batch changes by rounding."""
    # In 16 bits a token may go to another expert; what is wrong by construction is far more off.
    tolerance = factor * (0.1 if _is_coarse(model) else 1e-4)
    return bool(((got - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all())
