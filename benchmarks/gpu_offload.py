"""Placements predicted and measured on this machine's GPU, limited to a smaller card's memory.

    python -m benchmarks.gpu_offload OUT --seconds 480              with a GPU
    python -m benchmarks.gpu_offload OUT --device worker            without one: tests this program

A random model of the real widths, with as many layers as disk, RAM and time allow, is loaded in one
placement after the other, each in a child process. A model of fewer than 62 layers gets its share
of a 24 GB card's memory; the rest of the GPU's memory is occupied, so that the model cannot use it.
OUT/results.json and OUT/table.md are written again after each placement. The engine is built first
by `benchmarks/gpu_offload.sh`.

With `--device worker` this plans for a worker on this machine as if it were a GPU, with a small
model. The worker shares the processor's cores, so its speeds mean little.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_table import markdown
from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import Hardware
from dots1_local.devices.machine import this_machine
from dots1_local.engine.measure import (
    BenchResult,
    Depth,
    Measurement,
    measure_placement,
    predicted_depths,
)
from dots1_local.errors import Dots1Error
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.alternatives import baselines, with_ubatch
from dots1_local.placement.footprint import GPU_RESERVE, RAM_RESERVE, Usage, footprint
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import HostMemory, Placement
from dots1_local.placement.planner import place
from dots1_local.quant.recipes import make_plan
from dots1_local.sizes import parse_size
from tests.workers import local_worker
from tools.make_gguf import write_gguf
from tools.make_wide import published_config

_MOST_LAYERS = 62
_UNSHARED = 2_000_000_000  # bytes of a card for reserve, head and buffers, whatever the layers
# For the number of layers: placements to come, and the speeds of loading and writing.
_RUNS, _LOADED, _WRITTEN = 12, 2e9, 1e9  # bytes a second
_DEPTHS = ((512, 4608), (512,), (128,))  # the first ones that should not take longer than this
_LONGEST = 20.0  # seconds
_ROOM = 32  # tokens of the context that are decoded at a depth
_TIMEOUT = 90.0  # seconds that a run may take, or a third of the time left if that is more
_UBATCHES = (512, 1024, 2048, 4096)
_HOST_MEMORIES: tuple[HostMemory, ...] = ("pinned", "mapped")
_SMALL = {
    "num_hidden_layers": 8, "hidden_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 8, "intermediate_size": 2816, "moe_intermediate_size": 512,
    "n_routed_experts": 32, "vocab_size": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is measured, where, and until when; `limit` bytes of a GPU are free for the model."""

    out: Path
    deadline: float
    graph: ModelGraph
    machine: Hardware
    limit: int | None
    context: int
    workers: tuple[str, ...]
    results: dict[str, Any]

    def measure(self, name: str, placement: Placement | None) -> None:
        """Predict and measure a placement (None: llama.cpp's own), and write down the results."""
        left = self.deadline - time.monotonic()
        print(f"{name} ({left:.0f} s left)", file=sys.stderr)
        predicted: tuple[Depth, ...] = ()
        usage: Mapping[str, Usage] = {}
        depths: Sequence[int] = self._possible[0]
        if placement is not None:
            usage = footprint(self.graph, placement)
            depths, predicted = self._predict(placement)
        measurement, error = None, None
        try:
            measurement = self._measure(placement, depths, min(left, max(left / 3, _TIMEOUT)))
        except Dots1Error as failure:
            error = str(failure)
        outcome = BenchResult(name, placement, predicted, usage, measurement, error).to_json()
        outcome["planned_bytes"] = {device: each.total for device, each in usage.items()}
        self.results["outcomes"].append(outcome)
        self.write()

    def _predict(self, placement: Placement) -> tuple[Sequence[int], tuple[Depth, ...]]:
        """The depths to measure at, which should not take long, and the predicted speeds there."""
        for depths in self._possible:
            predicted = predicted_depths(self.graph, self.machine, placement, depths)
            starts = (0, *depths)
            seconds = sum(
                (depth.tokens - start) / depth.prefill
                for start, depth in zip(starts, predicted, strict=False)
            )
            if seconds <= _LONGEST:
                break
        return depths, predicted

    @property
    def _possible(self) -> list[Sequence[int]]:
        return [depths for depths in _DEPTHS if depths[-1] + _ROOM <= self.context]

    def _measure(
        self, placement: Placement | None, depths: Sequence[int], seconds: float
    ) -> Measurement:
        end = time.monotonic() + seconds

        def watch(done: int, total: int, unit: str, what: str) -> None:
            if time.monotonic() > end:
                raise Dots1Error(f"not finished in {seconds:.0f} s")

        watch(0, 0, "", "")
        model = self.graph.path
        return measure_placement(
            model, placement, depths, workers=self.workers, limit=self.limit, progress=watch
        )

    def write(self) -> None:
        """Write everything that is known so far to disk, each file whole."""
        for name, text in (
            ("results.json", json.dumps(self.results, indent=2) + "\n"),
            ("table.md", markdown(self.results)),
        ):
            partial = self.out / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.out / name)


