"""What llama.cpp computes for a token, in its order: as operations, bytes by layer, work by device.

Operations are grouped around one weight each. Their order and their numbers of nodes are those of
llama.cpp's graph of dots1; views are not counted.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import CPU
from dots1_local.errors import GGUFError
from dots1_local.files.gguf import GGUFFile, GGUFTensor

__all__ = [
    "LayerSizes", "MatrixProduct", "ModelGraph", "ModelOp", "UbatchWork", "count_work", "is_routed",
    "matrix_product",
]  # fmt: skip

_ATTENTION = "attention"  # the operation that reads the KV cache

_BEFORE_KV = (
    ("attn_norm", 2), ("attn_q", 1), ("attn_q_norm", 3), ("attn_v", 1), ("attn_k", 1),
    ("attn_k_norm", 3),
)  # fmt: skip
_AFTER_KV = (("attn_output", 2), ("ffn_norm", 2))
_DENSE = (("ffn_up", 1), ("ffn_gate", 2), ("ffn_down", 2))
_ROUTER = (("ffn_gate_inp", 9),)
_ROUTED = (("ffn_up_exps", 1), ("ffn_gate_exps", 2), ("ffn_down_exps", 1))
_SHARED = (("ffn_up_shexp", 1), ("ffn_gate_shexp", 2), ("ffn_down_shexp", 3))
_FINAL = (("output_norm", 2), ("output", 1))
_BLOCK = re.compile(r"blk\.(\d{1,4})\.")


@dataclass(frozen=True)
class ModelOp:
    """A weight, the number of graph `nodes` around it, and the `output` floats of each token.

    `weights` counts matrix elements, of all experts, in rows of `columns`; it is 0 for attention
    and norms. What comes after the last attention is only computed `for_logits`: for the tokens
    whose logits are wanted.
    """

    name: str
    part: str
    layer: int
    type: str
    nbytes: int
    columns: int
    weights: int
    nodes: int
    output: int
    for_logits: bool


@dataclass(frozen=True)
class ModelGraph:
    """A model's operations in llama.cpp's order, and its tensors by layer and part.

    The last of `layers` is the output layer, and the embedding is in none. The model is the file
    `path`, or its first shard, which takes `nbytes` with all others.
    """

    path: Path
    nbytes: int
    config: Dots1Config
    tensors: tuple[GGUFTensor, ...]
    ops: tuple[ModelOp, ...]
    layers: tuple[Mapping[str, GGUFTensor], ...]

    @classmethod
    def read(cls, gguf: GGUFFile) -> "ModelGraph":
        """Read the graph of a file's model.

        Raises:
            GGUFError: the file has another architecture, or lacks keys or tensors.
        """
        config = Dots1Config.from_gguf(gguf.keys, gguf.files[0])
        return cls.of(gguf.files[0], gguf.nbytes, config, gguf.tensors)

    @classmethod
    def of(
        cls, path: Path, nbytes: int, config: Dots1Config, tensors: Sequence[GGUFTensor]
    ) -> "ModelGraph":
        """The graph of a model with these tensors, whose file need not exist yet.

        Raises:
            GGUFError: a tensor is missing.
        """
        layers: list[dict[str, GGUFTensor]] = [{} for _ in range(config.num_hidden_layers + 1)]
        for tensor in tensors:
            block = _BLOCK.match(tensor.name)
            part = tensor.name.rsplit(".", 1)[0].rsplit(".", 1)[-1]
            if part != "token_embd" and not tensor.name.endswith("scale"):
                layers[min(int(block[1]), len(layers) - 1) if block else -1][part] = tensor
        try:
            ops = tuple(_ops(config, layers))
        except KeyError as error:
            raise GGUFError(
                f"{path} has no tensor {error.args[0]}; run dots1 verify on it"
            ) from None
        return cls(path, nbytes, config, tuple(tensors), ops, tuple(layers))


def is_routed(part: str) -> bool:
    """Whether `part` holds routed experts, a few of which each token uses."""
    return part.endswith("_exps")


def _ops(config: Dots1Config, layers: Sequence[Mapping[str, GGUFTensor]]) -> Iterator[ModelOp]:
    inner, used = config.num_attention_heads * config.head_dim, config.num_experts_per_tok

    def op(layer: int, part: str, nodes: int) -> ModelOp:
        prefix = f"blk.{layer}." if layer < config.num_hidden_layers else ""
        if part not in layers[layer]:
            raise KeyError(f"{prefix}{part}.weight")
        tensor = layers[layer][part]
        is_matrix, times = len(tensor.shape) > 1, used if is_routed(part) else 1
        # The router's output is not passed on: experts get what the router gets.
        rows = tensor.shape[-2] if is_matrix and part != "ffn_gate_inp" else config.hidden_size
        if part == "ffn_down_exps":
            nodes += used  # the experts' outputs are weighted and added up
        weights = tensor.elements if is_matrix else 0
        last = layer >= config.num_hidden_layers - 1 and not part.startswith("attn_")
        return ModelOp(
            tensor.name, part, layer, tensor.type, tensor.nbytes, tensor.shape[-1], weights, nodes,
            times * rows, last,
        )  # fmt: skip

    for layer in range(config.num_hidden_layers):
        for part, nodes in _BEFORE_KV:
            yield op(layer, part, nodes)
        yield ModelOp("", _ATTENTION, layer, "", 0, 0, 0, 3, inner, for_logits=False)
        feed_forward = _DENSE if config.is_dense(layer) else (*_ROUTER, *_ROUTED, *_SHARED)
        for part, nodes in (*_AFTER_KV, *feed_forward):
            yield op(layer, part, nodes)
    for part, nodes in _FINAL:
        yield op(config.num_hidden_layers, part, nodes)


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of each layer; the last layer is the output, `kv` is the KV cache of one block.

    `always` is what every token reads: all weights but routed experts. `output` is the part of
    `always` that is `attn_output`. `experts` gives the routed experts by part. `order` lists the
    blocks in the order in which their experts get the memory of GPUs.
    """

    always: Sequence[int]
    output: Sequence[int]
    experts: Sequence[Mapping[str, int]]
    kv: int
    order: Sequence[int]

    @classmethod
    def of(cls, graph: ModelGraph, kv: int, order: Sequence[int]) -> "LayerSizes":
        """The sizes of a model whose KV cache takes `kv` bytes for each block."""
        always, output, experts = [], [], []
        for layer in graph.layers:
            routed = {part: each.nbytes for part, each in layer.items() if is_routed(part)}
            always.append(sum(each.nbytes for each in layer.values()) - sum(routed.values()))
            output.append(layer["attn_output"].nbytes if "attn_output" in layer else 0)
            experts.append({part.split("_")[1]: nbytes for part, nbytes in routed.items()})
        return cls(always, output, experts, kv, order)

    def without_weights(self, count: int) -> "LayerSizes":
        """The same sizes, but the first `count` layers have only their KV cache."""
        always = [0] * count + list(self.always[count:])
        experts: list[Mapping[str, int]] = [{}] * count
        return replace(self, always=always, experts=[*experts, *self.experts[count:]])

    @property
    def blocks(self) -> int:
        return len(self.always) - 1

    @cached_property
    def needed(self) -> list[int]:
        """Cumulative bytes of the layers before each one, without routed experts."""
        kv = [*([self.kv] * self.blocks), 0]
        return [0, *accumulate(a + b for a, b in zip(self.always, kv, strict=True))]

    @cached_property
    def whole(self) -> list[int]:
        """Cumulative bytes of the layers before each one, with all their experts."""
        experts = [0, *accumulate(sum(parts.values()) for parts in self.experts)]
        return [a + b for a, b in zip(self.needed, experts, strict=True)]


