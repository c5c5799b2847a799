"""dots1 in torch, as plain functions: what calibration and training run, and tests compare with.

Importing this package loads torch; nothing else in dots1_local does so before it has to.
"""

from dots1_local.reference.layers import (
    Observer,
    Weights,
    attention,
    dense_ffn,
    layer_forward,
    moe,
    rms_norm,
    rope,
    route,
    routed_experts,
)
from dots1_local.reference.model import forward, logits
from dots1_local.reference.weights import load_layer, load_layers, load_outer, stacked_name

__all__ = [
    "Observer",
    "Weights",
    "attention",
    "dense_ffn",
    "forward",
    "layer_forward",
    "load_layer",
    "load_layers",
    "load_outer",
    "logits",
    "moe",
    "rms_norm",
    "rope",
    "route",
    "routed_experts",
    "stacked_name",
]
