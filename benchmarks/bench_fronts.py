"""What files made for described machines would be, at dots.llm1's full geometry.

    python -m benchmarks.bench_fronts 24gb-64gb 24gb-128gb 12gb-96gb cpu-96gb

The sensitivity is that of an example, projected: each layer of dots.llm1 has the effects of the
example's layer at the same relative depth, in proportion to how many layers that stands for. So
sizes and speeds are predictions for dots.llm1, while KL divergences say how files compare.
"""

import argparse
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from benchmarks.quality_runs import Example
from dots1_local.architecture import Dots1Config, inventory
from dots1_local.devices.machine import find_hardware
from dots1_local.fit.front import Fit, fit
from dots1_local.fit.search import Search
from dots1_local.quant.choices import choices_by_width
from dots1_local.quant.sensitivity import Effect, Sensitivity, geometry
from tools.make_wide import published_config

__all__ = ["project"]

_CONTEXTS = (0, 4096, 16384)
_ABOUT = """What `dots1 convert --for` would make of dots.llm1 with a context of 16,384 tokens on
described machines. The KL divergences are those of {example}, projected by role and relative depth:
they say how files compare. Speeds are predicted in tokens a second; a turn reads 2,048 tokens and
writes 512. The knee is bold. Once `make bench-quality` has calibrated the example, this writes the
page:

    python -m benchmarks.bench_fronts {machines}"""


def project(sensitivity: Sensitivity, small: Dots1Config, large: Dots1Config) -> Sensitivity:
    """The sensitivity of a deeper model whose layers resemble those at the same relative depth."""
    names, numbers = _by_part(small), _by_part(large)
    tensors: dict[str, dict[str, Effect]] = {}
    for part, targets in numbers.items():
        sources = [name for name in names[part] if name in sensitivity.tensors]
        share = len(sources) / len(targets)
        for number, target in enumerate(targets if sources else ()):
            effects = sensitivity.tensors[sources[number * len(sources) // len(targets)]]
            tensors[target] = {
                kind: Effect(each.error, each.damage * share, each.flips * share)
                for kind, each in effects.items()
            }
    return replace(sensitivity, geometry=geometry(large), tensors=tensors)


def _by_part(config: Dots1Config) -> dict[str, list[str]]:
    found = defaultdict(list)
    for spec in inventory(config):
        found[spec.part].append(spec.name)
    return found


def table(found: Fit) -> str:
    """The front in Markdown; the knee is bold."""
    header = ("size", "KL divergence", *(f"tok/s at {n:,}" for n in _CONTEXTS), "prefill", "turn")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for file in found.front:
        cells = [
            f"{file.nbytes / 1e9:.1f} GB",
            f"{file.kl:.4f}",
            *(f"{speed:.1f}" for speed in file.decode_speeds(_CONTEXTS)),
            f"{found.turn.prefill(file.turn, file.decode):,.0f}",
            f"{file.turn:.1f} s",
        ]
        bold = "**" if file is found.chosen else ""
        lines.append(f"| {' | '.join(f'{bold}{cell}{bold}' for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a front for each machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("machines", nargs="+")
    parser.add_argument("--example", default="dots1-tiny")
    parser.add_argument("--work", type=Path, default=Path("build/bench-quality"))
    options = parser.parse_args()
    example = Example(Path("examples") / options.example, options.work, None, 2)
    config = Dots1Config.from_json(published_config())
    sensitivity = project(example.sensitivity, example.config, config)
    choices = choices_by_width(config, sensitivity)
    about = _ABOUT.format(example=options.example, machines=" ".join(options.machines))
    print(f"# Files for machines\n\n{about}")
    for name in options.machines:
        start = time.perf_counter()
        found = fit(Search(config, choices, find_hardware(name), _CONTEXTS[-1]))
        seconds = time.perf_counter() - start
        print(f"\n## {name}\nFound in {seconds:.1f} s.\n\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
