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
from dots1_local.checkpoint import Checkpoint
from dots1_local.errors import CheckpointError
from dots1_local.reference.layers import Observer, Weights, attention, dense_ffn, rms_norm, route
from dots1_local.reference.weights import Kernel, load_common, load_experts, read_tensor

__all__ = ["Segment", "advance", "embed", "output_logits"]

_ROWS = 2048  # multiplied at a time; with more a matrix product gets no faster
_LOGITS = 1 << 25  # computed at a time: 134 MB

Step = Callable[[float], None]
"""Called with what was just computed, in tokens' worth of a layer."""


@dataclass(frozen=True)
class Segment:
    """Chunks [start, stop) of x, and who observes them.

    Rows of two segments are never multiplied together, so that neither depends on the other being
    there, to the last bit.
    """

    start: int
    stop: int
    observe: Observer | None = None


def embed(checkpoint: Checkpoint, tokens: Tensor, x: Tensor) -> None:
    """Fill `x` with the embeddings of `tokens` [chunks, positions].

    Raises:
        CheckpointError: the embedding is missing or unreadable.
    """
    table = read_tensor(checkpoint, "model.embed_tokens.weight")
    for chunk, row in zip(x, tokens, strict=True):
        chunk.copy_(table[row])


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
    tied = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    head = read_tensor(checkpoint, tied).to(device).float()
    size = max(1, _LOGITS // config.vocab_size)
    for chunk, rows in enumerate(x[:, first:-1]):
        for start in range(0, len(rows), size):
            block = rms_norm(rows[start : start + size].to(device), norm, config.rms_norm_eps)
            yield chunk, start, F.linear(block, head).cpu()


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
        self.weights = load_common(checkpoint, layer, kernel)
        self.step = step

    def dense(self) -> None:
        for group, observe in self._groups():
            attended, normed = self._attend(group, observe)
            attended += _ffn(normed, self.weights, "mlp", observe)
            self._put(self.x, group, attended)
            self.step(len(normed))

    def moe(self) -> None:
        """While experts are added up in `after`, x holds what they all begin with."""
        after, routes = torch.empty_like(self.x), []
        bias = self._checked_bias()
        worth = self._common_worth()
        for group, observe in self._groups():
            attended, normed = self._attend(group, observe)
            if observe is not None:
                observe("mlp.gate.weight", normed)
            routes.append(route(normed, self.weights["mlp.gate.weight"], bias, self.config))
            attended += _ffn(normed, self.weights, "mlp.shared_experts", observe)
            self._put(self.x, group, normed)
            self._put(after, group, attended)
            self.step(len(normed) * worth)
        chosen, shares = (torch.cat(parts) for parts in zip(*routes, strict=True))
        self._experts(after, chosen, shares, (1 - worth) / self.config.num_experts_per_tok)
        self.x.copy_(after)

    def _checked_bias(self) -> Tensor:
        """It only ranks experts: NaN in it chooses them, and shows in nothing they compute."""
        name = "mlp.gate.e_score_correction_bias"
        if not torch.isfinite(self.weights[name]).all():
            raise CheckpointError(
                f"model.layers.{self.layer}.{name} is NaN or infinite; is the checkpoint damaged?"
            )
        return self.weights[name]

    def _groups(self) -> Iterator[tuple[slice, Observer | None]]:
        """Slices of chunks to be computed at once."""
        size = max(1, _ROWS // self.x.shape[1])
        for segment in self.segments:
            for start in range(segment.start, segment.stop, size):
                yield slice(start, min(start + size, segment.stop)), segment.observe

    def _attend(self, group: slice, observe: Observer | None) -> tuple[Tensor, Tensor]:
        """Chunks after attention, and the same normed for what comes next: both [rows, hidden]."""
        part = self.x[group].to(self.device)
        normed = self._norm(part, "input")
        attended = (part + attention(normed, self.weights, self.config, observe)).flatten(0, 1)
        return attended, self._norm(attended, "post_attention")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[f"{name}_layernorm.weight"], self.config.rms_norm_eps)

    def _put(self, target: Tensor, group: slice, rows: Tensor) -> None:
        target[group].copy_(rows.view(-1, *self.x.shape[1:]))

    def _experts(self, after: Tensor, chosen: Tensor, shares: Tensor, worth: float) -> None:
        """Add to `after` what each expert makes of the rows routed to it."""
        inputs, outputs = self.x.flatten(0, 1), after.flatten(0, 1)
        experts = load_experts(self.checkpoint, self.layer, self.kernel)
        for expert, matrices in enumerate(experts):
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            for block, observe in self._blocks(rows):
                at = rows[block].to(inputs.device)
                gathered = inputs[at].to(self.device)
                result = dense_ffn(gathered, matrices, f"mlp.experts.{expert}", observe)
                result *= shares[rows[block], slots[block], None]
                outputs.index_add_(0, at, result.to(outputs.device))
                self.step(len(at) * worth)

    def _blocks(self, rows: Tensor) -> Iterator[tuple[slice, Observer | None]]:
        """Cut ascending row numbers where a segment ends, and into pieces."""
        for segment in self.segments:
            ends = torch.tensor([segment.start, segment.stop]) * self.x.shape[1]
            first, last = torch.searchsorted(rows, ends.to(rows.device)).tolist()
            for start in range(first, last, _ROWS):
                yield slice(start, min(start + _ROWS, last)), segment.observe

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
