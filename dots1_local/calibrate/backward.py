"""Gradients of KL divergence, carried back from the logits through the layers, one at a time.

The Hessian of KL(P, Q) in Q's logits is, where Q is P, diag(p) - p p' for each token; this is also
the Fisher information of the model's own predictions. If gradients g are drawn with this
covariance, the KL divergence of a small change dy is the mean of (sum of g dy)^2 / 2 over draws.

There are two kinds of draws. The `kl` draws start at the logits. The `tie` draws are 0 there, and
every router adds to them a gradient of its margins that stands for the experts that it might have
chosen instead (see `router_flips`).

The forward pass must have saved the inputs of each layer. As in the forward pass, a layer's routed
experts are read one after another, and each is applied to all rows that are routed to it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.architecture import inventory
from dots1_local.calibrate.router_flips import RouterFlips, Routing, margins
from dots1_local.calibrate.stream import Report
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.layers import (
    Observer,
    OutputObserver,
    Weights,
    attention,
    dense_ffn,
    expert_shares,
    rms_norm,
    router_scores,
)
from dots1_local.reference.model import Compute, head_name, load_common, read_experts, read_tensor

__all__ = ["SquaresObserver", "backward_layer", "generator", "head_gradients"]

SquaresObserver = Callable[[str, bool, Tensor], None]
"""Called with a matrix's name, whether the gradients are `tie` draws, and the squares of gradients
at its outputs: [rows that an `Observer` got last, rows of the matrix]."""

_LOGITS = 1 << 25  # logits computed at a time: 134 MB, of which there are five copies
_ROWS = 1024  # rows of a layer computed at a time, with everything that autograd keeps of them


def generator(seed: int, layer: int) -> torch.Generator:
    """Each layer's own random numbers, so that a resumed run gets the same ones."""
    (state,) = np.random.SeedSequence((seed, layer)).generate_state(1)
    return torch.Generator().manual_seed(int(state))


