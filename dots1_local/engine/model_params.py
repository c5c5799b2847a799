"""What llama.cpp is told of a placement before it loads a model.

The order matters: what backends read from the environment is set before they start, a worker is
asked before the engine connects to it, and a device is looked up before it is named.

How a context is made: what was asked for, else what a placement says, else what is usual.
"""

import ctypes
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from llama_cpp import llama_cpp as llama

from dots1_local.devices import backends, rpc
from dots1_local.devices.limits import physical_cores
from dots1_local.errors import GGUFError, UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.ggml import library
from dots1_local.placement.placement import (
    MIN_BATCH,
    HostMemory,
    Placement,
    check_context,
    check_made_for,
    default_context,
)

__all__ = [
    "Settings",
    "buffer_names",
    "connected",
    "endpoints",
    "free_memory",
    "model_params",
    "prepare",
    "settings",
    "trained_for",
]


_NONE, _MMAP = 0, 1  # enum llama_load_mode
_SIZE = ctypes.POINTER(ctypes.c_size_t)
_DEVICE: backends.Signatures = {
    "ggml_backend_buft_name": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "ggml_backend_dev_memory": (None, (ctypes.c_void_p, _SIZE, _SIZE)),
}
connected: Counter[str] = Counter()  # models that are loaded now, by worker
_started = False  # whether the backends have read their environment
# llama.cpp takes the first kind of RAM that fits a weight: pinned, repacked, plain. So each is had
# by forbidding the others: load mode, use_extra_bufts (repacked), no_host (not pinned).
_HOST_MEMORY: dict[HostMemory, tuple[int, bool, bool]] = {
    "plain": (_NONE, False, True),
    "pinned": (_NONE, False, False),
    "repacked": (_NONE, True, True),
    "mapped": (_MMAP, False, True),
}
# How the names of a backend's devices begin: the option that compiles it in.
_BUILDS = {
    "CUDA": "GGML_CUDA",
    "ROCm": "GGML_HIP",
    "Vulkan": "GGML_VULKAN",
    "SYCL": "GGML_SYCL",
    "MTL": "GGML_METAL",
    "RPC": "GGML_RPC",
}


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def prepare(gguf: GGUFFile, placement: Placement) -> list[str]:
    """See to it that the placement can be used with this file; sentences to warn with.

    Raises:
        UsageError: it is for another file.
        Dots1Error: a worker does not answer.
    """
    check_made_for(placement, gguf)
    warnings = _set_min_batch(placement)
    workers = endpoints(placement)
    # The engine would end the process over a wrong address; who serves us already answers nobody.
    rpc.probe_all(worker for worker in workers if not connected[worker])
    for worker in workers:
        backends.add_worker(worker)
    return warnings


def endpoints(placement: Placement | None) -> tuple[str, ...]:
    """The placement's workers, as host:port.

    Raises:
        UsageError: one of them is no address.
    """
    return tuple(dict.fromkeys(map(rpc.parse_endpoint, placement.workers))) if placement else ()


def _set_min_batch(placement: Placement) -> list[str]:
    """Tell the backends, which read it once, when they start."""
    wanted = placement.offload_min_batch
    if wanted is None or os.environ.get(MIN_BATCH) == str(wanted):
        return []
    if _started:
        return [
            f"batches of {os.environ.get(MIN_BATCH, 'the usual number of')} tokens, not "
            f"{wanted}, fetch weights from RAM: the engine cannot change that once it runs"
        ]
    os.environ[MIN_BATCH] = str(wanted)
    return []


def _handle(device: str) -> int:
    try:
        return backends.device_handle(device)
    except UsageError as error:
        raise UsageError(f"{error}; {_way_to(device)}") from None


