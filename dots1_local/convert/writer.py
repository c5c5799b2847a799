"""Write GGUF files; every byte's place is known in advance, so that threads may write anywhere.

Data goes to `NAME.partial`, and a journal beside it records each finished tensor with checksums of
its pieces. After a kill, the next run checks the recorded tensors and resumes from there. The file
gets its name only when it is complete.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Annotated, BinaryIO
from urllib.parse import quote, unquote_to_bytes

import msgspec
import numpy as np
from numpy.typing import NDArray

from dots1_local.convert.output import Output, TensorSlot
from dots1_local.files.json_file import JsonError, convert_json, parse_json
from dots1_local.files.partial_file import (
    check_space,
    disk_errors,
    open_locked,
    write_all,
)
from dots1_local.progress import Progress, silent

__all__ = ["Journal", "interrupted_source", "is_complete"]

_LONGEST_FIRST_LINE = 1 << 20
_LONGEST_LAST_LINE = 64  # that says "complete"


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the journal: the first one identifies the run, and others finish a tensor.

    The last one says that the files are `complete`; only then do they get their names.
    `partials` are percent-encoded, because names of files need not be UTF-8.
    """

    identity: str = ""
    partials: tuple[str, ...] = ()
    source: str = ""
    tensor: str = ""
    pieces: tuple[tuple[Annotated[int, msgspec.Meta(gt=0)], int], ...] = ()
    complete: bool = False


class Journal:
    """The open output files of one conversion, and the record of finished tensors.

    Use it in a `with` statement. `done` holds the tensors that a former run finished and whose
    checksums still match; `finished` holds those of this run, too. `source` is recorded for
    `interrupted_source`; `progress` hears of the check.
    """

    def __init__(
        self, output: Output, fingerprint: str, progress: Progress = silent, source: str = ""
    ) -> None:
        self.output = output
        self._source, self._progress = source, progress
        self.done: set[str] = set()
        self.finished: set[str] = set()
        self._path = _journal_path(output)
        self._identity = _identity(output, fingerprint)
        self._files: list[int] = []
        self._journal: BinaryIO
        self._opened = ExitStack()

    def __enter__(self) -> "Journal":
        path = self.output.path
        with disk_errors(path), ExitStack() as opened:
            check_space(path, self.output.total_bytes, self.output.partials)
            busy = f"another conversion is writing {path}"
            self._journal = opened.enter_context(open_locked(self._path, busy, append=True))
            lines = self._recorded()
            first = lines[0] if lines else _Line()
            same = first.identity == self._identity
            if same:
                self._take_back_shards()
            else:
                self._clear_stale(first.partials)
            for partial in self.output.partials:
                fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                opened.callback(os.close, fd)
                self._files.append(fd)
            if not (same and self._resume(lines[1:])):
                self._begin()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def _begin(self) -> None:
        self._journal.truncate(0)
        partials = tuple(quote(os.fsencode(partial.name)) for partial in self.output.partials)
        self._record(_Line(identity=self._identity, partials=partials, source=self._source))
        for fd, header, size in self._expected():
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
            write_all(fd, memoryview(header), 0)

    def _resume(self, lines: Sequence[_Line]) -> bool:
        """Take over the tensors recorded in `lines`; return False if their files are not there."""
        intact = all(
            os.fstat(fd).st_size == size and os.pread(fd, len(header), 0) == header
            for fd, header, size in self._expected()
        )
        if not intact:
            return False
        slots = {slot.tensor.spec.name: slot for slot in self.output.slots}
        total, checked = sum(slot.tensor.nbytes for slot in self.output.slots), 0
        for line in lines:
            slot = slots.get(line.tensor)
            if slot and self._reads_back(slot, line.pieces):
                self.done.add(slot.tensor.spec.name)
                self.finished.add(slot.tensor.spec.name)
                checked += slot.tensor.nbytes
                self._progress(checked, total, "bytes", "checking what is there")
        return True

    def _expected(self) -> Iterator[tuple[int, bytes, int]]:
        """Yield every file's descriptor, with the header and the size that it should have."""
        return zip(self._files, self.output.headers, self.output.sizes, strict=True)

    def _take_back_shards(self) -> None:
        """Undo the renaming of shards, in case a former run was killed while it published."""
        for partial, path in zip(self.output.partials, self.output.paths, strict=True):
            if path.exists() and not partial.exists():
                os.replace(path, partial)

    def _clear_stale(self, names: Sequence[str]) -> None:
        """Remove the working files of a former run with other inputs."""
        ours = {partial.name for partial in self.output.partials}
        for name in names:
            stale = self.output.target.with_name(Path(os.fsdecode(unquote_to_bytes(name))).name)
            if stale.name.endswith(".partial") and stale.name not in ours:
                stale.unlink(missing_ok=True)

    def _recorded(self) -> list[_Line]:
        """Read the journal's lines, and cut off a line that a kill left incomplete."""
        self._journal.seek(0)
        whole = [line for line in self._journal if line.endswith(b"\n")]
        self._journal.truncate(sum(map(len, whole)))
        return [_parsed(line) for line in whole]

    def _reads_back(self, slot: TensorSlot, pieces: Sequence[tuple[int, int]]) -> bool:
        sizes = [size for size, _ in pieces]
        if sum(sizes) != slot.tensor.nbytes:
            return False
        offsets = accumulate(sizes, initial=slot.offset)
        fd = self._files[slot.file]
        return all(
            zlib.crc32(os.pread(fd, size, offset)) == crc
            for offset, (size, crc) in zip(offsets, pieces, strict=False)
        )

    def write(self, slot: TensorSlot, data: NDArray[np.uint8], offset: int) -> tuple[int, int]:
        """Write a piece `offset` bytes into a tensor; return its size and checksum."""
        view = data.reshape(-1).data
        with disk_errors(self.output.path):
            write_all(self._files[slot.file], view, slot.offset + offset)
        return len(view), zlib.crc32(view)

    def finish(self, slot: TensorSlot, pieces: Sequence[tuple[int, int]]) -> None:
        """Record a tensor as complete; `pieces` are the results of `write`, in order."""
        self._record(_Line(tensor=slot.tensor.spec.name, pieces=tuple(pieces)))
        self.finished.add(slot.tensor.spec.name)

    def _record(self, line: _Line) -> None:
        with disk_errors(self.output.path):
            self._journal.write(msgspec.json.encode(line) + b"\n")
            self._journal.flush()

    def publish(self, tidy: Callable[[], object] = lambda: None) -> None:
        """Give the complete files their names, tidy up, and remove the journal.

        The journal goes last, because it tells the next run after a kill to do the rest of this.
        """
        with disk_errors(self.output.path):
            for fd in self._files:
                os.fsync(fd)
            self._record(_Line(complete=True))
            for partial, path in zip(self.output.partials, self.output.paths, strict=True):
                os.replace(partial, path)
            tidy()
            self._path.unlink()