def head_gradients(
    x: Tensor,
    checkpoint: Checkpoint,
    draws: int,
    random: torch.Generator,
    device: torch.device,
    observe: Observer | None = None,
    observe_squares: SquaresObserver | None = None,
) -> tuple[Tensor, Tensor]:
    """The `kl` draws at the output of the last layer, and the second moments at the logits.

    `x` [chunks, positions, hidden] is that output. Returns gradients [draws, chunks, positions,
    hidden] on the device of x, and the expected square of the gradient at each logit, summed over
    tokens: [vocabulary], F64. Every position counts. `random` is a CPU generator. The observers get
    the inputs of the head, and the expected squares.

    Raises:
        CheckpointError: a tensor is missing or unreadable, or the gradient is NaN or infinite.
    """
    config = checkpoint.config
    name, norm = head_name(config), read_tensor(checkpoint, "model.norm.weight").to(device).float()
    head = read_tensor(checkpoint, name).to(device).float()
    g = x.new_empty(draws, *x.shape)
    squares = torch.zeros(config.vocab_size, dtype=torch.float64)
    size = max(1, _LOGITS // config.vocab_size)
    rows, at_rows = x.view(-1, x.shape[-1]), g.view(draws, -1, x.shape[-1])
    for block in range(0, len(rows), size):
        part = rows[block : block + size].to(device).requires_grad_()
        normed = rms_norm(part, norm, config.rms_norm_eps)
        p = F.linear(normed.detach(), head).softmax(-1)
        expected = p - p.square()
        if observe is not None and observe_squares is not None:
            observe(name, normed)
            observe_squares(name, False, expected)
        squares += expected.sum(0).cpu().double()
        for draw in at_rows:
            z = _logit_gradients(p, random)
            (at_part,) = torch.autograd.grad(normed, part, z @ head, retain_graph=True)
            draw[block : block + size] = at_part.to(g.device)
    _check_finite((g, squares), "the head")
    return g, squares


def _logit_gradients(p: Tensor, random: torch.Generator) -> Tensor:
    """Normal with covariance diag(p) - p p' for each row of probabilities."""
    scaled = torch.randn(p.shape, generator=random).to(p.device).mul_(p.sqrt())
    return scaled.sub_(p * scaled.sum(-1, keepdim=True))


def _check_finite(tensors: Iterable[Tensor], where: str) -> None:
    """NaN and infinity show in the sum, which needs no second copy."""
    if not all(torch.isfinite(tensor.sum()) for tensor in tensors):
        raise CheckpointError(
            f"the gradient at {where} is NaN or infinite; is the checkpoint damaged?"
        )


def backward_layer(
    g: Tensor,
    x: Tensor,
    checkpoint: Checkpoint,
    layer: int,
    kl_draws: int,
    sigma: float,
    random: torch.Generator,
    compute: Compute,
    report: Report,
    observe: Observer | None = None,
    observe_squares: SquaresObserver | None = None,
) -> tuple[dict[str, Tensor], RouterFlips]:
    """Replace `g`, the gradients at the output of a layer, by the gradients at its input.

    `g` is [draws, chunks, positions, hidden]; the first `kl_draws` are `kl` draws, the others `tie`
    draws. `x` [chunks, positions, hidden] is the layer's input. Both may be on another device than
    the computation. `sigma` is the standard deviation of the noise in the router's margins; with 0
    no router flips. `observe` gets the inputs of the matrices, including rows for the next expert
    of tokens that are nearly tied; after each piece of these rows `observe_squares` gets what
    belongs to it, draw by draw.

    Returns the second moments of the gradient at each matrix except the router, under its Hugging
    Face name relative to the layer: for each row of the matrix, the square of the gradient at its
    output, summed over tokens and averaged over the `kl` and over the `tie` draws: [2, rows], F64.
    Returns also the cost of flips.

    Raises:
        CheckpointError: a tensor is missing or unreadable, or a gradient is NaN or infinite.
    """
    work = _BackwardLayer(
        g, x, checkpoint, layer, kl_draws, compute, report, observe, observe_squares
    )
    flips = work.dense() if checkpoint.config.is_dense(layer) else work.moe(sigma, random)
    _check_finite((g, *work.sums.values()), f"layer {layer}")
    return work.sums, flips


@dataclass
class _BackwardLayer:
    """The backward pass through one layer; tokens are rows of x and g."""

    g: Tensor
    x: Tensor
    checkpoint: Checkpoint
    layer: int
    kl_draws: int
    compute: Compute
    report: Report
    observe: Observer | None
    observe_squares: SquaresObserver | None

    def __post_init__(self) -> None:
        self.positions, hidden = self.x.shape[1:]
        self.g, self.x = self.g.view(len(self.g), -1, hidden), self.x.view(-1, hidden)
        self.config, self.device = self.checkpoint.config, self.compute.device
        self.compute = replace(self.compute, autograd=True)
        prefix = f"model.layers.{self.layer}."
        self.sums = {
            source.removeprefix(prefix): torch.zeros(2, spec.source_shape[0], dtype=torch.float64)
            for spec in inventory(self.config)
            if spec.layer == self.layer and spec.role not in ("norm", "router")
            for source in spec.sources
        }
        self.weights = load_common(self.checkpoint, self.layer, self.compute)

    def dense(self) -> RouterFlips:
        for rows in self._groups():
            outputs: dict[str, Tensor] = {}
            leaf = self._leaf(self.x[rows])
            attended, normed = self._attend(leaf, outputs.__setitem__)
            y = attended + self._ffn(normed, self.weights, "mlp", outputs)
            for draw, gradient in self._gradients(leaf, outputs, [y], [self.g[:, rows]]):
                self.g[draw, rows] = gradient
            self.report(len(leaf))
        return RouterFlips()

    def moe(self, sigma: float, random: torch.Generator) -> RouterFlips:
        """The experts come first, because the gradients at their shares need their outputs."""
        normed, routing = self._forward()
        at_normed = torch.zeros_like(self.g)
        work = len(self.x) / (self.config.n_routed_experts + 1)  # reading takes most of the time
        dots = self._experts(normed, at_normed, routing, work)
        flips = routing.flips(dots[: self.kl_draws], sigma)
        noise = math.sqrt(2 * flips.rate) * torch.randn(dots.shape[:2], generator=random)
        noise[: self.kl_draws] = 0
        self._common(at_normed, routing, dots, noise)
        self.report(work)
        return flips

    @torch.no_grad()
    def _forward(self) -> tuple[Tensor, Routing]:
        """The FFN's input [rows, hidden], on the device of x, and its router's choices."""
        normed, scores = torch.empty_like(self.x), []
        for rows in self._groups():
            _, part = self._attend(self.x[rows].to(self.device))
            scores.append(router_scores(part, self.weights["mlp.gate.weight"]))
            normed[rows] = part.to(normed.device)
        bias = self.weights["mlp.gate.e_score_correction_bias"]
        return normed, Routing(torch.cat(scores), bias, self.config)

    def _experts(self, normed: Tensor, at_normed: Tensor, routing: Routing, work: float) -> Tensor:
        """Add the gradients at the experts' inputs to `at_normed` [draws, rows, hidden].

        Returns the products of the experts' outputs with the gradients at the layer's output:
        [draws, rows, k + 1] for `routing.wanted`.
        """
        wanted, shares = routing.wanted, routing.shares
        dots = torch.zeros(len(self.g), *wanted.shape, device=self.device)
        for expert, stored in enumerate(read_experts(self.checkpoint, self.layer)):
            matrices = {name: self.compute.prepare(name, tensor) for name, tensor in stored.items()}
            prefix = f"mlp.experts.{expert}"
            rows, slots = (wanted == expert).nonzero(as_tuple=True)
            for start in range(0, len(rows), _ROWS):
                at, slot = rows[start : start + _ROWS], slots[start : start + _ROWS]
                index = at.to(self.x.device)
                outputs: dict[str, Tensor] = {}
                leaf = self._leaf(normed[index])
                y = self._ffn(leaf, matrices, prefix, outputs)
                at_y = self.g[:, index].to(self.device)
                dots[:, at, slot] = (at_y * y.detach()).sum(-1)
                at_y *= shares[at, slot, None]
                for draw, gradient in self._gradients(leaf, outputs, [y], [at_y]):
                    at_normed[draw].index_add_(0, index, gradient)
            self.report(work)
        return dots

    def _common(self, at_normed: Tensor, routing: Routing, dots: Tensor, noise: Tensor) -> None:
        """Carry the gradients at the layer's output, at the experts' inputs, at their shares and
        at the margins back to the layer's input."""
        k = self.config.num_experts_per_tok
        for rows in self._groups():
            outputs: dict[str, Tensor] = {}
            leaf = self._leaf(self.x[rows])
            attended, normed = self._attend(leaf, outputs.__setitem__)
            shared = self._ffn(normed, self.weights, "mlp.shared_experts", outputs)
            scores, ranked = router_scores(normed, self.weights["mlp.gate.weight"]), routing.ranked
            shares = expert_shares(scores, ranked[rows, :k], self.config)
            ends = [attended + shared, normed, shares, margins(scores, ranked[rows], self.config)]
            at_ends = [self.g[:, rows], at_normed[:, rows], dots[:, rows, :k], noise[:, rows]]
            for draw, gradient in self._gradients(leaf, outputs, ends, at_ends):
                self.g[draw, rows] = gradient

    def _groups(self) -> Iterator[slice]:
        """Whole chunks, as many as are computed together."""
        size = max(1, _ROWS // self.positions) * self.positions
        for start in range(0, len(self.x), size):
            yield slice(start, min(start + size, len(self.x)))

    def _leaf(self, rows: Tensor) -> Tensor:
        return rows.to(self.device).requires_grad_()

    def _attend(self, rows: Tensor, outputs: OutputObserver | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and normed for the FFN; rows are whole chunks."""
        x = rows.view(-1, self.positions, rows.shape[-1])
        # `_forward` and `_common` both compute this; inputs are observed only once.
        observe = self.observe if outputs is not None else None
        mixed = attention(self._norm(x, "input"), self.weights, self.config, observe, outputs)
        attended = (x + mixed).flatten(0, 1)
        return attended, self._norm(attended, "post_attention")

    def _ffn(
        self, rows: Tensor, weights: Weights, prefix: str, outputs: dict[str, Tensor]
    ) -> Tensor:
        return dense_ffn(rows, weights, prefix, self.observe, outputs.__setitem__)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[f"{name}_layernorm.weight"], self.config.rms_norm_eps)

    def _gradients(
        self,
        leaf: Tensor,
        outputs: dict[str, Tensor],
        ends: Sequence[Tensor],
        at_ends: Sequence[Tensor],
    ) -> Iterator[tuple[int, Tensor]]:
        """Each draw's gradient at `leaf`, on the device of x, from those at `ends`; the squares
        of the gradients at the matrices' `outputs` are added to the sums.

        Draws are computed one after another to save memory.
        """
        for draw in range(len(self.g)):
            given = [gradient[draw].to(self.device) for gradient in at_ends]
            *at_outputs, at_leaf = torch.autograd.grad(
                ends, [*outputs.values(), leaf], given, retain_graph=True
            )
            for name, gradient in zip(outputs, at_outputs, strict=True):
                self._add(name, draw, gradient)
            yield draw, at_leaf.to(self.x.device)

    def _add(self, name: str, draw: int, gradient: Tensor) -> None:
        is_tie = draw >= self.kl_draws
        draws = len(self.g) - self.kl_draws if is_tie else self.kl_draws
        squares = gradient.square().flatten(0, -2)
        if self.observe_squares is not None:
            self.observe_squares(name, is_tie, squares)
        self.sums[name][int(is_tie)] += squares.sum(0).cpu().double() / draws
