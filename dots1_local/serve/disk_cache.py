"""Blocks of KV caches in files: written in the background, and checked when they are read.

DIR/MODEL/START-KEY.kv holds one block. MODEL names the model, the context and the types that the
block was computed with; KEY names all tokens up to the block's end, and MODEL. So servers of
several models can share a folder. A file that is missing, damaged or not what its name says is
ignored, and its tokens are computed. Only files with such names are ever removed.
"""

import errno
import logging
import os
import re
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Semaphore
from typing import IO

import msgspec
import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.files.partial_file import open_partial, remove_abandoned
from dots1_local.serve.kv_block import BLOCK_TOKENS, Block

__all__ = ["DiskCache"]

_MAGIC = b"dots1-kv-block-1"
_PREFIX = struct.Struct("<16sI")  # _MAGIC, length of the header's JSON
_STATE_OFFSET = 4096
_NAME = re.compile(r"(\d{8})-([0-9a-f]{32})\.kv(\.partial)?")
_FOLDER = re.compile(r"[0-9a-f]{32}")
_QUEUED = 4  # blocks that wait to be written; they take RAM
_READERS = 2  # one reads while the other one checks
_MOST = 64 << 30  # bytes, if nobody names a limit
_SLACK = 0.05  # of the limit; a smaller cache is searched for old files less often
_KEPT_FREE = 1 << 30  # bytes of the disk, for others
_PAUSE = 60  # seconds without writing after a failure
_log = logging.getLogger(__name__)


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    parent: str
    tokens: tuple[int, ...]
    nbytes: int
    crc: int  # CRC-32 of the state


