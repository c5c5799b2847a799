"""Weights for the reference, read from a checkpoint one layer, or one expert, at a time."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dots1_local.architecture import Dots1Config, TensorSpec, inventory
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint, read_exactly

__all__ = [
    "Kernel",
    "Rounding",
    "head_name",
    "load_common",
    "load_layer",
    "load_layers",
    "load_outer",
    "read_experts",
    "read_tensor",
    "stacked_name",
]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READ_AHEAD = 2  # experts; at the real width one is 35 MB

Rounding = Callable[[Tensor], Tensor]
"""Takes a stored matrix [rows, columns], whole or some of its rows; gives the F32 one to use."""


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


@dataclass(frozen=True)
class Kernel:
    """Where a layer is computed, whether its matrices are multiplied in BF16 or F32, and whether
    autograd must know their layout."""

    device: torch.device
    bf16: bool = False
    autograd: bool = False

    def ready(self, name: str, stored: Tensor, rounding: Rounding | None = None) -> Tensor:
        """A tensor as this kernel wants it; if it is a matrix, rounded first.

        On a CPU F32 matrices go to oneDNN, which on AMD's is twice as fast as MKL; torch offers
        that choice only through the tensors' layout, for which autograd knows no gradients.
        """
        if not name.endswith("_proj.weight"):  # norms and the router
            return stored.to(self.device).float()
        moved = (rounding(stored) if rounding else stored).to(self.device)
        if self.bf16:
            return moved.bfloat16()
        on_cpu = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        return moved.float().to_mkldnn() if on_cpu and not self.autograd else moved.float()


def load_common(
    checkpoint: Checkpoint, layer: int, kernel: Kernel, rounding: Rounding | None = None
) -> dict[str, Tensor]:
    """What every token of a layer passes through: all its tensors but the routed experts'.

    Raises:
        CheckpointError: a tensor is missing or unreadable.
    """
    prefix = f"model.layers.{layer}."
    return {
        source.removeprefix(prefix): kernel.ready(source, read_tensor(checkpoint, source), rounding)
        for spec in inventory(checkpoint.config)
        if spec.layer == layer and spec.role != "routed"
        for source in spec.sources
    }


def read_experts(checkpoint: Checkpoint, layer: int) -> Iterator[dict[str, Tensor]]:
    """The matrices of each routed expert in turn, as stored; the next ones are read meanwhile.

    Raises:
        CheckpointError: a tensor is missing or unreadable.
    """
    prefix = f"model.layers.{layer}."

    def read(expert: int) -> dict[str, Tensor]:
        names = (f"mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down"))
        return {name: read_tensor(checkpoint, prefix + name) for name in names}

    ahead: deque[Future[dict[str, Tensor]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for expert in range(checkpoint.config.n_routed_experts + _READ_AHEAD):
            if expert < checkpoint.config.n_routed_experts:
                ahead.append(reader.submit(read, expert))
            if expert >= _READ_AHEAD:
                yield ahead.popleft().result()


def load_outer(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What belongs to no layer: embedding, last norm and head, under their full names."""
    return {
        stacked_name(spec): _read(checkpoint, spec)
        for spec in inventory(checkpoint.config)
        if spec.layer is None
    }


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor as it is stored.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    piece = checkpoint.locate(name)
    tensor = torch.empty(piece.shape, dtype=_DTYPES[piece.dtype])
    raw = tensor.view(-1).view(torch.uint8).numpy()
    try:
        with open(piece.file, "rb") as file:
            read_exactly(file.fileno(), raw, piece.offset, piece.file)
    except OSError as error:
        raise CheckpointError(f"cannot read {piece.file}: {error.strerror}") from None
    return tensor


def head_name(config: Dots1Config) -> str:
    """The tensor that the head is: the embedding, where they are tied."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


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
