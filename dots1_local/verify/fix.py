"""A copy of a GGUF with other keys: its tensors' bytes are copied, never encoded again."""

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dots1_local.errors import Dots1Error
from dots1_local.files.gguf import GGUFFile
from dots1_local.files.gguf_header import GGUFHeader
from dots1_local.files.partial_file import (
    check_space,
    check_target,
    disk_errors,
    open_partial,
    partial_path,
)
from dots1_local.progress import Progress, silent
from dots1_local.verify.findings import Change, Report

__all__ = ["check_output", "write_fixed"]

_STEP = 64 << 20  # bytes copied between two calls of progress
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class _Copy:
    """`header`, and then what `source` holds from `start` on."""

    source: Path
    header: bytes
    start: int

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.source.stat().st_size - self.start


def write_fixed(
    report: Report, output: str | Path, *, force: bool = False, progress: Progress = silent
) -> tuple[Path, ...]:
    """Copy the file of `report` to `output` with the report's `changes` made; return the paths.

    Every shard of a split file is copied, to OUT-00001-of-0000N.gguf and so on. Files get their
    names when all are complete; if anything stops the copy, nothing half-done stays.

    Raises:
        Dots1Error: an output exists (without `force`), is the input, or cannot be written.
    """
    path = _resolved(output)
    targets = _check(report.files, path, force)
    copies = []
    for number, source in enumerate(report.files):
        header = GGUFHeader.read(source)
        changes = report.changes if number == 0 else ()
        copies.append(_Copy(source, changed_header(header, changes), header.data_start))
    with disk_errors(path, kept=False), ExitStack() as opened:
        files = [opened.enter_context(_open(target)) for target in targets]
        _write(copies, files, progress)
    return tuple(targets)


def check_output(path: str | Path, output: str | Path, *, force: bool = False) -> None:
    """Raise what `write_fixed` would raise about `output`, before time is spent on verifying."""
    _check(GGUFFile.open(path).files, _resolved(output), force)


def _resolved(output: str | Path) -> Path:
    """If `output` is a link, the file it points to is written."""
    return Path(os.path.realpath(output)) if os.path.islink(output) else Path(output)


def _targets(files: Sequence[Path], path: Path) -> list[Path]:
    if len(files) == 1:
        return [path]
    stem, count = path.name.removesuffix(".gguf"), len(files)
    return [path.with_name(f"{stem}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]


def _check(files: Sequence[Path], path: Path, force: bool) -> list[Path]:
    """The files to write for `path`, after checks that each may be written."""
    check_target(path, force=True)
    targets = _targets(files, path)
    with disk_errors(path, kept=False):
        for target in {path, *targets}:
            if target.with_name(target.name + ".journal").exists():
                raise Dots1Error(f"a conversion to {target} is unfinished; write to another file")
        force = force or _was_killed(targets)
        for target in targets:
            _check_source(files, target)
            check_target(target, force=force)
        needed = sum(file.stat().st_size for file in files)
        check_space(targets[0], needed, map(partial_path, targets))
    return targets


def _was_killed(targets: Sequence[Path]) -> bool:
    """Whether a copy was killed while its files got their names, of which the first comes last."""
    return not targets[0].exists() and partial_path(targets[0]).exists()


def _check_source(files: Sequence[Path], target: Path) -> None:
    for path in (target, partial_path(target)):
        if path.exists() and any(path.samefile(file) for file in files):
            raise Dots1Error(f"{path} is the file to be fixed; write to another file")


def _open(target: Path) -> AbstractContextManager[BinaryIO]:
    """Open the partial file of `target`; a link or pipe in its place is removed, not followed."""
    partial = partial_path(target)
    if os.path.lexists(partial) and not stat.S_ISREG(partial.lstat().st_mode):
        partial.unlink()
    return open_partial(target)


def _write(copies: Sequence[_Copy], files: Sequence[BinaryIO], progress: Progress) -> None:
    total, done = sum(copy.nbytes for copy in copies), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, "bytes", "copying")

    for copy, target in zip(copies, files, strict=True):
        with open(copy.source, "rb") as source:
            target.write(copy.header)
            target.flush()
            report(len(copy.header))
            _copy_rest(source.fileno(), target.fileno(), copy.start, report)
        os.fsync(target.fileno())  # all files are on the disk before the first gets its name


def _copy_rest(source: int, target: int, offset: int, report: Callable[[int], None]) -> None:
    """Append what `source` holds from `offset` on, by the kernel if it can."""
    end = os.fstat(source).st_size
    while offset < end:
        count = _copy(source, target, min(_STEP, end - offset), offset)
        if not count:
            raise Dots1Error("the file to be fixed was truncated while it was copied")
        offset += count
        report(count)


def _copy(source: int, target: int, count: int, offset: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, offset_src=offset)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    data = os.pread(source, min(count, 1 << 20), offset)
    return os.write(target, data)


def changed_header(header: GGUFHeader, changes: Iterable[Change]) -> bytes:
    """The header with `changes` made, up to where the data begins.

    A changed key keeps its place; new keys come last.
    """
    keys = header.keys.changed(changes)
    counts = struct.pack("<IQQ", header.version, len(header.tensors), len(keys))
    raw = b"GGUF" + counts + b"".join(map(keys.raw, keys)) + header.raw_tensors
    return raw + bytes(-len(raw) % header.alignment)
