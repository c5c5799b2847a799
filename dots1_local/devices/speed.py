"""How fast a device computes the operations of dots.llm1, in graphs of that model's shapes.

The engine's own kernels are timed on random weights: experts of 4096 x 1408, six of them for each
token, and attention with 32 heads. Weights come from memory as in decoding, where consecutive
tokens use different experts: a measurement reads more weights than caches hold.
"""

from collections.abc import Callable, Collection, Iterable
from functools import cache
from itertools import count
from math import prod

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import padded_width
from dots1_local.devices.backends import DeviceInfo
from dots1_local.devices.bench_graph import (
    F16,
    F32,
    HEAD_DIM,
    I8,
    I32,
    BenchDevice,
    BenchGraph,
    pinned_memory,
)
from dots1_local.devices.hardware import LONG_ROW, SHORT_ROW, Rate, Speed
from dots1_local.errors import Dots1Error
from dots1_local.ggml import KV_TYPES, TYPES, QuantType, quant_type
from dots1_local.progress import Progress, silent
from dots1_local.quant.encode import encode

__all__ = ["measure_speed"]

_HIDDEN, _WIDTH, _USED, _EXPERTS, _HEADS = LONG_ROW, SHORT_ROW, 6, 128, 32
_ROWS_OF_EXPERT = 24  # in prefill: 512 tokens use 6 of 128 experts each
_MIN_EXPERTS = 8  # a device must have room for these
_BYTES = 1 << 29  # more than caches hold
_MIN_SECONDS = 0.02  # of work, which hides the time that a device takes to start
_PATTERN = 1 << 16  # weights that are repeated
_LONG_CACHE, _SHORT_CACHE = 4096, 1024  # tokens
_TILE, _UBATCH = 64, 512  # queries; for less than a tile the CPU uses other kernels
_UPLOADS = (1 << 20, 1 << 23, 1 << 26)
# A worker does not say which types its devices lack, and dies when asked for one.
_COMMON_KV_TYPES = ("F32", "F16", "Q8_0", "Q4_0")


