"""Configuration, tokenizer and the like: into the hub's own cache, by its own library."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dots1_local.errors import CheckpointError
from dots1_local.hub.client import HubFile, HubRepo, patiently
from dots1_local.hub.download import has_digest

__all__ = ["fetch_small", "into_cache"]

_LARGEST = 100 << 20  # bytes; no configuration or tokenizer is larger


def fetch_small(repo: HubRepo, files: Sequence[HubFile]) -> Path:
    """Fetch these files, each with the listed hash; returns the cache's folder that has them.

    Raises:
        CheckpointError: one cannot be had, is damaged or far too large.
    """
    folders = [_fetch(repo, file).parent for file in files]
    return folders[0]


def _fetch(repo: HubRepo, file: HubFile) -> Path:
    if file.size > _LARGEST:
        raise CheckpointError(f"{file.name} of {repo} is {file.size:,} bytes; that is no model's")
    path = into_cache(repo, file.name)
    if has_digest(path, file):
        return path
    path = into_cache(repo, file.name, force_download=True)
    if has_digest(path, file):
        return path
    raise CheckpointError(f"{file.name} of {repo} came with another hash than the hub lists")


def into_cache(repo: HubRepo, name: str, revision: str | None = None, **options: Any) -> Path:
    """The path of a file in the cache, where it is fetched to if it is not there yet.

    Raises:
        CheckpointError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Quiet(tqdm):  # the library prints nothing
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{**settings, "disable": True})

    def once() -> str:
        path: str = hf_hub_download(
            repo.name,
            name,
            revision=revision or repo.commit,
            endpoint=repo.endpoint,
            tqdm_class=Quiet,
            **options,
        )
        return path

    try:
        with repo.asking(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a full disk is warned of, and then an error
            return Path(patiently(once))
    except OSError as error:
        raise CheckpointError(
            f"cannot fetch {name} of {repo}: {error.strerror or ' '.join(str(error).split())}"
        ) from error
