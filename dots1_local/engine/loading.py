"""A model and its context made by llama.cpp, and what is raised where that fails."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as llama

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import CPU
from dots1_local.devices.limits import available_ram
from dots1_local.devices.rpc import keep_alive
from dots1_local.engine import log as engine_log
from dots1_local.engine.model_params import (
    Settings,
    buffer_names,
    connected,
    endpoints,
    free_memory,
    model_params,
    prepare,
    settings,
    trained_for,
)
from dots1_local.engine.report import Report, device_of, read_report, surprises
from dots1_local.errors import Dots1Error, GGUFError
from dots1_local.files.gguf import GGUFFile
from dots1_local.ggml import quant_type
from dots1_local.placement.footprint import Usage, footprint, kv_bytes
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement, human_context
from dots1_local.progress import Progress, silent
from dots1_local.sizes import human_bytes

__all__ = ["Loaded", "OutOfMemory", "dry_run", "load_model"]

_FLASH_ATTENTION = {None: -1, False: 0, True: 1}  # enum llama_flash_attn_type
_NO_LOAD_MODE = 0  # LLAMA_LOAD_MODE_NONE
_ALLOCATION = re.compile(r"failed to allocate (\S+) buffer of size (\d+)")


class OutOfMemory(Dots1Error):
    """`device` lacks `nbytes` bytes for a model, of which nothing is left; `reason` says when."""

    def __init__(self, device: str, nbytes: int, reason: str) -> None:
        super().__init__(device, nbytes, reason)  # all of it, so that it can be pickled
        self.device, self.nbytes, self.reason = device, nbytes, reason

    def __str__(self) -> str:
        return f"{self.reason}; take a shorter context, or plan again with less --vram or --ram"


@dataclass(frozen=True)
class Loaded:
    """llama.cpp's handles of a model and its context, what they took, and what to tell.

    `predicted` is what a placement should take of each device; without one, nothing.
    """

    model: Any
    context: Any
    report: Report
    warnings: tuple[str, ...]
    predicted: Mapping[str, Usage] = field(default_factory=dict)
    workers: tuple[str, ...] = ()

    def free(self) -> None:
        connected.subtract(self.workers)
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)


def load_model(
    gguf: GGUFFile,
    placement: Placement | None,
    wanted: Settings,
    progress: Progress = silent,
    *,
    no_alloc: bool = False,
) -> Loaded:
    """Load the model where the placement says, all of it to the CPU without one.

    Raises:
        UsageError: the placement is for another file, or names a device that is not there.
        GGUFError: llama.cpp cannot load the file.
        OutOfMemory: a device has not enough.
        Dots1Error: a worker does not answer, or llama.cpp cannot make the context.
    """
    warnings = list(_context_warnings(gguf, wanted))
    if placement:
        warnings += prepare(gguf, placement)
    params = model_params(placement)
    predicted: Mapping[str, Usage] = {}
    if no_alloc:
        params.no_alloc, params.load_mode = True, _NO_LOAD_MODE  # it aborts over a mapped file
    elif placement:
        predicted = _predict(gguf, placement, wanted)
        _check_free(predicted, placement.used_devices)
    if not no_alloc:
        _check_ram(wanted, predicted[CPU].kv if placement else _kv_cache(gguf, wanted))
    used = placement.used_devices if placement else ()
    names, workers = buffer_names(used), endpoints(placement)
    model, sizes = _make_model(gguf, params, names, progress)
    keep_alive({int(worker.rpartition(":")[2]) for worker in workers})
    try:
        context, more = _make_context(gguf, model, _context_params(wanted), names)
    except BaseException:
        llama.llama_model_free(model)
        raise
    weights = sum(tensor.nbytes for tensor in gguf.tensors)
    report = read_report([*sizes, *more], names, weights)
    warnings += surprises(report, predicted)
    connected.update(workers)
    return Loaded(model, context, report, tuple(warnings), predicted, workers)


def dry_run(path: str | Path, placement: Placement, **options: Any) -> Report:
    """What the engine would take to compute; weights and KV cache, never allocated, are 0.

    `options` are those of `settings`.
    """
    gguf = GGUFFile.open(path)
    loaded = load_model(gguf, placement, settings(gguf, placement, **options), no_alloc=True)
    loaded.free()
    return loaded.report


def _context_warnings(gguf: GGUFFile, wanted: Settings) -> Iterator[str]:
    trained = trained_for(gguf)
    if wanted.n_ctx > trained:
        yield (
            f"{gguf.files[0]} was trained for contexts of {trained:,} tokens; beyond them, in one "
            f"of {wanted.n_ctx:,}, answers fall apart"
        )
    if wanted.shared_cache and wanted.n_sequences > 1 and wanted.flash_attention is False:
        yield (  # masked tokens are computed too
            "without flash attention each answer is slowed down by all that the others have in the "
            "KV cache, also when they are over; set flash_attention to true"
        )


def _predict(gguf: GGUFFile, placement: Placement, wanted: Settings) -> Mapping[str, Usage]:
    return footprint(
        ModelGraph.read(gguf),
        wanted.applied_to(placement),
        n_sequences=1 if wanted.shared_cache else wanted.n_sequences,
        n_outputs=wanted.n_outputs,
    )


def _check_free(predicted: Mapping[str, Usage], devices: Iterable[str]) -> None:
    """Find out now what would else show after minutes of loading."""
    for device in devices:
        needed, free = predicted[device].total, free_memory(device)
        if free is not None and needed > free:
            raise OutOfMemory(
                device,
                needed - free,
                f"{device} has {human_bytes(free)} free where the placement takes "
                f"{human_bytes(needed)}",
            )


def _kv_cache(gguf: GGUFFile, wanted: Settings) -> int:
    """Bytes that the KV caches of all sequences take."""
    config = Dots1Config.from_gguf(gguf.keys, gguf.files[0])
    if wanted.shared_cache:
        return kv_bytes(config, wanted.n_ctx * wanted.n_sequences, wanted.kv_type)
    return wanted.n_sequences * kv_bytes(config, wanted.n_ctx, wanted.kv_type)


def _check_ram(wanted: Settings, cache: int) -> None:
    """The same of RAM, which a system may give away and then end the process over.

    The weights do not count: where they are mapped they need not all be there.
    """
    ram = available_ram()
    if ram is not None and cache > ram.available:
        tokens = human_context(wanted.n_ctx, wanted.n_sequences)
        raise OutOfMemory(
            CPU,
            cache - ram.available,
            f"RAM has {human_bytes(ram.available)} free where a KV cache of {tokens} tokens takes "
            f"{human_bytes(cache)}",
        )


def _context_params(wanted: Settings) -> Any:
    params = llama.llama_context_default_params()
    params.n_ctx = wanted.n_ctx * wanted.n_sequences
    params.n_seq_max = wanted.n_sequences
    params.n_batch = params.n_ubatch = wanted.n_ubatch
    params.n_outputs_max = wanted.n_outputs
    params.kv_unified = wanted.shared_cache
    params.n_threads = params.n_threads_batch = wanted.threads
    params.flash_attn_type = _FLASH_ATTENTION[wanted.flash_attention]
    params.type_k = params.type_v = quant_type(wanted.kv_type).ggml
    params.no_perf = True
    return params


def _make_model(
    gguf: GGUFFile, params: Any, devices: Mapping[str, str], progress: Progress
) -> tuple[Any, list[str]]:
    """A model, and the log's lines on the sizes of its buffers."""
    total, interrupted = gguf.nbytes, []

    @llama.llama_progress_callback  # type: ignore[untyped-decorator]
    def report(fraction: float, _: Any) -> bool:
        try:
            progress(int(fraction * total), total, "bytes", "loading")
        except BaseException as error:  # Ctrl-C arrives here; ctypes would swallow it
            interrupted.append(error)
        return not interrupted

    params.progress_callback = report
    with engine_log.errors() as errors:
        model = llama.llama_model_load_from_file(bytes(gguf.files[0]), params)
    if interrupted:
        raise interrupted[0]
    if model is None:
        _check_memory(errors.lines, devices, "the weights")
        raise GGUFError(f"llama.cpp cannot load {gguf.files[0]}: {errors.last()}")
    return model, errors.sizes


def _make_context(
    gguf: GGUFFile, model: Any, params: Any, devices: Mapping[str, str]
) -> tuple[Any, list[str]]:
    with engine_log.errors() as errors:
        context = llama.llama_init_from_model(model, params)
    if context is None:
        _check_memory(errors.lines, devices, f"a context of {params.n_ctx:,} tokens")
        raise Dots1Error(
            f"llama.cpp cannot make a context of {params.n_ctx} tokens for {gguf.files[0]} "
            f"(try a smaller one): {errors.last()}"
        )
    return context, errors.sizes


def _check_memory(errors: Iterable[str], devices: Mapping[str, str], what: str) -> None:
    """Raise OutOfMemory where these lines of the log say that an allocation failed."""
    for match in filter(None, map(_ALLOCATION.search, errors)):
        device, nbytes = device_of(match[1], devices), int(match[2])
        raise OutOfMemory(
            device,
            nbytes,
            f"{device} ran out of memory: it has not {human_bytes(nbytes)} more for {what}",
        )
