"""Files made for this machine beside the files of least KL divergence, at the same sizes.

    python -m benchmarks.bench_machine --bpw 2.8 3.3 4.0

An example decides the types by its measured sensitivity, on this machine and at the real widths:
a random model with as many layers as the example and dots.llm1's geometry is written in the types
of both plans, and timed in turn. Quality is that of the example in the same types, on all its
held-out text. Each random model takes some gigabytes of disk and is deleted.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.paired import compare
from benchmarks.quality_runs import Example, Quality, say
from dots1_local.architecture import Dots1Config, inventory, padded_width
from dots1_local.devices.hardware import Hardware
from dots1_local.devices.machine import this_machine
from dots1_local.engine.measure import BenchResult, bench
from dots1_local.files.gguf import GGUFFile
from dots1_local.fit.front import fit
from dots1_local.fit.search import MachineFile, Search
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.planner import place
from dots1_local.progress import silent
from dots1_local.quant.allocate import Allocator
from dots1_local.quant.choices import choices_by_width
from dots1_local.quant.plan import QuantPlan
from dots1_local.quant.sensitivity import Sensitivity, geometry
from dots1_local.quant.stock import fallback
from tools.make_gguf import write_gguf
from tools.make_wide import published_config

_CONTEXT, _VOCABULARY = 4096, 32000
_DEPTHS = (512, 2048)
_ROUNDS = 3
_WORSE = 1.12  # times the least KL divergence that the file for the machine may have


def wide(example: Example) -> tuple[Dots1Config, Sensitivity]:
    """dots.llm1's geometry with the example's layers, and the example's sensitivity for it."""
    layers = example.config.num_hidden_layers
    config = Dots1Config.from_json(
        published_config(num_hidden_layers=layers, vocab_size=_VOCABULARY)
    )
    return config, replace(example.sensitivity, geometry=geometry(config))


def pair(
    config: Dots1Config, sensitivity: Sensitivity, machine: Hardware, bpw: float
) -> Iterator[tuple[str, MachineFile]]:
    """The file of least KL divergence at a size, and the fastest one whose is little more."""
    elements = sum(spec.source_elements for spec in inventory(config))
    nbytes = bpw * elements / 8
    choices = choices_by_width(config, sensitivity)
    search = Search(config, choices, machine, _CONTEXT)
    least = Allocator(config, sensitivity).within(nbytes, "least KL divergence")
    yield "least KL divergence", search.placed(least.plan, least.kl)
    yield "for this machine", fit(search, nbytes=nbytes, kl=_WORSE * least.kl).chosen


def in_turn(
    config: Dots1Config, machine: Hardware, files: Sequence[tuple[str, MachineFile]], work: Path
) -> list[list[BenchResult]]:
    """Time the files one after the other, several times; the results of each."""
    paths = [work / f"machine-{number}.gguf" for number in range(len(files))]
    geometry_of = published_config(
        num_hidden_layers=config.num_hidden_layers, vocab_size=_VOCABULARY
    )
    found: list[list[BenchResult]] = [[] for _ in files]
    try:
        for path, (name, file) in zip(paths, files, strict=True):
            say(f"writing {path.name}: {name}, {file.nbytes / 1e9:.2f} GB")
            write_gguf(path, geometry_of, file.plan)
        for _ in range(_ROUNDS):
            for path, (name, _), results in zip(paths, files, found, strict=True):
                graph = ModelGraph.read(GGUFFile.open(path))
                placement = place(graph, machine, context=_CONTEXT)
                results.append(bench(graph, machine, name, placement, _DEPTHS, silent))
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    return found


def figures(results: Sequence[BenchResult], depth: int, what: str) -> tuple[float, float]:
    """The median of what was measured at a depth, and what was predicted."""
    real = [
        getattr(each, what)
        for result in results
        if result.measurement
        for each in result.measurement.depths
        if each.tokens == depth
    ]
    [predicted] = [getattr(d, what) for d in results[0].predicted if d.tokens == depth]
    return median(real), predicted


def rows(
    bpw: float,
    files: Sequence[tuple[str, MachineFile]],
    results: Sequence[Sequence[BenchResult]],
    quality: Sequence[Quality],
) -> Iterator[str]:
    """Rows of the table: a file each, then the ratios."""
    for (name, file), runs, measured in zip(files, results, quality, strict=True):
        cells = []
        for what in ("decode", "prefill"):
            for depth in _DEPTHS:
                real, predicted = figures(runs, depth, what)
                cells.append(f"{real:.1f} ({predicted / real - 1:+.0%})")
        kl = f"{file.kl:.4f} | {measured.kl.value:.4f}"
        yield f"| {bpw:g} | {name} | {file.nbytes / 1e9:.2f} GB | {kl} | {' | '.join(cells)} |"
    ratio = compare(quality[1].per_token, quality[0].per_token)
    cells = []
    for what in ("decode", "prefill"):
        for depth in _DEPTHS:
            least, made = (figures(runs, depth, what)[0] for runs in results)
            cells.append(f"× {made / least:.2f}")
    kls = f"× {files[1][1].kl / files[0][1].kl:.2f} | × {ratio.ratio:.2f} ± {ratio.error:.2f}"
    yield f"| {bpw:g} | ratio | | {kls} | {' | '.join(cells)} |"


def main() -> None:
    """Print a table for each example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bpw", type=float, nargs="+", default=[2.8, 3.3, 4.0])
    parser.add_argument("--examples", nargs="+", default=["dots1-deep", "dots1-tiny"])
    parser.add_argument("--work", type=Path, default=Path("build/bench-quality"))
    options = parser.parse_args()
    machine = this_machine()
    cells = [f"{what} at {depth}" for what in ("decode", "prefill") for depth in _DEPTHS]
    header = ("bits", "file", "size", "KL predicted", "KL measured", *cells)
    for name in options.examples:
        example = Example(Path("examples") / name, options.work, None, 2)
        config, sensitivity = wide(example)
        print(f"\n{name}: tokens a second, measured (predicted by that)\n")
        print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|", flush=True)
        for bpw in options.bpw:
            files = list(pair(config, sensitivity, machine, bpw))
            results = in_turn(config, machine, files, options.work)
            plans = [_for_example(file.plan, config, example.config) for _, file in files]
            for row in rows(bpw, files, results, example.measure(plans)):
                print(row, flush=True)


def _for_example(plan: QuantPlan, config: Dots1Config, example: Dots1Config) -> QuantPlan:
    """The same types for the example, padded if the plan pads; llama-quantize's second choice where
    one does not fit the example's rows."""
    width = example.moe_intermediate_size
    if plan.expert_width != config.moe_intermediate_size:
        width = padded_width(width)
    specs = inventory(example, width)
    types = {spec.name: fallback(plan.types[spec.name], spec) for spec in specs}
    return replace(plan, expert_width=width, types=types)


if __name__ == "__main__":
    main()