def measure_speed(
    device: DeviceInfo,
    threads: int,
    progress: Progress = silent,
    types: Collection[str] = tuple(TYPES),
) -> Speed:
    """Measure a device, which takes half a minute or less; the CPU computes with `threads`.

    Of types of weights, only `types` are measured.

    Raises:
        Dots1Error: the device has too little memory left, computes nothing, or failed.
    """
    extra = device.extra_buffer_types if device.kind == "cpu" else ()
    kv_types = _COMMON_KV_TYPES if device.backend == "RPC" else KV_TYPES
    total = len(types) * (1 + len(extra)) + len(kv_types) + 1
    steps = count()

    def step(what: str) -> None:
        """Report what is measured next: the first time, a GPU's driver compiles kernels for it."""
        progress(next(steps), total, "measurements", f"{device.name} {what}")

    nbytes = max(min(_BYTES, device.free // 4), _MIN_EXPERTS * 4 * _HIDDEN * _WIDTH)
    step("overheads")
    with BenchDevice(device.name, nbytes, threads=threads) as bench:
        node, split = _overheads(bench)
        upload, pageable = (0.0, 0.0) if device.kind == "cpu" else _uploads(bench, device.name)
        attention = _rates(kv_types, lambda kind: _attention(bench, kind, node), step)
        matmul = _rates(types, lambda kind: _matmul(bench, kind, node), step)
    repacked: dict[str, Rate] = {}
    for memory in extra:
        with BenchDevice(device.name, nbytes, threads=threads, memory=memory) as bench:
            rates = _rates(types, lambda kind: _matmul(bench, kind, node), step)
        repacked = rates | repacked
    if not matmul:
        raise Dots1Error(f"{device.name} cannot multiply matrices of any type; hide the device")
    bandwidth = max(rate.decode * TYPES[name].bpw / 8 for name, rate in matmul.items())
    return Speed(bandwidth, matmul, attention, node, split, upload, pageable, repacked)


def _rates(
    names: Iterable[str], rate_of: Callable[[QuantType], Rate | None], step: Callable[[str], None]
) -> dict[str, Rate]:
    """The rates of the types that the device can compute."""
    rates = {}
    for name in names:
        step(name)
        if (rate := rate_of(quant_type(name))) is not None:
            rates[name] = rate
    return rates


def _matmul(bench: BenchDevice, kind: QuantType, node: float) -> Rate | None:
    """Rates of routed experts and, as `dense`, of a plain matrix; None if the device cannot."""
    decode = _decode(bench, kind, (_HIDDEN, _WIDTH), node)
    width = _WIDTH if kind.fits(_WIDTH) else padded_width(_WIDTH)
    short = _decode(bench, kind, (width, _HIDDEN), node)
    fitting = _n_fitting(bench, kind, (_HIDDEN, _WIDTH))
    experts = _throughput(
        lambda n: _prefill_experts(bench, kind, n), min(_MIN_EXPERTS, fitting), fitting
    )
    tokens = _throughput(lambda n: _dense(bench, kind, n), _TILE, _UBATCH)
    if decode is None or experts is None or tokens is None:
        return None
    matrix = _HIDDEN * _WIDTH
    return Rate(decode, experts * _ROWS_OF_EXPERT * matrix, tokens * matrix, short)


def _throughput(seconds: Callable[[int], float | None], least: int, most: int) -> float | None:
    """Items a second, for the smallest number of items at once that takes long enough."""
    size = least
    while (taken := seconds(size)) is not None:
        if taken > _MIN_SECONDS or 2 * size > most:
            return size / taken
        size *= 2
    return None


def _decode(
    bench: BenchDevice, kind: QuantType, shape: tuple[int, int], node: float
) -> float | None:
    """Multiply-adds a second of single tokens, each of which uses experts of its own.

    The `shape` of an expert is (columns, rows).
    """
    n_experts = _n_fitting(bench, kind, shape)
    n_tokens = max(n_experts // _USED, 1)
    used = n_tokens * _USED
    order = np.random.default_rng(0).permutation(used).astype(np.int32) % n_experts
    chosen = list(order.reshape(n_tokens, 1, _USED))
    seconds = _experts(bench, kind, shape, n_experts, chosen)
    if seconds is None:
        return None
    return used * prod(shape) / max(seconds - n_tokens * node, seconds / 2)


def _prefill_experts(bench: BenchDevice, kind: QuantType, n_experts: int) -> float | None:
    """Seconds of experts that as many tokens use as in prefill."""
    n_tokens = n_experts * _ROWS_OF_EXPERT // _USED
    order = np.arange(n_tokens * _USED, dtype=np.int32) % n_experts
    chosen = [order.reshape(n_tokens, _USED)]
    return _experts(bench, kind, (_HIDDEN, _WIDTH), n_experts, chosen)


def _n_fitting(bench: BenchDevice, kind: QuantType, shape: tuple[int, int]) -> int:
    """How many experts fit, up to the number in a layer."""
    columns, rows = shape
    return min(_EXPERTS, bench.largest_tensor // (kind.row_bytes(columns) * rows))


def _experts(
    bench: BenchDevice,
    kind: QuantType,
    shape: tuple[int, int],
    n_experts: int,
    chosen: list[NDArray[np.int32]],
) -> float | None:
    """Seconds of a graph with a node for each array of `chosen` (tokens, experts of a token).

    All experts of a token read its activations, but each down projection has inputs of its own.
    """
    columns, n_tokens = shape[0], len(chosen[0])
    inputs = 1 if columns == _HIDDEN else _USED
    with BenchGraph(bench) as graph:
        weights = graph.weights(kind.ggml, *shape, n_experts)
        x = graph.tensor(F32, columns, inputs, n_tokens)
        ids = [graph.tensor(I32, _USED, n_tokens) for _ in chosen]
        for each in ids:
            graph.mul_mat_id(weights, x, each)
        if not graph.place():
            return None
        graph.tile(weights, _random_rows(kind, columns))
        graph.fill(x, _activations(inputs * n_tokens, columns))
        for each, experts in zip(ids, chosen, strict=True):
            graph.fill(each, experts)
        return graph.seconds()


def _dense(bench: BenchDevice, kind: QuantType, n_tokens: int) -> float | None:
    """Seconds of a plain matrix times `n_tokens` rows."""
    with BenchGraph(bench) as graph:
        weights = graph.weights(kind.ggml, _HIDDEN, _WIDTH)
        x = graph.tensor(F32, _HIDDEN, n_tokens)
        graph.mul_mat(weights, x)
        if not graph.place():
            return None
        graph.tile(weights, _random_rows(kind, _HIDDEN))
        graph.fill(x, _activations(n_tokens, _HIDDEN))
        return graph.seconds()


def _activations(n_rows: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((n_rows, columns), np.float32)


@cache
def _random_rows(kind: QuantType, columns: int) -> NDArray[np.uint8]:
    random, n_rows = np.random.default_rng(0), _PATTERN // columns
    if kind.bpw < 3:  # slow to encode, and any bytes take the same time to multiply
        return random.integers(0, 256, n_rows * kind.row_bytes(columns), np.uint8)
    return encode(random.standard_normal((n_rows, columns), np.float32), kind).reshape(-1)


def _attention(bench: BenchDevice, kind: QuantType, node: float) -> Rate | None:
    """Rates of flash attention over a long context; None if the device cannot."""
    per_token = 2 * kind.row_bytes(HEAD_DIM) * _HEADS
    n_caches = max(1, min(8, bench.nbytes // (per_token * _LONG_CACHE)))
    seconds = _attend(bench, kind, _LONG_CACHE, 1, n_caches)
    tokens = _throughput(lambda n: _attend(bench, kind, _SHORT_CACHE, n, 1), _TILE, _UBATCH)
    if seconds is None or tokens is None:
        return None
    work = 2 * _HEADS * HEAD_DIM
    decode = n_caches * _LONG_CACHE * work / max(seconds - n_caches * node, seconds / 2)
    return Rate(decode, tokens * _SHORT_CACHE * work)


def _attend(
    bench: BenchDevice, kind: QuantType, n_cells: int, n_tokens: int, n_caches: int
) -> float | None:
    """Seconds of `n_tokens` queries over each of `n_caches` KV caches."""
    shape = (HEAD_DIM, _HEADS, n_cells)
    with BenchGraph(bench) as graph:
        q = graph.tensor(F32, HEAD_DIM, _HEADS, n_tokens)
        mask = graph.tensor(F16, n_cells, n_tokens)
        caches = [graph.weights(kind.ggml, *shape) for _ in range(2 * n_caches)]
        for k, v in zip(caches[::2], caches[1::2], strict=True):
            graph.attention(q, k, v, mask, cast=kind.name == "F32")
        if not graph.place():
            return None
        graph.fill(q, _activations(n_tokens, _HIDDEN))
        graph.fill(mask, np.zeros((n_tokens, n_cells), np.float16))
        for cache in caches:
            graph.tile(cache, _random_rows(kind, HEAD_DIM))
        return graph.seconds()


def _overheads(bench: BenchDevice) -> tuple[float, float]:
    """Seconds that a node adds to a graph, and that a graph of one node takes."""
    short, long = (_norms(bench, n_nodes) for n_nodes in (32, 288))
    return max(long - short, 0.0) / 256, _round_trip(bench)


def _norms(bench: BenchDevice, n_nodes: int) -> float:
    with BenchGraph(bench) as graph:
        node = x = graph.tensor(F32, _HIDDEN)
        for _ in range(n_nodes):
            node = graph.rms_norm(node)
        graph.place()
        graph.fill(x, np.ones(_HIDDEN, np.float32))
        return min(graph.seconds() for _ in range(4))


def _round_trip(bench: BenchDevice) -> float:
    """Seconds to upload a token's activations, compute a node and read its result."""
    values = np.ones(_HIDDEN, np.float32)
    with BenchGraph(bench) as graph:
        x = graph.tensor(F32, _HIDDEN)
        result = graph.rms_norm(x)
        graph.place()
        return min(graph.round_trip(x, values, result) for _ in range(16))


def _uploads(bench: BenchDevice, device: str) -> tuple[float, float]:
    """Bytes a second from pinned host memory, and from other host memory."""
    data = np.ones(_UPLOADS[-1], np.uint8)
    with pinned_memory(device, data.size) as pinned:
        if pinned is not None:
            pinned[:] = data
        pageable = _upload(bench, data)
        return (pageable if pinned is None else _upload(bench, pinned)), pageable


def _upload(bench: BenchDevice, data: NDArray[np.uint8]) -> float:
    for nbytes in _UPLOADS:
        with BenchGraph(bench) as graph:
            tensor = graph.tensor(I8, nbytes)
            graph.place()
            seconds = min(graph.copy_seconds(tensor, data[:nbytes]) for _ in range(3))
        if seconds > _MIN_SECONDS:
            break
    return nbytes / seconds
