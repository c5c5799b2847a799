"""One commit of a model repository on the Hugging Face hub: what files it has, and bytes of them.

All requests name the commit that the revision stood for when it was resolved. So files of two
commits never mix, even when a branch moves meanwhile.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any, TypeVar

from dots1_local import __version__
from dots1_local.errors import CheckpointError
from dots1_local.hub.complaints import complaint, is_passing, pause_asked_for

if TYPE_CHECKING:
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

__all__ = ["HubFile", "HubRepo", "resolve"]

_NAME = "dots1-local"  # for the hub's download statistics
_TRIES = 4
_PAUSE = 1.0  # seconds before the second try, twice as many before each further one
_LONGEST_PAUSE = 60.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_GARBLED = (
    AttributeError, JSONDecodeError, KeyError, RecursionError, TypeError, UnicodeDecodeError,
)  # fmt: skip
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class HubFile:
    """A file of the repository; `digest` is its SHA-256, or git's SHA-1 if it is not in LFS."""

    name: str
    size: int
    digest: str


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

    def file(self, name: str) -> HubFile:
        """What the hub says of a file.

        Raises:
            CheckpointError: the repository has none of that name.
        """
        try:
            return self.files[name]
        except KeyError:
            raise CheckpointError(f"{self} has no file {name}") from None

    @contextmanager
    def open(self, file: HubFile, start: int, stop: int) -> Iterator["httpx.Response"]:
        """The response to a request for bytes [start, stop); with status 200 it has all bytes.

        Raises:
            CheckpointError: the file has another size than the hub listed.
            Exception: what the HTTP client raises.
        """
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(self.name, file.name, revision=self.commit, endpoint=self.endpoint)
        headers = {
            **_headers(),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",  # bytes are counted and hashed as they come
        }
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            if response.status_code == 416:
                raise CheckpointError(f"{self} ends {file.name} before byte {stop} of {file.size}")
            hf_raise_for_status(response)
            _check_size(self, file, response)
            yield response

    def read(self, file: HubFile, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file.

        Raises:
            CheckpointError: they cannot be had.
        """

        def once() -> bytes:
            data = bytearray()
            with self.open(file, start, stop) as response:
                first = start if response.status_code == 200 else 0
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) >= first + stop - start:
                        break
            return bytes(data[first : first + stop - start])

        with self.asking(file.name):
            data = patiently(once)
        if len(data) < stop - start:
            raise CheckpointError(f"{self} sends fewer bytes of {file.name} than were asked for")
        return data

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Turn what goes wrong on the way to the hub into a sentence."""
        with _asking(self.name, self.endpoint, str(self), what):
            yield


def resolve(name: str, revision: str | None, endpoint: str | None = None) -> HubRepo:
    """The commit that a revision (the default branch if None) stands for now, and its files.

    Raises:
        CheckpointError: no such repository or revision, no access, or no connection.
    """
    from huggingface_hub import HfApi, constants

    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint, library_name=_NAME, library_version=__version__)

    def once() -> Any:
        try:
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            return api.model_info(name, revision=revision, files_metadata=True, timeout=timeout)
        except _GARBLED as error:
            raise _no_hub(endpoint) from error

    wanted = f"revision {revision}" if revision else "model"
    with _asking(name, endpoint, name, wanted):
        info = patiently(once)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise _no_hub(endpoint)
    files = {file.name: file for file in map(_file, info.siblings or ()) if file}
    return HubRepo(name, revision or constants.DEFAULT_REVISION, info.sha, files, endpoint)


def patiently(ask: Callable[[], _Result]) -> _Result:
    """What `ask` returns; it is called again where the server or network failed for a moment."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    for attempt in range(_TRIES - 1):
        try:
            return ask()
        except Exception as error:
            if isinstance(error, httpx.ConnectError) or not is_passing(error):
                raise
            time.sleep(min(pause_asked_for(error) or _PAUSE * 2**attempt, _LONGEST_PAUSE))
    return ask()


def _file(sibling: Any) -> HubFile | None:
    """A file as the hub lists it; None if its size or hash is missing."""
    name = sibling.rfilename
    size, digest = sibling.size, sibling.blob_id
    if sibling.lfs is not None:
        size, digest = sibling.lfs.size, sibling.lfs.sha256
    known = isinstance(name, str) and type(size) is int and size >= 0
    known = known and isinstance(digest, str) and bool(_DIGEST.fullmatch(digest))
    return HubFile(name, size, digest) if known else None


def _check_size(repo: HubRepo, file: HubFile, response: "httpx.Response") -> None:
    """Refuse a file of another size before any of it is written."""
    if response.status_code == 206:
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        size = response.headers.get("Content-Length", "")
    if size.isdecimal() and int(size) != file.size:
        raise CheckpointError(
            f"{repo} sends a {file.name} of {int(size):,} bytes, though it lists {file.size:,}"
        )


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers: dict[str, str] = build_hf_headers(library_name=_NAME, library_version=__version__)
    return headers


def _no_hub(endpoint: str) -> CheckpointError:
    return CheckpointError(
        f"{endpoint} does not answer as the Hugging Face hub does; is HF_ENDPOINT right?"
    )


@contextmanager
def _asking(name: str, endpoint: str, where: str, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        said = complaint(error, name, endpoint, where, what)
        if said is None:
            raise
        raise said from error
