"""Refinement at real width: weights a second by type, and one MoE layer, beside ggml's encoders.

    python -m benchmarks.bench_refine --kinds Q3_K IQ3_XXS IQ2_XXS IQ4_NL
    python -m benchmarks.bench_refine --layer Q3_K IQ3_XXS IQ2_XXS --tokens 131072

The first form prints, by the processor time of one core, the speed and weighted error of both plain
encoders, and the speed of refining one expert's gate and down (4,096 and 1,408 columns, 6,144
tokens), with the part of matrix products and their speed. The second form converts a random
checkpoint with one dense and one MoE layer (7.5 GB, made once) with --refine; gate and up get the
type, down the type or IQ4_NL. Its calibration is made up: a real one would take longer to make.
A small --vocab saves the minutes that embedding and head take.
"""

import argparse
import cProfile
import json
import os
import pstats
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks.measure import measure
from dots1_local.ggml import TYPES, QuantType
from dots1_local.quant.encode import decode, encode
from dots1_local.refine.fast_encoder import can_begin, encode_fast
from dots1_local.refine.matrix import ROUNDS, refine_matrix
from dots1_local.refine.metric import Metric, input_metric, output_metric

_TOKENS, _HIDDEN, _WIDTH = 6144, 4096, 1408
_KINDS = ("Q2_K", "Q3_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS")

Floats = NDArray[np.float32]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Floats:
    """Normal numbers, always the same ones."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)


def inputs(columns: int, rows: int = _TOKENS) -> Floats:
    """Inputs whose neighbouring columns are correlated and whose later columns are smaller."""
    x = normal(rows, columns, seed=1) * np.exp(-np.arange(columns) / columns * 2).astype(np.float32)
    x[:, 1:] += x[:, :-1] / 2
    return x


def metrics() -> tuple[Metric, Metric]:
    """Those of an expert's gate and up, and of its down."""
    found = []
    for columns in (_HIDDEN, _WIDTH):
        rows = inputs(columns)
        found.append(input_metric(rows.T @ rows / np.float32(len(rows)), len(rows)))
    gradients = inputs(_HIDDEN)
    return Metric(found[0]), Metric(found[1], output_metric(gradients.T @ gradients))


def gemm_speed() -> float:
    """Floating-point operations a second of products as large as refinement's."""
    a, b = normal(_WIDTH, _HIDDEN), normal(_HIDDEN, 256)
    best = min(_timed(lambda: a @ b) for _ in range(5))
    return 2 * a.size * 256 / best


def _timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def encoders(kind: QuantType) -> str:
    """A row: M weights/s of ggml's encoder and ours, and the ratio of their weighted errors."""
    weights, importance = normal(512, _HIDDEN, scale=0.02), np.exp(normal(_HIDDEN, seed=2))
    speeds, errors = [], []
    for encoder in (encode, encode_fast):
        encoder(weights[:1], kind, importance)  # ggml prepares codebooks first
        start = time.process_time()
        data = encoder(weights, kind, importance)
        speeds.append(weights.size / (time.process_time() - start) / 1e6)
        errors.append((importance * np.square(weights - decode(data, kind, _HIDDEN))).sum())
    return f"| {kind.name} | {speeds[0]:.1f} | {speeds[1]:.1f} | {errors[1] / errors[0]:.3f} |"