class MatrixProduct(NamedTuple):
    """A matrix product on a device; the weight may be in RAM and `fetched` by a GPU."""

    device: str
    type: str
    nbytes: int
    columns: int
    weights: int
    routed: bool
    in_ram: bool
    fetched: bool
    for_logits: bool


@dataclass(frozen=True)
class UbatchWork:
    """All work of a ubatch, counted by device.

    `attention` counts layers by device and by whether the KV cache is copied there, `crossings`
    transfers by device, floats of each token, and whether they are only made for logits.
    """

    products: Mapping[MatrixProduct, int]
    nodes: Mapping[str, int]
    splits: Mapping[str, int]
    crossings: Mapping[tuple[str, int, bool], int]
    attention: Mapping[tuple[str, bool], int]


def count_work(
    graph: ModelGraph,
    devices: Sequence[str],
    kv_devices: Sequence[str],
    gpu: str | None = None,
    unfetched: Sequence[str] = (),
    only: Sequence[str] = (),
) -> UbatchWork:
    """Count the work of a ubatch.

    `devices` hold the weight of each operation, `kv_devices` the KV cache of each layer. `gpu`
    copies weights from RAM, except the types `unfetched`; if `only` is given, only these parts.
    """
    products: Counter[MatrixProduct] = Counter()
    attention: Counter[tuple[str, bool]] = Counter()
    nodes: Counter[str] = Counter()
    runs: list[tuple[str, ModelOp]] = []
    for index, op in enumerate(graph.ops):
        if op.part == _ATTENTION:
            output, kv = devices[index + 1], kv_devices[op.layer]
            device, copied = _attention_device(kv, output, None if only else gpu)
            attention[device, copied] += 1
        else:
            wanted = (not only or op.part in only) and op.type not in unfetched
            product = matrix_product(op, devices[index], gpu if wanted else None)
            device = product.device
            if op.weights:
                products[product] += 1
        nodes[device] += op.nodes
        runs.append((device, op))
    splits, crossings = _device_changes(runs, graph.config.hidden_size)
    if gpu is not None:  # each fetched matrix begins a split of its own
        splits[gpu] += sum(count for product, count in products.items() if product.fetched)
    return UbatchWork(products, nodes, splits, crossings, attention)


