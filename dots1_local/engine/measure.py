"""Placements measured at several depths of context, and compared with what was predicted.

Each is measured in a child process, which leaves nothing behind: no device memory, no environment
variable that the engine reads once, and no end of this process if the engine aborts. Tokens are
random, which spreads them over the experts.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from dots1_local.devices import backends, child, rpc
from dots1_local.devices.bench_graph import BenchDevice
from dots1_local.devices.hardware import Hardware
from dots1_local.engine.abort import on_abort
from dots1_local.engine.engine import Engine, open_loadable
from dots1_local.engine.loading import load_by_default
from dots1_local.engine.log import Allocated, compare
from dots1_local.engine.model_params import EngineParams
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.json_file import convert_json
from dots1_local.placement.footprint import Usage, footprint
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import MIN_BATCH, Placement, placement_from_json
from dots1_local.placement.speed_model import SpeedModel, is_measured
from dots1_local.progress import Progress, silent

__all__ = [
    "BenchResult", "Depth", "Measurement", "bench", "measure_depths", "measure_placement",
    "predicted_depths",
]  # fmt: skip

_N_DECODED = 24  # tokens at each depth; the median of their times counts
_TIMEOUT = 900.0  # seconds for a ubatch; a process that waits for a device does not compute


@dataclass(frozen=True)
class Depth:
    """Tokens a second with `tokens` in the context.

    `prefill` is the speed of the tokens since the depth before, `decode` of single tokens after it.
    """

    tokens: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class Measurement:
    """How long a placement took to load, what it took of each device, and how fast it ran.

    `allocated` is by the engine's log. `driver_bytes` are the bytes that are no longer free by the
    drivers of this machine's GPUs.
    """

    load_seconds: float
    allocated: Mapping[str, Allocated]
    driver_bytes: Mapping[str, int]
    depths: tuple[Depth, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class BenchResult:
    """What was predicted of a placement, if anything, and its measurement or the error."""

    name: str
    placement: Placement | None
    predicted: tuple[Depth, ...]
    usage: Mapping[str, Usage]
    measurement: Measurement | None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for scripts."""
        found = self.measurement
        return {
            "name": self.name,
            "placement": self.placement.to_json() if self.placement else None,
            "predicted": [asdict(depth) for depth in self.predicted],
            "measured": [asdict(depth) for depth in found.depths] if found else [],
            "bytes": [asdict(each) for each in compare(found.allocated, self.usage)]
            if found
            else [],
            "driver_bytes": dict(found.driver_bytes) if found else {},
            "load_seconds": found.load_seconds if found else None,
            "warnings": list(found.warnings) if found else [],
            "error": self.error,
        }


def bench(
    graph: ModelGraph,
    machine: Hardware,
    name: str,
    placement: Placement | None,
    depths: Sequence[int],
    progress: Progress = silent,
    *,
    threads: int | None = None,
) -> BenchResult:
    """Predict and measure a placement, which may fail; see `measure_placement`."""
    workers = [device.worker for device in machine.devices if device.worker]
    predicted: tuple[Depth, ...] = ()
    usage: Mapping[str, Usage] = {}
    measurement, error = None, None
    try:
        if placement is not None:
            predicted = predicted_depths(graph, machine, placement, depths)
            usage = footprint(graph, placement)
        path = graph.path
        measurement = measure_placement(
            path, placement, depths, workers=workers, threads=threads, progress=progress
        )
    except Dots1Error as failure:
        error = str(failure)
    return BenchResult(name, placement, predicted, usage, measurement, error)


def predicted_depths(
    graph: ModelGraph, machine: Hardware, placement: Placement, depths: Sequence[int]
) -> tuple[Depth, ...]:
    """What `measure_placement` should find; nothing if a device's speed is unknown."""
    if not is_measured(machine, placement.used_devices):
        return ()
    model = SpeedModel(graph, machine, placement)
    return tuple(
        Depth(end, (end - start) / model.prefill(end - start, start), 1 / model.decode(end))
        for start, end in pairwise((0, *depths))
    )


