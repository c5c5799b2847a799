"""The pass over all layers in which matrices are refined: tokens in, moments out, layer by layer.

The tokens pass the exact layers. When a matrix has seen all its rows, the second moment of its
inputs goes to a sink, which refines the matrix and drops the moment. The residual stream lies in
files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dots1_local.calibrate.hooks import NO_HOOKS
from dots1_local.calibrate.layer_moments import LayerMoments, MomentSink
from dots1_local.calibrate.moments import Moments
from dots1_local.calibrate.stream import Segment, embed, observe_head
from dots1_local.calibrate.stream_files import StreamFiles, pass_layer
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.hub.pass_shards import EMBEDDING, HEAD, Provide, on_disk
from dots1_local.reference.model import Compute, head_name

__all__ = ["RefiningPass", "RefiningSink"]

Tokens = NDArray[np.int32]


class RefiningSink(MomentSink, Protocol):
    """Takes the moments of one layer after another; the head is the layer None.

    Methods may block while matrices are refined.
    """

    def embedding(self) -> None:
        """Refine the embedding, which needs no moment of the pass."""

    def begin(self, layer: int | None) -> bool:
        """Begin a layer; return whether its moments are needed."""

    def finish(self, layer: int | None) -> None:
        """Finish a layer; its results are on the disk when this returns."""


@dataclass
class RefiningPass:
    """Tokens (chunks, positions) on their way through the exact layers.

    `report` is called with a short text about what is computed.
    """

    checkpoint: Checkpoint
    tokens: Tokens
    compute: Compute
    threads: int
    files: StreamFiles
    report: Callable[[str], None]

    @torch.no_grad()
    def run(self, sink: RefiningSink, steps: Sequence[str], provide: Provide = on_disk) -> None:
        """Pass the `steps` that are left, and hand their moments to `sink`.

        Raises:
            CheckpointError: a tensor is missing or unreadable, or a result is NaN or infinite.
            Dots1Error: the disk is full, or a shard cannot be fetched.
        """
        torch.set_num_threads(self.threads)
        for step in steps:
            provide(step, self.report)
            if step == EMBEDDING:
                self._embed(sink)
            elif step == HEAD:
                self._head(sink)
            else:
                self._pass_layer(self.files.finished or 0, sink)

    def _embed(self, sink: RefiningSink) -> None:
        self.report("embedding")
        sink.embedding()
        if self.files.finished is None:
            embed(self.checkpoint, torch.from_numpy(self.tokens), self.files.working.after)
            self.files.finish_layer()

    def _pass_layer(self, layer: int, sink: RefiningSink) -> None:
        moments = LayerMoments(layer, sink) if sink.begin(layer) else None
        done = 0.0

        def report(tokens: float) -> None:
            nonlocal done
            done += tokens
            self.report(f"layer {layer}, {done / self.tokens.size:.0%} of its tokens")

        observe, hooks = (moments.observe, moments.hooks) if moments else (None, NO_HOOKS)
        segments = [Segment(0, len(self.tokens), observe)]
        pass_layer(self.files, self.checkpoint, layer, segments, self.compute, report, hooks)
        sink.finish(layer)
        self.files.finish_layer()

    def _head(self, sink: RefiningSink) -> None:
        self.report("head")
        if sink.begin(None):
            moments, name = Moments(), head_name(self.checkpoint.config)
            observe_head(self.files.stream, self.checkpoint, moments.observe, self.compute.device)
            moment = moments.take(name)
            sink.common({name: moment} if moment else {})
        sink.finish(None)
