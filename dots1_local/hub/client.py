"""One commit of a model repository on the Hugging Face hub: its files and their hashes.

All requests name the commit that the revision stood for when it was looked up, so that files of two
commits never mix, even if a branch moves. huggingface_hub fetches the files. It does not check
their hashes; this module does.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from json import JSONDecodeError
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from dots1_local import __version__
from dots1_local.errors import CheckpointError
from dots1_local.files.partial_file import disk_error
from dots1_local.hub.retries import ask, is_transient

__all__ = [
    "HubFile", "HubRepo", "Received", "Stopped", "find_repo", "has_digest", "parallel_map",
]  # fmt: skip

_CLIENT: dict[str, Any] = {"library_name": "dots1-local", "library_version": __version__}
_LONGEST = 4 << 30  # bytes of an answer; the hub sends no more than 50 GB at once
_PARTIAL = 206  # the HTTP status of an answer with the range that was asked for
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MALFORMED = (
    AttributeError, JSONDecodeError, KeyError, RecursionError, TypeError, UnicodeDecodeError,
)  # fmt: skip
_SHA256 = 64  # characters
_GRACE = 1.0  # seconds for threads to notice that they are stopped
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Received = Callable[[int], None]


class Stopped(Exception):
    """The download was stopped."""


@dataclass(frozen=True)
class HubFile:
    """A file of the repository; `digest` is its SHA-256, or git's SHA-1 if it is not in LFS."""

    name: str
    size: int
    digest: str

    @property
    def in_lfs(self) -> bool:
        """Whether the hub keeps it in LFS, as it does with large files."""
        return len(self.digest) == _SHA256


def has_digest(path: Path, file: HubFile) -> bool:
    """Whether a file on disk has the size and the hash that the hub lists."""
    if path.stat().st_size != file.size:
        return False
    sha1 = partial(hashlib.sha1, b"blob %d\0" % file.size, usedforsecurity=False)  # as git does
    with open(path, "rb") as found:
        digest = hashlib.file_digest(found, "sha256" if file.in_lfs else sha1)
    return digest.hexdigest() == file.digest


