"""dots1 in torch: one layer as plain functions over a dict of tensors.

A layer's weights are a mapping from Hugging Face names relative to the layer
(`self_attn.q_proj.weight`, `mlp.gate.weight`, ...) to tensors, except that the routed experts
are stacked: `mlp.experts.gate_proj` and `mlp.experts.up_proj` are [experts, width, hidden],
`mlp.experts.down_proj` is [experts, hidden, width]. The functions have no state, so the tensors
may be autograd parameters (training), one layer read from disk (calibration) or de-quantised
weights (comparison).
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.architecture import Dots1Config

__all__ = [
    "Observer", "OutputObserver", "Weights", "attention", "dense_ffn", "expert_shares",
    "ffn_hidden", "layer_forward", "moe", "rms_norm", "route", "router_scores",
]  # fmt: skip


Weights = Mapping[str, Tensor]

Observer = Callable[[str, Tensor], None]
"""Called with a weight matrix's Hugging Face name, relative to the layer, and the rows that are
about to be multiplied by it: [rows, columns of the matrix]."""

OutputObserver = Callable[[str, Tensor], None]
"""Called with the same name and the result of the multiplication: [..., rows of the matrix]. The
layer continues with this very tensor, so autograd gives the gradient with respect to it."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` divided by its root mean square along the last axis, in F32, times `weight`."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)


def linear(
    x: Tensor,
    weights: Weights,
    name: str,
    observe: Observer | None,
    observe_output: OutputObserver | None = None,
) -> Tensor:
    """`x` times the named matrix [out, in], in the matrix's own precision and layout."""
    weight = weights[name]
    if observe is not None:
        observe(name, x.flatten(0, -2))
    if weight.is_mkldnn:
        y = F.linear(x.to_mkldnn(), weight).to_dense()
    elif weight.dtype == torch.bfloat16:
        y = F.linear(x.bfloat16(), weight).to(x.dtype)
    else:
        y = F.linear(x, weight)
    if observe_output is not None:
        observe_output(name, y)
    return y


def rope(x: Tensor, theta: float) -> Tensor:
    """`x` [..., positions, head_dim] rotated in NEOX style: dimension i with i + head_dim / 2."""
    positions, head_dim = x.shape[-2:]
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=x.device)
    angles = torch.arange(positions, device=x.device).float()[:, None] / theta ** (steps / head_dim)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(
    x: Tensor,
    weights: Weights,
    config: Dots1Config,
    observe: Observer | None = None,
    observe_output: OutputObserver | None = None,
) -> Tensor:
    """Causal self-attention over `x` [batch, positions, hidden], at positions from 0.

    q and k are normalised per head before RoPE.
    """

    def heads(name: str) -> Tensor:
        projected = linear(x, weights, f"self_attn.{name}_proj.weight", observe, observe_output)
        return projected.view(*x.shape[:-1], -1, config.head_dim).transpose(1, 2)

    def rotated(name: str) -> Tensor:
        norm = weights[f"self_attn.{name}_norm.weight"]
        return rope(rms_norm(heads(name), norm, config.rms_norm_eps), config.rope_theta)

    v = heads("v")
    mixed = F.scaled_dot_product_attention(
        rotated("q").to(v.dtype),
        rotated("k").to(v.dtype),
        v,
        is_causal=True,
        enable_gqa=config.num_key_value_heads != config.num_attention_heads,
    )
    joined = mixed.transpose(1, 2).flatten(2)
    return linear(joined, weights, "self_attn.o_proj.weight", observe, observe_output)


def dense_ffn(
    x: Tensor,
    weights: Weights,
    prefix: str,
    observe: Observer | None = None,
    observe_output: OutputObserver | None = None,
) -> Tensor:
    """SwiGLU with the matrices `PREFIX.{gate,up,down}_proj.weight`."""
    hidden = ffn_hidden(x, weights, prefix, observe, observe_output)
    return linear(hidden, weights, f"{prefix}.down_proj.weight", observe, observe_output)


