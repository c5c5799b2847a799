"""What importance is made of: squares of what each matrix is multiplied by, summed by column.

All tokens through the model, a layer at a time, with everything that is measured on the way.

The residual stream holds the calibration text, of which the first chunks are probed; then text to
evaluate; then the probed chunks once more, which pass through rounded weights, so that the routers'
noise shows, and in the end what rounding does to the model.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.calibrate.folder import CalibrationFolder, Entries
from dots1_local.calibrate.output_errors import REFERENCE
from dots1_local.calibrate.probe_folder import ProbeFolder
from dots1_local.calibrate.rounding import rounded_divergence, through
from dots1_local.calibrate.router_flips import RouterNoise
from dots1_local.calibrate.stream import Segment, Step, advance, embed, observe_head, output_logits
from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import disk_errors
from dots1_local.ggml import TYPES
from dots1_local.progress import Progress
from dots1_local.reference.weights import Kernel, Rounding, read_tensor

__all__ = [
    "PROBED",
    "Forward",
    "SquareSums",
]


class SquareSums:
    """The sums of one layer, an expert's apart from the others'; `observe` is an `Observer`.

    Without a layer they are those of the head, which is observed under its full name.
    """

    def __init__(self, config: Dots1Config, layer: int | None) -> None:
        self._prefix = "" if layer is None else f"model.layers.{layer}."
        self._places = {
            source: (spec, part)
            for spec in inventory(config)
            if spec.layer == layer
            for part, source in enumerate(spec.sources)
        }
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def observe(self, name: str, rows: Tensor) -> None:
        """Take rows [rows, columns] into account that the named matrix will be multiplied by.

        Raises:
            CheckpointError: one of them is NaN or infinite.
        """
        spec, part = self._places[self._prefix + name]
        squares = rows.square().sum(0).double().cpu().numpy()
        if not np.isfinite(squares).all():
            raise CheckpointError(
                f"what reaches {self._prefix}{name} is NaN or infinite; is the checkpoint damaged?"
            )
        if spec.name not in self._sums:
            self._sums[spec.name] = np.zeros((len(spec.sources), spec.columns))
            self._counts[spec.name] = np.zeros(len(spec.sources), np.int64)
        self._sums[spec.name][part] += squares
        self._counts[spec.name][part] += len(rows)

    def by_name(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Sums (parts, columns) and counts (parts,) by GGUF name."""
        return {
            name: (sums.astype(np.float32), self._counts[name].astype(np.float32))
            for name, sums in self._sums.items()
        }