class DiskCache:
    """A folder of blocks, of at most `nbytes` together; those that were not used longest go first.

    `binding` names what the blocks are computed with. One thread calls the methods.
    """

    def __init__(self, folder: Path, nbytes: int | None, binding: str) -> None:
        """Make the folder if it is missing; by default its limit is half of what it could take.

        Raises:
            Dots1Error: the folder cannot be made or written.
        """
        self.root = binding[:32]
        self._top, self._folder = folder, folder / self.root
        self._total = 0
        self._waiting: dict[str, NDArray[np.uint8]] = {}  # states that are not written yet
        self._room = Semaphore(_QUEUED)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="dots1-cache-writer")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="dots1-cache-reader")
        self._failure, self._retry = "", 0.0  # the last failure, and when to write again
        try:
            self._make_folder()
            if not os.access(self._folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            paths = [path for *_, path in self._files()]
            remove_abandoned(path for path in paths if path.suffix == ".partial")
            self._total = sum(size for _, _, size, _ in self._files())
            could_take = shutil.disk_usage(folder).free + self._total
            self._nbytes = min(_MOST, could_take // 2) if nbytes is None else nbytes
        except OSError as error:
            raise Dots1Error(f"cannot cache prompts in {folder}: {error.strerror}") from None

    @property
    def nbytes(self) -> int:
        """The bytes of all files, as far as this process knows."""
        return self._total

    @property
    def failing(self) -> bool:
        """Whether a block could not be written a moment ago."""
        return time.monotonic() < self._retry

    def blocks(self) -> Iterator[Block]:
        """Read the headers of all blocks of this model."""
        for path in sorted(self._folder.glob("*.kv")):
            with suppress(OSError, ValueError, struct.error), path.open("rb") as file:
                start, header = _read_header(file, path)
                yield Block(header.parent, start, header.tokens, on_disk=True)

    def wait_for_room(self, timeout: float) -> bool:
        """Wait until another block may be written; return whether it may."""
        if self.failing or not self._room.acquire(timeout=timeout):
            return False
        self._room.release()
        return True

    def write(self, block: Block, state: NDArray[np.uint8]) -> None:
        """Write a block in the background; it counts as on disk from now on, until that fails."""
        self._room.acquire()
        block.on_disk = True
        self._waiting[block.key] = state
        self._writer.submit(self._write, block, state)

    def read(self, block: Block) -> Future[NDArray[np.uint8] | None]:
        """Read the state of a block; None if that fails, and then it is no longer on disk."""
        return self._readers.submit(self._read, block)

    def touch(self, blocks: Sequence[Block]) -> None:
        """Count blocks as used now."""
        now, paths = time.time(), [self._path(block) for block in blocks if block.on_disk]
        if paths:
            self._writer.submit(_set_times, paths, now)

    def remove(self, block: Block) -> None:
        """Remove the file of a block that another one makes useless."""
        block.on_disk = False
        self._writer.submit(self._unlink, self._path(block))

    def close(self) -> None:
        """Finish what was begun."""
        self._readers.shutdown(cancel_futures=True)
        self._writer.shutdown()

    def _path(self, block: Block) -> Path:
        return self._folder / f"{block.start:08d}-{block.key}.kv"

    def _make_folder(self) -> None:
        self._top.mkdir(parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def _write(self, block: Block, state: NDArray[np.uint8]) -> None:
        path = self._path(block)
        header = _Header(block.parent, block.tokens, state.nbytes, zlib.crc32(state.data))
        text = msgspec.json.encode(header)
        try:
            self._make_folder()  # somebody may have removed it
            self._make_room(_STATE_OFFSET + state.nbytes)
            with open_partial(path, private=True) as file:
                file.write((_PREFIX.pack(_MAGIC, len(text)) + text).ljust(_STATE_OFFSET, b"\0"))
                file.write(state.data)
            self._total += _STATE_OFFSET + state.nbytes
            self._failure = ""
        except (OSError, Dots1Error) as error:
            block.on_disk = False
            self._retry = time.monotonic() + _PAUSE
            reason = str(getattr(error, "strerror", None) or error)
            if reason != self._failure:
                self._failure = reason
                _log.warning("prompts are not cached in %s: %s", self._top, reason)
        finally:
            del self._waiting[block.key]
            self._room.release()

    def _read(self, block: Block) -> NDArray[np.uint8] | None:
        state = self._waiting.get(block.key)
        if state is not None:
            return state
        path = self._path(block)
        try:
            with path.open("rb", buffering=0) as file:
                _, header = _read_header(file, path)
                state = np.empty(header.nbytes, np.uint8)
                file.seek(_STATE_OFFSET)
                if (
                    file.readinto(state.data) == state.nbytes
                    and zlib.crc32(state.data) == header.crc
                ):
                    _set_times([path], time.time())
                    return state
        except (OSError, ValueError, MemoryError, struct.error):
            pass
        block.on_disk = False
        return None

    def _make_room(self, nbytes: int) -> None:
        """Remove the oldest files until the limit and the disk have room for so many bytes.

        Raises:
            OSError: there is too little room even without them.
        """
        lacking = self._lacking(nbytes)
        if lacking <= 0:
            return
        files = sorted(self._files())  # other servers write and remove files too
        self._total = sum(size for _, _, size, _ in files)
        lacking = self._lacking(nbytes)
        if lacking > 0:
            lacking += int(_SLACK * self._nbytes)
        for _, _, _, path in files:
            if lacking <= 0:
                return
            lacking -= self._unlink(path)
        if self._lacking(nbytes) > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _lacking(self, nbytes: int) -> int:
        free = shutil.disk_usage(self._folder).free
        return max(self._total + nbytes - self._nbytes, nbytes + _KEPT_FREE - free)

    def _unlink(self, path: Path) -> int:
        """Remove a file; return how many bytes it had."""
        with suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            self._total -= size
            return size
        return 0

    def _files(self) -> Iterator[tuple[float, int, int, Path]]:
        """When each file was used last, minus its start, its bytes and its path.

        In this order, blocks that were used at once end with the first ones.
        """
        for folder in self._top.iterdir():
            if not (_FOLDER.fullmatch(folder.name) and folder.is_dir()):
                continue
            for entry in os.scandir(folder):
                if name := _NAME.fullmatch(entry.name):
                    with suppress(OSError):
                        stat = entry.stat(follow_symlinks=False)
                        yield stat.st_mtime, -int(name[1]), stat.st_size, Path(entry.path)


def _read_header(file: IO[bytes], path: Path) -> tuple[int, _Header]:
    """Return the position of a block's first token, and its header; raise ValueError if wrong."""
    name = _NAME.fullmatch(path.name)
    prefix = file.read(_STATE_OFFSET)
    magic, length = _PREFIX.unpack_from(prefix)
    if not name or magic != _MAGIC or length > _STATE_OFFSET - _PREFIX.size:
        raise ValueError
    header = msgspec.json.decode(prefix[_PREFIX.size :][:length], type=_Header)
    block = Block(header.parent, int(name[1]), header.tokens)
    size = os.fstat(file.fileno()).st_size
    if block.key != name[2] or size != _STATE_OFFSET + header.nbytes:
        raise ValueError
    if not 0 < len(header.tokens) <= BLOCK_TOKENS or block.start % BLOCK_TOKENS:
        raise ValueError
    return block.start, header


def _set_times(paths: Sequence[Path], now: float) -> None:
    for path in paths:
        with suppress(OSError):
            os.utime(path, (now, now))
