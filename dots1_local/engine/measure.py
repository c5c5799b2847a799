"""A placement tried out in a process of its own, and timed at several depths of context.

A child leaves nothing behind for the next placement: no device memory, no environment variable
that the engine reads once, and no end of this process where the engine aborts. Tokens are random,
which spreads them over the experts.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dots1_local.devices import child
from dots1_local.engine.engine import Engine
from dots1_local.engine.model_params import buffer_names
from dots1_local.engine.report import Taken
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.placement.placement import MIN_BATCH, Placement, placement_from_json
from dots1_local.progress import Progress, silent

__all__ = ["Depth", "Trial", "measure_depths", "try_out"]

_WRITTEN = 24  # tokens written at each depth; the median of their times counts
_TIMEOUT = 900.0  # seconds for a ubatch, or for llama.cpp to make the context


@dataclass(frozen=True)
class Depth:
    """Tokens a second with `tokens` in the context.

    `prefill` is of the tokens read since the depth before, `decode` of single ones after them.
    """

    tokens: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class Trial:
    """What came of a placement: bytes by device as the engine says, speeds, seconds of loading.

    `used` are the bytes that the drivers of this machine's GPUs say are no longer free.
    """

    load_seconds: float
    taken: Mapping[str, Taken]
    used: Mapping[str, int]
    depths: tuple[Depth, ...]
    warnings: tuple[str, ...]


def try_out(
    path: str | Path,
    placement: Placement | None,
    depths: Sequence[int],
    *,
    workers: Sequence[str] = (),
    threads: int | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> Trial:
    """Load the model as placed, or as llama.cpp does by itself (None), and time it at `depths`.

    `workers` and `threads` (by default one a core) are for llama.cpp by itself; a placement has its
    own. `limit` bytes are left free on each GPU before the model is loaded, whatever it has.

    Raises:
        Dots1Error: it cannot be loaded so, or the engine failed.
    """
    request = {
        "path": str(path),
        "placement": None if placement is None else placement.to_json(),
        "depths": list(depths),
        "workers": list(workers),
        "threads": threads,
        "limit": limit,
    }
    environment = {}
    if placement is not None and placement.offload_min_batch is not None:
        environment[MIN_BATCH] = str(placement.offload_min_batch)  # devices are counted first
    doing = f"trying {Path(path).name}"
    answer = child.ask(
        __name__, request, doing, progress, timeout=_TIMEOUT, environment=environment
    )
    return Trial(
        load_seconds=answer["load_seconds"],
        taken={name: Taken(**sizes) for name, sizes in answer["taken"].items()},
        used=answer["used"],
        depths=tuple(Depth(**depth) for depth in answer["depths"]),
        warnings=tuple(answer["warnings"]),
    )


def measure_depths(
    engine: Engine, depths: Sequence[int], progress: Progress = silent
) -> tuple[Depth, ...]:
    """How fast the engine reads up to each of `depths` (ascending), and writes there.

    Raises:
        UsageError: depths that do not ascend, or beyond the context.
    """
    if not depths or any(b <= a for a, b in zip((0, *depths), depths, strict=False)):
        raise UsageError("contexts to measure at must ascend from 1")
    if depths[-1] + _WRITTEN > engine.n_ctx:
        raise UsageError(
            f"a context of {engine.n_ctx} tokens has no room to write {_WRITTEN} after "
            f"{depths[-1]} of them"
        )
    rng = np.random.default_rng(0)
    tokens: list[int] = rng.integers(0, engine.n_vocab, depths[-1] + _WRITTEN).tolist()
    _warm_up(engine, tokens)
    found, start = [], 0
    for depth in depths:
        prefill = _read(engine, tokens, start, depth, progress)
        found.append(Depth(depth, prefill, _write(engine, tokens, depth, progress)))
        engine.forget(depth)
        start = depth
    return tuple(found)


def _warm_up(engine: Engine, tokens: Sequence[int]) -> None:
    """Bring a mapped file's pages in, and the engine's graphs about."""
    engine.forget()
    first = tokens[: min(engine.n_ubatch, len(tokens) - 1)]
    engine.decode(first, 0)
    engine.decode(tokens[:1], len(first))
    engine.forget()


def _read(engine: Engine, tokens: Sequence[int], start: int, end: int, progress: Progress) -> float:
    begin = time.perf_counter()
    for place in range(start, end, engine.n_ubatch):
        stop = min(place + engine.n_ubatch, end)
        engine.decode(tokens[place:stop], place)
        progress(stop, len(tokens), "tokens", f"reading to {end:,}")
    return (end - start) / (time.perf_counter() - begin)


def _write(engine: Engine, tokens: Sequence[int], depth: int, progress: Progress) -> float:
    seconds = []
    for place in range(depth, depth + _WRITTEN):
        begin = time.perf_counter()
        engine.decode(tokens[place : place + 1], place)
        seconds.append(time.perf_counter() - begin)
        progress(place + 1, len(tokens), "tokens", f"writing at {depth:,}")
    return 1 / median(seconds)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The child's part."""
    from dots1_local.engine.abort import handling

    with handling(child.report_error):
        return _tried(request)


