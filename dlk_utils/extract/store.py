"""A sharded, resumable, checksummed store of tensors by row. A run that is stopped at any moment goes on where it was.

A store is a folder: `manifest.json` (what decides the content, the plan: which rows lie in which shard, and the fingerprint of all that), then for each
shard `shard-00000.safetensors` and, written last, `shard-00000.json` with its checksum and that fingerprint. A tensor is called `kind.site.layer.draw`.
"""

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xxhash
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from dlk_utils.errors import StoreError
from dlk_utils.provenance import fingerprint, write_file

FORMAT = 5  # raise it when what is stored, or the way it is, changes


Plan = list[list[list[str]]]
"""Shards, each a list of batches, each a list of row ids."""


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
    """Write the shards that are not there yet; `compute` gives named tensors [b, ...] for a batch of row ids.

    What is damaged is made again, with a message. `examples` gives the example of each row. `only` is for a worker: it makes these
    shards, while whoever sends the work holds the `lock`. Raises `StoreError` if another process is writing here, if the
    folder holds other content or the same by another plan, if a value is not finite, or if the disk is full (nothing half-written stays).
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = json.loads(
        json.dumps(
            {
                "parts": {"format": FORMAT} | dict(parts),
                "plan": plan,
                "examples": dict(examples or {}),
            }
        )
    )  # as it is read again
    manifest["fingerprint"] = _fingerprint_of(manifest)
    with lock(folder) if only is None else contextlib.nullcontext():
        here = _manifest(folder)
        if here is None:
            if (folder / "manifest.json").is_file():
                print(f"manifest.json in {folder.name} is damaged: it is written again")
            write_file(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        elif here["fingerprint"] != manifest["fingerprint"]:
            other = " and ".join(k for k in ("parts", "plan", "examples") if here[k] != manifest[k])
            raise StoreError(
                f"{folder}: expected fingerprint {manifest['fingerprint']}, the folder holds {here['fingerprint']}, with other {other}; delete it, or choose another folder"
            )
        todo = [
            i
            for i in (range(len(plan)) if only is None else only)
            if not is_good(folder, i, tell=True)
        ]
        with tqdm(
            total=sum(len(plan[i]) for i in todo), desc=desc, unit="batch", mininterval=1
        ) as bar:
            for i in todo:
                done = []
                for batch in plan[i]:
                    done.append(compute(batch))
                    bar.update()
                _write_shard(
                    folder,
                    i,
                    {k: torch.cat([d[k] for d in done]).contiguous() for k in done[0]},
                    [r for batch in plan[i] for r in batch],
                    manifest["fingerprint"],
                )


def is_complete(folder: Path) -> bool:
    """Whether the manifest is whole, and every planned shard is there with the right checksum."""
    manifest = _manifest(folder)
    return manifest is not None and all(is_good(folder, i) for i in range(len(manifest["plan"])))


def row_ids(folder: Path) -> list[str]:
    """The rows of a complete store, in stored order."""
    return [r for shard in _complete(folder)["plan"] for batch in shard for r in batch]


def read(folder: Path, name: str) -> Tensor:
    """One named tensor over all rows [n, ...]; no other is read: of each shard its header, and the tensor's own bytes."""
    plan = _complete(folder)["plan"]
    with safe_open(_shard(folder, 0), "pt") as f:
        if name not in f.keys():  # noqa: SIM118 (not a dict)
            raise StoreError(
                f"{folder}: no tensor {name!r}; there are {', '.join(sorted(f.keys())[:8])} ..."
            )
        one = f.get_tensor(name)
    rows = [sum(map(len, shard)) for shard in plan]
    found = one.new_empty(sum(rows), *one.shape[1:])
    raw, start = memoryview(found.view(-1).view(torch.uint8).numpy()), 0
    for i, n in enumerate(rows):
        with (
            open(_shard(folder, i), "rb", buffering=0) as f
        ):  # safetensors' layout: the header's length, the header, the tensors; opening each file by the library took twice as long
            header = f.read(int.from_bytes(f.read(8), "little"))
            begin, end = _header(header)[name]["data_offsets"]
            if end - begin != n * one[:1].nbytes:
                raise StoreError(
                    f"{folder.name}, shard {i}, {name}: expected {n * one[:1].nbytes} bytes, got {end - begin}"
                )
            f.seek(8 + len(header) + begin)
            if f.readinto(raw[start : start + end - begin]) != end - begin:
                raise StoreError(
                    f"{folder.name}, shard {i}, {name}: the file ends early; run the extraction again"
                )
            start += end - begin
    return found


