"""How much memory llama.cpp's allocator takes for a graph.

`ggml_gallocr` (ggml-alloc.c) walks through the nodes once, gives each the smallest gap that holds
it, or the place of what it replaces, and takes the space back after its last use.
"""

from collections.abc import Sequence

from dots1_local.runtime.devices.hardware import CPU
from dots1_local.runtime.placing.graph_splits import Step
from dots1_local.runtime.placing.ubatch_graph import Graph, Node

__all__ = ["CUDA", "memory_of"]

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
