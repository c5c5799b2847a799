"""Calibration at real width: time and memory of one dense and one MoE layer, by tokens.

    python -m benchmarks.bench_calibrate --tokens 16384 65536 --precision F32 BF16

A checkpoint is made once and kept (7.5 GB). A line through the rows of a precision is extrapolated
to 62 layers: both kinds of layer take nearly the same work for a token, and what does not depend on
the tokens is reading experts.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

from benchmarks.measure import Usage, measure
from dots1_local.checkpoint import Checkpoint
from tools.make_wide import published_config, write_checkpoint

_LAYERS = 62


def run(checkpoint: Path, tokens: int, precision: str) -> Usage:
    """Calibrate in a process of its own on random tokens."""
    folder = checkpoint.with_name("calibrated")
    shutil.rmtree(folder, ignore_errors=True)
    module = "benchmarks.bench_calibrate"
    command = [sys.executable, "-m", module, "--one", str(tokens), "--precision", precision]
    usage = measure([*command, "--work", str(checkpoint.parent)], checkpoint.with_name("log.txt"))
    shutil.rmtree(folder)
    return usage


def calibrate_once(checkpoint: Path, tokens: int, precision: str) -> None:
    """What is measured."""
    from dots1_local.quant.calibrate import calibrate

    source = Checkpoint.open(checkpoint)
    drawn = np.random.default_rng(0).integers(0, source.config.vocab_size, (tokens // 512, 512))
    folder = checkpoint.with_name("calibrated")
    calibrate(
        source,
        folder,
        drawn.astype(np.int32),
        precision="BF16" if precision == "BF16" else "F32",
    )


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
    print("| tokens | precision | wall | core-seconds | private memory |")
    print("|---|---|---|---|---|")
    for precision in options.precision:
        spent = {}
        for tokens in options.tokens:
            usage = run(checkpoint, tokens, precision)
            spent[tokens] = usage.processor
            print(
                f"| {tokens:,} | {precision} | {usage.wall:.0f} s | {usage.processor:.0f} "
                f"| {usage.anonymous / 1e9:.1f} GB |",
                flush=True,
            )
        if len(spent) > 1:
            slope, start = np.polyfit(list(spent), list(spent.values()), 1)
            whole = _LAYERS * slope / 2 * 131072 + (_LAYERS - 1) * start
            print(
                f"{precision}: {slope / 2 * 1e3:.2f} ms a token and layer, {start:.0f} s a MoE "
                f"layer; {_LAYERS} layers and 131,072 tokens {whole / 3600:.1f} core-hours",
                flush=True,
            )


if __name__ == "__main__":
    main()
