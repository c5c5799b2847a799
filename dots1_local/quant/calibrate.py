"""One streaming pass over a checkpoint that measures importance, and reference logits.

All tokens pass layer n; then its weights are dropped and what was measured goes to disk. Memory
holds the residual stream twice (32 KiB a token of dots.llm1) and the part of a layer that all
tokens share (0.8 GB for its dense layer, 0.4 GB for the others), whatever the number of layers.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import inventory
from dots1_local.checkpoint import Checkpoint
from dots1_local.errors import CheckpointError, Dots1Error, UsageError
from dots1_local.progress import Progress, silent
from dots1_local.quant.calibration_folder import CalibrationFolder
from dots1_local.quant.imatrix_file import write_gguf
from dots1_local.quant.rare_experts import LEAST, Coverage, coverage, shrink
from dots1_local.reference.square_sums import SquareSums
from dots1_local.reference.stream import Segment, advance, embed, output_logits
from dots1_local.reference.weights import Kernel

__all__ = ["LogitsSink", "calibrate"]

_WORKING = 4 << 30  # memory that a GPU needs beside the residual stream, with room to spare

Precision = Literal["F32", "BF16"]
Tokens = NDArray[np.int32]


class LogitsSink(Protocol):
    """What `LogitsWriter` is: it keeps logits when its `with` block ends without an exception."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

    def write(self, chunk: int, start: int, logits: NDArray[np.float32], /) -> None:
        """Take logits (n, n_vocab) of a chunk's scored rows from row `start` on."""


@dataclass(frozen=True)
class _Run:
    """What passes through the model: chunks of calibration, then chunks of evaluation."""

    checkpoint: Checkpoint
    tokens: Tokens
    calibrating: int
    precision: Precision

    @property
    def stream_bytes(self) -> int:
        return 4 * self.tokens.size * self.checkpoint.config.hidden_size

    def identity(self) -> str:
        """Changes when an input does; sizes and times stand for the shards' contents."""
        stats = ((path.name, path.stat()) for path in self.checkpoint.shards)
        shards = ";".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in stats)
        versions = f"{version('dots1-local')} {version('torch')}"
        settings = (self.tokens.shape, self.calibrating, self.precision)
        parts = (versions, shards, self.checkpoint.config, settings)
        digest = hashlib.sha256(repr(parts).encode())
        digest.update(self.tokens.tobytes())
        return digest.hexdigest()


def calibrate(
    checkpoint: Checkpoint,
    folder: str | Path,
    tokens: Tokens,
    *,
    evaluation: Tokens | None = None,
    logits: LogitsSink | None = None,
    datasets: Sequence[str] = (),
    device: str | None = None,
    precision: Precision = "F32",
    threads: int | None = None,
    least: int = LEAST,
    force: bool = False,
    progress: Progress = silent,
    on_resume: Progress = silent,
) -> list[Coverage]:
    """Measure the importance of every matrix on `tokens` (chunks, n_ctx): `folder`/imatrix.gguf.

    `evaluation`, chunks of the same length, pass through the model beside them, and what it thinks
    of their scored tokens goes to `logits`. A run that was killed goes on after the last layer it
    finished; `on_resume` is then called with layers done and in all. `device` is a GPU if there is
    one. In BF16 activations are rounded before each multiplication, which CPUs with AVX512-BF16 or
    AMX do several times faster.

    Experts that fewer than `least` tokens reach get a share of their layer's mean; 0 leaves them
    as llama-imatrix has them. Returns how well each layer's experts are covered.

    Raises:
        CheckpointError: the checkpoint is incomplete or corrupt, or computes what is no number.
        UsageError: no tokens, too long chunks, an unknown device.
        Dots1Error: there is a result already, or an unfinished run of something else, and no
            `force`; the disk is full; the folder cannot be written.
    """
    everything = tokens if evaluation is None else np.concatenate([tokens, evaluation])
    _check(checkpoint, everything)
    run = _Run(checkpoint, everything, len(tokens), precision)
    kernel = Kernel(_device(device), precision == "BF16")
    if threads is not None:
        torch.set_num_threads(threads)
    kept = CalibrationFolder(
        Path(folder), run.identity(), run.stream_bytes, force=force, importance=len(tokens) > 0
    )
    with kept:
        if kept.finished:
            on_resume(kept.finished, checkpoint.config.num_hidden_layers, "layers", "")
        with logits or nullcontext() as sink:
            with _enough_memory(run):
                x = _pass(run, kept, kernel, progress)
            if sink is not None:
                _write_logits(run, x, kernel, sink)
        covered = _write_imatrix(run, kept, datasets, least) if len(tokens) else []
        kept.clear()
    return covered


