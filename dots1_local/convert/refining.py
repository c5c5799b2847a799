"""The refining of a conversion's tensors: what the refining pass needs and leaves behind.

Work in progress lies in `NAME.refine`, beside the output. The journal's lock holds for it, too.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

from threadpoolctl import threadpool_limits

from dots1_local.calibrate.calibrate import find_device
from dots1_local.calibrate.refinement_file import RefinementData
from dots1_local.calibrate.refining_pass import RefiningPass
from dots1_local.calibrate.stream_files import StreamFiles
from dots1_local.convert.refined import RefinedTensors, TensorWriter
from dots1_local.convert.refined_results import TensorResult, load_results
from dots1_local.convert.writer import Journal, Output, TensorSlot
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.gguf import cores
from dots1_local.files.partial_file import check_space
from dots1_local.progress import Progress
from dots1_local.quant.importance import Importance
from dots1_local.reference.model import Compute
from dots1_local.refine.blocks import refinable
from dots1_local.refine.kernels import build_id

__all__ = ["Refining"]


@dataclass(frozen=True)
class Refining:
    """How a conversion refines: with what was measured, and how the layers are computed."""

    data: RefinementData
    importance: Importance
    device: str | None = None
    bf16: bool = False

    def fingerprint(self) -> str:
        """Identify what the refined bytes depend on, beside checkpoint and importance."""
        tokens = hashlib.sha256(self.data.tokens.tobytes()).hexdigest()
        return f"refined {tokens} {self.bf16} torch {version('torch')} kernels {build_id()}"

    def files(self, checkpoint: Checkpoint, output: Output, at_most: int = 0) -> StreamFiles:
        """The files of the pass, which may resume with a stream that passed `at_most` layers."""
        folder = output.target.with_name(f"{output.target.name}.refine")
        shape = (*self.data.tokens.shape, checkpoint.config.hidden_size)
        identity = f"{checkpoint.fingerprint} {self.fingerprint()}"
        return StreamFiles(folder, identity, shape, at_most)

    def check_space(self, checkpoint: Checkpoint, output: Output) -> None:
        """Refuse a disk that cannot hold the output and the files of the pass.

        Raises:
            Dots1Error: the disk is too small.
            OSError: the disk does not tell its free space.
        """
        files = self.files(checkpoint, output)
        what = f"{output.path.name} with the states of {self.data.tokens.size:,} tokens"
        needed = output.total_bytes + files.nbytes
        check_space(output.path, needed, [*output.partials, *files.present], what=what)

    def run(
        self, checkpoint: Checkpoint, journal: Journal, threads: int | None, progress: Progress
    ) -> tuple[TensorResult, ...]:
        """Refine and write all tensors of types that can be refined and are not journaled yet.

        Returns what was found for each, also in an earlier run.

        Raises:
            CheckpointError: a weight or a result is NaN or infinite, or a shard ends early.
            Dots1Error: the disk is full, or there is too little memory.
        """
        slots = [slot for slot in journal.output.slots if refinable(slot.tensor.kind)]
        left = [slot for slot in slots if slot.tensor.spec.name not in journal.done]
        files = self.files(checkpoint, journal.output, _first_layer(left, checkpoint))
        if left:
            workers, report = threads or cores(), _Report(journal, progress)
            writer = TensorWriter(journal, files.results, report.written)
            # Each worker multiplies matrices on its own core.
            with files, _memory_errors(workers), threadpool_limits(1, user_api="blas"):
                self._refine(checkpoint, left, files, writer, workers, report.at)
        results = load_results(files.results)
        names = [slot.tensor.spec.name for slot in slots]
        return tuple(results[name] for name in names if name in results)

    def _refine(
        self,
        checkpoint: Checkpoint,
        slots: Sequence[TensorSlot],
        files: StreamFiles,
        writer: TensorWriter,
        workers: int,
        report: Callable[[str], None],
    ) -> None:
        compute = Compute(find_device(self.device), self.bf16)
        with RefinedTensors(
            checkpoint, slots, self.data, self.importance, writer, workers
        ) as refined:
            refined.embedding()
            if any(slot.tensor.spec.role != "embedding" for slot in slots):
                tokens = self.data.tokens
                RefiningPass(checkpoint, tokens, compute, workers, files, report).run(refined)


def _first_layer(slots: Sequence[TensorSlot], checkpoint: Checkpoint) -> int:
    """The first layer with a tensor in `slots`; the head comes after the last layer."""
    layers = (slot.tensor.spec.layer for slot in slots)
    return min(
        (layer for layer in layers if layer is not None),
        default=checkpoint.config.num_hidden_layers,
    )


class _Report:
    """Reports the written bytes of a conversion, with what is computed."""

    def __init__(self, journal: Journal, progress: Progress) -> None:
        slots = journal.output.slots
        self._total = sum(slot.tensor.nbytes for slot in slots)
        self._done = sum(s.tensor.nbytes for s in slots if s.tensor.spec.name in journal.done)
        self._progress, self._what = progress, ""

    def at(self, what: str) -> None:
        self._what = what
        self._progress(self._done, self._total, "bytes", what)

    def written(self, nbytes: int) -> None:
        self._done += nbytes
        self.at(self._what)


@contextmanager
def _memory_errors(threads: int) -> Iterator[None]:
    """Turn errors about memory into one sentence.

    Raises:
        Dots1Error: there is too little memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(
            "out of memory|t allocate memory", str(error)
        ):
            raise
        raise Dots1Error(
            f"not enough memory to refine with {threads} threads, which take about 1 GB each for "
            "dots.llm1; give fewer --threads, and the same command resumes"
        ) from None
