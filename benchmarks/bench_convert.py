"""Conversion at real width, compared with the encoders alone and with stock llama-quantize.

    python -m benchmarks.bench_convert --work build/bench --sample 8        eleven minutes, 2 cores
    python -m benchmarks.bench_convert --work build/bench --experts 8 --sample 8    a smoke run

A checkpoint of 1 dense and 2 MoE layers is made once and kept. For each type:

- ours: `dots1 convert`, from a cold page cache;
- encode: ggml's encoders alone on the same tensors (bf16 to float32 included), data in RAM, the
  same number of threads: no converter that calls them can be faster. `--sample N` times every
  N-th piece and scales up;
- stock: a BF16 GGUF, then `llama_model_quantize`. The first step is our own BF16 conversion, which
  holds what convert_hf_to_gguf.py writes.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Usage, forget, measure
from dots1_local.architecture import inventory
from dots1_local.convert import Conversion
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.gguf_header import GGUFHeader
from dots1_local.files.safetensors import Slice, read_exactly
from dots1_local.ggml import to_float32
from dots1_local.quant.encode import encode
from dots1_local.quant.plan import PlannedTensor
from dots1_local.quant.stock import stock_mix
from tools.make_wide import published_config, write_checkpoint

TYPES = ("Q4_K_M", "Q2_K", "Q8_0")
_PIECE = 1 << 20  # weights a thread encodes at a time
_BATCH = 512  # pieces read before the clock starts

Piece = tuple[PlannedTensor, NDArray[np.uint8]]


@dataclass(frozen=True)
class Row:
    """One type's results; `same` says whether both files hold the same tensor bytes."""

    type: str
    ours: Usage
    encode: float
    to_bf16: Usage
    quantise: Usage
    output_bytes: int
    same: bool

    @property
    def stock_wall(self) -> float:
        return self.to_bf16.wall + self.quantise.wall


def make_checkpoint(folder: Path, experts: int) -> Checkpoint:
    """1 dense and 2 MoE layers of random weights; later runs use them again."""
    config = published_config(
        num_hidden_layers=3, n_routed_experts=experts, num_experts_per_tok=min(6, experts)
    )
    try:
        checkpoint = Checkpoint.open(folder)
        checkpoint.check(inventory(checkpoint.config))
        if checkpoint.raw_config == config:
            return checkpoint
    except CheckpointError:
        pass
    say("making the checkpoint")
    return Checkpoint.open(write_checkpoint(folder, config, shards=4))


def convert(checkpoint: Checkpoint, output: Path, type_: str, threads: int) -> Usage:
    """Run `dots1 convert` in a new process."""
    forget(checkpoint.shards)
    dots1 = str(Path(sys.executable).with_name("dots1"))
    command = [dots1, "convert", str(checkpoint.path), "-o", str(output), "--type", type_]
    options = ["--threads", str(threads), "--force"]
    return measure([*command, *options], output.with_suffix(".log"))


def quantise(source: Path, output: Path, type_: str, threads: int) -> Usage:
    """Run `llama_model_quantize` in a new process."""
    forget([source])
    file_type = stock_mix(type_).file_type
    arguments = [str(source), str(output), str(file_type), str(threads)]
    return measure([sys.executable, "-c", _QUANTISE, *arguments], output.with_suffix(".log"))


_QUANTISE = """
import ctypes, sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = int(sys.argv[3]), int(sys.argv[4])
source, output = sys.argv[1].encode(), sys.argv[2].encode()
sys.exit(llama_cpp.llama_model_quantize(source, output, ctypes.byref(parameters)))
"""


def encode_seconds(checkpoint: Checkpoint, type_: str, threads: int, sample: int) -> float:
    """Wall time of ggml's encoders over all tensors, without reading."""
    tensors = Conversion.prepare(checkpoint.path, type_).tensors
    scratch = [(np.empty(_PIECE, np.float32), np.empty(4 * _PIECE, np.uint8))]
    scratch += [(rows.copy(), out.copy()) for rows, out in scratch * (threads - 1)]
    seconds = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for tensor in tensors:
            places = list(_places(checkpoint, tensor))
            # Small tensors are not sampled: a single piece would stand for a whole tensor.
            chosen = places[::sample] if len(places) >= 8 * sample else places
            for start in range(0, len(chosen), _BATCH):
                work = iter([_piece(tensor, place) for place in chosen[start : start + _BATCH]])
                began = time.perf_counter()
                # Threads share the iterator: each takes the next piece when it is free.
                list(pool.map(lambda buffers, work=work: _encode_all(work, *buffers), scratch))
                seconds += (time.perf_counter() - began) * len(places) / len(chosen)
    return seconds


