"""Experts that calibration saw little of: how many, and what to make of them.

A mean square over five tokens is mostly noise, and llama.cpp gives an expert without any token the
weight 1 in every column, whatever its layer's scale. Both are drawn towards the layer's mean here:

    importance = (tokens * own mean + (least - tokens) * layer's mean) / least

below `least` tokens, and from there on the expert's own.

One streaming pass over a checkpoint that measures importance, and reference logits; and another,
from the last layer to the first, that measures sensitivity.

All tokens pass layer n; then its weights are dropped and what was measured goes to disk. Memory
holds the residual stream twice (32 KiB a token of dots.llm1) and the part of a layer that all
tokens share (0.8 GB for its dense layer, 0.4 GB for the others; twice that, exact and rounded, for
sensitivity), whatever the number of layers. The way back does without the residual stream.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import inventory
from dots1_local.calibrate.folder import IMATRIX, SENSITIVITY, CalibrationFolder
from dots1_local.calibrate.forward import PROBED, Forward
from dots1_local.calibrate.probe import WORTH, Probe
from dots1_local.calibrate.probe_folder import ProbeFolder
from dots1_local.errors import UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import disk_errors
from dots1_local.progress import Progress, silent
from dots1_local.quant.importance import load_importance, write_imatrix
from dots1_local.reference.weights import Kernel

__all__ = [
    "LEAST",
    "Coverage",
    "LogitsSink",
    "calibrate",
    "coverage",
    "shrink",
]


LEAST = 100  # tokens from which an expert's own mean stands; its error is then 10% or so

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Coverage:
    """The tokens that reached the routed experts of one layer."""

    layer: int
    experts: int
    unseen: int
    rare: int  # unseen ones among them
    fewest: int
    median: int


def coverage(layer: int, counts: Floats, least: int = LEAST) -> Coverage:
    """What `counts` (experts,) of a layer come to; experts below `least` tokens are rare."""
    return Coverage(
        layer,
        len(counts),
        int((counts == 0).sum()),
        int((counts < least).sum()),
        int(counts.min()),
        int(np.median(counts)),
    )


def shrink(sums: Floats, counts: Floats, least: int = LEAST) -> tuple[Floats, Floats]:
    """Sums (experts, columns) and counts (experts,) whose quotient is the shrunk importance.

    Counts stay, but that an unseen expert's is 1: without a count there is no quotient.
    """
    total = counts.sum(dtype=np.float64)
    rare = counts < least
    if total == 0 or not rare.any():
        return sums, counts
    mean = sums.sum(axis=0, dtype=np.float64) / total
    seen = counts[rare].astype(np.float64)[:, None]
    shrunk = (sums[rare] + (least - seen) * mean) / least
    sums, counts = sums.copy(), np.maximum(counts, 1)
    sums[rare] = shrunk * counts[rare, None]
    return sums, counts


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


def calibrate(
    checkpoint: Checkpoint,
    folder: str | Path,
    tokens: Tokens,
    *,
    evaluation: Tokens | None = None,
    logits: LogitsSink | None = None,
    sensitivity: bool = True,
    datasets: Sequence[str] = (),
    device: str | None = None,
    precision: Precision = "F32",
    threads: int | None = None,
    least: int = LEAST,
    force: bool = False,
    progress: Progress = silent,
    on_resume: Progress = silent,
) -> list[Coverage]:
    """Measure on `tokens` (chunks, n_ctx) the importance of every matrix: `folder`/imatrix.gguf,
    and what each type of it does to the model: `folder`/sensitivity.json.

    `evaluation`, chunks of the same length, pass through the model beside them, and what it thinks
    of their scored tokens goes to `logits`. A run that was killed goes on after the last layer it
    finished, of either pass; `on_resume` is then called with layers of that pass done and in all.
    `device` is a GPU if there is one. In BF16 activations are rounded before each multiplication,
    which CPUs with AVX512-BF16 or AMX do several times faster.

    Experts that fewer than `least` tokens reach get a share of their layer's mean; 0 leaves them
    as llama-imatrix has them. Returns how well each layer's experts are covered.

    Raises:
        CheckpointError: the checkpoint is incomplete or corrupt, or computes what is no number.
        UsageError: no tokens, too long chunks, an unknown device.
        Dots1Error: there is a result already, or an unfinished run of something else, and no
            `force`; the disk is full; the folder cannot be written; what an unfinished run left is
            damaged; there is too little memory.
    """
    evaluated = tokens[:0] if evaluation is None else evaluation
    _check(checkpoint, np.concatenate([tokens, evaluated]))
    kernel = Kernel(_device(device), precision == "BF16")
    if threads is not None:
        torch.set_num_threads(threads)
    probed = min(len(tokens), max(1, PROBED // tokens.shape[1])) if sensitivity else 0
    forward = Forward(checkpoint, _probed_first(tokens, probed), evaluated, probed, kernel, threads)
    kept = CalibrationFolder(
        Path(folder),
        # What was measured on the way back belongs to the importance that guided the encoders.
        forward.identity() + (f" {least}" if probed else ""),
        forward.stream_bytes,
        forward.probe_bytes,
        force=force,
        results=[IMATRIX] * (len(tokens) > 0) + [SENSITIVITY] * (probed > 0),
    )
    with kept, forward.enough_memory():
        _say_what_is_done(kept, checkpoint.config.num_hidden_layers, on_resume)
        with logits or nullcontext() as sink:
            x = forward.run(kept, _part(progress, 0, WORTH * forward.probed_tokens))
            covered = _write_imatrix(forward, x, kept, datasets, least) if len(tokens) else []
            if probed:
                reference_kl, x = forward.reference_kl(x), forward.probes(x)  # the rest is let go
                back = _part(progress, forward.tokens.size, 0)
                _write_sensitivity(forward, x, reference_kl, kept, back)
            if sink is not None:
                x = forward.run(kept, silent) if probed else x
                for chunk, start, rows in forward.logits(x):
                    sink.write(chunk, start, rows)
        kept.publish()
    return covered


def _say_what_is_done(kept: CalibrationFolder, layers: int, on_resume: Progress) -> None:
    reached = ProbeFolder(kept.work).reached(layers)
    if kept.finished == layers and reached is not None:
        on_resume(layers - reached, layers, "layers on the way back", "")
    elif kept.finished:
        on_resume(kept.finished, layers, "layers", "")


def _part(progress: Progress, before: int, after: int) -> Progress:
    """Reports a part of the work as `progress` of all of it."""

    def report(done: int, total: int, unit: str, what: str) -> None:
        progress(before + done, before + total + after, unit, what)

    return report


def _probed_first(tokens: Tokens, probed: int) -> Tokens:
    """The same chunks, but that `probed` of them, spread over the text, come first."""
    first = np.arange(probed) * len(tokens) // max(1, probed)
    return np.concatenate([tokens[first], np.delete(tokens, first, axis=0)])


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


def _write_imatrix(
    forward: Forward, x: Tensor, kept: CalibrationFolder, datasets: Sequence[str], least: int
) -> list[Coverage]:
    """Put all that was measured into one file; how well the layers' experts are covered."""
    covered = []
    entries: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    specs = {spec.name: spec for spec in inventory(forward.checkpoint.config)}
    for name, (sums, counts) in chain(kept.measured(), forward.head(x).items()):
        spec = specs[name]
        is_routed = spec.role == "routed"
        entries[name] = shrink(sums, counts, least) if is_routed else (sums, counts)
        if spec.layer is not None and spec.part == "ffn_gate_exps":
            covered.append(coverage(spec.layer, counts, least))
    with disk_errors(kept.path):
        write_imatrix(
            kept.draft(IMATRIX),
            entries,
            datasets=datasets,
            chunk_count=len(forward.calibration),
            chunk_size=x.shape[1],
            extra={
                "dots1_local.calibration.precision": "BF16" if forward.kernel.bf16 else "F32",
                "dots1_local.calibration.shrunk_below": least,
            },
        )
    return covered


def _write_sensitivity(
    forward: Forward,
    left: Tensor,
    reference_kl: float,
    kept: CalibrationFolder,
    progress: Progress,
) -> None:
    counts = np.bincount(
        forward.calibration.ravel(), minlength=forward.checkpoint.config.vocab_size
    )
    probe = Probe(
        forward.checkpoint,
        ProbeFolder(kept.work),
        load_importance(kept.draft(IMATRIX)),
        counts / counts.sum(),
        forward.kernel,
        forward.threads,
    )
    with disk_errors(kept.path):
        measured = probe.run(left, reference_kl, progress)
        kept.draft(SENSITIVITY).write_text(measured.to_json(), encoding="utf-8")
