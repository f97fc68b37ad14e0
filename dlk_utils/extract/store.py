"""A folder of tensors by row, in shards that are written one by one: what is finished stays.

The writing of a store can be killed at any moment, and resumes where it was. Its folder holds

`manifest.json`
    `parts`, everything that decides the content: the options of whoever fills it, a hash of the
    code that computes it, and library versions. `plan`, which rows lie in which shard and batch.
    `examples`, the example of each row. `fingerprint`, a hash of these three.
`shard-00000.safetensors`
    The named tensors [n, ...] of the shard's rows; a name is `kind.site.layer.draw`.
`shard-00000.json`
    Written after the tensors: their checksum, their size and the fingerprint of the store. A shard
    counts once this file is there and all three agree.
"""

import contextlib
import functools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from dlk_utils.errors import StoreError
from dlk_utils.provenance import code_hash, fingerprint, library_versions
from dlk_utils.safe_files import checksum, lock, make_folder, read_file, write_file

Plan = list[list[list[Any]]]
"""Shards, each a list of batches, each a list of row ids (in a store, strings)."""
LEAST_SHARD_ROWS = 64
MOST_SHARDS = 4096
"""How many shards a store has at most, of two files each."""
KEPT_BYTES = 1 << 30
"""How much of what was read is kept in memory, in bytes."""


