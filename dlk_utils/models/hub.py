"""The Hugging Face hub: which commit of a repository to use, and single files of it."""

import functools
from collections.abc import Sequence
from pathlib import Path


def commit(repo: str, kind: str = "model", revision: str | None = None) -> str:
    """Return the commit of a branch or tag; if no hub answers, the one that was downloaded last.

    `kind` is "model" or "dataset"; without a `revision` it is the newest commit. If the local cache
    has nothing of it either, the error of the hub's client is passed on.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=10).sha
    except Exception:
        cached = _cached_commit(repo, kind, revision)
        if cached is None:
            raise
        return cached


def _cached_commit(repo: str, kind: str, revision: str | None) -> str | None:
    folder = _cache_of(repo, kind)
    ref = folder / "refs" / (revision or "main")
    if ref.is_file():
        return ref.read_text().strip()
    # A download by commit leaves no ref.
    snapshots = [
        path for path in folder.glob("snapshots/*") if path.name.startswith(revision or "")
    ]
    if not snapshots:
        return None
    return max(snapshots, key=lambda path: path.stat().st_mtime).name


def file(repo: str, name: str, revision: str) -> Path | None:
    """Return a file of a model's commit, downloaded if need be; None if it has no such file.

    A commit whose configuration was downloaded without this file counts as one that has none: the
    loaders of transformers ask for both, and a complete download has both.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = cached_file(repo, name, revision)
    if cached or cached_file(repo, "config.json", revision):
        return cached
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def cached_file(repo: str, name: str, revision: str) -> Path | None:
    """Return a file of a model's commit if it was downloaded before, else None."""
    path = _cache_of(repo, "model") / "snapshots" / revision / name
    return path if path.is_file() else None


def folder(repo: str, revision: str, patterns: Sequence[str]) -> Path:
    """Return a folder with the files of a model's commit that match one of the patterns.

    The hub is asked once in a process.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    return _download(HF_HUB_CACHE, repo, revision, tuple(patterns))


@functools.cache
def _download(cache: str, repo: str, revision: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    options = {"cache_dir": cache, "allow_patterns": list(patterns)}
    return Path(snapshot_download(repo, revision=revision, **options))


def _cache_of(repo: str, kind: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
