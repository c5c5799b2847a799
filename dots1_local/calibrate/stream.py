"""The model over many tokens, one layer at a time, so that each weight is read once for all tokens.

Only the residual stream, x [chunks, positions, hidden], is passed from layer to layer. Within a
layer, attention is computed for groups of chunks; then the routed experts are read one after
another, and each is applied to all rows that are routed to it. So a layer, which has 8.9 GB in F32,
is never in memory as a whole.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.architecture import inventory
from dots1_local.calibrate.hooks import NO_HOOKS, Expert, Hooks
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import QuantType
from dots1_local.quant.encode import decode, encode
from dots1_local.reference.layers import (
    Observer,
    Weights,
    attention,
    dense_ffn,
    rms_norm,
    route,
)
from dots1_local.reference.model import (
    Compute,
    Rounding,
    head_name,
    load_common,
    read_experts,
    read_tensor,
)

__all__ = [
    "Report", "Segment", "WorkingMemory", "embed", "forward_layer", "observe_head",
    "output_logits", "rounding_to",
]  # fmt: skip

_ROWS = 2048  # rows in one matrix product; more are no faster
_LOGITS = 1 << 25  # logits computed at a time: 134 MB
_PIECE = 1 << 20  # weights encoded at a time

Report = Callable[[float], None]
"""Called with the work done since the last call, in tokens per layer."""


@dataclass(frozen=True)
class Segment:
    """Chunks [start, stop) of x, their observer, and the rounding of the weights that they see.

    Rows of two segments are never in one matrix product, so that the results of a segment do not
    depend, to the last bit, on the other segments.
    """

    start: int
    stop: int
    observe: Observer | None = None
    rounding: Rounding | None = None


@dataclass(frozen=True)
class WorkingMemory:
    """What a layer is computed in: `inputs` of the routed experts, and the layer's output `after`.

    Both are shaped like x. They may lie in files.
    """

    inputs: Tensor
    after: Tensor


def rounding_to(kind: QuantType, threads: int | None = None) -> Rounding:
    """A function that encodes a matrix [rows, columns] to `kind`, without importance, and decodes
    it to F32.

    It returns a matrix unchanged if the blocks of `kind` do not fit its rows.
    """

    def rounded(stored: Tensor) -> Tensor:
        columns = stored.shape[1]
        if not kind.fits(columns):
            return stored
        out = torch.empty(stored.shape)
        size = max(1, _PIECE // columns)

        def fill(start: int) -> None:
            rows = stored[start : start + size].float().contiguous().numpy()
            decoded = decode(encode(rows, kind), kind, columns)
            out[start : start + size] = torch.from_numpy(decoded)

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            list(pool.map(fill, range(0, len(stored), size)))
        return out

    return rounded


def embed(
    checkpoint: Checkpoint, tokens: Tensor, x: Tensor, rounding: Rounding | None = None
) -> None:
    """Fill `x` with the embeddings of `tokens` [chunks, positions], rounded if `rounding` is given.

    Raises:
        CheckpointError: the embedding is missing or unreadable.
    """
    table = read_tensor(checkpoint, "model.embed_tokens.weight")
    for chunk, row in zip(x, tokens, strict=True):
        chunk.copy_(rounding(table[row]) if rounding else table[row])


@torch.no_grad()
def forward_layer(
    x: Tensor,
    checkpoint: Checkpoint,
    layer: int,
    segments: Sequence[Segment],
    compute: Compute,
    report: Report,
    hooks: Hooks = NO_HOOKS,
    working: WorkingMemory | None = None,
) -> None:
    """Replace `x`, the residual stream before a layer, by the residual stream after it.

    `x` may be on another device than the computation. With `working`, the stream after the layer
    is in `working.after`, and `x` stays as it is.

    Raises:
        CheckpointError: a tensor is missing or unreadable, or the router's bias is NaN or infinite.
    """
    work = _ForwardLayer(x, checkpoint, layer, segments, compute, report, hooks, working)
    if checkpoint.config.is_dense(layer):
        work.dense()
    else:
        work.moe()


@torch.no_grad()
def output_logits(
    x: Tensor, checkpoint: Checkpoint, first: int, device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """Chunk, number of the first row, and logits [rows, vocabulary], for blocks of rows.

    `x` is the residual stream after the last layer. Row 0 of a chunk is position `first`; the last
    position, whose next token is not known, is left out.
    """
    config = checkpoint.config
    norm = read_tensor(checkpoint, "model.norm.weight").to(device).float()
    head = read_tensor(checkpoint, head_name(config)).to(device).float()
    size = max(1, _LOGITS // config.vocab_size)
    for chunk, rows in enumerate(x[:, first:-1]):
        for start in range(0, len(rows), size):
            block = rms_norm(rows[start : start + size].to(device), norm, config.rms_norm_eps)
            yield chunk, start, F.linear(block, head).cpu()


@torch.no_grad()
def observe_head(
    x: Tensor, checkpoint: Checkpoint, observe: Observer, device: torch.device
) -> None:
    """Call `observe` with the inputs of the head at every position, and the head's full name.

    `x` is the residual stream after the last layer.
    """
    config = checkpoint.config
    norm = read_tensor(checkpoint, "model.norm.weight").to(device).float()
    for chunk in x:
        for rows in chunk.split(_ROWS):
            normed = rms_norm(rows.to(device), norm, config.rms_norm_eps)
            observe(head_name(config), normed)


@dataclass
class _ForwardLayer:
    """One layer applied to x."""

    x: Tensor
    checkpoint: Checkpoint
    layer: int
    segments: Sequence[Segment]
    compute: Compute
    report: Report
    hooks: Hooks
    working: WorkingMemory | None

    def __post_init__(self) -> None:
        self.config, self.device = self.checkpoint.config, self.compute.device
        self.weights = {
            rounding: load_common(self.checkpoint, self.layer, self.compute, rounding)
            for rounding in {segment.rounding for segment in self.segments}
        }

    def dense(self) -> None:
        after = self.working.after if self.working else self.x
        for group, segment in self._groups():
            attended, normed = self._attend(group, segment)
            attended += _ffn(normed, self.weights[segment.rounding], "mlp", segment.observe)
            self._put(after, group, attended)
            self.report(len(normed))
        self.hooks.common()

    def moe(self) -> None:
        """Compute everything but the routed experts first; the experts' outputs are then added to
        `after`. Without working memory of its own, x holds the experts' inputs."""
        working = self.working or WorkingMemory(self.x, torch.empty_like(self.x))
        routes = []
        part = self._common_part()
        for group, segment in self._groups():
            weights, observe = self.weights[segment.rounding], segment.observe
            attended, normed = self._attend(group, segment)
            if observe is not None:
                observe("mlp.gate.weight", normed)
            bias = self._checked_bias(weights)
            routes.append(route(normed, weights["mlp.gate.weight"], bias, self.config))
            attended += _ffn(normed, weights, "mlp.shared_experts", observe)
            self._put(working.inputs, group, normed)
            self._put(working.after, group, attended)
            self.report(len(normed) * part)
        self.hooks.common()
        chosen, shares = (torch.cat(parts) for parts in zip(*routes, strict=True))
        self.hooks.routed(chosen)
        self._experts(working, chosen, shares, (1 - part) / self.config.num_experts_per_tok)
        if self.working is None:
            self.x.copy_(working.after)

    def _checked_bias(self, weights: Weights) -> Tensor:
        """The router's bias. It only ranks experts, so NaN in it would not show in any output."""
        name = "mlp.gate.e_score_correction_bias"
        if not torch.isfinite(weights[name]).all():
            raise CheckpointError(
                f"model.layers.{self.layer}.{name} is NaN or infinite; is the checkpoint damaged?"
            )
        return weights[name]

    def _groups(self) -> Iterator[tuple[slice, Segment]]:
        """Slices of chunks that are computed together."""
        size = max(1, _ROWS // self.x.shape[1])
        for segment in self.segments:
            for start in range(segment.start, segment.stop, size):
                yield slice(start, min(start + size, segment.stop)), segment

    def _attend(self, group: slice, segment: Segment) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and normed for the FFN: both [rows, hidden]."""
        weights, eps = self.weights[segment.rounding], self.config.rms_norm_eps
        part = self.x[group].to(self.device)
        normed = rms_norm(part, weights["input_layernorm.weight"], eps)
        mixed = attention(normed, weights, self.config, segment.observe)
        attended = (part + mixed).flatten(0, 1)
        return attended, rms_norm(attended, weights["post_attention_layernorm.weight"], eps)

    def _put(self, target: Tensor, group: slice, rows: Tensor) -> None:
        target[group].copy_(rows.view(-1, *self.x.shape[1:]))

    def _experts(self, working: WorkingMemory, chosen: Tensor, shares: Tensor, work: float) -> None:
        """Add the output of each expert to `after`, for the rows that are routed to it."""
        inputs, outputs = working.inputs.flatten(0, 1), working.after.flatten(0, 1)
        for expert, stored in enumerate(read_experts(self.checkpoint, self.layer)):
            prefix = f"mlp.experts.{expert}"
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            prepared: dict[Rounding | None, Weights] = {}
            for segment, blocks in self._blocks(rows):
                matrices = prepared.get(segment.rounding) or {
                    name: self.compute.prepare(name, tensor, segment.rounding)
                    for name, tensor in stored.items()
                }
                prepared[segment.rounding] = matrices
                for block in blocks:
                    at = rows[block].to(inputs.device)
                    gathered = inputs[at].to(self.device)
                    result = dense_ffn(gathered, matrices, prefix, segment.observe)
                    result *= shares[rows[block], slots[block], None]
                    outputs.index_add_(0, at, result.to(outputs.device))
                    self.report(len(at) * work)
            self.hooks.expert(Expert(expert, inputs, rows.to(inputs.device), stored, self.compute))

    def _blocks(self, rows: Tensor) -> Iterator[tuple[Segment, list[slice]]]:
        """Split ascending row numbers at the ends of segments, and further into blocks; segments
        without rows are left out."""
        for segment in self.segments:
            ends = torch.tensor([segment.start, segment.stop]) * self.x.shape[1]
            first, last = torch.searchsorted(rows, ends.to(rows.device)).tolist()
            if first < last:
                starts = range(first, last, _ROWS)
                yield segment, [slice(start, min(start + _ROWS, last)) for start in starts]

    def _common_part(self) -> float:
        """The part of the work on a token that is not done by the routed experts."""
        specs = [s for s in inventory(self.config) if s.layer == self.layer]
        routed = sum(s.source_elements for s in specs if s.role == "routed")
        common = sum(s.source_elements for s in specs if s.role != "routed")
        used = routed * self.config.num_experts_per_tok / self.config.n_routed_experts
        return common / (common + used)


def _ffn(rows: Tensor, weights: Weights, prefix: str, observe: Observer | None) -> Tensor:
    """`dense_ffn` in blocks: a chunk may have more rows than one matrix product should."""
    return torch.cat([dense_ffn(part, weights, prefix, observe) for part in rows.split(_ROWS)])
