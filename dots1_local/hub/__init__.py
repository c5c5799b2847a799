"""Checkpoints that lie on the Hugging Face hub, opened by their id.

Opening one fetches configuration and tokenizer into the hub's own cache, and of the shards only
the headers. `Conversion.prepare` takes what `open_hub` returns in place of a folder. Nothing here
imports huggingface_hub (the extra `hub`) before something is opened.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dots1_local.architecture import Dots1Config
from dots1_local.errors import CheckpointError, UsageError
from dots1_local.files.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    load_json,
    promised_tensors,
    read_index,
)
from dots1_local.files.safetensors import Slice, header_length, tensor_table
from dots1_local.hub.client import HubFile, HubRepo, resolve
from dots1_local.hub.small_files import fetch_small
from dots1_local.hub.together import together

__all__ = ["HubCheckpoint", "open_checkpoint", "open_hub"]

_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
_REQUIRED = ("config.json", "tokenizer.json")
_OPTIONAL = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "README.md")
_AT_ONCE = 8  # headers
_LIKELY_HEADER = 1 << 17  # bytes; holds any of dots.llm1's headers, so one request is enough


class HubCheckpoint(Checkpoint):
    """A checkpoint on the hub; the folder `path` in the cache holds everything but the shards.

    Shards are fetched to there, or elsewhere: see `with_shards_in`. `starts` holds each shard's
    first bytes up to the end of its header, as they were fetched to open it.
    """

    def __init__(
        self,
        repo: HubRepo,
        path: Path,
        raw_config: dict[str, Any],
        slices: dict[str, Slice],
        starts: Mapping[str, bytes],
    ) -> None:
        super().__init__(path, raw_config, slices)
        self.repo = repo
        self._starts = starts

    @property
    def name(self) -> str:
        return self.repo.name.partition("/")[2]

    @property
    def source(self) -> str:
        return str(self.repo)

    @property
    def fingerprint(self) -> str:
        return f"{self.repo.name}@{self.repo.commit}"  # a commit settles every byte

    @property
    def shard_files(self) -> tuple[HubFile, ...]:
        """The shards as the hub lists them; none where the cache is all there is."""
        names = (path.name for path in self.shards)
        return tuple(self.repo.files[name] for name in names if name in self.repo.files)

    def with_shards_in(self, folder: Path, names: Sequence[str]) -> "HubCheckpoint":
        """The same checkpoint with these shards read from another folder."""
        moved = {name: folder / name for name in names}
        slices = {
            tensor: replace(place, file=moved.get(place.file.name, place.file))
            for tensor, place in self._slices.items()
        }
        return HubCheckpoint(self.repo, self.path, self.raw_config, slices, self._starts)

    def check_start(self, shard: Path) -> None:
        """Make sure that a shard has the header that was fetched first, and all plans rest on.

        A damaged header is found only here, as the hub lists hashes of whole files alone.

        Raises:
            CheckpointError: it has another.
            OSError: it cannot be read.
        """
        start = self._starts.get(shard.name, b"")
        with open(shard, "rb") as file:
            if file.read(len(start)) != start:
                raise CheckpointError(
                    f"{shard.name} of {self.repo} has another header than was sent first; that was "
                    "damaged on the way: run the same command again"
                )


def open_checkpoint(path: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, or else that of a model on the hub, organisation/model.

    Raises:
        CheckpointError: it is neither, or is incomplete, corrupt, or of another architecture.
        UsageError: the extra `hub` is not installed, or a revision is given for a folder.
    """
    if os.path.lexists(path):
        if revision is not None:
            raise UsageError(f"{path} is a folder here; --revision goes with an id of the hub")
        return Checkpoint.open(path)
    if not _ID.fullmatch(path):
        raise CheckpointError(
            f"no such folder: {path}; nor is that an id of the hub, organisation/model"
        )
    return _open(path, revision, None, prefix=f"there is no folder {path}, and ")


def open_hub(
    name: str, revision: str | None = None, *, endpoint: str | None = None
) -> HubCheckpoint:
    """A model on the hub at a branch, tag or commit, with every tensor's place known.

    `endpoint` is the URL of a server with the hub's API; if it is None, HF_ENDPOINT is used. With
    HF_HUB_OFFLINE set, the hub's cache must hold everything.

    Raises:
        CheckpointError: there is no such model that you may read, the hub cannot be reached, or the
            checkpoint is incomplete, corrupt, or of another architecture.
        UsageError: the extra `hub` is not installed.
    """
    return _open(name, revision, endpoint, prefix="")