PROBED = 2048  # tokens: enough of them for gradients, whose errors the many rows even out
_WORKING = 5 << 30  # memory that a GPU needs beside the residual stream, with room to spare

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Forward:
    """The way of all tokens (chunks, positions); `probed` are the first chunks of `calibration`."""

    checkpoint: Checkpoint
    calibration: Tokens
    evaluation: Tokens
    probed: int
    kernel: Kernel
    threads: int | None = None
    _rounding: Rounding = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rounding", through(TYPES[REFERENCE], self.threads))

    @cached_property
    def tokens(self) -> Tokens:
        """All that passes, in the order of the residual stream."""
        parts = (self.calibration, self.evaluation, self.calibration[: self.probed])
        return np.concatenate(parts)

    @property
    def probed_tokens(self) -> int:
        """Positions that are probed, of all chunks."""
        return self.probed * self._positions

    @property
    def stream_bytes(self) -> int:
        """Of the residual stream."""
        return 4 * self.tokens.size * self.checkpoint.config.hidden_size

    @property
    def probe_bytes(self) -> int:
        """Of what `run` leaves on disk of the probed chunks, and what the way back adds to it."""
        config = self.checkpoint.config
        return 4 * self.probed_tokens * config.hidden_size * (config.num_hidden_layers + 8)

    @property
    def _positions(self) -> int:
        """Of a chunk, those that are probed: autograd holds a whole chunk of them."""
        n_ctx: int = self.tokens.shape[1]
        return min(n_ctx, PROBED)

    def probes(self, x: Tensor) -> Tensor:
        """What is probed, apart from `x`: [chunks, positions, hidden]."""
        return x[: self.probed, : self._positions].clone()

    def identity(self) -> str:
        """Changes when an input does; sizes and times stand for the shards' contents."""
        stats = ((path.name, path.stat()) for path in self.checkpoint.shards)
        shards = ";".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in stats)
        versions = f"{version('dots1-local')} {version('torch')}"
        settings = (self.tokens.shape, len(self.calibration), self.probed, self.kernel.bf16)
        parts = (versions, shards, self.checkpoint.config, settings)
        digest = hashlib.sha256(repr(parts).encode())
        digest.update(self.tokens.tobytes())
        return digest.hexdigest()

    def run(self, kept: CalibrationFolder, progress: Progress) -> Tensor:
        """What leaves the last layer: x [chunks, positions, hidden].

        Raises:
            CheckpointError: a tensor is missing or unreadable, or what is computed is no number.
            Dots1Error: the disk is full.
        """
        x = self._begin(kept)
        layers = self.checkpoint.config.num_hidden_layers
        for layer in range(kept.finished, layers):
            done = float(layer * self.tokens.size)

            def step(rows: float, name: str = f"layer {layer}") -> None:
                nonlocal done
                done += rows
                progress(round(done / layers), self.tokens.size, "tokens", name)

            step(0)
            self._layer(x, layer, kept, step)
        progress(self.tokens.size, self.tokens.size, "tokens", "head")
        return x

    def reference_kl(self, x: Tensor) -> float:
        """KL divergence of the rounded model, in nats, over the probed chunks."""
        rounded = x[len(x) - self.probed :, : self._positions]
        return rounded_divergence(
            self.probes(x), rounded, self.checkpoint, self._rounding, self.kernel.device
        )

    def head(self, x: Tensor) -> Entries:
        """What llama-imatrix measures of the head with --process-output."""
        measured = SquareSums(self.checkpoint.config, None)
        calibrated = x[: len(self.calibration)]
        observe_head(calibrated, self.checkpoint, measured.observe, self.kernel.device)
        return measured.by_name()

    def logits(self, x: Tensor) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Chunk, first row and logits (rows, vocabulary) of the second halves of `evaluation`."""
        start = len(self.calibration)
        evaluated, first = x[start : start + len(self.evaluation)], x.shape[1] // 2
        device = self.kernel.device
        for chunk, row, logits in output_logits(evaluated, self.checkpoint, first, device):
            yield chunk, row, logits.numpy()

    def _begin(self, kept: CalibrationFolder) -> Tensor:
        """What enters the first layer that is not finished."""
        config = self.checkpoint.config
        x = torch.empty(*self.tokens.shape, config.hidden_size, device=self._home())
        if kept.finished:
            for chunk, values in zip(x, kept.load(x[0].numel()), strict=True):
                chunk.copy_(torch.from_numpy(values).view_as(chunk))
        else:
            tokens, exact = torch.from_numpy(self.tokens), len(x) - self.probed
            embed(self.checkpoint, tokens[:exact], x[:exact])
            embed(self.checkpoint, tokens[exact:], x[exact:], self._rounding)
        return x

    def _layer(self, x: Tensor, layer: int, kept: CalibrationFolder, step: Step) -> None:
        measured = SquareSums(self.checkpoint.config, layer)
        noise = self._noise(layer)
        entered = self.probes(x).cpu().numpy()

        def observe_probed(name: str, rows: Tensor) -> None:
            measured.observe(name, rows)
            if noise is not None:
                noise.exact(name, rows)

        ends = (0, self.probed, len(self.calibration), len(x) - self.probed, len(x))
        segments = [
            Segment(ends[0], ends[1], observe_probed),
            Segment(ends[1], ends[2], measured.observe),
            Segment(ends[2], ends[3]),
            Segment(ends[3], ends[4], noise.rounded if noise else None, self._rounding),
        ]
        there = [segment for segment in segments if segment.start < segment.stop]
        advance(x, self.checkpoint, layer, there, self.kernel, step)
        _check_finite(x, layer)
        if self.probed:
            with disk_errors(kept.path):
                ProbeFolder(kept.work).keep_forward(layer, entered, noise.sigma() if noise else 0.0)
        kept.finish_layer(measured.by_name(), x.shape[1], (chunk.cpu().numpy() for chunk in x))

    def _noise(self, layer: int) -> RouterNoise | None:
        config = self.checkpoint.config
        if not self.probed or config.is_dense(layer):
            return None
        prefix = f"model.layers.{layer}.mlp.gate."
        weight = read_tensor(self.checkpoint, f"{prefix}weight").float()
        bias = read_tensor(self.checkpoint, f"{prefix}e_score_correction_bias").float()
        return RouterNoise(weight, bias, config.num_experts_per_tok)

    @contextmanager
    def enough_memory(self) -> Iterator[None]:
        """Turn what torch raises where there is not into a sentence.

        Raises:
            Dots1Error: there is too little.
        """
        try:
            yield
        except RuntimeError as error:
            if not re.search("out of memory|t allocate memory", str(error)):
                raise
            needed = 2 * self.stream_bytes / 1e9
            raise Dots1Error(
                f"no memory for {self.tokens.size:,} tokens: they take {needed:.1f} GB, and a "
                "layer of dots.llm1, or its head, some 4 GB; take fewer chunks"
            ) from None

    def _home(self) -> torch.device:
        """Where the residual stream lies: with the device that computes, if it has the room."""
        device = self.kernel.device
        if device.type != "cuda":
            return device
        free, _ = torch.cuda.mem_get_info(device)
        return device if 2 * self.stream_bytes + _WORKING < free else torch.device("cpu")


def _check_finite(x: Tensor, layer: int) -> None:
    """A NaN or infinity shows in the sum, which needs no second copy of x."""
    if not torch.isfinite(x.sum()):
        raise CheckpointError(
            f"what leaves layer {layer} is NaN or infinite; is the checkpoint damaged?"
        )
