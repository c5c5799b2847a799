"""The model over many tokens, a layer at a time, so that each weight is read once for all of them.

Between two layers there is only the residual stream, x [chunks, positions, hidden]. Within a layer
attention goes by groups of chunks; then the routed experts are read one after another, and each
gets all rows that are routed to it: a layer of 8.9 GB in F32 never lies in memory whole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.architecture import inventory
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.layers import Observer, Weights, attention, dense_ffn, rms_norm, route
from dots1_local.reference.weights import (
    Kernel,
    Rounding,
    head_name,
    load_common,
    read_experts,
    read_tensor,
)

__all__ = ["Segment", "Step", "advance", "embed", "observe_head", "output_logits"]

_ROWS = 2048  # multiplied at a time; with more a matrix product gets no faster
_LOGITS = 1 << 25  # computed at a time: 134 MB

Step = Callable[[float], None]
"""Called with what was just computed, in tokens' worth of a layer."""


@dataclass(frozen=True)
class Segment:
    """Chunks [start, stop) of x, who observes them, and how their layers' matrices are rounded.

    Rows of two segments are never multiplied together, so that neither depends on the other being
    there, to the last bit.
    """

    start: int
    stop: int
    observe: Observer | None = None
    rounding: Rounding | None = None


def embed(
    checkpoint: Checkpoint, tokens: Tensor, x: Tensor, rounding: Rounding | None = None
) -> None:
    """Fill `x` with the embeddings of `tokens` [chunks, positions], rounded if so wanted.

    Raises:
        CheckpointError: the embedding is missing or unreadable.
    """
    table = read_tensor(checkpoint, "model.embed_tokens.weight")
    for chunk, row in zip(x, tokens, strict=True):
        chunk.copy_(rounding(table[row]) if rounding else table[row])


@torch.no_grad()
def advance(
    x: Tensor,
    checkpoint: Checkpoint,
    layer: int,
    segments: Sequence[Segment],
    kernel: Kernel,
    step: Step,
) -> None:
    """Turn `x`, in place, from what enters a layer into what leaves it.

    `x` may lie on another device than the kernel's.

    Raises:
        CheckpointError: a tensor is missing or unreadable, or the router's bias is no number.
    """
    work = _Layer(x, checkpoint, layer, segments, kernel, step)
    if checkpoint.config.is_dense(layer):
        work.dense()
    else:
        work.moe()