def matrix_product(op: ModelOp, home: str, gpu: str | None = None) -> MatrixProduct:
    """The product with the weight of `op` on the device `home`; `gpu` copies it from RAM.

    What is only computed for logits has too few rows to be copied.
    """
    routed = is_routed(op.part)
    fetched = home == CPU and gpu is not None and not op.for_logits
    device = gpu if fetched and gpu else home
    return MatrixProduct(
        device, op.type, op.nbytes, op.columns, op.weights, routed, home == CPU, fetched,
        op.for_logits,
    )  # fmt: skip


def _attention_device(kv: str, output: str, gpu: str | None) -> tuple[str, bool]:
    """Where a layer computes attention, and whether its KV cache is copied there from RAM."""
    if kv != CPU:
        return kv, False
    device = gpu if gpu and output == CPU else output  # where `attn_output` is multiplied
    return device, device != CPU


def _device_changes(
    runs: Sequence[tuple[str, ModelOp]], hidden: int
) -> tuple[Counter[str], Counter[tuple[str, int, bool]]]:
    """Splits by device, and transfers between two devices as `UbatchWork.crossings` counts them.

    A GPU adds up its experts' outputs before it passes them on; the CPU does not.
    """
    splits = Counter([CPU])  # the embedding's
    crossings: Counter[tuple[str, int, bool]] = Counter()
    before, floats, for_logits = CPU, hidden, False
    for device, group in groupby(runs, key=lambda run: run[0]):
        if device != before:
            splits[device] += 1
            crossings.update((name, floats, for_logits) for name in (before, device) if name != CPU)
        last = list(group)[-1][1]
        before, for_logits = device, last.for_logits
        floats = hidden if device != CPU and last.part == "ffn_down_exps" else last.output
    return splits, crossings
