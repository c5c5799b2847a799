"""A sample of a layer's rows is refined to each type, which shows how much smaller errors become.

Rows are refined while the moments of the layer's inputs exist, which is in the forward pass. What
they save weighs differently in each expert; this is known only in the backward pass, so that errors
are kept by expert.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec, inventory, padded_width
from dots1_local.calibrate.layer_moments import ExpertMoments, shrunk_moment
from dots1_local.calibrate.moments import Moment, moment_name
from dots1_local.calibrate.output_errors import read_rows
from dots1_local.calibrate.refined_errors import (
    ErrorPair,
    ErrorRows,
    JudgedMatrix,
    RefinedErrors,
)
from dots1_local.calibrate.refined_rows import DrawnRows, RowSample, all_errors
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.importance import fill_gaps
from dots1_local.quant.stock import is_quantisable
from dots1_local.refine.metric import Metric, input_metric

__all__ = ["OUTER_ROWS", "RefinementSample", "sampled_experts"]

_EXPERTS = 8  # sampled in each layer
# Rows of each expert's matrix, and of another matrix: a tensor's ratio is then known to 1 or 2%,
# and a layer of dots.llm1 takes 3 core-minutes.
_EXPERT_ROWS, _ROWS = 32, 128
OUTER_ROWS = 512  # of the embedding and of the head, whose rows differ most
_FEW = 100  # tokens; above, an expert's own mean squares are its importance

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


class RefinementSample:
    """A `MomentSink` that refines a sample of the rows of one layer, or of the head.

    `costs` (rows,) are about those of an error in each row of the head. `experts` are those that
    it samples. `rows` are errors of sampled rows in a typical type, by the
    matrices' names in the checkpoint. `judged` is the down projection of the one that has most
    tokens, or in a dense layer the output of attention.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: int | None,
        threads: int | None,
        costs: Doubles | None = None,
    ) -> None:
        self._checkpoint, self._threads, self._costs = checkpoint, threads, costs
        config = checkpoint.config
        specs = inventory(config, padded_width(config.moe_intermediate_size))
        self._specs = [
            spec
            for spec in specs
            if spec.layer == layer and spec.role != "embedding" and is_quantisable(spec)
        ]
        self.experts = sampled_experts(config.n_routed_experts)
        self.rows: dict[str, ErrorRows] = {}
        self.judged: JudgedMatrix | None = None
        self._most_tokens = 0
        self._pairs: dict[str, dict[int, dict[str, ErrorPair]]] = defaultdict(dict)

    def found(self) -> dict[str, RefinedErrors]:
        """The errors by GGUF name."""
        return {name: _by_type(by_expert) for name, by_expert in self._pairs.items()}

    def common(self, moments: Mapping[str, Moment]) -> None:
        """Refine rows of the matrices that all tokens use."""
        metrics = {
            name: Metric(input_metric(moment.mean, moment.tokens))
            for name, moment in moments.items()
            if moment.tokens
        }
        samples = []
        for spec in self._specs:
            name = moment_name(spec.sources[0])
            if spec.role != "routed" and name in metrics:
                judge = moments[name].held_out, np.diag(moments[name].mean).copy()
                samples.append(self._sample(spec, 0, metrics[name], *judge))
                if spec.part == "attn_output":
                    self.judged = JudgedMatrix(name, metrics[name].inputs, *judge)
        self._add(samples, 0)

    def expert(self, number: int, moments: ExpertMoments) -> None:
        """Refine rows of a routed expert's matrices, if two tokens reached it."""
        gate, down = moments.gate, moments.down
        if gate is None or down is None or not gate.tokens:
            return
        priors = moments.gate_prior, moments.down_prior
        of_gate, of_down = (
            (Metric(shrunk_moment(own, prior)), own.held_out, _importance(own, prior))
            for own, prior in zip((gate, down), priors, strict=True)
        )
        samples = []
        for spec in self._specs:
            if spec.role == "routed":
                is_down = spec.part == "ffn_down_exps"
                samples.append(self._sample(spec, number, *(of_down if is_down else of_gate)))
                if is_down and down.tokens > self._most_tokens:
                    self._most_tokens = down.tokens
                    metric, *judge = of_down
                    self.judged = JudgedMatrix(spec.sources[number], metric.inputs, *judge)
        self._add(samples, number)

    def _sample(
        self, spec: TensorSpec, expert: int, metric: Metric, held_out: Floats, importance: Floats
    ) -> RowSample:
        count = {"routed": _EXPERT_ROWS, "head": OUTER_ROWS}.get(spec.role, _ROWS)
        costs = np.ones(spec.source_shape[0]) if self._costs is None else self._costs
        drawn = DrawnRows.of(spec.sources[expert], costs, count)
        rows = read_rows(self._checkpoint, spec.sources[expert], drawn.numbers)
        return RowSample(spec, drawn, rows, metric, held_out, importance)

    def _add(self, samples: Sequence[RowSample], expert: int) -> None:
        by_name = {sample.spec.name: sample for sample in samples}
        for name, found in all_errors(by_name, self._threads).items():
            self._pairs[name][expert] = found.pairs
            if found.rows is not None:
                self.rows[by_name[name].spec.sources[expert]] = found.rows


def sampled_experts(experts: int) -> list[int]:
    """The numbers of a few evenly spaced experts."""
    count = min(experts, _EXPERTS)
    return [i * experts // count for i in range(count)]


def _importance(own: Moment, prior: Moment | None) -> Floats:
    """The mean squares of an expert's inputs, with those of other tokens if its own are few."""
    part = min(1.0, own.tokens / _FEW) if prior is not None else 1.0
    other = 0 if prior is None else np.diag(prior.mean)
    squares = np.asarray(part * np.diag(own.mean) + (1 - part) * other, np.float32)
    filled: Floats = fill_gaps(squares[None])[0]
    return filled


def _by_type(by_expert: Mapping[int, Mapping[str, ErrorPair]]) -> RefinedErrors:
    """The errors of the types that hold the weights of every sampled expert."""
    kinds = [
        kind
        for kind in next(iter(by_expert.values()))
        if all(kind in e for e in by_expert.values())
    ]
    return RefinedErrors(list(by_expert), {k: [e[k] for e in by_expert.values()] for k in kinds})
