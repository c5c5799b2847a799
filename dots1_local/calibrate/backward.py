"""Where gradients of KL divergence begin: random ones at the logits, taken back through the head.

The Hessian of KL(P, Q) in Q's logits is, where Q is P, diag(p) - p p' for each token; it is also
the Fisher information of the model's own predictions. Gradients drawn with it for a covariance
make KL divergence a mean over draws: that of (sum of g dy)^2 / 2 for any small change dy.

Gradients of KL divergence, carried back through the layers, one at a time.

The forward pass must have kept what entered each layer. As there, a layer's routed experts are
read one after another, and each gets all rows that are routed to it.

Two kinds of draws go together. The `kl` draws come from the logits (`logit_gradients`). The `tie`
draws are zero there, and get something from each router they pass: a gradient of its margins that
stands for the experts it might have chosen instead (`near_ties`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.architecture import inventory
from dots1_local.calibrate.router_flips import Routing, Ties, margins
from dots1_local.calibrate.stream import Step
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.layers import (
    Observer,
    Outcome,
    Weights,
    attention,
    dense_ffn,
    expert_shares,
    rms_norm,
    router_scores,
)
from dots1_local.reference.weights import Kernel, head_name, load_common, read_experts, read_tensor

__all__ = [
    "check_finite",
    "generator",
    "retreat",
    "top",
]


_LOGITS = 1 << 25  # computed at a time: 134 MB, of which there are five


def generator(seed: int, layer: int) -> torch.Generator:
    """Random numbers of a layer's own, so that a run that is resumed there finds the same ones."""
    (state,) = np.random.SeedSequence((seed, layer)).generate_state(1)
    return torch.Generator().manual_seed(int(state))


