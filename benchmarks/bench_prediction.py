"""Predicted speed beside real speed and llama.cpp's own, for mixes of a few layers of real widths.

    python -m benchmarks.bench_prediction --work build/prediction

In every round the speeds of the mix's types are measured anew, then our placement, then llama.cpp
by itself: a machine whose speed drifts changes all three. Each mix takes 2 to 6 GB of disk and is
deleted. With `taskset -c 0`, one thread is measured.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from dots1_local.devices.backends import device
from dots1_local.devices.hardware import Hardware, hardware_from_json
from dots1_local.devices.machine import this_machine
from dots1_local.devices.speed import measure_speed
from dots1_local.engine.measure import Depth, measure_placement, predicted_depths
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.planner import place
from tools.make_gguf import write_gguf
from tools.make_wide import published_config

_MIXES = ("DQ2", "DQ3", "DQ4", "DQ5", "IQ2_XXS", "IQ3_XXS", "Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS")
_DEPTHS = (512, 3000)
_CONTEXT, _LAYERS, _VOCABULARY = 4096, 3, 32000
_ALWAYS = ("F32", "F16", "Q8_0")  # whose speeds tell the bandwidth, besides the types of the mix


@dataclass(frozen=True)
class Round:
    """What was predicted and measured in one round, by depth."""

    predicted: Sequence[Depth]
    ours: Sequence[Depth]
    stock: Sequence[Depth]


def measured(machine: Hardware, types: Sequence[str]) -> Hardware:
    """The machine with the speeds that its CPU has now, measured in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--measure", *types]
    command += ["--threads", str(machine.cores)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return hardware_from_json(json.loads(answer.splitlines()[-1]), "the answer")


def answer(types: Sequence[str], threads: int) -> None:
    """Print this machine with speeds for a few types."""
    machine = this_machine(measure=False)
    speed = measure_speed(device("CPU"), threads, types=types)
    print(json.dumps(replace(machine, cpu=replace(machine.cpu, speed=speed)).to_json()))


def rounds(path: Path, machine: Hardware, count: int) -> Iterator[Round]:
    """Measure the speeds, the placement and llama.cpp by itself, one after the other."""
    graph = ModelGraph.read(GGUFFile.open(path))
    types = sorted({*_ALWAYS, *(tensor.type for tensor in graph.tensors)})
    placement = None
    for _ in range(count):
        now = measured(machine, types)
        placement = placement or place(graph, now, context=_CONTEXT)
        yield Round(
            predicted_depths(graph, now, placement, _DEPTHS),
            measure_placement(path, placement, _DEPTHS).depths,
            measure_placement(path, None, _DEPTHS, threads=machine.cores).depths,
        )


def row(mix: str, found: Sequence[Round], index: int) -> tuple[str, dict[str, tuple[float, float]]]:
    """A row of the table, and by what was measured the errors of prediction and ours / stock."""
    cells, ratios = [mix, f"{_DEPTHS[index]:,}"], {}
    for what in ("prefill", "decode"):
        ours, stock, predicted = (
            [getattr(each[index], what) for each in kind]
            for kind in zip(*((r.ours, r.stock, r.predicted) for r in found), strict=True)
        )
        error = median(p / o - 1 for p, o in zip(predicted, ours, strict=True))
        gain = median(o / s for o, s in zip(ours, stock, strict=True))
        ratios[what] = error, gain
        cells += [f"{median(ours):.1f}", f"{error:+.0%}", f"{median(stock):.1f}", f"{gain:.2f}"]
    return f"| {' | '.join(cells)} |", ratios


def main() -> None:
    """Print a table with a row for each mix and depth, and the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixes", nargs="+", default=_MIXES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/prediction"))
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        answer(options.measure, options.threads)
        return
    machine = this_machine(measure=False)
    options.work.mkdir(parents=True, exist_ok=True)
    config = published_config(num_hidden_layers=_LAYERS, vocab_size=_VOCABULARY)
    columns = [f"{what}{each}" for what in ("prefill", "decode") for each in _COLUMNS]
    print(f"| mix | at | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    every: list[dict[str, tuple[float, float]]] = []
    for mix in options.mixes:
        path = options.work / f"{mix}.gguf"
        try:
            write_gguf(path, config, mix)
            found = list(rounds(path, machine, options.rounds))
        finally:
            path.unlink(missing_ok=True)
        for index in range(len(_DEPTHS)):
            line, ratios = row(mix, found, index)
            print(line, flush=True)
            every.append(ratios)
    for what in ("prefill", "decode"):
        errors, gains = zip(*(each[what] for each in every), strict=True)
        print(
            f"\n{what}: predicted off by {median(map(abs, errors)):.0%} in the median; "
            f"ours / llama.cpp by itself {median(gains):.2f}"
        )


_COLUMNS = (", tok/s", ", predicted", ", llama.cpp", ", ratio")


if __name__ == "__main__":
    main()