def measure_placement(
    path: str | Path,
    placement: Placement | None,
    depths: Sequence[int],
    *,
    workers: Sequence[str] = (),
    threads: int | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> Measurement:
    """Load the model as placed, or as llama.cpp does by itself (None), and time it at `depths`.

    `workers` and `threads` (by default one a core) are for llama.cpp by itself; a placement has its
    own. `limit` is the bytes that are left free on each GPU before the model is loaded.

    Raises:
        Dots1Error: the model cannot be loaded so, or the engine failed.
    """
    environment = {}
    if placement is not None and placement.offload_min_batch is not None:
        # The child asks the devices for their memory, which starts them, before it loads.
        environment[MIN_BATCH] = str(placement.offload_min_batch)
    request = {
        "path": str(path),
        "plan": None if placement is None else placement.to_json(),
        "depths": list(depths),
        "workers": list(workers),
        "threads": threads,
        "limit": limit,
    }
    used = placement.used_devices if placement else ()
    doing = f"measuring {Path(path).name}" + (f" on {', '.join(used)}" if used else "")
    answer = child.ask(
        __name__,
        request,
        doing,
        progress,
        devices=used,
        timeout=_TIMEOUT,
        environment=environment,
    )
    return convert_json(answer, Measurement)


def measure_depths(
    engine: Engine, depths: Sequence[int], progress: Progress = silent
) -> tuple[Depth, ...]:
    """Time prefill up to each of `depths` (ascending), and decoding there.

    Raises:
        UsageError: the depths do not ascend, or exceed the context.
    """
    if not depths or any(b <= a for a, b in pairwise((0, *depths))):
        raise UsageError("contexts to measure at must ascend from 1")
    if depths[-1] + _N_DECODED > engine.n_ctx:
        raise UsageError(
            f"a context of {engine.n_ctx} tokens has no room to decode {_N_DECODED} tokens after "
            f"{depths[-1]}"
        )
    rng = np.random.default_rng(0)
    tokens: list[int] = rng.integers(0, engine.n_vocab, depths[-1] + _N_DECODED).tolist()
    _warm_up(engine, tokens)
    found, start = [], 0
    for depth in depths:
        prefill = _prefill(engine, tokens, start, depth, progress)
        found.append(Depth(depth, prefill, _decode(engine, tokens, depth, progress)))
        engine.forget(depth)
        start = depth
    return tuple(found)


def _warm_up(engine: Engine, tokens: Sequence[int]) -> None:
    """Read a mapped file's pages, and build the engine's graphs."""
    engine.forget()
    first = tokens[: min(engine.n_ubatch, len(tokens) - 1)]
    engine.decode(first, 0)
    engine.decode(tokens[:1], len(first))
    engine.forget()


def _prefill(
    engine: Engine, tokens: Sequence[int], start: int, end: int, progress: Progress
) -> float:
    begin = time.perf_counter()
    for place in range(start, end, engine.n_ubatch):
        stop = min(place + engine.n_ubatch, end)
        engine.decode(tokens[place:stop], place)
        progress(stop, len(tokens), "tokens", f"prefill to {end:,}")
    return (end - start) / (time.perf_counter() - begin)


def _decode(engine: Engine, tokens: Sequence[int], depth: int, progress: Progress) -> float:
    seconds = []
    for place in range(depth, depth + _N_DECODED):
        begin = time.perf_counter()
        engine.decode(tokens[place : place + 1], place)
        seconds.append(time.perf_counter() - begin)
        progress(place + 1, len(tokens), "tokens", f"decoding at {depth:,}")
    return 1 / median(seconds)


def _answer(request: Mapping[str, Any]) -> Any:
    """The child's part of `measure_placement`."""
    plan, depths, limit = (request[name] for name in ("plan", "depths", "limit"))
    placement = None if plan is None else placement_from_json(plan, "the placement")
    uses_gpus = placement is None or placement.layers  # asking for their memory starts drivers
    with on_abort(child.report_error), ExitStack() as stack:
        if limit is not None:
            stack.enter_context(_limited(limit))
        before, begin = _free_on_gpus() if uses_gpus else {}, time.perf_counter()
        engine = stack.enter_context(_open(request, placement))
        seconds, loaded = time.perf_counter() - begin, _free_on_gpus() if before else {}
        measured = measure_depths(engine, depths, child.report_progress)
        last = _free_on_gpus() if before else {}
        used = {name: free - min(loaded[name], last[name]) for name, free in before.items()}
        found = Measurement(seconds, engine.report, used, measured, engine.warnings)
        return msgspec.to_builtins(found)


def _open(request: Mapping[str, Any], placement: Placement | None) -> Engine:
    """An engine as placed, or as llama.cpp sets it up, but with as many threads as the others have.

    llama.cpp's default of 4 threads is more than some machines have cores, and fewer than most.
    """
    if placement is not None:
        return Engine.open(
            request["path"],
            placement=placement,
            n_sequences=placement.sequences,
            shared_cache=placement.sequences > 1,
            progress=child.report_progress,
        )
    rpc.probe(request["workers"])
    for worker in request["workers"]:
        backends.add_worker(worker)
    gguf, n_ctx = open_loadable(request["path"]), request["depths"][-1] + _N_DECODED
    params = EngineParams.choose(gguf, None, n_ctx=n_ctx, threads=request["threads"])
    return Engine(gguf, load_by_default(gguf, params), params, None)


@contextmanager
def _limited(limit: int) -> Iterator[None]:
    """Occupy the GPUs' memory beyond `limit`, so that a model cannot use more unnoticed."""
    with ExitStack() as stack:
        for name, free in _free_on_gpus().items():
            if free > limit:
                stack.enter_context(BenchDevice(name, free - limit))
        yield


def _free_on_gpus() -> dict[str, int]:
    """Bytes free on each GPU of this machine, as its driver says."""
    found = backends.devices()
    return {each.name: each.free for each in found if each.kind == "gpu" and each.backend != "RPC"}


if __name__ == "__main__":
    child.respond(_answer)