def refining(kind: QuantType, gate: Metric, down: Metric, gemm: float) -> str:
    """A row for one expert's gate and down."""
    cells = []
    for metric, rows, columns in ((gate, _WIDTH, _HIDDEN), (down, _HIDDEN, _WIDTH)):
        stored = -(-columns // kind.block) * kind.block
        weights, held_out = normal(rows, columns, scale=0.02), inputs(columns, 256)
        refine_matrix(weights[:256], kind, Metric(metric.inputs), None, columns=stored)  # warm up
        work = partial(refine_matrix, weights, kind, metric, held_out, columns=stored)
        profile = cProfile.Profile(time.process_time)
        seconds = _timed(partial(profile.runcall, work))
        products = _seconds_of_products(profile)
        operations = 2 * rows * columns**2 * (0.5 + ROUNDS)
        if metric.outputs is not None:
            operations += 2 * rows**2 * columns * ROUNDS
        speed = rows * columns / seconds / 1e6
        cells += [
            f"{speed:.2f}",
            f"{products / seconds:.0%}",
            f"{operations / products / gemm:.0%}",
        ]
    return f"| {kind.name} | {' | '.join(cells)} |"


def _seconds_of_products(profile: cProfile.Profile) -> float:
    """The time of the functions that multiply matrices, without what they call."""
    names = ("feed", "descend", "_descend_coupled")
    times: dict[tuple[str, int, str], tuple[int, int, float]] = vars(pstats.Stats(profile))["stats"]
    return sum(
        spent[2]
        for (file, _, name), spent in times.items()
        if Path(file).name == "matrix.py" and name in names
    )


def make_calibration(checkpoint_path: Path, folder: Path, tokens: int) -> None:
    """A calibration folder with random tokens and gradients, and uniform importance."""
    from dots1_local.architecture import inventory
    from dots1_local.calibrate.manifest import IMATRIX, REFINEMENT
    from dots1_local.calibrate.refinement_file import RefinementWriter
    from dots1_local.files.checkpoint import Checkpoint
    from dots1_local.quant.imatrix_file import load_importance, write_imatrix
    from dots1_local.quant.stock import is_quantisable

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = Checkpoint.open(checkpoint_path)
    config = checkpoint.config
    entries = {
        spec.name: (
            np.ones((len(spec.sources), spec.columns), np.float32),
            np.ones(len(spec.sources), np.float32),
        )
        for spec in inventory(config)
        if is_quantisable(spec) and spec.role != "embedding"
    }
    write_imatrix(folder / IMATRIX, entries, datasets=[], chunk_count=1, chunk_size=512)
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, (tokens // 512, 512))
    writer = RefinementWriter(
        folder / REFINEMENT, drawn.astype(np.int32), checkpoint,
        load_importance(folder / IMATRIX).sha256, 4096, resume=False,
    )  # fmt: skip
    gradients = inputs(config.hidden_size, 4096)
    for layer in range(config.num_hidden_layers):
        writer.put_outputs(layer, gradients)
    writer.put_embedding(gradients)


def convert_once(checkpoint: Path, work: Path, kind: str) -> None:
    """Convert with --refine, and write the seconds of each part to spent.json: wall, and cores'."""
    from dots1_local.convert import Conversion

    down = kind if kind in ("IQ2_XXS", "IQ2_XS", "IQ2_S") else "IQ4_NL"
    overrides = [
        f"ffn_(gate|up)_exps={kind}",
        f"ffn_down_exps={'IQ3_XXS' if down == kind else down}",
    ]
    spent: dict[str, list[float]] = {}
    current, since = "start", (time.perf_counter(), time.process_time())

    def progress(done: int, total: int, unit: str, what: str) -> None:
        nonlocal current, since
        now = time.perf_counter(), time.process_time()
        before = spent.get(current, [0.0, 0.0])
        spent[current] = [b + n - s for b, n, s in zip(before, now, since, strict=True)]
        current, since = what.partition(",")[0], now

    conversion = Conversion.prepare(
        checkpoint, "DQ3", calibration=work / "calibration", overrides=overrides, refine=True,
        padding="on" if down == kind else "off",
    )  # fmt: skip
    conversion.run(work / "refined.gguf", force=True, precision="BF16", progress=progress)
    progress(0, 0, "", "")
    (work / "spent.json").write_text(json.dumps(spent))


def wide_checkpoint(work: Path, experts: int, vocab: int) -> Path:
    """A random checkpoint with two layers."""
    from tools.make_wide import published_config, write_checkpoint

    path = work / f"wide-{experts}-{vocab}"
    if not (path / "config.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        config = published_config(num_hidden_layers=2, n_routed_experts=experts, vocab_size=vocab)
        write_checkpoint(path, config)
    return path


def layers(checkpoint: Path, work: Path, kinds: list[str], tokens: int) -> None:
    """Print a row for every type of gate and up."""
    make_calibration(checkpoint, work / "calibration", tokens)
    print(
        f"\n{tokens:,} tokens, {os.cpu_count()} cores, {checkpoint.name}; minutes, core-minutes\n"
    )
    print("| gate and up | embedding | dense layer | MoE layer | head | all | private memory |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for kind in kinds:
        command = [sys.executable, "-m", "benchmarks.bench_refine", "--one", str(checkpoint), kind]
        usage = measure([*command, "--work", str(work)], work / "log.txt")
        spent = json.loads((work / "spent.json").read_text())
        names = ("embedding", "layer 0", "layer 1", "head")
        parts = [*(spent.get(name, (0.0, 0.0)) for name in names), (usage.wall, usage.processor)]
        figures = " | ".join(f"{wall / 60:.1f}, {cores / 60:.1f}" for wall, cores in parts)
        print(f"| {kind} | {figures} | {usage.anonymous / 1e9:.1f} GB |", flush=True)
        (work / "refined.gguf").unlink()


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kinds", nargs="+", default=_KINDS)
    parser.add_argument("--layer", nargs="+", metavar="KIND", help="convert with these types")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path("build/bench-refine"))
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        checkpoint, kind = options.one
        convert_once(Path(checkpoint), options.work, kind)
    elif options.layer:
        checkpoint = wide_checkpoint(options.work, options.experts, options.vocab)
        layers(checkpoint, options.work, options.layer, options.tokens)
    else:
        with threadpool_limits(1, user_api="blas"):
            _print_speeds([TYPES[name] for name in options.kinds])


def _print_speeds(kinds: list[QuantType]) -> None:
    gemm = gemm_speed()
    print(f"one core; matrix products of this size alone: {gemm / 1e9:.0f} GFLOP/s\n")
    print("| type | ggml, M weights/s | fast | weighted error, fast by ggml |\n|---|---|---|---|")
    for kind in filter(can_begin, kinds):
        print(encoders(kind), flush=True)
    gate, down = metrics()
    _ = gate.factor, down.factor
    header = ("M weights/s", "products, of the time", "products, of their speed alone")
    cells = [f"{part}: {each}" for part in ("gate", "down") for each in header]
    print(f"\n| type | {' | '.join(cells)} |\n{'|---' * 7}|")
    for kind in kinds:
        print(refining(kind, gate, down, gemm), flush=True)


if __name__ == "__main__":
    main()
