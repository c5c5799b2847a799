"""Weights for the reference, read from a checkpoint one layer at a time."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dots1_local.architecture import TensorSpec, inventory
from dots1_local.checkpoint import Checkpoint

__all__ = ["load_layer", "load_layers", "load_outer", "stacked_name"]


def load_layer(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    """One layer's tensors in F32, named and stacked as `layers` wants them.

    Raises:
        CheckpointError: a tensor is missing or unreadable.
    """
    prefix = f"model.layers.{layer}."
    return {
        stacked_name(spec).removeprefix(prefix): _read(checkpoint, spec)
        for spec in inventory(checkpoint.config)
        if spec.layer == layer
    }


def load_layers(checkpoint: Checkpoint) -> Iterator[dict[str, Tensor]]:
    """Every layer in turn; a layer's memory is free once the caller lets go of it."""
    for layer in range(checkpoint.config.num_hidden_layers):
        yield load_layer(checkpoint, layer)


def load_outer(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What belongs to no layer: embedding, last norm and head, under their full names."""
    return {
        stacked_name(spec): _read(checkpoint, spec)
        for spec in inventory(checkpoint.config)
        if spec.layer is None
    }


def stacked_name(spec: TensorSpec) -> str:
    """The reference's name of a tensor; `...mlp.experts.0.up_proj.weight` and its fellows
    become `...mlp.experts.up_proj`."""
    name = spec.sources[0]
    if spec.role != "routed":
        return name
    return name.replace("experts.0.", "experts.").removesuffix(".weight")


def _read(checkpoint: Checkpoint, spec: TensorSpec) -> Tensor:
    if spec.role != "routed":
        return torch.from_numpy(checkpoint.read(spec.sources[0]))
    stacked = np.empty(spec.shape, np.float32)
    for expert, source in enumerate(spec.sources):
        stacked[expert] = checkpoint.read(source)
    return torch.from_numpy(stacked)
