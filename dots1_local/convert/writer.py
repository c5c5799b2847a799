"""Write GGUF files; every byte's place is known in advance, so that threads may write anywhere.

Data goes to `NAME.partial`, and a journal beside it records each finished tensor with checksums of
its pieces. After a kill, the next run checks the recorded tensors and resumes from there. The file
gets its name only when it is complete.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, BinaryIO
from urllib.parse import quote, unquote_to_bytes

import msgspec
import numpy as np
from gguf import GGUFWriter
from gguf.gguf_writer import SHARD_NAME_FORMAT
from numpy.typing import NDArray

from dots1_local.files.json_file import JsonError, convert_json, parse_json
from dots1_local.files.partial_file import (
    check_space,
    disk_errors,
    open_locked,
    partial_path,
    write_all,
)
from dots1_local.progress import Progress, silent
from dots1_local.quant.plan import PlannedTensor

__all__ = ["Journal", "Output", "TensorSlot", "aligned_bytes", "interrupted_source", "lay_out"]

ALIGNMENT = 32
_LONGEST_FIRST_LINE = 1 << 20


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor's bytes go."""

    tensor: PlannedTensor
    file: int
    offset: int


@dataclass(frozen=True)
class Output:
    """One GGUF, in one file or several: headers, names and the place of every tensor.

    `target` is the name that the user gave; if there are several files, their `paths` derive from
    it.
    """

    target: Path
    paths: tuple[Path, ...]
    headers: tuple[bytes, ...]
    sizes: tuple[int, ...]
    slots: tuple[TensorSlot, ...]

    @property
    def path(self) -> Path:
        """The path to load: the file, or its first shard."""
        return self.paths[0]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def partials(self) -> tuple[Path, ...]:
        return tuple(map(partial_path, self.paths))


def lay_out(
    path: Path, writer: GGUFWriter, tensors: Sequence[PlannedTensor], split_max_size: int | None
) -> Output:
    """Serialise the headers with `writer`, which holds the keys, and place every tensor."""
    writer.split_max_size = split_max_size or 0
    for tensor in tensors:
        spec, kind = tensor.spec, tensor.kind
        writer.add_tensor_info(spec.name, spec.shape, np.float32, tensor.nbytes, kind.ggml)
    writer.split_max_size = 0  # the tensors are placed, and it would warn of a single file
    headers = _headers(path, writer)
    count = len(headers)
    names = [SHARD_NAME_FORMAT.format(path.stem, i + 1, count) for i in range(count)]
    paths = tuple(path.with_name(name) for name in names) if count > 1 else (path,)
    shard_of = {name: i for i, shard in enumerate(writer.tensors) for name in shard}
    ends = [len(header) for header in headers]
    slots = []
    for tensor in tensors:
        file = shard_of[tensor.spec.name]
        slots.append(TensorSlot(tensor, file, ends[file]))
        ends[file] += aligned_bytes(tensor)
    return Output(path, paths, headers, tuple(ends), tuple(slots))


def aligned_bytes(tensor: PlannedTensor) -> int:
    """Return the bytes that a tensor takes in the file, with padding."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _headers(path: Path, writer: GGUFWriter) -> tuple[bytes, ...]:
    with disk_errors(path), TemporaryDirectory() as folder:
        writer.write_header_to_file(Path(folder) / "header.gguf")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return tuple(_aligned(name.read_bytes()) for name in sorted(Path(folder).iterdir()))


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the journal: the first one identifies the run, each other one finishes a tensor.

    `partials` are percent-encoded, because names of files need not be UTF-8.
    """

    identity: str = ""
    partials: tuple[str, ...] = ()
    source: str = ""
    tensor: str = ""
    pieces: tuple[tuple[Annotated[int, msgspec.Meta(gt=0)], int], ...] = ()


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
        digest = hashlib.sha256(fingerprint.encode())
        for header in output.headers:
            digest.update(header)
        self._identity = digest.hexdigest()
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

    def publish(self) -> None:
        """Give the complete files their names and remove the journal."""
        with disk_errors(self.output.path):
            for fd in self._files:
                os.fsync(fd)
            for partial, path in zip(self.output.partials, self.output.paths, strict=True):
                os.replace(partial, path)
            self._path.unlink()


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
