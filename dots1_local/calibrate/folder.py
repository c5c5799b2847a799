"""What a calibration keeps on disk between two layers, so that a kill costs at most one.

`DIR/work` holds `identity`, what the run belongs to; `layer-NNNN.gguf`, the importance measured in
each finished layer; and `after-NNNN.f32`, the residual stream that left the last of them. Files get
their names when they are complete, the stream's after the layer's. Those of `probe_folder` lie
there too.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.files.partial_file import (
    check_space,
    check_target,
    disk_errors,
    open_locked,
    open_partial,
)
from dots1_local.quant.importance import load_importance, write_imatrix

__all__ = ["IMATRIX", "SENSITIVITY", "CalibrationFolder", "Entries"]

IMATRIX, SENSITIVITY = "imatrix.gguf", "sensitivity.json"  # what it holds in the end

Floats = NDArray[np.float32]
Entries = Mapping[str, tuple[Floats, Floats]]  # by GGUF name: sums (parts, columns), counts

_NAMES = re.compile(
    r"lock|identity|sensitivity\.json|(after-\d+\.f32|layer-\d+\.gguf|imatrix\.gguf"
    r"|(probe|back)-\d+\.npy|(noise|effects)-\d+\.json)(\.partial)?"
)


class CalibrationFolder:
    """The folder a calibration writes to; use it in a `with` statement, which locks it.

    `finished` layers are done when it is opened. `results` are the files it is to hold in the end.
    """

    def __init__(
        self,
        path: Path,
        identity: str,
        stream_bytes: int,
        probe_bytes: int = 0,
        *,
        force: bool,
        results: Sequence[str],
    ) -> None:
        self.path, self.work = path, path / "work"
        self.finished = 0
        self._identity = identity
        self._stream_bytes, self._probe_bytes = stream_bytes, probe_bytes
        self._force, self._results = force, results
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        with disk_errors(self.path), ExitStack() as opened:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in self._results:
                check_target(self.path / name, force=self._force)
            self.work.mkdir(exist_ok=True)
            busy = f"another calibration is running in {self.path}"
            opened.enter_context(open_locked(self.work / "lock", busy))
            self._take_up()
            # One stream is written while the other is still there.
            needed = 2 * self._stream_bytes + self._probe_bytes
            there = [*self._files("after"), *self._files("probe"), *self._files("back")]
            check_space(self.work / "after", needed, there, what="calibration")
            self._lock = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def load(self, chunk: int) -> Iterator[Floats]:
        """What left the last finished layer, in pieces of `chunk` numbers."""
        path = self._stream(self.finished)
        try:
            with path.open("rb") as file:
                for _ in range(self._stream_bytes // (4 * chunk)):
                    values = np.fromfile(file, np.float32, chunk)
                    if len(values) < chunk:
                        raise Dots1Error(f"{path} got shorter while it was read")
                    yield values
        except OSError as error:
            raise Dots1Error(f"cannot read {path}: {error.strerror}") from None

    def finish_layer(self, entries: Entries, chunk_size: int, chunks: Iterable[Floats]) -> None:
        """Keep what was measured in the next layer, and the stream that left it.

        Raises:
            Dots1Error: the disk is full or broken; the layers before are still there.
        """
        before, after = self._stream(self.finished), self._stream(self.finished + 1)
        with disk_errors(self.path):
            if entries:
                path = self._layer(self.finished)
                write_imatrix(path, entries, datasets=[], chunk_count=0, chunk_size=chunk_size)
            with open_partial(after) as file:
                for chunk in chunks:
                    file.write(np.ascontiguousarray(chunk).data)
            before.unlink(missing_ok=True)
        self.finished += 1

    def measured(self) -> Iterator[tuple[str, tuple[Floats, Floats]]]:
        """Everything measured in the finished layers."""
        for layer in range(self.finished):
            importance = load_importance(self._layer(layer))
            for name, tensor in importance.tensors.items():
                yield name, (importance.sums(name), tensor.counts)

    def draft(self, name: str) -> Path:
        """Where to write one of the results."""
        return self.work / name

    def publish(self) -> None:
        """Move the results to where they belong, and remove what only an unfinished run needs.

        Raises:
            Dots1Error: the folder may no longer be written to.
        """
        with disk_errors(self.path):
            for name in self._results:
                os.replace(self.draft(name), self.path / name)
            # Without its identity, half of what is here is not taken for an unfinished run.
            for file in [*self._files("identity"), *self._files("")]:
                file.unlink(missing_ok=True)
        with suppress(OSError):  # someone else's files lie there too, or it is a link
            self.work.rmdir()

    def _take_up(self) -> None:
        """Go on with a former run of the same; another's is dropped only by force."""
        path = self.work / "identity"
        same = path.exists() and path.read_text(errors="replace") == self._identity
        if same:
            self.finished = self._count_finished()
            for stream in self._streams():
                if stream != self._stream(self.finished):
                    stream.unlink()
            return
        if self._streams() and not self._force:
            raise Dots1Error(
                f"{self.work} holds an unfinished calibration of another checkpoint, text or "
                "setting; give --force to drop it, or name another folder"
            )
        for old in self._files(""):
            if old.name != "lock":
                old.unlink()
        path.write_text(self._identity)

    def _count_finished(self) -> int:
        """Layers done before the stream that is there, if it is whole."""
        numbers = [
            int(path.stem.removeprefix("after-"))
            for path in self._streams()
            if path.stat().st_size == self._stream_bytes
        ]
        return max(numbers, default=0)

    def _files(self, start: str) -> list[Path]:
        """What a run made; other files may lie in a folder called work."""
        ours = [path for path in self.work.iterdir() if _NAMES.fullmatch(path.name)]
        return [path for path in ours if path.name.startswith(start) and path.is_file()]

    def _streams(self) -> list[Path]:
        return [path for path in self._files("after-") if path.suffix == ".f32"]

    def _stream(self, finished: int) -> Path:
        return self.work / f"after-{finished:04}.f32"

    def _layer(self, layer: int) -> Path:
        return self.work / f"layer-{layer:04}.gguf"
