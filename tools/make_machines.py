"""Write the descriptions of machines that come with dots1-local, from published specifications.

    python -m tools.make_machines

Their figures were not measured on these machines: each is a specification times a factor that is
stated here and in the file's "source". The rates of CPU cores were measured by `dots1 hardware` on
one core of an AMD EPYC (Zen 5).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dots1_local.devices.hardware import CPU, Device, Hardware, Rate, Speed
from dots1_local.ggml import TYPES, quant_type

__all__ = ["MACHINES"]

_FOLDER = Path(__file__).parents[1] / "dots1_local" / "devices" / "machines"
_GIB = 1 << 30
_DDR5_5600 = 89.6e9  # bytes/s of two channels
_NVME = 7e9

_READ = 0.8  # part of the memory bandwidth that kernels reach
_READ_CODEBOOK = 0.55  # the same for IQ1, IQ2 and IQ3 on a GPU
_RAM_READ = 0.78
_TENSOR = 0.26  # part of the int8 tensor throughput, in large products
_EXPERT = 0.3  # part of that, with 24 rows per expert
_ATTENTION = 0.4  # part of the FP16 tensor throughput
_CORE = 0.7  # speed of a desktop's core, relative to the measured one
_PAGEABLE = 0.5

# Billion multiply-adds a second of one core: decode, prefill of experts, of large products.
_CORE_MATMUL = {
    "F32": (9.2, 32, 62), "F16": (16, 35, 98), "BF16": (18, 53, 128), "Q8_0": (26, 33, 73),
    "Q6_K": (34, 81, 174), "Q5_K": (32, 112, 212), "Q5_1": (24, 26, 26), "Q5_0": (27, 28, 55),
    "Q4_K": (43, 118, 209), "Q4_1": (28, 30, 30), "Q4_0": (30, 31, 60), "IQ4_NL": (29, 31, 57),
    "IQ4_XS": (32, 124, 218), "MXFP4": (29, 30, 31), "Q3_K": (33, 87, 184), "IQ3_S": (12, 93, 206),
    "IQ3_XXS": (14, 80, 196), "Q2_K": (52, 112, 194), "IQ2_S": (21, 80, 174),
    "IQ2_XS": (19, 81, 179), "IQ2_XXS": (19, 95, 210), "IQ1_M": (22, 72, 177),
    "IQ1_S": (21, 99, 207), "NVFP4": (22, 23, 23), "Q2_0": (2.8, 2.7, 2.7), "TQ2_0": (67, 67, 57),
    "TQ1_0": (35, 36, 35), "Q1_0": (39, 42, 42),
}  # fmt: skip
_CORE_REPACKED = {
    "Q4_K": (45, 56, 56), "Q4_0": (41, 47, 47), "IQ4_NL": (41, 46, 46), "MXFP4": (38, 41, 41),
    "Q2_K": (50, 52, 52),
}  # fmt: skip
_CORE_ATTENTION = {
    "F32": (2.2, 33), "F16": (2.6, 35), "BF16": (2.6, 7.6), "Q8_0": (2.3, 6.6), "Q5_1": (1.7, 2.3),
    "Q5_0": (1.8, 2.4), "Q4_1": (1.5, 3.5), "Q4_0": (2.6, 3.5), "IQ4_NL": (1.7, 2.1),
}  # fmt: skip
_NO_GPU = ("TQ2_0", "TQ1_0")  # ggml-cuda has no kernels for them
_GPU_KV = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
_GPU_KV_DIRECT = ("F16", "BF16", "Q8_0", "Q4_0")  # the others are converted to F16 first, each time


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: bytes/s, dense int8 and FP16 tensor operations/s, bytes."""

    name: str
    bandwidth: float
    int8: float
    fp16: float
    memory: int
    link: float  # bytes/s from pinned memory, as commonly measured


RTX_4090 = Card("NVIDIA GeForce RTX 4090", 1008e9, 660e12, 165e12, 25_390_000_000, 25e9)
RTX_3090 = Card("NVIDIA GeForce RTX 3090", 936e9, 284e12, 71e12, 25_430_000_000, 25e9)
RTX_3060 = Card("NVIDIA GeForce RTX 3060", 360e9, 102e12, 25.6e12, 12_620_000_000, 25e9)


