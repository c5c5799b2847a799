"""Calibration at real width: time and memory of one dense and one MoE layer, by tokens.

    python -m benchmarks.bench_calibrate --tokens 16384 65536 --precision F32 BF16

A checkpoint is made once and kept (7.5 GB). The time of each layer is extrapolated to dots.llm1.
For the forward pass a line is fitted through the rows of a precision, for each kind of layer. The
backward pass, whose number of tokens is fixed, and the head count as measured.
"""

import argparse
import json
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.measure import Usage, measure
from dots1_local.files.checkpoint import Checkpoint
from tools.make_wide import published_config, write_checkpoint

_LAYERS, _TOKENS = 62, 131072
_DENSE, _MOE = "layer 0", "layer 1"

Spent = dict[str, float]  # core-seconds by what progress called it


def run(checkpoint: Path, tokens: int, precision: str) -> tuple[Usage, Spent]:
    """Calibrate on random tokens in a new process."""
    folder = checkpoint.with_name("calibrated")
    shutil.rmtree(folder, ignore_errors=True)
    module = "benchmarks.bench_calibrate"
    command = [sys.executable, "-m", module, "--one", str(tokens), "--precision", precision]
    usage = measure([*command, "--work", str(checkpoint.parent)], checkpoint.with_name("log.txt"))
    spent = json.loads((folder / "spent.json").read_text())
    shutil.rmtree(folder)
    return usage, spent


def calibrate_once(checkpoint: Path, tokens: int, precision: str) -> None:
    """Calibrate, and write the core-seconds of each part to spent.json."""
    from dots1_local.calibrate.calibrate import calibrate

    source = Checkpoint.open(checkpoint)
    drawn = np.random.default_rng(0).integers(0, source.config.vocab_size, (tokens // 512, 512))
    folder = checkpoint.with_name("calibrated")
    spent: defaultdict[str, float] = defaultdict(float)
    current, since = "start", time.process_time()

    def progress(done: int, total: int, unit: str, what: str) -> None:
        nonlocal current, since
        now = time.process_time()
        spent[current] += now - since  # every part of the work reports when it begins
        current, since = what, now

    calibrate(
        source,
        folder,
        drawn.astype(np.int32),
        precision="BF16" if precision == "BF16" else "F32",
        progress=progress,
    )
    progress(0, 0, "", "")
    (folder / "spent.json").write_text(json.dumps(spent))


def extrapolated(by_tokens: dict[int, Spent]) -> dict[str, float]:
    """Core-seconds for dots.llm1 and 131,072 tokens: forward, head, backward."""
    largest = by_tokens[max(by_tokens)]
    layers = {_DENSE: 1, _MOE: _LAYERS - 1}
    forward = 0.0
    for layer, count in layers.items():
        taken = [spent[layer] for spent in by_tokens.values()]
        line = np.polyfit(list(by_tokens), taken, 1)
        forward += count * float(np.polyval(line, _TOKENS))
    backward = sum(count * largest[f"{layer}, backward"] for layer, count in layers.items())
    return {"forward": forward, "head": largest["head"], "backward": backward}


def main() -> None:
    """Print a row for every number of tokens and precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--precision", nargs="+", default=["F32", "BF16"])
    parser.add_argument("--work", type=Path, default=Path("build/bench-calibrate"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkpoint = options.work / "wide"
    if options.one:
        calibrate_once(checkpoint, options.one, options.precision[0])
        return
    if not (checkpoint / "config.json").exists():
        options.work.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, published_config(num_hidden_layers=2))
    parts = (_DENSE, _MOE, "head", f"{_MOE}, backward", f"{_DENSE}, backward")
    print("core-seconds of each part, and of all\n")
    print(f"| tokens | precision | {' | '.join(parts)} | all | wall | private memory |")
    print("|---" * (len(parts) + 5) + "|")
    for precision in options.precision:
        by_tokens = {}
        for tokens in options.tokens:
            usage, spent = run(checkpoint, tokens, precision)
            by_tokens[tokens] = spent
            figures = " | ".join(f"{spent[part]:.0f}" for part in parts)
            print(
                f"| {tokens:,} | {precision} | {figures} | {usage.processor:.0f} "
                f"| {usage.wall:.0f} s | {usage.anonymous / 1e9:.1f} GB |",
                flush=True,
            )
        if len(by_tokens) > 1:
            hours = {part: seconds / 3600 for part, seconds in extrapolated(by_tokens).items()}
            said = ", ".join(f"{part} {hour:.2f}" for part, hour in hours.items())
            print(
                f"\n{precision}, {_LAYERS} layers, {_TOKENS:,} tokens: {sum(hours.values()):.1f} "
                f"core-hours ({said})\n",
                flush=True,
            )


if __name__ == "__main__":
    main()
