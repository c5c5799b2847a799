"""The devices of the installed engine, by ggml's own registry: names, memory, buffer types.

The first call builds that registry. Environment variables such as GGML_OP_OFFLOAD_MIN_BATCH must be
set before. Drivers start then, which may take seconds or, if one is broken, kill the process. A
worker that does not answer aborts the process too: probe it first (`rpc.probe`).
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any, Literal, get_args

from dots1_local.devices.drivers import build_with
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.ggml import library

__all__ = [
    "DeviceInfo", "Signatures", "add_worker", "backend_names", "check_rpc", "declare", "device",
    "devices", "serve_rpc",
]  # fmt: skip

Kind = Literal["cpu", "gpu", "igpu", "accel", "meta"]  # in the order of enum ggml_backend_dev_type
Signatures = Mapping[str, tuple[Any, Sequence[Any]]]  # function: (result, arguments)

_SIZE = ctypes.POINTER(c_size_t)
_REGISTRY: Signatures = {
    "ggml_backend_dev_count": (c_size_t, ()),
    "ggml_backend_dev_get": (c_void_p, (c_size_t,)),
    "ggml_backend_reg_count": (c_size_t, ()),
    "ggml_backend_reg_get": (c_void_p, (c_size_t,)),
    "ggml_backend_reg_by_name": (c_void_p, (c_char_p,)),
    "ggml_backend_register": (None, (c_void_p,)),
}
_DEVICE: Signatures = {
    "ggml_backend_dev_name": (c_char_p, (c_void_p,)),
    "ggml_backend_dev_description": (c_char_p, (c_void_p,)),
    "ggml_backend_dev_type": (c_int, (c_void_p,)),
    "ggml_backend_dev_memory": (None, (c_void_p, _SIZE, _SIZE)),
    "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_host_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_reg_name": (c_char_p, (c_void_p,)),
    "ggml_backend_reg_dev_count": (c_size_t, (c_void_p,)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
}
_GET_EXTRA = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)
_ADD_SERVER = ctypes.CFUNCTYPE(c_void_p, c_char_p)
_SET_THREADS = ctypes.CFUNCTYPE(None, c_void_p, c_int)
_START: Signatures = {
    "ggml_backend_rpc_start_server": (None, (c_char_p, c_char_p, c_size_t, c_size_t, c_void_p))
}


@dataclass(frozen=True)
class DeviceInfo:
    """A device as the engine sees it: bytes of memory, `free` now and in total, ggml's `handle`.

    `backend` is the registry's name: CPU, CUDA, ROCm, Vulkan, Metal, RPC. The description of an RPC
    device is the host:port of its worker.
    """

    name: str
    description: str
    backend: str
    kind: Kind
    free: int
    total: int
    handle: int

    @property
    def buffer_type(self) -> int:
        """The handle (`ggml_backend_buffer_type_t`) of its memory.

        In an override the CPU's buffer type stands for RAM; llama.cpp chooses the kind of RAM
        (plain, pinned, repacked) itself.
        """
        return int(_base().ggml_backend_dev_buffer_type(self.handle))

    @property
    def buffer_name(self) -> str:
        """What the engine's log calls its memory."""
        name: bytes = _base().ggml_backend_buft_name(self.buffer_type)
        return name.decode()

    @property
    def host_buffer_type(self) -> int | None:
        """RAM that the device can read by itself ("pinned"); None if it cannot."""
        handle = _base().ggml_backend_dev_host_buffer_type(self.handle)
        return None if handle is None else int(handle)

    @property
    def extra_buffer_types(self) -> tuple[int, ...]:
        """Memory that rearranges the weights that are written to it.

        llama.cpp prefers the first one that fits a tensor to the device's own memory.
        """
        function = self._function(b"ggml_backend_dev_get_extra_bufts")
        found = _GET_EXTRA(function)(self.handle) if function else None
        return tuple(takewhile(bool, found)) if found else ()

    def set_threads(self, backend: int, threads: int) -> None:
        """Set the threads of a `ggml_backend_t` of this device, if it uses any."""
        if function := self._function(b"ggml_backend_set_n_threads"):
            _SET_THREADS(function)(backend, threads)

    def _function(self, name: bytes) -> int | None:
        """The address of a function that the device's backend may have."""
        registry = _base().ggml_backend_dev_backend_reg(self.handle)
        address: int | None = _base().ggml_backend_reg_get_proc_address(registry, name)
        return address


