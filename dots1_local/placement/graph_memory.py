"""On which device llama.cpp computes each node of a graph, and what it copies between devices.

This follows `ggml_backend_sched_split_graph` of ggml-backend.cpp. It takes for granted that a
device can do every operation of dots1 on every type.

How much memory llama.cpp's allocator takes for a graph.

`ggml_gallocr` (ggml-alloc.c) walks through the nodes once, gives each the smallest gap that holds
it, or the place of what it replaces, and takes the space back after its last use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dots1_local.devices.hardware import CPU
from dots1_local.placement.ubatch_graph import Graph, Node

__all__ = [
    "CUDA",
    "Step",
    "assign_devices",
    "memory_of",
    "split_graph",
]


@dataclass(slots=True)
class Step:
    """One node in order of execution and what it reads, copies in the place of what was copied.

    A copy is a node of its own that reads what it is a copy of.
    """

    node: Node
    sources: tuple[Node, ...]
    is_copy: bool = False


def assign_devices(nodes: Sequence[Node], fetcher: str | None, min_batch: int) -> None:
    """Give each node a device.

    Operations with a weight are computed where that lies, or on the device `fetcher` if that may
    fetch it and at least `min_batch` rows want it. Their neighbours follow them, GPUs first.
    """
    for node in nodes:
        if node.device is None:
            node.device = _device_by_weight(node, fetcher, min_batch)
    backwards = nodes[::-1]
    for order in (nodes, backwards):
        _expand(order, skip_cpu=True)
    for order in (nodes, backwards):
        _expand(order, skip_cpu=False)


def _device_by_weight(node: Node, fetcher: str | None, min_batch: int) -> str | None:
    for source in node.sources:
        if source.weight is not None:
            fetches = source.weight.fetched and node.rows >= min_batch
            return fetcher if fetcher and fetches else source.device
    return None


def _expand(nodes: Sequence[Node], *, skip_cpu: bool) -> None:
    current = None
    for node in nodes:
        if node.device is None:
            node.device = current
        else:
            current = None if skip_cpu and node.device == CPU else node.device


def split_graph(graph: Graph) -> list[Step]:
    """All nodes in order, each split's copies before its first node.

    A split ends where the device changes, and where an operation wants a weight from elsewhere
    while the split has copies already: so that the memory of the last weight can be used again.
    """
    steps: list[Step] = []
    start, device, has_copies = 0, CPU, False
    copies: dict[tuple[int, str], Node] = {}
    for node in graph.nodes:
        assert node.device is not None
        foreign = [source for source in node.sources if source.device != node.device]
        if node.device != device or (has_copies and any(source.weight for source in foreign)):
            start, device, has_copies = len(steps), node.device, False
        for source in foreign:
            if (id(source), device) not in copies:
                copy = Node(source.size, (source,), device)
                copies[id(source), device] = copy
                steps.insert(start, Step(copy, (source,), is_copy=True))
                start, has_copies = start + 1, True
        sources = node.sources
        if foreign:
            sources = tuple(copies.get((id(each), device), each) for each in sources)
        steps.append(Step(node, sources))
    return steps


CUDA = ("CUDA", "ROCm", "MUSA")  # how devices of ggml-cuda are called, whatever it is built for
_ALIGNMENT = 128  # CUDA's; others have less
_COPIES = 4  # of what devices hand on, where they work on several ubatches at once


def memory_of(graph: Graph, steps: Sequence[Step], *, pipelined: bool) -> dict[str, int]:
    """Bytes by device for the steps of a graph; `pipelined` devices hand on several copies."""
    return _Walk(graph, steps, pipelined).sizes()


class _Pool:
    """Gaps in the memory of a device, as [offset, end]; behind `size` nothing was ever used."""

    def __init__(self) -> None:
        self.size = 0
        self._gaps: list[list[int]] = []  # those before the last one, which has no end
        self._last = 0  # where that begins

    def take(self, size: int) -> int:
        """The offset of the smallest gap, the last of equals, that holds `size` bytes."""
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
        """Take it back; gaps that touch become one."""
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


class _Walk:
    """One walk through the steps of a graph."""

    def __init__(self, graph: Graph, steps: Sequence[Step], pipelined: bool) -> None:
        self._steps, self._pipelined = steps, pipelined
        self._pools: dict[str, _Pool] = {}
        self._offsets: dict[Node, int] = {}  # of what has memory and will be freed
        self._uses: dict[Node, int] = {}
        self._kept: dict[Node, tuple[Node, ...]] = {}
        for node in graph.inputs:
            self._place(node, lasting=pipelined)
        if pipelined:
            for step in steps:
                if step.is_copy:
                    self._place(step.node, lasting=True)
        self._count_uses()

    def sizes(self) -> dict[str, int]:
        for step in self._steps:
            node = step.node
            if not (step.is_copy and self._pipelined) and not self._overwrites(step):
                self._place(node)
            for source in (*step.sources, *self._kept.get(node, ())):
                self._uses[source] -= 1
                if not self._uses[source] and source in self._offsets:
                    self._pool(source).give(self._offsets.pop(source), _bytes(source))
        return {device: pool.size for device, pool in self._pools.items()}

    def _count_uses(self) -> None:
        uses = self._uses
        for step in self._steps:
            for source in step.sources:
                uses[source] = uses.get(source, 0) + 1
            kept = step.node.kept
            if kept is not None and (step.node.device or "").startswith(CUDA):
                # CUDA computes all of this at once (ggml_backend_cuda_graph_optimize)
                self._kept[kept] = step.sources
                for source in step.sources:
                    uses[source] += 1

    def _overwrites(self, step: Step) -> bool:
        """Whether the node took the place of a source that nobody else needs."""
        if step.node.inplace:
            for source in step.sources:
                if (
                    source.size == step.node.size
                    and self._uses[source] == 1
                    and source in self._offsets
                ):
                    self._offsets[step.node] = self._offsets.pop(source)
                    return True
        return False

    def _place(self, node: Node, *, lasting: bool = False) -> None:
        size = _bytes(node)
        if lasting:
            for _ in range(_COPIES):
                self._pool(node).take(size)
        elif size:
            self._offsets[node] = self._pool(node).take(size)

    def _pool(self, node: Node) -> _Pool:
        device = node.device or CPU
        if device not in self._pools:
            self._pools[device] = _Pool()
        return self._pools[device]


def _bytes(node: Node) -> int:
    size = node.size
    if node.extra and (node.device or "").startswith(CUDA):
        size += node.extra
    return -(-size // _ALIGNMENT) * _ALIGNMENT