def _way_to(device: str) -> str:
    backend = device.rstrip("0123456789")
    if backend in _BUILDS and backend not in backends.backend_names():
        command = backends.build_with(*dict.fromkeys((_BUILDS[backend], "GGML_RPC")))
        return f"this llama-cpp-python was built without {backend}, build it anew: {command}"
    if backend == "RPC":
        return "name the worker that has it, in the plan or with --worker HOST:PORT"
    return "plan again on this machine"


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device of the engine now; None where it does not tell.

    Raises:
        UsageError: no such device here.
    """
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    base = backends.declare(library(), _DEVICE)
    base.ggml_backend_dev_memory(_handle(device), ctypes.byref(free), ctypes.byref(total))
    return free.value if total.value else None


def buffer_names(devices: Iterable[str]) -> dict[str, str]:
    """The devices by what the engine's log calls their memory.

    Raises:
        UsageError: no such device here.
    """
    base = backends.declare(library(), _DEVICE)
    names = {name: backends.buffer_type(name) for name in devices if _handle(name)}
    return {base.ggml_backend_buft_name(kind).decode(): name for name, kind in names.items()}


def model_params(placement: Placement | None) -> Any:
    """struct llama_model_params; the caller must hold on to it while the model loads.

    Raises:
        UsageError: no such device here; the message says how to come by it.
    """
    global _started  # noqa: PLW0603 -- as is the registry of backends
    _started = True
    params = llama.llama_model_default_params()
    devices = placement.used_devices if placement else ()
    # Never NULL: then llama.cpp would take all devices there are, lost workers too, and abort.
    handles = (ctypes.c_void_p * (len(devices) + 1))(*map(_handle, devices), None)
    params.devices = ctypes.cast(handles, ctypes.c_void_p)
    params.n_gpu_layers = placement.gpu_layers if placement else 0
    params.kept = [handles]  # what the structure only points to
    if placement:
        counts = (ctypes.c_float * llama.llama_max_devices())(
            *(placement.layers.get(device, 0) for device in devices)
        )
        overrides = _overrides(placement)
        params.tensor_split = counts
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        mode, extra, no_host = _HOST_MEMORY[placement.host_memory]
        params.load_mode, params.use_extra_bufts, params.no_host = mode, extra, no_host
        params.kept += [counts, overrides]
    return params


def _overrides(placement: Placement) -> Any:
    """An array for `tensor_buft_overrides`, ended by NULLs.

    For the CPU's own buffer type llama.cpp chooses the kind of RAM itself.
    """
    pairs = [
        (pattern.encode(), backends.buffer_type(device)) for pattern, device in placement.overrides
    ]
    return (_Override * (len(pairs) + 1))(*(_Override(*pair) for pair in pairs))


@dataclass(frozen=True)
class Settings:
    """How the context is made: `n_sequences` × `n_ctx` tokens, `n_outputs` logits a ubatch.

    In a `shared_cache` sequences may hold the same cells, and a ubatch may mix them at will.
    """

    n_ctx: int
    n_ubatch: int
    n_sequences: int
    n_outputs: int
    threads: int
    flash_attention: bool | None
    kv_type: str
    shared_cache: bool = False

    def applied_to(self, placement: Placement) -> Placement:
        """The placement as it will be: what was asked for explicitly has replaced its own."""
        return replace(
            placement,
            context=self.n_ctx,
            sequences=self.n_sequences if self.shared_cache else 1,
            ubatch=self.n_ubatch,
            threads=self.threads,
            kv_type=self.kv_type.upper(),
            flash_attention=bool(self.flash_attention),
        )


def settings(
    gguf: GGUFFile,
    placement: Placement | None,
    *,
    n_ctx: int | None = None,
    n_ubatch: int | None = None,
    n_sequences: int = 1,
    threads: int | None = None,
    flash_attention: bool | None = None,
    kv_type: str | None = None,
    all_logits: bool = False,
    shared_cache: bool = False,
) -> Settings:
    """What was asked for, else what the placement says, else what is usual.

    Raises:
        GGUFError: the file does not say what context the model was trained for.
        UsageError: a context that llama.cpp cannot count, or too many sequences.
    """
    if placement:
        n_ctx = placement.context if n_ctx is None else n_ctx
        n_ubatch = n_ubatch or placement.ubatch
        threads = threads or placement.threads
        kv_type = kv_type or placement.kv_type
        if flash_attention is None:
            flash_attention = placement.flash_attention
    n_ctx = _context_length(gguf, n_ctx, n_sequences)
    n_ubatch = min(n_ubatch or 512, n_ctx * n_sequences)
    return Settings(
        n_ctx=n_ctx,
        n_ubatch=n_ubatch,
        n_sequences=n_sequences,
        n_outputs=n_ubatch if all_logits else n_sequences,
        threads=_threads(threads),
        flash_attention=flash_attention,
        kv_type=kv_type or "F16",
        shared_cache=shared_cache,
    )


def _context_length(gguf: GGUFFile, wanted: int | None, n_sequences: int) -> int:
    trained = trained_for(gguf)
    n_ctx = default_context(trained, n_sequences) if wanted is None else wanted or trained
    check_context(n_ctx, n_sequences)
    return n_ctx


def trained_for(gguf: GGUFFile) -> int:
    """The context that the model was trained for, in tokens.

    Raises:
        GGUFError: the file does not say.
    """
    trained = gguf.keys.get("dots1.context_length")
    if not isinstance(trained, int) or trained < 1:
        raise GGUFError(f"{gguf.files[0]} has no dots1.context_length; convert it again")
    return trained


def _threads(wanted: int | None) -> int:
    """As asked, but never more than there are: llama.cpp only gets slower, or fails to start."""
    return min(wanted, os.cpu_count() or wanted) if wanted else physical_cores()