def devices() -> tuple[DeviceInfo, ...]:
    """The devices of the engine, in its order, including those of workers that were added."""
    ggml = _registry()
    count = ggml.ggml_backend_dev_count()
    return tuple(_info(ggml.ggml_backend_dev_get(index)) for index in range(count))


def device(name: str) -> DeviceInfo:
    """The device with this name.

    Raises:
        UsageError: there is none; the message lists the devices.
    """
    by_name = {each.name: each for each in devices()}
    if name not in by_name:
        raise UsageError(f"the engine has no device {name}; it has {', '.join(by_name)}")
    return by_name[name]


def backend_names() -> tuple[str, ...]:
    """The backends that were compiled in, whether or not they have a device here."""
    ggml, base = _registry(), _base()
    found = (ggml.ggml_backend_reg_get(index) for index in range(ggml.ggml_backend_reg_count()))
    return tuple(base.ggml_backend_reg_name(registry).decode() for registry in found)


def add_worker(endpoint: str) -> tuple[DeviceInfo, ...]:
    """Add the devices of the worker at host:port to the engine's; a second call changes nothing.

    The process aborts if no worker answers: probe it first.

    Raises:
        Dots1Error: this build has no RPC, or the worker has no devices.
    """
    check_rpc()
    ggml, base = _registry(), _base()
    rpc = ggml.ggml_backend_reg_by_name(b"RPC")
    add = base.ggml_backend_reg_get_proc_address(rpc, b"ggml_backend_rpc_add_server")
    worker = _ADD_SERVER(add)(endpoint.encode())
    if not worker:
        raise Dots1Error(f"the worker at {endpoint} has no devices")
    ggml.ggml_backend_register(worker)
    count = base.ggml_backend_reg_dev_count(worker)
    return tuple(_info(base.ggml_backend_reg_dev_get(worker, index)) for index in range(count))


def serve_rpc(
    endpoint: str, served: Sequence[DeviceInfo], *, threads: int = 1, cache: str | None = None
) -> None:
    """Serve devices to other machines until the process ends; needs `check_rpc` before.

    `cache` is a folder for weights. This returns only if the server cannot start; it has printed
    why.
    """
    handles = (c_void_p * len(served))(*(device.handle for device in served))
    folder = None if cache is None else os.fsencode(cache)
    rpc = declare(library("ggml-rpc"), _START)
    rpc.ggml_backend_rpc_start_server(endpoint.encode(), folder, threads, len(served), handles)


def check_rpc() -> None:
    """Make sure that this build of llama-cpp-python can work with workers.

    Raises:
        Dots1Error: the RPC backend was not compiled in.
    """
    if "RPC" not in backend_names():
        command = build_with("GGML_RPC")
        raise Dots1Error(f"this llama-cpp-python was built without RPC; build it anew: {command}")


def declare(lib: ctypes.CDLL, signatures: Signatures) -> ctypes.CDLL:
    """Declare to ctypes what functions of a library take and return."""
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, list(arguments)
    return lib


@cache
def _registry() -> ctypes.CDLL:
    return declare(library("ggml"), _REGISTRY)


@cache
def _base() -> ctypes.CDLL:
    return declare(library("ggml-base"), _DEVICE)


def _info(handle: int) -> DeviceInfo:
    base = _base()
    free, total = c_size_t(), c_size_t()
    base.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    if free.value > total.value:  # a driver took what is used from less, and passed below zero
        free.value = 0
    return DeviceInfo(
        name=base.ggml_backend_dev_name(handle).decode(),
        description=base.ggml_backend_dev_description(handle).decode(errors="replace"),
        backend=base.ggml_backend_reg_name(base.ggml_backend_dev_backend_reg(handle)).decode(),
        kind=get_args(Kind)[base.ggml_backend_dev_type(handle)],
        free=free.value,
        total=total.value,
        handle=int(handle),
    )
