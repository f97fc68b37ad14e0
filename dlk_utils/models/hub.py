"""Which commit of a repository of the Hugging Face hub is meant: the hub's newest, or where no hub answers, what was downloaded last."""

from pathlib import Path


def commit(repo: str, kind: str = "model") -> str:
    """The commit of a model or a data set (`kind`). Raises what the hub's client raises if no hub answers and nothing of it is in the local cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return HfApi().repo_info(repo, repo_type=kind, timeout=10).sha
    except Exception:
        folder = Path(HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
        if (folder / "refs" / "main").is_file():
            return (folder / "refs" / "main").read_text().strip()
        got = sorted(
            folder.glob("snapshots/*"), key=lambda p: p.stat().st_mtime
        )  # what is asked for by commit leaves no ref
        if not got:
            raise
        return got[-1].name