def load_features(
    folder: Path,
    site: str,
    layer: int,
    kind: str = "activation",
    draw: int = 0,
    *,
    examples: Collection[str] | None = None,
) -> tuple[Float[np.ndarray, "n ..."], list[str]]:
    """`(X, row_ids)`: one (site, layer, kind, draw) in fp32, without reading the others; of some `example_id`s only, if given. `kind` is activation or gradient.

    Checksums are not looked at here: `is_complete` does that, which reads all of the store once. Raises `StoreError` for what is not stored.
    """
    of, rows, wanted = _complete(folder)["examples"], row_ids(folder), set(examples or ())
    at = [i for i, r in enumerate(rows) if examples is None or of.get(r) in wanted]
    if missing := wanted - set(of.values()):
        raise StoreError(
            f"{folder.name}: expected examples that are stored, got {', '.join(sorted(missing)[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    X = read(folder, f"{kind}.{site}.{layer}.{draw}")
    return (X if examples is None else X[at]).float().numpy(), [rows[i] for i in at]


def as_dataset(folder: Path, names: Sequence[str]) -> Any:
    """A `datasets.Dataset` of some tensors (in fp32), with `row_id` and `example_id`."""
    from datasets import Dataset

    rows, examples = row_ids(folder), _complete(folder)["examples"]
    return Dataset.from_dict(
        {"row_id": rows, "example_id": [examples.get(r) for r in rows]}
        | {n: read(folder, n).float().numpy() for n in names}
    ).with_format("numpy")


def describe(folder: Path) -> dict[str, Any]:
    """What a notebook prints of a store: rows, tensors, shape, dtype, size."""
    plan = _complete(folder)["plan"]
    with safe_open(_shard(folder, 0), "pt") as f:
        names = list(f.keys())
        one = f.get_tensor(max(names, key=lambda k: f.get_slice(k).get_shape()[-1]))
    size = sum(p.stat().st_size for p in folder.glob("shard-*"))
    return {
        "folder": folder.name,
        "rows": len(row_ids(folder)),
        "shards": len(plan),
        "tensors": len(names),
        "width": one.shape[-1],
        "dtype": str(one.dtype)[6:],
        "MB": round(size / 1e6, 1),
    }


def _write_shard(
    folder: Path, i: int, tensors: dict[str, Tensor], rows: Sequence[str], of: str
) -> None:
    for name, t in tensors.items():
        if len(t) != len(rows):
            raise StoreError(
                f"{folder.name}, shard {i}, {name}: expected {len(rows)} rows, got {len(t)}"
            )
        if t.is_floating_point() and not torch.isfinite(t).all():
            bad = rows[int((~torch.isfinite(t)).flatten(1).any(1).nonzero()[0])]
            raise StoreError(
                f'{folder.name}, shard {i}, {name}: row {bad} is not finite in {t.dtype}; load the model in a wider dtype, Run(dtype="float32")'
            )
    content = save({k: t.cpu() for k, t in tensors.items()})
    write_file(_shard(folder, i), content)
    write_file(
        _shard(folder, i).with_suffix(".json"),
        json.dumps(
            {"xxh3_128": xxhash.xxh3_128_hexdigest(content), "bytes": len(content), "store": of}
        ).encode(),
    )


def is_good(folder: Path, i: int, *, tell: bool = False) -> bool:
    """Whether a shard of this store is there with the right checksum."""
    manifest, shard = _manifest(folder), _shard(folder, i)
    if manifest is None or not shard.is_file() or not shard.with_suffix(".json").is_file():
        return False
    stamp = _stamp(shard)
    try:
        good = json.loads(shard.with_suffix(".json").read_bytes()) == {
            "xxh3_128": _checksum(shard, stamp),
            "bytes": stamp[0],
            "store": manifest["fingerprint"],
        }
    except ValueError:
        good = False
    if tell and not good:
        print(f"{shard.name} in {folder.name} does not have its checksum: it is made again")
    return good


@functools.cache
def _checksum(path: Path, stamp: tuple[int, ...]) -> str:
    """Of a file's bytes; one that nobody touched since is not read again."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _stamp(path: Path) -> tuple[int, ...]:
    """Size, time of the last change, and which file it is: other bytes have another stamp."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _complete(folder: Path) -> dict:
    manifest = _manifest(folder)
    if manifest is None:
        raise StoreError(
            f"{folder}: {'the manifest is damaged; run the extraction again' if (folder / 'manifest.json').is_file() else 'no store here'}"
        )
    there = set(os.listdir(folder))
    missing = [
        i
        for i in range(len(manifest["plan"]))
        if _shard(folder, i).with_suffix(".json").name not in there
    ]
    if missing:
        raise StoreError(
            f"{folder}: unfinished, {len(missing)} of {len(manifest['plan'])} shards are missing; run the extraction again"
        )
    return manifest


def _manifest(folder: Path) -> dict | None:
    """The manifest, if it is there and holds what its fingerprint says."""
    path = folder / "manifest.json"
    return _read_manifest(path, _stamp(path)) if path.is_file() else None


@functools.lru_cache(maxsize=8)
def _read_manifest(path: Path, stamp: tuple[int, ...]) -> dict | None:
    try:
        found = json.loads(path.read_bytes())
        return found if found["fingerprint"] == _fingerprint_of(found) else None
    except (ValueError, KeyError, TypeError):
        return None


def _fingerprint_of(manifest: Mapping) -> str:
    return fingerprint({k: manifest[k] for k in ("parts", "plan", "examples")})


@functools.lru_cache(maxsize=8)
def _header(header: bytes) -> dict:
    return json.loads(header)


def _shard(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05d}.safetensors"


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One writer at a time: raises `StoreError` if another process holds it."""
    with open(folder / ".lock", "w") as f:
        try:
            fcntl.flock(
                f, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the system frees it when the process dies
        except BlockingIOError:
            raise StoreError(
                f"{folder}: another process is writing here; wait for it, or choose another runs_dir"
            ) from None
        except OSError as e:
            raise StoreError(
                f"{folder}: could not be locked ({e.strerror}); choose a runs_dir on a file system that has locks"
            ) from e
        for torn in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            torn.unlink()
        yield


def read_rows(
    folder: Path, prompts: pd.DataFrame, name: str
) -> Float[np.ndarray, "n ..."] | Int[np.ndarray, "n ..."]:
    """A stored tensor in the order of `prompts`, joined one to one by `row_id`."""
    stamp = max(
        (
            p.stat().st_mtime_ns
            for p in [*folder.glob("manifest.json"), *folder.glob("shard-*.json")]
        ),
        default=0,
    )
    at = _positions(folder, stamp)
    missing = [r for r in prompts.row_id if r not in at]
    if missing or len(set(prompts.row_id)) != len(prompts):
        raise KeyError(
            f"{folder.name}: expected each of {len(prompts)} rows once, {len(missing)} are not stored"
        )
    tensor = _stored_tensor(folder, name, stamp)[[at[r] for r in prompts.row_id]]
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


@functools.lru_cache(maxsize=8)
def _positions(folder: Path, stamp: int) -> dict[str, int]:
    return {r: i for i, r in enumerate(row_ids(folder))}


@functools.lru_cache(maxsize=64)
def _stored_tensor(folder: Path, name: str, stamp: int) -> Tensor:
    """Sweeps ask for the same layers again and again; `stamp` changes when a shard is written, so that one which is repaired is read again."""
    return read(folder, name)