def _places(checkpoint: Checkpoint, tensor: PlannedTensor) -> Iterator[Slice]:
    """A tensor's sources in pieces of whole rows."""
    columns = tensor.spec.columns
    step = max(1, _PIECE // columns)
    for name in tensor.spec.sources:
        source = checkpoint.locate(name)
        rows = source.nbytes // (columns * source.item_bytes)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            yield source.part(start * columns, (count, columns))


def _piece(tensor: PlannedTensor, place: Slice) -> Piece:
    raw = np.empty(place.nbytes, np.uint8)
    with open(place.file, "rb") as file:
        read_exactly(file.fileno(), raw, place.offset, place.file)
    return tensor, raw


def _encode_all(
    work: Iterator[Piece], scratch: NDArray[np.float32], out: NDArray[np.uint8]
) -> None:
    for tensor, raw in work:
        columns = tensor.spec.columns
        rows = scratch[: raw.size // 2].reshape(-1, columns)
        to_float32(raw, "BF16", rows)
        nbytes = len(rows) * tensor.row_bytes
        encode(rows, tensor.kind, out=out[:nbytes].reshape(len(rows), -1))


def same_tensors(left: Path, right: Path) -> bool:
    """Whether two files hold the same tensors, byte for byte."""
    theirs = {tensor.name: tensor for tensor in GGUFHeader.read(right).tensors}
    ours = GGUFHeader.read(left).tensors
    return len(ours) == len(theirs) and all(
        tensor.type == theirs[tensor.name].type
        and np.array_equal(
            np.memmap(left, np.uint8, "r", tensor.offset, tensor.nbytes),
            np.memmap(right, np.uint8, "r", theirs[tensor.name].offset, tensor.nbytes),
        )
        for tensor in ours
    )


def bench(work: Path, experts: int, types: list[str], threads: int, sample: int) -> list[Row]:
    """Measure every type; the output is deleted, and the checkpoint is kept."""
    checkpoint = make_checkpoint(work / f"checkpoint-{experts}", experts)
    bf16, ours, stock = (work / f"{name}.gguf" for name in ("bf16", "ours", "stock"))
    rows = []
    try:
        say("BF16: ours, as stock's first step")
        to_bf16 = convert(checkpoint, bf16, "BF16", threads)
        for type_ in types:
            say(f"{type_}: ours")
            usage = convert(checkpoint, ours, type_, threads)
            say(f"{type_}: stock's second step")
            second = quantise(bf16, stock, type_, threads)
            same, size = same_tensors(ours, stock), ours.stat().st_size
            ours.unlink()
            stock.unlink()
            say(f"{type_}: encoders alone")
            seconds = encode_seconds(checkpoint, type_, threads, sample)
            rows.append(Row(type_, usage, seconds, to_bf16, second, size, same))
    finally:
        for path in (bf16, ours, stock):
            path.unlink(missing_ok=True)
    return rows


def say(what: str) -> None:
    """Print progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)


def table(rows: list[Row]) -> str:
    """The results as a table; bytes are those requested from the kernel (from the disk)."""
    lines = []
    for row in rows:
        ours, first, second = row.ours, row.to_bf16, row.quantise
        lines += [
            f"{row.type}: {row.output_bytes / 1e9:.2f} GB, "
            f"tensors {'the same as' if row.same else 'DIFFERENT from'} stock's",
            f"  ours           {_usage(ours)}",
            f"  encoders alone {row.encode:8.1f} s",
            f"  stock, BF16    {_usage(first)}",
            f"  stock, 2nd     {_usage(second)}",
            f"  ours / encoders {ours.wall / row.encode:.2f}   "
            f"ours / stock {ours.wall / row.stock_wall:.2f}   disk bytes / stock "
            f"{_disk(ours) / max(1, _disk(first) + _disk(second)):.2f}",
        ]
    return "\n".join(lines)


def _usage(usage: Usage) -> str:
    return (
        f"{usage.wall:8.1f} s  {usage.processor:8.1f} cpu-s  {usage.anonymous / 1e6:7.0f} MB"
        f"  reads {usage.read / 1e9:6.2f} [{usage.disk_read / 1e9:6.2f}] GB"
        f"  writes {usage.written / 1e9:6.2f} [{usage.disk_written / 1e9:6.2f}] GB"
    )


def _disk(usage: Usage) -> int:
    return usage.disk_read + usage.disk_written


def _record(row: Row) -> dict[str, Any]:
    ratios = {
        "ours_to_encode": row.ours.wall / row.encode,
        "ours_to_stock": row.ours.wall / row.stock_wall,
    }
    return asdict(row) | ratios


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for all files")
    parser.add_argument("--experts", type=int, default=128, help="routed experts of a layer")
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="stock mixes to measure")
    parser.add_argument("--threads", type=int, default=_cores(), help="of every encoder")
    parser.add_argument("--sample", type=int, default=1, help="encode every N-th piece only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = bench(args.work, args.experts, args.types, args.threads, args.sample)
    print(json.dumps([_record(row) for row in rows], indent=2) if args.json else table(rows))


if __name__ == "__main__":
    main()
