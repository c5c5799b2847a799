"""The results in a calibration folder, and calibration.json: their model and their hashes.

A calibration folder can be published in a repository on the hub. Others then name its id, and only
what they need is fetched, once the manifest says that it was measured on their model.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec

from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.digest import file_sha256
from dots1_local.files.json_file import JsonError, convert_json, read_json
from dots1_local.hub import is_hub_id, open_repo
from dots1_local.hub.client import HubRepo
from dots1_local.hub.model_digest import model_digest
from dots1_local.progress import Progress, silent

__all__ = [
    "IMATRIX", "MANIFEST", "REFINED_SENSITIVITY", "REFINEMENT", "ROUTING", "SENSITIVITY",
    "fetch_calibration", "fetch_routing", "find_calibration", "manifest_json",
]  # fmt: skip

MANIFEST = "calibration.json"
IMATRIX, SENSITIVITY = "imatrix.gguf", "sensitivity.json"
REFINEMENT, REFINED_SENSITIVITY = "refinement.safetensors", "sensitivity-refined.json"
ROUTING = "routing.safetensors"

_WANTED = (IMATRIX, SENSITIVITY)
_REFINING = (REFINED_SENSITIVITY, REFINEMENT)


@dataclass(frozen=True)
class _Manifest:
    """`name` is the model's, for people; `model` is its digest; `files` has SHA-256 by name."""

    name: str
    model: str
    files: dict[str, str]


def manifest_json(name: str, digest: str, files: Sequence[Path]) -> str:
    """The manifest of results that were measured on the model with a name and digest."""
    hashes = {path.name: file_sha256(path) for path in files}
    return json.dumps({"format": 1, **asdict(_Manifest(name, digest, hashes))}, indent=1)


def find_calibration(
    path: str, checkpoint: Checkpoint, *, refine: bool = False, progress: Progress = silent
) -> Path:
    """Return the folder of a calibration: the folder `path`, or that of a repository on the hub.

    Raises:
        Dots1Error: as `fetch_calibration`; a folder is not opened.
    """
    if os.path.lexists(path) or not is_hub_id(path):
        return Path(path)
    try:
        return fetch_calibration(path, checkpoint, refine=refine, progress=progress)
    except Dots1Error as error:
        raise type(error)(f"there is no folder {path}, and {error}") from error


def fetch_calibration(
    name: str,
    checkpoint: Checkpoint,
    *,
    refine: bool = False,
    endpoint: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Fetch a calibration of `checkpoint` from the repository `name` into the hub's cache.

    What refinement needs (2 GB for dots.llm1) is fetched only to `refine`. `endpoint` is the URL of
    a server with the hub's API; if it is None, HF_ENDPOINT is used.

    Raises:
        CheckpointError: the hub refuses, cannot be reached, or sends damaged files.
        Dots1Error: the repository holds no calibration, or that of another model; its files do not
            belong together; the disk is full; the cache cannot be used.
        UsageError: the extra `hub` is not installed.
    """
    repo = open_repo(name, None, endpoint, marker=MANIFEST)
    try:
        manifest = _fetch(repo, MANIFEST, progress)
        if manifest is None:
            raise Dots1Error(
                f"{repo} has no {MANIFEST}, which says of which model a calibration is; fetch its "
                "files and name their folder to use them anyway"
            )
        found = _read(manifest)
        if found.model != model_digest(checkpoint):
            raise Dots1Error(
                f"{repo} was calibrated on {found.name or 'another model'}, whose weights or "
                f"settings are not those of {checkpoint.source}"
            )
        for file in (*_WANTED, *_REFINING * refine):
            _fetch_described(repo, file, found, progress)
    except OSError as error:
        raise Dots1Error(f"cannot use {error.filename}: {error.strerror}") from None
    repo.note_revision(MANIFEST)
    return manifest.parent


def fetch_routing(name: str, *, endpoint: str | None = None, progress: Progress = silent) -> Path:
    """Fetch the routing of a calibration from the repository `name`; return the folder.

    The model that it is used for need not be the calibrated checkpoint itself.

    Raises:
        CheckpointError: as `fetch_calibration`.
        Dots1Error: the repository holds no routing, or that of another calibration; the disk is
            full; the cache cannot be used.
        UsageError: the extra `hub` is not installed.
    """
    repo = open_repo(name, None, endpoint, marker=MANIFEST)
    try:
        manifest = _fetch(repo, MANIFEST, progress)
        if manifest is None:
            raise Dots1Error(f"{repo} has no {MANIFEST}, so it is not a calibration")
        if _fetch_described(repo, ROUTING, _read(manifest), progress) is None:
            raise Dots1Error(f"{repo} has no {ROUTING}; it was calibrated by an older version")
    except OSError as error:
        raise Dots1Error(f"cannot use {error.filename}: {error.strerror}") from None
    repo.note_revision(MANIFEST)
    return manifest.parent


def _fetch_described(
    repo: HubRepo, name: str, manifest: _Manifest, progress: Progress
) -> Path | None:
    """Fetch a file, if there is one, and check that it is the one that the manifest describes."""
    path = _fetch(repo, name, progress)
    if path is not None and manifest.files.get(name) != file_sha256(path):
        raise Dots1Error(
            f"{name} of {repo} is not the file that its {MANIFEST} describes: both must be of one "
            "calibration"
        )
    return path


def _fetch(repo: HubRepo, name: str, progress: Progress) -> Path | None:
    size = repo.files[name].size if name in repo.files else 0
    return repo.get(name, lambda count: progress(count, size, "bytes", f"fetching {name}"))


def _read(path: Path) -> _Manifest:
    try:
        raw = read_json(path, "manifest of a calibration")
        convert_json(raw, _Format)
        return convert_json(raw, _Manifest)
    except UsageError as error:  # the file is at fault, not the command
        raise Dots1Error(str(error)) from None
    except JsonError as error:
        raise Dots1Error(f"{path} is not the manifest of a calibration: {error}") from None


class _Format(msgspec.Struct, frozen=True):
    format: Literal[1]
