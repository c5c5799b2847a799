"""Refined tensors: the moments of the streaming pass in, ggml's blocks in the output file.

`RefinedTensors` is the sink of the pass. A routed expert is one task, whose gate and up
share a metric. Another matrix is cut into rows, unless the metric of its outputs couples all rows.
What becomes of a matrix does not depend on the number of threads.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.calibrate.layer_moments import ExpertMoments, shrunk_moment
from dots1_local.calibrate.moments import Moment, moment_name
from dots1_local.calibrate.refinement_file import RefinementData
from dots1_local.convert.bounded_pool import BoundedPool
from dots1_local.convert.output import TensorSlot
from dots1_local.convert.refined_matrix import Encoded, Piece, pieces_of
from dots1_local.convert.refined_writer import TensorWriter
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.importance import Importance
from dots1_local.refine.arrays import Arrays
from dots1_local.refine.blocks import refinable
from dots1_local.refine.metric import Metric, input_metric, output_metric

__all__ = ["RefinedTensors"]

Floats = NDArray[np.float32]


class RefinedTensors:
    """Converts the tensors of `slots` with `threads` workers and `arrays`, in a `with` statement.

    Tensors that cannot be refined are left to `convert_plainly`, which is called with their names.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        slots: Sequence[TensorSlot],
        data: RefinementData,
        importance: Importance,
        writer: TensorWriter,
        convert_plainly: Callable[[Collection[str]], None],
        threads: int,
        arrays: Arrays,
    ) -> None:
        self._checkpoint, self._slots, self._data = checkpoint, slots, data
        self._importance, self._convert_plainly = importance, convert_plainly
        self._tasks, self._arrays = BoundedPool(threads, writer.accept), arrays
        self._layer: list[TensorSlot] = []
        self._columns: dict[str, Floats | None] = {}  # importance of the layer's tensors
        self._outputs: Floats | None = None  # of the layer
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        self._opened.enter_context(self._tasks)
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def embedding(self) -> None:
        """Refine the embedding, whose metric is in the calibration folder."""
        self._select(lambda spec: spec.role == "embedding")
        for slot in self._layer:
            moment = input_metric(self._data.embedding_moment(), self._data.gradients)
            self._rows(slot, Metric(moment), None)
        self._tasks.drain()

    def begin(self, layer: int | None) -> bool:
        """Begin a layer; return whether any of its tensors is to be refined."""
        self._select(lambda spec: spec.layer == layer and spec.role != "embedding")
        self._outputs = None
        if layer is not None and any(map(_couples_rows, self._layer)):
            self._outputs = output_metric(self._data.output_moment(layer))
        return bool(self._layer)

    def common(self, moments: Mapping[str, Moment]) -> None:
        """Refine the matrices that all tokens use."""
        metrics: dict[tuple[str, bool], Metric] = {}  # shared, for factors are made only once
        slots = [slot for slot in self._layer if slot.tensor.spec.role != "routed"]
        # Matrices that cannot be cut take longest.
        for slot in sorted(slots, key=_couples_rows, reverse=True):
            moment = moments[moment_name(slot.tensor.spec.sources[0])]
            key = moment_name(slot.tensor.spec.sources[0]), _couples_rows(slot)
            if key not in metrics:
                inputs = input_metric(moment.mean, moment.tokens)
                metrics[key] = Metric(inputs, self._outputs if _couples_rows(slot) else None)
            self._rows(slot, metrics[key], moment.held_out)

    def expert(self, number: int, moments: ExpertMoments) -> None:
        """Refine the matrices of a routed expert."""
        routed = [slot for slot in self._layer if slot.tensor.spec.role == "routed"]
        pieces = [pieces_of(slot, whole=True)[number] for slot in routed]
        if pieces:
            # The list lets the task drop the moments before it refines.
            self._tasks.submit(partial(self._refine_expert, pieces, [moments]))

    def finish(self, layer: int | None) -> None:
        """Wait for all tensors of the layer."""
        self._tasks.drain()

    def _select(self, belongs: Callable[[TensorSpec], bool]) -> None:
        """Begin with some of the tensors, and convert those that cannot be refined."""
        mine = [slot for slot in self._slots if belongs(slot.tensor.spec)]
        self._layer = [slot for slot in mine if refinable(slot.tensor.kind)]
        specs = [slot.tensor.spec for slot in self._layer]
        self._columns = {spec.name: self._importance.for_tensor(spec) for spec in specs}
        if others := {slot.tensor.spec.name for slot in mine} - {spec.name for spec in specs}:
            self._convert_plainly(others)

    def _rows(self, slot: TensorSlot, metric: Metric, held_out: Floats | None) -> None:
        _ = metric.on(self._arrays).factor  # threads may share a metric that has it
        for piece in pieces_of(slot, whole=metric.outputs is not None):
            self._tasks.submit(partial(self._refine, [piece], metric, held_out))

    def _refine(
        self, pieces: Sequence[Piece], metric: Metric, held_out: Floats | None
    ) -> list[Encoded]:
        return [
            piece.refine(
                self._checkpoint, metric, held_out, self._columns[piece.tensor], self._arrays
            )
            for piece in pieces
        ]

    def _refine_expert(self, pieces: Sequence[Piece], given: list[ExpertMoments]) -> list[Encoded]:
        moments = given.pop()
        down = [piece for piece in pieces if _couples_rows(piece.slot)]
        others = [piece for piece in pieces if not _couples_rows(piece.slot)]
        work: list[tuple[list[Piece], Metric, Floats | None]] = []
        if others:
            metric = Metric(shrunk_moment(moments.gate, moments.gate_prior))
            work.append((others, metric, _held_out(moments.gate)))
        if down:
            metric = Metric(shrunk_moment(moments.down, moments.down_prior), self._outputs)
            work.append((down, metric, _held_out(moments.down)))
        del moments
        return [encoded for each in work for encoded in self._refine(*each)]


def _couples_rows(slot: TensorSlot) -> bool:
    """Whether the outputs of a matrix are added to the residual stream, whose metric is known."""
    return slot.tensor.spec.adds_to_residual


def _held_out(moment: Moment | None) -> Floats | None:
    return None if moment is None else moment.held_out
