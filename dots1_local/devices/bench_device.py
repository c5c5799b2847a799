"""A device made ready to be measured: its backend at work, and memory for weights on it."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_size_t, c_uint8, c_void_p
from functools import cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.devices.backends import Signatures, declare, device_handle, host_buffer_type
from dots1_local.errors import Dots1Error
from dots1_local.ggml import library
from dots1_local.sizes import human_bytes

__all__ = ["Bench", "pinned_memory"]

_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_SLACK = 1 << 20
_SET_THREADS = ctypes.CFUNCTYPE(None, c_void_p, c_int)

_P = c_void_p
_SIGNATURES: Signatures = {
    "ggml_backend_dev_init": (_P, (_P, c_char_p)),
    "ggml_backend_dev_buffer_type": (_P, (_P,)),
    "ggml_backend_dev_backend_reg": (_P, (_P,)),
    "ggml_backend_reg_get_proc_address": (_P, (_P, c_char_p)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_buft_alloc_buffer": (_P, (_P, c_size_t)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_buffer_get_base": (_P, (_P,)),
    "ggml_backend_buffer_set_usage": (None, (_P, c_int)),
}


@cache
def _ggml() -> ctypes.CDLL:
    return declare(library(), _SIGNATURES)


class Bench:
    """A device at work on at most `nbytes` of weights; use it in a `with` statement.

    `memory` is the buffer type of those weights, by default the device's own.
    """

    def __init__(
        self, device: str, nbytes: int, *, threads: int = 1, memory: int | None = None
    ) -> None:
        ggml = _ggml()
        self.handle, self.nbytes = device_handle(device), nbytes
        self.memory = ggml.ggml_backend_dev_buffer_type(self.handle)
        self.host_writes = memory is not None
        self.backend = ggml.ggml_backend_dev_init(self.handle, None)
        self.arena = ggml.ggml_backend_buft_alloc_buffer(memory or self.memory, nbytes + _SLACK)
        if not self.backend or not self.arena:
            self.close()
            raise Dots1Error(f"{device} has no {human_bytes(nbytes)} of memory left to measure in")
        ggml.ggml_backend_buffer_set_usage(self.arena, _WEIGHTS)
        self._set_threads(threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""
        if self.arena:
            _ggml().ggml_backend_buffer_free(self.arena)
        if self.backend:
            _ggml().ggml_backend_free(self.backend)
        self.arena = self.backend = None

    def _set_threads(self, threads: int) -> None:
        ggml = _ggml()
        registry = ggml.ggml_backend_dev_backend_reg(self.handle)
        name = b"ggml_backend_set_n_threads"
        if function := ggml.ggml_backend_reg_get_proc_address(registry, name):
            _SET_THREADS(function)(self.backend, threads)


@contextmanager
def pinned_memory(device: str, nbytes: int) -> Iterator[NDArray[np.uint8] | None]:
    """RAM that a device fetches from by itself; None where it has none of that kind."""
    kind = host_buffer_type(device)
    buffer = kind and _ggml().ggml_backend_buft_alloc_buffer(kind, nbytes)
    if not buffer:
        yield None
        return
    try:
        base = _ggml().ggml_backend_buffer_get_base(buffer)
        yield np.ctypeslib.as_array((c_uint8 * nbytes).from_address(base))
    finally:
        _ggml().ggml_backend_buffer_free(buffer)
