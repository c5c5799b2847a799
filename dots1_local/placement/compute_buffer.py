"""The buffers that llama.cpp computes in, one a device, as large as it would reserve them.

Its graph for the largest ubatch is built, distributed and given memory in the way it does itself,
without tensors: `ubatch_graph`, `graph_splits`, `graph_memory`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, groupby, islice

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import CPU
from dots1_local.files.gguf import GGUFTensor
from dots1_local.placement.graph_memory import assign_devices, memory_of, split_graph
from dots1_local.placement.placement import Placement
from dots1_local.placement.ubatch_graph import Layer, Ubatch, Weight, build_graph

__all__ = ["REPACKED", "compute_buffers", "kv_cells", "layers_of", "reserved"]

_IN_BLOCK = re.compile(r"blk\.(\d{1,4})\.(\w+)")
_CELLS = 256  # llama.cpp rounds the context of a sequence up to a multiple of this
_MIN_BATCH = 32  # GGML_OP_OFFLOAD_MIN_BATCH, unless it is set
_SMALL = 32  # ubatches of fewer tokens leave norms to the device of their layer

# Backends that fetch weights from RAM for large batches (have an `offload_op`); RPC is not one.
_FETCHING = ("CUDA", "ROCm", "MUSA", "Vulkan", "SYCL", "MTL", "CANN")
# What the CPU's kernels may have repacked, so that no GPU can read it (ggml-cpu/repack.cpp).
REPACKED = ("Q4_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4")
_EQUAL_LAYERS = 3  # so many of a row of equal layers show the memory that all of them need


def kv_cells(context: int) -> int:
    """Tokens that the KV cache of a context really holds."""
    return -(-context // _CELLS) * _CELLS


def compute_buffers(
    config: Dots1Config,
    placement: Placement,
    tensors: Iterable[GGUFTensor],
    devices: Mapping[str, str],
    *,
    n_sequences: int = 1,
    n_outputs: int = 1,
) -> dict[str, int]:
    """The compute buffer of each device; `devices` is where the tensors are, by name.

    There are so many KV caches (`n_sequences`) as the placement has one; `n_outputs` tokens of a
    ubatch have logits, or at least one for each sequence. Weights that a GPU fetches from RAM for
    large batches lie there too. Layers differ by where their weights are, and by what has to be
    fetched; if they do so in a new order, this takes a millisecond for each few, and half of one
    where only their numbers are new.
    """
    used = placement.used_devices
    fetcher = next((name for name in used if name.startswith(_FETCHING)), None)
    weights = _weights(placement, tensors, devices, fetches=fetcher is not None)
    layers = layers_of(weights, [placement.device_of_layer(i) for i in range(placement.blocks + 1)])
    tokens = min(placement.ubatch, placement.tokens * n_sequences)
    sequences = placement.sequences * n_sequences
    ubatch = Ubatch(
        tokens=-(-tokens // sequences) * sequences,
        outputs=min(tokens, max(n_outputs, sequences)),
        streams=n_sequences,
        cells=kv_cells(placement.tokens),
        kv_type=placement.kv_type,
        flash_attention=placement.flash_attention,
    )
    sizes = reserved(
        config,
        layers,
        ubatch,
        fetcher=fetcher,
        min_batch=placement.offload_min_batch or _MIN_BATCH,
        offloaded=(offloaded := placement.gpu_layers > placement.blocks),
        pipelined=offloaded and len(placement.devices) > 1 and not placement.overrides,
    )
    return dict(sizes)


@lru_cache(maxsize=4096)
def reserved(
    config: Dots1Config,
    layers: tuple[Layer, ...],
    ubatch: Ubatch,
    *,
    fetcher: str | None = None,
    min_batch: int = _MIN_BATCH,
    offloaded: bool = False,
    pipelined: bool = False,
) -> Mapping[str, int]:
    """Bytes by device for these layers, the output layer being the last.

    `offloaded`: none of them is the CPU's; `pipelined`: the devices work on several ubatches at
    once. That takes devices with events, which CUDA, Vulkan, Metal and RPC have.
    """
    pinned = offloaded or ubatch.tokens < _SMALL
    graph = build_graph(config, layers, ubatch, pinned_norms=pinned)
    assign_devices(graph.nodes, fetcher, min_batch)
    return memory_of(graph, split_graph(graph), pipelined=pipelined)


def layers_of(weights: Iterable[tuple[str, Weight]], kv: Sequence[str]) -> tuple[Layer, ...]:
    """The layers of a model by its weights, (name, weight) pairs, and the devices of the KV cache.

    The last of those is the output layer's. A few stand for each row of equal layers.
    """
    parts: list[list[tuple[str, Weight]]] = [[] for _ in kv]
    for name, weight in weights:
        layer, part = _place_of(name)
        if part != "token_embd":
            parts[min(layer, len(kv) - 1)].append((part, weight))
    layers = [Layer(device, tuple(own)) for device, own in zip(kv, parts, strict=True)]
    rows = (islice(row, _EQUAL_LAYERS) for _, row in groupby(layers[:-1]))
    return (*chain.from_iterable(rows), layers[-1])


def _weights(
    placement: Placement,
    tensors: Iterable[GGUFTensor],
    devices: Mapping[str, str],
    *,
    fetches: bool,
) -> Iterable[tuple[str, Weight]]:
    repacks = placement.host_memory == "repacked"
    lasting = {device: Weight(device) for device in devices.values()}
    for tensor in tensors:
        device = devices[tensor.name]
        if fetches and device == CPU and not (repacks and tensor.type in REPACKED):
            yield tensor.name, Weight(CPU, tensor.nbytes, fetched=True)
        else:
            yield tensor.name, lasting[device]


@lru_cache(maxsize=1 << 16)
def _place_of(name: str) -> tuple[int, str]:
    """The block (a huge one for what is in none) and part of a tensor by its GGUF name."""
    match = _IN_BLOCK.match(name)
    return (int(match[1]), match[2]) if match else (1 << 30, name.partition(".")[0])
