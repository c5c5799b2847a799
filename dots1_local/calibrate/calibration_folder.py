"""The files of a calibration between two layers, so that a killed run loses at most one layer.

`DIR/work` holds `identity`, a digest of the run's inputs; `complete`, the same digest, as soon as
all results are there and before they are moved to DIR; `layer-NNNN.gguf`, the importance
measured in each finished layer; and `stream`, a folder with the residual stream after the last
finished layer. `routing-NNNN.safetensors` has the experts that tokens chose in a layer. A layer's
files are complete before the stream after it.

For sensitivity there are also `probe-NNNN.npy`, the probed chunks' inputs to each layer;
`noise-NNNN.json`, how far rounding moves the router's margins there; `back-NNNN.npy`, the
gradients at the input of the last layer that the backward pass finished; and `effects-NNNN.json`,
what it measured in each layer, complete before the gradients.

For refinement there are also `sample-NNNN.json`, the errors of a sample of refined rows by type;
`errors-NNNN.safetensors`, the rows' errors in one type; `judged-NNNN.npy`, the moment of one
matrix; and `refined-NNNN.json`, the effects of refined rows.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.calibrate.manifest import REFINEMENT
from dots1_local.calibrate.probe_files import ProbeFiles
from dots1_local.calibrate.stream_files import StreamFiles
from dots1_local.errors import Dots1Error
from dots1_local.files.partial_file import (
    DiskNeed,
    check_is_named,
    check_target,
    disk_errors,
    open_locked,
)
from dots1_local.hub.shard_supply import remove_shards
from dots1_local.quant.imatrix_file import load_importance, write_imatrix

__all__ = ["CalibrationFolder", "Entries"]

Floats = NDArray[np.float32]
Entries = Mapping[str, tuple[Floats, Floats]]  # by GGUF name: sums (experts, columns), counts

_NAMES = re.compile(
    r"lock|identity|complete|calibration\.json|sensitivity(-refined)?\.json"
    r"|(refinement|routing)\.safetensors"
    r"|(layer-\d+\.gguf|imatrix\.gguf|(probe|back|judged)-\d+\.npy"
    r"|(noise|effects|sample|refined)-\d+\.json|(errors|routing)-\d+\.safetensors)(\.partial)?"
    # Of earlier versions:
    r"|after-\d+\.f32(\.partial)?|(after|(probe|back|noise|effects)-\d+)\.partial"
)


@dataclass
class CalibrationFolder:
    """The folder that a calibration writes to; a `with` statement opens and locks it.

    `identity` is a digest of the inputs; for a model on the hub, its name@commit follows. `shape`
    is that of the residual stream, `stream`, through `layers` layers. `results` are the names of
    the files to write in the end.
    """

    path: Path
    identity: str
    shape: tuple[int, int, int]
    layers: int
    probe_bytes: int
    refinement_bytes: int
    force: bool
    results: Sequence[str]

    def __post_init__(self) -> None:
        self._work = self.path / "work"
        self.stream = StreamFiles(self._work / "stream", self.identity, self.shape, self.layers)
        self.probe = ProbeFiles(self._work)
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        check_is_named(self.path)
        with disk_errors(self.path), ExitStack() as opened:
            self.path.mkdir(parents=True, exist_ok=True)
            busy = f"another calibration is running in {self.path}"
            if self._work.is_dir():
                with open_locked(self._work / "lock", busy):
                    self._remove_if_published()
            for name in self.results:
                check_target(self.path / name, force=self.force or self._is_complete())
            self._work.mkdir(exist_ok=True)
            opened.enter_context(open_locked(self._work / "lock", busy))
            self._resume_or_clear()
            self.need.check()
            opened.enter_context(self.stream)
            self._lock = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    @property
    def finished(self) -> int:
        """The layers that the forward pass has finished, also in an earlier run."""
        return self.stream.finished or 0

    @property
    def need(self) -> DiskNeed:
        """The disk space of all files of an unfinished run, except shards."""
        nbytes = self.stream.nbytes + self.probe_bytes + self.refinement_bytes
        working = ("probe", "back", REFINEMENT)
        present = [path for start in working for path in self._files(start)]
        return DiskNeed(self.stream.folder, nbytes, [*self.stream.present, *present], "calibration")

    @property
    def shards(self) -> Path:
        """The folder of shards that are fetched from the hub."""
        return self._work / "shards"

    def finish_layer(self, entries: Entries, chunk_size: int) -> None:
        """Save what was measured in the next layer, and keep the residual stream after it.

        Raises:
            Dots1Error: the disk is full or broken; the earlier layers stay finished.
        """
        with disk_errors(self.path):
            if entries:
                path = self._layer(self.finished)
                write_imatrix(path, entries, datasets=[], chunk_count=0, chunk_size=chunk_size)
            self.stream.finish_layer()

    def measured(self) -> Iterator[tuple[str, tuple[Floats, Floats]]]:
        """Everything that was measured in the finished layers."""
        for layer in range(self.finished):
            importance = load_importance(self._layer(layer))
            for name, tensor in importance.tensors.items():
                yield name, (importance.sums(name), tensor.counts)

    def draft(self, name: str) -> Path:
        """The path at which to write one of the results."""
        return self._work / name

    def reclaim(self, name: str) -> None:
        """Move a result back to its draft, if a run was killed after it had published the result.

        Raises:
            OSError: the disk is broken.
        """
        if not self.draft(name).exists() and (self.path / name).is_file():
            os.replace(self.path / name, self.draft(name))

    def publish(self) -> None:
        """Move the results to their places, and remove the files of an unfinished run.

        Raises:
            Dots1Error: the folder is no longer writable.
        """
        with disk_errors(self.path):
            (self._work / "complete").write_text(self.identity)
            for name in self.results:
                os.replace(self.draft(name), self.path / name)
            self._remove_work()

    def _is_complete(self) -> bool:
        """Whether a run with the same inputs was killed when it had all results."""
        path = self._work / "complete"
        return path.is_file() and path.read_text(errors="replace") == self.identity

    def _remove_if_published(self) -> None:
        """Remove what a run left that was killed after all its results had their places."""
        drafts = any(self.draft(name).exists() for name in self.results)
        begun = (self._work / "identity").exists() or (self._work / "complete").exists()
        if not begun or (self._is_complete() and not drafts):
            self._remove_work()

    def _remove_work(self) -> None:
        """Remove all files of a run; those that tell the next run of it, last."""
        last = ("identity", "complete", "lock")
        others = [path for path in self._files("") if path.name not in last]
        for path in others:
            path.unlink()
        self.stream.remove()
        remove_shards(self.shards)
        for name in last:
            (self._work / name).unlink(missing_ok=True)
        with suppress(OSError):  # it is a link, or holds files of somebody else
            self._work.rmdir()

    def _resume_or_clear(self) -> None:
        """Resume a run with the same inputs; remove the files of another one if `force` is set."""
        path = self._work / "identity"
        found = path.read_text(errors="replace") if path.exists() else ""
        if found == self.identity:
            return
        if self.stream.present and not self.force:
            raise Dots1Error(
                f"{self._work} holds an unfinished calibration of another "
                f"{_difference(found, self.identity)}; give --force to remove it, or name another "
                "folder"
            )
        for old in self._files(""):
            if old.name != "lock":
                old.unlink()
        self.stream.remove()
        path.write_text(self.identity)

    def _files(self, start: str) -> list[Path]:
        """The files of a calibration; a folder called work may hold others too."""
        ours = [path for path in self._work.iterdir() if _NAMES.fullmatch(path.name)]
        return [path for path in ours if path.name.startswith(start) and path.is_file()]

    def _layer(self, layer: int) -> Path:
        return self._work / f"layer-{layer:04}.gguf"


def _difference(found: str, identity: str) -> str:
    """In what two runs differ; identities of models on the hub end with their name and commit."""
    (begun, _, before), (name, _, now) = (text.rpartition("@") for text in (found, identity))
    if begun.rpartition(" ")[2] == name.rpartition(" ")[2] != "" and before != now:
        return f"commit: it was begun with --revision {before}, and the revision is {now[:12]} now"
    return "checkpoint, text or setting"
