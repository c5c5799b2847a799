"""dots1 in torch: the whole model, and its weights read from a checkpoint.

Weights are read one layer, or one routed expert, at a time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.architecture import Dots1Config, TensorSpec, inventory
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.safetensors import read_exactly
from dots1_local.reference.layers import Observer, Weights, layer_forward, rms_norm

__all__ = [
    "Compute", "Rounding", "forward", "head_name", "load_common", "load_layer", "load_layers",
    "load_outer", "logits", "read_experts", "read_tensor", "stacked_name",
]  # fmt: skip

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READ_AHEAD = 2  # experts; at the real width one is 35 MB

Rounding = Callable[[Tensor], Tensor]
"""Maps a stored matrix [rows, columns], or some of its rows, to the F32 matrix to compute with."""


def forward(
    tokens: Tensor,
    outer: Weights,
    layers: Iterable[Weights],
    config: Dots1Config,
    observe: Observer | None = None,
) -> Tensor:
    """Logits [batch, positions, vocabulary] for `tokens` [batch, positions].

    `outer` holds embedding, last norm and head, as `load_outer` returns them. `observe` is called
    with the full Hugging Face names of the layers' matrices.
    """
    x = F.embedding(tokens, outer["model.embed_tokens.weight"]).float()
    for layer, weights in enumerate(layers):
        x = layer_forward(x, weights, config, layer, _in_layer(layer, observe))
        del weights  # otherwise it stays in memory while the next layer is read
    x = rms_norm(x, outer["model.norm.weight"], config.rms_norm_eps)
    return F.linear(x, outer[head_name(config)])


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


def load_layers(checkpoint: Checkpoint) -> Iterator[dict[str, Tensor]]:
    """Read every layer in turn; a layer's memory is free once the caller drops it."""
    for layer in range(checkpoint.config.num_hidden_layers):
        yield load_layer(checkpoint, layer)


def load_layer(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    """One layer's tensors in F32, named and stacked as `layers` describes.

    Raises:
        CheckpointError: a tensor is missing or unreadable.
    """
    prefix = f"model.layers.{layer}."
    return {
        stacked_name(spec).removeprefix(prefix): _read(checkpoint, spec)
        for spec in inventory(checkpoint.config)
        if spec.layer == layer
    }


def load_outer(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Embedding, last norm and head in F32, under their full names."""
    return {
        stacked_name(spec): _read(checkpoint, spec)
        for spec in inventory(checkpoint.config)
        if spec.layer is None
    }


def stacked_name(spec: TensorSpec) -> str:
    """The reference's name of a tensor: `...mlp.experts.up_proj` for all the experts'
    `...mlp.experts.N.up_proj.weight`, and the checkpoint's name otherwise."""
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


@dataclass(frozen=True)
class Compute:
    """How a layer is computed: the device, whether matrices are multiplied in BF16 instead of F32,
    and whether autograd must be possible."""

    device: torch.device
    bf16: bool = False
    autograd: bool = False

    def prepare(self, name: str, stored: Tensor, rounding: Rounding | None = None) -> Tensor:
        """Move a stored tensor to the device and to the right type; `rounding` is applied to
        matrices before.

        On a CPU, F32 matrices go to oneDNN, which is twice as fast as MKL on AMD's. torch offers
        that only through a layout of the tensor for which autograd has no gradients.
        """
        if not name.endswith("_proj.weight"):  # norms and the router
            return stored.to(self.device).float()
        moved = (rounding(stored) if rounding else stored).to(self.device)
        if self.bf16:
            return moved.bfloat16()
        on_cpu = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        return moved.float().to_mkldnn() if on_cpu and not self.autograd else moved.float()


def load_common(
    checkpoint: Checkpoint, layer: int, compute: Compute, rounding: Rounding | None = None
) -> dict[str, Tensor]:
    """All tensors of a layer except the routed experts, prepared for `compute`.

    Raises:
        CheckpointError: a tensor is missing or unreadable.
    """
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): compute.prepare(name, read_tensor(checkpoint, name), rounding)
        for spec in inventory(checkpoint.config)
        if spec.layer == layer and spec.role != "routed"
        for name in spec.sources
    }


def read_experts(checkpoint: Checkpoint, layer: int) -> Iterator[dict[str, Tensor]]:
    """The matrices of each routed expert in turn, as stored; a thread reads the next ones.

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


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor as it is stored, or in F32 if it is stored with scales.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    piece = checkpoint.locate(name)
    if piece.scales is not None:
        return torch.from_numpy(checkpoint.read(name))
    tensor = torch.empty(piece.shape, dtype=_DTYPES[piece.dtype])
    raw = tensor.view(-1).view(torch.uint8).numpy()
    try:
        with open(piece.file, "rb") as file:
            read_exactly(file.fileno(), raw, piece.offset, piece.file)
    except OSError as error:
        raise CheckpointError(f"cannot read {piece.file}: {error.strerror}") from None
    return tensor


def head_name(config: Dots1Config) -> str:
    """The name of the head's matrix, which is the embedding if the two are tied."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