def ffn_hidden(
    x: Tensor,
    weights: Weights,
    prefix: str,
    observe: Observer | None = None,
    observe_output: OutputObserver | None = None,
) -> Tensor:
    """The inputs of the down projection in `dense_ffn`: [..., width]."""
    gate = linear(x, weights, f"{prefix}.gate_proj.weight", observe, observe_output)
    up = linear(x, weights, f"{prefix}.up_proj.weight", observe, observe_output)
    return F.silu(gate) * up


def router_scores(x: Tensor, weight: Tensor) -> Tensor:
    """The router's score of each expert, for each row of `x`: [rows, experts] from 0 to 1, F32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float()).sigmoid()


def expert_shares(scores: Tensor, chosen: Tensor, config: Dots1Config) -> Tensor:
    """The factors of the chosen experts' outputs, shaped as `chosen` [rows, experts per token]."""
    shares = scores.gather(-1, chosen)
    if config.norm_topk_prob:
        shares = shares / (shares.sum(dim=-1, keepdim=True) + 1e-20)
    return shares * config.routed_scaling_factor


def route(x: Tensor, weight: Tensor, bias: Tensor, config: Dots1Config) -> tuple[Tensor, Tensor]:
    """The experts chosen for each row of `x`, and the factors of their outputs (`expert_shares`):
    both [rows, experts per token].

    The bias affects the choice, but not the factors.
    """
    scores = router_scores(x, weight)
    chosen = (scores.detach() + bias).topk(config.num_experts_per_tok, dim=-1).indices
    return chosen, expert_shares(scores, chosen, config)


def routed_experts(
    x: Tensor, chosen: Tensor, shares: Tensor, weights: Weights, observe: Observer | None = None
) -> Tensor:
    """The chosen experts' outputs, weighted by `shares` and summed, for each row of `x`."""
    # (row, slot) pairs are grouped by expert, so that one gather and one scatter suffice.
    order = chosen.flatten().argsort(stable=True)
    rows = order // chosen.shape[-1]
    # Not w[e]: its gradient would be a tensor as large as w, for every expert e.
    gates, ups, downs = (
        weights[f"mlp.experts.{name}_proj"].unbind() for name in ("gate", "up", "down")
    )
    counts = chosen.flatten().bincount(minlength=len(gates)).tolist()
    outputs = []
    for expert, inputs in enumerate(x.index_select(0, rows).split(counts)):
        prefix = f"mlp.experts.{expert}"
        matrices = {
            f"{prefix}.gate_proj.weight": gates[expert],
            f"{prefix}.up_proj.weight": ups[expert],
            f"{prefix}.down_proj.weight": downs[expert],
        }
        outputs.append(dense_ffn(inputs, matrices, prefix, observe))
    weighted = torch.cat(outputs).float() * shares.flatten()[order, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add_(0, rows, weighted)


def moe(
    x: Tensor, weights: Weights, config: Dots1Config, observe: Observer | None = None
) -> Tensor:
    """The routed experts' output plus the shared expert's, which is not scaled."""
    rows = x.flatten(0, -2)
    if observe is not None:
        observe("mlp.gate.weight", rows)
    bias = weights["mlp.gate.e_score_correction_bias"]
    chosen, shares = route(rows, weights["mlp.gate.weight"], bias, config)
    routed = routed_experts(rows, chosen, shares, weights, observe)
    shared = dense_ffn(rows, weights, "mlp.shared_experts", observe)
    return (routed + shared).view_as(x)


def layer_forward(
    x: Tensor, weights: Weights, config: Dots1Config, layer: int, observe: Observer | None = None
) -> Tensor:
    """The residual stream after a layer, from `x` before it: both [batch, positions, hidden]."""
    normed = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
    x = x + attention(normed, weights, config, observe)
    normed = rms_norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    if layer < config.first_k_dense_replace:
        return x + dense_ffn(normed, weights, "mlp", observe)
    return x + moe(normed, weights, config, observe)