@dataclass(frozen=True)
class HubRepo:
    """`name` is organisation/model; `commit` is the full hash that `revision` stands for."""

    name: str
    revision: str
    commit: str
    files: Mapping[str, HubFile]
    endpoint: str

    def __str__(self) -> str:
        return f"{self.name} at commit {self.commit[:12]}"

    def read(self, file: HubFile, count: int, start: int = 0) -> bytes:
        """Read `count` bytes of a file, in memory that a hostile server cannot exceed.

        Raises:
            CheckpointError: the hub refuses, cannot be reached, sends fewer bytes, or sends a file
                from its beginning only.
        """

        def once() -> bytes:
            data = bytearray()
            with self._answer(file, f"{start}-{start + count - 1}") as response:
                if start and response.status_code != _PARTIAL:
                    raise CheckpointError(f"{self.endpoint} does not send parts of files")
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) >= count:
                        break
            return bytes(data[:count])

        data = ask(once, self.endpoint, self.name, f"file {file.name}")
        if len(data) < count:
            raise CheckpointError(f"{self} sends fewer bytes of {file.name} than it lists")
        return data

    def receive(self, file: HubFile, start: int, take: Callable[[int, bytes], None]) -> None:
        """Ask for a file from `start` on; `take` gets what arrives, with its place in the file.

        A server that sends no parts of files begins at 0. If the connection breaks after some bytes
        have arrived, or 4 GiB have, the others are left for the next call.

        Raises:
            CheckpointError: the hub refuses, cannot be reached, or sends nothing.
        """

        end = min(file.size, start + _LONGEST)

        def once() -> int:
            first = at = start
            try:
                with self._answer(file, f"{start}-{end - 1}") as response:
                    first = at = start if response.status_code == _PARTIAL else 0
                    for chunk in response.iter_raw():
                        take(at, chunk)
                        at += len(chunk)
            except Exception as error:
                if at == first or not is_transient(error):
                    raise
            return at - first

        if not ask(once, self.endpoint, self.name, f"file {file.name}"):
            raise CheckpointError(f"{self} sends fewer bytes of {file.name} than it lists")

    @contextmanager
    def _answer(self, file: HubFile, wanted: str) -> Iterator[Any]:
        """Yield the answer to a request for a range of bytes of a file."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        url = hf_hub_url(self.name, file.name, revision=self.commit, endpoint=self.endpoint)
        headers = build_hf_headers(**_CLIENT)
        headers |= {"Range": f"bytes={wanted}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield response

    def fetch(
        self,
        file: HubFile,
        folder: Path | None = None,
        *,
        received: Received = lambda count: None,
        stop: Event | None = None,
    ) -> Path:
        """Fetch a file into the hub's cache, or into `folder`, unless it is there; return its path.

        A file that has another hash than the hub lists is fetched once more.
        `received` is called with the number of bytes that have arrived.

        Raises:
            CheckpointError: the hub refuses, cannot be reached, or sends another file.
            Dots1Error: the disk is full.
            OSError: the file cannot be read.
            Stopped: `stop` was set.
        """
        for force in (False, True):
            bar = _progress_class(received, stop or Event())
            path = self.download(file.name, local_dir=folder, force_download=force, tqdm_class=bar)
            if has_digest(path, file):
                return path
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file.name} of {self} arrived twice with another hash than the hub lists "
            f"({file.digest[:12]}...); it is damaged there or on the way"
        )

    def get(self, name: str, received: Received = lambda count: None) -> Path | None:
        """Fetch a file into the hub's cache; return its path, or None if it does not exist.

        A repository whose `files` are not known, without a network, has what the cache has.

        Raises:
            CheckpointError, Dots1Error, OSError: as `fetch`.
        """
        from huggingface_hub import try_to_load_from_cache

        if name in self.files:
            return self.fetch(self.files[name], received=received)
        cached = try_to_load_from_cache(self.name, name, revision=self.commit)
        return Path(cached) if isinstance(cached, str) else None

    def note_revision(self, name: str) -> None:
        """Let the cache know the branch of a fetched file, too, for runs without a network."""
        from huggingface_hub import try_to_load_from_cache

        known, here = (
            try_to_load_from_cache(self.name, name, revision=revision)
            for revision in (self.revision, self.commit)
        )
        if name in self.files and known != here:
            with suppress(CheckpointError):
                self.download(name, revision=self.revision)

    def download(self, name: str, **options: Any) -> Path:
        """Call `hf_hub_download`, by default at this commit; its errors become sentences."""
        from huggingface_hub import HfApi

        download = HfApi(endpoint=self.endpoint, **_CLIENT).hf_hub_download
        fetch = partial(download, self.name, name, **{"revision": self.commit, **options})
        try:
            return Path(str(ask(fetch, self.endpoint, self.name, f"file {name}")))
        except OSError as error:
            if error.errno is None:
                raise CheckpointError(f"{self} sends a damaged {name}: {error}") from error
            raise disk_error(Path(error.filename or name), error) from error


def find_repo(name: str, revision: str | None, endpoint: str | None = None) -> HubRepo:
    """Look up the commit that a revision (default: the default branch) stands for, and its files.

    Raises:
        CheckpointError: no such repository or revision, no access, or no connection.
        ValueError: the environment's settings for huggingface_hub are malformed.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import logging

    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()  # its warnings would appear between our lines
    warnings.filterwarnings("ignore", module=r"huggingface_hub\.")
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint, **_CLIENT)
    what = f"revision {revision}" if revision else "model"
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    look_up = partial(api.model_info, name, revision=revision, files_metadata=True, timeout=timeout)
    try:
        info = ask(look_up, endpoint, name, what)
    except _MALFORMED:
        info = None
    if info is None or not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise CheckpointError(
            f"{endpoint} does not answer as the Hugging Face hub does; is HF_ENDPOINT right?"
        )
    files = {file.name: file for file in map(_listed, info.siblings or ()) if file}
    return HubRepo(name, revision or constants.DEFAULT_REVISION, info.sha, files, endpoint)


def _listed(sibling: Any) -> HubFile | None:
    """Return a file as the hub lists it, or None if its size or hash is missing."""
    name, size, digest = sibling.rfilename, sibling.size, sibling.blob_id
    if sibling.lfs is not None:
        size, digest = sibling.lfs.size, sibling.lfs.sha256
    known = isinstance(name, str) and type(size) is int and size >= 0
    known = known and isinstance(digest, str) and bool(_DIGEST.fullmatch(digest))
    return HubFile(name, size, digest) if known else None


def _progress_class(received: Received, stop: Event) -> type:
    """Return a tqdm for huggingface_hub that prints nothing, reports bytes, and can be stopped."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Progress(tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"disable": True})

        def update(self, count: int) -> None:
            if stop.is_set():
                raise Stopped
            self.n += count
            received(self.n)

        def update_transfer(self, count: int) -> None:
            """Ignore the bytes on the network, which Xet reports beside those on disk."""

        set_transfer_postfix_str = tqdm.set_postfix_str

    return Progress


def parallel_map(
    work: Callable[[_Item, Event], _Result],
    items: Sequence[_Item],
    count: int,
    report: Callable[[], None] = lambda: None,
) -> list[_Result]:
    """Return the results of `work` for every item, `count` at once, and call `report` meanwhile.

    If one call raises, or the caller is interrupted, the event that the others hold is set. A
    ThreadPool's threads are daemons, so a dead connection does not keep Python from its exit.
    """
    stop = Event()
    errors: list[BaseException] = []

    def run(item: _Item) -> _Result:
        try:
            if stop.is_set():
                raise Stopped
            return work(item, stop)
        except BaseException as error:
            errors.append(error)
            raise

    with ThreadPool(count) as pool:
        results = pool.map_async(run, items, chunksize=1)
        try:
            while not results.ready() and not errors:
                results.wait(0.2)
                report()
            if errors:
                raise errors[0]
            return results.get()
        finally:
            stop.set()
            results.wait(_GRACE)
