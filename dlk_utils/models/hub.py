"""Which commit of a repository of the Hugging Face hub to use."""

from pathlib import Path


def commit(repo: str, kind: str = "model") -> str:
    """Return the newest commit of a repository, or if no hub answers, the one downloaded last.

    `kind` is "model" or "dataset". If the local cache has nothing of the repository either, the
    error of the hub's client is passed on.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return HfApi().repo_info(repo, repo_type=kind, timeout=10).sha
    except Exception:
        folder = Path(HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
        newest_commit = folder / "refs" / "main"
        if newest_commit.is_file():
            return newest_commit.read_text().strip()
        # A download by commit leaves no ref.
        snapshots = list(folder.glob("snapshots/*"))
        if not snapshots:
            raise
        return max(snapshots, key=lambda path: path.stat().st_mtime).name
