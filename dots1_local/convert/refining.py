"""The refining of a conversion's tensors: what the refining pass needs and leaves behind.

Work in progress lies in `NAME.refine`, beside the output. The journal's lock holds for it, too.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version

from threadpoolctl import threadpool_limits

from dots1_local.architecture import Dots1Config
from dots1_local.calibrate.calibrate import find_device
from dots1_local.calibrate.refinement_file import RefinementData
from dots1_local.calibrate.refining_pass import RefiningPass
from dots1_local.calibrate.stream_files import StreamFiles
from dots1_local.convert.output import Output, TensorSlot
from dots1_local.convert.pipeline import Encoder, Pipeline
from dots1_local.convert.refined import RefinedTensors
from dots1_local.convert.refined_results import TensorResult, load_results
from dots1_local.convert.refined_writer import TensorWriter
from dots1_local.convert.writer import Journal
from dots1_local.errors import memory_errors
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import DiskNeed
from dots1_local.hub.pass_shards import EMBEDDING, PassShards, Provide, forward_steps
from dots1_local.progress import Progress
from dots1_local.quant.importance import Importance
from dots1_local.reference.model import Compute
from dots1_local.refine.arrays import arrays_on
from dots1_local.refine.kernels import build_id

__all__ = ["RefinedConversion", "Refining"]


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

    def need(self, checkpoint: Checkpoint, output: Output) -> DiskNeed:
        """The disk space of the output, and of the files of the pass."""
        files = self.files(checkpoint, output)
        return DiskNeed(
            output.path,
            output.total_bytes + files.nbytes,
            [*output.partials, *files.present],
            f"{output.path.name} with the states of {self.data.tokens.size:,} tokens",
        )


@dataclass(frozen=True)
class RefinedConversion:
    """A conversion to the files of `journal`, in the order of the layers."""

    how: Refining
    shards: PassShards
    journal: Journal
    threads: int
    encoder: Encoder
    progress: Progress
    notify: Callable[[str], None]

    def run(self) -> tuple[TensorResult, ...]:
        """Write all tensors that are not journaled yet; refine those of types that can be refined.

        Returns what was found for each refined tensor, also in an earlier run.

        Raises:
            CheckpointError: a weight or a result is NaN or infinite, or a shard ends early.
            Dots1Error: the disk is full, a shard cannot be fetched, or there is too little memory.
        """
        slots = self.journal.output.slots
        left = [slot for slot in slots if slot.tensor.spec.name not in self.journal.done]
        config = self.shards.checkpoint.config
        at_most = _first_layer(left, config)
        files = self.how.files(self.shards.checkpoint, self.journal.output, at_most)
        if left:
            # Each worker multiplies matrices on its own core.
            with files, _memory_errors(self.threads), threadpool_limits(1, user_api="blas"):
                steps = _steps(left, files.finished, config.num_hidden_layers)
                self.shards.announce({"the refining pass": steps}, self.notify)
                with self.shards.over(steps) as provide:
                    self._refine(left, files, steps, provide)
        results = load_results(files.results)
        names = [slot.tensor.spec.name for slot in slots]
        return tuple(results[name] for name in names if name in results)

    def _refine(
        self, slots: Sequence[TensorSlot], files: StreamFiles, steps: list[str], provide: Provide
    ) -> None:
        checkpoint, how = self.shards.checkpoint, self.how
        device, tokens = find_device(how.device), how.data.tokens
        compute = Compute(device, how.bf16)
        writer = TensorWriter(self.journal, files.results, self.progress)
        streamed = RefiningPass(checkpoint, tokens, compute, self.threads, files, writer.at)
        with RefinedTensors(
            checkpoint,
            slots,
            how.data,
            how.importance,
            writer,
            self._convert_plainly,
            self.threads,
            arrays_on(str(device) if device.type == "cuda" else None),
        ) as refined:
            streamed.run(refined, steps, provide)

    def _convert_plainly(self, names: Collection[str]) -> None:
        Pipeline(
            self.shards.checkpoint,
            self.journal,
            self.how.importance,
            self.threads,
            encoder=self.encoder,
        ).run(self.progress, names)


def _steps(slots: Sequence[TensorSlot], finished: int | None, layers: int) -> list[str]:
    """The steps of the pass that these tensors and a stream after `finished` layers leave over."""
    roles = {slot.tensor.spec.role for slot in slots}
    passed = forward_steps(layers, finished or 0) if roles - {"embedding"} else []
    first = [EMBEDDING] if "embedding" in roles or finished is None else []
    return [*first, *(step for step in passed if step != EMBEDDING)]


def _first_layer(slots: Sequence[TensorSlot], config: Dots1Config) -> int:
    """The first layer with a tensor in `slots`; the head comes after the last layer."""
    layers = (slot.tensor.spec.layer for slot in slots)
    return min((layer for layer in layers if layer is not None), default=config.num_hidden_layers)


def _memory_errors(threads: int) -> AbstractContextManager[None]:
    return memory_errors(
        f"to refine with {threads} threads, which take about 1 GB each for dots.llm1; give fewer "
        "--threads, and the same command resumes"
    )
