"""Small ggml graphs that are computed on one device, to see how long they take.

A `BenchDevice` has one large buffer for weights, larger than caches. A `BenchGraph` puts its
weights there one after the other from the start, and all other tensors into a buffer of its own.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint8, c_void_p
from functools import cache, cached_property
from statistics import median
from time import perf_counter
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.devices.backends import Signatures, declare, device
from dots1_local.errors import Dots1Error
from dots1_local.ggml import library
from dots1_local.sizes import human_bytes

__all__ = [
    "F16", "F32", "HEAD_DIM", "I8", "I32", "BenchDevice", "BenchGraph", "Tensor", "pinned_memory",
]  # fmt: skip

Tensor = int  # a handle of ggml's

F32, F16, I8, I32 = 0, 1, 24, 26  # enum ggml_type
HEAD_DIM = 128

_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_PREC_F32 = 10  # GGML_PREC_F32
_SLACK = 1 << 20
_LEAST, _COLUMNS = 1 << 24, 4096  # the smallest matrix that is tried, in bytes, and its columns
_NODES = 1024
_ALIGNMENT = 1 << 12
_REPEATS, _MAX_SECONDS = 5, 1.0


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_P, _I64 = c_void_p, c_int64
_SIGNATURES: Signatures = {
    "ggml_init": (_P, (_InitParams,)),
    "ggml_free": (None, (_P,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_new_graph_custom": (_P, (_P, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_new_tensor": (_P, (_P, c_int, c_int, POINTER(_I64))),
    "ggml_nbytes": (c_size_t, (_P,)),
    "ggml_permute": (_P, (_P, _P, c_int, c_int, c_int, c_int)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_mul_mat_id": (_P, (_P, _P, _P, _P)),
    "ggml_flash_attn_ext": (_P, (_P, _P, _P, _P, _P, c_float, c_float, c_float)),
    "ggml_prec_set_acc": (None, (_P, c_int)),
    "ggml_cast": (_P, (_P, _P, c_int)),
    "ggml_rms_norm": (_P, (_P, _P, c_float)),
    "ggml_backend_dev_init": (_P, (_P, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (_P, _P)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_graph_compute": (c_int, (_P, _P)),
    "ggml_backend_buft_alloc_buffer": (_P, (_P, c_size_t)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_buffer_get_base": (_P, (_P,)),
    "ggml_backend_buffer_set_usage": (None, (_P, c_int)),
    "ggml_backend_tensor_alloc": (c_int, (_P, _P, _P)),
    "ggml_backend_tensor_set": (None, (_P, _P, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (_P, _P, c_size_t, c_size_t)),
    "ggml_backend_tensor_copy": (None, (_P, _P)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
}


@cache
def _ggml() -> ctypes.CDLL:
    return declare(library(), _SIGNATURES)


class BenchDevice:
    """A device that is ready to be measured, with `nbytes` for weights; use it in a `with`.

    `memory` is the buffer type of the weights, by default the device's own.
    """

    def __init__(
        self, name: str, nbytes: int, *, threads: int = 1, memory: int | None = None
    ) -> None:
        ggml = _ggml()
        info = device(name)
        self.handle, self.nbytes = info.handle, nbytes
        self.memory = info.buffer_type
        self.host_writes = memory is not None
        self.backend = ggml.ggml_backend_dev_init(self.handle, None)
        self.arena = ggml.ggml_backend_buft_alloc_buffer(memory or self.memory, nbytes + _SLACK)
        if not self.backend or not self.arena:
            self.__exit__()
            raise Dots1Error(f"{name} has no {human_bytes(nbytes)} of memory left to measure in")
        ggml.ggml_backend_buffer_set_usage(self.arena, _WEIGHTS)
        info.set_threads(self.backend, threads)

    @cached_property
    def largest_tensor(self) -> int:
        """The bytes of a matrix that the device can multiply, up to `nbytes`.

        Vulkan's devices limit what a kernel sees of a buffer (maxStorageBufferRange), some to
        128 MiB.
        """
        size = self.nbytes
        while size > _LEAST and not self._multiplies(size // (2 * _COLUMNS)):
            size //= 2
        return size

    def _multiplies(self, rows: int) -> bool:
        with BenchGraph(self) as graph:
            matrix, x = graph.tensor(F16, _COLUMNS, rows), graph.tensor(F32, _COLUMNS, 1)
            node = graph.mul_mat(matrix, x)
            return bool(_ggml().ggml_backend_dev_supports_op(self.handle, node))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.arena:
            _ggml().ggml_backend_buffer_free(self.arena)
        if self.backend:
            _ggml().ggml_backend_free(self.backend)


@contextmanager
def pinned_memory(name: str, nbytes: int) -> Iterator[NDArray[np.uint8] | None]:
    """Yield RAM that a device can copy from by itself, or None if the device has no such RAM."""
    kind = device(name).host_buffer_type
    buffer = kind and _ggml().ggml_backend_buft_alloc_buffer(kind, nbytes)
    if not buffer:
        yield None
        return
    try:
        base = _ggml().ggml_backend_buffer_get_base(buffer)
        yield np.ctypeslib.as_array((c_uint8 * nbytes).from_address(base))
    finally:
        _ggml().ggml_backend_buffer_free(buffer)


class BenchGraph:
    """One graph on a `BenchDevice`: make tensors and nodes, `place` it, fill it, then time it.

    Shapes begin with the length of a row, as ggml's do; types are numbers of `enum ggml_type`.
    """

    def __init__(self, device: BenchDevice) -> None:
        ggml = _ggml()
        self._device = device
        room = 4 * _NODES * ggml.ggml_tensor_overhead()
        room += ggml.ggml_graph_overhead_custom(_NODES, False)
        self._context = ggml.ggml_init(_InitParams(room, None, True))
        self._graph = ggml.ggml_new_graph_custom(self._context, _NODES, False)
        self._addresses: dict[Tensor, int] = {}
        self._next = ggml.ggml_backend_buffer_get_base(device.arena)
        self._nodes: list[Tensor] = []
        self._buffer: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._buffer:
            _ggml().ggml_backend_buffer_free(self._buffer)
        _ggml().ggml_free(self._context)

    def tensor(self, kind: int, *shape: int) -> Tensor:
        """A tensor outside the device's buffer for weights."""
        extents = (c_int64 * len(shape))(*shape)
        return int(_ggml().ggml_new_tensor(self._context, kind, len(shape), extents))

    def weights(self, kind: int, *shape: int) -> Tensor:
        """The next tensor in the device's buffer for weights."""
        tensor = self.tensor(kind, *shape)
        self._put(tensor, self._next)
        self._addresses[tensor] = self._next
        self._next += -(-_ggml().ggml_nbytes(tensor) // _ALIGNMENT) * _ALIGNMENT
        return tensor

    def mul_mat(self, weights: Tensor, x: Tensor) -> Tensor:
        """A node: weights times x."""
        return self._node(_ggml().ggml_mul_mat(self._context, weights, x))

    def mul_mat_id(self, weights: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        """A node: the experts in `ids` (experts of a token, tokens), times x."""
        return self._node(_ggml().ggml_mul_mat_id(self._context, weights, x, ids))

    def rms_norm(self, x: Tensor) -> Tensor:
        """A node that computes next to nothing."""
        return self._node(_ggml().ggml_rms_norm(self._context, x, 1e-5))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, cast: bool) -> Tensor:
        """A node: flash attention of tensors (head_dim, heads, tokens), laid out as in a KV cache.

        `cast` converts keys and values to F16 first, as llama.cpp does with F32.
        """
        ggml = _ggml()
        q, k, v = (ggml.ggml_permute(self._context, each, 0, 2, 1, 3) for each in (q, k, v))
        if cast:
            k, v = (self._node(ggml.ggml_cast(self._context, each, F16)) for each in (k, v))
        scale = HEAD_DIM**-0.5
        node = ggml.ggml_flash_attn_ext(self._context, q, k, v, mask, scale, 0.0, 0.0)
        ggml.ggml_prec_set_acc(node, _PREC_F32)
        return self._node(node)

    def place(self) -> bool:
        """Allocate all tensors; False if the device cannot compute a node."""
        ggml = _ggml()
        for node in self._nodes:
            if not ggml.ggml_backend_dev_supports_op(self._device.handle, node):
                return False
            ggml.ggml_build_forward_expand(self._graph, node)
        memory = self._device.memory
        self._buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._context, memory)
        if not self._buffer:
            raise Dots1Error("the device has no memory left to measure in")
        return True

    def fill(self, tensor: Tensor, data: NDArray[Any]) -> None:
        """Set a tensor's values."""
        assert _ggml().ggml_nbytes(tensor) == data.nbytes
        data = np.ascontiguousarray(data)
        _ggml().ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)

    def tile(self, weights: Tensor, pattern: NDArray[np.uint8]) -> None:
        """Fill weights with copies of `pattern`, which the device makes itself if it can."""
        size = _ggml().ggml_nbytes(weights)
        if self._device.host_writes:  # this memory rearranges whole tensors when they are written
            self.fill(weights, np.resize(pattern, size))
            return
        start, done = self._addresses[weights], min(pattern.size, size)
        self.fill(self._bytes_at(start, done), pattern[:done])
        while done < size:
            length = min(done, size - done)
            copy = self._bytes_at(start + done, length)
            _ggml().ggml_backend_tensor_copy(self._bytes_at(start, length), copy)
            done += length

    def seconds(self) -> float:
        """The time of a computation: the median of some, as other programs slow some down."""
        self.once()
        times: list[float] = []
        while len(times) < _REPEATS and sum(times) < _MAX_SECONDS:
            times.append(self.once())
        return median(times)

    def once(self) -> float:
        """The time of one computation."""
        start = perf_counter()
        self._compute()
        self._wait(self._nodes[-1])
        return perf_counter() - start

    def round_trip(self, x: Tensor, values: NDArray[Any], result: Tensor) -> float:
        """The time to set x, compute, and read a result of the same size."""
        start = perf_counter()
        self.fill(x, values)
        self._compute()
        self.read(result, values)
        return perf_counter() - start

    def copy_seconds(self, tensor: Tensor, data: NDArray[Any]) -> float:
        """The time to set a tensor's values."""
        start = perf_counter()
        self.fill(tensor, data)
        self._wait(tensor)
        return perf_counter() - start

    def read(self, tensor: Tensor, data: NDArray[Any]) -> None:
        """Read a tensor's values into `data`."""
        _ggml().ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)

    def _compute(self) -> None:
        status = _ggml().ggml_backend_graph_compute(self._device.backend, self._graph)
        if status:
            raise Dots1Error(f"the device failed to compute ({status})")

    def _wait(self, tensor: Tensor) -> None:
        """Wait for a tensor; a worker only shows that it has finished when the tensor is read."""
        self.read(tensor, np.empty(4, np.uint8))

    def _node(self, node: Tensor) -> Tensor:
        self._nodes.append(node)
        return node

    def _put(self, tensor: Tensor, address: int) -> None:
        _ggml().ggml_backend_tensor_alloc(self._device.arena, tensor, address)

    def _bytes_at(self, address: int, length: int) -> Tensor:
        tensor = self.tensor(I8, length)
        self._put(tensor, address)
        return tensor
