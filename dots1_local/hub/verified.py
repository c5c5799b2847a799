"""Which files of huggingface_hub's cache have the hash that the hub lists."""

import json
from contextlib import suppress
from pathlib import Path
from threading import Lock

from dots1_local.files.json_file import JsonError, convert_json, parse_json
from dots1_local.files.partial_file import write_whole
from dots1_local.hub.client import HubFile, has_digest

__all__ = ["VerifiedFiles"]

_RECORD = ".dots1-verified.json"
_noting = Lock()  # several files are fetched at once


class VerifiedFiles:
    """The hashed files of one repository, whose folder in the cache is `folder`.

    A file that was hashed is recorded with its size and modification time, so that the next run
    does not have to read 286 GB first.
    """

    def __init__(self, folder: Path) -> None:
        self._record = folder / _RECORD

    def is_whole(self, path: Path, file: HubFile) -> bool:
        """Whether a file has the listed hash; a file that passed and has not changed is not read.

        Without a record, the file is hashed again next time.
        """
        if self._noted().get(file.digest) == _stamp(path):
            return True
        whole = has_digest(path, file)
        if whole:
            self.note(path, file)
        return whole

    def note(self, path: Path, file: HubFile) -> None:
        """Record that a file has the listed hash."""
        with _noting, suppress(OSError):
            noted = self._noted() | {file.digest: _stamp(path)}
            write_whole(self._record, json.dumps(noted).encode())

    def _noted(self) -> dict[str, list[int]]:
        try:
            return convert_json(parse_json(self._record.read_bytes()), dict[str, list[int]])
        except (OSError, JsonError):
            return {}


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
