"""Which small types are worth considering: what each loses on real weights, and how fast a core is.

    python -m benchmarks.bench_types examples/dots1-tiny

The error is that of routed experts, weighted by importance, relative to the weights: the sum of
c (w - w')^2 over that of c w^2, where c is a column's importance. Rows that a type does not fit are
padded. "Best scale" is what an encoder could reach that chose each block's scale for the least
weighted error. Speeds are those that `dots1 hardware` measures, on one core of this machine.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import inventory
from dots1_local.calibrate.manifest import IMATRIX
from dots1_local.calibrate.output_errors import read_rows
from dots1_local.devices.backends import devices
from dots1_local.devices.speed import measure_speed
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import TYPES, QuantType
from dots1_local.quant.encode import decode, encode
from dots1_local.quant.imatrix_file import load_importance
from dots1_local.quant.importance import pad_columns

Floats = NDArray[np.float32]

KINDS = (
    "IQ4_NL", "NVFP4", "MXFP4", "IQ4_XS", "Q2_K", "IQ2_S", "IQ2_XS", "Q2_0", "IQ2_XXS", "TQ2_0",
    "IQ1_M", "TQ1_0", "IQ1_S", "Q1_0",
)  # fmt: skip
# Types with nothing but a scale and a code in a block: the values of their codes.
LEVELS = {"Q2_0": (-1, 0, 1, 2), "TQ2_0": (-1, 0, 1), "TQ1_0": (-1, 0, 1), "Q1_0": (-1, 1)}
SCALES = np.linspace(0.15, 1.1, 40)  # of a block's largest weight
EXPERTS = 4  # of each tensor


def main() -> None:
    """Print a row for every type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a folder with imatrix.gguf")
    rows = list(experts(parser.parse_args().checkpoint))
    (cpu,) = (device for device in devices() if device.kind == "cpu")
    rates = measure_speed(cpu, 1).matmul
    print("| type | bits | error | with the best scale | decode | prefill |")
    print("|---|---|---|---|---|---|")
    for kind in map(TYPES.__getitem__, KINDS):
        best = f"{error(rows, kind, True):.3f}" if kind.name in LEVELS else "–"
        rate = rates[kind.name]
        print(
            f"| {kind.name} | {kind.bpw:.2f} | {error(rows, kind):.3f} | {best} "
            f"| {rate.decode / 1e9:.1f} | {rate.prefill / 1e9:.1f} |"
        )


def experts(folder: Path) -> Iterator[tuple[Floats, Floats]]:
    """Weights (rows, columns) and importance (1, columns) of some experts of each tensor."""
    checkpoint, importance = Checkpoint.open(folder), load_importance(folder / IMATRIX)
    for spec in inventory(checkpoint.config):
        values = importance.get(spec.name)
        if spec.role == "routed" and values is not None:
            for expert in range(0, len(values), max(1, len(values) // EXPERTS)):
                rows = np.arange(spec.shape[1])
                weights = read_rows(checkpoint, spec.sources[expert], rows)
                yield weights, values[expert, None].astype(np.float32)


def error(
    rows: Sequence[tuple[Floats, Floats]], kind: QuantType, best_scale: bool = False
) -> float:
    """The weighted relative error of a type."""
    lost = whole = 0.0
    for weights, importance in rows:
        columns = weights.shape[1]
        stored = columns if kind.fits(columns) else -(-columns // kind.block) * kind.block
        padded, c = (
            np.asarray(pad_columns(each, stored), np.float32) for each in (weights, importance)
        )
        if best_scale:
            found = with_best_scale(padded, c, kind)
        else:
            found = decode(encode(padded, kind, c[0]), kind, stored)
        lost += float((c * np.square(found - padded)).sum(dtype=np.float64))
        whole += float((c * np.square(padded)).sum(dtype=np.float64))
    return lost / whole


def with_best_scale(rows: Floats, importance: Floats, kind: QuantType) -> Floats:
    """The nearest values of a type's codes, at the scale of each block that loses least."""
    levels = np.array(LEVELS[kind.name], np.float32)
    x = rows.reshape(-1, kind.block)
    c = np.broadcast_to(importance, rows.shape).reshape(x.shape)
    least, best = np.full(len(x), np.inf), np.zeros_like(x)
    for sign in (1, -1):
        for scale in SCALES:
            d = np.float32(sign * scale) * np.abs(x).max(1)
            for _ in range(2):  # the codes of a scale, and the scale of these codes
                values = levels[np.abs(x[..., None] - d[:, None, None] * levels).argmin(2)]
                d = (c * x * values).sum(1) / np.maximum((c * values**2).sum(1), 1e-30)
            found = values * d[:, None]
            lost = (c * np.square(found - x)).sum(1)
            better = lost < least
            least[better], best[better] = lost[better], found[better]
    return best.reshape(rows.shape)


if __name__ == "__main__":
    main()
