"""On which device llama.cpp computes each node of a graph, and what it copies between devices.

This follows `ggml_backend_sched_split_graph` of ggml-backend.cpp. It takes for granted that a
device can do every operation of dots1 on every type.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dots1_local.runtime.devices.hardware import CPU
from dots1_local.runtime.placing.ubatch_graph import Graph, Node

__all__ = ["Step", "assign_devices", "split_graph"]


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