def _open(name: str, revision: str | None, endpoint: str | None, prefix: str) -> HubCheckpoint:
    """`prefix` begins the errors that a mistyped name may be the cause of."""
    try:
        import huggingface_hub.hf_api  # noqa: F401 -- by way of the package it prints its errors
        from huggingface_hub import is_offline_mode
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
    except ImportError:
        raise UsageError(
            f"{prefix}fetching from the hub needs pip install 'dots1-local[hub]'"
        ) from None
    except ValueError as error:
        raise _garbled_settings(prefix, error) from error
    try:
        validate_repo_id(name)
        if is_offline_mode():
            return _open_cached(name, revision)
        repo = resolve(name, revision, endpoint)
    except HFValidationError:
        raise CheckpointError(f"{prefix}{name} is no id of the hub, organisation/model") from None
    except CheckpointError as error:
        raise CheckpointError(f"{prefix}{error}") from error
    except ValueError as error:
        raise _garbled_settings(prefix, error) from error
    except OSError as error:  # reading the token
        raise CheckpointError(f"{prefix}cannot read {error.filename}: {error.strerror}") from error
    return _open_at(repo)


def _garbled_settings(prefix: str, error: ValueError) -> UsageError:
    return UsageError(
        f"{prefix}the hub cannot be asked with the HF_ and proxy variables of the environment: "
        f"{error}"
    )


def _open_at(repo: HubRepo) -> HubCheckpoint:
    wanted = [*_REQUIRED, *(name for name in (*_OPTIONAL, INDEX) if name in repo.files)]
    folder = fetch_small(repo, [repo.file(name) for name in wanted])
    raw_config = load_json(folder / "config.json")
    Dots1Config.from_json(raw_config)
    return HubCheckpoint(repo, folder, raw_config, *_read_headers(repo, folder))


def _open_cached(name: str, revision: str | None) -> HubCheckpoint:
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        wanted = f"revision {revision} of {name}" if revision else name
        raise CheckpointError(
            f"with HF_HUB_OFFLINE there is only the cache {constants.HF_HUB_CACHE}, which lacks "
            f"{wanted}"
        )
    folder = Path(config).parent
    found = Checkpoint.open(folder)
    slices = {tensor: found.locate(tensor) for tensor in found}
    repo = HubRepo(name, folder.name, folder.name, {}, constants.ENDPOINT)
    return HubCheckpoint(repo, folder, found.raw_config, slices, {})


def _read_headers(repo: HubRepo, folder: Path) -> tuple[dict[str, Slice], dict[str, bytes]]:
    """The places of all tensors, and the first bytes of every shard, which say so."""
    if INDEX not in repo.files:
        if SINGLE not in repo.files:
            raise CheckpointError(f"{repo} has neither {INDEX} nor {SINGLE}")
        slices, start = _read_header(repo, SINGLE, folder)
        return slices, {SINGLE: start}
    weight_map = read_index(folder / INDEX)
    shards = list(dict.fromkeys(weight_map.values()))
    for shard in shards:
        if not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{INDEX} of {repo} names {shard!r}, which is no safetensors file"
            )
        if shard not in repo.files:
            raise CheckpointError(f"{INDEX} of {repo} names {shard}, which is not there")
    read = together(lambda shard, _: _read_header(repo, shard, folder), shards, _AT_ONCE)
    headers = {shard: slices for shard, (slices, _) in zip(shards, read, strict=True)}
    starts = {shard: start for shard, (_, start) in zip(shards, read, strict=True)}
    return promised_tensors(weight_map, headers), starts


def _read_header(repo: HubRepo, shard: str, folder: Path) -> tuple[dict[str, Slice], bytes]:
    file, path = repo.file(shard), folder / shard
    if file.size < 8:
        raise CheckpointError(f"{shard} of {repo} is no safetensors file")
    start = repo.read(file, 0, min(_LIKELY_HEADER, file.size))
    end = 8 + header_length(path, start, file.size)
    if end > len(start):
        start += repo.read(file, len(start), end)
    return tensor_table(path, start[8:end], file.size), start[:end]
