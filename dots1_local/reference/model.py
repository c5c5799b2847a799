"""dots1 in torch: the whole model, its layers handed in one after another."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.architecture import Dots1Config
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.layers import Observer, Weights, layer_forward, rms_norm
from dots1_local.reference.weights import load_layers, load_outer

__all__ = ["forward", "logits"]


def forward(
    tokens: Tensor,
    outer: Weights,
    layers: Iterable[Weights],
    config: Dots1Config,
    observe: Observer | None = None,
) -> Tensor:
    """Logits [batch, positions, vocabulary] for `tokens` [batch, positions].

    `outer` holds embedding, last norm and head under their full names. `observe` hears the
    layers' matrices under theirs.
    """
    x = F.embedding(tokens, outer["model.embed_tokens.weight"]).float()
    for layer, weights in enumerate(layers):
        x = layer_forward(x, weights, config, layer, _in_layer(layer, observe))
        del weights  # or it would still be there while the next one is read
    x = rms_norm(x, outer["model.norm.weight"], config.rms_norm_eps)
    tied = config.tie_word_embeddings
    return F.linear(x, outer["model.embed_tokens.weight" if tied else "lm_head.weight"])


@torch.no_grad()
def logits(checkpoint: Checkpoint, tokens: Tensor, observe: Observer | None = None) -> Tensor:
    """`forward` in F32 straight from a checkpoint, holding one layer in memory at a time.

    Raises:
        CheckpointError: a tensor is missing or unreadable.
    """
    layers = load_layers(checkpoint)
    return forward(tokens, load_outer(checkpoint), layers, checkpoint.config, observe)


def _in_layer(layer: int, observe: Observer | None) -> Observer | None:
    if observe is None:
        return None
    return lambda name, rows: observe(f"model.layers.{layer}.{name}", rows)
