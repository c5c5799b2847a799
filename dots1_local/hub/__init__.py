"""Checkpoints on the Hugging Face hub, opened by their id.

Opening one fetches configuration and tokenizer into the hub's own cache, but only the headers of
the shards. `Conversion.prepare` accepts what `open_hub` returns in place of a folder.
huggingface_hub (the extra `hub`) is not imported before a checkpoint is opened.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config
from dots1_local.errors import CheckpointError, Dots1Error, UsageError
from dots1_local.files.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    load_json,
    promised_tensors,
    read_index,
)
from dots1_local.files.safetensors import Slice, header_length, read_header, tensor_table
from dots1_local.hub.client import HubFile, HubRepo, find_repo, parallel_map

__all__ = [
    "HubCheckpoint", "is_hub_id", "on_hub", "open_cached", "open_checkpoint", "open_hub",
    "open_repo",
]  # fmt: skip

_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
_REQUIRED = ("config.json", "tokenizer.json")
_OPTIONAL = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "README.md")
_AT_ONCE = 8  # headers
_LIKELY_HEADER = 1 << 17  # bytes; no header of dots.llm1 is longer, so one request is enough
_LARGEST_SMALL_FILE = 100 << 20  # bytes; no configuration or tokenizer is larger


class HubCheckpoint(Checkpoint):
    """A checkpoint on the hub; the folder `path` in the cache holds all files except the shards.

    Shards are fetched into the same folder, or into another one: see `with_shards_in`.
    """

    def __init__(
        self, repo: HubRepo, path: Path, raw_config: dict[str, Any], slices: dict[str, Slice]
    ) -> None:
        super().__init__(path, raw_config, slices)
        self.repo = repo

    @property
    def name(self) -> str:
        return self.repo.name.partition("/")[2]

    @property
    def source(self) -> str:
        return str(self.repo)

    @property
    def fingerprint(self) -> str:
        return f"{self.repo.name}@{self.repo.commit}"  # a commit determines every byte

    @property
    def shard_files(self) -> tuple[HubFile, ...]:
        """The shards as the hub lists them; none if only the cache is used."""
        names = (path.name for path in self.shards)
        return tuple(self.repo.files[name] for name in names if name in self.repo.files)

    def with_shards_in(self, folder: Path, names: Sequence[str]) -> "HubCheckpoint":
        """Return the same checkpoint, with these shards read from another folder."""
        moved = {name: folder / name for name in names}

        def here(place: Slice) -> Slice:
            scales = place.scales and replace(place.scales, place=here(place.scales.place))
            return replace(place, file=moved.get(place.file.name, place.file), scales=scales)

        slices = {tensor: here(place) for tensor, place in self._slices.items()}
        return HubCheckpoint(self.repo, self.path, self.raw_config, slices)

    def _bytes(self, piece: Slice) -> NDArray[np.uint8]:
        """Ask the hub for bytes of a shard that is not on disk."""
        file = self.repo.files.get(piece.file.name)
        if file is None or piece.file.is_file():
            return super()._bytes(piece)
        return np.frombuffer(self.repo.read(file, piece.nbytes, piece.offset), np.uint8)

    def check_header(self, shard: Path) -> None:
        """Make sure that a shard's tensors lie where the header said that was fetched on opening.

        Only this finds a header that arrived damaged: the hub lists hashes of whole files only.

        Raises:
            CheckpointError: the shard has another header, or cannot be read.
        """
        for name, place in read_header(shard).items():
            if name in self and _in_shard(self.locate(name)) != _in_shard(place):
                raise CheckpointError(
                    f"{shard.name} of {self.repo} has another header than the hub sent first, "
                    "which was damaged on the way: run the same command again"
                )


def _in_shard(place: Slice) -> Slice:
    """The place in its shard, wherever the shard is."""
    return replace(place, file=Path(place.file.name), scales=None)


def on_hub(checkpoint: Checkpoint, low_disk: bool) -> HubCheckpoint | None:
    """Return a checkpoint on the hub as such, and None for one in a folder.

    Raises:
        UsageError: `low_disk` is given for a folder.
    """
    if isinstance(checkpoint, HubCheckpoint):
        return checkpoint
    if low_disk:
        raise UsageError(f"{checkpoint.source} is on the disk already; leave --low-disk out")
    return None


def open_checkpoint(path: str, revision: str | None = None) -> Checkpoint:
    """Open the checkpoint in a folder, or else that of a model on the hub, organisation/model.

    Raises:
        CheckpointError: it is neither, or is incomplete, corrupt, or of another architecture.
        UsageError: the extra `hub` is not installed, or a revision is given for a folder.
    """
    if os.path.lexists(path):
        if revision is not None:
            raise UsageError(f"{path} is a folder; --revision needs an id on the hub")
        return Checkpoint.open(path)
    if not is_hub_id(path):
        raise CheckpointError(
            f"no such folder: {path}; it is not an id on the hub, organisation/model, either"
        )
    try:
        repo = open_repo(path, revision, None)
    except Dots1Error as error:
        raise type(error)(f"there is no folder {path}, and {error}") from error
    return _open(repo)


def open_hub(
    name: str, revision: str | None = None, *, endpoint: str | None = None
) -> HubCheckpoint:
    """Open a model on the hub at a branch, tag or commit, and locate every tensor.

    `endpoint` is the URL of a server with the hub's API; if it is None, HF_ENDPOINT is used. With
    HF_HUB_OFFLINE set, the hub's cache must hold everything.

    Raises:
        CheckpointError: there is no such model that you may read, the hub cannot be reached, or the
            checkpoint is incomplete, corrupt, or of another architecture.
        UsageError: the extra `hub` is not installed.
    """
    return _open(open_repo(name, revision, endpoint))


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of an id on the hub, organisation/model."""
    return bool(_ID.fullmatch(text))