def main() -> None:
    """Measure what the command line asks for, within its number of seconds."""
    args = _arguments()
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as open_workers:
            _benchmark(args, start + args.seconds, open_workers)
    except Dots1Error as error:
        sys.exit(str(error))


def _benchmark(args: argparse.Namespace, deadline: float, open_workers: ExitStack) -> None:
    workers: tuple[str, ...] = ()
    if args.device == "worker":
        workers = (open_workers.enter_context(local_worker()).endpoint,)
    machine = this_machine(workers)
    if not machine.devices:
        sys.exit("the engine has no device besides the CPU; try --device worker")
    config = _geometry(args, machine, deadline - time.monotonic())
    model = args.work / f"{args.recipe}-{config['num_hidden_layers']}-{args.device}.gguf"
    if not model.exists():
        partial = model.with_suffix(".partial")
        write_gguf(partial, config, args.recipe).rename(model)
    device = machine.devices[0]
    cpu = machine.cpu
    if workers:  # it stands for a GPU, and neither the GPU nor RAM has room for everything
        free = GPU_RESERVE + model.stat().st_size * 11 // 10
        cpu = replace(cpu, free=RAM_RESERVE + model.stat().st_size)
    else:
        share = config["num_hidden_layers"] / _MOST_LAYERS
        free = min(device.free, round(_UNSHARED + (args.vram - _UNSHARED) * share))
    machine = replace(machine, cpu=cpu, devices=(replace(device, worker=None, free=free),))
    results = {
        "machine": machine.to_json(),
        "device_free": device.free,
        "limit": free,
        "vram": args.vram,
        "device": args.device,
        "model": {"recipe": args.recipe, "bytes": model.stat().st_size, **config},
        "context": args.context,
        "outcomes": [],
    }
    limit = None if workers else free
    graph = ModelGraph.read(GGUFFile.open(model))
    run = Run(args.out, deadline, graph, machine, limit, args.context, workers, results)
    run.write()
    for name, placement in _baselines(run):
        run.measure(name, placement)


def _baselines(run: Run) -> Iterator[tuple[str, Placement | None]]:
    """What to measure, the most informative first."""
    graph, machine = run.graph, run.machine
    ours = place(graph, machine, context=run.context)
    yield f"ours ({ours.host_memory}, ubatch {ours.ubatch})", _on_workers(run, ours)
    for name, placement in (
        *baselines(graph, machine, ours),
        *((f"ours, {kind}", replace(ours, host_memory=kind)) for kind in _HOST_MEMORIES),
        *((f"ours, ubatch {n}", with_ubatch(graph, machine, ours, n)) for n in _UBATCHES),
    ):
        if placement != ours:
            yield name, _on_workers(run, placement)
    yield "llama.cpp by itself", None


def _on_workers(run: Run, placement: Placement) -> Placement:
    return replace(placement, workers=run.workers if placement.layers else ())


def _geometry(args: argparse.Namespace, machine: Hardware, seconds: float) -> dict[str, Any]:
    """The config.json of a model with as many layers as there is room and time for."""
    if args.device == "worker":
        return published_config(**_SMALL)
    room = min(
        shutil.disk_usage(args.work).free - 2e9,
        (machine.cpu.free - RAM_RESERVE) / 2,  # the page cache holds the file too
        seconds / 2 / (_RUNS / _LOADED + 1 / _WRITTEN),
    )
    counts = range(3, _MOST_LAYERS + 1)
    fitting = (n for n in counts if _bytes(published_config(num_hidden_layers=n), args) < room)
    return published_config(num_hidden_layers=args.layers or max(fitting, default=counts[0]))


def _bytes(config: dict[str, Any], args: argparse.Namespace) -> int:
    plan = make_plan(parsed := Dots1Config.from_json(config), args.recipe, has_importance=True)
    return sum(tensor.nbytes for tensor in plan.tensors(parsed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--device", choices=("gpu", "worker"), default="gpu", help="[gpu]")
    parser.add_argument("--seconds", type=float, default=480, help="time for everything [480]")
    parser.add_argument(
        "--vram",
        type=parse_size,
        default="24GB",
        help="memory of the GPU for 62 layers; fewer layers get their share [24GB]",
    )
    parser.add_argument("--recipe", default="DQ4", help="of the model [DQ4]")
    parser.add_argument("--context", type=int, help="tokens [8192; 2048 with a worker]")
    parser.add_argument("--layers", type=int, help="of the model [as many as fit]")
    parser.add_argument(
        "--work", type=Path, default=Path("build/gpu_offload/models"), help="folder for the model"
    )
    args = parser.parse_args()
    args.context = args.context or (2048 if args.device == "worker" else 8192)
    if args.context < (least := _DEPTHS[-1][-1] + _ROOM):
        parser.error(f"--context must be {least} or more")
    return args


if __name__ == "__main__":
    main()
