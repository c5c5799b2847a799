"""Refined tensors in the output file: their pieces come in any order, from any layer's matrices."""

from collections.abc import Sequence
from pathlib import Path

from dots1_local.convert.output import TensorSlot
from dots1_local.convert.refined_matrix import Encoded
from dots1_local.convert.refined_results import MatrixResult, TensorResult, append_result
from dots1_local.convert.writer import Journal
from dots1_local.files.partial_file import disk_errors
from dots1_local.progress import Progress, silent

__all__ = ["TensorWriter"]


class TensorWriter:
    """Writes pieces of tensors, and journals a tensor when all its pieces are there.

    What was found goes to the file `results`. `progress` hears of all bytes in the output.
    """

    def __init__(self, journal: Journal, results: Path, progress: Progress = silent) -> None:
        self._journal, self._results, self._progress = journal, results, progress
        self._sizes = {s.tensor.spec.name: s.tensor.nbytes for s in journal.output.slots}
        self._what = ""
        # By tensor and number: what the journal needs to know of a piece, and what was found.
        self._open: dict[str, dict[int, tuple[tuple[int, int], MatrixResult]]] = {}

    def accept(self, pieces: Sequence[Encoded]) -> None:
        """Write pieces.

        Raises:
            Dots1Error: the disk is full.
        """
        for encoded in pieces:
            slot = encoded.piece.slot
            written = self._journal.write(slot, encoded.data, encoded.piece.offset)
            there = self._open.setdefault(slot.tensor.spec.name, {})
            there[encoded.piece.number] = written, encoded.result
            if len(there) == encoded.piece.count:
                self._finish(slot)
        self.at(self._what)

    def at(self, what: str) -> None:
        """Report what is computed, and the bytes that are written."""
        self._what = what
        done = sum(self._sizes[name] for name in self._journal.finished)
        done += sum(size for there in self._open.values() for (size, _), _ in there.values())
        self._progress(done, sum(self._sizes.values()), "bytes", what)

    def _finish(self, slot: TensorSlot) -> None:
        name = slot.tensor.spec.name
        there = [found for _, found in sorted(self._open.pop(name).items())]
        with disk_errors(self._journal.output.path):
            append_result(self._results, TensorResult(name, tuple(each for _, each in there)))
        self._journal.finish(slot, [written for written, _ in there])
