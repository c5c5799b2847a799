"""Makes a worker's device behave in llama.cpp's plans like a GPU, to test without a GPU.

The engine asks backends through tables of functions (`ggml-backend-impl.h`). Here some of a
device's are replaced by ours, which answer as ggml-cuda's do; computing is not to be tried then.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p

from dots1_local.ggml import library

__all__ = ["fetching_device", "like_cuda"]

_POINTER = ctypes.sizeof(c_void_p)
# Places in ggml_backend_device_i, ggml_backend_i (behind a pointer), ggml_backend_buffer_type_i.
_INIT_BACKEND, _OFFLOAD_OP, _GRAPH_OPTIMIZE, _GET_ALLOC_SIZE = 5, 11, 16, 4
# Bytes before the fields of ggml_tensor, and before those of ggml_cgraph.
_NE, _OP, _SRC, _N_NODES, _NODES = 16, 80, 152, 4, 16

_OffloadOp = ctypes.CFUNCTYPE(ctypes.c_bool, c_void_p, c_void_p)
_AllocSize = ctypes.CFUNCTYPE(c_size_t, c_void_p, c_void_p)
_InitBackend = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_char_p)
_Optimize = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)
_AddDependency = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)


@contextmanager
def fetching_device(device: int) -> Iterator[None]:
    """Let this device fetch weights from RAM for at least 32 rows (`..._device_offload_op`)."""
    with _replaced(device, _OFFLOAD_OP, _OffloadOp(_wants_weights)):
        yield


@contextmanager
def like_cuda(device: int, buffer_type: int, attention_bytes: int) -> Iterator[None]:
    """Make flash attention take more bytes, and keep the inputs of a sum of experts.

    See `ggml_cuda_flash_attn_ext_get_alloc_size` and `ggml_backend_cuda_graph_optimize`.
    """

    def alloc_size(_: int, tensor: int) -> int:
        more = attention_bytes if _op(tensor) == b"FLASH_ATTN_EXT" else 0
        size: int = _ggml("ggml_nbytes", c_size_t)(tensor)
        return size + more

    original = _InitBackend(_slot(device, _INIT_BACKEND).value or 0)
    optimize = _Optimize(_keep_experts)

    def init(handle: int, parameters: bytes | None) -> int:
        backend: int = original(handle, parameters)
        _slot(backend, _GRAPH_OPTIMIZE).value = ctypes.cast(optimize, c_void_p).value
        return backend

    with (
        _replaced(buffer_type, _GET_ALLOC_SIZE, _AllocSize(alloc_size)),
        _replaced(device, _INIT_BACKEND, _InitBackend(init)),
    ):
        yield


@contextmanager
def _replaced(table: int, place: int, function: "ctypes._FuncPointer") -> Iterator[None]:
    slot = _slot(table, place)
    before, slot.value = slot.value, ctypes.cast(function, c_void_p).value
    try:
        yield
    finally:
        slot.value = before


def _slot(table: int, place: int) -> c_void_p:
    return c_void_p.from_address(table + place * _POINTER)


def _wants_weights(_: int, tensor: int) -> bool:
    ne = (c_int64 * 4).from_address(tensor + _NE)
    rows = {b"GET_ROWS": 0, b"MUL_MAT": ne[1], b"MUL_MAT_ID": ne[2], b"ROPE": ne[2]}
    return rows.get(_op(tensor), ne[1] * ne[2] * ne[3]) >= 32


def _keep_experts(_: int, graph: int, parameters: int) -> None:
    """Keep the experts' outputs and their weights until the sum over them is computed."""
    count = c_int.from_address(graph + _N_NODES).value
    first = c_void_p.from_address(graph + _NODES).value or 0
    nodes = {_name(node): node for node in (c_size_t * count).from_address(first)}
    add = _AddDependency(_slot(parameters, 0).value or 0)
    for name, node in nodes.items():
        total = nodes.get(name.replace(b"weighted", b"out"))
        if name.startswith(b"ffn_moe_weighted-") and total and b" " not in name:
            for source in range(2):
                add(_slot(parameters, 1).value, _slot(node + _SRC, source).value, total)


def _op(tensor: int) -> bytes:
    name: bytes = _ggml("ggml_op_name", c_char_p)(c_int.from_address(tensor + _OP).value)
    return name


def _name(tensor: int) -> bytes:
    name: bytes = _ggml("ggml_get_name", c_char_p)(tensor)
    return name


def _ggml(name: str, result: type) -> "ctypes._FuncPointer":
    function = library()[name]  # an object of its own, not the one others use
    function.restype = result
    function.argtypes = [c_int if name == "ggml_op_name" else c_void_p]
    return function
