"""The forward pass of all tokens, with everything that is measured on the way.

The residual stream holds the calibration text, of which the first chunks are probed: their inputs
to every layer are saved for the backward pass. After it come the text to evaluate, and the probed
chunks once more. These pass through rounded weights, which shows how far rounding moves the
routers' scores, and the KL divergence that it causes.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.calibrate.calibration_folder import CalibrationFolder, Entries
from dots1_local.calibrate.column_sums import ColumnSums, square_sums
from dots1_local.calibrate.hooks import NO_HOOKS, observe_all
from dots1_local.calibrate.layer_moments import LayerMoments
from dots1_local.calibrate.manifest import ROUTING
from dots1_local.calibrate.moments import Moments
from dots1_local.calibrate.output_errors import REFERENCE
from dots1_local.calibrate.refinement_sample import RefinementSample
from dots1_local.calibrate.router_flips import RouterNoise
from dots1_local.calibrate.routing import layer_routing
from dots1_local.calibrate.stream import (
    Report,
    Segment,
    embed,
    observe_head,
    output_logits,
    rounding_to,
)
from dots1_local.calibrate.stream_files import StreamFiles, pass_layer
from dots1_local.errors import memory_errors
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import disk_errors
from dots1_local.ggml import TYPES
from dots1_local.hub.pass_shards import EMBEDDING, HEAD, Provide, layer_step, on_disk
from dots1_local.progress import Progress
from dots1_local.reference.layers import Observer
from dots1_local.reference.model import Compute, Rounding, head_name, read_tensor

__all__ = ["PROBED", "ForwardPass", "probed_first"]

PROBED = 2048  # tokens whose gradients are computed; their errors average out over many rows
_RARE = 0.1  # the part of the probability that frequencies do not tell

Tokens = NDArray[np.int32]


def probed_first(chunks: int, probed: int) -> NDArray[np.int64]:
    """The numbers of all chunks, of which `probed`, evenly spread over the text, come first."""
    first = np.arange(probed) * chunks // max(1, probed)
    return np.concatenate([first, np.delete(np.arange(chunks), first)])


@dataclass(frozen=True)
class ForwardPass:
    """Tokens (chunks, positions) on their way through all layers.

    The first `probed` chunks of `calibration` are probed. With `refine`, a sample of the rows of
    each matrix is refined.
    """

    checkpoint: Checkpoint
    calibration: Tokens
    evaluation: Tokens
    probed: int
    compute: Compute
    threads: int | None = None
    refine: bool = False

    @cached_property
    def rounding(self) -> Rounding:
        """The rounding of the weights that the repeated probed chunks see."""
        return rounding_to(TYPES[REFERENCE], self.threads)

    @cached_property
    def tokens(self) -> Tokens:
        """All tokens in the order of the residual stream."""
        parts = (self.calibration, self.evaluation, self.calibration[: self.probed])
        return np.concatenate(parts)

    @property
    def probed_tokens(self) -> int:
        """The probed positions of all chunks."""
        return self.probed * self._positions

    @property
    def frequencies(self) -> NDArray[np.float64]:
        """The part of the calibration text that each token is: (vocabulary,)."""
        counts = np.bincount(self.calibration.ravel(), minlength=self.checkpoint.config.vocab_size)
        return np.asarray(counts / counts.sum())

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the residual stream."""
        return (*self.tokens.shape, self.checkpoint.config.hidden_size)

    @property
    def probe_bytes(self) -> int:
        """The disk space of the probed chunks' inputs to all layers, and of their gradients."""
        config = self.checkpoint.config
        return 4 * self.probed_tokens * config.hidden_size * (config.num_hidden_layers + 8)

    @property
    def routed_layers(self) -> range:
        """The layers whose routing is recorded."""
        config = self.checkpoint.config
        first = config.first_k_dense_replace if len(self.calibration) else config.num_hidden_layers
        return range(first, config.num_hidden_layers)

    @property
    def _positions(self) -> int:
        """The probed positions of a chunk: autograd holds all that belongs to a whole chunk."""
        n_ctx: int = self.tokens.shape[1]
        return min(n_ctx, PROBED)

    def exact_probes(self, x: Tensor) -> Tensor:
        """A copy of the probed chunks in `x`: [chunks, positions, hidden]."""
        return x[: self.probed, : self._positions].clone()

    def rounded_probes(self, x: Tensor) -> Tensor:
        """The same chunks in `x`, computed with rounded weights."""
        return x[len(x) - self.probed :, : self._positions]

    def identity(self) -> str:
        """A digest of all inputs."""
        versions = f"{version('dots1-local')} {version('torch')}"
        settings = (self.tokens.shape, len(self.calibration), self.probed, self.compute.bf16)
        # Runs that began without routing.safetensors cannot be resumed with it.
        parts = (versions, self.checkpoint.fingerprint, self.checkpoint.config, settings, ROUTING)
        digest = hashlib.sha256(repr(parts).encode())
        digest.update(self.tokens.tobytes())
        return digest.hexdigest()

    def run(
        self, folder: CalibrationFolder, progress: Progress, provide: Provide = on_disk
    ) -> Tensor:
        """Apply all layers that are not finished; return x [chunks, positions, hidden] after them.

        In the end the shards of the head are on the disk.

        Raises:
            CheckpointError: a tensor is missing or unreadable, or a result is NaN or infinite.
            Dots1Error: the disk is full, or a shard cannot be fetched.
        """
        total, layers = self.tokens.size, self.checkpoint.config.num_hidden_layers
        if folder.stream.finished is None:
            provide(EMBEDDING, partial(progress, 0, total, "tokens"))
            self._embed(folder.stream)
        for layer in range(folder.finished, layers):
            done = float(layer * total)

            def report(work: float, name: str = f"layer {layer}") -> None:
                nonlocal done
                done += work
                progress(round(done / layers), total, "tokens", name)

            provide(layer_step(layer), partial(report, 0))
            report(0)
            self._layer(layer, folder, report)
        provide(HEAD, partial(progress, total, total, "tokens"))
        progress(total, total, "tokens", "head")
        return folder.stream.stream

    def head(self, x: Tensor) -> Entries:
        """The head's sums and counts, which llama-imatrix measures with --process-output."""
        measured = ColumnSums(self.checkpoint.config, None, square_sums)
        calibration = x[: len(self.calibration)]
        observe_head(calibration, self.checkpoint, measured.observe, self.compute.device)
        return measured.first()

    def sample_head(self, x: Tensor, folder: CalibrationFolder) -> None:
        """Refine a sample of the head's rows, and save what it shows."""
        name, moments = head_name(self.checkpoint.config), Moments()
        calibration = x[: len(self.calibration)]
        observe_head(calibration, self.checkpoint, moments.observe, self.compute.device)
        # A row costs as much as its token is probable, which is about how frequent it is.
        frequencies = self.frequencies
        costs = frequencies + _RARE / len(frequencies)
        sample = RefinementSample(self.checkpoint, None, self.threads, costs)
        if moment := moments.take(name):
            sample.common({name: moment})
        layers = self.checkpoint.config.num_hidden_layers
        with disk_errors(folder.path):
            folder.probe.save_sample(layers, sample.found(), sample.rows, None)

    def logits(self, x: Tensor) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Chunk, first row and logits (rows, vocabulary) of the second halves of `evaluation`."""
        start = len(self.calibration)
        evaluated, first = x[start : start + len(self.evaluation)], x.shape[1] // 2
        device = self.compute.device
        for chunk, row, logits in output_logits(evaluated, self.checkpoint, first, device):
            yield chunk, row, logits.numpy()

    def _embed(self, stream: StreamFiles) -> None:
        tokens, x = torch.from_numpy(self.tokens), stream.working.after
        exact = len(x) - self.probed
        embed(self.checkpoint, tokens[:exact], x[:exact])
        embed(self.checkpoint, tokens[exact:], x[exact:], self.rounding)
        stream.finish_layer()

    def _layer(self, layer: int, folder: CalibrationFolder, report: Report) -> None:
        x = folder.stream.stream
        measured = ColumnSums(self.checkpoint.config, layer, square_sums)
        noise = self._router_noise(layer)
        inputs = self.exact_probes(x).numpy()

        sample = RefinementSample(self.checkpoint, layer, self.threads) if self.refine else None
        observers: list[Observer] = [measured.observe]
        hooks = NO_HOOKS
        if sample is not None:
            moments = LayerMoments(layer, sample, sample.experts, self.calibration.size)
            observers, hooks = [*observers, moments.observe], moments.hooks
        if layer in self.routed_layers:
            hooks = replace(hooks, routed=partial(self._save_routing, layer, folder))
        exact = [noise.exact] if noise else []
        ends = (0, self.probed, len(self.calibration), len(x) - self.probed, len(x))
        segments = [
            Segment(ends[0], ends[1], observe_all(*observers, *exact)),
            Segment(ends[1], ends[2], observe_all(*observers)),
            Segment(ends[2], ends[3]),
            Segment(ends[3], ends[4], noise.rounded if noise else None, self.rounding),
        ]
        present = [segment for segment in segments if segment.start < segment.stop]
        pass_layer(folder.stream, self.checkpoint, layer, present, self.compute, report, hooks)
        if self.probed:
            with disk_errors(folder.path):
                folder.probe.save_forward(layer, inputs, noise.sigma() if noise else 0.0)
                if sample is not None:
                    folder.probe.save_sample(layer, sample.found(), sample.rows, sample.judged)
        folder.finish_layer(measured.first(), x.shape[1])

    def _save_routing(self, layer: int, folder: CalibrationFolder, chosen: Tensor) -> None:
        """Save what the calibration text chose, in its order."""
        size, chunks = self.calibration.size, len(self.calibration)
        rows = chosen[:size].cpu().numpy().reshape(*self.calibration.shape, -1)
        in_order = rows[np.argsort(probed_first(chunks, self.probed))]
        routing = layer_routing(in_order, self.checkpoint.config.n_routed_experts)
        with disk_errors(folder.path):
            folder.probe.save_routing(layer, routing)

    def _router_noise(self, layer: int) -> RouterNoise | None:
        config = self.checkpoint.config
        if not self.probed or config.is_dense(layer):
            return None
        prefix = f"model.layers.{layer}.mlp.gate."
        weight = read_tensor(self.checkpoint, f"{prefix}weight").float()
        bias = read_tensor(self.checkpoint, f"{prefix}e_score_correction_bias").float()
        return RouterNoise(weight, bias, config.num_experts_per_tok)

    def memory_errors(self) -> AbstractContextManager[None]:
        """Turn errors about memory into one sentence; see errors.memory_errors."""
        return memory_errors(
            "to calibrate: a layer of dots.llm1, or its head, takes about 5 GB; the same command "
            "resumes"
        )
