"""A model and its context made by llama.cpp, and the errors that are raised if that fails."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_cpp import llama_cpp as llama

from dots1_local.architecture import Dots1Config
from dots1_local.devices import backends
from dots1_local.devices.hardware import CPU
from dots1_local.devices.limits import available_ram
from dots1_local.devices.rpc import keep_alive
from dots1_local.engine.log import Log, Report, capture, device_of, memory_warnings, read_report
from dots1_local.engine.model_params import (
    EngineParams,
    connected,
    default_model_params,
    endpoints,
    model_params,
    prepare,
)
from dots1_local.engine.watch import engine_call
from dots1_local.errors import Dots1Error, GGUFError
from dots1_local.files.gguf import GGUFFile
from dots1_local.ggml import quant_type
from dots1_local.placement.footprint import Usage, footprint, kv_bytes
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement, human_context
from dots1_local.progress import Progress, silent
from dots1_local.sizes import bytes_apart, human_bytes
from dots1_local.verify.correct import corrections

__all__ = ["Loaded", "OutOfMemory", "load_by_default", "load_model"]

_FLASH_ATTENTION = {None: -1, False: 0, True: 1}  # enum llama_flash_attn_type
_ALLOCATION = re.compile(r"failed to allocate (\S+) buffer of size (\d+)")


class OutOfMemory(Dots1Error):
    """`device` lacks `nbytes` bytes for a model; `reason` says when. Nothing stays loaded."""

    def __init__(self, device: str, nbytes: int, reason: str) -> None:
        super().__init__(device, nbytes, reason)  # all arguments, so that it can be pickled
        self.device, self.nbytes, self.reason = device, nbytes, reason

    def __str__(self) -> str:
        return f"{self.reason}; take a shorter context, or plan again with less --vram or --ram"


@dataclass(frozen=True)
class Loaded:
    """llama.cpp's handles of a model and its context, what they allocated, and warnings.

    `predicted` is what the placement should take of each device; it is empty without a placement.
    """

    model: Any
    context: Any
    report: Report
    warnings: tuple[str, ...] = ()
    predicted: Mapping[str, Usage] = field(default_factory=dict)
    workers: tuple[str, ...] = ()

    def free(self) -> None:
        connected.subtract(self.workers)
        with engine_call(self.workers):
            llama.llama_free(self.context)
            llama.llama_model_free(self.model)


def load_model(
    gguf: GGUFFile, placement: Placement | None, params: EngineParams, progress: Progress = silent
) -> Loaded:
    """Load the model as the placement says, or without one to the CPU.

    Raises:
        UsageError: the placement is for another file, or names a device that does not exist.
        GGUFError: llama.cpp cannot load the file.
        OutOfMemory: a device has too little memory.
        Dots1Error: a worker does not answer, or llama.cpp cannot make the context.
    """
    workers = endpoints(placement)
    with engine_call(workers) as call:

        def report(done: int, total: int, unit: str, what: str) -> None:
            call.progress()
            progress(done, total, unit, what)

        return _load_model(gguf, placement, params, workers, report)


def _load_model(
    gguf: GGUFFile,
    placement: Placement | None,
    params: EngineParams,
    workers: tuple[str, ...],
    progress: Progress,
) -> Loaded:
    warnings = [*corrections(gguf), *_context_warnings(gguf, params)]
    if placement:
        warnings += prepare(gguf, placement)
    struct = model_params(placement, gguf.changes)
    predicted = _check_memory(gguf, placement, params)
    used = placement.used_devices if placement else ()
    names = _buffer_names(used)
    model, sizes = _make_model(gguf, struct, names, progress)
    if workers:
        keep_alive({int(worker.rpartition(":")[2]) for worker in workers})
    try:
        context, more_sizes = _make_context(gguf, model, _context_params(params), names)
    except BaseException:
        llama.llama_model_free(model)
        raise
    report = read_report([*sizes, *more_sizes], names, _weights(gguf))
    warnings += memory_warnings(report, predicted)
    connected.update(workers)
    return Loaded(model, context, report, tuple(warnings), predicted, workers)


def load_by_default(gguf: GGUFFile, params: EngineParams) -> Loaded:
    """Load the model as llama.cpp does by itself: only the context and the threads are given.

    Raises:
        Dots1Error: llama.cpp cannot.
    """
    struct = llama.llama_context_default_params()
    struct.n_ctx, struct.n_threads = params.n_ctx, params.threads
    struct.n_threads_batch = params.threads
    with capture() as log:
        model = llama.llama_model_load_from_file(
            bytes(gguf.files[0]), default_model_params(gguf.changes)
        )
        context = model and llama.llama_init_from_model(model, struct)
    if not context:
        raise Dots1Error(f"llama.cpp does not load {gguf.files[0]} by itself: {log.cause()}")
    gpus = [device.name for device in backends.devices() if device.kind in ("gpu", "igpu")]
    return Loaded(model, context, read_report(log.sizes, _buffer_names(gpus), _weights(gguf)))


def _context_warnings(gguf: GGUFFile, params: EngineParams) -> Iterator[str]:
    trained = Dots1Config.from_gguf(gguf.keys, gguf.files[0]).max_position_embeddings
    if params.n_ctx > trained:
        yield (
            f"{gguf.files[0]} was trained for contexts of {trained:,} tokens; beyond that, in a "
            f"context of {params.n_ctx:,}, answers fall apart"
        )
    if params.shared_cache and params.n_sequences > 1 and params.flash_attention is False:
        yield (  # without it masked tokens are computed too
            "without flash attention each answer is slowed down by all that the others have in the "
            "KV cache, even after they have ended; set flash_attention to true"
        )


def _check_memory(
    gguf: GGUFFile, placement: Placement | None, params: EngineParams
) -> Mapping[str, Usage]:
    """Raise OutOfMemory now and not after minutes of loading; return what is predicted.

    Of RAM only the KV cache is checked: mapped weights need not be there all at once.
    """
    n_caches = 1 if params.shared_cache else params.n_sequences
    predicted: Mapping[str, Usage] = {}
    if placement is None:
        config = Dots1Config.from_gguf(gguf.keys, gguf.files[0])
        length = params.n_ctx * params.n_sequences // n_caches
        cache = n_caches * kv_bytes(config, length, params.kv_type)
    else:
        predicted = footprint(
            ModelGraph.read(gguf),
            params.applied_to(placement),
            n_sequences=n_caches,
            n_outputs=params.n_outputs,
            n_seq_max=params.n_seq_max,
        )
        cache = predicted[CPU].kv
        for name in placement.used_devices:
            found = backends.device(name)
            if found.total:  # some devices do not tell
                _check_free(name, found.free, predicted[name].total, "the placement")
    if ram := available_ram():
        tokens = human_context(params.n_ctx, params.n_sequences)
        _check_free(CPU, ram.available, cache, f"a KV cache of {tokens} tokens")
    return predicted


def _check_free(device: str, free: int, needed: int, what: str) -> None:
    if needed > free:
        name = "RAM" if device == CPU else device
        has, takes = bytes_apart(free, needed)
        reason = f"{name} has {has} free, but {what} takes {takes}"
        raise OutOfMemory(device, needed - free, reason)


def _context_params(params: EngineParams) -> Any:
    struct = llama.llama_context_default_params()
    struct.n_ctx = params.n_ctx * params.n_sequences
    struct.n_seq_max = params.n_seq_max
    struct.n_batch = struct.n_ubatch = params.n_ubatch
    # llama.cpp reserves a graph with a token of each sequence, and aborts if they are more.
    struct.n_outputs_max = max(params.n_outputs, params.n_seq_max)
    struct.kv_unified = params.shared_cache
    struct.n_threads = struct.n_threads_batch = params.threads
    struct.flash_attn_type = _FLASH_ATTENTION[params.flash_attention]
    struct.type_k = struct.type_v = quant_type(params.kv_type).ggml
    struct.no_perf = True
    return struct


def _make_model(
    gguf: GGUFFile, struct: Any, devices: Mapping[str, str], progress: Progress
) -> tuple[Any, Sequence[str]]:
    """Load a model; return it and the log's lines on the sizes of its buffers."""
    total, interrupted = gguf.nbytes, []

    @llama.llama_progress_callback  # type: ignore[untyped-decorator]
    def report(fraction: float, _: Any) -> bool:
        try:
            progress(int(fraction * total), total, "bytes", "loading")
        except BaseException as error:  # Ctrl-C arrives here; ctypes would swallow it
            interrupted.append(error)
        return not interrupted

    struct.progress_callback = report
    with capture() as log:
        model = llama.llama_model_load_from_file(bytes(gguf.files[0]), struct)
    if interrupted:
        raise interrupted[0]
    if model is None:
        _raise_out_of_memory(log, devices, "the weights")
        raise GGUFError(f"llama.cpp cannot load {gguf.files[0]}: {log.cause()}")
    return model, log.sizes