def open_repo(
    name: str, revision: str | None, endpoint: str | None, *, marker: str | None = "config.json"
) -> HubRepo:
    """Find a repository on the hub, or with HF_HUB_OFFLINE in the cache, which must have `marker`.

    Without a `marker`, any file in the cache is enough: see `open_cached`.

    Raises:
        CheckpointError: there is no such repository that you may read, or the hub cannot be
            reached.
        UsageError: the extra `hub` is not installed.
    """
    try:
        import huggingface_hub.hf_api  # noqa: F401 -- without it, the package prints import errors
        from huggingface_hub import is_offline_mode
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise UsageError("fetching from the hub needs pip install 'dots1-local[hub]'") from None
    except ValueError as error:
        raise _malformed_settings(error) from error
    try:
        if is_offline_mode():
            return _find_cached(name, revision, marker) if marker else open_cached(name)
        return find_repo(name, revision, endpoint)
    except HFValidationError:
        raise CheckpointError(f"{name} is not an id on the hub, organisation/model") from None
    except ValueError as error:
        raise _malformed_settings(error) from error
    except OSError as error:  # the token cannot be read
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error


def _malformed_settings(error: ValueError) -> UsageError:
    return UsageError(f"an HF_ or proxy variable of the environment is malformed: {error}")


def _find_cached(name: str, revision: str | None, marker: str) -> HubRepo:
    """Return the commit in the cache; it has no `files`, as only the hub lists them."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(name, marker, revision=revision)
    if not isinstance(found, str):
        wanted = f"revision {revision} of {name}" if revision else name
        raise CheckpointError(
            f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} lacks {wanted}"
        )
    folder = Path(found).parent
    return HubRepo(name, folder.name, folder.name, {}, constants.ENDPOINT)


def open_cached(name: str) -> HubRepo:
    """Return the cache's newest commit of a repository, with its files but without their hashes.

    Raises:
        CheckpointError: the cache has no such repository.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} lacks {name}"
        ) from None
    found = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    files = {name: HubFile(name, size, "") for name, size in names.items()}
    return HubRepo(name, folder.name, folder.name, files, constants.ENDPOINT)


def _open(repo: HubRepo) -> HubCheckpoint:
    from huggingface_hub import is_offline_mode, snapshot_download

    if is_offline_mode():
        cached = snapshot_download(repo.name, revision=repo.commit, local_files_only=True)
        found = Checkpoint.open(cached)
        slices = {name: found.locate(name) for name in found}
        return HubCheckpoint(repo, found.path, found.raw_config, slices)
    wanted = [*_REQUIRED, *(name for name in (*_OPTIONAL, INDEX) if name in repo.files)]
    for name in wanted:
        if name not in repo.files:
            raise CheckpointError(f"{repo} has no file {name}")
        if (size := repo.files[name].size) > _LARGEST_SMALL_FILE:
            raise CheckpointError(f"{name} of {repo} has {size:,} bytes, far too many")
        folder = repo.fetch(repo.files[name]).parent
    raw_config = load_json(folder / "config.json")
    Dots1Config.from_json(raw_config)
    return HubCheckpoint(repo, folder, raw_config, _read_headers(repo, folder))


def _read_headers(repo: HubRepo, folder: Path) -> dict[str, Slice]:
    """Return the places of all tensors."""
    if INDEX not in repo.files:
        if SINGLE not in repo.files:
            raise CheckpointError(f"{repo} has neither {INDEX} nor {SINGLE}")
        return _read_header(repo, SINGLE, folder)
    weight_map = read_index(folder / INDEX)
    shards = list(dict.fromkeys(weight_map.values()))
    for shard in shards:
        if not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{INDEX} of {repo} names {shard!r}, which is not a safetensors file"
            )
        if shard not in repo.files:
            raise CheckpointError(f"{INDEX} of {repo} names {shard}, which does not exist")
    headers = parallel_map(lambda shard, _: _read_header(repo, shard, folder), shards, _AT_ONCE)
    return promised_tensors(weight_map, dict(zip(shards, headers, strict=True)))


def _read_header(repo: HubRepo, shard: str, folder: Path) -> dict[str, Slice]:
    file, path = repo.files[shard], folder / shard
    if file.size < 8:
        raise CheckpointError(f"{shard} of {repo} is not a safetensors file")
    start = repo.read(file, min(_LIKELY_HEADER, file.size))
    end = 8 + header_length(path, start, file.size)
    if end > len(start):
        start = repo.read(file, end)
    return tensor_table(path, start[8:end], file.size)