def shard_rows_of(n_rows: int) -> int:
    """Say how many rows a shard of a store of `n_rows` has: 64, or more in a very large store.

    What is computed of a shard is lost if the process is killed before the shard is written.
    """
    return max(LEAST_SHARD_ROWS, -(-n_rows // MOST_SHARDS))


def fill(
    folder: Path,
    parts: Mapping[str, Any],
    plan: Plan,
    compute: Callable[[list[str]], dict[str, Tensor]],
    *,
    examples: Mapping[str, str] | None = None,
    desc: str = "shards",
    only: Sequence[int] | None = None,
) -> None:
    """Compute and write the shards that are missing or damaged.

    Parameters
    ----------
    parts
        Everything that decides the content, as JSON values, besides the code and the libraries.
    compute
        Takes the row ids of a batch, and returns named tensors [b, ...]. The code of the module
        that defines it (`code_hash`) is part of the store's fingerprint.
    examples
        The `example_id` of each row.
    only
        Numbers of the shards to make, for a worker. Whoever sends the work holds the `lock`.

    Raises
    ------
    StoreError
        If another process is writing here, if the folder holds other content (by other parts, code
        or versions) or the same by another plan, if a value is not finite, or if the disk is full.
        Nothing half-written stays.
    """
    make_folder(folder)
    made_by = {"code": code_hash(compute), "versions": library_versions()}
    # As JSON gives it back: a tuple, for instance, is a list there.
    all_parts = json.loads(json.dumps({**parts, **made_by}))
    example_of = {str(row_id): example for row_id, example in (examples or {}).items()}
    manifest = {"parts": all_parts, "plan": plan, "examples": example_of}
    manifest["fingerprint"] = _fingerprint_of(manifest)
    with lock(folder) if only is None else contextlib.nullcontext():
        _agree_on_manifest(folder, manifest)
        shards = range(len(plan)) if only is None else only
        missing = [i for i in shards if not is_good(folder, i, tell=True)]
        n_batches = sum(len(plan[i]) for i in missing)
        with tqdm(total=n_batches, desc=desc, unit="batch", mininterval=1) as bar:
            for i in missing:
                results = []
                for batch in plan[i]:
                    results.append(compute(batch))
                    bar.update()
                tensors = {name: torch.cat([r[name] for r in results]) for name in results[0]}
                rows = [row_id for batch in plan[i] for row_id in batch]
                _write_shard(folder, i, tensors, rows, manifest["fingerprint"])


def _agree_on_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or compare it with the one that is there."""
    here = _manifest(folder)
    if here is None:
        if os.path.isfile(folder / "manifest.json"):
            print(f"manifest.json in {folder.name} is damaged, so it is written again")
        write_file(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    elif here["fingerprint"] != manifest["fingerprint"]:
        keys = [key for key in ("parts", "plan", "examples") if here[key] != manifest[key]]
        names = here["parts"].keys() | manifest["parts"].keys()
        parts = [n for n in names if here["parts"].get(n) != manifest["parts"].get(n)]
        which = f" ({', '.join(sorted(parts))})" if parts else ""
        raise StoreError(
            f"{folder}: expected fingerprint {manifest['fingerprint']}, got "
            f"{here['fingerprint']}, which differs in {' and '.join(keys)}{which}; delete the "
            "folder, or choose another one"
        )


def _write_shard(
    folder: Path, i: int, tensors: dict[str, Tensor], rows: Sequence[str], store: str
) -> None:
    for name, tensor in tensors.items():
        where = f"{folder.name}, shard {i}, {name}"
        if len(tensor) != len(rows):
            raise StoreError(f"{where}: expected {len(rows)} rows, got {len(tensor)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = (~torch.isfinite(tensor)).flatten(1).any(1).nonzero()
            raise StoreError(
                f"{where}: expected finite numbers, got nan or inf in {tensor.dtype} in row "
                f'{rows[int(bad[0])]}; load the model in a wider dtype, Run(dtype="float32")'
            )
    content = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    receipt = checksum(content) | {"store": store}
    write_file(_shard(folder, i), content)
    write_file(_shard(folder, i).with_suffix(".json"), json.dumps(receipt).encode())


def is_complete(folder: Path) -> bool:
    """Whether the manifest and every planned shard are there and undamaged."""
    manifest = _manifest(folder)
    return manifest is not None and all(is_good(folder, i) for i in range(len(manifest["plan"])))


def is_good(folder: Path, i: int, *, tell: bool = False) -> bool:
    """Whether shard `i` is there with the right checksum; with `tell`, print if it is damaged."""
    manifest, shard = _manifest(folder), _shard(folder, i)
    receipt = shard.with_suffix(".json")
    if manifest is None or not os.path.isfile(shard) or not os.path.isfile(receipt):
        return False
    expected = _checksum(shard, _stamp(shard)) | {"store": manifest["fingerprint"]}
    try:
        good = json.loads(read_file(receipt) or b"") == expected
    except ValueError:
        good = False
    if tell and not good:
        print(f"{shard.name} in {folder.name} does not match its checksum, so it is made again")
    return good


def row_ids(folder: Path) -> list[str]:
    """Return the rows of a complete store, in stored order."""
    return [r for shard in _complete(folder)["plan"] for batch in shard for r in batch]


def read(folder: Path, name: str) -> Tensor:
    """Read one named tensor of all rows, [n, ...], and no other.

    Checksums are not looked at here; `is_complete` does that.

    Raises
    ------
    StoreError
        If the store is unfinished, has no such tensor, or a file is too short.
    """
    plan = _complete(folder)["plan"]
    with _open_shard(folder, 0) as f:
        names = set(f.keys())
        if name not in names:
            some = ", ".join(sorted(names)[:8])
            raise StoreError(f"{folder}: expected one of the tensors {some}, ..., got {name!r}")
        first = f.get_tensor(name)
    n_rows = [sum(len(batch) for batch in shard) for shard in plan]
    tensor = first.new_empty(sum(n_rows), *first.shape[1:])
    raw = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    row_bytes = first[:1].nbytes
    start = 0
    for i, n in enumerate(n_rows):
        end = start + n * row_bytes
        _read_into(raw[start:end], folder, i, name)
        start = end
    return tensor


def _read_into(target: memoryview, folder: Path, i: int, name: str) -> None:
    """Read a tensor's bytes out of a shard.

    A safetensors file holds the length of its header (8 bytes, little-endian), the header in JSON,
    with the place of each tensor counted from the header's end, and the tensors. It is read
    directly, because opening each shard by the library took twice as long.
    """
    where = f"{folder.name}, shard {i}, {name}"
    with _damage_is_said(folder, i), open(_shard(folder, i), "rb", buffering=0) as f:
        header = f.read(int.from_bytes(f.read(8), "little"))
        begin, end = _parse_header(header)[name]["data_offsets"]
        if end - begin != len(target):
            raise StoreError(f"{where}: expected {len(target)} bytes, got {end - begin}")
        f.seek(8 + len(header) + begin)
        if f.readinto(target) != len(target):
            raise StoreError(
                f"{where}: expected a complete file, got a shorter one; run the extraction again"
            )


@contextlib.contextmanager
def _open_shard(folder: Path, i: int) -> Iterator[Any]:
    with _damage_is_said(folder, i), safe_open(_shard(folder, i), "pt") as f:
        yield f


@contextlib.contextmanager
def _damage_is_said(folder: Path, i: int) -> Iterator[None]:
    """Turn what a missing, unreadable or damaged shard raises into a `StoreError`."""
    try:
        yield
    except StoreError:
        raise
    except (OSError, OverflowError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(
            f"{folder}: shard {i} is missing, damaged or cannot be read ({type(error).__name__}: "
            f"{error}); run the extraction again"
        ) from error


# Shards differ in their number of rows, and so in their headers. A sweep reads each many times.
@functools.lru_cache(maxsize=256)
def _parse_header(header: bytes) -> dict:
    """Parse a header; all shards with as many rows have the same one."""
    return json.loads(header)


def read_rows(
    folder: Path, prompts: pd.DataFrame, name: str
) -> Float[np.ndarray, "n ..."] | Int[np.ndarray, "n ..."]:
    """Read a stored tensor in the order of `prompts`, joined one to one by `row_id`.

    Returns
    -------
    ndarray [n, ...]
        Floating point values in float32.

    Raises
    ------
    StoreError
        If a row is not stored, or occurs twice in `prompts`.
    """
    places = _places(folder, _stamp_of_store(folder))
    missing = [row_id for row_id in prompts.row_id if row_id not in places]
    if missing or not prompts.row_id.is_unique:
        got = f"{len(missing)} that are not stored" if missing else "some of them twice"
        raise StoreError(f"{folder.name}: expected {len(prompts)} different rows of it, got {got}")
    tensor = _recent.read(folder, name)[[places[row_id] for row_id in prompts.row_id]]
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


class RecentTensors:
    """The tensors that were read last, as many as there is room for.

    Sweeps ask for the same layers again and again. A tensor of a store that was written to since is
    read again.

    Parameters
    ----------
    room
        How many bytes the tensors may have together. A larger one is read, and not kept.
    """

    def __init__(self, room: int):
        self.room = room
        self._tensors: OrderedDict[tuple, Tensor] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """How many bytes the kept tensors have together."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def read(self, folder: Path, name: str) -> Tensor:
        """Return what `store.read` does."""
        key = (folder, name, _stamp_of_store(folder))
        if key in self._tensors:
            self._tensors.move_to_end(key)
            return self._tensors[key]
        tensor = read(folder, name)
        self._tensors[key] = tensor
        while self.nbytes > self.room:
            # The one that was asked for longest ago.
            self._tensors.popitem(last=False)
        return tensor

    def clear(self) -> None:
        """Forget them all."""
        self._tensors.clear()


_recent = RecentTensors(KEPT_BYTES)


@functools.lru_cache(maxsize=8)
def _places(folder: Path, stamp: tuple[int, ...]) -> dict[str, int]:
    return {row_id: place for place, row_id in enumerate(row_ids(folder))}


def load_features(
    folder: Path,
    site: str,
    layer: int,
    kind: str = "activation",
    draw: int = 0,
    *,
    examples: Collection[str] | None = None,
) -> tuple[Float[np.ndarray, "n ..."], list[str]]:
    """Read the values at one site and layer in stored order, without reading others.

    Parameters
    ----------
    kind
        "activation" or "gradient".
    examples
        Take only the rows of these examples, by `example_id`.

    Returns
    -------
    X : ndarray [n, d], float32
    row_ids : list of str

    Raises
    ------
    StoreError
        If an example or a tensor is not stored.
    """
    name = f"{kind}.{site}.{layer}.{draw}"
    rows = row_ids(folder)
    if examples is None:
        return read(folder, name).float().numpy(), rows
    example_of, wanted = _complete(folder)["examples"], set(examples)
    if missing := sorted(wanted - set(example_of.values())):
        some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise StoreError(f"{folder.name}: expected examples that are stored, got others ({some})")
    places = [i for i, row_id in enumerate(rows) if example_of.get(row_id) in wanted]
    return read(folder, name)[places].float().numpy(), [rows[i] for i in places]


def as_dataset(folder: Path, names: Sequence[str]) -> Any:
    """Return some tensors (in float32) as a `datasets.Dataset`, with `row_id` and `example_id`."""
    from datasets import Dataset

    rows, examples = row_ids(folder), _complete(folder)["examples"]
    columns = {"row_id": rows, "example_id": [examples.get(row_id) for row_id in rows]}
    columns |= {name: read(folder, name).float().numpy() for name in names}
    return Dataset.from_dict(columns).with_format("numpy")


def describe(folder: Path) -> dict[str, Any]:
    """Summarise a store: its rows, shards and tensors, their width and dtype, and megabytes."""
    plan = _complete(folder)["plan"]
    with _open_shard(folder, 0) as f:
        names = list(f.keys())
        widest = f.get_tensor(max(names, key=lambda name: f.get_slice(name).get_shape()[-1]))
    size = sum(path.stat().st_size for path in folder.glob("shard-*"))
    return {
        "folder": folder.name,
        "rows": len(row_ids(folder)),
        "shards": len(plan),
        "tensors": len(names),
        "width": widest.shape[-1],
        "dtype": str(widest.dtype).removeprefix("torch."),
        "MB": round(size / 1e6, 1),
    }


def _shard(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05d}.safetensors"


def _complete(folder: Path) -> dict:
    """Return the manifest of a store that has all its shards, or raise `StoreError`."""
    manifest = _manifest(folder)
    if manifest is None:
        damaged = os.path.isfile(folder / "manifest.json")
        got = "a damaged manifest" if damaged else "none"
        raise StoreError(f"{folder}: expected a store, got {got}; run the extraction again")
    _require_all_shards(folder, len(manifest["plan"]), _stamp_of_store(folder))
    return manifest


# Each read asks, and a large store has many files to list. An error is not remembered.
@functools.lru_cache(maxsize=8)
def _require_all_shards(folder: Path, n_shards: int, stamp: tuple[int, ...]) -> None:
    files = set(os.listdir(folder))
    receipts = [_shard(folder, i).with_suffix(".json").name for i in range(n_shards)]
    missing = [name for name in receipts if name not in files]
    if missing:
        raise StoreError(
            f"{folder}: expected {n_shards} shards, but {len(missing)} are missing; run the "
            "extraction again"
        )


def _manifest(folder: Path) -> dict | None:
    """Return the manifest, or None if it is missing or does not have its own fingerprint."""
    path = folder / "manifest.json"
    # Not `Path.is_file`, which raises an error for a name that is too long.
    return _read_manifest(path, _stamp(path)) if os.path.isfile(path) else None


@functools.lru_cache(maxsize=8)
def _read_manifest(path: Path, stamp: tuple[int, ...]) -> dict | None:
    try:
        manifest = json.loads(read_file(path) or b"")
        return manifest if manifest["fingerprint"] == _fingerprint_of(manifest) else None
    except (ValueError, KeyError, TypeError):
        return None


def _fingerprint_of(manifest: Mapping) -> str:
    return fingerprint({key: manifest[key] for key in ("parts", "plan", "examples")})


@functools.cache
def _checksum(path: Path, stamp: tuple[int, ...]) -> dict[str, Any]:
    """Compute a file's checksum; with an unchanged `stamp` it is not read again."""
    return checksum(read_file(path) or b"")


def _stamp_of_store(folder: Path) -> tuple[int, ...]:
    """Return what differs when a file of a store was written: the stamps of folder and manifest.

    Every file of a store gets its name when it is complete, which changes the time of its folder.
    """
    manifest = folder / "manifest.json"
    return (*_stamp(folder), *_stamp(manifest)) if os.path.isfile(manifest) else ()


def _stamp(path: Path) -> tuple[int, ...]:
    """Return a file's size, time of last change and inode: files with other bytes differ in it."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
