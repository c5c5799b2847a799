"""The folder an export writes: `DIR.partial` until it is complete, so that runs can resume.

`DIR.journal` identifies the export that wrote the shards in `DIR.partial`, and says when all is
complete. A shard gets its name when it is complete and on disk, so a killed run loses only the
shard it was writing.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

from dots1_local.errors import Dots1Error
from dots1_local.export.shards import Shard
from dots1_local.files.partial_file import (
    check_parent,
    check_space,
    disk_errors,
    open_locked,
    open_partial,
    partial_path,
)

__all__ = ["ExportFolder"]

_COMPLETE = b" complete"  # in the journal, after the identity
_WRITTEN = re.compile(
    r"model-\d{5,}-of-\d{5,}\.safetensors(\.partial)?|model\.safetensors\.index\.json"
    r"|(generation_|tokenizer_)?config\.json|tokenizer\.json"
)


class ExportFolder:
    """Where one export is written; use it in a `with` statement.

    `done` are the names of the shards that a former run with the same `identity` has finished. If
    it was killed after the folder got its name, these are all shards, and nothing is replaced.

    Raises:
        Dots1Error: `output` is not empty (without `force`), cannot be a folder, holds a file that
            no export writes, or does not fit the disk.
    """

    def __init__(
        self,
        output: Path,
        shards: Sequence[Shard],
        documents: Mapping[str, bytes],
        identity: str,
        *,
        force: bool,
    ) -> None:
        self._path = Path(os.path.realpath(output)) if output.is_symlink() else output
        if self._path.name in ("", ".."):
            raise Dots1Error(f"{output} cannot be replaced as a whole; name a folder in it")
        self._partial = partial_path(self._path)
        self._journal = self._path.with_name(f"{self._path.name}.journal")
        self._shards, self._documents, self._identity = shards, documents, identity.encode()
        self._lock = ExitStack()
        self._opened: BinaryIO
        self.done: set[str] = set()
        with disk_errors(output):
            self._published = self._is_published()
            if not self._published:
                self._check(force)

    def __enter__(self) -> Self:
        with disk_errors(self._path), ExitStack() as opened:
            busy = f"another export is writing {self._path}"
            self._opened = opened.enter_context(open_locked(self._journal, busy))
            self._begin(self._opened)
            self._lock = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def write(self, shard: Shard, fill: Callable[[int], None]) -> None:
        """Write a shard, or raise a Dots1Error; `fill` writes the tensors to a descriptor."""
        with disk_errors(self._path), open_partial(self._partial / shard.name) as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
            file.flush()
            fill(file.fileno())

    def publish(self) -> None:
        """Write the small files and give the complete folder its name, or raise a Dots1Error."""
        with disk_errors(self._path):
            if not self._published:
                for name, data in self._documents.items():
                    (self._partial / name).write_bytes(data)
                self._opened.write(_COMPLETE)
                self._opened.flush()
                if self._path.exists():
                    _remove(self._path)
                os.replace(self._partial, self._path)
            self._journal.unlink()

    def _is_published(self) -> bool:
        """Whether a former run with the same identity was killed after it had named the folder."""
        if os.path.lexists(self._partial) or not self._journal.is_file():
            return False
        complete = self._journal.read_bytes() == self._identity + _COMPLETE
        return complete and all(self._holds(self._path, shard) for shard in self._shards)

    def _check(self, force: bool) -> None:
        path = self._path
        check_parent(path)
        if os.path.lexists(path):
            self._check_replaceable(force)
        if os.path.lexists(self._partial):
            _check_written(self._partial)
        nbytes = sum(shard.nbytes for shard in self._shards)
        nbytes += sum(map(len, self._documents.values()))
        check_space(path, nbytes, self._partial.glob("*"))

    def _check_replaceable(self, force: bool) -> None:
        if not self._path.is_dir():
            raise Dots1Error(f"{self._path} is not a folder; name another place")
        if os.path.ismount(self._path):
            raise Dots1Error(f"{self._path} is a mount point; name a folder in it")
        if any(self._path.iterdir()):
            if not force:
                raise Dots1Error(f"{self._path} is not empty; give --force to replace it")
            _check_written(self._path)

    def _begin(self, journal: BinaryIO) -> None:
        if self._published:
            self.done = {shard.name for shard in self._shards}
            return
        same = journal.read().removesuffix(_COMPLETE) == self._identity
        if same and self._partial.is_dir():
            self.done = {shard.name for shard in self._shards if self._holds(self._partial, shard)}
            journal.seek(len(self._identity))
            journal.truncate()
            return
        if self._partial.exists():
            _remove(self._partial)
        journal.seek(0)
        journal.truncate()
        journal.write(self._identity)
        journal.flush()
        self._partial.mkdir()

    def _holds(self, folder: Path, shard: Shard) -> bool:
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.nbytes:
            return False
        with open(path, "rb") as file:
            return file.read(len(shard.header)) == shard.header


def _remove(folder: Path) -> None:
    """Remove a folder that an export wrote; its contents may have changed since `_check`."""
    _check_written(folder)
    shutil.rmtree(folder)


def _check_written(folder: Path) -> None:
    """Refuse to remove a folder that holds anything an export does not write."""
    if folder.is_symlink() or not folder.is_dir():
        raise Dots1Error(f"{folder} is in the way; move it elsewhere")
    for entry in folder.iterdir():
        if not _WRITTEN.fullmatch(entry.name) or entry.is_dir():
            raise Dots1Error(
                f"{folder} holds {entry.name}, which no export writes; write to another folder"
            )