def _gpu(card: Card, name: str) -> Device:
    dense = _TENSOR * card.int8 / 2
    matmul = {}
    for kind in TYPES.values():
        if kind.name in _NO_GPU:
            continue
        codebook = kind.name.startswith(("IQ1", "IQ2", "IQ3"))
        weights = card.bandwidth * (_READ_CODEBOOK if codebook else _READ) * 8 / kind.bpw
        large = _ATTENTION * card.fp16 / 2 if kind.name in ("F32", "F16", "BF16") else dense
        matmul[kind.name] = _rate(weights, _EXPERT * large, large)
    attention = {}
    for key in _GPU_KV:
        size = quant_type(key).bpw / 8 + (0 if key in _GPU_KV_DIRECT else 4)
        attention[key] = _rate(_READ * card.bandwidth / size, _ATTENTION * card.fp16 / 2)
    upload, read = _rounded(card.link), _rounded(_READ * card.bandwidth)
    pageable = _rounded(_PAGEABLE * card.link)
    speed = Speed(read, matmul, attention, 2.5e-6, 30e-6, upload, pageable)
    return Device(name, "CUDA", card.name, card.memory - 500_000_000, card.memory, speed)


def _cpu(name: str, cores: int, gib: int) -> Device:
    def rates(table: Mapping[str, tuple[float, ...]]) -> dict[str, Rate]:
        scale = 1e9 * _CORE * cores
        return {key: _rate(*(scale * figure for figure in row)) for key, row in table.items()}

    speed = Speed(
        _rounded(_RAM_READ * _DDR5_5600),
        rates(_CORE_MATMUL),
        rates(_CORE_ATTENTION),
        node=4e-6,
        split=10e-6,
        repacked=rates(_CORE_REPACKED),
    )
    total = gib * _GIB * 98 // 100  # the firmware and the kernel keep the rest
    return Device(CPU, "CPU", name, total - 3_500_000_000, total, speed)


def _rate(decode: float, prefill: float, dense: float | None = None) -> Rate:
    return Rate(_rounded(decode), _rounded(prefill), None if dense is None else _rounded(dense))


def _rounded(figure: float) -> float:
    return float(f"{figure:.3g}")


def _machine(name: str, cores: int, gib: int, *cards: Card) -> Hardware:
    part = "AMD Ryzen 9 7950X" if cores == 16 else "AMD Ryzen 7 7700X"
    gpus = tuple(_gpu(card, f"CUDA{index}") for index, card in enumerate(cards))
    listed = f"{len(cards)} x {cards[0].name}, " if cards else ""
    source = (
        f"published specifications times efficiency factors, not measurements: {listed}{part}, "
        f"{gib} GB of DDR5-5600 in two channels, PCIe 4.0 NVMe; RAM bandwidth x {_RAM_READ}, CPU "
        f"kernels as measured on one core of an AMD EPYC (Zen 5) x {_CORE} x cores, disk x 0.5"
    )
    if cards:
        source += (
            f"; GPU bandwidth x {_READ} ({_READ_CODEBOOK} for IQ1, IQ2 and IQ3), int8 tensor rate "
            f"x {_TENSOR} in large products and x {_EXPERT} more for experts, FP16 tensor rate x "
            f"{_ATTENTION}, {cards[0].link / 1e9:g} GB/s a card from pinned memory, half from other"
        )
    cpu = _cpu(part, cores, gib)
    return Hardware(name, source, "llama-cpp-python 0.3.36", cores, cpu, gpus, 0.5 * _NVME)


_HALF_LINK = replace(RTX_3090, link=12.5e9)  # two cards share a desktop's 16 lanes

MACHINES = (
    _machine("24gb-64gb", 8, 64, RTX_4090),
    _machine("24gb-128gb", 16, 128, RTX_4090),
    _machine("2x24gb-128gb", 16, 128, _HALF_LINK, _HALF_LINK),
    _machine("12gb-96gb", 8, 96, RTX_3060),
    _machine("cpu-96gb", 16, 96),
)


def main() -> None:
    for machine in MACHINES:
        text = json.dumps(machine.to_json(), indent=1) + "\n"
        (_FOLDER / f"{machine.name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
