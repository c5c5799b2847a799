"""The residual stream in files, so that private memory does not grow with the number of tokens.

`pass_layer` applies a layer to it.

`FOLDER/stream-NNNN.f32` is the stream after NNNN layers. A layer reads it, and writes its output to
`after.f32`, which gets the next number when the layer is finished. So a killed run loses at most
one layer. `inputs.f32` holds the inputs of the layer's experts. All files have their full size from
the start: a mapped file that met a full disk would end the process. `results.jsonl` is for what the
user of the files wants to keep as long as they are there.
"""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dots1_local.calibrate.hooks import NO_HOOKS, Hooks
from dots1_local.calibrate.stream import Report, Segment, WorkingMemory, forward_layer
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import disk_errors
from dots1_local.reference.model import Compute

__all__ = ["StreamFiles", "pass_layer"]

_STREAM = re.compile(r"stream-(\d{4})\.f32")
_AFTER, _INPUTS, _IDENTITY, _RESULTS = "after.f32", "inputs.f32", "identity", "results.jsonl"

_WORKING = 5 << 30  # bytes that a GPU needs beside the residual stream, with a margin

Shape = tuple[int, int, int]


@dataclass
class StreamFiles:
    """The streams (chunks, positions, hidden) of one pass in `folder`; a `with` statement opens it.

    `finished` is the number of layers that the saved stream has passed, None if there is no stream.
    A stream of another `identity`, or one that has passed more than `at_most` layers, is not used.
    The user of the files must hold a lock of their own.
    """

    folder: Path
    identity: str
    shape: Shape
    at_most: int
    finished: int | None = field(default=None, init=False)

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return 3 * self._size

    @property
    def results(self) -> Path:
        """A file for what was found in the finished layers."""
        return self.folder / _RESULTS

    @property
    def present(self) -> list[Path]:
        """The files that an earlier run left."""
        return list(self._files())

    def __enter__(self) -> Self:
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            if not self._is_same():
                self.remove()
                self.folder.mkdir(exist_ok=True)
                (self.folder / _IDENTITY).write_text(self.identity)
            self.finished = self._count_finished()
            self._inputs, self._after = self._map(_INPUTS), self._map(_AFTER)
            if self.finished is not None:
                self._stream = self._map(self._name(self.finished))
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def stream(self) -> Tensor:
        """The stream after the finished layers."""
        return torch.from_numpy(self._stream)

    @property
    def working(self) -> WorkingMemory:
        """Where the next layer is computed."""
        return WorkingMemory(torch.from_numpy(self._inputs), torch.from_numpy(self._after))

    def finish_layer(self) -> None:
        """Keep what is in `working.after` as the stream after one more layer.

        The first call keeps the embeddings, as the stream after 0 layers.
        """
        before, number = self.finished, 0 if self.finished is None else self.finished + 1
        with disk_errors(self.folder):
            self._after.flush()
            os.replace(self.folder / _AFTER, self.folder / self._name(number))
            if before is not None:
                os.replace(self.folder / self._name(before), self.folder / _AFTER)
                self._stream, self._after = self._after, self._stream
            else:
                self._stream, self._after = self._after, self._map(_AFTER)
        self.finished = number

    def remove(self) -> None:
        """Remove all files of the pass, and the folder if it holds nothing else."""
        for path in self._files():
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _is_same(self) -> bool:
        path = self.folder / _IDENTITY
        return path.is_file() and path.read_text(errors="replace") == self.identity

    def _count_finished(self) -> int | None:
        """The highest number of a stream of full size; other streams are removed."""
        streams = {
            int(match[1]): path for path in self._files() if (match := _STREAM.match(path.name))
        }
        whole = [
            number
            for number, path in streams.items()
            if number <= self.at_most and path.stat().st_size == self._size
        ]
        last = max(whole, default=None)
        for number, path in streams.items():
            if number != last:
                path.unlink()
        return last

    def _files(self) -> Iterator[Path]:
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                ours = (_AFTER, _INPUTS, _IDENTITY, _RESULTS)
                if path.name in ours or _STREAM.fullmatch(path.name):
                    yield path

    def _map(self, name: str) -> "np.memmap[Shape, np.dtype[np.float32]]":
        """Map a file of full size into memory, and create it if it is missing."""
        path = self.folder / name
        with open(path, "ab") as file:
            _allocate(file.fileno(), self._size)
            file.truncate(self._size)
        return np.memmap(path, np.float32, "r+", shape=self.shape)

    @staticmethod
    def _name(layers: int) -> str:
        return f"stream-{layers:04}.f32"

    @property
    def _size(self) -> int:
        return 4 * int(np.prod(self.shape))


def pass_layer(
    files: StreamFiles,
    checkpoint: Checkpoint,
    layer: int,
    segments: Sequence[Segment],
    compute: Compute,
    report: Report,
    hooks: Hooks = NO_HOOKS,
) -> None:
    """Leave the stream after a layer in `files.working.after`; see `forward_layer`.

    A GPU holds the stream meanwhile, if it has enough memory.

    Raises:
        CheckpointError: a tensor is missing or unreadable, or a result is NaN or infinite.
    """
    after = files.working.after
    if _fits(after, compute.device):
        x = files.stream.to(compute.device)
        forward_layer(x, checkpoint, layer, segments, compute, report, hooks)
        after.copy_(x)
    else:
        forward_layer(
            files.stream, checkpoint, layer, segments, compute, report, hooks, files.working
        )
    if not all(torch.isfinite(chunk.sum()) for chunk in after):  # without a second copy of it
        raise CheckpointError(
            f"the output of layer {layer} is NaN or infinite; is the checkpoint damaged?"
        )


def _fits(stream: Tensor, device: torch.device) -> bool:
    """Whether a GPU has room for two copies of the stream."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * stream.nbytes + _WORKING < free


def _allocate(fd: int, nbytes: int) -> None:
    """Reserve the disk space of a file, where the system can do that."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except AttributeError:  # macOS
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