def top(
    x: Tensor, checkpoint: Checkpoint, draws: int, random: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The `kl` draws at what leaves the last layer, and what the head's rows are worth.

    From `x` [chunks, positions, hidden]: gradients [draws, chunks, positions, hidden] beside it,
    and the expected square of the gradient at each logit, summed over tokens: [vocabulary], F64.
    Every position counts. `random` is a CPU's generator.

    Raises:
        CheckpointError: a tensor is missing or unreadable, or the gradient is NaN or infinite.
    """
    config = checkpoint.config
    norm = read_tensor(checkpoint, "model.norm.weight").to(device).float()
    head = read_tensor(checkpoint, head_name(config)).to(device).float()
    g = x.new_empty(draws, *x.shape)
    squares = torch.zeros(config.vocab_size, dtype=torch.float64)
    size = max(1, _LOGITS // config.vocab_size)
    rows, at_rows = x.view(-1, x.shape[-1]), g.view(draws, -1, x.shape[-1])
    for block in range(0, len(rows), size):
        part = rows[block : block + size].to(device).requires_grad_()
        normed = rms_norm(part, norm, config.rms_norm_eps)
        p = F.linear(normed.detach(), head).softmax(-1)
        squares += (p - p.square()).sum(0).cpu().double()
        for draw in at_rows:
            z = _logit_gradients(p, random)
            (back,) = torch.autograd.grad(normed, part, z @ head, retain_graph=True)
            draw[block : block + size] = back.to(g.device)
    check_finite((g, squares), "the head")
    return g, squares


def _logit_gradients(p: Tensor, random: torch.Generator) -> Tensor:
    """Normal with covariance diag(p) - p p' for each row of probabilities."""
    scaled = torch.randn(p.shape, generator=random).to(p.device).mul_(p.sqrt())
    return scaled.sub_(p * scaled.sum(-1, keepdim=True))


def check_finite(tensors: Iterable[Tensor], where: str) -> None:
    """A NaN or infinity shows in the sum, which needs no second copy."""
    if not all(torch.isfinite(tensor.sum()) for tensor in tensors):
        raise CheckpointError(
            f"the gradient at {where} is NaN or infinite; is the checkpoint damaged?"
        )


_ROWS = 1024  # go through a layer at a time, with all that autograd keeps of them


def retreat(
    g: Tensor,
    x: Tensor,
    checkpoint: Checkpoint,
    layer: int,
    kl_draws: int,
    sigma: float,
    random: torch.Generator,
    kernel: Kernel,
    step: Step,
    observe: Observer | None = None,
) -> tuple[dict[str, Tensor], Ties]:
    """Turn `g`, in place, from the gradients at what leaves a layer into those at what enters it.

    `g` is [draws, chunks, positions, hidden], of which the first `kl_draws` are `kl` draws and the
    others `tie` draws; `x` [chunks, positions, hidden] is what entered the layer. Both may lie on
    another device than the kernel's. `sigma` is the standard deviation of the noise in the router's
    margins for which its near ties are worth what their gradients say; with 0 there are none.
    `observe` hears what reaches the matrices, near ties' rows at the expert they missed among it.

    Returns what near ties are worth and, for each matrix but the router, under its Hugging Face
    name relative to the layer, the square of the gradient at each of its rows' outputs, summed over
    the tokens that reach it: [2, rows], F64, the mean of the `kl` and that of the `tie` draws.

    Raises:
        CheckpointError: a tensor is missing or unreadable, or a gradient is NaN or infinite.
    """
    work = _Layer(g, x, checkpoint, layer, kl_draws, kernel, step, observe)
    ties = Ties()
    if checkpoint.config.is_dense(layer):
        work.dense()
    else:
        ties = work.moe(sigma, random)
    check_finite((g, *work.sums.values()), f"layer {layer}")
    return work.sums, ties


class _Layer:
    """The way back through one layer, whose tokens are rows of x and g."""

    def __init__(
        self,
        g: Tensor,
        x: Tensor,
        checkpoint: Checkpoint,
        layer: int,
        kl_draws: int,
        kernel: Kernel,
        step: Step,
        observe: Observer | None,
    ) -> None:
        self.positions, hidden = x.shape[1:]
        self.g, self.x = g.view(len(g), -1, hidden), x.view(-1, hidden)
        self.kl_draws, self.step, self.observe = kl_draws, step, observe
        self.kernel, self.device = replace(kernel, autograd=True), kernel.device
        self.checkpoint, self.layer, self.config = checkpoint, layer, checkpoint.config
        prefix = f"model.layers.{layer}."
        self.sums = {
            source.removeprefix(prefix): torch.zeros(2, spec.source_shape[0], dtype=torch.float64)
            for spec in inventory(self.config)
            if spec.layer == layer and spec.role not in ("norm", "router")
            for source in spec.sources
        }
        self.weights = load_common(checkpoint, layer, self.kernel)

    def dense(self) -> None:
        for rows in self._groups():
            seen: dict[str, Tensor] = {}
            entered = self._leaf(self.x[rows])
            attended, normed = self._attend(entered, seen.__setitem__)
            left = attended + self._ffn(normed, self.weights, "mlp", seen)
            for draw, back in self._back(entered, seen, [left], [self.g[:, rows]]):
                self.g[draw, rows] = back
            self.step(len(entered))

    def moe(self, sigma: float, random: torch.Generator) -> Ties:
        """Experts first: their outputs are what the router's shares of them are worth."""
        normed, routing = self._forward()
        within = torch.zeros_like(self.g)
        worth = len(self.x) / (self.config.n_routed_experts + 1)  # what is read takes the time
        dots = self._experts(normed, within, routing, worth)
        ties = routing.ties(dots[: self.kl_draws], sigma)
        noise = math.sqrt(2 * ties.rate) * torch.randn(dots.shape[:2], generator=random)
        noise[: self.kl_draws] = 0
        self._common(within, routing, dots, noise)
        self.step(worth)
        return ties

    @torch.no_grad()
    def _forward(self) -> tuple[Tensor, Routing]:
        """What enters the FFN [rows, hidden], beside x, and what its router does with it."""
        normed, scores = torch.empty_like(self.x), []
        for rows in self._groups():
            _, part = self._attend(self.x[rows].to(self.device))
            scores.append(router_scores(part, self.weights["mlp.gate.weight"]))
            normed[rows] = part.to(normed.device)
        bias = self.weights["mlp.gate.e_score_correction_bias"]
        return normed, Routing(torch.cat(scores), bias, self.config)

    def _experts(self, normed: Tensor, within: Tensor, routing: Routing, worth: float) -> Tensor:
        """Add to `within` [draws, rows, hidden] the gradients at what enters the experts.

        Returns the products of the experts' outputs with the gradients at what leaves the layer:
        [draws, rows, k + 1] for `routing.wanted`.
        """
        wanted, shares = routing.wanted, routing.shares
        dots = torch.zeros(len(self.g), *wanted.shape, device=self.device)
        for expert, stored in enumerate(read_experts(self.checkpoint, self.layer)):
            matrices = {name: self.kernel.ready(name, tensor) for name, tensor in stored.items()}
            prefix = f"mlp.experts.{expert}"
            rows, slots = (wanted == expert).nonzero(as_tuple=True)
            for start in range(0, len(rows), _ROWS):
                at, slot = rows[start : start + _ROWS], slots[start : start + _ROWS]
                home = at.to(self.x.device)
                seen: dict[str, Tensor] = {}
                entered = self._leaf(normed[home])
                out = self._ffn(entered, matrices, prefix, seen)
                left = self.g[:, home].to(self.device)
                dots[:, at, slot] = (left * out.detach()).sum(-1)
                left *= shares[at, slot, None]
                for draw, back in self._back(entered, seen, [out], [left]):
                    within[draw].index_add_(0, home, back)
            self.step(worth)
        return dots

    def _common(self, within: Tensor, routing: Routing, dots: Tensor, noise: Tensor) -> None:
        """Back from what leaves the layer, what enters the experts, their shares and margins."""
        k = self.config.num_experts_per_tok
        for rows in self._groups():
            seen: dict[str, Tensor] = {}
            entered = self._leaf(self.x[rows])
            attended, normed = self._attend(entered, seen.__setitem__)
            shared = self._ffn(normed, self.weights, "mlp.shared_experts", seen)
            scores, ranked = router_scores(normed, self.weights["mlp.gate.weight"]), routing.ranked
            shares = expert_shares(scores, ranked[rows, :k], self.config)
            outputs = [
                attended + shared, normed, shares, margins(scores, ranked[rows], self.config)
            ]  # fmt: skip
            gradients = [self.g[:, rows], within[:, rows], dots[:, rows, :k], noise[:, rows]]
            for draw, back in self._back(entered, seen, outputs, gradients):
                self.g[draw, rows] = back

    def _groups(self) -> Iterator[slice]:
        """Whole chunks, as many as are computed at once."""
        size = max(1, _ROWS // self.positions) * self.positions
        for start in range(0, len(self.x), size):
            yield slice(start, min(start + size, len(self.x)))

    def _leaf(self, rows: Tensor) -> Tensor:
        return rows.to(self.device).requires_grad_()

    def _attend(self, rows: Tensor, outcome: Outcome | None = None) -> tuple[Tensor, Tensor]:
        """Whole chunks after attention, and the same normed for what comes next."""
        x = rows.view(-1, self.positions, rows.shape[-1])
        observe = self.observe if outcome is not None else None  # what comes twice
        mixed = attention(self._norm(x, "input"), self.weights, self.config, observe, outcome)
        attended = (x + mixed).flatten(0, 1)
        return attended, self._norm(attended, "post_attention")

    def _ffn(self, rows: Tensor, weights: Weights, prefix: str, seen: dict[str, Tensor]) -> Tensor:
        return dense_ffn(rows, weights, prefix, self.observe, seen.__setitem__)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[f"{name}_layernorm.weight"], self.config.rms_norm_eps)

    def _back(
        self,
        entered: Tensor,
        seen: dict[str, Tensor],
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ) -> Iterator[tuple[int, Tensor]]:
        """Each draw's gradient at `entered`, beside x; those at the matrices' outputs are added up.

        One draw after another: all at once would take as many times the memory.
        """
        for draw in range(len(self.g)):
            at_outputs = [gradient[draw].to(self.device) for gradient in gradients]
            *at_matrices, back = torch.autograd.grad(
                outputs, [*seen.values(), entered], at_outputs, retain_graph=True
            )
            for name, gradient in zip(seen, at_matrices, strict=True):
                self._add(name, draw, gradient)
            yield draw, back.to(self.x.device)

    def _add(self, name: str, draw: int, gradient: Tensor) -> None:
        is_tie = draw >= self.kl_draws
        draws = len(self.g) - self.kl_draws if is_tie else self.kl_draws
        squares = gradient.square().flatten(0, -2).sum(0).cpu().double()
        self.sums[name][int(is_tie)] += squares / draws
