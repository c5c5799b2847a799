"""Our placement against all placements by layer counts, measured: is a faster one missed?

    python -m tools.make_gguf build/three.gguf --layers 3 --vocab 16000
    python -m benchmarks.bench_placement build/three.gguf --vram 2GB           with a GPU, or
    python -m benchmarks.bench_placement build/three.gguf --ram 4.1GB --worker 127.0.0.1:50052

The other placements put n whole layers on the machine's first device, the first or the last ones,
or everything but the experts of n layers. Placements that do not fit are left out. Each is measured
once; then ours and the best of the others are measured in turn, so that a drift of the machine
affects both. The result is the time of the planner's reference turn: a prompt, then an answer.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

from dots1_local.devices.hardware import Hardware
from dots1_local.devices.machine import this_machine
from dots1_local.engine.measure import measure_placement
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.alternatives import all_on_cpu, experts_in_ram
from dots1_local.placement.footprint import limited, shortfall
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement
from dots1_local.placement.planner import place
from dots1_local.placement.speed_model import reference_turn
from dots1_local.sizes import parse_size

_DEPTH, _CONTEXT = 512, 1024
_ROUNDS = 3


def main() -> None:
    """Measure what the command line asks for, and print a Markdown table."""
    args = _arguments()
    gguf = GGUFFile.open(args.model)
    graph = ModelGraph.read(gguf)
    machine = limited(
        this_machine(args.worker),
        vram=parse_size(args.vram) if args.vram else None,
        ram=parse_size(args.ram) if args.ram else None,
    )
    ours = place(gguf, machine, context=_CONTEXT)
    others = {
        name: placement
        for name, placement in _by_layer_counts(machine, ours)
        if all(short <= 0 for short in shortfall(graph, machine, placement).values())
    }
    print(f"ours: {dict(ours.layers)}, {list(ours.overrides)}, {ours.host_memory}\n")
    print("| placement | prefill, tok/s | decode, tok/s | turn, s |\n|---|---|---|---|")
    seconds = {name: _turn(args.model, name, placement) for name, placement in others.items()}
    best = min(seconds, key=lambda name: seconds[name])
    rounds = [
        (_turn(args.model, "ours", ours), _turn(args.model, best, others[best]))
        for _ in range(_ROUNDS)
    ]
    print(f"\nours / best of {len(others)}: {median(a / b for a, b in rounds):.3f} ({best})")


def _by_layer_counts(machine: Hardware, ours: Placement) -> Iterator[tuple[str, Placement]]:
    yield "all on the CPU", all_on_cpu(ours)
    if not machine.devices:
        return
    device, blocks = machine.devices[0].name, ours.blocks
    bare = experts_in_ram(machine, ours, ())
    for memory in ("plain", "repacked") if machine.devices[0].worker else ("pinned",):
        held = replace(bare, host_memory=memory)
        for count in range(1, blocks + 2):
            yield f"last {count} layers, {memory}", replace(held, layers={device: count})
        for count in range(1, blocks + 1):
            first = experts_in_ram(machine, held, range(count))
            last = experts_in_ram(machine, held, range(blocks - count, blocks))
            for which, placement in (("first", first), ("last", last)):
                yield (
                    f"all but experts of the {which} {count} layers, {memory}",
                    replace(placement, host_memory=memory),
                )


def _turn(model: Path, name: str, placement: Placement) -> float:
    prompt, answer = reference_turn(_CONTEXT)
    [depth] = measure_placement(model, placement, [_DEPTH]).depths
    seconds = prompt / depth.prefill + answer / depth.decode
    print(f"| {name} | {depth.prefill:.1f} | {depth.decode:.2f} | {seconds:.2f} |", flush=True)
    return seconds


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a dots1 GGUF file")
    parser.add_argument("--worker", action="append", default=[], help="HOST:PORT of a worker")
    parser.add_argument("--vram", help="memory of each GPU to plan with")
    parser.add_argument("--ram", help="RAM to plan with")
    return parser.parse_args()


if __name__ == "__main__":
    main()
