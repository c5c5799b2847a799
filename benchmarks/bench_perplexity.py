"""Perplexity and KL divergence against llama-perplexity: the same figures, time and memory.

    python -m benchmarks.bench_perplexity PATH/TO/llama-perplexity
    python -m benchmarks.bench_perplexity PATH/TO/llama-perplexity --types Q2_K Q6_K --chunks 8

The example is converted to BF16, the base, and to each type. Both programs measure perplexity,
write the base's logits file, and compare each type with both files; ours also compares with the
base model itself. Threads and batch are the same. Wall time and peak private memory are those of
the fastest of several processes. The last digits depend on the processor, which is the same.
"""

import argparse
import filecmp
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Usage, measure
from dots1_local.convert import convert_checkpoint

_ESTIMATE = re.compile(r"Final estimate: (.*)")
_STATISTICS = re.compile(r"====== Perplexity statistics.*?Same top p[^\n]*", re.DOTALL)
_TRIES = 10


@dataclass(frozen=True)
class Setup:
    """What is the same for all runs."""

    program: Path
    text: Path
    work: Path
    chunks: int
    threads: int
    runs: int

    @property
    def cut(self) -> list[str | Path]:
        return ["-f", self.text, "-c", "512", "--chunks", str(self.chunks)]

    def ours(self, name: str, model: Path, *options: str | Path) -> tuple[str, Usage]:
        """Run `dots1 perplexity`; return the estimate or the statistics that it prints."""
        dots1 = Path(sys.executable).with_name("dots1")
        return self._run(f"ours-{name}", dots1, "perplexity", model, *options)

    def theirs(self, name: str, model: Path, *options: str | Path) -> tuple[str, Usage]:
        """Run llama-perplexity; return the estimate or the statistics that it prints."""
        return self._run(f"theirs-{name}", self.program, "-m", model, *options)

    def _run(self, name: str, *command: str | Path) -> tuple[str, Usage]:
        log = self.work / f"{name}.log"
        line = [*map(str, command), "-t", str(self.threads)]
        return min((_result(line, log) for _ in range(self.runs)), key=lambda run: run[1].wall)


def _result(command: list[str], log: Path) -> tuple[str, Usage]:
    """What a run prints; llama-perplexity sometimes ends before it has printed its last lines."""
    for _ in range(_TRIES):
        usage = measure(command, log)
        printed = log.read_text(encoding="utf-8")
        found = _STATISTICS.search(printed) or _ESTIMATE.search(printed)
        if found is not None:
            return found[found.re.groups], usage
    raise RuntimeError(f"{log} has neither estimate nor statistics")


def say(what: str, same: bool, ours: Usage, theirs: Usage) -> None:
    """Print a row of the table."""
    print(
        f"| {what} | {'yes' if same else 'NO'} | {ours.wall:.2f} / {theirs.wall:.2f} s "
        f"| {ours.wall / theirs.wall:.2f} "
        f"| {ours.anonymous / 1e6:.0f} / {theirs.anonymous / 1e6:.0f} MB |",
        flush=True,
    )


def perplexities(setup: Setup, name: str, model: Path) -> None:
    """Plain perplexity."""
    ours, our_usage = setup.ours(name, model, *setup.cut)
    theirs, their_usage = setup.theirs(name, model, *setup.cut)
    say(f"{name}: {ours}", ours == theirs, our_usage, their_usage)


def base_files(setup: Setup, model: Path) -> dict[str, Path]:
    """Both programs' logits files of the base model."""
    files = {who: setup.work / f"{who}.kld" for who in ("ours", "theirs")}
    save: list[str | Path] = ["--force", "--save-logits", files["ours"]]
    ours, our_usage = setup.ours("save", model, *setup.cut, *save)
    theirs, their_usage = setup.theirs(
        "save", model, *setup.cut, "--kl-divergence-base", files["theirs"]
    )
    same = ours == theirs and filecmp.cmp(files["ours"], files["theirs"], shallow=False)
    size = files["ours"].stat().st_size
    say(f"base file, {size / 1e6:.0f} MB, byte for byte", same, our_usage, their_usage)
    return files


def divergences(setup: Setup, name: str, model: Path, base: Path, files: dict[str, Path]) -> None:
    """KL divergence: each program with each file, and ours with the base model."""
    for writer, file in files.items():
        theirs, their_usage = setup.theirs(
            f"{name}-{writer}", model, "-c", "512", "--kl-divergence", "--kl-divergence-base", file
        )
        ours, our_usage = setup.ours(f"{name}-{writer}", model, "--logits", file)
        say(f"{name}: statistics, logits file {writer}", ours == theirs, our_usage, their_usage)
    beside, usage = setup.ours(f"{name}-reference", model, *setup.cut, "--reference", base)
    say(f"{name}: statistics, --reference", beside == theirs, usage, their_usage)
    print(beside, file=sys.stderr)


def main() -> None:
    """Print a row for every pair of runs; statistics go to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("program", type=Path, help="llama-perplexity")
    parser.add_argument("--checkpoint", type=Path, default=Path("examples/dots1-tiny"))
    parser.add_argument("--types", nargs="+", default=["DQ4"])
    parser.add_argument("--chunks", type=int, default=40, help="of 512 tokens of heldout.txt")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=3, help="the fastest one counts")
    parser.add_argument("--work", type=Path, default=Path("build/bench-perplexity"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.checkpoint / "heldout.txt"
    setup = Setup(
        options.program.resolve(),
        text,
        options.work,
        options.chunks,
        options.threads,
        options.runs,
    )
    models = {name: options.work / f"{name}.gguf" for name in ("BF16", *options.types)}
    for name, path in models.items():
        convert_checkpoint(options.checkpoint, path, name, force=True)
    print("| | same | wall, ours / theirs | ratio | private memory, ours / theirs |")
    print("|---|---|---|---|---|")
    for name, path in models.items():
        perplexities(setup, name, path)
    files = base_files(setup, models["BF16"])
    for name in options.types:
        divergences(setup, name, models[name], models["BF16"], files)


if __name__ == "__main__":
    main()
