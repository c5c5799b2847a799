"""Ready-made GGUF models on the Hugging Face hub: ORG/NAME, or ORG/NAME:TYPE for one of its types.

A repository may have one file or several shards for each type, in a folder for each type or not.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.files.gguf import SHARD, GGUFFile
from dots1_local.files.gguf_header import GGUFHeader, HeaderIncomplete
from dots1_local.hub import is_hub_id, open_cached, open_repo
from dots1_local.hub.client import HubFile, HubRepo, parallel_map
from dots1_local.hub.large_file import (
    check_room,
    fetch_file,
    is_cached,
    remove_stale,
    snapshot_path,
)
from dots1_local.hub.retries import Unreachable
from dots1_local.progress import Progress, silent

__all__ = ["HubModel", "HubModels", "find_models", "parse_reference"]

_NAME = re.compile(r"[\w+-][\w.+-]*(?:/[\w+-][\w.+-]*)*\.gguf", re.ASCII)
_TYPE = re.compile(
    r"(?<![A-Z0-9])(?:UD-)?(?:(?:I?Q|DQ|TQ)\d[A-Z0-9_]*|MXFP4[A-Z_]*|NVFP4|BF16|F16|F32)(?![A-Z0-9])",
    re.IGNORECASE | re.ASCII,
)
_NO_MODEL = ("mmproj", "imatrix")  # files that hold something else
_FIRST, _STEP = 1 << 18, 2 << 20  # bytes; a header with the vocabulary is about 6 MB
_MOST = 64 << 20  # bytes of a header
_AT_ONCE = 4  # downloads, or requests for headers


@dataclass(frozen=True)
class HubModel:
    """One model of a repository: its shards in order, and the name of its type."""

    repo: HubRepo
    type: str
    files: tuple[HubFile, ...]

    def __str__(self) -> str:
        return f"{self.repo.name}:{self.type}"

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def path(self) -> Path:
        """Where huggingface_hub's cache has the first shard, or will have it."""
        return snapshot_path(self.repo, self.files[0].name)

    @property
    def is_cached(self) -> bool:
        """Whether all shards are in the cache."""
        return all(is_cached(self.repo, file) for file in self.files)

    def header(self) -> GGUFFile:
        """Read the header, from the cache or else from the hub, which sends a few MB.

        Raises:
            GGUFError: the header is damaged, or the shards contradict each other.
            CheckpointError: the hub refuses, or cannot be reached.
        """
        if self.is_cached:
            return GGUFFile.open(self.path)
        headers = parallel_map(lambda file, _: self._read(file), self.files, _AT_ONCE)
        return GGUFFile.of(headers)

    def _read(self, file: HubFile) -> GGUFHeader:
        path, data = snapshot_path(self.repo, file.name), b""
        while True:
            step = max(_STEP, len(data) // 2) if data else _FIRST
            count = min(step, file.size - len(data))
            data += self.repo.read(file, count, len(data))
            try:
                return GGUFHeader.parse(path, data, file.size)
            except HeaderIncomplete:
                if len(data) >= min(file.size, _MOST):
                    raise

    def fetch(self, progress: Progress = silent) -> Path:
        """Fetch all shards into the cache, and check their hashes; return the first one's path.

        Raises:
            CheckpointError: the hub refuses, cannot be reached, or sends another file.
            Dots1Error: the disk is full.
        """
        if not self.files[0].digest:  # as `open_cached` found it
            return self.path
        check_room(self.repo, self.files)
        arrived = dict.fromkeys(self.files, 0)

        def provide(file: HubFile, stop: Event) -> None:
            received = partial(arrived.__setitem__, file)
            fetch_file(self.repo, file, received=received, stop=stop)
            arrived[file] = file.size

        def report() -> None:
            progress(sum(arrived.values()), self.nbytes, "bytes", f"fetching {self}")

        parallel_map(provide, self.files, _AT_ONCE, report)
        self.repo.note_revision(self.files[0].name)
        remove_stale(self.repo)
        return self.path


@dataclass(frozen=True)
class HubModels:
    """The models of a repository, the smallest first; `notes` are sentences for the user."""

    name: str
    models: tuple[HubModel, ...]
    notes: tuple[str, ...] = ()

    def choose(self, wanted: str | None) -> HubModel | None:
        """Return the model of a type, or the only model; None if the choice is not clear."""
        if wanted is None:
            return self.models[0] if len(self.models) == 1 else None
        by_type = {model.type.lower(): model for model in self.models}
        without_prefix = {key.removeprefix("ud-"): model for key, model in by_type.items()}
        return by_type.get(wanted.lower()) or without_prefix.get(wanted.lower())


def parse_reference(text: str) -> tuple[str, str | None] | None:
    """Return the repository and the type of ORG/NAME[:TYPE]; None for anything else."""
    name, colon, wanted = text.partition(":")
    if not is_hub_id(name) or (colon and not wanted) or text.lower().endswith(".gguf"):
        return None
    return name, wanted or None


def find_models(name: str, *, endpoint: str | None = None) -> HubModels:
    """Return the GGUF models of a repository; without a connection, those that the cache has whole.

    `endpoint` is the URL of a server with the hub's API; if it is None, HF_ENDPOINT is used.

    Raises:
        CheckpointError: there is no such repository that you may read, or it has no GGUF model.
        UsageError: the extra `hub` is not installed.
    """
    notes: tuple[str, ...] = ()
    try:
        repo = open_repo(name, None, endpoint, marker=None)
    except Unreachable as error:
        try:
            repo = open_cached(name)
        except Dots1Error:
            raise error from None
        notes = (f"{error}; what is in the cache is used",)
    models = _group(repo)
    if not models:
        offline = any(not file.digest for file in repo.files.values())
        raise CheckpointError(
            f"{repo} has no GGUF model{' that is complete in the cache' if offline else ''}"
        )
    return HubModels(name, models, notes)


def _group(repo: HubRepo) -> tuple[HubModel, ...]:
    """The complete models of a repository, the smallest first."""
    shards: defaultdict[str, list[HubFile]] = defaultdict(list)  # by path without number and end
    counts: dict[str, int] = {}
    for name, file in sorted(repo.files.items()):
        if not _NAME.fullmatch(name) or any(word in name.lower() for word in _NO_MODEL):
            continue
        shard = SHARD.fullmatch(name)
        stem = shard["stem"] if shard else name.removesuffix(".gguf")
        counts[stem] = int(shard["count"]) if shard else 1
        shards[stem].append(file)
    stems = [stem for stem, files in shards.items() if len(files) == counts[stem]]
    types = _type_names(stems)
    models = (HubModel(repo, types[stem], tuple(shards[stem])) for stem in stems)
    return tuple(sorted(models, key=lambda model: model.nbytes))


def _type_names(stems: Sequence[str]) -> dict[str, str]:
    """Name each model by the type in its file's name or folder, or else by its file."""
    found = {stem: _TYPE.findall(stem) for stem in stems}
    names = {stem: types[-1] if types else stem.rpartition("/")[2] for stem, types in found.items()}
    repeated = {
        name for name, count in Counter(map(str.lower, names.values())).items() if count > 1
    }
    return {stem: stem if name.lower() in repeated else name for stem, name in names.items()}