def _tried(request: Mapping[str, Any]) -> dict[str, Any]:
    with ExitStack() as stack:
        if request["limit"] is not None:
            stack.enter_context(_limited(request["limit"]))
        before, begin = _free(request), time.perf_counter()
        engine = stack.enter_context(_engine(request))
        seconds, lowest = time.perf_counter() - begin, _free(request)
        depths = measure_depths(engine, request["depths"], child.report_progress)
        lowest = {name: min(free, lowest[name]) for name, free in _free(request).items()}
        return {
            "load_seconds": seconds,
            "taken": {name: asdict(taken) for name, taken in engine.report.items()},
            "used": {name: free - lowest[name] for name, free in before.items()},
            "depths": [asdict(depth) for depth in depths],
            "warnings": list(engine.warnings),
        }


def _engine(request: Mapping[str, Any]) -> Engine:
    if (raw := request["placement"]) is None:
        return _unplaced(request)
    placement = placement_from_json(raw, "the placement")
    return Engine.open(
        request["path"],
        placement=placement,
        n_sequences=placement.sequences,
        shared_cache=placement.sequences > 1,
        progress=child.report_progress,
    )


def _unplaced(request: Mapping[str, Any]) -> Engine:
    """What llama.cpp's library makes of the file, told nothing but the context and threads.

    Its own 4 threads would be more than some machines have cores, and fewer than most.
    """
    from llama_cpp import llama_cpp as llama

    from dots1_local.devices import backends
    from dots1_local.devices.rpc import probe_all
    from dots1_local.engine import log as engine_log
    from dots1_local.engine.loading import Loaded
    from dots1_local.engine.model_params import settings
    from dots1_local.engine.report import read_report
    from dots1_local.files.gguf import GGUFFile
    from dots1_local.verify import check_loadable

    probe_all(request["workers"])
    for worker in request["workers"]:
        backends.add_worker(worker)
    gguf = GGUFFile.open(request["path"])
    check_loadable(gguf)
    params = llama.llama_context_default_params()
    n_ctx = request["depths"][-1] + _WRITTEN
    made = settings(gguf, None, n_ctx=n_ctx, n_ubatch=params.n_ubatch, threads=request["threads"])
    params.n_ctx, params.n_threads, params.n_threads_batch = n_ctx, made.threads, made.threads
    with engine_log.errors() as log:
        model = llama.llama_model_load_from_file(
            bytes(gguf.files[0]), llama.llama_model_default_params()
        )
        context = model and llama.llama_init_from_model(model, params)
    if not context:
        raise Dots1Error(f"llama.cpp does not load it by itself: {log.last()}")
    names = [device.name for device in backends.devices() if device.kind in ("gpu", "igpu")]
    report = read_report(
        log.sizes, buffer_names(names), sum(tensor.nbytes for tensor in gguf.tensors)
    )
    return Engine(gguf, Loaded(model, context, report, ()), made, None)


@contextmanager
def _limited(limit: int) -> Iterator[None]:
    """Take what GPUs have free beyond `limit`, so that more cannot be used unnoticed."""
    from dots1_local.devices.bench_graph import BenchDevice

    with ExitStack() as held:
        for name, free in _local_gpus().items():
            if free > limit:
                held.enter_context(BenchDevice(name, free - limit))
        yield


def _free(request: Mapping[str, Any]) -> dict[str, int]:
    """Bytes free on GPUs; not asked where none is used, as that starts their drivers."""
    placement = request["placement"]
    return _local_gpus() if placement is None or placement["layers"] else {}


def _local_gpus() -> dict[str, int]:
    """Bytes free on each GPU of this machine, as its driver says."""
    from dots1_local.devices import backends

    found = backends.devices()
    return {each.name: each.free for each in found if each.kind == "gpu" and each.backend != "RPC"}


if __name__ == "__main__":
    child.respond(_answer)