def is_complete(output: Output, fingerprint: str) -> bool:
    """Return whether a run of the same conversion was killed when its files were complete.

    Then what has their names already is replaced without `force`, unless it begins otherwise.
    """
    try:
        with open(_journal_path(output), "rb") as journal:
            first = _parsed(journal.readline(_LONGEST_FIRST_LINE))
            journal.seek(max(0, os.fstat(journal.fileno()).st_size - _LONGEST_LAST_LINE))
            last = journal.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        if first.identity != _identity(output, fingerprint) or not _parsed(last).complete:
            return False
        named = zip(output.paths, output.headers, strict=True)
        return all(_begins_with(path, header) for path, header in named if path.is_file())
    except OSError:
        return False


def _begins_with(path: Path, header: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def _identity(output: Output, fingerprint: str) -> str:
    digest = hashlib.sha256(fingerprint.encode())
    for header in output.headers:
        digest.update(header)
    return digest.hexdigest()


def interrupted_source(output: Output) -> str:
    """Return the source of an unfinished conversion to this output, "" if there is none."""
    try:
        with open(_journal_path(output), "rb") as journal:
            return _parsed(journal.readline(_LONGEST_FIRST_LINE)).source
    except OSError:
        return ""


def _journal_path(output: Output) -> Path:
    return output.target.with_name(output.target.name + ".journal")


def _parsed(line: bytes) -> _Line:
    """Parse a line of the journal; a malformed line counts as not written."""
    try:
        return convert_json(parse_json(line), _Line)
    except JsonError:
        return _Line()