def _check(checkpoint: Checkpoint, tokens: Tokens) -> None:
    specs = inventory(checkpoint.config)
    checkpoint.check(specs)
    checkpoint.check_nothing_else(specs)
    longest = checkpoint.config.max_position_embeddings
    if not tokens.size:
        raise UsageError("calibration needs a text")
    if tokens.shape[1] > longest:
        raise UsageError(f"the model was trained for contexts of {longest} tokens")
    if tokens.min() < 0 or tokens.max() >= checkpoint.config.vocab_size:
        raise UsageError("the tokens are not of this model's vocabulary")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError):  # what torch raises, by kind of device
        raise UsageError(f"torch has no device {name!r} here") from None
    return device


def _pass(run: _Run, kept: CalibrationFolder, kernel: Kernel, progress: Progress) -> Tensor:
    """What leaves the last layer: x [chunks, positions, hidden]."""
    checkpoint, config = run.checkpoint, run.checkpoint.config
    x = torch.empty(*run.tokens.shape, config.hidden_size, device=_home(run, kernel.device))
    if kept.finished:
        for chunk, values in zip(x, kept.load(x[0].numel()), strict=True):
            chunk.copy_(torch.from_numpy(values).view_as(chunk))
    else:
        embed(checkpoint, torch.from_numpy(run.tokens), x)
    total = run.tokens.size * config.num_hidden_layers
    for layer in range(kept.finished, config.num_hidden_layers):
        done = float(layer * run.tokens.size)

        def step(rows: float, name: str = f"layer {layer}") -> None:
            nonlocal done
            done += rows
            progress(round(done), total, "tokens x layers", name)

        measured = SquareSums(checkpoint.config, layer)
        segments = (
            Segment(0, run.calibrating, measured.observe),
            Segment(run.calibrating, len(x)),
        )
        advance(x, checkpoint, layer, segments, kernel, step)
        _check_finite(x, layer)
        kept.finish_layer(measured.by_name(), x.shape[1], (chunk.cpu().numpy() for chunk in x))
    return x


def _write_logits(run: _Run, x: Tensor, kernel: Kernel, sink: LogitsSink) -> None:
    evaluated, first = x[run.calibrating :], x.shape[1] // 2
    for chunk, start, rows in output_logits(evaluated, run.checkpoint, first, kernel.device):
        sink.write(chunk, start, rows.numpy())


@contextmanager
def _enough_memory(run: _Run) -> Iterator[None]:
    """Turn what torch raises where there is not into a sentence."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|t allocate memory", str(error)):
            raise
        needed = 2 * run.stream_bytes / 1e9
        raise Dots1Error(
            f"no memory for {run.tokens.size:,} tokens: they take {needed:.1f} GB, and a layer of "
            "dots.llm1 some 3 GB; take fewer chunks"
        ) from None


def _home(run: _Run, device: torch.device) -> torch.device:
    """Where the residual stream lies: with the device that computes, if it has the room."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if 2 * run.stream_bytes + _WORKING < free else torch.device("cpu")


def _check_finite(x: Tensor, layer: int) -> None:
    """A NaN or infinity shows in the sum, which needs no second copy of x."""
    if not torch.isfinite(x.sum()):
        raise CheckpointError(
            f"what leaves layer {layer} is NaN or infinite; is the checkpoint damaged?"
        )


def _write_imatrix(
    run: _Run, kept: CalibrationFolder, datasets: Sequence[str], least: int
) -> list[Coverage]:
    """Put all layers into one file; how well their experts are covered."""
    covered = []
    entries: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    specs = {spec.name: spec for spec in inventory(run.checkpoint.config)}
    for name, (sums, counts) in kept.measured():
        spec = specs[name]
        is_routed = spec.role == "routed"
        entries[name] = shrink(sums, counts, least) if is_routed else (sums, counts)
        if spec.layer is not None and spec.part == "ffn_gate_exps":
            covered.append(coverage(spec.layer, counts, least))
    try:
        write_gguf(
            kept.imatrix,
            entries,
            datasets=datasets,
            chunk_count=run.calibrating,
            chunk_size=run.tokens.shape[1],
            extra={
                "dots1_local.calibration.precision": run.precision,
                "dots1_local.calibration.shrunk_below": least,
            },
        )
    except OSError as error:
        raise kept.failure(error) from None
    return covered