def _make_context(
    gguf: GGUFFile, model: Any, struct: Any, devices: Mapping[str, str]
) -> tuple[Any, Sequence[str]]:
    with capture() as log:
        context = llama.llama_init_from_model(model, struct)
    if context is None:
        _raise_out_of_memory(log, devices, f"a context of {struct.n_ctx:,} tokens")
        raise Dots1Error(
            f"llama.cpp cannot make a context of {struct.n_ctx} tokens for {gguf.files[0]} "
            f"(try a smaller one): {log.cause()}"
        )
    return context, log.sizes


def _raise_out_of_memory(log: Log, devices: Mapping[str, str], what: str) -> None:
    """Raise OutOfMemory if the log says that an allocation failed."""
    for match in filter(None, map(_ALLOCATION.search, log.errors)):
        device, nbytes = device_of(match[1], devices), int(match[2])
        reason = f"{device} ran out of memory: it has no {human_bytes(nbytes)} more for {what}"
        raise OutOfMemory(device, nbytes, reason)


def _buffer_names(devices: Iterable[str]) -> dict[str, str]:
    """The devices by the names of their buffers in llama.cpp's log."""
    return {backends.device(name).buffer_name: name for name in devices}


def _weights(gguf: GGUFFile) -> int:
    return sum(tensor.nbytes for tensor in gguf.tensors)
