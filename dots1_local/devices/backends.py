"""The devices of the installed engine, by ggml's own registry: names, memory, buffer types.

The first call here builds that registry: environment variables such as GGML_OP_OFFLOAD_MIN_BATCH
must be set before, and drivers start, which may take seconds or, where one is broken, the process.
A worker that cannot be reached aborts the process too: probe it first (`rpc.probe`).
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any, Literal

from dots1_local.errors import Dots1Error, UsageError
from dots1_local.ggml import library

__all__ = [
    "DeviceInfo",
    "Kind",
    "Signatures",
    "add_worker",
    "backend_names",
    "buffer_type",
    "build_with",
    "check_rpc",
    "declare",
    "device_handle",
    "devices",
    "extra_buffer_types",
    "host_buffer_type",
    "serve_rpc",
]

Kind = Literal["cpu", "gpu", "igpu", "accel", "meta"]
Signatures = Mapping[str, tuple[Any, Sequence[Any]]]  # function: (result, arguments)

_KINDS: tuple[Kind, ...] = ("cpu", "gpu", "igpu", "accel", "meta")  # enum ggml_backend_dev_type
_SIZE = ctypes.POINTER(c_size_t)
_REGISTRY: Signatures = {
    "ggml_backend_dev_count": (c_size_t, ()),
    "ggml_backend_dev_get": (c_void_p, (c_size_t,)),
    "ggml_backend_dev_by_name": (c_void_p, (c_char_p,)),
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
    "ggml_backend_reg_name": (c_char_p, (c_void_p,)),
    "ggml_backend_reg_dev_count": (c_size_t, (c_void_p,)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
}
_GET_EXTRA = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)
_ADD_SERVER = ctypes.CFUNCTYPE(c_void_p, c_char_p)
_RPC: Signatures = {
    "ggml_backend_rpc_start_server": (
        None,
        (c_char_p, c_char_p, c_size_t, c_size_t, ctypes.POINTER(c_void_p)),
    ),
}


def build_with(*flags: str) -> str:
    """The command that installs llama-cpp-python with these of its build flags on."""
    arguments = " ".join(f"-D{flag}=on" for flag in flags)
    return (
        f'CMAKE_ARGS="{arguments}" pip install --force-reinstall --no-cache-dir --no-deps '
        "llama-cpp-python"
    )


@dataclass(frozen=True)
class DeviceInfo:
    """A device as the engine sees it: bytes of memory `free` now and in all, ggml's `handle`.

    `backend` is the registry's name: CPU, CUDA, ROCm, Vulkan, Metal, RPC. An RPC device's
    description is its worker's host:port.
    """

    name: str
    description: str
    backend: str
    kind: Kind
    free: int
    total: int
    handle: int


def devices() -> tuple[DeviceInfo, ...]:
    """Every device of the engine, in its order; those of workers once they were added."""
    ggml = _registry()
    count = ggml.ggml_backend_dev_count()
    return tuple(_info(ggml.ggml_backend_dev_get(index)) for index in range(count))


def backend_names() -> tuple[str, ...]:
    """The backends that were compiled in, whether or not they have a device here."""
    ggml, base = _registry(), _base()
    found = (ggml.ggml_backend_reg_get(index) for index in range(ggml.ggml_backend_reg_count()))
    return tuple(base.ggml_backend_reg_name(registry).decode() for registry in found)


def device_handle(name: str) -> int:
    """ggml's handle (`ggml_backend_dev_t`) of the device called `name`.

    Raises:
        UsageError: no such device; the message lists those there are.
    """
    ggml, base = _registry(), _base()
    handles = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    by_name = {base.ggml_backend_dev_name(each).decode(): int(each) for each in handles}
    if name not in by_name:
        raise UsageError(f"the engine has no device {name}; it has {', '.join(by_name)}")
    return by_name[name]


def buffer_type(name: str) -> int:
    """The handle (`ggml_backend_buffer_type_t`) of memory on the device called `name`.

    As an override's, the CPU's is RAM, of which llama.cpp chooses the kind (plain, pinned,
    repacked) itself.

    Raises:
        UsageError: no such device.
    """
    return int(_base().ggml_backend_dev_buffer_type(device_handle(name)))


def host_buffer_type(name: str) -> int | None:
    """RAM that the device called `name` can read by itself ("pinned"); None where it has none.

    Raises:
        UsageError: no such device.
    """
    handle = _base().ggml_backend_dev_host_buffer_type(device_handle(name))
    return None if handle is None else int(handle)


def extra_buffer_types(name: str) -> tuple[int, ...]:
    """Memory of the device called `name` that rearranges the weights written to it.

    llama.cpp prefers the first that can be used for a tensor to the device's own memory.

    Raises:
        UsageError: no such device.
    """
    base, handle = _base(), device_handle(name)
    registry = base.ggml_backend_dev_backend_reg(handle)
    function = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    found = _GET_EXTRA(function)(handle) if function else None
    return tuple(takewhile(bool, found)) if found else ()


def add_worker(endpoint: str) -> tuple[DeviceInfo, ...]:
    """Make the devices of the worker at host:port the engine's; a second time changes nothing.

    The process aborts where no worker answers: probe it first.

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
    rpc = declare(library("ggml-rpc"), _RPC)
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
    """Tell ctypes what functions of a library take and return."""
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
    return DeviceInfo(
        name=base.ggml_backend_dev_name(handle).decode(),
        description=base.ggml_backend_dev_description(handle).decode(errors="replace"),
        backend=base.ggml_backend_reg_name(base.ggml_backend_dev_backend_reg(handle)).decode(),
        kind=_KINDS[base.ggml_backend_dev_type(handle)],
        free=free.value,
        total=total.value,
        handle=int(handle),
    )