@torch.no_grad()
def output_logits(
    x: Tensor, checkpoint: Checkpoint, first: int, device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """Chunk, number of the first row, and logits [rows, vocabulary] of blocks of `x`.

    `x` is what leaves the last layer. Rows are positions from `first` on, and the last position,
    whose next token is not known, is left out.
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
    """Let `observe` hear what the head is multiplied by, at every position, under its full name.

    `x` is what leaves the last layer.
    """
    config = checkpoint.config
    norm = read_tensor(checkpoint, "model.norm.weight").to(device).float()
    for chunk in x:
        for rows in chunk.split(_ROWS):
            normed = rms_norm(rows.to(device), norm, config.rms_norm_eps)
            observe(head_name(config), normed)


class _Layer:
    """One layer's way over x."""

    def __init__(
        self,
        x: Tensor,
        checkpoint: Checkpoint,
        layer: int,
        segments: Sequence[Segment],
        kernel: Kernel,
        step: Step,
    ) -> None:
        self.x, self.segments = x, segments
        self.kernel, self.device = kernel, kernel.device
        self.checkpoint, self.layer, self.config = checkpoint, layer, checkpoint.config
        self.weights = {
            rounding: load_common(checkpoint, layer, kernel, rounding)
            for rounding in {segment.rounding for segment in segments}
        }
        self.step = step

    def dense(self) -> None:
        for group, segment in self._groups():
            attended, normed = self._attend(group, segment)
            attended += _ffn(normed, self.weights[segment.rounding], "mlp", segment.observe)
            self._put(self.x, group, attended)
            self.step(len(normed))

    def moe(self) -> None:
        """While experts are added up in `after`, x holds what they all begin with."""
        after, routes = torch.empty_like(self.x), []
        worth = self._common_worth()
        for group, segment in self._groups():
            weights, observe = self.weights[segment.rounding], segment.observe
            attended, normed = self._attend(group, segment)
            if observe is not None:
                observe("mlp.gate.weight", normed)
            bias = self._checked_bias(weights)
            routes.append(route(normed, weights["mlp.gate.weight"], bias, self.config))
            attended += _ffn(normed, weights, "mlp.shared_experts", observe)
            self._put(self.x, group, normed)
            self._put(after, group, attended)
            self.step(len(normed) * worth)
        chosen, shares = (torch.cat(parts) for parts in zip(*routes, strict=True))
        self._experts(after, chosen, shares, (1 - worth) / self.config.num_experts_per_tok)
        self.x.copy_(after)

    def _checked_bias(self, weights: Weights) -> Tensor:
        """It only ranks experts: NaN in it chooses them, and shows in nothing they compute."""
        name = "mlp.gate.e_score_correction_bias"
        if not torch.isfinite(weights[name]).all():
            raise CheckpointError(
                f"model.layers.{self.layer}.{name} is NaN or infinite; is the checkpoint damaged?"
            )
        return weights[name]

    def _groups(self) -> Iterator[tuple[slice, Segment]]:
        """Slices of chunks to be computed at once."""
        size = max(1, _ROWS // self.x.shape[1])
        for segment in self.segments:
            for start in range(segment.start, segment.stop, size):
                yield slice(start, min(start + size, segment.stop)), segment

    def _attend(self, group: slice, segment: Segment) -> tuple[Tensor, Tensor]:
        """Chunks after attention, and the same normed for what comes next: both [rows, hidden]."""
        weights, eps = self.weights[segment.rounding], self.config.rms_norm_eps
        part = self.x[group].to(self.device)
        normed = rms_norm(part, weights["input_layernorm.weight"], eps)
        mixed = attention(normed, weights, self.config, segment.observe)
        attended = (part + mixed).flatten(0, 1)
        return attended, rms_norm(attended, weights["post_attention_layernorm.weight"], eps)

    def _put(self, target: Tensor, group: slice, rows: Tensor) -> None:
        target[group].copy_(rows.view(-1, *self.x.shape[1:]))

    def _experts(self, after: Tensor, chosen: Tensor, shares: Tensor, worth: float) -> None:
        """Add to `after` what each expert makes of the rows routed to it."""
        inputs, outputs = self.x.flatten(0, 1), after.flatten(0, 1)
        for expert, stored in enumerate(read_experts(self.checkpoint, self.layer)):
            prefix = f"mlp.experts.{expert}"
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            ready: dict[Rounding | None, Weights] = {}
            for segment, blocks in self._blocks(rows):
                matrices = ready.get(segment.rounding) or {
                    name: self.kernel.ready(name, tensor, segment.rounding)
                    for name, tensor in stored.items()
                }
                ready[segment.rounding] = matrices
                for block in blocks:
                    at = rows[block].to(inputs.device)
                    gathered = inputs[at].to(self.device)
                    result = dense_ffn(gathered, matrices, prefix, segment.observe)
                    result *= shares[rows[block], slots[block], None]
                    outputs.index_add_(0, at, result.to(outputs.device))
                    self.step(len(at) * worth)

    def _blocks(self, rows: Tensor) -> Iterator[tuple[Segment, list[slice]]]:
        """Cut ascending row numbers where a segment ends, and into pieces; segments without any
        are left out."""
        for segment in self.segments:
            ends = torch.tensor([segment.start, segment.stop]) * self.x.shape[1]
            first, last = torch.searchsorted(rows, ends.to(rows.device)).tolist()
            if first < last:
                starts = range(first, last, _ROWS)
                yield segment, [slice(start, min(start + _ROWS, last)) for start in starts]

    def _common_worth(self) -> float:
        """The share of the work on a token that is not the routed experts'."""
        specs = [s for s in inventory(self.config) if s.layer == self.layer]
        routed = sum(s.source_elements for s in specs if s.role == "routed")
        common = sum(s.source_elements for s in specs if s.role != "routed")
        used = routed * self.config.num_experts_per_tok / self.config.n_routed_experts
        return common / (common + used)


def _ffn(rows: Tensor, weights: Weights, prefix: str, observe: Observer | None) -> Tensor:
    """`dense_ffn` in pieces: a chunk may be longer than what is multiplied at a time."""
    return torch.cat([dense_ffn(part, weights, prefix, observe) for part in rows.split(_ROWS)])
