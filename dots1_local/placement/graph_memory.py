"""The size of llama.cpp's compute buffers, computed as llama.cpp reserves them but without tensors.

llama.cpp builds the graph of the largest ubatch, gives every node a device and inserts copies
between devices (`ggml_backend_sched_split_graph`). Its allocator (`ggml_gallocr`) then puts each
node into the smallest gap that holds it, or in the place of a source that it may overwrite, and
frees sources after their last use. Every device is assumed to support every operation.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import CPU
from dots1_local.placement.ubatch_graph import Node, PlacedLayer, UbatchGraph, UbatchShape

__all__ = ["CUDA", "LLAMA_MIN_BATCH", "reserved_buffers"]

CUDA = ("CUDA", "ROCm", "MUSA")  # names of ggml-cuda's devices in its different builds
LLAMA_MIN_BATCH = 32  # GGML_OP_OFFLOAD_MIN_BATCH if nothing sets it
_SMALL = 32  # in smaller ubatches, norms are computed on the device of their layer
_ALIGNMENT = 128  # bytes; CUDA's, and other backends need less
_COPIES = 4  # of each tensor that devices pass on, if they work on several ubatches at once


@lru_cache(maxsize=4096)
def reserved_buffers(
    config: Dots1Config,
    layers: tuple[PlacedLayer, ...],
    ubatch: UbatchShape,
    *,
    gpu: str | None = None,
    min_batch: int = LLAMA_MIN_BATCH,
    offloaded: bool = False,
    pipelined: bool = False,
) -> Mapping[str, int]:
    """Bytes of the compute buffer of each device; the last of `layers` is the output layer.

    `gpu` copies weights from RAM to itself for operations on at least `min_batch` rows. `offloaded`
    says that no layer is on the CPU. `pipelined` says that the devices work on several ubatches at
    once; CUDA, Vulkan, Metal and RPC devices can, because they have events.
    """
    pinned = offloaded or ubatch.tokens < _SMALL
    graph = UbatchGraph(config, layers, ubatch, pinned)
    _assign_devices(graph.nodes, gpu, min_batch)
    return _BufferAllocator(graph.inputs, _with_copies(graph.nodes), pipelined).sizes()


def _assign_devices(nodes: Sequence[Node], gpu: str | None, min_batch: int) -> None:
    """Give each node a device: that of its weight, or else that of a neighbour, GPUs first.

    `gpu` takes operations of at least `min_batch` rows with a weight that it may copy.
    """
    for node in nodes:
        for source in node.sources:
            if node.device is None and source.weight is not None:
                fetches = source.weight.fetched and node.rows >= min_batch
                node.device = gpu if gpu and fetches else source.device
    for skip_cpu in (True, False):
        for order in (nodes, nodes[::-1]):
            _spread_devices(order, skip_cpu)


def _spread_devices(nodes: Sequence[Node], skip_cpu: bool) -> None:
    """Give nodes without a device that of the node before them."""
    current = None
    for node in nodes:
        if node.device is None:
            node.device = current
        else:
            current = None if skip_cpu and node.device == CPU else node.device


def _with_copies(nodes: Sequence[Node]) -> list[Node]:
    """All nodes in order; the copies that a split needs come before its first node.

    A split ends where the device changes. It also ends where an operation needs a weight from
    another device and the split already has copies, so that the memory of the last copied weight
    can be reused. Nodes get copies in place of sources on other devices.
    """
    scheduled: list[Node] = []
    start, device, has_copies = 0, CPU, False
    copies: dict[tuple[Node, str], Node] = {}
    for node in nodes:
        assert node.device is not None
        foreign = [source for source in node.sources if source.device != node.device]
        if node.device != device or (has_copies and any(source.weight for source in foreign)):
            start, device, has_copies = len(scheduled), node.device, False
        for source in foreign:
            if (source, device) not in copies:
                copy = Node(source.size, (source,), device, is_copy=True)
                copies[source, device] = copy
                scheduled.insert(start, copy)
                start, has_copies = start + 1, True
        if foreign:
            node.sources = tuple(copies.get((each, device), each) for each in node.sources)
        scheduled.append(node)
    return scheduled


class _FreeList:
    """Gaps in the memory of a device as [offset, end] pairs; memory after `size` was never used."""

    def __init__(self) -> None:
        self.size = 0
        self._gaps: list[list[int]] = []  # all gaps but the last one, which has no end
        self._last = 0  # offset of the last gap

    def take(self, size: int) -> int:
        """Take `size` bytes from the smallest gap, the last of equals, and return the offset."""
        best = None
        for gap in self._gaps:
            room = gap[1] - gap[0]
            if room >= size and (best is None or room <= best[1] - best[0]):
                best = gap
        if best is None:
            offset = self._last
            self._last += size
            self.size = max(self.size, self._last)
            return offset
        offset = best[0]
        best[0] += size
        if best[0] == best[1]:
            self._gaps.remove(best)
        return offset

    def give(self, offset: int, size: int) -> None:
        """Free `size` bytes at `offset`, and join gaps that touch."""
        end, gaps = offset + size, self._gaps
        index = sum(gap[0] < offset for gap in gaps)
        if index and gaps[index - 1][1] == offset:
            index -= 1
            offset = gaps.pop(index)[0]
        if index < len(gaps) and gaps[index][0] == end:
            end = gaps.pop(index)[1]
        if end == self._last:
            self._last = offset
        else:
            gaps.insert(index, [offset, end])


class _BufferAllocator:
    """Allocates the nodes of one graph."""

    def __init__(self, inputs: Sequence[Node], nodes: Sequence[Node], pipelined: bool) -> None:
        self._nodes, self._pipelined = nodes, pipelined
        self._memory: defaultdict[str, _FreeList] = defaultdict(_FreeList)
        self._offsets: dict[Node, int] = {}  # of nodes that have memory and will be freed
        copies = [node for node in nodes if node.is_copy] if pipelined else []
        for node in (*inputs, *copies):
            self._place(node, lasting=pipelined)
        self._uses = Counter(source for node in nodes for source in node.sources)
        self._kept: dict[Node, tuple[Node, ...]] = {}
        for node in nodes:
            if node.kept is not None and (node.device or "").startswith(CUDA):
                # CUDA fuses these operations (ggml_backend_cuda_graph_optimize)
                self._kept[node.kept] = node.sources
                self._uses.update(node.sources)

    def sizes(self) -> dict[str, int]:
        """Allocate all nodes, and return the bytes that each device needs."""
        for node in self._nodes:
            if not (node.is_copy and self._pipelined) and not self._overwrites(node):
                self._place(node)
            for source in (*node.sources, *self._kept.get(node, ())):
                self._uses[source] -= 1
                if not self._uses[source] and source in self._offsets:
                    memory = self._memory[source.device or CPU]
                    memory.give(self._offsets.pop(source), _bytes(source))
        return {device: memory.size for device, memory in self._memory.items()}

    def _overwrites(self, node: Node) -> bool:
        """Let the node take over the memory of a source that no other node needs, if it may."""
        for source in node.sources if node.inplace else ():
            if source.size == node.size and self._uses[source] == 1 and source in self._offsets:
                self._offsets[node] = self._offsets.pop(source)
                return True
        return False

    def _place(self, node: Node, *, lasting: bool = False) -> None:
        size = _bytes(node)
        if lasting:
            for _ in range(_COPIES):
                self._memory[node.device or CPU].take(size)
        elif size:
            self._offsets[node] = self._memory[node.device or CPU].take(size)


def _bytes(node: Node) -> int:
    size = node.size
    if node.extra and (node.device or "").startswith(CUDA):
        size += node.extra
    return -(-size // _ALIGNMENT) * _ALIGNMENT
